"""Operating points and calibration: thresholds chosen on other folds, and whether a probability means what it says."""

from dataclasses import dataclass

import numpy as np

from common.data.folds import make_folds
from common.errors import InputError
from common.metrics.classification import best_threshold, confusion_counts, sensitivity, specificity


@dataclass(frozen=True)
class OperatingPoints:
    """Thresholds, sensitivity and specificity, float64 (C,) each, NaN where a class does not show them.

    thresholds: chosen on all images, for others. nested_by: what the images were parted by for the other two.
    """

    thresholds: np.ndarray
    sensitivity: np.ndarray
    specificity: np.ndarray
    nested_by: str


def youden(counts):
    """Return sensitivity + specificity − 1, Youden's J, in [-1, 1]; counts (..., 4) give float64 (...)."""
    return sensitivity(counts) + specificity(counts) - 1


def choose_thresholds(y, score, metric=youden):
    """Return float64 (C,): the threshold of each class with the highest `metric`, NaN for labels of one kind.

    y: (N, C) bool or 0/1; score: (N, C) real; metric: as in `best_threshold`. Raises InputError for other input.
    """
    y, score = _checked(y, score)
    kinds = (y.any(axis=0)) & ~y.all(axis=0)
    return np.array([best_threshold(y[:, c], score[:, c], metric)[0] if k else np.nan for c, k in enumerate(kinds)])


def nested_counts(y, score, folds, metric=youden):
    """Return (int64 (C, 4) with tp, fp, fn, tn; thresholds float64 (K, C)): each fold judged by the others' thresholds.

    y, score, metric: as in `choose_thresholds`; folds: (N,) of K ≥ 2 different values, the thresholds' rows in rising
    order. Where the other folds have no threshold for a class, the fold is not counted for it. Sensitivity,
    specificity and the rest of `classification` take the counts.
    """
    y, score = _checked(y, score)
    names, codes = np.unique(folds, return_inverse=True)
    if len(codes) != len(y) or len(names) < 2:
        raise InputError(f"{len(names)} folds for {len(y)} images: nested thresholds need two folds or more")
    counts, thresholds = np.zeros((y.shape[1], 4), np.int64), np.empty((len(names), y.shape[1]))
    for k in range(len(names)):
        here = codes == k
        thresholds[k] = choose_thresholds(y[~here], score[~here], metric)
        known = ~np.isnan(thresholds[k])
        counts[known] += confusion_counts(y[here][:, known], score[here][:, known], thresholds[k, known])
    return counts, thresholds


def nested_youden(y, score, folds, groups=None, seed=0):
    """Return the OperatingPoints by Youden's J, sensitivity and specificity judged on images that did not choose them.

    y, score: (N, C) as in `choose_thresholds`; folds: (N,). With one fold alone the images are halved, whole groups
    together: (N,) such as patient ids, None for images that stand alone.
    """
    nested_by = "fold"
    if len(np.unique(folds)) < 2:
        folds, nested_by = make_folds(np.asarray(y), 2, groups, seed), "halves of the patients"
    counts, _ = nested_counts(y, score, folds)
    thresholds = choose_thresholds(y, score)
    return OperatingPoints(thresholds, sensitivity(counts, np.nan), specificity(counts, np.nan), nested_by)


def brier(y, prob):
    """Return the mean squared distance of probabilities (N, C) from labels (N, C): float64 (C,), 0 at best."""
    y, prob = _checked(y, prob, probabilities=True)
    return ((prob - y) ** 2).mean(axis=0)


def reliability(y, prob, n_bins=15):
    """Return (mean probability, share of positives, images), float64, float64 and int64 (B,): the reliability curve.

    y: (N,) bool or 0/1; prob: (N,) in [0, 1]. The bins are of equal mass (Nguyen and O'Connor 2015), since most
    findings are rare and most probabilities small; equal probabilities stay in one bin, so B may be under n_bins.
    Raises InputError for other input.
    """
    y, prob = _checked(np.asarray(y)[..., None], np.asarray(prob)[..., None], probabilities=True)
    if n_bins < 1:
        raise InputError(f"n_bins must be at least 1, not {n_bins}")
    y, prob = y[:, 0], prob[:, 0]
    bins = np.searchsorted(np.sort(prob), prob) * n_bins // len(prob)
    images = np.bincount(bins)
    filled = images > 0
    sums = [np.bincount(bins, values)[filled] / images[filled] for values in (prob, y)]
    return *sums, images[filled]


def expected_calibration_error(y, prob, n_bins=15):
    """Return float64 (C,): the mean distance of probability and share of positives over `reliability`'s bins, by mass.

    y, prob: (N, C). The expected calibration error of Naeini et al. 2015, with bins of equal mass.
    """
    y, prob = _checked(y, prob, probabilities=True)
    curves = [reliability(labels, probs, n_bins) for labels, probs in zip(y.T, prob.T, strict=True)]
    return np.array([np.average(np.abs(mean - share), weights=images) for mean, share, images in curves])


def _checked(y, score, probabilities=False):
    y, score = np.asarray(y), np.asarray(score)
    if y.shape != score.shape or y.ndim != 2 or not y.size:
        raise InputError(f"labels {y.shape} and scores {score.shape}: need one shape (N, C)")
    if y.dtype.kind not in "biuf" or score.dtype.kind not in "biuf" or ((y != 0) & (y != 1)).any():
        raise InputError("labels must be 0 or 1 and scores real numbers")
    wrong = ~((score >= 0) & (score <= 1)) if probabilities else np.isnan(score)
    for row, column in np.argwhere(wrong)[:1]:
        wanted = "a probability" if probabilities else "a score"
        raise InputError(f"row {row}, class {column}: {score[row, column]} is not {wanted}")
    return y != 0, score.astype(np.float64)
