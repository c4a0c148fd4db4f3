"""The tool `table`: runs side by side, as means over folds and pooled, paired by patient."""

import logging
from dataclasses import astuple
from pathlib import Path

import pandas as pd

from common.errors import InputError
from common.export import open_run
from common.metrics.statistics import bootstrap, paired_bootstrap
from common.paths import read_parquet, write_csv
from common.report import page, plots
from common.step import require

log = logging.getLogger(__name__)
NOTES = (
    "Intervals hold 95 % of resamples of the patients, the same patients for every row; differences are paired.",
    "p-values are two-sided and not corrected for the number of comparisons.",
)


def table_tool(recipe, config_class, results, metrics, published=None, note=None):
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
            out: CSV for all figures; a page with a plot is written beside it.
            resamples: Of the bootstrap by patient.
            seed: Of the bootstrap.
        """
        if resamples < 1 or seed < 0:
            raise InputError(f"--resamples {resamples} must be at least 1, --seed {seed} at least 0")
        if out is not None and out.suffix != ".csv":
            raise InputError(f"--out {out}: the figures are a .csv")
        tables = _read_runs(recipe, config_class, runs, results)
        first = next(iter(tables)) if against is None else against
        if first not in tables:
            raise InputError(f"--against {against}: the runs are {', '.join(tables)}")
        figures = compare(tables, metrics, first, resamples, seed)
        size = f"{len(tables[first]):,} images of {tables[first]['patient_id'].nunique():,} patients, out of fold"
        shown = side_by_side(figures, first)
        known = {} if published is None else {"published": published.fillna("–")}
        texts = [f"{title}\n{rows.to_string(index=False)}" for title, rows in (shown | known).items()]
        log.info("\n\n".join([size, *texts, "\n".join([*NOTES, *[note] * bool(note)])]))
        if out is not None:
            write_csv(out, figures)
            beside = [] if published is None else [page.table(published, "Published"), note]
            _write_page(out.with_suffix(".html"), figures, shown, [recipe.name, size], beside)
            log.info(f"{out} and {out.with_suffix('.html').name}")
        return 0

    return table


def _read_runs(recipe, config_class, runs, results):
    """Return the table of each run by its folder's name, rows sorted by image."""
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
        tables[name] = found.sort_values("image_id", ignore_index=True)
        first = next(iter(tables.values()))
        differ = set(first["image_id"]) ^ set(tables[name]["image_id"])
        if differ:
            raise InputError(
                f"{folder}: {len(differ):,} images are predicted by it or by {runs[0]} alone, such as {min(differ)}; "
                "runs can only be compared on the same images (the same --data, folds and selection)"
            )
        for column in ("truth", "patient_id"):
            other = first["image_id"][(first[column] != tables[name][column]).to_numpy()]
            if len(other):
                raise InputError(f"{folder}: another {column} of {other.iloc[0]} than in {runs[0]}")
    return tables


def compare(tables, metrics, first, resamples=1000, seed=0):
    """Return the figures of runs, one row per run and metric.

    Columns: run, metric, folds, fold_mean and fold_sd over the folds in which it is defined, pooled over all images
    with low and high, and the difference of the pooled values from the run `first` with difference_low,
    difference_high and p.
    """
    rows = []
    for name, table in tables.items():
        for metric, function in metrics.items():
            by_fold = pd.Series([function(part) for _, part in table.groupby("fold")]).dropna()
            row = {"run": name, "metric": metric, "folds": len(by_fold)}
            row |= {"fold_mean": by_fold.mean(), "fold_sd": by_fold.std()}
            score, other = (lambda rows, f=function, t=each: f(t.iloc[rows]) for each in (table, tables[first]))
            options = {"groups": table["patient_id"].to_numpy(), "n_resamples": resamples, "seed": seed}
            row |= dict(zip(("pooled", "low", "high"), astuple(bootstrap(score, **options)), strict=True))
            if name != first:
                change, row["p"] = paired_bootstrap(score, other, **options)
                row |= {"difference": change.estimate, "difference_low": change.low, "difference_high": change.high}
            rows.append(row)
    columns = ["difference", "difference_low", "difference_high", "p"]
    return pd.DataFrame(rows).reindex(columns=[*[name for name in rows[0] if name not in columns], *columns])


def side_by_side(figures, first):
    """Return tables of texts by title, with a row per run and a column per metric."""
    texts = {
        "mean of folds ± sd": lambda row: f"{row['fold_mean']:.4f} ± {row['fold_sd']:.4f}",
        "all images, interval by patient": lambda row: _text(row, "pooled", "low", "high", spec=".4f"),
        f"against {first}, paired by patient": lambda row: (
            _text(row, "difference", "difference_low", "difference_high", spec="+.4f") + f", p {row['p']:.3f}"
        ),
    }
    shown = {}
    for title, text in texts.items():
        part = figures[figures["run"] != first] if title.startswith("against") else figures
        if len(part):
            cells = part.assign(text=part.apply(text, axis=1).str.replace("nan", "–"))
            wide = cells.pivot(index="run", columns="metric", values="text")
            wide = wide.loc[part["run"].unique(), part["metric"].unique()]
            shown[title] = wide.rename_axis(columns=None).reset_index()
    return shown


def _text(row, estimate, low, high, spec):
    return f"{row[estimate]:{spec}} [{row[low]:{spec}}, {row[high]:{spec}}]"


def _write_page(path, figures, shown, about, beside):
    lines = {run: part[["pooled", "low", "high"]] for run, part in figures.groupby("run", sort=False)}
    drawn = plots.forest(lines, figures["metric"].unique().tolist(), "score")
    drawn = page.figure(drawn, "All images pooled, intervals by patient")
    tables = [page.table(rows, title) for title, rows in shown.items()]
    page.write_page(path, "Runs side by side", ", ".join(lines), [*about, drawn, *tables, *beside, *NOTES])
