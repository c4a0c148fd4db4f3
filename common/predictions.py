"""Predictions of a run: out-of-fold predictions, and those of the test images by all folds."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from common import processes
from common.errors import InputError, log
from common.infer.predict import drain, write_masks
from common.paths import Maps, read_array, read_parquet, write_table
from common.step import Step, cached_hash, run_step


@dataclass(frozen=True)
class Predicted:
    """Predictions of images: the main `table`, all `tables` by suffix, `maps` as from `read_array`, or None."""

    table: pd.DataFrame
    tables: dict
    maps: np.ndarray | Maps | None = None


def predicting_networks(job):
    """Return the networks used for prediction: all but those that only provide another one's initial weights."""
    trainings = job.recipe.networks(job)
    sources = {(n.starts_from.fold, n.starts_from.stage) for n in trainings if n.starts_from is not None}
    return [network for network in trainings if (network.fold, network.stage) not in sources]


def prediction_key(job):
    """Return everything that predictions depend on: weights, views and pixels."""
    images, networks = job.images, predicting_networks(job)
    weights = [cached_hash(network.weights(job.run)) for network in networks]
    precision = sorted({network.config.precision for network in networks})
    return [images.key, images.pixels_key, weights, precision, job.recipe.prediction_key(job.config)]


def prediction_files(job, names):
    """Return the file names of predictions, such as oof and test: their tables and maps."""
    tables = [f"{name}{suffix}.parquet" for name in names for suffix in job.recipe.suffixes(job.config)]
    return (*tables, *(f"{name}_probs{job.run.maps(name).suffix}" for name in names if job.recipe.maps))


def predict_all(job):
    """Predict each fold's held-out images with its networks, and the test images with the mean over all folds."""
    folds, recipe = job.config.folds, job.recipe
    held_out = [predict_part(job, f"fold{fold}/oof", [fold], job.images.rows(folds=[fold]), fold) for fold in folds]
    tests = predict_test(job)  # before the parts are joined, and deleted: a stop keeps what is predicted
    if processes.is_main():
        for suffix in recipe.suffixes(job.config):
            parts = [tables.pop(suffix) for tables in held_out]  # frees millions of boxes
            write_table(job.run.path(f"oof{suffix}.parquet"), pd.concat(parts, ignore_index=True))
            del parts
        if recipe.maps:
            paths = [job.run.maps(f"fold{fold}/oof") for fold in folds]
            shape = (sum(len(read_array(path)) for path in paths), *read_array(paths[0]).shape[1:])
            write_masks(job.run.maps("oof", new=True), shape, drain(paths))
    n = sum(len(job.images.rows(folds=[fold])) for fold in folds)
    if processes.is_main():
        _delete_parts(job, [f"fold{fold}/test" for fold in folds if recipe.pool])
        _delete_parts(job, [f"fold{fold}/oof" for fold in folds])
    log.info(f"predicted {n:,} out-of-fold and {tests:,} test images")
    return {"images": n + tests}


def predict_test(job):
    """Write the predictions of the test images, test.parquet and so on, and return the number of images."""
    folds, rows, recipe = job.config.folds, job.images.rows("test"), job.recipe
    if recipe.pool is None:
        predict_part(job, "test", list(folds), rows)
        return len(rows)
    parts = [predict_part(job, f"fold{fold}/test", [fold], rows, fold) for fold in folds]
    for suffix in recipe.suffixes(job.config) if processes.is_main() else ():
        write_table(job.run.path(f"test{suffix}.parquet"), recipe.pool(suffix, [part.pop(suffix) for part in parts]))
    return len(rows)


def predict_part(job, name, folds, rows, fold=-1):
    """Predict store rows with the networks of `folds` into the files `name`, unless current; return the tables."""

    def make(job):
        tables = job.recipe.predict(job, folds, rows, job.run.maps(name, new=True), name.replace("/", ", "))
        for suffix, table in tables.items():
            if "fold" not in table:
                table.insert(1 + ("row" in table), "fold", fold)
            if processes.is_main():
                write_table(job.run.path(f"{name}{suffix}.parquet"), table)

    reads = job.steps["predict"].reads
    run_step(job, Step(f"predict {name}", make, reads=reads, files=lambda job: prediction_files(job, [name])))
    return read_predictions(job, name).tables


def check_same_images(folder, ids, other, others, why, kind="images"):
    """Raise InputError, ending in `why`, unless a run has predicted the same images as the run `other`."""
    if differ := set(ids) ^ set(others):
        found = f"{len(differ):,} {kind} are predicted by it or by {other} alone, such as {min(differ)}"
        raise InputError(f"{folder}: {found}; {why}")


def mean_over_folds(suffix, tables):
    """Return the mean of the folds' tables of the test images, in the order of the first: a Solution's `pool`."""
    means = pd.concat(tables, ignore_index=True).groupby("image_id", sort=False, as_index=False)
    return means.mean(numeric_only=True).assign(fold=-1)


def _delete_parts(job, parts):
    """Delete per-fold parts that are no longer needed."""
    for part in parts:
        job.run.forget(f"predict {part}")
    for name in prediction_files(job, parts):
        job.run.path(name).unlink(missing_ok=True)


def read_predictions(job, name):
    """Return the Predicted of the out-of-fold ("oof") or test ("test") images that `predict` wrote."""
    suffixes = job.recipe.suffixes(job.config)
    tables = {suffix: read_parquet(job.run.path(f"{name}{suffix}.parquet")) for suffix in suffixes}
    return Predicted(tables[""], tables, read_array(job.run.maps(name)) if job.recipe.maps else None)
