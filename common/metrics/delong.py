"""DeLong's variance of the AUROC: intervals, and the paired test of two scores of the same images.

It takes every image for independent. Images of one patient are not, so where patients have several images these
intervals are too narrow and these p-values too small; the bootstrap by patient (`statistics`) is the honest figure.
DeLong's is given beside it because papers give it.
"""

import numpy as np
from scipy import special

from common.errors import InputError
from common.metrics.statistics import Interval

ROUNDING = 1e-16  # a variance up to this is that of scores that rank alike


def delong_covariance(y, scores):
    """Return (AUROC float64 (K,), covariance float64 (K, K)) of K scores of the same images, for one class.

    y: (N,) bool or 0/1; scores: (N, K) real. Ties count half. The covariance is NaN with fewer than two images of
    either kind. Raises InputError on other shapes or values, NaN, or labels of one kind.
    Source: DeLong et al. 1988; the placements come from sorting, in O(N log N), as Sun and Xu 2014 do by midranks.
    """
    y, scores = np.asarray(y), np.asarray(scores)
    if y.ndim != 1 or scores.ndim != 2 or len(y) != len(scores):
        raise InputError(f"labels {y.shape} and scores {scores.shape}: need (N,) and (N, K)")
    if y.dtype.kind not in "biuf" or scores.dtype.kind not in "biuf" or ((y != 0) & (y != 1)).any():
        raise InputError("labels must be 0 or 1 and scores real numbers")
    if np.isnan(scores).any():
        raise InputError(f"row {np.argwhere(np.isnan(scores))[0, 0]}: the score is NaN")
    positive, negative = scores[y != 0], scores[y == 0]
    if not (len(positive) and len(negative)):
        raise InputError("labels of one kind only")
    of_positive = np.stack([_below(p, n) for p, n in zip(positive.T, negative.T, strict=True)])
    of_negative = 1 - np.stack([_below(n, p) for p, n in zip(positive.T, negative.T, strict=True)])
    covariance = _covariance(of_positive) / len(positive) + _covariance(of_negative) / len(negative)
    return of_positive.mean(axis=1), covariance


def delong_intervals(y, score, level=0.95, skip_undefined=False):
    """Return a list of C Intervals of the AUROC, one a class.

    y: (N, C) bool or 0/1; score: (N, C) real; level: in (0, 1). The interval is symmetric on the logit scale, which
    keeps it within [0, 1] and its coverage near `level` for areas near 1 (Pepe 2003; Qin and Hotilovac 2008); it is
    NaN for an area of exactly 0 or 1, whose variance says nothing. A class with labels of one kind or NaN scores
    raises InputError, or with `skip_undefined` is NaN.
    """
    y, (score,) = _classes(y, score, level=level)
    found = [_one(labels, values[:, None], skip_undefined, c) for c, (labels, values) in enumerate(zip(y.T, score.T))]  # noqa: B905
    intervals = []
    for (area,), ((variance,),) in found:
        with np.errstate(divide="ignore", invalid="ignore"):
            half = _quantile(level) * np.sqrt(variance) / (area * (1 - area))
        low, high = special.expit(special.logit(area) + np.array([-half, half]))
        intervals.append(Interval(float(area), float(low), float(high)) if 0 < area < 1 else _without(area))
    return intervals


def delong_test(y, a, b, level=0.95, skip_undefined=False):
    """Return a list of C pairs (Interval of AUROC(a) − AUROC(b), two-sided p-value), one a class.

    y: (N, C) bool or 0/1; a, b: (N, C) real, two scores of the same images; the rest as in `delong_intervals`.
    Scores that rank alike give 0 and 1; a difference without variance has neither interval nor p-value (NaN).
    """
    y, (a, b) = _classes(y, a, b, level=level)
    pairs = []
    for c, labels in enumerate(y.T):
        areas, covariance = _one(labels, np.column_stack([a[:, c], b[:, c]]), skip_undefined, c)
        difference, variance = float(areas[0] - areas[1]), covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        if variance > ROUNDING:
            error = np.sqrt(variance)
            low, high = difference + np.array([-1, 1]) * _quantile(level) * error
            p_value = float(2 * special.ndtr(-abs(difference) / error))
            pairs.append((Interval(difference, float(low), float(high)), p_value))
        elif difference == 0 and variance <= ROUNDING:
            pairs.append((Interval(0.0, 0.0, 0.0), 1.0))
        else:
            pairs.append((_without(difference), np.nan))
    return pairs


def _below(values, others):
    """The share of `others` under each of `values`, ties counted half."""
    others = np.sort(others)
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))


def _covariance(placements):
    """Covariance (K, K) of placements (K, M); NaN where there is only one."""
    if placements.shape[1] < 2:
        return np.full((len(placements), len(placements)), np.nan)
    return np.cov(placements).reshape(len(placements), -1)


def _one(y, scores, skip_undefined, c):
    try:
        return delong_covariance(y, scores)
    except InputError as error:
        if not skip_undefined:
            raise InputError(f"class {c}: {error}") from None
        return np.full(scores.shape[1], np.nan), np.full((scores.shape[1], scores.shape[1]), np.nan)


def _without(value):
    return Interval(float(value), np.nan, np.nan)


def _quantile(level):
    return special.ndtri((1 + level) / 2)


def _classes(y, *scores, level):
    y, scores = np.asarray(y), [np.asarray(score) for score in scores]
    for score in scores:
        if y.ndim != 2 or score.shape != y.shape:
            raise InputError(f"labels {y.shape} and scores {score.shape}: need one shape (N, C)")
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, not {level}")
    return y, scores
