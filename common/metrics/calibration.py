"""Operating points, with thresholds chosen on the other folds, and calibration of probabilities."""

import numpy as np

from common.data.folds import make_folds
from common.errors import check
from common.metrics.classification import best_threshold, check_scores, confusion_counts, recall, specificity


def youden(counts):
    """Return Youden's J, sensitivity + specificity − 1, in [-1, 1]; counts (..., 4) give float64 (...)."""
    return recall(counts) + specificity(counts) - 1


def choose_thresholds(y, score, metric=youden):
    """Return each class's threshold (y, score: (N, C)) with the highest `metric`, float64 (C,), NaN if undefined."""
    y, score = check_scores(y, score, (2,))
    score = score.astype(np.float64)  # a threshold between two float32 scores may need more precision
    mixed = y.any(axis=0) & ~y.all(axis=0)
    return np.array([best_threshold(y[:, c], score[:, c], metric)[0] if m else np.nan for c, m in enumerate(mixed)])


def nested_counts(y, score, folds):
    """Return tp, fp, fn, tn, int64 (C, 4), of each fold at the thresholds chosen on the others, float64 (K, C).

    y, score: (N, C); folds: (N,) of K ≥ 2 values. A fold is not counted for a class without a threshold.
    """
    y, score = check_scores(y, score, (2,))
    names, codes = np.unique(folds, return_inverse=True)
    counts, thresholds = np.zeros((y.shape[1], 4), np.int64), np.empty((len(names), y.shape[1]))
    for k in range(len(names)):
        here = codes == k
        thresholds[k] = choose_thresholds(y[~here], score[~here])
        known = ~np.isnan(thresholds[k])
        if known.any():
            counts[known] += confusion_counts(y[here][:, known], score[here][:, known], thresholds[k, known])
    return counts, thresholds


def nested_youden(y, score, folds, groups=None, seed=0):
    """Return Youden's thresholds from all images, and nested sensitivity and specificity, float64 (C,) each.

    y, score: (N, C); folds: (N,), a single one is split into halves that share no group. NaN where undefined.
    """
    if len(np.unique(folds)) < 2:
        folds = make_folds(np.asarray(y), 2, groups, seed)
    counts, _ = nested_counts(y, score, folds)
    return choose_thresholds(y, score), recall(counts, np.nan), specificity(counts, np.nan)


def reliability(y, prob, n_bins=15):
    """Return the reliability curve: mean probability, share of positives (float64) and images (int64) of B bins.

    The bins are of equal mass (Nguyen and O'Connor 2015), since most probabilities are small.
    """
    y, prob = _check_probabilities(y, prob)
    bins = np.searchsorted(np.sort(prob), prob) * n_bins // len(prob)
    images = np.bincount(bins)
    filled = images > 0
    sums = [np.bincount(bins, values)[filled] / images[filled] for values in (prob, y)]
    return *sums, images[filled]


def expected_calibration_error(y, prob, n_bins=15):
    """Return the mean gap between probability and share of positives over equal-mass bins, float64 (C,)."""
    y, prob = _check_probabilities(y, prob)
    curves = [reliability(labels, probs, n_bins) for labels, probs in zip(y.T, prob.T, strict=True)]
    return np.array([np.average(np.abs(mean - share), weights=images) for mean, share, images in curves])


def _check_probabilities(y, prob):
    y, prob = check_scores(y, prob, (1, 2), nan="allowed")
    check(((prob >= 0) & (prob <= 1)).all(), "probabilities must lie in [0, 1]")
    return y, prob.astype(np.float64)
