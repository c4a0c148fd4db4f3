"""Predictions and labels as the tools read them: from the folders of runs, and from anyone's tables."""

import re

import numpy as np
import pandas as pd

from common.config import file_hash, from_dict
from common.data.tables import plain_patients, some_rows
from common.errors import InputError
from common.paths import read_json, read_parquet
from solutions.chestxray14.config import LABELS, Config
from solutions.chestxray14.labels import parse_findings, stems
from solutions.chestxray14.scoring import epoch_chosen

CLASSES = list(LABELS)
_PLAIN = {re.sub("[^a-z]", "", label.lower()): label for label in LABELS}


def read_runs(runs, split):
    """Read what runs predicted; returns (scores, images, notes, folds).

    scores: row name → float64 (N, 14), a run of two views giving `name: whole`, `name: lungs` and `name`; images: the
    labelled images, image_id as index, patient_id and the 14 LABELS, 0/1; notes: lines for the reader; folds: row name
    → int (N,), -1 for test. split: test or oof. Raises InputError naming the run, or file, and an image: no run of this
    solution, no predictions, other images or labels than the first run's.
    """
    scores, images, notes, folds = {}, None, [], {}
    for run in runs:
        if not run.is_dir():
            raise InputError(f"{run}: not the folder of a run")
        manifest, config = read_json(run / "manifest.json"), read_json(run / "config.json")
        steps = manifest.get("steps", {}) if isinstance(manifest, dict) else {}
        if not isinstance(config, dict) or config.pop("solution", None) != "chestxray14":
            raise InputError(f"{run}: the run of another solution")
        if "predict" not in steps:
            raise InputError(f"{run}: no predictions of its present networks; run its verb `predict`")
        mine, unlabelled = _labelled(run, split)
        if images is None:
            images = mine
            notes += [f"{unlabelled:,} predicted images have no labels and are left out"] * (unlabelled > 0)
            notes.append((steps["prepare"].get("about") or {}).get("said", ""))
        else:
            _check_same(run, runs[0], mine, images)
        if steps["prepare"].get("synthetic"):
            notes.append("Synthetic radiographs: the scores only show that the pipeline works")
        name = run.resolve().name if run.resolve().name not in scores else str(run)
        if name in scores:
            raise InputError(f"{run}: named twice")
        config.pop("preset", None)
        config = from_dict(Config, config, str(run / "config.json"))
        if split == "oof" and epoch_chosen(config):
            notes.append(f"{name}: its epochs were chosen on these very images, which inflates its score")
        for view in ("whole", "lungs") if config.views == "both" else ():
            row = f"{name}: {view}"
            scores[row], folds[row] = _probabilities(run / f"{split}_{view}.parquet", images)
        scores[name], folds[name] = _probabilities(run / f"{split}.parquet", images)
    return scores, images, [note for note in dict.fromkeys(notes) if note], folds


def _labelled(run, split):
    """Return patients and labels of the predicted images that have labels, and the number of the others."""
    predicted = read_parquet(run / f"{split}.parquet")["image_id"]
    table = read_parquet(run / "images.parquet").set_index("image_id").loc[predicted, ["patient_id", *CLASSES]]
    known = (table[CLASSES] >= 0).all(axis=1)
    if not known.any():
        raise InputError(f"{run}: its {split} images have no labels (--split oof: the training images, out of fold)")
    return table[known], int((~known).sum())


def _check_same(run, first, mine, images):
    for incomplete, wanted, found in ((run, images, mine), (first, mine, images)):
        missing = wanted.index.difference(found.index, sort=False)
        if len(missing):
            raise InputError(
                f"{incomplete}: no labelled prediction of {missing[0]} and {len(missing) - 1:,} other images; "
                f"{first} and {run} must have predicted the same images"
            )
    differ = (mine.loc[images.index, CLASSES].to_numpy() != images[CLASSES].to_numpy()).any(axis=1)
    if differ.any():
        raise InputError(f"{run}: other labels than {first} has, such as for image {images.index[np.argmax(differ)]}")


def _probabilities(file, images):
    table = read_parquet(file).set_index("image_id").reindex(images.index)
    found = table[CLASSES].to_numpy(np.float64)
    for row in np.flatnonzero(np.isnan(found).any(axis=1))[:1]:
        raise InputError(f"{file}: no prediction of image {images.index[row]}")
    return found, table["fold"].to_numpy(np.int64)


def read_scores(path):
    """Return anyone's predictions, float64 columns by LABELS and image_id as index, and the columns that are no class.

    The first column names the image, by Image Index or image_id in any spelling, with a suffix such as .png or without;
    not all classes need a column. Raises InputError naming file, row and column: another first column, no class, a
    class or an image twice, no finite number.
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
    return scores[[label for label in LABELS if label in scores]], [name for name in others if not named[name]]


def read_truth(path):
    """Return the labels of a label table, LABELS 0/1 with image_id as index, and its patients, a Series or None.

    Only the columns Image Index and Finding Labels are needed; without Patient ID there are no patients. Raises
    InputError naming file and row: a column that is missing, an image twice, a text that is no label, a blank patient.
    """
    raw = some_rows(path)
    for name in ("Image Index", "Finding Labels"):
        if name not in raw:
            raise InputError(f"{path}, row 1: no column {name}")
    marks, problems = parse_findings(raw["Finding Labels"])
    for row in np.flatnonzero(problems != "")[:1]:
        raise InputError(f"{path}, row {row + 2}: {problems[row]}")
    truth = pd.DataFrame(marks, _image_ids(raw["Image Index"], path), CLASSES)
    if "Patient ID" not in raw:
        return truth, None
    for row in np.flatnonzero(raw["Patient ID"] == "")[:1]:
        raise InputError(f"{path}, row {row + 2}: no Patient ID")
    return truth, plain_patients(raw["Patient ID"]).set_axis(truth.index)


def describe_file(path):
    """Return a file's name and hash."""
    return f"{path.name}, sha256 {file_hash(path)[:16]}"


def _image_ids(names, path):
    ids = pd.Index(stems(names), name="image_id")
    for row in np.flatnonzero(ids.duplicated())[:1]:
        raise InputError(f"{path}, row {row + 2}: image {ids[row]} is there twice")
    return ids
