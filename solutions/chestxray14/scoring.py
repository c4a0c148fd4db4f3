"""Figures of predictions: the AUROC of each class with its intervals, and of one prediction against another."""

import numpy as np
import pandas as pd
from scipy import stats

from common.errors import InputError
from common.metrics.classification import auroc, mean_of_defined
from common.metrics.statistics import Interval, as_interval, bootstrap_auroc, delong_intervals, delong_test
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.data import labels_of

MEAN = "mean"  # the last row of every table: over the classes that have an AUROC


def class_table(y, score, patients, labels, n_resamples=1000, seed=0):
    """Return a row for each of C labels and their mean.

    Columns: label, images, positive (images), positive_patients, auroc, low, high, delong_low, delong_high. y: 0/1 (N,
    C); score: real (N, C); patients: (N,) for the bootstrap that gives low and high, None for independent images, as
    DeLong's interval treats them. A label with images of one kind gets NaN and is left out of the mean. Raises
    InputError for other shapes and NaN, and for fewer than two patients.
    """
    ids = np.arange(len(y)) if patients is None else np.asarray(patients)
    if len(set(ids.tolist())) < 2:
        raise InputError(f"a score with intervals needs images of two patients, there is {len(set(ids.tolist()))}")
    found, mean = bootstrap_auroc(y, score, patients, n_resamples, seed, skip_undefined=True)
    figures = [(each.estimate, each.low, each.high) for each in (*found, mean)]
    table = pd.DataFrame(figures, columns=["auroc", "low", "high"])
    table.insert(0, "label", [*labels, MEAN])
    table.insert(1, "images", len(y))
    table.insert(2, "positive", pd.array([*map(int, np.sum(y, axis=0)), None], dtype="Int64"))
    people = [len(set(ids[column > 0].tolist())) for column in np.asarray(y).T]
    table.insert(3, "positive_patients", pd.array([*people, None], dtype="Int64"))
    table[["delong_low", "delong_high"]] = np.vstack([delong_intervals(y, score)[:, 1:], [np.nan, np.nan]])
    return table


def paired_tests(y, score, other, labels):
    """Return two-sided p-values of score's AUROC minus other's, by each of C labels and their mean.

    Columns: p_delong (a label's), p_delong_holm (corrected for the number of labels), p_t_test (the mean's: `t_test`
    over the labels). y, score, other: as in `class_table`.
    """
    table, p_delong = pd.DataFrame(index=[*labels, MEAN]), delong_test(y, score, other)[:, 3]
    table["p_delong"], table["p_delong_holm"] = np.append(p_delong, np.nan), np.append(holm(p_delong), np.nan)
    table["p_t_test"] = [np.nan] * len(labels) + [t_test(auroc(y, score, np.nan) - auroc(y, other, np.nan))]
    return table


def t_test(differences):
    """Return the two-sided p-value of the paired t-test over per-class differences (C,), our reading of SDFN's test."""
    known = differences[~np.isnan(differences)]
    if len(known) < 2:
        return np.nan
    return float(stats.ttest_1samp(known, 0.0).pvalue) if known.any() else 1.0


def holm(p_values):
    """Return p-values (C,) corrected for their number, NaN ones not counted, by Holm's step-down rule (Holm 1979)."""
    order = np.argsort(p_values)  # NaN last
    ranks, n = np.arange(len(p_values)), int((~np.isnan(p_values)).sum())
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.maximum(n - ranks, 1)))
    return corrected


def score_part(images, table, seed, n_resamples=1000):
    """Return the `class_table` and the summary of predictions of images with labels; None for under two patients."""
    rows = images.rows_of(table["image_id"])
    patients = images.at(rows)["patient_id"].to_numpy()
    if len(set(patients)) < 2:
        return None
    classes = class_table(labels_of(images, rows), table[list(LABELS)].to_numpy(), patients, LABELS, n_resamples, seed)
    mean = Interval(*classes.iloc[-1][["auroc", "low", "high"]])
    n = {"images": len(rows), "patients": len(set(patients)), "classes": len(LABELS) - len(undefined(classes))}
    return classes[:-1], {"mean": as_interval(mean), **n}


def by_fold(y, score, folds):
    """Return mean AUROC, classes and folds of scores that are ranked within folds, as networks' scales differ."""
    areas = np.stack([auroc(y[folds == k], score[folds == k], np.nan) for k in np.unique(folds)])
    labels = mean_of_defined(areas.T)
    return {"mean": float(mean_of_defined(labels)), "classes": int((~np.isnan(labels)).sum()), "folds": len(areas)}


def epoch_chosen(config):
    """Return whether a network of this Config kept the weights that did best on the fold that it holds out."""
    return any(training.chooses_epoch for training in [*config.branches, *[config.fusion] * config.is_fused])


def undefined(table):
    """Return the labels of a `class_table` that have no AUROC."""
    return table.loc[table["auroc"].isna() & (table["label"] != MEAN), "label"].tolist()
