"""The collections that a user has, known by their tables, as one table: a row for each row of theirs."""

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

log = logging.getLogger(__name__)
METADATA, UNLABELLED = "metadata.csv", "unlabelled_test.csv"
ACTUALMED, FIGURE1 = "Actualmed-COVID-chestxray-dataset", "Figure1-COVID-chestxray-dataset"
NIH, CHEXPERT, NO_FINDING = "NIH ChestX-ray14", "CheXpert", "No Finding"
OLDEST = 120  # years; NIH's first table holds ages up to 414, which are typing errors
COLUMNS = ["collection", "home", "table", "line", "file_name", "path", "image_id", "patient_id", "age", "age_said",
           "sex", "view", "view_said", "modality", "devices", "finding", "label"]  # fmt: skip
_FRONTAL = {"pa", "ap", "aps", "frontal"}
_LATERAL = {"l", "ll", "rl", "lat", "lateral"}
_OTHER = {"ct", "axial", "coronal", "sagittal", "oblique", "decubitus", "lordotic"}
_X_RAY = {"xray", "xr", "cr", "dx", "radiograph", "radiography"}
_NOT_SAID = {"", "todo", "tbd", "unknown", "inconclusive", "na", "nan", "none", "?"}
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "D": 1 / 365.25}


def read_collections(folders):
    """Read the collections in folders: a frame with COLUMNS, one row for each row of their tables, in order.

    folders: each is searched, and its direct sub-folders are, for metadata.csv (ieee8023, Actualmed, Figure1),
    Data_Entry_2017*.csv (NIH) and train.csv or valid.csv with a column Path (CheXpert). collection: str; of
    ieee8023's the column `source`, else the folder. home: False for NIH and CheXpert, which hold no COVID-19. table:
    Path; line: the row in it, 1 being the header. file_name: as given; path: None without a file. image_id: unique.
    patient_id: "<collection> <number>", one of its own where the table gives none. age: float years, NaN where unknown;
    age_said: a text that is no age. view: frontal, lateral, other or unknown; view_said as given. modality: X-ray, CT,
    another as given, or "". devices: bool. label: 1 COVID-19, 0 something else or nothing, -1 not known. Raises
    InputError naming file and row: no table, an unreadable or empty one, one without a column, two files of one name.
    """
    found, tables = [], {}
    for folder in map(Path, folders):
        inside = _tables(folder)
        if not inside:
            raise InputError(f"{folder}: no collection in it or in a folder of it (no {METADATA}, no "
                             "Data_Entry_2017*.csv, no train.csv or valid.csv of CheXpert)")  # fmt: skip
        tables |= {path.resolve(): path for path in inside}
    for path in tables.values():
        found.append(_read(path, [other.parent for other in tables.values()]))
    table = pd.concat(found, ignore_index=True)
    table["image_id"] = _unique(table)
    table["patient_id"] = _patients(table)
    for name, rows in table.groupby("collection", sort=False):
        log.info(f"{name}: {len(rows):,} rows, {(rows['label'] == 1).sum():,} of them {COVID}; the finding of "
                 f"{(rows['label'] == -1).sum():,} is not known, {rows['path'].isna().sum():,} have no file")  # fmt: skip
    return table[COLUMNS]


def read_test(folders, test, taken=()):
    """Images to predict: image_id, file_name, path (None without a file), patient_id, collection ("" unknown).

    test: --test, a folder or a CSV whose first column names the images; None takes the unlabelled_test.csv beside each
    metadata.csv in `folders`, an empty frame where there is none. A column patientid gives the patients. taken: ids in
    use; a test image of such an id gets "test-" in front. Raises InputError: an unreadable list, an image named twice.
    """
    tables = [path for folder in map(Path, folders) for path in _tables(folder)]
    if test is not None and Path(test).is_dir():
        files = named_images(Path(test))[1]
        found = [pd.DataFrame({"file_name": [path.name for path in files.values()], "path": list(files.values())},
                              dtype=object).assign(patient_id="", collection="", line=2)]  # fmt: skip
    else:
        lists = [Path(test)] if test is not None else [path.with_name(UNLABELLED) for path in tables]
        index = {}
        for folder in dict.fromkeys(path.parent for path in tables):
            for stem, paths in _index(folder, [path.parent for path in tables]).items():
                index.setdefault(stem, []).extend(paths)
        found = [_read_list(path, index) for path in dict.fromkeys(lists) if test is not None or path.is_file()]
    columns = ["image_id", "file_name", "path", "patient_id", "collection"]
    if not found:
        return pd.DataFrame(columns=columns, dtype=object)
    table = pd.concat(found, ignore_index=True)
    twice = table["file_name"].duplicated()
    if twice.any():
        raise InputError(f"{table.loc[twice.idxmax(), 'file_name']}: twice among the images to predict")
    table["image_id"] = _unique(table)
    table["image_id"] = table["image_id"].mask(table["image_id"].isin(set(taken)), "test-" + table["image_id"])
    table["patient_id"] = table["patient_id"].mask(table["patient_id"] == "", "image " + table["image_id"])
    return table[columns]


