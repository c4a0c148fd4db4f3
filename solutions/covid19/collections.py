"""Read the user's collections into one table with shared columns, and the list of images to predict."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from common.data.tables import named_images, read_list, some_rows
from common.errors import InputError, log
from common.paths import list_folders, list_images, strip_suffix
from solutions.covid19.config import COVID
from solutions.covid19.layouts import CHEXPERT, from_chexpert, from_metadata, from_nih

METADATA, UNLABELLED = "metadata.csv", "unlabelled_test.csv"


def read_collections(folders):
    """Return one table of all collections in some folders, with one row per source row, in order.

    Source tables, in each folder or its direct subfolders: metadata.csv (ieee8023, Actualmed, Figure1),
    Data_Entry_2017*.csv (NIH), train.csv or valid.csv with a column Path (CheXpert). Columns: collection; home: False
    for NIH and CheXpert; table, line: source Path and row (1 is the header); file_name; path: None without a file;
    image_id; patient_id: "<collection> <number>"; age: years or NaN; age_said: text that is no age; view: frontal,
    lateral, other, unknown; view_said: its text; modality: X-ray, CT, another or ""; devices: bool; finding; label: 1
    COVID-19, 0 none, -1 unknown. Raises InputError (file, row) for an unusable table, missing column, ambiguous name.
    """
    tables = {}
    for folder in map(Path, folders):
        found = _find_tables(folder)
        if not found:
            wanted = f"no {METADATA}, no Data_Entry_2017*.csv, no train.csv or valid.csv of CheXpert"
            raise InputError(f"{folder}: no collection in it or its subfolders ({wanted})")
        tables |= {path.resolve(): path for path in found if path.resolve() not in tables}
    places = [path.parent for path in tables.values()]
    table = pd.concat([_read(path, places) for path in tables.values()], ignore_index=True)
    table["image_id"] = _make_ids(table)
    number = table["patient_id"].mask(table["patient_id"] == "", "image " + table["image_id"])
    table["patient_id"] = table["collection"] + " " + number
    for name, rows in table.groupby("collection", sort=False):
        counts = rows["label"].value_counts()
        log.info(
            f"{name}: {len(rows):,} rows, {counts.get(1, 0):,} of them {COVID}; {counts.get(-1, 0):,} of unknown "
            f"finding, {rows['path'].isna().sum():,} without a file"
        )
    return table


def read_test_images(data, test, taken=()):
    """Return the images to predict, a table of image_id, file_name, path, patient_id and collection ("").

    test: --test, a folder or a CSV with names of images below `data`; None: unlabelled_test.csv there, if any. taken:
    ids in use; test images with such an id get the prefix "test-". Raises InputError naming file and row.
    """
    if test is not None and test.is_dir():
        files = named_images(test)[1]
        names = [name + path.name.removeprefix(strip_suffix(path.name)) for name, path in files.items()]
        lists = [pd.DataFrame({"file_name": names, "patient_id": "", "path": list(files.values())}, dtype="O")]
    elif data is None:
        raise InputError("name the folder of the images with --data")
    elif test is not None:
        lists = [_read_list(test, _index_images(data))]
    else:
        places = [path.parent for path in _find_tables(data)]
        paths = [place / UNLABELLED for place in list_folders(data) if (place / UNLABELLED).is_file()]
        lists = [_read_list(path, _index_images(path.parent, places)) for path in paths]
    lists = lists or [pd.DataFrame({"file_name": [], "patient_id": [], "path": []}, dtype="O")]
    table = pd.concat(lists, ignore_index=True).assign(collection="")
    for name in table["file_name"][table["file_name"].duplicated()]:
        raise InputError(f"{name}: listed twice among the images to predict")
    absent = table["path"].isna()
    if absent.any():
        first = table["file_name"][absent].iloc[0]
        raise InputError(f"{absent.sum()} of {len(table)} images to predict have no file, the first is {first}")
    table["image_id"] = _make_ids(table)
    table["image_id"] = table["image_id"].mask(table["image_id"].isin(set(taken)), "test-" + table["image_id"])
    table["patient_id"] = table["patient_id"].mask(table["patient_id"] == "", "image " + table["image_id"])
    return table


def read_exclusions(path, table):
    """Return why --exclude leaves out each row of `table` ("" if not); column 2 of the list gives reasons."""
    stems = table["file_name"].map(strip_suffix)
    rows = read_list(path, known={*stems, *table["image_id"]})
    reasons = rows[rows.columns[1]] if rows.shape[1] > 1 else pd.Series("", rows.index)
    wanted = dict(zip(rows[rows.columns[0]].map(strip_suffix), reasons, strict=True))
    stems = stems.where(stems.isin(wanted.keys()), table["image_id"])
    found = stems.map({name: f"excluded by hand ({reason})".replace(" ()", "") for name, reason in wanted.items()})
    unknown = set(wanted) - set(stems)
    if len(unknown) == len(wanted):
        raise InputError(f"{path}: names no image of the collections (--exclude), the first is {next(iter(wanted))}")
    if unknown:
        log.info(f"{path}: {len(unknown):,} of its {len(wanted):,} images are in no table, such as {min(unknown)}")
    return found.fillna("")


def _read_list(path, index):
    rows = read_list(path, known=index)
    names = rows[rows.columns[0]]
    for row in names.index[names == ""][:1]:
        raise InputError(f"{path}, row {row + 2}: no file name")
    patients = next((rows[name] for name in rows if name.lower() in ("patientid", "patient_id")), "")
    paths = [_find_file(index, name, "", f"{path}, row {row + 2}") for row, name in names.items()]
    return pd.DataFrame({"file_name": names, "patient_id": patients}).assign(path=np.array(paths, object))


def _find_tables(folder):
    found = []
    for place in list_folders(folder):
        found += [place / METADATA] if (place / METADATA).is_file() else []
        found += sorted(place.glob("Data_Entry_2017*.csv"))[:1]  # the second one is a correction of the same rows
        found += [place / name for name in ("train.csv", "valid.csv") if _is_chexpert(place / name)]
    return found


def _is_chexpert(path):
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return bool(re.match(rb'(\xef\xbb\xbf)?"?Path"?,', file.readline(4096)))


def _read(path, places):
    """Return one table in the shared columns, with the paths of its images."""
    raw = some_rows(path)
    if path.name in ("train.csv", "valid.csv"):
        table = from_chexpert(path, raw)
        batches = sorted(path.parent.parent.glob("*batch *"))
        paths = [_chexpert_file(path.parent, batches, name) for name in table["file_name"]]
    else:
        table = from_metadata(path, raw) if path.name == METADATA else from_nih(path, raw)
        index = _index_images(path.parent, places)
        named = zip(table["file_name"], table["folder"], strict=True)
        paths = [_find_file(index, name, folder, f"{path}, row {row}") for row, (name, folder) in enumerate(named, 2)]
    return table.assign(table=path, line=np.arange(len(table)) + 2, path=pd.Series(paths, table.index, dtype=object))


def _index_images(folder, places=()):
    """Return the paths of the images below a folder by stem, without images of other collections in `places`."""
    found, others = {}, {place.resolve() for place in places} - {folder.resolve()}
    for path in list_images(folder, skip=lambda path: path.resolve() in others):
        found.setdefault(strip_suffix(path.name), []).append(path)
    return found


def _find_file(index, name, folder, where):
    """Return the path of the image `name`, or None; of several, the one in the row's folder or with the exact name."""
    paths, folder = index.get(strip_suffix(name), []), folder or Path(name).parent.name or "images"
    for fits in (lambda path: path.parent.name == folder, lambda path: path.name == Path(name).name):
        if len(paths) > 1:
            paths = [path for path in paths if fits(path)] or paths
    if len(paths) > 1:
        raise InputError(f"{where}: {name} may be {paths[0]} or {paths[1]}")
    return paths[0] if paths else None


