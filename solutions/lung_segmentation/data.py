"""Find usable images and masks in a folder, and store the masks at the size of the stored images."""

import json
import os
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from common.config import digest
from common.data.dicom import COLOUR_LIMIT
from common.data.folds import holdout
from common.data.loaders import UNKNOWN
from common.data.store import time_stamp, to_square
from common.data.tables import named_images, read_patients
from common.errors import InputError, check, log
from common.infer.predict import draw_masks
from common.listing import Listing, check_named, read_problem
from common.paths import KAGGLE_INPUT, read_array, read_parquet, write_table
from solutions.lung_segmentation.config import STRUCTURES
from solutions.lung_segmentation.pairs import READ, bare_stem, find_pairs, read_masks

COLUMNS = ["image_id", "width", "height", "rle"]


def read_competition(job):
    """Return the Listing of the images with masks and of those to predict: the ones of --test or without a mask.

    The table adds dataset, masks (JSON: the files of each channel) and area (share of the image that is lung).
    """
    options, config, names = job.options, job.config, STRUCTURES[job.config.structures]
    folder = options.data or KAGGLE_INPUT
    pairs = find_pairs(folder)
    present = {pair.dataset for pair in pairs}
    missing = set(config.datasets) - present
    check(not missing, f"{folder}: no images of {', '.join(sorted(missing))}, only of {', '.join(sorted(present))}")
    pairs = [pair for pair in pairs if not config.datasets or pair.dataset in config.datasets]
    channels = {pair.image_id: pair.files_of(config.structures) for pair in pairs}
    absent = [name for k, name in enumerate(names) if not any(files and files[k] for files in channels.values())]
    check(not absent, f"{folder}: no image has a mask of {', '.join(absent)}")
    train, left_out, files = [], [], {}
    for pair in pairs:
        if channels[pair.image_id]:
            masks = [[os.path.abspath(path) for path in channel] for channel in channels[pair.image_id]]
            train.append((pair.image_id, pair.patient_id, pair.dataset, json.dumps(masks)))
            files[pair.image_id] = pair.image
        elif pair.masks:
            reason = f"has masks of {', '.join(sorted(pair.masks))}, but needs {', '.join(names)}"
            left_out.append((pair.image_id, str(pair.image), reason))
    tests = _find_tests(options.test, pairs, files)
    train = pd.DataFrame(train, columns=["image_id", "patient_id", "dataset", "masks"]).assign(split="train")
    if options.id_map:
        train["patient_id"] = read_patients(options.id_map, list(files))
    table, files = pd.concat([train, _test_table(tests)], ignore_index=True), files | tests
    # unreadable images become placeholders, since `keep_usable` then leaves them out of both splits
    return Listing(folder, table, files, pd.DataFrame(), left_out=tuple(left_out), placeholders=frozenset(files))


def read_test(job):
    """Return the Listing of only the images to predict: those of --test, or those in the folder without a mask."""
    test, folder = job.options.test, job.options.data or KAGGLE_INPUT
    folder, pairs = (test, []) if test is not None and test.is_dir() else (folder, find_pairs(folder))
    tests = _find_tests(test, pairs, {})
    check(tests, f"{folder}: every image has a mask; name the images to predict with --test")
    return Listing(folder, _test_table(tests), tests, pd.DataFrame(), placeholders=frozenset(tests))


def _find_tests(test, pairs, labelled):
    """Return the files of the images to predict by id, in order: those of --test, or those without a mask."""
    if test is None:
        unlabelled = {pair.image_id: pair.image for pair in pairs if not pair.masks}
        if unlabelled:
            log.info(f"{len(unlabelled)} images without a mask are not trained on, but predicted")
        return unlabelled
    known = {pair.image_id: pair.image for pair in pairs}
    ids, files = named_images(test, READ, known)
    ids = list(map(bare_stem, ids))
    if len(set(ids)) < len(ids):
        raise InputError(f"--test: a second image named {max(ids, key=ids.count)}")
    files = known | {bare_stem(name): file for name, file in files.items()}
    check_named(ids, files, labelled)
    return {image_id: files[image_id] for image_id in ids}


def _test_table(tests):
    return pd.DataFrame({"image_id": list(tests), "patient_id": "", "dataset": "", "masks": "", "split": "test"})


# ---- after the images are decoded ----------------------------------------------------------------------------------


def keep_usable(job, listing, store):
    """Return the Listing of the usable images with the array of their masks; other images are listed as left out.

    Writes masks.npy, uint8 (rows of the store, C, S, S) of 0 and 1 (or UNKNOWN), beside the store.
    """
    table, left_out = _mark_unusable(listing, store)
    table = table[table["ok"] | ((table["split"] == "test") & (job.options.on_bad_image != "error"))]
    train = table[table["split"] == "train"]
    folder = _prepare_masks(store, train, job.config)
    found = read_parquet(folder / "masks.parquet").set_index("image_id")
    if found["resized"].any():
        log.info(f"the masks of {found['resized'].sum()} images differ in size from their image and were resized")
    bad = found[found["reason"] != ""]
    left_out += [(image_id, *reason.split(": ", 1)) for image_id, reason in bad["reason"].items()]
    if len(bad) == len(train):
        _, file, reason = left_out[-1]
        raise InputError(f"{listing.folder}: no pair of image and mask can be used; {file}: {reason}")
    table = table[~table["image_id"].isin(bad.index)].reset_index(drop=True)
    table["area"] = table["image_id"].map(found["area"]).fillna(0.0)
    train = table[table["split"] == "train"]
    counts = ", ".join(f"{n} {name}" for name, n in train["dataset"].value_counts().items())
    tests = len(table) - len(train)
    log.info(f"{len(train)} pairs ({counts}) and {tests} images to predict at {job.config.store_size} px")
    return replace(
        listing,
        table=table,
        sample=_sample(table),
        strata=pd.factorize(train["dataset"], sort=True)[0],
        labels=digest(found["check"].tolist()),
        arrays={"masks": folder / "masks.npy"},
        left_out=(*listing.left_out, *left_out),
    )


