"""Convert the tables of the public collections to shared columns."""

import re

import pandas as pd

from common.data.tables import parse_ages, plain_patients
from common.errors import InputError, check, log

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
    for name in raw.columns.drop(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", DEVICES], errors="ignore"):
        if name != NO_FINDING:
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
