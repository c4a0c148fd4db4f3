"""Check and compare boxes x_min, y_min, x_max, y_max in arrays (n, 4) and in tables; errors name the row.

`sizes` are widths and heights in pixels, (2,) or (n, 2).
"""

import numpy as np
import pandas as pd

from common.errors import InputError, check
from common.jit import compiled

BOX = ["x_min", "y_min", "x_max", "y_max"]
SLACK = 1e-6  # fraction of the side by which rounding to float32 can move a coordinate outside


def find_normalised(boxes):
    """Return the positions of boxes in 0 to 1 instead of pixels, none unless more than 1 % of boxes are so small."""
    small = np.flatnonzero((np.asarray(boxes).reshape(-1, 4) <= 1).all(axis=1))
    return small if len(small) > len(boxes) / 100 else small[:0]


def iou_matrix(a, b):
    """Return the intersection over union of each box of `a` (n, 4) with each of `b` (m, 4), float64 (n, m) in [0, 1].

    It is 0 if neither box has an area. Areas are width × height, without the extra pixel of the VOC kit.

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
    """Return the intersection over union of two boxes (4,), NaN if neither has an area. For compiled callers."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def clip(boxes, sizes):
    """Return boxes with all coordinates clipped to 0 … width or height; a box outside its image loses its area."""
    return np.clip(np.asarray(boxes, np.float64), 0.0, _twice(sizes))


def scale(boxes, x, y):
    """Return boxes with x coordinates multiplied by `x` and y coordinates by `y` (numbers, or one per box)."""
    return np.asarray(boxes, np.float64) * _twice(np.stack([x, y], axis=-1))


def _twice(sizes):
    sizes = np.asarray(sizes, np.float64)
    check(((sizes > 0) & (sizes < np.inf)).all(), "widths, heights and scales must be positive numbers")
    return np.tile(sizes, 2)


_PACKED = ["class_id", *BOX, "score"]
_EXACT = 2**24  # class ids are exact in float32 below


def find_places(index, names):
    """Return `index.get_indexer(names)`, int64, keeping one string per distinct name instead of millions."""
    codes, distinct = pd.factorize(names)
    places = np.append(index.get_indexer(distinct), -1).astype(np.int64)  # the last entry is for NaN, whose code is -1
    return places[codes]


def read_boxes(name, table, images, no_finding=None, n_classes=_EXACT, scored=True, highest=np.inf, sizes=None):
    """Return (image numbers int64 (n,), class ids int64 (n,), boxes float64 (n, 4), scores float64 (n,) or None).

    table: DataFrame with image_id, class_id, score (if `scored`, finite in [0, highest]), x_min, y_min, x_max, y_max;
    images: Index of possible ids. no_finding: the class whose box must be 0 0 1 1. sizes: float64 (images, 2),
    which boxes may exceed only by rounding errors. Raises InputError.
    """
    numbers = read_numbers(name, table, ["class_id", *["score"] * scored, *BOX])
    class_id, boxes = numbers[:, 0], np.ascontiguousarray(numbers[:, -4:])
    scores = np.ascontiguousarray(numbers[:, 1]) if scored else np.zeros(len(table))
    image = find_places(images, table["image_id"])
    low, high, limits = boxes[:, :2], boxes[:, 2:], np.inf if sizes is None else sizes[image]
    lowest, wanted = (-n_classes, "a whole number") if n_classes == _EXACT else (-1, f"one of 0 to {n_classes - 1}")
    known = (np.floor(class_id) == class_id) & (class_id > lowest) & (class_id < n_classes)
    healthy, outside = class_id == no_finding, ((low < -SLACK * limits) | (high > (1 + SLACK) * limits)).any(axis=1)
    good = (scores >= 0) & (scores <= highest) & (scores < np.inf)
    faults = (
        (image < 0, f"not one of the {len(images)} images"),
        (~known, f"class id {{class_id:g}} is not {wanted}"),
        (~good, f"score {{score:g}} is not a number in [0, {highest:g}]"),
        (~np.isfinite(boxes).all(axis=1), f"({_CORNERS}) is not four finite numbers"),
        (healthy & (boxes != [0, 0, 1, 1]).any(axis=1), "class {class_id} (no finding) must have the box 0 0 1 1"),
        ((high < low).any(axis=1), f"({_CORNERS}) is inverted (x_min <= x_max and y_min <= y_max must hold)"),
        (outside, f"({_CORNERS}) lies outside its image: clip it to the image first"),
    )
    refuse(name, table, faults)
    return image, class_id.astype(np.int64), boxes, scores if scored else None


_CORNERS = "{x_min}, {y_min}, {x_max}, {y_max}"


def refuse(name, table, faults):
    """Raise InputError for the first row with the first of the faults: (bool (n,), reason with {column} in it)."""
    for bad, reason in faults:
        for row in np.flatnonzero(bad)[:1]:
            values = table.iloc[row].to_dict()
            raise InputError(f"{name}, row {row}, image {values['image_id']}: {reason.format(**values)}")


def refuse_repeated(name, table, image, rows, no_finding):
    """Raise InputError if two of `rows`, those of the class `no_finding`, belong to one image."""
    repeated = np.isin(np.arange(len(image)), rows[pd.Series(image[rows]).duplicated()])
    refuse(name, table, [(repeated, f"a second row of class {no_finding} for this image")])


def require_columns(name, table, columns):
    """Raise InputError for missing columns."""
    missing = [column for column in columns if column not in table]
    check(not missing, f"{name}: needs the columns {', '.join(columns)}; {', '.join(missing)} missing")


def read_numbers(name, table, columns):
    """Return columns as float64 (n, k), NaN for missing values; raise InputError for missing columns and for text."""
    require_columns(name, table, ["image_id", *columns])
    found = [pd.to_numeric(table[c], errors="coerce").to_numpy(np.float64, na_value=np.nan) for c in columns]
    texts = [np.isnan(values) & table[c].notna().to_numpy() for c, values in zip(columns, found, strict=True)]
    refuse(name, table, [(bad, f"{c} is {{{c}!r}}, not a number") for c, bad in zip(columns, texts, strict=True)])
    return np.column_stack(found)


def pack_boxes(boxes, ids):
    """Return each image's boxes as a tuple of tuples, which can be compared; `unpack_boxes` reverses this."""
    values, rows = boxes[_PACKED[: 5 + ("score" in boxes)]].to_numpy(float), boxes.groupby("image_id").indices
    return [tuple(map(tuple, values[rows[image_id]].tolist())) if image_id in rows else () for image_id in ids]


def unpack_boxes(packed, ids):
    """Return the table of packed boxes of images; if there are none, the table has scores."""
    rows = [row for boxes in packed for row in boxes]
    boxes = pd.DataFrame(rows, columns=_PACKED[: len(rows[0]) if rows else 6], dtype=float).astype({"class_id": int})
    return boxes.assign(image_id=np.repeat(np.asarray(ids), [len(boxes) for boxes in packed]))
