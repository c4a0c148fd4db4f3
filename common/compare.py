"""The tools `table` and `score_predictions`: runs side by side, and anyone's predictions against labels.

Both score tables with one row per image; all scores in a comparison share the same bootstrap resamples of the patients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import tyro

from common.config import file_hash
from common.data.tables import match_names, named_images, read_patients
from common.errors import InputError, check, log
from common.job import open_run
from common.metrics.classification import mean_of_defined
from common.metrics.detection import evaluate, resample_aps
from common.metrics.statistics import interval, interval_with_p, resample, resample_aurocs
from common.paths import write_csv
from common.post.boxes import unpack_boxes
from common.predictions import check_same_images
from common.report import page, plots
from common.step import require

NOTES = (
    "Intervals hold 95 % of resamples of the patients, the same patients for every row; differences are paired.",
    "p-values are two-sided and not corrected for the number of comparisons.",
)
WIDE = 6  # with more metrics than this, tables have one row per metric


@dataclass(frozen=True)
class Comparison:
    """What the tools of one solution measure, and how they read it.

    results(job, split) -> dict from the suffix of a row's name ("" for the run itself) to a table of image_id,
    patient_id ("" if unknown), fold, truth (any comparable value) and the columns that `measure` needs; step: the step
    that wrote it. splits: possible values of --split, the default first.
    measure(table, groups, n_resamples, seed) -> dict from metric to (estimate, resamples); undefined: NaN or none.
    read_predictions(path), read_labels(path) -> tables by image_id with the columns that `measure` needs; labels may
    have a column patient_id. join(predictions, labels) -> the table for `measure`, from rows of the same images.
    further(table), paired(table, other) -> further columns by metric, of one table and of two.
    remarks(figures, first) -> lines about the output of `compare`. notes(job, split, name) -> lines about a run.
    listed(names, predicted, scored) -> how scored images relate to --list (names; None without it); all are indices.
    sections(tables) -> parts of the page. published: a table of published scores; note: a text about it.
    headline: the metric of `measure` that is the solution's score.
    """

    results: Callable
    measure: Callable
    read_predictions: Callable
    read_labels: Callable
    headline: str
    step: str = "predict"
    splits: tuple = ("oof",)
    join: Callable = lambda predictions, labels: predictions.join(labels)
    further: Callable | None = None
    paired: Callable | None = None
    remarks: Callable = lambda figures, first: []
    notes: Callable = lambda job, split, name: []
    listed: Callable = lambda names, predicted, scored: ""
    sections: Callable = lambda tables: []
    published: pd.DataFrame | None = None
    note: str = ""

    def join_images(self, predictions, labels):
        """Return the table for `measure` of the images in `predictions`, which must all have labels."""
        return self.join(predictions, labels.loc[predictions.index]).rename_axis("image_id").reset_index()

    def read(self, predictions, labels):
        """Return the tables of a file of predictions and of labels, with the same names for the same images."""
        found, truth = self.read_predictions(predictions), self.read_labels(labels)
        return found.set_axis(match_names(found.index, truth.index)), truth

    def score(self, predictions, labels):
        """Return the headline score of a file of predictions. Raises InputError if `labels` lacks one of its images."""
        found, truth = self.read(predictions, labels)
        check(found.index.isin(truth.index).all(), f"{labels}: lacks images of {predictions}")
        return float(self.measure(self.join_images(found, truth), np.arange(len(found)), 1, 0)[self.headline][0])

    def scores_by_fold(self, job):
        """Return the headline score of each fold of a run: a table of fold, images, estimate, low and high."""
        rows = []
        for fold, part in self.results(job, "oof")[""].groupby("fold"):
            found = interval(*self.measure(part, groups_of(part), 1000, 0)[self.headline], 0.95)
            rows.append((fold, len(part), found.estimate, found.low, found.high))
        return pd.DataFrame(rows, columns=["fold", "images", "estimate", "low", "high"])


def means_of(columns):
    """Return a `measure` function that averages columns (a dict from metric to column), leaving out NaN values."""

    def measure(table, groups, n_resamples, seed):
        pairs = columns.items()
        return {name: resample(table[column], groups, n_resamples, seed, True) for name, column in pairs}

    return measure


def measure_aurocs(y, probs, names, groups, n_resamples, seed):
    """Return each class's AUROC and their mean, by the Bayesian bootstrap; y: 0, 1 or NaN (n, C), probs: (n, C)."""
    areas, resamples = resample_aurocs(y, probs, groups, n_resamples, seed, skip_undefined=True)
    found = dict(zip(names, zip(areas, resamples.T, strict=True), strict=True))
    return found | {"mean": (mean_of_defined(areas), mean_of_defined(resamples))}


