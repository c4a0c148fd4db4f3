"""Small tables from a user or a competition: image ids, patients, images to predict."""

import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import InputError, check, log
from common.paths import IMAGES, check_id, list_images, name_images, strip_suffix
from common.submit.table import read_rows, read_table

_CHEXNET = re.compile(r"\S+([ \t]+[01]){14}")
_HEADER = re.compile("(?i)image|file|name|id|path|index|study|scan")


def some_rows(path, columns=None):
    """Return a CSV as text, as `read_table` does; raises InputError if it has no rows."""
    table = read_table(path, columns)
    check(len(table), f"{path}: no rows under its header")
    return table


def read_patients(path, image_ids):
    """Return the patient of each image, str (N,), from a CSV; an image not in it counts as a separate patient.

    The first column names the image, with or without its suffix. The patient is in the column `patient_id`, or is the
    number before the underscore in the column `NIH_ID` (00005593_000.png). Folders count as in `match_names`. Raises
    InputError for another header, if one of the images occurs twice, or if none of them is in it.
    """
    table, image_ids = read_table(path), pd.Index(list(image_ids))
    first = table.columns[0]
    if "patient_id" in table:
        patient = table["patient_id"]
    elif "NIH_ID" in table:
        patient = table["NIH_ID"].str.split("_").str[0]
    else:
        raise InputError(f"{path}: needs a column patient_id or NIH_ID, has {', '.join(table.columns)}")
    paths = table[first].map(path_without_suffix)
    for row, name in paths.items():
        check_path(name, f"{path}, row {row + 2}")
    by_path = dict(zip(image_ids.map(path_without_suffix), image_ids, strict=True))
    names = table[first].where(table[first].isin(image_ids), match_names(paths, pd.Index(by_path)).map(by_path))
    check_ids(names[names.notna()], path, check_path)
    known = dict(zip(names, patient, strict=True))
    missing = sum(image_id not in known for image_id in image_ids)
    if missing:
        check(missing < len(image_ids), f"{path}: none of the {missing} images is in it, such as {image_ids[0]}")
        log.info(f"{path}: {missing} of {len(image_ids)} images are not in it; each counts as a separate patient")
    return np.array([known.get(image_id) or f"image {image_id}" for image_id in image_ids])


def path_without_suffix(name):
    """Return an image's path, with / between folders and without its suffix."""
    return "/".join([*re.split(r"[/\\]", name)[:-1], strip_suffix(name)])


def match_names(names, known):
    """Return image names as they stand in `known` where both mean the same image, and otherwise unchanged.

    names: a Series or an Index; known: an Index; both of paths without suffix. A name means the image with the same
    path, else that with the same last part, if no other name of either has this part and one of the two has no folder.
    """
    ends, known_ends = (each.map(lambda name: name.rpartition("/")[2]) for each in (names, known))
    once = ~known_ends.duplicated(keep=False)
    alike, paths, matched = dict(zip(known_ends[once], known[once], strict=True)), set(known), []
    for name, end, repeated in zip(names, ends, ends.duplicated(keep=False), strict=True):
        other = None if repeated or name in paths else alike.get(end)
        matched.append(name if other is None or ("/" in name and "/" in other) else other)
    return pd.Series(matched, names.index) if isinstance(names, pd.Series) else pd.Index(matched)


def parse_ages(texts):
    """Return years (float, NaN if unknown) from a Series of ages such as 58, 058Y, 013M, 025D or 41.5."""
    parts = texts.str.upper().str.extract(r"^(\d+(?:\.\d*)?)([YMD]?)$")
    return parts[0].astype(float) / parts[1].map({"": 1, "Y": 1, "M": 12, "D": 365.25}).astype(float)


def plain_patients(patients):
    """Return patients (a Series of str), without leading zeros if they are numbers."""
    return patients.str.replace(r"^0+(?=\d+$)", "", regex=True)


def read_ids(path, columns):
    """Return the ids in the first of the `columns` of a CSV; raises InputError for unusable or repeated ids."""
    table = some_rows(path, columns)
    check_ids(table[columns[0]], path)
    return table[columns[0]].tolist()