def _read_list(path, index):
    rows = some_rows(path)
    names = rows[rows.columns[0]]
    for row in np.flatnonzero(names == "")[:1]:
        raise InputError(f"{path}, row {row + 2}: no file name")
    patients = rows["patientid"] if "patientid" in rows else pd.Series("", rows.index)
    paths = [_file(index, name, "", f"{path}, row {row + 2}") for row, name in names.items()]
    return pd.DataFrame({"file_name": names, "path": pd.Series(paths, dtype=object), "patient_id": patients,
                         "collection": "", "line": names.index + 2})  # fmt: skip


def _tables(folder):
    """Tables of known collections in a folder and its direct sub-folders."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = []
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        if (place / METADATA).is_file():
            found.append(place / METADATA)
        found += sorted(place.glob("Data_Entry_2017*.csv"))[:1]
        found += [place / name for name in ("train.csv", "valid.csv") if _is_chexpert(place / name)]
    return found


def _is_chexpert(path):
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.readline(4096).lstrip(b"\xef\xbb\xbf").startswith(b"Path,")


def _read(path, places):
    """One table as COLUMNS has it, but for image_id and patient_id, which need all of them."""
    raw = some_rows(path)
    if path.name == METADATA:
        table = _metadata(path, raw, _index(path.parent, places))
    elif path.name.startswith("Data_Entry"):
        table = _nih(path, raw, _index(path.parent, places))
    else:
        table = _chexpert(path, raw)
    table["age"], table["age_said"] = _ages(table.pop("years"))
    table["view"] = _each(table["view_said"], _view)
    return table.assign(table=path, line=np.arange(len(table)) + 2)


def _metadata(path, raw, index):
    raw = raw.rename(columns=lambda name: name.strip().lower())
    twice = raw.columns.duplicated()
    if twice.any():
        raise InputError(f"{path}, row 1: a column name is there twice: {raw.columns[twice][0]}")
    _need(path, raw, "finding")
    kind = next((name for name in ("filename", "imagename") if name in raw), None)
    if kind is None:
        _need(path, raw, "patientid")
    names = raw[kind or "patientid"]
    folders, patients = _column(raw, "folder"), _column(raw, "patientid")
    source = _column(raw, "source").str.rstrip("/").str.split("/").str[-1]
    own = {"filename": path.resolve().parent.name, "imagename": ACTUALMED, None: FIGURE1}[kind]
    if kind is None:
        patients = patients.str.replace(r"(?<=\d)[a-z]$", "", regex=True)  # COVID-00003a and b are one patient's
    view, modality = _column(raw, "view"), _each(_column(raw, "modality"), _modality)
    paths = [_file(index, name, folder, f"{path}, row {row + 2}")
             for row, (name, folder) in enumerate(zip(names, folders, strict=True))]  # fmt: skip
    return pd.DataFrame({
        "collection": source.where(source != "", own), "home": True, "file_name": names,
        "path": pd.Series(paths, dtype=object), "patient_id": patients, "years": _column(raw, "age"),
        "sex": _each(_column(raw, "sex"), _sex), "view_said": view, "modality": modality, "devices": False,
        "finding": raw["finding"], "label": _each(raw["finding"], label_of).astype("int64"),
    })  # fmt: skip


def _nih(path, raw, index):
    _need(path, raw, "Image Index", "Finding Labels", "Patient ID")
    names, findings = raw["Image Index"], raw["Finding Labels"]
    paths = [_file(index, name, "", f"{path}, row {row + 2}") for row, name in names.items()]
    return pd.DataFrame({
        "collection": NIH, "home": False, "file_name": names, "path": pd.Series(paths, dtype=object),
        "patient_id": raw["Patient ID"].str.replace(r"^0+(?=\d+$)", "", regex=True),
        "years": _column(raw, "Patient Age"),
        "sex": _each(_column(raw, "Patient Gender" if "Patient Gender" in raw else "Patient Sex"), _sex),
        "view_said": _column(raw, "View Position"), "modality": "X-ray", "devices": False, "finding": findings,
        "label": _each(findings, label_of).astype("int64"),
    })  # fmt: skip


def _chexpert(path, raw):
    _need(path, raw, "Path", NO_FINDING)
    parts = raw["Path"].str.extract(r"(patient\d+)/(study\d+)/(.+)$")
    marks = raw.drop(columns=["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", NO_FINDING, "Support Devices"],
                     errors="ignore").apply(pd.to_numeric, errors="coerce")  # fmt: skip
    positive = (marks == 1).to_numpy()
    combined, back = np.unique(positive, axis=0, return_inverse=True)
    texts = np.array(["|".join(marks.columns[row]) for row in combined], object)[np.ravel(back)]
    none = pd.to_numeric(raw[NO_FINDING], errors="coerce") == 1
    finding = pd.Series(np.where(none, NO_FINDING, texts), dtype=object)
    views = _column(raw, "Frontal/Lateral") + " " + _column(raw, "AP/PA")
    devices = pd.to_numeric(_column(raw, "Support Devices"), errors="coerce")
    return pd.DataFrame({
        "collection": CHEXPERT, "home": False, "file_name": raw["Path"],
        "path": pd.Series([_below(path.parent, name) for name in raw["Path"]], dtype=object),
        "patient_id": parts[0].fillna(""), "years": _column(raw, "Age"), "sex": _each(_column(raw, "Sex"), _sex),
        "view_said": views.str.strip(), "modality": "X-ray", "devices": devices.isin([1, -1]), "finding": finding,
        "label": _each(finding, label_of).astype("int64"),
    })  # fmt: skip


def _need(path, raw, *names):
    for name in names:
        if name not in raw:
            raise InputError(f"{path}, row 1: no column {name}: {','.join(raw.columns)[:200]}")


def _column(raw, name):
    return raw[name] if name in raw else pd.Series("", raw.index, dtype=object)


def _each(texts, of):
    """`of` each text, worked out once for each that differs: tables have 200,000 rows."""
    return texts.map({text: of(text) for text in texts.unique()})


def label_of(finding):
    """1 for a finding with COVID-19, 0 for a known one without, -1 where it is not known ("todo", "COVID-19?").

    Findings are lists as in "COVID-19, ARDS" or paths as in "Pneumonia/Viral/COVID-19".
    """
    words = [re.sub(r"[\s_]+", "-", word.strip().casefold()) for word in re.split(r"[,/;|]", finding)]
    if any(word in ("covid-19", "covid19") for word in words):
        return 1
    return -1 if any(word in _NOT_SAID or "covid" in word for word in words) else 0


def _view(text):
    words = set(re.findall(r"[a-z]+", text.casefold()))
    kinds = [kind for kind, known in (("frontal", _FRONTAL), ("lateral", _LATERAL), ("other", _OTHER)) if words & known]
    return "unknown" if not kinds else kinds[0] if len(kinds) == 1 else "other"


def _modality(text):
    plain = re.sub(r"[^a-z]", "", text.casefold())
    return "X-ray" if plain in _X_RAY else "CT" if plain == "ct" else text


def _sex(text):
    return {"m": "M", "male": "M", "f": "F", "female": "F"}.get(text.casefold(), "")


def _ages(texts):
    """Ages in years, NaN where unknown, and the texts that are none: "60s", or 414."""
    parts = texts.str.upper().str.extract(r"^(\d+(?:\.\d*)?)([YMD]?)$")
    years = parts[0].astype(float) * parts[1].map(_YEARS).astype(float)
    years = years.mask(years > OLDEST)
    return years, texts.where(years.isna(), "")


def _index(folder, places):
    """Stem → paths of the images below a folder, without those of other collections in `places` below it."""
    found, others = {}, {place.resolve() for place in places} - {folder.resolve()}
    for parent, names, files in os.walk(folder, followlinks=True):
        names[:] = sorted(name for name in names if (Path(parent) / name).resolve() not in others)
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGES and not name.startswith("."):
                found.setdefault(stem, []).append(os.path.join(parent, name))
    return found


def _file(index, name, folder, where):
    """Path of the image a row names, None where there is none; of several the one in `folder`, of the very name."""
    paths = index.get(_stem(name), [])
    for narrower in (lambda path: path.parent.name == (folder or "images"), lambda path: path.name == Path(name).name):
        if len(paths) > 1:
            paths = [path for path in paths if narrower(Path(path))] or paths
    if len(paths) > 1:
        raise InputError(f"{where}: {name} is {paths[0]} or {paths[1]}")
    return Path(paths[0]) if paths else None


def _below(folder, name):
    """CheXpert's file of a path such as CheXpert-v1.0-small/train/…: beside the table, or in the folder so named."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    for start in range(min(2, len(parts))):
        path = folder.joinpath(*parts[start:])
        if path.is_file():
            return path
    return None


def _stem(name):
    stem, suffix = os.path.splitext(name.replace("\\", "/").rsplit("/", 1)[-1])
    return stem if suffix.lower() in IMAGES else stem + suffix


def _unique(table):
    """Ids that can be file names: the stem, with the collection in front where it is not unique, then the row."""
    chexpert = table["collection"] == CHEXPERT
    names = table["file_name"].where(~chexpert, table["file_name"].str.extract(r"(patient.+)$")[0].fillna("")
                                     .str.replace("/", "_"))  # fmt: skip
    ids = _safe(names.map(_stem).replace("", "image"))
    ids = ids.mask(ids.duplicated(keep=False), _safe(table["collection"]) + "-" + ids)
    return ids.mask(ids.duplicated(keep=False), ids + "-row" + table["line"].astype(str))


def _safe(texts):
    return texts.str.replace(r"[^A-Za-z0-9._-]+", "-", regex=True).str.replace("..", ".", regex=False).str.lstrip("._-")


def _patients(table):
    alone = "image " + table["image_id"]
    return table["collection"] + " " + table["patient_id"].mask(table["patient_id"] == "", alone)
