"""The pairs of a folder to an image table, folds, a store and an array of masks."""

import json
import logging
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import digest
from common.data.dicom import COLOUR_LIMIT, read_image
from common.data.folds import holdout, make_folds, save_folds
from common.data.loaders import SampleDataset
from common.data.store import Store, prepare_store
from common.data.store_workers import to_square
from common.data.tables import named_images, read_patients
from common.errors import InputError
from common.infer.predict import write_masks
from common.paths import KAGGLE_INPUT, read_array, read_parquet
from common.steps import (
    check_prepared,
    keep_config,
    keep_trainings,
    read_folds,
    store_folder,
    tell_leaks,
    trainings,
    write_csv,
    write_table,
)
from solutions.lung_segmentation.config import STRUCTURES
from solutions.lung_segmentation.pairs import READ, find_pairs, read_masks

log = logging.getLogger(__name__)
MADE_WITH = ("n_folds", "seed", "store_size", "structures", "datasets")  # settings that decide what `prepare` makes
LEFT_OUT = ["image_id", "file", "reason"]
MASK_FILES = ("masks.npy", "masks.parquet")


@dataclass
class Prepared:
    """What `prepare` leaves: the image table, the open store, the masks at the store's size.

    table: image_id, row, dataset, patient_id, width, height, split (train or test), fold (-1 for test), area (of the
    lungs, as a share of the image), masks (JSON: files of the channels). masks: uint8 (N, C, S, S) of 0/1 by row.
    """

    table: pd.DataFrame
    store: Store
    masks: np.ndarray
    key: str

    def rows(self, split="train", folds=None):
        """Store rows of one split, or of the train images in `folds`, in order."""
        chosen = self.table["split"] == split
        if folds is not None:
            chosen &= self.table["fold"].isin(list(folds))
        return self.table.loc[chosen, "row"].to_numpy()

    def parts(self, fold, config):
        """Rows to train on and rows to validate on when `fold` is held out; by patient, datasets in proportion."""
        rest = self.table[(self.table["split"] == "train") & (self.table["fold"] != fold)]
        share = config.validation * (self.table["split"] == "train").sum() / len(rest)
        chosen = holdout(pd.factorize(rest["dataset"])[0], share, rest["patient_id"].to_numpy(), config.seed + fold)
        return rest["row"].to_numpy()[~chosen], rest["row"].to_numpy()[chosen]

    def mask(self, row):
        """The masks of a train row at the store's size, uint8 (C, S, S) of 0/1."""
        return self.masks[row]

    def dataset(self, rows, size, transform=None, targets=None):
        """A Dataset of these rows at `size`; `targets` is `self.mask` or None."""
        return SampleDataset(self.store.images, targets, transform, size, rows=rows)

    def truth(self, row):
        """The masks of a train row at the image's own size, bool (C, height, width)."""
        found = self.table.loc[self.table["row"] == row].iloc[0]
        files = [[Path(part) for part in parts] for parts in json.loads(found["masks"])]
        return read_masks(files, (found["height"], found["width"]))[0]


def prepare_competition(context):
    """Find, read and check all images and masks; writes the table, the folds, the store and the masks.

    What cannot be used is left out, named in left_out.csv and counted in `context.left_out`; images without a mask are
    the test set unless `--test` names another.
    """
    options, config, run = context.options, context.config, context.run
    folder = Path(options.data) if options.data else KAGGLE_INPUT
    pairs = _chosen(find_pairs(folder), config, folder)
    labelled = {pair.image_id: pair for pair in pairs if pair.files_of(config.structures)}
    wanted = ", ".join(STRUCTURES[config.structures])
    if not labelled:
        raise InputError(f"{folder}: no image has a mask of {wanted}")
    partly = [
        (pair.image_id, str(pair.image), f"only masks of {', '.join(sorted(pair.masks))}, not of {wanted}")
        for pair in pairs
        if pair.masks and pair.image_id not in labelled
    ]
    tests = _tests(options.test, pairs, labelled)
    files = {**{image_id: pair.image for image_id, pair in labelled.items()}, **tests}
    store = prepare_store(
        files,
        store_folder(context, folder, files, config.store_size),
        config.store_size,
        workers=None if options.workers is None else max(options.workers, 1),
        on_bad_image="placeholder",
        placeholder_ids=frozenset(files),
    )
    table, unusable = _table(store, labelled, tests, config, options.on_bad_image)
    try:
        table, more, masks = _read_all_masks(run, store, table, config)
        train = table["split"] == "train"
        if not train.any():
            _, file, reason = [*more, *unusable][0]
            raise InputError(f"{folder}: no pair of image and mask can be used; {file}: {reason}")
        if options.id_map:
            table.loc[train, "patient_id"] = read_patients(options.id_map, table.loc[train, "image_id"].tolist())
        table.loc[train, "fold"] = _folds(table[train], config, options)
        originals = digest([[i, files[i].name, _stamp(files[i])[0]] for i in table.loc[train, "image_id"]])
        key = _key(table, config, originals)
        keep_trainings(run, key)
        _keep_masks(run, *masks)
    finally:
        shutil.rmtree(run.path("next"), ignore_errors=True)
    left_out = [*partly, *unusable, *more]
    _tell(run, context, left_out)
    save_folds(
        run.path("folds.csv"),
        table.loc[train, "image_id"].tolist(),
        table.loc[train, "fold"].to_numpy(),
        table.loc[train, "patient_id"].to_numpy(),
        f"n_folds {config.n_folds}, seed {config.seed}",
    )
    write_table(run.path("images.parquet"), table)
    run.describe(config.seed, [])
    if not trainings(run):
        keep_config(context)
    about = {name: getattr(config, name) for name in MADE_WITH}
    about |= {"data": str(folder.resolve()), "test": options.test and str(options.test.resolve())}
    about |= {"originals": originals, "synthetic": (folder / "sample.json").is_file(), "left_out": len(left_out)}
    run.record("prepare", key, store=str(store.folder.resolve()), images=len(table), **about)
    counts = ", ".join(f"{n} {name}" for name, n in table[train]["dataset"].value_counts().items())
    tests = int((~train).sum())
    log.info(f"prepared {train.sum()} pairs ({counts}) and {tests} images to predict at {config.store_size} px")
    return open_prepared(context)


