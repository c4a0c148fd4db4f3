"""Boxes x_min, y_min, x_max, y_max as arrays (n, 4); `sizes` are widths and heights in pixels, (2,) or (n, 2)."""

import numpy as np

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
