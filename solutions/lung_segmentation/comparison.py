"""What the tools `table` and `score_predictions` measure: Dice and IoU of masks in files or tables."""

from functools import partial

import numpy as np
import pandas as pd

from common.compare import Comparison, means_of
from common.errors import InputError, check
from common.metrics import segmentation
from common.paths import read_parquet, walk_files
from common.post.rle import ABSOLUTE, decode
from common.submit.table import read_table
from solutions.lung_segmentation.data import COLUMNS
from solutions.lung_segmentation.pairs import MASKS, bare_stem, find_pairs, fit_mask, read_mask, shown_structure


def results(job, split):
    """Return each out-of-fold image's Dice and IoU, by a rule chosen on the other folds."""
    table = read_parquet(job.run.path("oof_dice.parquet"))
    return {"": table.assign(truth=table["area"])}


def read_masks(path):
    """Return a table by image: `read`, a function that returns the lung mask, bool (H, W), and patient_id if known.

    path: a CSV with image_id, width, height and rle (absolute run-lengths); a folder of a known collection; or a folder
    of mask files named after their images. Masks of the same name in several subfolders (left and right) are united;
    those of hearts and clavicles and the uncertainty maps in `spread`, as written by `masks`, are left out.
    """
    if not path.is_dir():
        table, readers = read_table(path, COLUMNS, exact=False), {}
        for row, each in enumerate(table.itertuples(), start=2):
            if each.image_id in readers or not (each.width.isdigit() and each.height.isdigit()):
                raise InputError(f"{path}, row {row}: {each.image_id} appears twice, or has no size in whole pixels")
            readers[each.image_id] = partial(decode, each.rle, (int(each.height), int(each.width)), ABSOLUTE)
        return pd.DataFrame({"read": list(readers.values())}, list(readers))
    try:
        pairs = {pair.image_id: pair for pair in find_pairs(path)}
    except InputError:
        pairs = {}
    files = {name: files[0] for name, pair in pairs.items() if (files := pair.files_of("lungs"))}
    patients = {"patient_id": [pairs[name].patient_id for name in files]} if files else {}
    if not files:
        for file in walk_files(path):
            folder = "" if file.parent == path else file.parent.name
            of_lungs = folder != "spread" and shown_structure(folder) not in ("heart", "clavicle")
            if file.suffix.lower() in MASKS and of_lungs:
                files.setdefault(bare_stem(file.stem).removesuffix("_mask"), []).append(file)
    check(files, f"{path}: contains no masks")
    return pd.DataFrame({"read": [partial(_unite, parts) for parts in files.values()], **patients}, list(files))


def _unite(files):
    masks = [read_mask(file, may_be_empty=True) for file in files]
    for file, mask in zip(files, masks, strict=True):
        check(mask.shape == masks[0].shape, f"{file}: another size than {files[0]}")
    return np.logical_or.reduce(masks)


def join(predictions, labels):
    """Return Dice and IoU of each image, at the size of its label."""
    cells = []
    for image_id, read in predictions["read"].items():
        true = labels.loc[image_id, "read"]().astype(bool)
        found = fit_mask(read().astype(bool), true.shape, image_id)[0]
        cells.append(segmentation.counts_from_areas((found & true).sum(), found.sum(), true.sum(), true.size))
    table = pd.DataFrame({"dice": segmentation.dice(cells), "iou": segmentation.iou(cells)}, predictions.index)
    return table.join(labels.filter(["patient_id"]))


MEASURE = means_of({"dice": "dice", "IoU": "iou"})
COMPARISON = Comparison(results, MEASURE, read_masks, read_masks, "dice", "tune", join=join)