def measure_boxes(table, names, rule, groups, n_resamples, seed):
    """Return mAP and each class's AP, by the Bayesian bootstrap, of the packed boxes `found` against those in `truth`.

    names: of the classes; classes without a true box are left out. rule: a matching rule of `common.metrics.detection`.
    """
    found, truth = (unpack_boxes(table[name], table["image_id"]) for name in ("found", "truth"))
    result = evaluate(found, truth, table["image_id"], rule)
    aps = resample_aps(result, groups, n_resamples, seed)
    classes = {names[c]: (ap, aps[:, k]) for k, (c, ap) in enumerate(result.classes["ap"].items()) if ap == ap}
    return {"mAP": (result.mean_ap, mean_of_defined(aps)), **classes}


def comparison_tools(recipe, config_class):
    """Return the tools `table` and `score_predictions` of a solution by name."""
    comparison = recipe.comparison

    def table(
        runs: tuple[Path, ...],
        /,
        *,
        split: Literal[comparison.splits] = comparison.splits[0],
        against: str | None = None,
        out: Path | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ):
        """Print the scores of several runs: mean of folds, all images pooled, and paired differences by patient.

        All runs must have predicted the same images, but their folds may differ.

        Args:
            runs: Folders of runs.
            split: oof: the training images, out of fold. test: the test images whose labels are known.
            against: Row with which the others are compared; by default the first.
            out: CSV for all figures; a page with plots is written beside it.
            resamples: Of the bootstrap by patient.
            seed: Of the bootstrap.
        """
        _check_options(out, resamples, seed)
        tables, notes = _read_runs(recipe, config_class, runs, split)
        first = against or next(iter(tables))
        check(first in tables, f"--against {against}: the rows are {', '.join(tables)}")
        figures = compare(tables, comparison, first, resamples, seed)
        parts = side_by_side(figures, first)
        notes = [f"{split}: {_size(tables[first])}", *notes]
        remarks = [*comparison.remarks(figures, first), *NOTES]
        published = {} if comparison.published is None else {"published": comparison.published}
        shown = [f"{title}\n{_as_text(rows)}" for title, rows in (parts | published).items()]
        log.info("\n\n".join(["\n".join(notes), *shown, "\n".join([*remarks, *[comparison.note] * bool(published)])]))
        if out is not None:
            write_csv(out, figures)
            _write_page(out.with_suffix(".html"), recipe, tables, figures, parts, (notes, remarks))
            log.info(f"{out} and {out.with_suffix('.html').name}")
        return 0

    def score_predictions(
        predictions: Path,
        /,
        *,
        labels: Path,
        listed: Annotated[Path | None, tyro.conf.arg(name="list")] = None,
        patients: Path | None = None,
        out: Path | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ):
        """Score anyone's predictions or submission against labels, with intervals by patient; needs no run.

        The README of the solution says which files are read. Images without labels are left out and counted.

        Args:
            predictions: The predictions.
            labels: The labels, in the form of the challenge's training labels.
            listed: Names of the images that count, a CSV or a list; by default all that have labels.
            patients: CSV that maps image ids to patients, if the labels do not (read as --id-map of a run).
            out: CSV for the figures.
            resamples: Of the bootstrap.
            seed: Of the bootstrap.
        """
        _check_options(out, resamples, seed)
        inputs = {"the table of predictions": predictions, "--labels": labels, "--list": listed, "--patients": patients}
        for what, path in inputs.items():
            check(None in (out, path) or out.resolve() != path.resolve(), f"--out {out}: is {what}")
        log.info(f"labels of {_describe(labels)}; predictions of {_describe(predictions)}")
        found, truth = comparison.read(predictions, labels)
        ids, names = found.index, None
        if listed is not None:
            names = match_names(pd.Index(named_images(listed, known=ids)[0]), ids)
            ids = ids.intersection(names, sort=False)
            check(len(ids), f"{listed}: none of the predicted images is in it, such as {found.index[0]}")
            log.info(f"list {_describe(listed)}: {len(ids):,} of its {len(names):,} images are predicted")
        unknown, ids = ids.difference(truth.index, sort=False), ids.intersection(truth.index, sort=False)
        if not len(ids):
            raise InputError(f"{predictions}: {labels} has no labels for any of its images, such as {unknown[0]}")
        if len(unknown):
            log.info(f"left out: {len(unknown):,} predicted images without labels, such as {unknown[0]}")
        if len(ids) < len(truth):
            log.info(f"{len(truth) - len(ids):,} further images of {labels.name} do not count")
        joined = comparison.join_images(found.loc[ids], truth)
        if patients is not None:
            joined["patient_id"] = read_patients(patients, joined["image_id"])
        elif "patient_id" not in joined:
            joined["patient_id"] = ""
            log.info(f"{labels.name} names no patients: images count as independent, so the intervals are too narrow")
        figures = compare({predictions.name: joined}, comparison, predictions.name, resamples, seed)
        needs = "some must have a finding and others none"
        check(figures["pooled"].notna().any(), f"no score is defined on these {len(joined):,} images: {needs}")
        empty = figures.columns[figures.isna().all()].difference(["low", "high"])
        figures = figures.drop(columns=["run", *empty]).rename(columns={"pooled": "estimate"})
        texts = figures.apply(lambda row: _interval(row["estimate"], row["low"], row["high"]), axis=1)
        rows = figures.drop(columns=["estimate", "low", "high"]).assign(**{"interval by patient": texts})
        remarks = comparison.remarks(figures.rename(columns={"estimate": "pooled"}), None)
        said = [_size(joined), comparison.listed(names, found.index, ids)]
        log.info("\n".join(["", _as_text(rows), "", *remarks, "; ".join(filter(None, said))]))
        if out is not None:
            write_csv(out, figures)
        return len(unknown)

    return {"table": table, "score_predictions": score_predictions}


