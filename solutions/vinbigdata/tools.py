"""The tool `ensemble`: fuse several submissions into one."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.errors import InputError, check, log
from common.paths import read_json, read_parquet
from common.post.boxes import BOX
from common.post.fusion import fuse
from common.submit.table import write_submission
from common.submit.validate import validate_boxes
from solutions.vinbigdata.config import NO_FINDING
from solutions.vinbigdata.data import read_sizes
from solutions.vinbigdata.postprocess import list_images, parse_predictions, prediction_strings


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
    sizes: tuple[Path, ...] = (),
):
    """Fuse the boxes of several submissions, separately for each image and class.

    No finding boxes are not fused: they get the weighted mean of their scores over the submissions that have them.
    The images' sizes are not needed. If they are known (from a run among the inputs, or from --sizes), boxes up to a
    pixel beyond their image are clipped; others are refused.

    Args:
        predictions: Submissions (image_id,PredictionString), COCO files of boxes with scores, and folders of runs,
            whose submission.csv is used.
        out: The fused submission.
        weights: One per input, in order (default: equal). Paper: 5 2 1 1 1 1.
        iou: Boxes with a larger overlap are fused (not used by soft_nms).
        skip: Minimum score of a box; must be above 0 if boxes of score 0 overlap, which have no weighted mean.
        method: Weighted boxes fusion, NMS, soft-NMS or non-maximum weighted.
        conf_type: wbf: how the scores of fused boxes are combined.
        sizes: CSV files with image_id, width and height (or dim0, the height, and dim1), or folders of the images.
    """
    files = [_submission(path) for path in predictions]
    _check(files, out, weights, iou, skip, method, conf_type)
    ids = pd.unique(list_images(files[0])).tolist()
    sizes = sizes or next(([path] for path in predictions if _knows_sizes(path, ids)), ())
    known = read_sizes(sizes, ids) if sizes else None
    with tqdm(files, desc="submissions", unit="file", leave=False) as bar:
        tables = {str(path): parse_predictions(path, known, ids, files[0]) for path in bar}
    options = {"conf_type": conf_type} if method == "wbf" else {}
    images = _one_size(ids, tables) if known is None else known
    before = sum(int((table["class_id"] != NO_FINDING).sum()) for table in tables.values())
    fused = fuse(tables, images, weights or [1.0] * len(files), iou, skip, method, **options)
    del tables  # the largest part of the memory
    answer = prediction_strings(fused, ids, known)
    write_submission(out, answer)
    pixels = None if known is None else {image_id: (width, height) for image_id, width, height in known.to_numpy()}
    summary = validate_boxes(out, answer, sizes=pixels, ordered=True)
    log.info(f"{before:,} boxes of {len(files)} submissions fused; valid submission: {summary}")
    return 0


TOOLS = {"ensemble": ensemble}


def _submission(path):
    """Return the submission `path`, or the submission in the run `path`."""
    if not path.is_dir():
        return path
    file, about = path / "submission.csv", path / "config.json"
    check(file.is_file(), f"{path}: contains no submission.csv; run the verb `submit` first")
    about = read_json(about) if about.is_file() else {}
    if not isinstance(about, dict) or about.get("solution", "vinbigdata") != "vinbigdata":
        raise InputError(f"{path}: a run of another solution")
    return file


def _knows_sizes(path, ids):
    """Return whether `path` is a run that contains all these images."""
    file = path / "images.parquet"
    return file.is_file() and set(ids) <= set(read_parquet(file)["image_id"])


def _check(files, out, weights, iou, skip, method, conf_type):
    places = [file.resolve() for file in files]
    repeated = next((file for file in files if places.count(file.resolve()) > 1), None)
    blocked = next((folder for folder in out.parents if folder.exists() and not folder.is_dir()), None)
    problems = [
        (not files, "name the submissions to fuse: CSV files, or folders of runs"),
        (repeated, f"{repeated}: given twice; to give a submission more weight, use --weights"),
        (out.resolve() in places, f"--out {out}: is one of the submissions to fuse"),
        (out.is_dir(), f"--out {out}: is a folder; name a file"),
        (out.exists() and not out.is_file(), f"--out {out}: is not a regular file"),  # /dev/null would be replaced
        (blocked, f"--out {out}: {blocked} is a file, not a folder"),
        (weights and len(weights) != len(files), f"--weights: {len(weights)} for {len(files)} submissions"),
        (
            not all(0 < weight <= 1e9 for weight in weights),
            f"--weights must be positive numbers, not {' '.join(map('{:g}'.format, weights))}",
        ),
        (not 0 <= iou <= 1, f"--iou must lie in [0, 1], not {iou}"),
        (not 0 <= skip <= 1, f"--skip must lie in [0, 1], not {skip}"),
        (method != "wbf" and conf_type != "avg", f"--conf-type {conf_type}: belongs to --method wbf"),
    ]
    for wrong, problem in problems:
        check(not wrong, problem)


def _one_size(ids, tables):
    """Return one square size for all images: a power of two, so that dividing by it is exact."""
    largest = max(table[BOX].to_numpy().max(initial=1.0) for table in tables.values())
    side = 2.0 ** np.ceil(np.log2(largest))
    return pd.DataFrame({"image_id": ids, "width": side, "height": side})
