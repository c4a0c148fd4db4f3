"""Operating points, with thresholds chosen on the other folds, and calibration of probabilities."""

import numpy as np
from scipy import optimize, special

from common.errors import check
from common.metrics.classification import best_threshold, check_scores, confusion_counts, recall, specificity


def youden(counts):
    """Return Youden's J, sensitivity + specificity − 1, in [-1, 1]; counts (..., 4) give float64 (...)."""
    return recall(counts) + specificity(counts) - 1


def choose_thresholds(y, score):
    """Return each class's threshold (y, score: (N, C)) with the highest Youden's J, float64 (C,), NaN if undefined."""
    y, score = check_scores(y, score, (2,))
    score = score.astype(np.float64)  # a threshold between two float32 scores may need more precision
    mixed = y.any(axis=0) & ~y.all(axis=0)
    return np.array([best_threshold(y[:, c], score[:, c], youden)[0] if m else np.nan for c, m in enumerate(mixed)])


def nested_counts(y, score, folds):
    """Return tp, fp, fn, tn, int64 (C, 4), with each fold at the thresholds chosen on the others, float64 (K, C).

    y, score: (N, C); folds: (N,) of K ≥ 2 values. Folds in which a class has no threshold are not counted for it.
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


def reliability(y, prob, n_bins=15):
    """Return the reliability curve over B bins: mean probability, share of positives (float64), images (int64).

    The bins are of equal mass (Nguyen and O'Connor 2015), since most probabilities are small.
    """
    y, prob = _check_probabilities(y, prob)
    bins = np.searchsorted(np.sort(prob), prob) * n_bins // len(prob)
    images = np.bincount(bins)
    filled = images > 0
    sums = [np.bincount(bins, values)[filled] / images[filled] for values in (prob, y)]
    return *sums, images[filled]


def expected_calibration_error(y, prob, n_bins=15):
    """Return the mean difference of probability and share of positives over equal-mass bins, float64 (C,)."""
    y, prob = _check_probabilities(y, prob)
    curves = [reliability(labels, probs, n_bins) for labels, probs in zip(y.T, prob.T, strict=True)]
    return np.array([np.average(np.abs(mean - share), weights=images) for mean, share, images in curves])


def fit_temperature(y, prob):
    """Return the temperature, a divisor of all logits, with the least cross-entropy (Guo et al. 2017)."""
    logits = _logits(_check_probabilities(y, prob)[1])
    entropy = lambda t: (np.logaddexp(0, logits / t) - y * logits / t).mean()  # noqa: E731
    return float(optimize.minimize_scalar(entropy, bounds=(0.05, 20), method="bounded").x)


def nested_temperature(y, prob, folds):
    """Return the probabilities (N, C), each fold scaled by the `fit_temperature` of the other folds."""
    scaled = np.empty(np.shape(prob))
    for fold in np.unique(folds):
        here = np.asarray(folds) == fold
        scaled[here] = special.expit(_logits(prob[here]) / fit_temperature(y[~here], prob[~here]))
    return scaled


def risk_by_coverage(y, prob, folds):
    """Return the error rate among the 1 to N most certain images, averaged over classes, float64 (N,).

    Certainty is the distance, in logits, from Youden's threshold chosen on the other folds (El-Yaniv and Wiener 2010).
    Classes that lack a threshold in any fold are left out; NaN if that leaves none.
    """
    y, prob = _check_probabilities(y, prob)
    cuts = nested_counts(y, prob, folds)[1][np.unique(folds, return_inverse=True)[1]]
    order = np.argsort(-np.abs(_logits(prob) - _logits(cuts)), axis=0, kind="stable")
    wrong = np.take_along_axis((prob >= cuts) != y, order, axis=0)[:, ~np.isnan(cuts).any(axis=0)]
    return wrong.cumsum(axis=0).sum(axis=1) / np.arange(1, len(y) + 1) / (wrong.shape[1] or np.nan)


def _logits(prob):
    return special.logit(np.clip(prob, 1e-7, 1 - 1e-7))


def _check_probabilities(y, prob):
    y, prob = check_scores(y, prob, (1, 2), nan="allowed")
    check(((prob >= 0) & (prob <= 1)).all(), "probabilities must lie in [0, 1]")
    return y, prob.astype(np.float64)
