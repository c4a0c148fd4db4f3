"""Every solution on its embedded sample, from files to a validated submission, and one page that shows them all."""

import importlib
import sys
import time
from pathlib import Path

from common.paths import read_json
from common.report import page


def run_all(names, argv):
    """Make the samples, run the preset `demo` of every solution under runs/demo, write index.html; exit status.

    `argv` may name another folder. A second call continues, or does nothing where all is there.
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
        for words in (["run", "demo", "--data", str(data), "--out", str(out)],
                      *([verb, "--out", str(out)] for verb in getattr(config, "IN_DEMO", ()))):  # fmt: skip
            status = main(name, config, lambda verbs=verbs: verbs, words)
            if status:
                return status
        steps = read_json(out / "manifest.json")["steps"]
        rows.append((name, read_json(out / "score.json"), steps["submit"]["hidden"]))
    _write_index(root, rows)
    print(f"all done in {time.monotonic() - begun:.0f} s; look at {root / 'index.html'}", flush=True)
    return 0


def _write_index(root, rows):
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
    page.write_page(root / "index.html", "Demo", "every solution on its embedded sample", sections)
