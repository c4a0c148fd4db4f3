"""Where the lungs are in every image: masks for the weighting, crops for the lungs' view."""

import json
import logging
import os
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import digest, file_hash
from common.data.dicom import COLOUR_LIMIT
from common.data.store_workers import to_square
from common.errors import InputError
from common.paths import lock_folder, read_array, read_json, read_parquet
from common.steps import write_table
from common.train.checkpoint import load_weights
from solutions.lung_segmentation import load_segmenter, lung_region
from solutions.lung_segmentation.config import STRUCTURES
from solutions.lung_segmentation.postprocess import decide
from solutions.lung_segmentation.segmenter import SHIPPED

log = logging.getLogger(__name__)
BATCH = 4  # images that one thread of the segmenter takes at once
BLOCK = 64  # images between two states from which a killed run goes on; a multiple of BATCH, or batches would differ
ALONE = "weighting by the lungs alone; CXR-IRNet's is by lungs and heart"
COLUMNS = ["x_min", "y_min", "x_max", "y_max", "rule", "area"]


@dataclass
class Lungs:
    """table: image_id, row, x_min, y_min, x_max, y_max (pixels of the file, open end), rule (two, one, mirrored, or
    none where no lung was found and the box is the whole image), area (share of the image that is lung). masks: path
    of uint8 (N, S, S), 255 times the share of each cell that is lung (or heart); crops: path of uint8 (N, C, C), the
    boxes cut out of the originals; each None where no network looks at it."""

    table: pd.DataFrame
    masks: Path | None
    crops: Path | None


def lungs_made(config):
    """What lungs follow from beside the images: the segmenter's hash, the sides of masks and of crops (0: none).

    config: a Config that needs lungs. Masks are made for the weighting alone, crops for the lungs' view. Raises
    InputError where the segmenter's file is not there.
    """
    crop_size = 0 if config.views == "whole" else config.segmenter.crop_size
    mask_size = config.segmenter.mask_size if config.weights_features else 0
    return {"segmenter": file_hash(segmenter_file(config)), "mask_size": mask_size, "crop_size": crop_size}


def mask_structures(config):
    """What the weighting's masks show: ["lungs"], or ["lungs", "heart"] with a segmenter that knows the heart.

    None where the recipe weights nothing. Raises InputError where the segmenter's file cannot be read.
    """
    if not config.weights_features:
        return None
    kind = load_weights(segmenter_file(config))[1].get("structures")
    return ["lungs", *["heart"] * ("heart" in STRUCTURES.get(kind, ()))]


def segmenter_file(config):
    """Path of the segmenter's weights; InputError where they are not there."""
    weights = SHIPPED if config.segmenter.weights == "shipped" else Path(config.segmenter.weights)
    if not weights.is_file():
        raise InputError(f"{weights}: no such file (--segmenter.weights)")
    return weights


def find_lungs(context, store, files):
    """Find the lungs in every image of a store, in its originals `files` (id → path); returns the folder of Lungs.

    The folder lies beside the store and is shared by the runs on it. What is there is not computed again; a run that
    was killed goes on with at most BLOCK images lost and ends with the same bytes. Images that the store holds only a
    placeholder of, or that are colour pictures, are looked at whole, like those in which no lung is found; how many is
    logged. Raises InputError for a segmenter that cannot be used, for an original that can no longer be read, and
    where another process is at the same work.
    """
    config, made = context.config, lungs_made(context.config)
    key = digest(read_json(store.folder / "store.json")["key"], made)
    folder = store.folder.with_name(f"{store.folder.name}-lungs-{key[:8]}")
    if (folder / "lungs.parquet").is_file():
        log.info(f"lungs: up to date in {folder}")
    else:
        weights = None if config.segmenter.weights == "shipped" else config.segmenter.weights
        segmenter = load_segmenter(weights, context.device, batch_size=BATCH)
        workers = None if context.options.workers is None else max(context.options.workers, 1)
        partial = folder.with_name(folder.name + ".partial")
        with lock_folder(partial, "finding these lungs"):
            _fill(partial, key, store, files, segmenter, made, workers)
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(partial, folder)
            (folder / "journal").unlink()  # last: whenever a kill comes before, the next run finds every row done
    if mask_structures(config) == ["lungs"]:
        log.info(f"lungs: {ALONE}; a segmenter that knows the heart can be named by --segmenter.weights")
    table = open_lungs(folder, made).table
    whole = table["rule"] == "none"
    if whole.any():
        log.info(
            f"no lungs found in {whole.sum()} images: looked at whole, the first is {table.image_id[whole].iloc[0]}"
        )
    return folder


