"""Predictions and labels as the tools read them: from the folders of runs, and from anyone's tables."""

import logging
import re

import numpy as np
import pandas as pd

from common.data.tables import plain_patients, some_rows
from common.errors import InputError
from common.paths import read_parquet
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.labels import parse_findings, stems
from solutions.chestxray14.published import describe_labels
from solutions.chestxray14.scoring import epoch_chosen

log = logging.getLogger(__name__)
CLASSES, TRUE = list(LABELS), "true "
SPLITS = {"oof": "train", "test": "test"}
_PLAIN = {re.sub("[^a-z]", "", label.lower()): label for label in LABELS}


def results(job, split):
    """Return what a run predicted: a table for each view and for its answer, see common.compare.Comparison.

    Columns: image_id, patient_id, fold, truth, the 14 LABELS and their truth 0/1 as "true <label>", of the images whose
    labels are known.
    """
    views = {f": {view}": f"{split}_{view}" for view in ("whole", "lungs") if job.config.views == "both"}
    return {end: _with_truth(job, f"{name}.parquet") for end, name in (views | {"": split}).items()}


def _with_truth(job, name):
    table = read_parquet(job.run.path(name))
    about = job.images.at(job.images.rows_of(table["image_id"])).reset_index(drop=True)
    table = table.join(about[CLASSES].add_prefix(TRUE)).assign(patient_id=about["patient_id"])
    table["truth"] = list(map(tuple, about[CLASSES].to_numpy()))
    return table[(about[CLASSES] >= 0).all(axis=1)]


def describe_run(job, split, name):
    """Return lines about a run for the reader of its scores."""
    said = [(job.run.step("prepare").get("about") or {}).get("said")]
    if split == "oof" and epoch_chosen(job.config):
        said.append(f"{name}: its epochs were chosen on these very images, which inflates its score")
    unlabelled = int((job.images.at(job.images.rows(SPLITS[split]))[CLASSES] < 0).any(axis=1).sum())
    said += [f"{unlabelled:,} predicted images have no labels and are left out"] * (unlabelled > 0)
    return [line for line in said if line]


def read_scores(path):
    """Return anyone's predictions, float64 columns by LABELS and image_id as index.

    The first column names the image, by Image Index or image_id in any spelling, with a suffix such as .png or without;
    the others bear the names of classes (Pleural_Thickening, prob_Pleural_Thickening, pleural thickening). Not all
    classes need a column, and any numbers that rank will do. Raises InputError naming file, row and column: another
    first column, no class, a class or an image twice, no finite number.
    """
    raw = some_rows(path)
    first, *others = raw.columns
    if re.sub("[^a-z]", "", first.lower()) not in ("imageindex", "imageid"):
        raise InputError(f"{path}, row 1: the first column must be Image Index or image_id, not {first!r}")
    named = {name: _PLAIN.get(re.sub("[^a-z]", "", re.sub("^prob(?=[^a-z])", "", name.lower()))) for name in others}
    columns = [name for name in others if named[name]]
    if not columns:
        raise InputError(f"{path}, row 1: no column bears the name of one of the 14 classes, such as {LABELS[0]}")
    scores = raw[columns].rename(columns=named).apply(pd.to_numeric, errors="coerce")
    for label in scores.columns[scores.columns.duplicated()][:1]:
        raise InputError(f"{path}, row 1: two columns are {label}")
    for row, column in np.argwhere(~np.isfinite(scores.to_numpy(np.float64)))[:1]:
        raise InputError(f"{path}, row {row + 2}, {columns[column]}: {raw[columns[column]][row]!r} is not a number")
    scores.index = _image_ids(raw[first].str.replace(r".*[/\\]", "", regex=True), path)
    unused = [name for name in others if not named[name]]
    if unused:
        log.info(f"ignored columns that are not classes: {', '.join(unused)}")
    return scores[[label for label in LABELS if label in scores]]


def read_truth(path):
    """Return the labels of a label table, "true <label>" 0/1 with image_id as index, and patient_id if it has patients.

    Only the columns Image Index and Finding Labels are needed. Raises InputError naming file and row: a column that is
    missing, an image twice, a text that is no label, a blank patient.
    """
    raw = some_rows(path)
    for name in ("Image Index", "Finding Labels"):
        if name not in raw:
            raise InputError(f"{path}, row 1: no column {name}")
    marks, problems = parse_findings(raw["Finding Labels"])
    for row in np.flatnonzero(problems != "")[:1]:
        raise InputError(f"{path}, row {row + 2}: {problems[row]}")
    truth = pd.DataFrame(marks, _image_ids(raw["Image Index"], path), CLASSES)
    log.info(f"{path.name}: {describe_labels(truth)}")
    truth = truth.add_prefix(TRUE)
    if "Patient ID" not in raw:
        return truth
    for row in np.flatnonzero(raw["Patient ID"] == "")[:1]:
        raise InputError(f"{path}, row {row + 2}: no Patient ID")
    return truth.assign(patient_id=plain_patients(raw["Patient ID"]).to_numpy())


def _image_ids(names, path):
    ids = pd.Index(stems(names), name="image_id")
    for row in np.flatnonzero(ids.duplicated())[:1]:
        raise InputError(f"{path}, row {row + 2}: image {ids[row]} is there twice")
    return ids
