"""Boxes x_min, y_min, x_max, y_max, checked and compared: arrays (n, 4), and tables whose rows errors name.

`sizes` are widths and heights in pixels, (2,) or (n, 2).
"""

import numpy as np
import pandas as pd

from common.errors import InputError
from common.jit import compiled

BOX = ["x_min", "y_min", "x_max", "y_max"]
SLACK = 1e-6  # of the image's side: rounding to float32 can move a coordinate this far outside
_FAULTS = ("", "is not four finite numbers", "is inverted (x_min <= x_max and y_min <= y_max must hold)")


def check_boxes(boxes, where="box {}".format, sizes=None, outside="lies outside its image"):
    """Return boxes as contiguous float64 (n, 4); `where` names a row in an error.

    sizes: upper limits of the coordinates, None for none; rounding errors up to `SLACK` pass. Raises InputError for
    NaN, infinity, inverted boxes and boxes beyond the limits.
    """
    try:
        boxes = np.ascontiguousarray(boxes, np.float64)
    except (TypeError, ValueError):
        raise InputError("boxes must be numbers, four per row") from None
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(f"boxes must have shape (n, 4), not {boxes.shape}")
    limits = np.array([[np.inf, np.inf]]) if sizes is None else np.asarray(sizes, np.float64).reshape(-1, 2)
    row, fault = _first_fault(boxes, limits)
    if fault:
        numbers = ", ".join(f"{value:g}" for value in boxes[row])
        raise InputError(f"{where(row)}: ({numbers}) {_FAULTS[fault] if fault < 3 else outside}")
    return boxes


def find_normalised(boxes):
    """Return the positions of boxes that lie in 0 to 1 instead of pixels, none if no more than 1 % are so small."""
    small = np.flatnonzero((np.asarray(boxes).reshape(-1, 4) <= 1).all(axis=1))
    return small if len(small) > len(boxes) / 100 else small[:0]


def iou_matrix(a, b):
    """Return the intersection over union of each box of `a` (n, 4) with each of `b` (m, 4), float64 (n, m) in [0, 1].

    It is 0 where neither box has an area. Areas are width × height, without the extra pixel of the VOC kit.

    >>> iou_matrix([[0, 0, 10, 10]], [[0, 0, 10, 5], [20, 20, 30, 30]]).tolist()
    [[0.5, 0.0]]
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = np.maximum(sides, 0).prod(axis=2)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1)[:, None] + (b[:, 2:] - b[:, :2]).prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


@compiled(error_model="numpy")
def iou(a, b):
    """Return the intersection over union of two boxes (4,), NaN where neither has an area. For compiled callers."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def clip(boxes, sizes):
    """Return boxes with every coordinate moved into 0 … width or height; a box outside its image loses its area."""
    return np.clip(np.asarray(boxes, np.float64), 0.0, _twice(sizes))


def scale(boxes, x, y):
    """Return boxes with x coordinates multiplied by `x` and y coordinates by `y` (numbers, or one per box)."""
    return np.asarray(boxes, np.float64) * _twice(np.stack([x, y], axis=-1))


def _twice(sizes):
    sizes = np.asarray(sizes, np.float64)
    if not ((sizes > 0) & (sizes < np.inf)).all():
        raise InputError("widths, heights and scales must be positive numbers")
    return np.tile(sizes, 2)


@compiled
def _first_fault(boxes, limits):
    for row in range(len(boxes)):
        x1, y1, x2, y2 = boxes[row]
        width, height = limits[min(row, len(limits) - 1)]
        if not np.isfinite(x1 + y1 + x2 + y2):
            return row, 1
        if x2 < x1 or y2 < y1:
            return row, 2
        low, high = -SLACK, 1 + SLACK
        if x1 < low * width or y1 < low * height or x2 > high * width or y2 > high * height:
            return row, 3
    return -1, 0


_PACKED = ["class_id", *BOX, "score"]
_EXACT = 2**24  # class ids are exact in float32 below


