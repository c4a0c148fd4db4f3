"""How sure a score is: bootstrap intervals that resample patients, not images.

Images of one patient are alike, so resampling images would make every interval too narrow. One seed draws the same
patients for every figure, which makes intervals of one table comparable. Intervals are percentiles of the resamples.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numba import njit

from common.data.folds import group_codes
from common.errors import InputError
from common.metrics.classification import auroc, mean_of_defined, ratio

CHUNK = 64  # resamples whose weights are held at once


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval; prints as `0.8347 [0.8280, 0.8412]`."""

    estimate: float
    low: float
    high: float

    def __format__(self, spec):
        spec = spec or ".4f"
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self):
        return format(self)


def bootstrap(values_or_fn, groups, n_resamples=1000, seed=0, level=0.95, skip_nan=False):
    """Return the Interval of a mean or of any statistic, resampling whole groups with replacement.

    values_or_fn: real (N,), one value an image, for their mean; or a function of row indices int64 (M,) that returns
    the statistic of those rows. groups: (N,) hashable values such as patient ids; None for images that stand alone
    (values only). skip_nan: leave NaN values out of the mean instead of refusing them; a function's NaN resamples
    are left out of the interval. level: in (0, 1). Raises InputError on lengths that differ or fewer than two groups.
    Source: cluster bootstrap, Davison and Hinkley 1997.
    """
    return _interval(*_resample(values_or_fn, groups, n_resamples, seed, skip_nan), level)


def paired_bootstrap(a, b, groups, n_resamples=1000, seed=0, level=0.95, skip_nan=False):
    """Return (Interval of a − b, two-sided p-value), both scored on the same resampled groups.

    a, b: both values (N,) or both functions, and the rest, as in `bootstrap`. The p-value is twice the smaller share
    of resamples on either side of no difference, the estimate itself counted as one more: at least 2/(n_resamples+1).
    """
    if callable(a) != callable(b):
        raise InputError("a and b must both be values or both be functions")
    if callable(a):
        difference = partial(_difference, a, b)
    else:
        a, b = np.asarray(a, float), np.asarray(b, float)
        if a.shape != b.shape:
            raise InputError(f"a {a.shape} and b {b.shape} must score the same images")
        difference = a - b
    estimate, resamples = _resample(difference, groups, n_resamples, seed, skip_nan)
    defined = resamples[~np.isnan(resamples)]
    tail = min((defined <= 0).sum(), (defined >= 0).sum())
    return _interval(estimate, resamples, level), min(1.0, 2 * (1 + int(tail)) / (len(defined) + 1))


def bootstrap_auroc(y, score, groups, n_resamples=1000, seed=0, level=0.95, skip_undefined=False):
    """Return (list of C Intervals, Interval of the mean) for the AUROC of each class and their mean.

    y: (N, C) bool or 0/1; score: (N, C) real; groups and the rest as in `bootstrap`. A class with labels of one kind
    or NaN scores raises InputError, or with `skip_undefined` gets NaN and is left out of the mean; resamples in which
    a class has labels of one kind are left out of its interval, and the class out of their mean.
    """
    y, score = np.asarray(y), np.asarray(score)
    if y.ndim != 2:
        raise InputError(f"labels {y.shape}: need (N, C)")
    estimates = auroc(y, score, np.nan if skip_undefined else None)
    codes, n_groups = _codes(groups, len(y))
    draws, orders = _draws(n_groups, n_resamples, seed), np.argsort(score, axis=0)
    resamples = np.empty((n_resamples, y.shape[1]))
    for start in range(0, n_resamples, CHUNK):
        rows = np.arange(start, min(start + CHUNK, n_resamples))
        weights = np.stack([np.bincount(next(draws), minlength=n_groups) for _ in rows])
        for c, order in enumerate(orders.T):
            ranked = score[order, c]
            starts = np.append(True, ranked[1:] != ranked[:-1])
            resamples[rows, c] = _weighted_auroc(y[order, c] != 0, starts, codes[order], weights)
    resamples[:, np.isnan(estimates)] = np.nan
    intervals = [_interval(*figures, level) for figures in zip(estimates, resamples.T, strict=True)]
    return intervals, _interval(mean_of_defined(estimates), mean_of_defined(resamples), level)


def _difference(a, b, rows):
    return a(rows) - b(rows)


def _resample(values_or_fn, groups, n_resamples, seed, skip_nan):
    """Return (estimate, float64 (n_resamples,))."""
    if callable(values_or_fn):
        if groups is None:
            raise InputError("groups must be given for a statistic of rows; pass row numbers if images stand alone")
        codes, n_groups = _codes(groups, len(groups))
        rows, sizes = np.argsort(codes, kind="stable"), np.bincount(codes)
        ends = np.cumsum(sizes)
        resamples = []
        for drawn in _draws(n_groups, n_resamples, seed):
            shift = ends[drawn] - np.cumsum(sizes[drawn])  # from a place in the resample to one in rows
            places = np.arange(sizes[drawn].sum()) + np.repeat(shift, sizes[drawn])
            resamples.append(float(values_or_fn(rows[places])))
        return float(values_or_fn(np.arange(len(codes)))), np.array(resamples)
    values = np.asarray(values_or_fn, float)
    if values.ndim != 1:
        raise InputError(f"values {values.shape}: need (N,)")
    codes, n_groups = _codes(groups, len(values))
    kept = ~np.isnan(values)
    if not (kept.all() or skip_nan):
        raise InputError(f"row {np.flatnonzero(~kept)[0]}: the value is NaN; skip_nan=True leaves such rows out")
    sums = np.bincount(codes[kept], values[kept], n_groups)
    counts = np.bincount(codes[kept], minlength=n_groups)
    resamples = np.array([(sums[d].sum(), counts[d].sum()) for d in _draws(n_groups, n_resamples, seed)])
    return ratio(sums.sum(), counts.sum(), np.nan), ratio(resamples[:, 0], resamples[:, 1], np.nan)


def _codes(groups, n):
    codes = group_codes(groups, n)
    n_groups = int(codes.max(initial=-1)) + 1
    if n_groups < 2:
        raise InputError(f"a bootstrap needs at least two groups, there are {n_groups}")
    return codes, n_groups


def _draws(n_groups, n_resamples, seed):
    if n_resamples < 1:
        raise InputError(f"n_resamples must be at least 1, not {n_resamples}")
    rng = np.random.default_rng(seed)
    return (rng.integers(n_groups, size=n_groups) for _ in range(n_resamples))


def _interval(estimate, resamples, level):
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, not {level}")
    resamples = resamples[~np.isnan(resamples)]
    if np.isnan(estimate) or not len(resamples):
        return Interval(float(estimate), np.nan, np.nan)
    low, high = np.quantile(resamples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))


@njit(cache=True, nogil=True)
def _weighted_auroc(positive, starts, group, weights):
    """AUROC of rows in rising order of score for each row of group weights; `starts` marks where the score rises."""
    areas = np.empty(len(weights))
    for b in range(len(weights)):
        area, positives, below, p, n = 0.0, 0.0, 0.0, 0.0, 0.0
        for i in range(len(positive)):
            if starts[i]:
                area += p * (below + 0.5 * n)
                below += n
                positives += p
                p, n = 0.0, 0.0
            weight = weights[b, group[i]]
            if positive[i]:
                p += weight
            else:
                n += weight
        area += p * (below + 0.5 * n)
        positives, below = positives + p, below + n
        areas[b] = area / (positives * below) if positives * below > 0 else np.nan
    return areas
