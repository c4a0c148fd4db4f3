"""The collections that a user has as one table, with a row for each row of theirs."""

import logging
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd

from common.data.tables import named_images, some_rows
from common.errors import InputError
from common.paths import IMAGES
from solutions.covid19.config import COVID
from solutions.covid19.layouts import CHEXPERT, from_chexpert, from_metadata, from_nih

log = logging.getLogger(__name__)
METADATA, UNLABELLED = "metadata.csv", "unlabelled_test.csv"
COLUMNS = [
    "collection",
    "home",
    "table",
    "line",
    "file_name",
    "path",
    "image_id",
    "patient_id",
    "age",
    "age_said",
    "sex",
    "view",
    "view_said",
    "modality",
    "devices",
    "finding",
    "label",
]
TEST_COLUMNS = ["image_id", "file_name", "path", "patient_id", "collection"]


def read_collections(folders):
    """Read the collections in folders: a frame with COLUMNS, one row for each row of their tables, in order.

    folders: each is searched, and its direct sub-folders are, for metadata.csv (ieee8023, Actualmed, Figure1),
    Data_Entry_2017*.csv (NIH) and train.csv or valid.csv with a column Path (CheXpert). collection: str; of
    ieee8023's the column `source`, else the folder. home: False for NIH and CheXpert, which hold no COVID-19. table:
    Path; line: the row in it, 1 being the header. file_name: as given; path: None without a file. image_id: unique.
    patient_id: "<collection> <number>", one of its own where the table gives none. age: float years, NaN where unknown;
    age_said: a text that is no age. view: frontal, lateral, other or unknown; view_said as given. modality: X-ray, CT,
    another as given, or "". devices: bool. label: 1 COVID-19, 0 something else or nothing, -1 not known. Raises
    InputError naming file and row: no table, an unreadable or empty one, one without a column, a name of two files.
    """
    tables = _all_tables(folders)
    places = [path.parent for path in tables]
    table = pd.concat([_read(path, places) for path in tables], ignore_index=True)
    table["image_id"] = _unique(table)
    blank = table["patient_id"] == ""
    table["patient_id"] = table["collection"] + " " + table["patient_id"].mask(blank, "image " + table["image_id"])
    for name, rows in table.groupby("collection", sort=False):
        counts = rows["label"].value_counts()
        log.info(
            f"{name}: {len(rows):,} rows, {counts.get(1, 0):,} of them {COVID}; {counts.get(-1, 0):,} of unknown "
            f"finding, {rows['path'].isna().sum():,} without a file"
        )
    return table[COLUMNS]


def read_test(folders, test, taken=()):
    """Images to predict: a frame of image_id, file_name, path (None without a file), patient_id, collection ("").

    test: --test, a folder or a CSV whose first column names the images; None takes the unlabelled_test.csv beside each
    metadata.csv in `folders`, an empty frame where there is none. Patients are those of a column patientid, "image …"
    without. taken: ids in use; a test image of such an id gets "test-" in front. Raises InputError naming file and row:
    an unreadable or empty list, an image named twice, a name of two files.
    """
    if test is not None and Path(test).is_dir():
        files = named_images(Path(test))[1]
        lists = [pd.DataFrame({"file_name": [path.name for path in files.values()], "patient_id": ""}, dtype=object)]
        lists[0]["path"] = pd.Series(list(files.values()), dtype=object)
    else:
        tables = _all_tables(folders)
        places = list(dict.fromkeys(path.parent for path in tables))
        if test is None:
            places = [path.parent for path in tables if path.name == METADATA and path.with_name(UNLABELLED).is_file()]
        indices = [_index(place, [path.parent for path in tables]) for place in places]
        if test is None:
            lists = [_read_list(place / UNLABELLED, index) for place, index in zip(places, indices, strict=True)]
        else:
            together = {
                stem: [path for index in indices for path in index.get(stem, [])] for stem in set().union(*indices)
            }
            lists = [_read_list(Path(test), together)]
    if not lists:
        return pd.DataFrame(columns=TEST_COLUMNS, dtype=object)
    table = pd.concat(lists, ignore_index=True).assign(collection="")
    twice = table["file_name"].duplicated()
    if twice.any():
        raise InputError(f"{table.loc[twice.idxmax(), 'file_name']}: twice among the images to predict")
    table["image_id"] = _unique(table)
    table["image_id"] = table["image_id"].mask(table["image_id"].isin(set(taken)), "test-" + table["image_id"])
    table["patient_id"] = table["patient_id"].mask(table["patient_id"] == "", "image " + table["image_id"])
    return table[TEST_COLUMNS]


