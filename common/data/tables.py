"""Small tables from a user or a competition: image ids, patients, images to predict."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import InputError
from common.paths import IMAGES, check_id, find_images
from common.submit.table import read_table

log = logging.getLogger(__name__)


def some_rows(path, columns=None):
    """Return a CSV as text, as `read_table` does; raises InputError if it has no rows."""
    table = read_table(path, columns)
    if not len(table):
        raise InputError(f"{path}: no rows under its header")
    return table


def read_patients(path, image_ids):
    """Return the patient of each image, str (N,), from a CSV; an image that it lacks is a patient of its own.

    Its first column is the image; the patient is the column `patient_id`, or the number before the underscore in the
    column `NIH_ID` (00005593_000.png). Raises InputError for another header or an image that occurs twice.
    """
    table = read_table(path)
    first = table.columns[0]
    if "patient_id" in table:
        patient = table["patient_id"]
    elif "NIH_ID" in table:
        patient = table["NIH_ID"].str.split("_").str[0]
    else:
        raise InputError(f"{path}: needs a column patient_id or NIH_ID, has {', '.join(table.columns)}")
    _check_ids(table[first], path)
    known = dict(zip(table[first], patient, strict=True))
    missing = sum(image_id not in known for image_id in image_ids)
    if missing:
        log.info(f"{path}: {missing} of {len(image_ids)} images are not in it; each counts as a patient of its own")
    return np.array([known.get(image_id) or f"image {image_id}" for image_id in image_ids])


def read_ids(path, columns):
    """Return the ids in the first of the `columns` of a CSV; raises InputError for unusable or repeated ids."""
    table = some_rows(path, columns)
    _check_ids(table[columns[0]], path)
    return table[columns[0]].tolist()


def read_list(path, suffixes=IMAGES):
    """Return a CSV whose first column names images as a frame of strings, with or without a header; row i is i + 2.

    The first row is an image's, not a header, if it begins with a name that has a digit or one of the `suffixes`; it
    then has the index -1. Raises InputError as `read_table` does, and for a file without rows.
    """
    table = read_table(path)
    first = table.columns[0]
    if Path(first).suffix.lower() in suffixes or any(letter.isdigit() for letter in first):
        log.info(f"{path}: no header; {first} is taken for the first image")
        rows = [list(table.columns), *table.to_numpy().tolist()]
        table = pd.DataFrame(rows, range(-1, len(table)), list(map(str, range(len(rows[0])))), dtype=str)
    if not len(table):
        raise InputError(f"{path}: no rows under its header")
    return table


def named_images(path, suffixes=IMAGES):
    """Return (ids, {id: file}) of `--test`: a folder of images, or a list of them as `read_list` reads it (no files).

    suffixes: of images, in lower case; names in the list may have one. Raises InputError for an empty folder and for
    unusable or repeated names.
    """
    if path.is_dir():
        files = find_images(path, suffixes)
        if not files:
            raise InputError(f"{path}: no images in it (--test)")
        return [check_id(name, str(files[name])) for name in sorted(files)], files
    table = read_list(path, suffixes)
    first = table[table.columns[0]]
    ids = first.map(lambda name: Path(name).stem if Path(name).suffix.lower() in suffixes else name)
    _check_ids(ids, f"{path} (--test)")
    return ids.tolist(), {}


def _check_ids(ids, path):
    for row, image_id in ids.items():
        check_id(image_id, f"{path}, row {row + 2}")
    twice = ids.duplicated()
    if twice.any():
        raise InputError(f"{path}, row {twice.idxmax() + 2}: {ids[twice.idxmax()]} appears twice")