def _check_options(out, resamples, seed):
    check(resamples >= 1 and seed >= 0, f"--resamples {resamples} must be at least 1, --seed {seed} at least 0")
    check(out is None or out.suffix == ".csv", f"--out {out}: the figures are a .csv")


def _read_runs(recipe, config_class, runs, split):
    """Return the tables of all runs by row name, each sorted by image, and notes about the runs."""
    check(runs, "name the folders of the runs")
    tables, notes, names, comparison = {}, [], [], recipe.comparison
    for folder in runs:
        name = folder.resolve().name if folder.resolve().name not in names else str(folder)
        check(name not in names, f"{folder}: named twice")
        names.append(name)
        with open_run(recipe, config_class, folder, device="cpu") as job:
            require(job, job.steps[comparison.step])
            results = comparison.results(job, split)
            notes += comparison.notes(job, split, name)
            if (job.run.step("prepare") or {}).get("synthetic"):
                notes.append("Synthetic radiographs: the scores only show that the pipeline works")
        for end, found in results.items():
            tables[f"{name}{end}"] = found = found.sort_values("image_id", ignore_index=True)
            _check_same(folder, found, runs[0], next(iter(tables.values())))
    return tables, list(dict.fromkeys(notes))


def _check_same(folder, found, other, first):
    check(len(found), f"{folder}: its images have no labels (--split oof: the training images, out of fold)")
    why = "only runs on the same images can be compared"
    check_same_images(folder, found["image_id"], other, first["image_id"], why)
    for column in ("truth", "patient_id"):
        for image_id in first["image_id"][first[column] != found[column]][:1]:
            raise InputError(f"{folder}: another {column} of {image_id} than in {other}")


