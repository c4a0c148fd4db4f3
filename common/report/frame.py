"""The page of a run: the sections that all solutions share, around a solution's own."""

import numpy as np
import pandas as pd

from common.errors import InputError
from common.paths import checked_read, read_csv, read_json
from common.report import page, plots


def write_report(job, report):
    """Write report.html from the results that a run has so far.

    job: a common.job.Job. report: a module with TITLE, `headline(job, score)` (fragments above the sections),
    `sections(job)` (a list of sections, None for an empty one), `submission(job, record)` (fragments about
    submission.csv) and optionally EXPERIMENTS, prefixes of the stage names of experiments.
    """
    run, training = job.run, _training(job.run, getattr(report, "EXPERIMENTS", ()))
    rates = step_section(job, "find_lr", "Learning rates", _learning_rates)
    submission = step_section(job, "submit", "Submission", lambda job: _submission(job, report))
    own = [*_warnings(job), *_headline(job, report), *report.sections(job)]
    parts = [*own, training, rates, submission, _about(run)]
    title = f"{report.TITLE}, preset {job.preset}"
    page.write_page(run.path("report.html"), title, f"run {run.folder.name}", [p for p in parts if p is not None])


def step_section(job, step, title, fragments):
    """Return a section of `fragments(job)` if the result of a step is current.

    Returns None for a step that was never run, and a note for a stale result.
    """
    if job.run.step(step) is None:
        return None
    if not job.is_current(step):
        return page.note(f"{title}: out of date, run `{step}` again.")
    return page.section(title, *fragments(job))


def synthetic_note(run):
    """Return the warning about the scores of synthetic images, None for a run on real ones."""
    if not run.step("prepare")["synthetic"]:
        return None
    return page.note("Synthetic radiographs: the scores only show that the pipeline works.", "warning")


def _warnings(job):
    table = job.images.table
    yield synthetic_note(job.run)
    if (table.loc[table["split"] == "train", "patient_id"] == "").all():
        yield page.note("No patient ids: a patient may be in two folds, which would inflate the scores.", "warning")


def _headline(job, report):
    if not job.is_current("tune"):
        stale = job.run.step("tune") is not None
        return [page.note("The score is out of date: run `tune` again." if stale else "No score yet: run `tune`.")]
    path = job.run.path("score.json")
    score = read_json(path)
    if not isinstance(score, dict):
        raise InputError(f"{path}: damaged; delete it and run `tune` again")
    return report.headline(job, score)


def _training(run, experiments):
    """Return a section of learning curves and averaging variants, experiments collapsed; None without trainings."""
    figures, folded, rows, stages = [], [], [], {}
    for folder in sorted(path.parent for path in run.folder.glob("*/*/history.csv")):
        history = read_csv(folder / "history.csv", ["epoch"], dtype=float)
        history["epoch"] += 1  # readers count from 1
        name, kept = f"{folder.parent.name}, {folder.name}", None
        if (path := folder / "variants.json").is_file():
            summary = read_json(path)
            with checked_read(path, "summary"):
                metric = summary["metric"].lstrip("-")
                for variant, values in summary["variants"].items():
                    epochs, is_kept = [epoch + 1 for epoch in values["epochs"]], variant == summary["chosen"]
                    kept = (min(epochs), max(epochs)) if is_kept and epochs else kept
                    epochs = ", ".join(map(str, epochs)) or "every step"
                    label, state = page.METRICS.get(metric, metric), "kept" if is_kept else ""
                    rows.append((name, variant, epochs, label, float(values[metric]), state))
        if not folder.name.startswith(experiments):
            stages.setdefault(folder.name, []).append(history)
        caption = f"{name}; shaded: the epochs whose weights were kept"
        if len(history) and "loss" in history:
            lowest = history["loss"].fillna(np.inf).argmin()
            caption += f"; the validation loss is lowest in epoch {history['epoch'].iloc[lowest]:g}"
        drawn = page.figure(plots.learning_curves(history, kept), caption)
        (folded if folder.name.startswith(experiments) else figures).append(drawn)
    if not figures:
        return None
    table = pd.DataFrame(rows, columns=["training", "weights", "epochs", "metric", "validation", ""])
    means = []
    for stage, histories in stages.items():
        shortest = min(map(len, histories))  # of trainings that are still going on
        if len(histories) > 1 and shortest and (drawn := plots.mean_curves([each[:shortest] for each in histories])):
            means.append(page.figure(drawn, f"{stage}: mean over {len(histories)} folds, ± one standard deviation"))
    fragments = [*means, page.grid(*figures), page.table(table, "Weight averages, compared on the validation images")]
    if folded:
        fragments.append(page.details(f"{len(folded)} trainings of experiments", page.grid(*folded)))
    return page.section("Training", *fragments)


def _learning_rates(job):
    figures = []
    for path in sorted(job.run.folder.glob("lr_*.csv")):
        table, name = read_csv(path, ["lr", "loss", "suggestion"], dtype=float), path.stem.removeprefix("lr_")
        drawn = plots.lr_finder_plot(table["lr"], table["loss"], table["suggestion"].max())
        figures.append(page.figure(drawn, f"{name}: loss while the learning rate rises"))
    return [page.grid(*figures)]


def _submission(job, report):
    record = job.run.step("submit")
    if not record["rows"]:
        return ["No test images."]
    text, hidden = f"{record['rows']:,} rows; the file passes validation.", record["hidden"]
    if hidden:
        trivial = f"trivial submission {hidden['nothing']:.4f}"
        text += f" Score on the sample's hidden labels: {hidden['value']:.4f} ({trivial})."
    return [text, *report.submission(job, record)]


def _about(run):
    manifest = run.manifest
    steps = manifest.pop("steps", {})
    return page.section(
        "This run",
        page.details("Versions, inputs and seed", page.key_values(manifest)),
        page.details("Configuration", page.key_values(read_json(run.path("config.json")))),
        page.details("Steps", page.key_values(steps)),
    )
