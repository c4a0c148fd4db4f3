"""Read the public collections' tables into one table with shared columns, and the list of images to predict."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from common.data.tables import named_images, parse_ages, plain_patients, read_list, some_rows
from common.errors import InputError, check, log
from common.paths import list_folders, list_images, strip_suffix
from solutions.covid19.config import COVID

METADATA, UNLABELLED = "metadata.csv", "unlabelled_test.csv"
ACTUALMED, FIGURE1 = "Actualmed-COVID-chestxray-dataset", "Figure1-COVID-chestxray-dataset"
NIH, CHEXPERT, NO_FINDING = "NIH ChestX-ray14", "CheXpert", "No Finding"
DEVICES = "Support Devices"
OLDEST = 120  # years; NIH's first table holds ages up to 414, which are typos
_FRONTAL = {"pa", "ap", "aps", "frontal"}
_LATERAL = {"l", "ll", "rl", "lat", "lateral"}
_OTHER = {"ct", "axial", "coronal", "sagittal", "oblique", "decubitus", "lordotic"}
_X_RAY = {"xray", "xr", "cr", "dx", "radiograph", "radiography"}
_COVID = {"covid-19", "covid19", "covid", "sars-cov-2", "2019-ncov"}
_NOT_SAID = {"", "todo", "tbd", "unknown", "inconclusive", "na", "n/a", "nan", "none", "?"}


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
    ids = make_safe(names.map(strip_suffix))
    ids = ids.mask(ids.duplicated(keep=False), make_safe(paths.map(strip_suffix)))
    ids = ids.mask(ids.duplicated(keep=False), make_safe(table["collection"] + "-" + ids))
    while ids.duplicated().any():
        ids = ids.mask(ids.duplicated(), ids + "-2")
    return ids


def make_safe(texts):
    """Return texts as parts of file names: letters, digits, dots, underscores and hyphens."""
    texts = texts.str.replace(r"[^A-Za-z0-9._-]+", "-", regex=True).str.replace(r"\.{2,}", ".", regex=True)
    return texts.str.lstrip("._-").replace("", "image")


# ---- tables of the collections --------------------------------------------------------------------------------------


def from_metadata(path, raw):
    """Return a metadata.csv of ieee8023, Actualmed or Figure1 in the shared columns, else raise InputError."""
    raw = raw.rename(columns=str.lower)
    twice = raw.columns.duplicated()
    if twice.any():
        raise InputError(f"{path}, row 1: the column {raw.columns[twice][0]} appears twice")
    kind = next((name for name in ("filename", "imagename") if name in raw), "patientid")
    _require_columns(path, raw, "finding", kind)
    absent = [name for name in ("patientid", "age", "view") if name not in raw]
    if absent:
        log.info(f"{path}: no column {', '.join(absent)}; unknown for all its images")
    own = {"filename": path.resolve().parent.name, "imagename": ACTUALMED, "patientid": FIGURE1}[kind]
    source = _get_column(raw, "source").str.rstrip("/").str.split("/").str[-1]
    source, patients = source.where(source != "", own), _get_column(raw, "patientid")
    if kind == "patientid":
        patients = patients.str.replace(r"(?<=\d)[a-z]$", "", regex=True)  # COVID-00003a and b are one patient's
    age, view = _get_column(raw, "age"), _get_column(raw, "view")
    modality, folder = _map_texts(_get_column(raw, "modality"), _classify_modality), _get_column(raw, "folder")
    return _to_shared(raw, kind, source, True, patients, raw["finding"], age, view, modality, folder)


def from_nih(path, raw):
    """Return NIH's Data_Entry_2017*.csv, to which "Support Devices" may have been added, in the shared columns."""
    _require_columns(path, raw, "Image Index", "Finding Labels", "Patient ID")
    age, view = _get_column(raw, "Patient Age"), _get_column(raw, "View Position")
    patients = plain_patients(raw["Patient ID"])
    return _to_shared(raw, "Image Index", NIH, False, patients, raw["Finding Labels"], age, view)


def from_chexpert(path, raw):
    """Return CheXpert's train.csv or valid.csv in the shared columns, positive findings joined by "|"."""
    _require_columns(path, raw, "Path", NO_FINDING)
    finding = pd.Series("", raw.index, dtype=object)
    others = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", DEVICES, NO_FINDING]
    for name in raw.columns.drop(others, errors="ignore"):
        finding = finding.mask(_equals(raw[name], 1), finding + "|" + name)
    finding = finding.str.removeprefix("|").mask(_equals(raw[NO_FINDING], 1), NO_FINDING)
    age, frontal, side = (_get_column(raw, name) for name in ("Age", "Frontal/Lateral", "AP/PA"))
    patients, view = raw["Path"].str.extract(r"(patient\d+)/")[0].fillna(""), (frontal + " " + side).str.strip()
    return _to_shared(raw, "Path", CHEXPERT, False, patients, finding, age, view)


def _equals(texts, *numbers):
    return pd.to_numeric(texts, errors="coerce").isin(numbers)


def label_of(finding):
    """Return 1 for a finding with COVID-19, 0 for one without, -1 for an unclear one ("todo", "COVID-19?")."""
    words = [re.sub(r"[\s_]+", "-", word.strip().casefold()) for word in re.split(r"[,/;|]", finding)]
    if any(word in _COVID for word in words):
        return 1
    hazy = any(word in _NOT_SAID or re.search("covid|corona|ncov|cov-2", word) for word in words)
    return -1 if hazy or finding.casefold() in _NOT_SAID else 0


def _to_shared(raw, name, collection, home, patients, finding, age, view, modality="X-ray", folder=""):
    years = parse_ages(age)
    years = years.mask(years > OLDEST)
    devices = _equals(_get_column(raw, DEVICES), 1, -1)
    names = {"collection": collection, "home": home, "file_name": raw[name], "folder": folder, "patient_id": patients}
    texts = {"age": years, "age_said": age.where(years.isna(), ""), "view": _map_texts(view, _classify_view)}
    texts |= {"view_said": view, "modality": modality, "devices": devices, "finding": finding}
    return pd.DataFrame({**names, **texts, "label": _map_texts(finding, label_of).astype("int64")})


def _require_columns(path, raw, *names):
    for name in names:
        check(name in raw, f"{path}, row 1: no column {name}: {','.join(raw.columns)[:200]}")


def _get_column(raw, name):
    return raw[name] if name in raw else pd.Series("", raw.index, dtype=object)


def _map_texts(texts, function):
    """Return `function` of each text, computed once per distinct text because CheXpert has 223,414 rows."""
    return texts.map({text: function(text) for text in texts.unique()})


def _classify_view(text):
    words = set(re.findall(r"[a-z]+", text.casefold()))
    kinds = [kind for kind, known in (("frontal", _FRONTAL), ("lateral", _LATERAL), ("other", _OTHER)) if words & known]
    return "unknown" if not kinds else kinds[0] if len(kinds) == 1 else "other"


def _classify_modality(text):
    plain = re.sub(r"[^a-z]", "", text.casefold())
    return "X-ray" if plain in _X_RAY else "CT" if plain == "ct" else text
