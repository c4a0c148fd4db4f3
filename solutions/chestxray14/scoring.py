"""Figures of predictions: the AUROC of each class with its intervals, and of one prediction against another."""

import numpy as np
import pandas as pd
from scipy import stats

from common.errors import InputError
from common.metrics.delong import delong_intervals, delong_test
from common.metrics.statistics import bootstrap_auroc, paired_bootstrap_auroc

MEAN = "mean"  # the last row of every table: over the classes that have an AUROC


def class_table(y, score, patients, labels, n_resamples=1000, seed=0):
    """Return a row for each of C labels and their mean: label, images, positive, auroc, low, high, delong_low, _high.

    y: 0/1 (N, C); score: real (N, C); patients: (N,) for the bootstrap that gives low and high, None for images that
    stand alone. DeLong's interval takes images for independent; the mean has none. A label with images of one kind
    gets NaN and is left out of the mean. Raises InputError for other shapes and NaN, and for fewer than two patients.
    """
    people = len(y) if patients is None else len(set(patients))
    if people < 2:
        raise InputError(f"a score with intervals needs images of two patients, there is {people}")
    found, mean = bootstrap_auroc(y, score, patients, n_resamples, seed, skip_undefined=True)
    figures = [(each.estimate, each.low, each.high) for each in (*found, mean)]
    table = pd.DataFrame(figures, columns=["auroc", "low", "high"])
    table.insert(0, "label", [*labels, MEAN])
    table.insert(1, "images", len(y))
    table.insert(2, "positive", pd.array([*map(int, np.sum(y, axis=0)), None], dtype="Int64"))
    table[["delong_low", "delong_high"]] = np.vstack([delong_intervals(y, score)[:, 1:], [np.nan, np.nan]])
    return table


def comparison(y, score, other, patients, labels, n_resamples=1000, seed=0):
    """Return a row for each of C labels and their mean: score's AUROC minus other's, and how sure that is.

    Columns: label, difference, difference_low, difference_high and p_bootstrap (patients resampled, both on the same
    draws), p_delong (a label's), p_t_test (the mean's: the papers' paired t-test over the labels). Two-sided p-values,
    not corrected for the number of labels. y, score, other, patients and errors: as in `class_table`.
    """
    pairs, mean = paired_bootstrap_auroc(y, score, other, patients, n_resamples, seed, skip_undefined=True)
    rows = [(each.estimate, each.low, each.high, p_value) for each, p_value in (*pairs, mean)]
    table = pd.DataFrame(rows, columns=["difference", "difference_low", "difference_high", "p_bootstrap"])
    table.insert(0, "label", [*labels, MEAN])
    table["p_delong"] = np.append(delong_test(y, score, other)[:, 3], np.nan)
    table["p_t_test"] = [np.nan] * len(labels) + [t_test(table["difference"].to_numpy()[:-1])]
    return table


def t_test(differences):
    """Return the two-sided p-value of the paired t-test over per-class differences (C,), NaN ones left out.

    NaN with fewer than two of them; 1 where all are 0. SDFN compares its branches so. It asks whether the classes agree
    on the direction, not whether other patients would.
    """
    known = differences[~np.isnan(differences)]
    if len(known) < 2:
        return np.nan
    return float(stats.ttest_1samp(known, 0.0).pvalue) if known.any() else 1.0


def undefined(table):
    """Labels of a `class_table` that have no AUROC."""
    return table.loc[table["auroc"].isna() & (table["label"] != MEAN), "label"].tolist()