def _chexpert_file(folder, batches, name):
    """Return the file of a path like CheXpert-v1.0/train/patient00001/…, also in folders "… batch 2 (train 1)"."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    places = [folder.joinpath(*parts[1:]), folder.joinpath(*parts), *(b.joinpath(*parts[2:]) for b in batches)]
    return next((path for path in places if path.is_file()), None)


def _make_ids(table):
    """Return ids usable as file names: the stem or, if ambiguous, the path, then with the collection, then a number.

    CheXpert's ids are the part of the path that starts with the patient.
    """
    paths = table["file_name"].str.replace(r"[/\\]", "_", regex=True)
    inner = paths.str.extract(r"(patient.+)$")[0]
    names = table["file_name"].mask((table["collection"] == CHEXPERT) & inner.notna(), inner)
    ids = _make_safe(names.map(strip_suffix))
    ids = ids.mask(ids.duplicated(keep=False), _make_safe(paths.map(strip_suffix)))
    ids = ids.mask(ids.duplicated(keep=False), _make_safe(table["collection"] + "-" + ids))
    while ids.duplicated().any():
        ids = ids.mask(ids.duplicated(), ids + "-2")
    return ids


def _make_safe(texts):
    texts = texts.str.replace(r"[^A-Za-z0-9._-]+", "-", regex=True).str.replace(r"\.{2,}", ".", regex=True)
    return texts.str.lstrip("._-").replace("", "image")
