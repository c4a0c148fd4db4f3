"""Every solution on its embedded sample, from files to a validated submission, and one page that shows them all."""

import importlib
import sys
import time
from pathlib import Path

from common.errors import InputError
from common.paths import read_json
from common.report import page


def run_all(names, argv, export):
    """Make the samples, run the preset `demo` of every solution under runs/demo, write index.html; exit status.

    Then one run goes the way over Kaggle: bundled, and predicting from the bundle alone in a notebook without network.
    `argv` may name another folder; `export(solution, run, out)` writes what a run has learnt. A second call continues,
    or does nothing where all is there.
    """
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        print("usage: python -m solutions demo [folder]", file=sys.stderr)
        return 2
    from common.cli import main

    root, rows, begun = Path(argv[0] if argv else "runs/demo"), [], time.monotonic()
    for name in names:
        sample = importlib.import_module(f"solutions.{name}.sample")
        config = importlib.import_module(f"solutions.{name}.config")
        print(
            f"— {name}: the sample competition, then prepare, train, predict, tune, score, submit, report", flush=True
        )
        data, out = sample.make_sample(root / "data" / name), root / name
        verbs = importlib.import_module(f"solutions.{name}.pipeline").VERBS
        for words in (
            ["run", "demo", "--data", str(data), "--out", str(out)],
            *([verb, "--out", str(out)] for verb in getattr(config, "IN_DEMO", ())),
        ):
            status = main(name, config, lambda verbs=verbs: verbs, words)
            if status:
                return status
        steps = read_json(out / "manifest.json")["steps"]
        rows.append((name, read_json(out / "score.json"), steps["submit"]["hidden"]))
    notebook = _rehearse(root, export)
    _write_index(root, rows, notebook)
    print(f"all done in {time.monotonic() - begun:.0f} s; look at {root / 'index.html'}", flush=True)
    return 0 if notebook else 2


def _rehearse(root, export, name="siim_pneumothorax"):
    """Execute the notebook of one run without network; False where that failed, which is said."""
    from common.kaggle.rehearse import rehearse
    from common.runs import start_log

    run, folder = root / name, root / "kaggle"
    done, made = folder / "executed.ipynb", folder / "kernel" / "working" / "submission.csv"
    if done.is_file() and made.is_file() and made.read_bytes() == (run / "submission.csv").read_bytes():
        return True
    print(f"— {name}: bundled for Kaggle, and its notebook executed without network", flush=True)
    start_log()
    try:
        rehearse(
            name, importlib.import_module(f"solutions.{name}.config").KAGGLE, run, root / "data" / name, folder, export
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _write_index(root, rows, notebook):
    sections = [page.note("Synthetic radiographs: the scores show that the pipeline works, nothing else.", "warning")]
    for name, score, hidden in rows:
        metric = hidden["metric"]
        figure = score[metric]
        cards = [
            (f"{metric}, out of fold", figure["estimate"], f"{figure['low']:.4f}–{figure['high']:.4f}"),
            (f"{metric}, hidden test labels", hidden["value"], f"predicting nothing: {hidden['nothing']:.4f}"),
        ]
        links = page.link(f"{name}/report.html", "report"), page.link(f"{name}/submission.csv", "submission")
        audit = root / name / "audit.json"
        verdict = [page.note(read_json(audit)["said"])] if audit.is_file() else []
        sections.append(page.section(name, page.cards(cards), *verdict, *links))
    told = page.link("kaggle/executed.ipynb", "the executed notebook") if notebook else "failed, see the terminal"
    sections.append(page.section("Kaggle", "One run as a bundle, and its notebook without network:", told))
    page.write_page(root / "index.html", "Demo", "every solution on its embedded sample", sections)
