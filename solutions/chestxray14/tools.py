"""The tools: runs side by side, class activation maps against boxes, and scores of anyone's predictions."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import tyro

from common.errors import InputError
from common.export import open_run
from common.paths import write_csv
from common.report import class_plots, page, plots
from common.step import key_of, run_step
from solutions.chestxray14.config import LABELS, Config
from solutions.chestxray14.labels import DIGESTS, names_digest, read_names, stems
from solutions.chestxray14.localise import STEP, THRESHOLDS, write_localisation
from solutions.chestxray14.pipeline import SOLUTION
from solutions.chestxray14.predictions import CLASSES, describe_file, read_runs, read_scores, read_truth
from solutions.chestxray14.published import NOTE, describe_labels, published_classes, published_means
from solutions.chestxray14.scoring import FEW, MEAN, by_fold, class_table, comparison, few, undefined

log = logging.getLogger(__name__)
NOTES = (
    "Intervals hold 95 % of the resamples of the Bayesian bootstrap, which weights whole patients, the same way for "
    "every row.",
    "p-values are two-sided. DeLong's test treats images as independent, which those of one patient are not, so its "
    "p-values are too small; p_delong_holm is corrected for the number of classes by Holm's rule, the others are not.",
    "The paired t-test over classes is our reading of SDFN's test; CXR-IRNet has none. It asks whether the classes "
    "agree, not whether other patients would.",
)


def table(
    runs: tuple[Path, ...],
    /,
    *,
    split: Literal["test", "oof"] = "test",
    against: str | None = None,
    out: Path | None = None,
    resamples: int = 1000,
    seed: int = 0,
):
    """Print the AUROC of each class, and their mean, of several runs, with intervals by patient and paired tests.

    A run of two views has three rows: each view and its answer. All runs must have predicted the same images.

    Args:
        runs: Folders of runs.
        split: test: the test images whose labels are known. oof: the training images, out of fold.
        against: Row with which the others are compared; by default the first.
        out: CSV for all figures; a page with plots is written beside it.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    if not runs:
        raise InputError("name the folders of the runs")
    _check_options(out, resamples, seed)
    scores, images, notes, folds = read_runs(runs, split)
    first = next(iter(scores)) if against is None else against
    if first not in scores:
        raise InputError(f"--against {against}: the rows are {', '.join(scores)}")
    y, patients = images[CLASSES].to_numpy(), images["patient_id"].to_numpy()
    options = {"patients": patients, "labels": LABELS, "n_resamples": resamples, "seed": seed}
    found = {name: class_table(y, score, **options) for name, score in scores.items()}
    others = {name: score for name, score in scores.items() if name != first}
    pairs = {name: comparison(y, score, scores[first], **options) for name, score in others.items()}
    within = {name: by_fold(y, score, folds[name]) for name, score in scores.items()} if split == "oof" else {}
    notes = [f"{split}: {len(images):,} images of {len(set(patients)):,} patients", *notes, *_undefined(found[first])]
    tests = [_test_line(name, first, pair) for name, pair in pairs.items()] + _within_line(within, first)
    published = [f"  {mean:.4f}  {name} ({source})" for name, mean, source in published_means().itertuples(index=False)]
    lines = [*notes, "", _side_by_side(found).to_string(index=False), *_too_few(found[first]), "", *tests, "", *NOTES]
    log.info("\n".join([*lines, "", NOTE, *published]))
    if out is not None:
        write_csv(out, _long_table(found, pairs, first, split, within))
        _write_page(out.with_suffix(".html"), y, scores, found, pairs, notes, tests, split)
        log.info(f"\n{out} and {out.with_suffix('.html').name}")
    return 0


