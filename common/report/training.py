"""The page's section on trainings: scores, epochs kept, time and memory by fold, learning curves, weight averages."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from common.paths import checked_read, read_csv, read_json
from common.report import page, plots

FOLDS = "Folds: score out of fold, epochs whose weights were kept, time and memory"


@dataclass(frozen=True)
class Training:
    """One training of the run: its fold's folder and its stage. Epochs count from 1.

    kept: first and last epoch of the final weights, or (); best: the epoch with the best metric, or None; variants:
    rows of the table of weight averages. All three are empty until the training has finished.
    """

    folder: str
    stage: str
    history: pd.DataFrame
    kept: tuple = ()
    best: int | None = None
    variants: tuple = ()


def read_trainings(run):
    """Return every Training of a run, experiments included."""
    return [_read(path.parent) for path in sorted(run.folder.glob("*/*/history.csv"))]


def _read(folder):
    history, path = read_csv(folder / "history.csv", ["epoch"], dtype=float), folder / "variants.json"
    history["epoch"] += 1
    if not path.is_file():
        return Training(folder.parent.name, folder.name, history)
    summary, rows, kept = read_json(path), [], ()
    with checked_read(path, "summary"):
        name = summary["metric"].lstrip("-")
        for variant, values in summary["variants"].items():
            epochs, state = [epoch + 1 for epoch in values["epochs"]], "kept" if variant == summary["chosen"] else ""
            kept = (min(epochs), max(epochs)) if state and epochs else kept
            texts = f"{folder.parent.name}, {folder.name}", variant, ", ".join(map(str, epochs)) or "every step"
            score = np.nan if values[name] is None else float(values[name])  # undefined on this fold
            rows.append((*texts, page.METRICS.get(name, name), score, state))
        scores = history[name] if summary["metric"] == name else -history[name]
        best = None if scores.isna().all() else int(history["epoch"][scores.idxmax()])
    return Training(folder.parent.name, folder.name, history, kept, best, tuple(rows))


def training_section(trainings, experiments, scores):
    """Return the section on trainings, with those of `experiments` (stage prefixes) collapsed; None if there are none.

    scores: a table of fold, images, estimate, low and high; None while nothing is scored.
    """
    own, folded = ([one for one in trainings if one.stage.startswith(experiments) == b] for b in (False, True))
    if not own:
        return None
    means = []
    for stage in dict.fromkeys(one.stage for one in own):
        histories = [one.history for one in own if one.stage == stage]
        shortest = min(map(len, histories))  # some trainings may not have finished
        drawn = plots.mean_curves([each[:shortest] for each in histories]) if shortest > 1 < len(histories) else None
        if drawn:
            means.append(page.figure(drawn, f"{stage}: mean over {len(histories)} folds, ± one standard deviation"))
    names = ["training", "weights", "epochs", "metric", "validation", ""]
    variants = pd.DataFrame([row for one in trainings for row in one.variants], columns=names)
    caption = f"{len(folded)} trainings of experiments"
    return page.section(
        "Training",
        page.table(_folds(own, scores), FOLDS, {"minutes": ".1f", "memory, GB": ".1f"}),
        *[page.grid(*means)] * bool(means),
        page.grid(*map(_curves, own)),
        page.details("Weight averages, compared on the validation images", page.table(variants)),
        *[page.details(caption, page.grid(*map(_curves, folded)))] * bool(folded),
    )


def _folds(trainings, scores):
    rows, known = [], {} if scores is None else {f"fold{row.fold}": row for row in scores.itertuples()}
    for folder in dict.fromkeys(one.folder for one in trainings):
        mine, score = [one for one in trainings if one.folder == folder], known.get(folder)
        costs = pd.concat([one.history for one in mine]).reindex(columns=["epoch", "seconds", "memory_mb"])
        kept = [f"{t.stage} {'–'.join(map(str, dict.fromkeys(t.kept)))}" for t in mine if t.kept]
        text = score and page.interval_text(score.estimate, score.low, score.high)
        spent = costs["seconds"].sum(min_count=1) / 60, costs["memory_mb"].max() / 1000
        rows.append((folder.removeprefix("fold"), score and score.images, text, ", ".join(kept), len(costs), *spent))
    names = ["fold", "images", "score", "epochs kept", "epochs", "minutes", "memory, GB"]
    return pd.DataFrame(rows, columns=names).dropna(axis=1, how="all")


def _curves(training):
    caption = f"{training.folder}, {training.stage}; shaded: the epochs whose weights were kept"
    if len(training.history) and "loss" in training.history:
        lowest = training.history["loss"].fillna(np.inf).argmin()
        caption += f"; the validation loss is lowest in epoch {training.history['epoch'].iloc[lowest]:g}"
    return page.figure(plots.learning_curves(training.history, training.kept or None), caption)