def read_list(path, suffixes=IMAGES, known=()):
    """Return a list of images as a DataFrame of str whose first column names them; row i is row i + 2 of the file.

    The file is a CSV with or without a header, has one name per line, or is one of CheXNet's lists (a name and 14
    numbers, separated by blanks). The first row is an image and not a header if its name has a digit or one of the
    `suffixes`, or is among the ids `known`; its index is then -1. Raises InputError like `read_table` and without rows.
    """
    rows = {number: row for number, row in enumerate(read_rows(path), -1) if any(row)}
    if all(len(row) == 1 and _CHEXNET.fullmatch(row[0]) for row in rows.values()):
        rows = {number: row[0].split() for number, row in rows.items()}
    columns = rows[-1]
    for number, row in rows.items():
        check(len(row) == len(columns), f"{path}, row {number + 2}: {len(row)} values where row 1 has {len(columns)}")
    first = columns[0]
    has_suffix = Path(first).suffix.lower() in suffixes
    if has_suffix or any(letter.isdigit() for letter in first) or strip_suffix(first, suffixes) in known:
        columns = [str(number) for number in range(len(columns))]
        if not has_suffix:
            log.info(f"{path}: no header; {first} is taken for the first image")
    else:
        del rows[-1]
        if not _HEADER.search(first):
            log.info(f"{path}: {first} is taken for the header")
    check(rows, f"{path}: no rows under its header")
    return pd.DataFrame(list(rows.values()), list(rows), columns, dtype=str)


def named_images(path, suffixes=IMAGES, known=(), folder=None):
    """Return (ids, {id: file}) of `--test`: a folder of images, or a list of images for `read_list` (no files).

    suffixes: of image files, in lower case; names in the list may have one. Images of the same name are distinguished
    by their paths, see `name_images`. known: ids that a list may name, with `folder` also their files below it, by id.
    Raises InputError for an empty folder, for unusable or repeated names, and for a path that is not its file's.
    """
    if path.is_dir():
        files = name_images(list_images(path, suffixes), path, suffixes)
        check(files, f"{path}: no images in it (--test)")
        for name, file in files.items():
            check_path(name, str(file))
        return sorted(files), files
    names = read_list(path, suffixes, known).iloc[:, 0]
    ids = names.map(partial(strip_suffix, suffixes=suffixes))
    paths = (names.str.rpartition("/")[0] + "/" + ids).str.removeprefix("/")
    ids = ids.mask(ids.duplicated(keep=False) | paths.isin(list(known)), paths)
    check_ids(ids, f"{path} (--test)", check_path)
    for image_id, listed in zip(ids, paths, strict=True) if folder is not None else ():
        file = os.path.relpath(known[image_id], folder) if image_id in known else ""
        pairs = zip(*(reversed(Path(each).parent.parts) for each in (listed, file)), strict=False)  # of folders
        if any(one != other for one, other in pairs):
            hint = "if it is the image, leave the folders out of the list"
            raise InputError(f"{path}: {listed} has no file, but {known[image_id]} is in another folder; {hint}")
    return ids.tolist(), {}


def check_path(image_id, where):
    """Raise InputError unless all parts of an id that is a path are valid, see `check_id`."""
    for part in image_id.split("/"):
        check_id(part, where)


def check_ids(ids, path, check=check_id):
    """Raise InputError for an unusable or repeated id; row i of the Series `ids` is row i + 2 of the file `path`."""
    for row, image_id in ids.items():
        check(image_id, f"{path}, row {row + 2}")
    twice = ids.duplicated()
    if twice.any():
        raise InputError(f"{path}, row {twice.idxmax() + 2}: {ids[twice.idxmax()]} appears twice")


def refuse_faults(path, table, faults, name="image_id", box=()):
    """Raise InputError for the first row with the first of the faults: (bool (n,), reason with {column} in it).

    Row i of the table is row i + 2 of the file `path`; name: its column of image ids; box: the columns of {box}.
    """
    for wrong, reason in faults:
        for row in table.index[np.asarray(wrong, bool)][:1]:
            values = table.loc[row].to_dict()
            values["box"] = " ".join(values[column] or "(blank)" for column in box)
            raise InputError(f"{path}, row {row + 2} ({values[name]}): {reason.format_map(values)}")
