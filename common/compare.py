"""The tool `table`: runs side by side, as means over folds and pooled, paired by patient."""

import logging
from dataclasses import astuple
from pathlib import Path

import pandas as pd

from common.errors import InputError
from common.export import open_run
from common.metrics.statistics import bootstrap, paired_bootstrap
from common.paths import read_parquet, write_csv
from common.step import require

log = logging.getLogger(__name__)
NOTES = (
    "Intervals hold 95 % of resamples of the patients, the same patients for every row; differences are paired.\n"
    "p-values are two-sided and not corrected for the number of comparisons."
)


def table_tool(recipe, config_class, results, metrics, published=None, note=""):
    """Return the tool `table` of a solution.

    results(job, out-of-fold predictions) -> table of image_id, patient_id, fold, truth (any comparable value) and what
    the metrics need. metrics: name → function of such a table → float, NaN where it is undefined. published: a table of
    published scores, or None; note: a text about it.
    """

    def table(
        runs: tuple[Path, ...],
        /,
        *,
        against: str | None = None,
        out: Path | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ):
        """Print the out-of-fold scores of several runs: mean of folds, all images pooled, and paired differences.

        All runs must have predicted the same images, but their folds may differ.

        Args:
            runs: Folders of runs.
            against: Run with which the others are compared; by default the first.
            out: CSV for all figures.
            resamples: Of the bootstrap by patient.
            seed: Of the bootstrap.
        """
        if resamples < 1 or seed < 0:
            raise InputError(f"--resamples {resamples} must be at least 1, --seed {seed} at least 0")
        tables = _read_runs(recipe, config_class, runs, results)
        names = list(tables)
        first = against or names[0]
        if first not in names:
            raise InputError(f"--against {against}: the runs are {', '.join(names)}")
        figures = compare(tables, metrics, first, resamples, seed)
        texts = side_by_side(figures, first) | ({} if published is None else {"published": published})
        size = f"{len(tables[first]):,} images of {tables[first]['patient_id'].nunique():,} patients, out of fold"
        form = {"index": False, "na_rep": "–", "float_format": "%.4f".__mod__}
        parts = [f"{title}\n{rows.to_string(**form)}" for title, rows in texts.items()]
        log.info("\n\n".join([size, *parts, NOTES, *[note] * bool(note)]))
        if out is not None:
            write_csv(out, figures)
        return 0

    return table


def _read_runs(recipe, config_class, runs, results):
    """Return the results of each run by its folder's name, rows sorted by image."""
    if not runs:
        raise InputError("name the folders of the runs")
    tables = {}
    for folder in runs:
        name = folder.resolve().name if folder.resolve().name not in tables else str(folder)
        if name in tables:
            raise InputError(f"{folder}: named twice")
        with open_run(recipe, config_class, folder, device="cpu") as job:
            require(job, job.steps["predict"])
            found = results(job, read_parquet(job.run.path("oof.parquet")))
        tables[name] = found = found.sort_values("image_id", ignore_index=True)
        first = next(iter(tables.values()))
        differ = set(first["image_id"]) ^ set(found["image_id"])
        if differ:
            raise InputError(
                f"{folder}: {len(differ):,} images are predicted by it or by {runs[0]} alone, such as {min(differ)}; "
                "only runs on the same images can be compared"
            )
        for column in ("truth", "patient_id"):
            for image_id in first["image_id"][first[column] != found[column]][:1]:
                raise InputError(f"{folder}: another {column} of {image_id} than in {runs[0]}")
    return tables


def compare(tables, metrics, first, resamples=1000, seed=0):
    """Return the figures of runs, one row per run and metric.

    Columns: run, metric, folds, fold_mean and fold_sd over the folds in which it is defined, pooled over all images
    with low and high, and the difference of the pooled values from the run `first` with difference_low,
    difference_high and p.
    """
    rows = []
    for name, table in tables.items():
        options = {"groups": table["patient_id"].to_numpy(), "n_resamples": resamples, "seed": seed}
        for metric, function in metrics.items():
            score, other = (lambda rows, f=function, t=each: f(t.iloc[rows]) for each in (table, tables[first]))
            by_fold = pd.Series([function(part) for _, part in table.groupby("fold")]).dropna()
            pooled, change = bootstrap(score, **options), [None] * 4
            if name != first:
                difference, p = paired_bootstrap(score, other, **options)
                change = [*astuple(difference), p]
            rows.append([name, metric, len(by_fold), by_fold.mean(), by_fold.std(), *astuple(pooled), *change])
    columns = ["run", "metric", "folds", "fold_mean", "fold_sd", "pooled", "low", "high", "difference"]
    return pd.DataFrame(rows, columns=[*columns, "difference_low", "difference_high", "p"])


def side_by_side(figures, first):
    """Return tables of texts by title, with a row per run and a column per metric."""
    change = "{difference:+.4f} [{difference_low:+.4f}, {difference_high:+.4f}], p {p:.3f}"
    kinds = {"mean of folds ± sd": "{fold_mean:.4f} ± {fold_sd:.4f}"}
    kinds["all images, interval by patient"] = "{pooled:.4f} [{low:.4f}, {high:.4f}]"
    shown, metrics = {}, figures["metric"].unique()
    for title, text in (kinds | {f"against {first}, paired by patient": change}).items():
        part = figures[figures["run"] != first] if text == change else figures
        if len(part):
            texts = [text.format(**row).replace("+nan", "–").replace("nan", "–") for row in part.to_dict("records")]
            wide = part.assign(text=texts).pivot(index="run", columns="metric", values="text")
            shown[title] = wide.loc[part["run"].unique(), metrics].rename_axis(columns=None).reset_index()
    return shown
