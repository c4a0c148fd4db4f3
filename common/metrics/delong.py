"""DeLong's variance of the AUROC, its intervals and paired test, for independent images (else: `statistics`)."""

import numpy as np
from scipy import special

from common.errors import InputError
from common.metrics.classification import check_scores

ROUNDING = 1e-16  # largest variance of a difference that is 0 up to rounding


def delong_covariance(y, scores):
    """Return (AUROC float64 (K,), covariance float64 (K, K)) of K scores of the same images, for one class.

    y: (N,) bool or 0/1; scores: (N, K) real. The covariance is NaN with fewer than two positives or negatives. Source:
    DeLong et al. 1988, by sorting as in Sun and Xu 2014.
    """
    y, scores = np.asarray(y), np.asarray(scores)
    for score in scores.T:
        check_scores(y, score)
    positive, negative = scores[y != 0], scores[y == 0]
    if not (len(positive) and len(negative)):
        raise InputError("all labels are equal")
    of_positive = np.stack([_below(p, n) for p, n in zip(positive.T, negative.T, strict=True)])
    of_negative = 1 - np.stack([_below(n, p) for p, n in zip(positive.T, negative.T, strict=True)])
    covariance = _covariance(of_positive) / len(positive) + _covariance(of_negative) / len(negative)
    return of_positive.mean(axis=1), covariance


def delong_intervals(y, score, level=0.95):
    """Return float64 (C, 3): AUROC, low and high of each class.

    y: (N, C) bool or 0/1; score: (N, C) real. Symmetric on the logit scale (Pepe 2003; Qin and Hotilovac 2008), and NaN
    for an area of 0 or 1 and with fewer than two positives or negatives.
    """
    z, found = special.ndtri((1 + level) / 2), np.full((np.shape(y)[-1], 3), np.nan)
    for c, ((area,), ((variance,),)) in _classes(y, score):
        found[c, 0] = area
        if 0 < area < 1:
            half = z * np.sqrt(variance) / (area * (1 - area))
            found[c, 1:] = special.expit(special.logit(area) + np.array([-half, half]))
    return found


def delong_test(y, a, b, level=0.95):
    """Return float64 (C, 4): AUROC(a) − AUROC(b) of each class, its low and high, and the two-sided p-value.

    y: (N, C) bool or 0/1; a, b: (N, C) real. Scores of equal ranks give 0 and p = 1; a difference with a variance of 0
    or NaN has no interval and p-value (NaN). Source: DeLong et al. 1988.
    """
    z, found = special.ndtri((1 + level) / 2), np.full((np.shape(y)[-1], 4), np.nan)
    for c, (areas, covariance) in _classes(y, a, b):
        difference, variance = areas[0] - areas[1], covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        found[c, 0] = difference
        if variance > ROUNDING:
            error = np.sqrt(variance)
            found[c, 1:] = difference - z * error, difference + z * error, 2 * special.ndtr(-abs(difference) / error)
        elif difference == 0 and variance <= ROUNDING:
            found[c, 1:] = 0, 0, 1
    return found


def _classes(y, *scores):
    """Yield (class, (AUROCs, covariance)) for each class with positives and negatives."""
    for c, labels in enumerate(np.asarray(y).T):
        if not (labels == labels[:1]).all():
            yield c, delong_covariance(labels, np.stack([np.asarray(score)[:, c] for score in scores], axis=1))


def _below(values, others):
    """Return the share of `others` below each of `values`, ties counted half."""
    others = np.sort(others)
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))


def _covariance(placements):
    """Return the covariance (K, K) of placements (K, M); NaN if M is 1."""
    if placements.shape[1] < 2:
        return np.full((len(placements), len(placements)), np.nan)
    return np.cov(placements).reshape(len(placements), -1)