def open_prepared(context):
    """Read what `prepare` left; raises InputError when it has not been run, or with other options than now."""
    record = check_prepared(context, MADE_WITH)
    table = read_parquet(context.run.path("images.parquet"))
    masks = read_array(context.run.path("masks.npy"))
    return Prepared(table, Store.open(record["store"]), masks, _key(table, context.config, record["originals"]))


def _chosen(pairs, config, folder):
    present = {pair.dataset for pair in pairs}
    missing = set(config.datasets) - present
    if missing:
        raise InputError(f"{folder}: no images of {', '.join(sorted(missing))}; there are {', '.join(sorted(present))}")
    return [pair for pair in pairs if not config.datasets or pair.dataset in config.datasets]


def _tests(test, pairs, labelled):
    """Files by id, in order, of the images to predict: those without a mask, or those that `--test` names."""
    if test is None:
        unlabelled = {pair.image_id: pair.image for pair in pairs if not pair.masks}
        if unlabelled:
            log.info(f"{len(unlabelled)} images have no mask: they are not trained on, and predicted")
        return unlabelled
    ids, files = named_images(test, READ)
    files = {pair.image_id: pair.image for pair in pairs if pair.image_id not in labelled} | files
    absent = [image_id for image_id in ids if image_id not in files and image_id not in labelled]
    if absent:
        raise InputError(f"--test: {len(absent)} images have no file, the first is {absent[0]}")
    both = [image_id for image_id in ids if image_id in labelled]
    if both:
        raise InputError(f"--test: {len(both)} of the images are training images, such as {both[0]}")
    return {image_id: files[image_id] for image_id in ids}


def _table(store, labelled, tests, config, on_bad_image):
    """The image table of what can be used, and rows of left_out.csv for the rest."""
    table = store.table[["image_id", "row", "width", "height", "ok", "colour"]].copy()
    table["split"] = np.where(table["image_id"].isin(list(tests)), "test", "train")
    of = [labelled.get(image_id) for image_id in table["image_id"]]
    table["dataset"] = [pair.dataset if pair else "" for pair in of]
    table["patient_id"] = [pair.patient_id if pair else "" for pair in of]
    table["masks"] = [
        json.dumps([[os.path.abspath(p) for p in c] for c in pair.files_of(config.structures)]) if pair else ""
        for pair in of
    ]
    table["fold"], table["area"] = -1, 0.0
    colour = table["ok"] & (table["colour"] > COLOUR_LIMIT)
    table["ok"] &= ~colour
    left_out = []
    for row in table[~table["ok"]].itertuples():
        path = labelled[row.image_id].image if row.image_id in labelled else tests[row.image_id]
        reason = "a colour picture, not a radiograph" if colour[row.Index] else _why(path).removeprefix(f"{path}: ")
        left_out.append((row.image_id, str(path), reason))
    keep = table["ok"] | ((table["split"] == "test") & (on_bad_image == "placeholder"))
    return table[keep].reset_index(drop=True), left_out


def _why(path):
    try:
        read_image(path)
    except InputError as error:
        return str(error)
    return f"{path}: could not be read when it was prepared; run again"