def read_boxes(name, table, images, no_finding=None, n_classes=_EXACT, scored=True, highest=np.inf, sizes=None):
    """Return (image numbers int64 (n,), class ids int64 (n,), boxes float64 (n, 4), scores float64 (n,) or None).

    table: DataFrame with image_id, class_id, score (if `scored`, finite in [0, highest]), x_min, y_min, x_max, y_max;
    images: Index of possible ids. no_finding: the class whose box must be 0 0 1 1. sizes: float64 (images, 2). Raises
    InputError.
    """
    require_columns(name, table, ["image_id", "class_id", *["score"] * scored, *BOX])
    where = row_names(name, table)
    codes, ids = pd.factorize(table["image_id"])
    image = np.append(images.get_indexer(pd.Index(ids)), -1)[codes].astype(np.int64)  # a missing id has the code -1
    for row in np.flatnonzero(image < 0)[:1]:
        raise InputError(f"{where(row)} is not one of the {len(images)} images")
    class_id = read_class_ids(name, table, where, n_classes)
    scores = read_numbers(name, table, "score") if scored else None
    if scored and len(scores) and not (scores.min() >= 0 and scores.max() <= highest and scores.max() < np.inf):
        row = int(np.argmin((scores >= 0) & (scores <= highest) & (scores < np.inf)))
        raise InputError(f"{where(row)}: score {scores[row]:g} is not a number in [0, {highest:g}]")
    boxes = np.column_stack([read_numbers(name, table, column) for column in BOX])
    if no_finding is not None:
        rows = np.flatnonzero(class_id == no_finding)
        for row in rows[(boxes[rows] != [0, 0, 1, 1]).any(axis=1)][:1]:
            raise InputError(f"{where(row)}: class {no_finding} (no finding) must have the box 0 0 1 1")
    limits, outside = None if sizes is None else sizes[image], "lies outside its image: clip it to the image first"
    return image, class_id, check_boxes(boxes, where, limits, outside), scores


def read_class_ids(name, table, where, n_classes=_EXACT):
    """Return the class ids of a table, int64 (n,); raise InputError unless they are whole numbers below n_classes."""
    numbers = read_numbers(name, table, "class_id")
    known = (np.floor(numbers) == numbers) & (np.abs(numbers) < n_classes)
    if n_classes < _EXACT:
        known &= numbers >= 0
    for row in np.flatnonzero(~known)[:1]:
        wanted = "a whole number" if n_classes == _EXACT else f"one of 0 to {n_classes - 1}"
        raise InputError(f"{where(row)}: class id {numbers[row]:g} is not {wanted}")
    return numbers.astype(np.int64)


def refuse_repeated(name, table, image, rows, no_finding):
    """Raise InputError if two of `rows`, those of the class `no_finding`, belong to one image."""
    for row in rows[pd.Series(image[rows]).duplicated()][:1]:
        raise InputError(f"{row_names(name, table)(row)}: a second row of class {no_finding} for this image")


def require_columns(name, table, columns):
    """Raise InputError for missing columns."""
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{name}: needs the columns {', '.join(columns)}; {', '.join(missing)} missing")


def read_numbers(name, table, column):
    """Return a column as float64 (n,), NaN for missing values; raise InputError for text."""
    try:
        return table[column].to_numpy(np.float64)
    except (TypeError, ValueError):
        numbers = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        for row in np.flatnonzero(np.isnan(numbers) & table[column].notna())[:1]:
            found = table[column].iloc[row]
            raise InputError(f"{row_names(name, table)(row)}: {column} is {found!r}, not a number") from None
        return numbers


def row_names(name, table, rows=None):
    """Return a function from a row number (a place in `rows`, if given) to its name in error messages."""

    def where(row):
        row = row if rows is None else rows[row]
        return f"{name}, row {row}, image {table['image_id'].iloc[row]}"

    return where


def pack_boxes(boxes, ids):
    """Return the boxes of each image as a tuple of tuples, which can be compared; `unpack_boxes` undoes it."""
    values, rows = boxes[_PACKED[: 5 + ("score" in boxes)]].to_numpy(float), boxes.groupby("image_id").indices
    return [tuple(map(tuple, values[rows[image_id]].tolist())) if image_id in rows else () for image_id in ids]


def unpack_boxes(packed, ids):
    """Return the table of the packed boxes of images; without any, it has scores."""
    rows = [row for boxes in packed for row in boxes]
    boxes = pd.DataFrame(rows, columns=_PACKED[: len(rows[0]) if rows else 6], dtype=float).astype({"class_id": int})
    return boxes.assign(image_id=np.repeat(np.asarray(ids), [len(boxes) for boxes in packed]))