def _read_list(path, index):
    rows = some_rows(path)
    names = rows[rows.columns[0]]
    for row in np.flatnonzero(names == "")[:1]:
        raise InputError(f"{path}, row {row + 2}: no file name")
    patients = next((rows[name] for name in rows if name.lower() in ("patientid", "patient_id")), "")
    paths = [_file(index, name, "", f"{path}, row {row + 2}") for row, name in names.items()]
    return pd.DataFrame({"file_name": names, "patient_id": patients, "path": pd.Series(paths, dtype=object)})


def _all_tables(folders):
    """Tables of known collections in folders and their direct sub-folders, each once."""
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        inside = [path for place in [folder, *sorted(folder.iterdir())] if place.is_dir() for path in _tables(place)]
        if not inside:
            raise InputError(
                f"{folder}: no collection in it or in a folder of it (no {METADATA}, no "
                "Data_Entry_2017*.csv, no train.csv or valid.csv of CheXpert)"
            )
        for path in inside:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _tables(place):
    found = [place / METADATA] if (place / METADATA).is_file() else []
    found += sorted(place.glob("Data_Entry_2017*.csv"))[:1]  # the second one is a correction of the same rows
    return found + [place / name for name in ("train.csv", "valid.csv") if _is_chexpert(place / name)]


def _is_chexpert(path):
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return re.match(rb'(\xef\xbb\xbf)?"?Path"?,', file.readline(4096)) is not None


def _read(path, places):
    """One table in the columns that all share, with the paths of its images."""
    raw = some_rows(path)
    if path.name in ("train.csv", "valid.csv"):
        table = from_chexpert(path, raw)
        paths = [_below(path.parent, name) for name in table["file_name"]]
    else:
        table = from_metadata(path, raw) if path.name == METADATA else from_nih(path, raw)
        index = _index(path.parent, places)
        named = zip(table["file_name"], table["folder"], strict=True)
        paths = [_file(index, name, folder, f"{path}, row {row}") for row, (name, folder) in enumerate(named, 2)]
    return table.assign(table=path, line=np.arange(len(table)) + 2, path=pd.Series(paths, table.index, dtype=object))


def _index(folder, places):
    """Stem → paths of the images below a folder, but for those of other collections, whose `places` are below it."""
    found, others = {}, {place.resolve() for place in places} - {folder.resolve()}
    for parent, names, files in os.walk(folder, onerror=_raise, followlinks=True):
        names[:] = sorted(name for name in names if (Path(parent) / name).resolve() not in others)
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGES and not name.startswith("."):
                found.setdefault(stem, []).append(Path(parent) / name)
    return found


def _raise(error):
    raise error


def _file(index, name, folder, where):
    """Path of the image that a row names, None without one; of several that in its folder, of the very name."""
    paths, folder = index.get(_stem(name), []), folder or Path(name).parent.name or "images"
    for fits in (lambda path: path.parent.name == folder, lambda path: path.name == Path(name).name):
        if len(paths) > 1:
            paths = [path for path in paths if fits(path)] or paths
    if len(paths) > 1:
        raise InputError(f"{where}: {name} may be {paths[0]} or {paths[1]}")
    return paths[0] if paths else None


def _below(folder, name):
    """CheXpert's file of a path such as CheXpert-v1.0-small/train/…, whose first folder holds the table or is in it."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return next((path for start in (1, 0) if (path := folder.joinpath(*parts[start:])).is_file()), None)


def _stem(name):
    stem, suffix = os.path.splitext(name.replace("\\", "/").rsplit("/", 1)[-1])
    return stem if suffix.lower() in IMAGES else stem + suffix


def _unique(table):
    """Ids that can be file names: the stem, the collection in front of one that is there twice, then a number."""
    inner = table["file_name"].str.extract(r"(patient.+)$")[0].str.replace("/", "_")
    ids = _safe(table["file_name"].mask((table["collection"] == CHEXPERT) & inner.notna(), inner).map(_stem))
    ids = ids.mask(ids.duplicated(keep=False), _safe(table["collection"] + "-" + ids))
    while ids.duplicated().any():
        ids = ids.mask(ids.duplicated(), ids + "-2")
    return ids


def _safe(texts):
    texts = texts.str.replace(r"[^A-Za-z0-9._-]+", "-", regex=True).str.replace(r"\.{2,}", ".", regex=True)
    return texts.str.lstrip("._-").replace("", "image")
