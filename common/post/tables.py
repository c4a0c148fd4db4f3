"""Checked conversion of tables of boxes (DataFrames) to arrays; errors name the table, the row and the image."""

import numpy as np
import pandas as pd

from common.errors import InputError
from common.post.boxes import BOX, check_boxes

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
