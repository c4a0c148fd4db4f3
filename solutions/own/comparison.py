"""Metrics of the tools `table` and `score_predictions`: AUROC by class, AP of boxes by class, or Dice and IoU."""

import numpy as np
import pandas as pd

from common.compare import Comparison, means_of, measure_aurocs, measure_boxes
from common.data.tables import path_without_suffix, some_rows
from common.errors import InputError, check
from common.paths import read_parquet
from common.post.boxes import pack_boxes
from solutions.own.boxes import rule
from solutions.own.labels import read_labels, task_of

TRUE = "true: "  # prefix of the columns with the labels of a class


def results(job, split):
    """Return the out-of-fold images of a run with their labels, and with their scores or predictions."""
    is_masks, images, classes = job.config.task == "segmentation", job.images, job.images.about["classes"]
    table = read_parquet(job.run.path("oof_dice.parquet" if is_masks else "oof.parquet"))
    if job.config.task == "detection":
        about = images.at(images.rows(folds=job.config.folds)).reset_index(drop=True)
        found, truth = (pack_boxes(part, about["image_id"]) for part in (table, images.tables["boxes.parquet"]))
        table = about[["image_id", "fold"]].assign(found=found)
    else:
        about = images.at(table["row"]).reset_index(drop=True)
        truth = about[classes].map(str).agg(" ".join, axis=1)  # astype(str) would keep NaN
    labels = about[classes].add_prefix(TRUE)
    return {"": pd.concat([table.assign(patient_id=about["patient_id"], truth=truth), labels], axis=1)}


def measure(table, groups, n_resamples, seed):
    """Return Dice and IoU, or each class's AUROC or AP and the mean, with the same bootstrap as in score.json."""
    if "dice" in table:
        return means_of({"dice": "dice", "iou": "iou"})(table, groups, n_resamples, seed)
    names = [name.removeprefix(TRUE) for name in table if name.startswith(TRUE)]
    if "found" in table:
        return measure_boxes(table, names, rule(len(names)), groups, n_resamples, seed)
    y, probs = table[[TRUE + name for name in names]].to_numpy(float), table[names].to_numpy(float)
    return measure_aurocs(y, probs, names, groups, n_resamples, seed)


def read_probabilities(path):
    """Return the probabilities of each class by image, from a file in the format of submission.csv."""
    table = some_rows(path)
    values = table.iloc[:, 1:].apply(pd.to_numeric, errors="coerce")
    for row, column in np.argwhere(~((values >= 0) & (values <= 1)).to_numpy())[:1]:
        raise InputError(f"{path}, row {row + 2}: {table.iat[row, column + 1]!r} is not a probability")
    return values.set_index(_paths_of(path, table.iloc[:, 0]))


def read_truth(path):
    """Return the labels of each class by image, from a CSV for classification."""
    labels = read_labels(path, task_of(path))
    check(not len(labels.marks), f"{path}: not labels for classification")
    images = labels.images.set_index(_paths_of(path, labels.images["name"]))
    return images[labels.classes].add_prefix(TRUE).assign(patient_id=images["patient_id"])


def _paths_of(path, names):
    ids = names.map(path_without_suffix)
    check(ids.is_unique, f"{path}: two rows of the image {ids[ids.duplicated()].min()}")
    return ids


def join(predictions, labels):
    """Return the probabilities and labels of the classes that both tables have."""
    names = [name for name in predictions if TRUE + name in labels]
    check(names, "predictions and labels have no class in common")
    return predictions[names].join(labels[[TRUE + name for name in names]])


COMPARISON = Comparison(results, measure, read_probabilities, read_truth, "mean", "tune", join=join)
