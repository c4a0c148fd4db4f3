"""Boxes x_min, y_min, x_max, y_max as arrays (n, 4): checked, clipped, scaled, compared.

`sizes` are pixels of the image, width before height: (2,) for all boxes, or (n, 2), a row for each.
"""

import numpy as np
from numba import njit

from common.errors import InputError

BOX = ["x_min", "y_min", "x_max", "y_max"]
SLACK = 1e-6  # of the image: what rounding to float32 can put beyond its edge
_FAULTS = ("", "is not four finite numbers", "is inverted (x_min <= x_max and y_min <= y_max must hold)")


def check_boxes(boxes, where="box {}".format, sizes=None, outside="lies outside its image"):
    """Return boxes as contiguous float64 (n, 4).

    where: function from a row's number to the words that name it in an error. sizes: limits of the coordinates, the
    lower ones being 0, as above ((1, 1) for normalised boxes), or None for no limits; rounding beyond them, up to
    `SLACK`, passes, `clip` removes it. outside: what an error says of a box beyond. Raises InputError for another
    shape, for NaN and infinity, for inverted boxes and for those beyond the limits; a box of no area passes.
    """
    try:
        boxes = np.ascontiguousarray(boxes, np.float64)
    except (TypeError, ValueError):
        raise InputError("boxes must be numbers, four a row") from None
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(f"boxes must have shape (n, 4), not {boxes.shape}")
    limits = np.array([[np.inf, np.inf]]) if sizes is None else np.asarray(sizes, np.float64).reshape(-1, 2)
    row, fault = _first_fault(boxes, limits)
    if fault:
        numbers = ", ".join(f"{value:g}" for value in boxes[row])
        raise InputError(f"{where(row)}: ({numbers}) {_FAULTS[fault] if fault < 3 else outside}")
    return boxes


def areas(boxes):
    """Areas of boxes (n, 4), in the unit of the coordinates squared; no pixel is added to the sides."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def iou_matrix(a, b):
    """Intersection over union of each box of `a` (n, 4) with each of `b` (m, 4); float64 (n, m) in [0, 1].

    Where both boxes have no area it is 0.
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    common = np.maximum(sides, 0).prod(axis=2)
    union = areas(a)[:, None] + areas(b) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def clip(boxes, sizes):
    """Boxes with each coordinate moved into its image: 0 … width or height. A box outside it ends without area."""
    return np.clip(np.asarray(boxes, np.float64), 0.0, _twice(sizes))


def scale(boxes, x, y):
    """Boxes with x coordinates multiplied by `x` and y coordinates by `y` (numbers, or one for each box)."""
    return np.asarray(boxes, np.float64) * _twice(np.stack([x, y], axis=-1))


def normalise(boxes, sizes):
    """Boxes in pixels to shares of their image's width and height."""
    return np.asarray(boxes, np.float64) / _twice(sizes)


def denormalise(boxes, sizes):
    """Shares of the image's width and height back to pixels."""
    return np.asarray(boxes, np.float64) * _twice(sizes)


def _twice(sizes):
    sizes = np.asarray(sizes, np.float64)
    if not ((sizes > 0) & (sizes < np.inf)).all():
        raise InputError("widths, heights and scales must be positive numbers")
    return np.tile(sizes, 2)


@njit(cache=True, nogil=True)
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
