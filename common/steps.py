"""What the verbs of every solution do alike: remember what a run was made from, refuse to mix, write tables."""

import logging
import shutil
from pathlib import Path

import numpy as np
import torch

from common.config import digest, file_hash
from common.data.folds import load_folds, shared_groups
from common.errors import InputError
from common.paths import atomic_path, read_array, read_json, read_parquet
from common.tuning import release_pages

log = logging.getLogger(__name__)


def store_folder(context, folder, ids, size):
    """Folder of the store for these images in this order: shared by the runs on the same data."""
    root = context.options.store or context.run.folder.resolve().parent / "stores"
    return root / f"{context.solution}-{size}px-{digest(str(Path(folder).resolve()), list(ids))[:8]}"


def trainings(run):
    """Folders of the run in which a training was begun or finished."""
    return sorted(
        {path.parent for name in ("last.ckpt", "final.safetensors") for path in run.folder.glob(f"*/*/{name}")}
    )


def keep_trainings(run, key):
    """Refuse to prepare other images, labels or folds under networks that were trained on the present ones."""
    begun = trainings(run)
    if begun and run.step("prepare") and not run.is_done("prepare", key):
        raise InputError(
            f"{begun[0]}: was trained on other images, masks, folds or another store_size; give the run another --out, "
            "or delete the trainings in it"
        )


def check_prepared(context, made_with):
    """The record of `prepare`; InputError when it has not been run, or with other settings or data than now."""
    run, options = context.run, context.options
    record = run.step("prepare")
    if not run.path("images.parquet").is_file() or record is None:
        raise InputError(f"{run.folder}: not prepared; run the verb `prepare` first (or `run` for all)")
    for name in made_with:
        now = getattr(context.config, name)
        if record[name] != (list(now) if isinstance(now, tuple) else now):
            option = "--" + name.replace("_", "-")
            raise InputError(f"{run.folder}: prepared with {option} {record[name]}; run `prepare` with the new value")
    for name in ("data", "test"):
        path_now = getattr(options, name)
        if path_now is not None and not Path(record[name] or "").is_relative_to(path_now.resolve()):
            raise InputError(f"{run.folder}: prepared with another --{name}; run `prepare` with {path_now} (or `run`)")
    return record


def read_folds(path, ids, n_folds):
    """Folds (N,) of a `--fold-table`, all from 0 to n_folds − 1; InputError for another set of folds."""
    folds = load_folds(path, ids)
    if set(folds) != set(range(n_folds)):
        found = ", ".join(map(str, sorted(set(folds))))
        raise InputError(f"{path}: has the folds {found}; n_folds {n_folds} asks for all from 0")
    return folds


def tell_leaks(folds, patients, source):
    """Say how many images have a patient in another fold, where there are any."""
    leaking = shared_groups(folds, patients) if patients is not None else 0
    if leaking:
        log.info(f"folds: {leaking} images have a patient in another fold ({source}); scores may flatter")


def keep_config(context):
    """Make this configuration the run's: what was trained, or is there already, agrees with it."""
    context.run.write_config(context.solution, context.preset, context.config)


def fresh(context, folder, fold, build):
    """A network with its pretrained weights, its new layers drawn from the run's seed.

    `build(weights)` makes it. Where a training is there already, and will replace them, `build("none")` is asked.
    """
    torch.manual_seed(context.config.seed + fold)
    begun = (folder / "final.safetensors").is_file() or (folder / "last.ckpt").is_file()
    return build("none") if begun else build()


def used_up(paths):
    """The images of several arrays in blocks; a file that was read is deleted, since not every disk holds both."""
    for path in paths:
        part = read_array(path)
        for i in range(0, len(part), 64):
            yield part[i : i + 64]
            release_pages(part)
        path.unlink()


def write_table(path, table):
    """Write a DataFrame as parquet, whole or not at all."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


def write_csv(path, table):
    """Write a DataFrame as CSV, whole or not at all."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)


def read_predictions(run, name):
    """The table <name>.parquet of a run and the maps <name>_probs.npy, memory-mapped."""
    return read_parquet(run.path(f"{name}.parquet")), read_array(run.path(f"{name}_probs.npy"))


def check_predicted(run, key, outputs):
    """Raise InputError where the predictions of the run are not those of the present networks."""
    if not run.is_done("predict", key, outputs):
        raise InputError(f"{run.folder}: no predictions of these networks; run the verb `predict` (or `run` for all)")


def read_tuned(run, key, outputs):
    """What tuned.json holds, a dict with `rule`; InputError where it follows from other predictions or is damaged."""
    path = run.path("tuned.json")
    if not run.is_done("tune", key, outputs):
        raise InputError(f"{run.folder}: no rule for these predictions and options; run the verb `tune` (or `run`)")
    saved = read_json(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("rule"), dict):
        raise InputError(f"{path}: not what `tune` writes; delete it and run again")
    return saved


def trained_weights(run, fold, stage):
    """Path of a fold's finished weights; InputError where the fold is not trained."""
    path = run.path(f"fold{fold}", stage, "final.safetensors")
    if not path.is_file():
        raise InputError(f"{path}: fold {fold} is not trained; run `train`, or name the trained folds by --folds")
    return path


def as_interval(interval):
    """An Interval as the dict that score.json holds: estimate, low, high; NaN becomes None."""
    values = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    return {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def copy_submission(context, path):
    """Copy a submission under submissions/, its name telling solution, run and content; returns the copy's path."""
    name = f"{context.solution}-{context.run.folder.name}-{digest(file_hash(path))[:6]}{path.suffix}"
    copy = context.submissions / name
    with atomic_path(copy) as temporary:
        shutil.copyfile(path, temporary)
    return copy