def check_test(job, listing, store):
    """Return the Listing of test images. Raises InputError for an unusable one, unless --on-bad-image placeholder."""
    table, left_out = _mark_unusable(listing, store)
    for _, file, reason in left_out:
        if job.options.on_bad_image == "error":
            raise InputError(f"{file}: {reason}; --on-bad-image placeholder gives it an empty mask")
        log.info(f"{file}: {reason}; it gets an empty mask")
    return replace(listing, table=table, sample=_sample(table))


def _mark_unusable(listing, store):
    """Return the table, with ok set to False for colour pictures and masks, and the rows of left_out.csv."""
    colour = (store.table["colour"] > COLOUR_LIMIT).to_numpy()
    masks = np.array([_is_mask(image) for image in store.images])
    table = listing.table
    table = table.assign(ok=table["ok"] & ~(colour | masks))
    left_out = []
    for row in table[~table["ok"]].itertuples():
        path = listing.files[row.image_id]
        kind = "colour picture" if colour[row.row] else "mask" if masks[row.row] else None
        reason = f"a {kind}, not a radiograph" if kind else read_problem(path)
        left_out.append((row.image_id, str(path), reason))
    return table, left_out


def _is_mask(image):
    """Return whether an image has only two grey levels, apart from edges that were blurred by downscaling."""
    low, high = image.min(), image.max()
    return bool(low < high and np.count_nonzero((image > low) & (image < high)) < 0.05 * image.size)


def _sample(table):
    return table.loc[table["split"] == "test", ["image_id", "width", "height"]].assign(rle="-1")


def _prepare_masks(store, train, config):
    """Return the folder beside the store that holds masks.npy and masks.parquet; write them unless they are current."""
    stamps = [[(p, time_stamp(p)) for c in json.loads(masks) for p in c] for masks in train["masks"]]
    key = digest(config.structures, train[["row", "width", "height"]].to_numpy().tolist(), stamps)
    folder = store.folder.with_name(f"{store.folder.name}-masks-{key[:8]}")
    if (folder / "masks.parquet").is_file():
        return folder
    shape, found = (len(STRUCTURES[config.structures]), config.store_size, config.store_size), {}
    rows = dict(zip(train["row"], train.itertuples(), strict=True))

    def draw(number):
        """Return the masks of a store row, zeros if it has none that can be read, and note its row of masks.parquet."""
        small, row = np.zeros(shape, np.uint8), rows.get(number)
        if row is None:
            return small
        try:
            masks, resized = _read_masks(row)
        except InputError as error:
            found[number] = row.image_id, 0.0, False, 0, str(error)
            return small
        small[:] = [to_square((part & 1) * np.uint8(255), config.store_size) >= 128 for part in masks]
        small[masks[:, 0, 0] == UNKNOWN] = UNKNOWN
        found[number] = row.image_id, float(masks[:2].any(0).mean()), resized, zlib.crc32(small), ""
        return small

    draw_masks(folder / "masks.npy", len(store.images), shape, draw)
    table = [found[number] for number in sorted(found)]
    table = pd.DataFrame(table, columns=["image_id", "area", "resized", "check", "reason"])
    write_table(folder / "masks.parquet", table)  # last: marks both as complete
    return folder


def _read_masks(row):
    files = [[Path(path) for path in channel] for channel in json.loads(row.masks)]
    return read_masks(files, (row.height, row.width))


# ---- rows and masks of a run ---------------------------------------------------------------------------------------


def split_rows(job, fold):
    """Return the store rows to train on and those to validate on, both without the held-out `fold`.

    The two sets share no patient and have the same proportions of datasets. In a refit, all images are trained on.
    """
    table, config = job.images.table, job.config
    train = table[table["split"] == "train"]
    if fold == config.n_folds:
        return train["row"].to_numpy(), train["row"].to_numpy()[:0]
    rest = train[train["fold"] != fold]
    share = config.validation * len(train) / len(rest)
    chosen = holdout(pd.factorize(rest["dataset"])[0], share, rest["patient_id"].to_numpy(), config.seed + fold)
    return rest["row"].to_numpy()[~chosen], rest["row"].to_numpy()[chosen]


@cache
def stored_masks(images):
    """Return the masks at the store's size by store row, uint8 (N, C, S, S) of 0 and 1 (or UNKNOWN), memory-mapped."""
    return read_array(images.arrays["masks"])


def mask(images, row):
    """Return the masks of a training image at the store's size, uint8 (C, S, S) of 0 and 1 (or UNKNOWN)."""
    return images.drawn(row, stored_masks(images)[row])


def true_masks(images, row):
    """Return the masks of a training image at its original size, uint8 (C, height, width) of 0 and 1 (or UNKNOWN)."""
    return _read_masks(images.at([row]).iloc[0])[0]
