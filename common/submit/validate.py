"""Submissions checked before the upload: what the competition would refuse, or score wrongly, is refused here."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from common.errors import InputError
from common.post.rle import RELATIVE, area, parse, to_string
from common.submit.boxes import NUMBER, find_faults, read_entries
from common.submit.table import read_table

_SPELLING = "decoding and encoding does not return the string (touching runs, odd spelling)"


@dataclass(frozen=True)
class Summary:
    """What a valid submission holds: its rows, those with a finding, and how many `unit`s these hold together."""

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
    """Check a submission of run-length masks, one row an image, and return its Summary in pixels.

    `sample` is the competition's sample submission: the header and ids must be its own, in its order if `ordered`.
    `shape` is (height, width) in pixels of every image. Raises InputError naming the first wrong row and counting
    the others: duplicate, missing or unknown ids, blanks, whatever `common.post.rle.parse` refuses, and strings
    that another spelling writes shorter (touching runs, leading zeros), since decoding and encoding must return them.
    """
    table, problems = _read(path, sample, ordered)
    areas = [0]
    for where, rle in _rows(table, table.columns[1]):
        try:
            runs = parse(rle, shape, form, where)
        except InputError as error:
            problems.append(str(error))
            continue
        areas.append(area(runs))
        if to_string(runs, form) != rle:
            problems.append(f"{where}: {_SPELLING}")
    refuse_rows(path, problems)
    return Summary(str(path), len(table), int(np.count_nonzero(areas)), sum(areas), "pixels")


def validate_shaped_masks(path, sizes, form=RELATIVE):
    """Check a table `image_id,width,height,rle` of masks of any size, one row an image, and return its Summary.

    `sizes` is a DataFrame image_id, width, height of the images that the table must have, in this order. Raises
    InputError naming the first wrong row, as `validate_masks` does, a size that is not the image's included.
    """
    table = read_table(path, ["image_id", "width", "height", "rle"])
    wanted = [tuple(map(str, row)) for row in sizes[["image_id", "width", "height"]].itertuples(index=False)]
    found = list(table[["image_id", "width", "height"]].itertuples(index=False, name=None))
    if len(found) != len(wanted):
        raise InputError(f"{path}: {len(found)} rows for {len(wanted)} images")
    problems, areas = [], [0]
    for row, (got, want, rle) in enumerate(zip(found, wanted, table["rle"], strict=True), start=2):
        where = f"row {row} ({got[0]})"
        if got[0] != want[0]:
            problems.append(f"{where}: {want[0]} is due here")
            continue
        if got != want:
            problems.append(f"{where}: {got[1]} × {got[2]} pixels, where the image has {want[1]} × {want[2]}")
            continue
        try:
            runs = parse(rle, (int(want[2]), int(want[1])), form, where)
        except InputError as error:
            problems.append(str(error))
            continue
        areas.append(area(runs))
        if to_string(runs, form) != rle:
            problems.append(f"{where}: {_SPELLING}")
    refuse_rows(path, problems)
    return Summary(str(path), len(table), int(np.count_nonzero(areas)), sum(areas), "pixels")


def validate_boxes(path, sample, n_classes=15, no_finding=14, sizes=None, ordered=False):
    """Check a submission of boxes, `class score x_min y_min x_max y_max` repeated, and return its Summary in boxes.

    `sample` is the sample submission, a path or its table; the header and ids must be its own, in its order if
    `ordered`. Classes are 0 … n_classes - 1, scores lie in [0, 1], boxes have positive sides and lie at 0 or beyond in
    original pixels, and within `sizes` (id → (width, height)) where given. `no_finding` has the box 0 0 1 1; a row
    holds one entry at least. Raises InputError naming the first wrong row and counting the others.
    """
    table, problems = _read(path, sample, ordered)
    ids, pixels = table.iloc[:, 0], None
    if sizes is not None:
        pixels = np.array([sizes.get(image_id, (np.nan, np.nan)) for image_id in ids], np.float64).reshape(-1, 2)
    entries = read_entries(table.iloc[:, 1])
    faults = find_faults(entries, n_classes, no_finding, pixels)
    if sizes is not None:
        faults |= {row: "no width and height are known for this image" for row, i in enumerate(ids) if i not in sizes}
        faults = dict(sorted(faults.items()))
    refuse_rows(path, problems + row_problems(ids, faults))
    found = entries.row[entries.class_id != no_finding]
    return Summary(str(path), len(table), len(np.unique(found)), len(found), "boxes")


def validate_probabilities(path, sample, ordered=False):
    """Check a submission of one probability a class and image; return its Summary in rows that reach 0.5 somewhere.

    The header and ids must be those of `sample`. Raises InputError naming the first row with a value that is no
    number in [0, 1], or a duplicate, missing or unknown id, and counting the others.
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


def _rows(table, column):
    """Yield ("row 5 (id)", value) down one column, rows counted as in the file."""
    for row, (image_id, value) in enumerate(zip(table.iloc[:, 0], table[column], strict=True), start=2):
        yield f"row {row} ({image_id})", value


def _read(path, sample, ordered):
    """Read the submission under the header of the sample; return it and what is wrong with its ids."""
    expected = sample if isinstance(sample, pd.DataFrame) else read_table(sample)
    if len(expected.columns) < 2 or not len(expected):
        raise InputError(f"{sample}: a sample submission has ids, predictions and at least one row")
    table = read_table(path, expected.columns)
    problems = id_problems(table.iloc[:, 0], expected.iloc[:, 0])
    if ordered and not problems:
        pairs = enumerate(zip(table.iloc[:, 0], expected.iloc[:, 0].unique(), strict=True), start=2)
        problems += [f"row {row} ({a}): the sample submission has {b} here" for row, (a, b) in pairs if a != b]
    return table, problems


def id_problems(ids, expected, source="the sample submission"):
    """What is wrong with the ids of a file whose images must be `expected`, those of `source`, in any order."""
    found, wanted, problems = {}, {}, []
    for row, image_id in enumerate(expected, start=2):
        wanted.setdefault(image_id, row)
    for row, image_id in enumerate(ids, start=2):
        if image_id in found:
            problems.append(f"row {row} ({image_id}): a second row of this image, the first is row {found[image_id]}")
        elif image_id not in wanted:
            problems.append(f"row {row} ({image_id!r}): {source} has no such image")
        found.setdefault(image_id, row)
    missing = [image_id for image_id in wanted if image_id not in found]
    return problems + [f"no row for {image_id} (row {wanted[image_id]} of {source})" for image_id in missing]


def row_problems(ids, faults):
    """The faults of a dict from a row's place to words, each naming its row and image."""
    ids = list(ids)
    return [f"row {row + 2} ({ids[row]}): {fault}" for row, fault in faults.items()]


def refuse_rows(path, problems):
    """Raise InputError where there are problems: the first, and how many more."""
    if problems:
        further = f" (and {len(problems) - 1:,} further problems)" if len(problems) > 1 else ""
        raise InputError(f"{path}, {problems[0]}{further}")