def compare(tables, comparison, first, n_resamples=1000, seed=0):
    """Return the scores of `tables` (name → table), one row per table and metric.

    Columns: run, metric; folds (number in which the metric is defined), fold_mean and fold_sd; pooled (over all
    images), low and high; difference of pooled from that of the table `first`, difference_low, difference_high and p;
    and the columns of `further` and `paired`. Raises InputError for fewer than two patients.
    """
    measured = {name: comparison.measure(table, groups_of(table), n_resamples, seed) for name, table in tables.items()}
    parts = []
    for name, table in tables.items():
        rows, folds = [], [part for fold, part in table.groupby("fold") if fold >= 0] if "fold" in table else []
        by_fold = [comparison.measure(part, np.arange(len(part)), 1, seed) for part in folds]
        for metric, (estimate, resamples) in measured[name].items():
            each = pd.Series([part.get(metric, [np.nan])[0] for part in by_fold], dtype=float).dropna()
            pooled, change = interval(estimate, resamples, 0.95), [np.nan] * 4
            if name != first:
                other, others = measured[first][metric]
                difference, p = interval_with_p(estimate - other, resamples - others, 0.95)
                change = [difference.estimate, difference.low, difference.high, p]
            within = (len(each), each.mean(), each.std())
            rows.append([name, metric, *within, pooled.estimate, pooled.low, pooled.high, *change])
        part = pd.DataFrame(rows, columns=COLUMNS)
        if comparison.further is not None:
            part = part.join(comparison.further(table), on="metric")
        if comparison.paired is not None and name != first:
            part = part.join(comparison.paired(table, tables[first]), on="metric")
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


COLUMNS = ["run", "metric", "folds", "fold_mean", "fold_sd", "pooled", "low", "high", "difference"]
COLUMNS += ["difference_low", "difference_high", "p"]


def groups_of(table):
    """Return the units that the bootstrap draws, (n,) of str: each row's patient, or its image if that is unknown."""
    return table["patient_id"].mask(table["patient_id"] == "", "image " + table["image_id"]).to_numpy()


def side_by_side(figures, first):
    """Return tables of texts by title: one row per run and one column per metric, or transposed for many metrics."""
    kinds = {"all images, interval by patient": lambda row: _interval(row["pooled"], row["low"], row["high"])}
    if figures["folds"].any():
        kinds = {"mean of folds ± sd": lambda row: f"{row['fold_mean']:.4f} ± {row['fold_sd']:.4f}"} | kinds
    paired = f"against {first}, paired by patient"
    kinds[paired] = lambda row: (
        f"{_interval(row['difference'], row['difference_low'], row['difference_high'], '+.4f')}, p {row['p']:.3f}"
    )
    counts = [name for name in figures.columns[len(COLUMNS) :] if pd.api.types.is_integer_dtype(figures[name])]
    shown, metrics = {}, figures["metric"].unique()
    for title, text in kinds.items():
        part = figures[figures["run"] != first] if title == paired else figures
        if len(part):
            texts = part.apply(text, axis=1).str.replace("nan", "–")
            wide = part.assign(text=texts).pivot(index="run", columns="metric", values="text")
            wide = wide.loc[part["run"].unique(), metrics].rename_axis(columns=None)
            if len(metrics) > WIDE:
                of_first = figures[figures["run"] == first].set_index("metric")[counts]
                wide = of_first.join(wide.T).rename_axis("metric")
            shown[title] = wide.reset_index()
    return shown


def _interval(estimate, low, high, spec=".4f"):
    if pd.isna(estimate):
        return "–"
    return f"{estimate:{spec}}" if pd.isna(low) else f"{estimate:{spec}} [{low:{spec}}, {high:{spec}}]"


def _as_text(rows):
    return rows.to_string(index=False, na_rep="–", float_format="%.4f".__mod__)


def _size(table):
    patients = table.loc[table["patient_id"] != "", "patient_id"].nunique()
    return f"{len(table):,} images" + (f" of {patients:,} patients" if patients else "")


def _describe(path):
    return f"{path.name}, sha256 {file_hash(path)[:16]}" if path.is_file() else str(path)


def _write_page(path, recipe, tables, figures, parts, texts):
    comparison, (notes, remarks) = recipe.comparison, texts
    drawn = {run: part[["pooled", "low", "high"]].to_numpy() for run, part in figures.groupby("run", sort=False)}
    plot = plots.forest(drawn, figures["metric"].unique().tolist(), "all images")
    sections = [*notes, page.section("Scores", page.figure(plot, "Intervals by patient"))]
    sections += [page.section(title[:1].upper() + title[1:], page.table(rows)) for title, rows in parts.items()]
    sections += [*comparison.sections(tables), page.section("How it is measured", *remarks)]
    if comparison.published is not None:
        sections.append(page.section("Published", comparison.note, page.table(comparison.published)))
    page.write_page(path, f"{recipe.name}: runs side by side", ", ".join(tables), sections)