def score_predictions(
    predictions: Path,
    /,
    *,
    labels: Path,
    listed: Annotated[Path | None, tyro.conf.arg(name="list")] = None,
    out: Path | None = None,
    resamples: int = 1000,
    seed: int = 0,
):
    """Score anyone's predictions: the AUROC of each class and their mean, with intervals by patient and DeLong's.

    Args:
        predictions: CSV. The first column names the image (Image Index or image_id, with .png or without); the others
            bear the names of classes (Pleural_Thickening, prob_Pleural_Thickening, pleural thickening). Any numbers
            that rank will do.
        labels: NIH's label table, such as Data_Entry_2017.csv (or .csv.gz).
        listed: Names of the images that count, such as test_list.txt; by default all that have labels.
        out: CSV for the figures.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    _check_options(out, resamples, seed)
    if out is not None and out.resolve() == predictions.resolve():
        raise InputError(f"--out {out}: is the table of predictions")
    (scores, unused), (truth, patients) = read_scores(predictions), read_truth(labels)
    log.info(f"labels of {describe_file(labels)}; predictions of {describe_file(predictions)}")
    log.info(f"{labels.name}: {describe_labels(truth)}")
    if unused:
        log.info(f"ignored columns that are not classes: {', '.join(unused)}")
    ids, names = scores.index, None
    if listed is not None:
        names = pd.Index(stems(read_names(listed)))
        ids = ids.intersection(names, sort=False)
        if not len(ids):
            raise InputError(f"{listed}: none of the predicted images is in it, such as {scores.index[0]}")
        rest = f"{len(scores) - len(ids):,} other predictions do not count"
        log.info(f"list {describe_file(listed)}: {len(ids):,} of its {len(names):,} images are predicted; {rest}")
    unknown, ids = ids.difference(truth.index, sort=False), ids.intersection(truth.index, sort=False)
    if not len(ids):
        raise InputError(f"{predictions}: {labels} has no labels for any of its images, such as {unknown[0]}")
    if len(unknown):
        log.info(f"left out: {len(unknown):,} predicted images without labels, such as {unknown[0]}")
    missing = [label for label in LABELS if label not in scores]
    if missing:
        log.info(f"no column for {', '.join(missing)}: left out of the mean, which is not the benchmark's")
    groups, known = None if patients is None else patients[ids].to_numpy(), list(scores)
    if groups is None:
        log.info(f"{labels.name} has no Patient ID: images count as independent, so the intervals are too narrow")
    found = class_table(truth.loc[ids, known].to_numpy(), scores.loc[ids].to_numpy(), groups, known, resamples, seed)
    counts = f"{len(ids):,} images" + ("" if groups is None else f" of {len(set(groups)):,} patients")
    mean = f"mean AUROC {_interval(found.iloc[-1])} over {found['auroc'].notna().sum() - 1} classes, {counts}"
    lines = [*_undefined(found), "", _one_table(found).to_string(index=False), *_too_few(found)]
    log.info("\n".join([*lines, "", f"{mean}; {_comparability(ids, scores.index, listed, names)}"]))
    if out is not None:
        write_csv(out, found)
    return len(unknown)


def localise(
    run: Path,
    /,
    *,
    threshold: tuple[float, ...] = THRESHOLDS,
    boxes: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
):
    """Measure the class activation maps of a finished run against the true boxes of its images.

    Writes localisation.csv (a row per box, in pixels of the 1024 × 1024 image), localisation_table.csv (a row per
    class) and localisation.html (the table, and the best, median and worst box of each class).

    Args:
        run: Folder of the run.
        threshold: Of the maps, scaled to [0, 1]. One is used as it is; of several the best is chosen on the boxes of
            one half of the patients for those of the other.
        boxes: Table of boxes to measure on instead of NIH's, as for the option --boxes of a run; needs --out.
        out: Folder for the three files; the run's by default.
        device: auto, cpu, cuda or cuda:<n>.
        workers: Processes that read images.
    """
    for value in threshold:
        if not 0 < value <= 1:
            raise InputError(f"--threshold must lie above 0 and be at most 1, not {value:g}")
    if not threshold:
        raise InputError("--threshold: name one or several")
    if boxes is not None and out is None:
        raise InputError("--boxes: name the folder for the figures by --out; the run's own are those of NIH's boxes")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"{out}: not a folder (--out)")
    with open_run(SOLUTION, Config, run, device=device, workers=workers) as job:
        if boxes is None and (out is None or out.resolve() == job.run.folder.resolve()):
            job.run.forget(STEP.name)  # always computed again: the thresholds may be other ones
            run_step(job, replace(STEP, make=partial(write_localisation, thresholds=threshold)))
        else:
            key_of(job, STEP)  # refuses predictions of other networks
            write_localisation(job, threshold, out, boxes)
    return 0


TOOLS = {"table": table, "localise": localise, "score_predictions": score_predictions}

# ---- text ----------------------------------------------------------------------------------------------------------


def _check_options(out, resamples, seed):
    if resamples < 1 or seed < 0:
        raise InputError(f"--resamples {resamples} must be at least 1, --seed {seed} at least 0")
    if out is not None and out.suffix != ".csv":
        raise InputError(f"--out {out}: the figures are a .csv")


def _comparability(ids, predicted, listed, names):
    """Return how the scored images relate to the official test list; names: of the list `listed`, or None."""
    if names is None:
        return f"not the official test list: {len(ids):,} images, not comparable with published means"
    missing = len(names.difference(predicted))
    text = f"{missing:,} of the {len(names):,} images of {listed.name} are missing from the predictions"
    if names_digest(names) != DIGESTS["test"]:
        return f"{text}; it is not the official test list, not comparable with published means"
    if len(ids) < len(names):
        return f"{text}, {len(names) - missing - len(ids):,} from the labels: not comparable with published means"
    return f"all {len(names):,} images of the official test list, verified by the hash of its names"


def _too_few(found):
    rows = found[few(found)]
    counts = ", ".join(f"{label} {n}" for label, n in zip(rows["label"], rows["positive_patients"], strict=True))
    return [f"* fewer than {FEW} positive patients ({counts}): too few for a reliable interval"] if counts else []


def _undefined(found):
    absent = undefined(found)
    return [f"labels with images of one kind only, left out of the mean: {', '.join(absent)}"] if absent else []


def _interval(row, names=("auroc", "low", "high"), spec=".4f"):
    estimate, low, high = (row[name] for name in names)
    if pd.isna(estimate):
        return "–"
    return f"{estimate:{spec}}" if pd.isna(low) else f"{estimate:{spec}} [{low:{spec}}, {high:{spec}}]"


def _p(value):
    return "–" if pd.isna(value) else f"{value:.3f}" if value >= 0.001 else "<0.001"


def _counts(found):
    counts = found[["label", "positive", "positive_patients"]].astype(object).fillna("")
    return counts.rename(columns={"positive_patients": "of patients"})


def _marked(found):
    return found.apply(_interval, axis=1) + np.where(few(found), " *", "")


def _side_by_side(found):
    return _counts(next(iter(found.values()))).assign(**{name: _marked(each) for name, each in found.items()})


def _one_table(found):
    delong = found.apply(_interval, axis=1, names=("auroc", "delong_low", "delong_high")).str.extract(r"(\[.*\])")[0]
    return _counts(found).assign(**{"AUROC, by patient": _marked(found), "DeLong": delong.fillna("–")})


def _test_line(name, first, pair):
    mean, classes = pair.iloc[-1], pair.iloc[:-1].dropna(subset="difference")
    significant = classes.loc[classes["p_delong_holm"] < 0.05, "difference"]
    difference = _interval(mean, ("difference", "difference_low", "difference_high"), "+.4f")
    return (
        f"{name} against {first}: mean AUROC {difference}, p {_p(mean['p_bootstrap'])} (bootstrap by patient), "
        f"p {_p(mean['p_t_test'])} (paired t-test over classes); higher in {(classes['difference'] > 0).sum()} of "
        f"{len(classes)} classes; by DeLong with Holm's correction, p < 0.05, higher in {(significant > 0).sum()}, "
        f"lower in {(significant < 0).sum()}"
    )


def _within_line(within, first):
    if all(each["folds"] < 2 for each in within.values()):
        return []
    means = []
    for name, each in within.items():
        difference = "" if name == first else f", {each['mean'] - within[first]['mean']:+.4f}"
        means.append(f"{name} {each['mean']:.4f} ({each['folds']} folds{difference})")
    text = (
        "Out of fold the scores of several networks are ranked in one list; within folds each network is ranked alone"
    )
    return [f"{text}: mean AUROC {', '.join(means)}"]


def _long_table(found, pairs, first, split, within):
    tables = []
    for name, each in found.items():
        joined = each.merge(pairs[name], on="label").assign(against=first) if name in pairs else each
        tables.append(joined.assign(run=name, split=split))
    both = pd.concat(tables)
    if within:
        means = both["run"].map({name: each["mean"] for name, each in within.items()})
        both["auroc_by_fold"] = means.where(both["label"] == MEAN)
    else:
        both = both.merge(published_classes(MEAN), on="label")
    return both[["run", "split", *both.columns.drop(["run", "split"])]]


def _write_page(path, y, scores, found, pairs, notes, tests, split):
    figures = {name: each[["auroc", "low", "high"]].to_numpy() for name, each in found.items()}
    details = []
    for name, pair in pairs.items():
        rows = pair.assign(**{p: pair[p].map(_p) for p in pair.columns[pair.columns.str.startswith("p_")]})
        details.append(page.details(f"{name}, class by class", page.table(rows)))
    published = [page.table(published_means())]
    if split == "test":
        ours = pd.DataFrame({"label": [*LABELS, MEAN], **{name: each["auroc"] for name, each in found.items()}})
        rows = ours.merge(published_classes(MEAN), on="label")
        published.append(page.details("Class by class, beside these runs", page.table(rows)))
    areas = _side_by_side(found).replace(", ", ",\xa0", regex=True)  # intervals stay on one line
    parts = [
        *notes,
        page.section(
            "Areas",
            page.figure(plots.forest(figures, [*LABELS, MEAN]), "AUROC, intervals by patient"),
            page.table(areas),
            *_too_few(next(iter(found.values()))),
        ),
        *([page.section("Tests", *tests, *details)] if tests else []),
        page.section("ROC curves", page.figure(class_plots.roc_panels(y, scores, LABELS), "ROC curves of each class")),
        page.section("How it is measured", *NOTES),
        page.section("Published", NOTE, *published),
    ]
    page.write_page(path, "ChestX-ray14: runs side by side", ", ".join(scores), parts)