def open_lungs(folder, made):
    """The Lungs in a folder that `find_lungs` gave; InputError where they are missing or damaged.

    made: what `lungs_made` says of them.
    """
    folder = Path(folder)
    table = read_parquet(folder / "lungs.parquet")
    masks, crops = (folder / f"{name}s.npy" if made[f"{name}_size"] else None for name in ("mask", "crop"))
    for path in (masks, crops):
        if path is not None and len(read_array(path)) != len(table):
            raise InputError(f"{folder}: damaged lungs (array and table disagree); delete the folder and prepare again")
    return Lungs(table, masks, crops)


def look(segmenter, image, probs, mask_size, crop_size):
    """Mask (S, S) and crop (C, C) of an image, uint8, each None for a side of 0, and its [box…, rule, area].

    image: uint8 (H, W); probs: what `Segmenter.each` gives with it. The heart belongs to the mask, not to the box.
    """
    height, width = image.shape
    lungs = segmenter.lungs(probs, image.shape)
    region, area = lung_region(lungs), np.count_nonzero(lungs) / lungs.size
    if region is None:
        return whole(image, (width, height), mask_size, crop_size, area)
    if mask_size and "heart" in segmenter.structures:
        heart = np.ascontiguousarray(probs[segmenter.structures.index("heart")])
        lungs |= decide(heart, image.shape, segmenter.pixel, -(-segmenter.regions // 2))
    left, top, right, bottom = region.box
    crop = to_square(np.ascontiguousarray(image[top:bottom, left:right]), crop_size) if crop_size else None
    mask = to_square(lungs * np.uint8(255), mask_size) if mask_size else None
    return mask, crop, [*region.box, region.rule, area]


def whole(image, size, mask_size, crop_size, area=0.0):
    """As `look`, for an image without lungs: all of it; size: (width, height) of the file, of which `image` may be a
    smaller copy."""
    mask = np.full((mask_size, mask_size), 255, np.uint8) if mask_size else None
    return mask, to_square(image, crop_size) if crop_size else None, [0, 0, *map(int, size), "none", area]


def _fill(partial, key, store, files, segmenter, made, workers):
    """Write masks.npy and crops.npy where asked, and lungs.parquet, row after row: a count says what is done."""
    table = store.table
    fine = (table["ok"] & ~(table["colour"] > COLOUR_LIMIT)).to_numpy()
    sizes = made["mask_size"], made["crop_size"]
    sides = {name: side for name, side in zip(("masks.npy", "crops.npy"), sizes, strict=True) if side}
    found = _read_journal(partial, key, sides)
    begin, said = len(found), len(table)
    if begin:
        log.info(f"lungs: continuing, {begin} of {said} images are done")
    todo = {table["image_id"][row]: files[table["image_id"][row]] for row in np.flatnonzero(fine) if row >= begin}
    looked = segmenter.each(todo, lambda _, image, probs: look(segmenter, image, probs, *sizes), workers)
    pending, segmented = [], 0
    with ExitStack() as stack:
        arrays = [
            stack.enter_context(_rows_file(partial / name, (said, side, side), begin)) for name, side in sides.items()
        ]
        journal = stack.enter_context(open(partial / "journal", "a", encoding="utf-8"))
        stack.callback(looked.close)
        for row in tqdm(range(begin, said), "lungs", said, initial=begin, unit="image"):
            if fine[row]:
                _, result, problem = next(looked)
                if problem:
                    raise InputError(problem)
                segmented += 1
            else:
                size = table["width"][row], table["height"][row]
                result = whole(np.asarray(store.images[row]), size, *sizes)
            pending.append([part for part in result if part is not None])
            if (len(pending) >= BLOCK and segmented % BATCH == 0) or row == said - 1:
                for number, file in enumerate(arrays):
                    file.write(np.stack([each[number] for each in pending]).data)
                    file.flush()
                    os.fsync(file.fileno())
                journal.write(json.dumps([each[-1] for each in pending]) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
                found += [each[-1] for each in pending]
                pending = []
    boxes = pd.DataFrame(found, columns=COLUMNS).astype({name: "int64" for name in COLUMNS[:4]} | {"area": float})
    write_table(
        partial / "lungs.parquet", pd.concat([table[["image_id", "row"]].reset_index(drop=True), boxes], axis=1)
    )


def _read_journal(partial, key, sides):
    """The rows that an earlier run finished, in order; begins the journal anew where there are none to be used."""
    path = partial / "journal"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # what follows the last newline is torn
    if not lines or lines[0] != key.encode() or not all((partial / name).is_file() for name in sides):
        path.write_text(key + "\n", encoding="utf-8")
        return []
    os.truncate(path, sum(len(line) + 1 for line in lines))
    return [row for line in lines[1:] for row in json.loads(line)]


@contextmanager
def _rows_file(path, shape, done):
    """An array file opened for writing behind its first `done` rows; what lies there is cut off."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with open(path, "r+b" if done else "wb") as file:
        file.write(header.getvalue())
        file.truncate(len(header.getvalue()) + done * shape[1] * shape[2])
        file.seek(0, os.SEEK_END)
        yield file
