"""The command `cxr demo`: run every solution on its embedded sample, and write one page of links."""

import importlib
import re
import sys
import time
from pathlib import Path

from nbconvert import HTMLExporter

from common import cli
from common.errors import InputError
from common.kaggle.rehearse import rehearse
from common.paths import read_json
from common.report import page
from common.runs import start_log

NOTEBOOK = "kaggle/executed.ipynb"


def run_all(names, argv, export):
    """Run every solution's preset `demo`, rehearse one Kaggle notebook and write index.html; return an exit status.

    argv: optionally, the folder for all files (default: runs/demo). A repeated call resumes the work.
    """
    root, rows, begun = Path(argv[0] if argv else "runs/demo"), [], time.monotonic()
    for name in names:
        parts = ("sample", "config", "pipeline")
        sample, config, pipeline = (importlib.import_module(f"solutions.{name}.{part}") for part in parts)
        verbs = pipeline.SOLUTION.verbs
        print(f"— {name}: the sample competition, then {', '.join(cli.VERBS)}", flush=True)
        data, out = sample.make_sample(root / "data" / name), root / name
        lines = [["run", "demo", "--data", str(data)], *([verb] for verb in getattr(config, "IN_DEMO", ()))]
        for words in lines:
            if status := cli.main(name, config, verbs, [*words, "--out", str(out)]):
                return status
        steps = read_json(out / "manifest.json")["steps"]
        rows.append((name, pipeline.SOLUTION.report.TITLE, read_json(out / "score.json"), steps["submit"]["hidden"]))
    rehearsed = _rehearse(root, export)
    _write_index(root, rows, rehearsed)
    print(f"all done in {time.monotonic() - begun:.0f} s; look at {root / 'index.html'}", flush=True)
    return 0 if rehearsed else 2


def _rehearse(root, export, name="siim_pneumothorax"):
    """Execute the notebook of one run without network access; if it fails, print the reason and return False."""
    run, folder = root / name, root / "kaggle"
    executed, submission = root / NOTEBOOK, folder / "kernel" / "working" / "submission.csv"
    if executed.is_file() and submission.is_file() and submission.read_bytes() == (run / "submission.csv").read_bytes():
        return True
    print(f"— {name}: bundling it for Kaggle and executing its notebook without network", flush=True)
    start_log()
    source = importlib.import_module(f"solutions.{name}.config").KAGGLE
    try:
        rehearse(name, source, run, root / "data" / name, folder, export)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _write_index(root, rows, rehearsed):
    sections = [page.note("Synthetic radiographs: the scores only show that the pipeline works.", "warning")]
    for name, title, score, hidden in rows:
        figure, metric = score[hidden["metric"]], page.METRICS[hidden["metric"]]
        cards = [
            (f"{metric}, out of fold", figure["estimate"], page.range_text(figure)),
            (f"{metric}, hidden test labels", hidden["value"], f"predicting nothing: {hidden['nothing']:.4f}"),
        ]
        links = page.link(f"{name}/report.html", "report"), page.link(f"{name}/submission.csv", "submission")
        audit = root / name / "audit.json"
        verdict = [page.note(read_json(audit)["said"])] if audit.is_file() else []
        pictures = _pictures(root / name / "report.html")
        sections.append(page.section(title, page.cards(cards), *verdict, pictures, *links))
    result = "failed, see the terminal"
    if rehearsed:
        notebook = HTMLExporter(template_name="basic").from_filename(str(root / NOTEBOOK))[0]
        shown = NOTEBOOK.replace(".ipynb", ".html")
        page.write_page(root / shown, "Executed notebook", NOTEBOOK, [page.Html(notebook)])
        result = page.join(page.link(shown, "the executed notebook"), page.link(NOTEBOOK, "the notebook file"))
    sections.append(page.section("Kaggle", "One run was bundled and its notebook executed without network:", result))
    page.write_page(root / "index.html", "Demo", "every solution on its embedded sample", sections)


def _pictures(path, count=2):
    """Return the first images of a report as a grid, starting at its section Pictures if it has one."""
    text = path.read_text("utf-8").split("<h2>Pictures</h2>")[-1] if path.is_file() else ""
    figures = [one for one in re.findall("<figure>.*?</figure>", text, re.DOTALL) if "data:image/jpeg" in one]
    return page.grid(*map(page.Html, figures[:count]))
