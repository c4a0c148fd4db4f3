"""`ensemble`: one submission of several, ours or other people's, without a run."""

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.data.dicom import read_header
from common.errors import InputError
from common.paths import find_images, read_parquet
from common.post.boxes import BOX
from common.submit.table import read_table, write_submission
from common.submit.validate import validate_boxes
from solutions.vinbigdata.config import NO_FINDING
from solutions.vinbigdata.postprocess import fuse, parse_predictions, prediction_strings

log = logging.getLogger(__name__)
SIZES = ["image_id", "width", "height"]


def ensemble(
    predictions: tuple[Path, ...],
    /,
    *,
    out: Path = Path("fused.csv"),
    weights: tuple[float, ...] = (),
    iou: float = 0.4,
    skip: float = 0.0,
    method: Literal["wbf", "nms", "soft_nms", "nmw"] = "wbf",
    conf_type: Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"] = "avg",
    sizes: Path | None = None,
):
    """Fuse submissions box by box, image by image and class by class.

    No finding is not fused: it gets the mean of its scores, by the same weights, over the submissions that use it.
    Boxes are compared in pixels, so the images' sizes are not needed; where they are known (of a run among the inputs,
    or by --sizes), boxes that reach over their image's edge by up to a pixel are cut there, others refused.

    Args:
        predictions: Submissions (image_id,PredictionString), and folders of runs, whose submission.csv is meant.
        out: The fused submission.
        weights: One of each input, in their order; equal by default. Paper: 5 2 1 1 1 1.
        iou: Boxes that overlap by more are one (soft_nms does not ask).
        skip: Least score of a box that counts; above 0 where boxes of score 0 overlap, which have no weighted mean.
        method: Weighted boxes fusion, NMS, soft-NMS or non-maximum weighted.
        conf_type: Of weighted boxes fusion: how the scores of one object's boxes become one.
        sizes: CSV with image_id, width and height, or a folder of the images.
    """
    files = [_submission(path) for path in predictions]
    _check(files, out, weights, skip, method, conf_type)
    ids = read_table(files[0])["image_id"] if len(files) else []
    sizes = sizes or next((path for path in predictions if (path / "images.parquet").is_file()), None)
    known = None if sizes is None else read_sizes(sizes, ids)
    with tqdm(files, desc="submissions", unit="file", leave=False) as bar:
        tables = {str(path): parse_predictions(path, files[0], known) for path in bar}
    options = {"conf_type": conf_type} if method == "wbf" else {}
    images = _one_size(ids, tables) if known is None else known
    fused = fuse(tables, images, weights or [1.0] * len(files), iou, skip, method, **options)
    write_submission(out, prediction_strings(fused, ids, known))
    pixels = None if known is None else {image_id: (width, height) for image_id, width, height in known.to_numpy()}
    summary = validate_boxes(out, files[0], sizes=pixels, ordered=True)
    before = sum((table["class_id"] != NO_FINDING).sum() for table in tables.values())
    log.info(f"{before:,} boxes of {len(files)} submissions fused; valid submission: {summary}")
    return 0


TOOLS = {"ensemble": ensemble}


def read_sizes(path, ids):
    """Return image_id, width and height of `ids`, from a CSV, the folder of a run, or a folder of the images.

    Raises InputError naming the file for columns that lack, sizes that are no positive numbers and missing images.
    """
    if not path.is_dir():
        table = read_table(path, SIZES, exact=False)
    elif (path / "images.parquet").is_file():
        table = read_parquet(path / "images.parquet")[SIZES]
    else:
        files = find_images(path)
        with tqdm([files[name] for name in ids if name in files], desc="sizes", unit="image", leave=False) as bar:
            headers = [read_header(file) | {"image_id": file.stem} for file in bar]
        table = pd.DataFrame(headers, columns=SIZES)
    for row in np.flatnonzero(table["image_id"].duplicated())[:1]:
        raise InputError(f"{path}: image {table['image_id'].iloc[row]} is there twice")
    pixels = table[SIZES[1:]].apply(pd.to_numeric, errors="coerce")
    pixels = pixels.set_axis(table["image_id"]).reindex(ids).rename_axis("image_id").reset_index()
    for row in np.flatnonzero(~(pixels[SIZES[1:]] > 0).all(axis=1))[:1]:
        raise InputError(f"{path}: no width and height, in pixels, of image {pixels['image_id'][row]}")
    return pixels


def _submission(path):
    file = path / "submission.csv" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise InputError(f"{path}: no submission.csv in it; run the verb `submit` first")
    return file


def _check(files, out, weights, skip, method, conf_type):
    places = [file.resolve() for file in files]
    if not files:
        raise InputError("name the submissions to fuse: CSV files, or folders of runs")
    for file in files:
        if places.count(file.resolve()) > 1:
            raise InputError(f"{file}: named twice; --weights makes one submission count more")
    if out.resolve() in places:
        raise InputError(f"--out {out}: is one of the submissions to fuse")
    if weights and len(weights) != len(files):
        raise InputError(f"--weights: {len(weights)} for {len(files)} submissions")
    if not 0 <= skip <= 1:
        raise InputError(f"--skip must lie in [0, 1], not {skip}")
    if method != "wbf" and conf_type != "avg":
        raise InputError(f"--conf-type {conf_type}: belongs to --method wbf")


def _one_size(ids, tables):
    """One square for all images, its side a power of two: dividing by it changes no digit, and so no overlap."""
    largest = max(table[BOX].to_numpy().max(initial=1.0) for table in tables.values())
    side = 2.0 ** np.ceil(np.log2(largest))
    return pd.DataFrame({"image_id": ids, "width": side, "height": side})
