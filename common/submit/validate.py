"""Validate submissions before the upload: find faults that the competition would refuse or score wrongly."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from common.errors import InputError, check
from common.post.rle import RELATIVE, area, parse, to_string
from common.submit.boxes import NUMBER, find_faults, normalised_faults, read_entries
from common.submit.table import read_table


@dataclass(frozen=True)
class Summary:
    """Counts for a valid submission: rows, rows with a finding, and the total `amount` of `unit`s in them."""

    path: str
    rows: int
    positives: int
    amount: int
    unit: str
    positive: str = "positive"

    def __str__(self):
        positives = f"{self.positives:,} {self.positive} ({self.positives / self.rows:.1%})"
        return f"{self.path}: {self.rows:,} rows, {positives}, {self.amount:,} {self.unit}"


def validate_masks(path, sample, shape=(1024, 1024), form=RELATIVE, ordered=False):
    """Return the Summary, in pixels, of a submission of run-length masks, one row per image.

    sample: the competition's sample submission; header and ids must match, also in order if `ordered`. shape: (height,
    width). Raises InputError naming the first wrong row and counting the others: wrong ids, blanks, masks that
    `common.post.rle.parse` refuses, and strings that decoding and encoding changes.
    """
    table, problems = _read(path, sample, ordered)
    return _check_masks(path, ((*row, shape) for row in _rows(table, table.columns[1])), len(table), form, problems)


def validate_shaped_masks(path, sizes, form=RELATIVE):
    """Return the Summary, in pixels, of a table `image_id,width,height,rle` of masks of any size, one row per image.

    sizes: DataFrame of image_id, width, height of the images that the table must have, in this order. Raises InputError
    like `validate_masks`, and for a size that is not the image's.
    """
    table = read_table(path, ["image_id", "width", "height", "rle"])
    check(len(table) == len(sizes), f"{path}: {len(table)} rows for {len(sizes)} images")
    expected, problems = sizes[["image_id", "width", "height"]].itertuples(index=False), []

    def rows():
        found = table.itertuples(index=False)
        for (where, rle), got, (image_id, width, height) in zip(_rows(table, "rle"), found, expected, strict=True):
            if got.image_id != image_id:
                problems.append(f"{where}: expected {image_id} here")
            elif (got.width, got.height) != (str(width), str(height)):
                problems.append(f"{where}: {got.width} × {got.height} pixels, but the image has {width} × {height}")
            else:
                yield where, rle, (int(height), int(width))

    return _check_masks(path, rows(), len(table), form, problems)


def validate_boxes(path, sample, n_classes=15, no_finding=14, sizes=None, ordered=False):
    """Return the Summary, in boxes, of a submission of strings `class score x_min y_min x_max y_max` repeated.

    sample: a path or its table; header and ids must match, also in order if `ordered`. sizes: dict from id to (width,
    height), or None. Raises InputError for wrong ids and for the faults of `boxes.find_faults`.
    """
    table, problems = _read(path, sample, ordered)
    ids, pixels = table.iloc[:, 0], None
    if sizes is not None:
        pixels = np.array([sizes.get(image_id, (np.nan, np.nan)) for image_id in ids], np.float64).reshape(-1, 2)
    entries = read_entries(table.iloc[:, 1])
    faults = normalised_faults(entries, no_finding) | find_faults(entries, n_classes, no_finding, pixels)
    if sizes is not None:
        faults |= {row: "no width and height are known for this image" for row, i in enumerate(ids) if i not in sizes}
    refuse_rows(path, problems + row_problems(ids, dict(sorted(faults.items()))))
    found = entries.row[entries.class_id != no_finding]
    return Summary(str(path), len(table), len(np.unique(found)), len(found), "boxes")


def validate_probabilities(path, sample, ordered=False):
    """Return the Summary, in rows with a probability >= 0.5, of a submission of one probability per class and image.

    Header and ids must equal those of `sample`. Raises InputError naming the first wrong row and counting the others.
    """
    table, problems = _read(path, sample, ordered)
    positives = set()
    for column in table.columns[1:]:
        for where, value in _rows(table, column):
            if not NUMBER.fullmatch(value) or not 0 <= float(value) <= 1:
                problems.append(f"{where}: {column} is {value!r}, not a probability from 0 to 1")
            elif float(value) >= 0.5:
                positives.add(where)
    refuse_rows(path, problems)
    columns = len(table.columns) - 1
    return Summary(str(path), len(table), len(positives), columns, "columns of probabilities", "reach 0.5 somewhere")


def id_problems(ids, expected, source="the sample submission"):
    """Return the problems of a file's ids, which must be the `expected` ids of `source` in any order."""
    first, wanted, problems = {}, {}, []
    for row, image_id in enumerate(expected, start=2):
        wanted.setdefault(image_id, row)
    for row, image_id in enumerate(ids, start=2):
        if image_id in first:
            problems.append(f"row {row} ({image_id}): a second row of this image, the first is row {first[image_id]}")
        elif image_id not in wanted:
            problems.append(f"row {row} ({image_id!r}): {source} has no such image")
        first.setdefault(image_id, row)
    missing = [image_id for image_id in wanted if image_id not in first]
    return problems + [f"no row for {image_id} (row {wanted[image_id]} of {source})" for image_id in missing]


def row_problems(ids, faults):
    """Return the faults, a dict from row position to text, as lines that name row and image."""
    ids = list(ids)
    return [f"row {row + 2} ({ids[row]}): {fault}" for row, fault in faults.items()]


def refuse_rows(path, problems):
    """Raise InputError for the first of the problems, if any, and the number of the others."""
    if problems:
        further = f" (and {len(problems) - 1:,} further problems)" if len(problems) > 1 else ""
        raise InputError(f"{path}, {problems[0]}{further}")


def _check_masks(path, rows, n_rows, form, problems):
    """Return the Summary of rows (where, run-length string, shape); raise InputError for these or other `problems`."""
    areas = [0]
    for where, rle, shape in rows:
        try:
            runs = parse(rle, shape, form, where)
        except InputError as error:
            problems.append(str(error))
            continue
        areas.append(area(runs))
        if to_string(runs, form) != rle:
            problems.append(f"{where}: decoding and encoding changes the string (touching runs or leading zeros)")
    refuse_rows(path, problems)
    return Summary(str(path), n_rows, int(np.count_nonzero(areas)), sum(areas), "pixels")


def _rows(table, column):
    """Yield ("row 5 (id)", value) for each value of a column, with row numbers as in the file."""
    for row, (image_id, value) in enumerate(zip(table.iloc[:, 0], table[column], strict=True), start=2):
        yield f"row {row} ({image_id})", value


def _read(path, sample, ordered):
    """Return the submission, which must have the sample's header, and the problems of its ids."""
    expected = sample if isinstance(sample, pd.DataFrame) else read_table(sample)
    if len(expected.columns) < 2 or not len(expected):
        raise InputError(f"{sample}: a sample submission has ids, predictions and at least one row")
    table = read_table(path, expected.columns)
    problems = id_problems(table.iloc[:, 0], expected.iloc[:, 0])
    if ordered and not problems:
        pairs = enumerate(zip(table.iloc[:, 0], expected.iloc[:, 0].unique(), strict=True), start=2)
        problems += [f"row {row} ({a}): the sample submission has {b} here" for row, (a, b) in pairs if a != b]
    return table, problems