def _read_all_masks(run, store, table, config):
    """Read the masks of the train rows into masks.npy, (rows of the store, C, S, S), unless they are there already.

    Returns the table without the pairs whose masks cannot be used, rows of left_out.csv, and what `_keep_masks` needs.
    """
    train = table[table["split"] == "train"]
    stamps = [
        [row.image_id, [[(p, _stamp(p)) for p in c] for c in json.loads(row.masks)]] for row in train.itertuples()
    ]
    key = [config.store_size, config.structures, stamps, train["row"].tolist()]
    done = run.is_done("masks", key, MASK_FILES)
    folder = run.folder if done else _write_masks(run.path("next"), store, train, config)
    found = read_parquet(folder / "masks.parquet")
    resized = int(found["resized"].sum())
    if resized:
        log.info(f"the masks of {resized} images have another size than their image and were resized to it")
    bad = found[found["reason"] != ""]
    area = dict(zip(found["image_id"], found["area"], strict=True))
    table["area"] = [area.get(image_id, 0.0) for image_id in table["image_id"]]
    left_out = [(row.image_id, *row.reason.split(": ", 1)) for row in bad.itertuples()]
    table = table[~table["image_id"].isin(bad["image_id"])].reset_index(drop=True)
    return table, left_out, (folder, key, digest(found["check"].tolist()))


def _write_masks(folder, store, train, config):
    """Write masks.npy and masks.parquet into `folder`, which is returned."""
    side, found = config.store_size, []
    shape = (len(STRUCTURES[config.structures]), side, side)
    rows = dict(zip(train["row"], train.itertuples(), strict=True))

    def blocks():
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            jobs = pool.map(lambda row: _small_masks(row, side), rows.values())
            for number in tqdm(range(len(store.images)), "masks"):
                small, *about = next(jobs) if number in rows else (None,)
                if about:
                    found.append((rows[number].image_id, *about))
                yield np.zeros(shape, np.uint8) if small is None else small

    write_masks(folder / "masks.npy", (len(store.images), *shape), blocks())
    write_table(
        folder / "masks.parquet", pd.DataFrame(found, columns=["image_id", "area", "resized", "check", "reason"])
    )
    return folder


def _keep_masks(run, folder, key, check):
    """Let the masks in `folder` take the place of the run's; InputError where networks were trained on others."""
    if folder == run.folder:
        return
    before = run.step("masks") or {}
    if trainings(run) and before.get("check", check) != check:
        raise InputError(f"{run.folder}: its networks were trained on other masks; give the run another --out")
    run.forget("masks")
    for name in MASK_FILES:
        os.replace(folder / name, run.path(name))
    run.record("masks", key, check=check)


def _stamp(path):
    """Size and time of a file, by which a change is noticed."""
    try:
        about = os.stat(path)
    except OSError:
        return [-1, -1]  # a link that leads nowhere: named when it is read
    return [about.st_size, about.st_mtime_ns]


def _small_masks(row, side):
    """Masks of a row of the table at `side` (or None), the lungs' share of the image, resized or not, a check sum of
    the small masks, what is wrong."""
    try:
        masks, resized = read_masks([[Path(p) for p in c] for c in json.loads(row.masks)], (row.height, row.width))
    except InputError as error:
        return None, 0.0, False, 0, str(error)
    small = [to_square(part.astype(np.uint8) * np.uint8(255), side) >= 128 for part in masks]
    small = np.stack(small).astype(np.uint8)
    return small, float(masks[:2].any(0).mean()), resized, zlib.crc32(small), ""


def _folds(train, config, options):
    patients = train["patient_id"].to_numpy()
    if options.fold_table:
        folds = read_folds(options.fold_table, train["image_id"].tolist(), config.n_folds)
        tell_leaks(folds, patients, options.fold_table)
        return folds
    return make_folds(pd.factorize(train["dataset"], sort=True)[0], config.n_folds, patients, config.seed)


def _key(table, config, originals):
    """What the trainings follow from: the images' originals, masks and folds."""
    train = table[table["split"] == "train"]
    return digest(
        train["image_id"].tolist(),
        train["area"].tolist(),
        train["fold"].tolist(),
        train["patient_id"].tolist(),
        config.store_size,
        config.structures,
        originals,
    )


def _tell(run, context, left_out):
    path = run.path("left_out.csv")
    path.unlink(missing_ok=True)
    if left_out:
        write_csv(path, pd.DataFrame(left_out, columns=LEFT_OUT))
        context.left_out = len(left_out)
        for image_id, file, reason in left_out[:20]:
            log.info(f"left out {image_id}: {reason} ({file})")
        log.info(f"left out {len(left_out)} images that cannot be used: {path}")
