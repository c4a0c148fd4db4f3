"""Bootstrap intervals and tests of metrics that resample patients, since images of one patient are similar.

A seed draws the same patients for every metric. For means of values, patients are drawn with replacement. An AUROC
needs positives and negatives in every resample, so each patient gets an exponential weight instead of a number of
copies (Bayesian bootstrap, Rubin 1981). DeLong's variance assumes that images are independent.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy import special

from common import processes
from common.data.folds import group_codes
from common.errors import InputError, check
from common.jit import compiled
from common.metrics.classification import auroc, aurocs, check_scores, mean_of_defined, ratio

CHUNK = 64  # resamples whose weights are in memory at once


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

    values_or_fn: real (N,), one value per image, to be averaged; or a function of row indices int64 (M,). groups: (N,)
    hashable values such as patient ids; None if every image is a group (values only). skip_nan: leave NaN values out
    instead of refusing them. The limits are NaN for fewer than two groups. Source: Davison and Hinkley 1997.
    """
    return interval(*resample(values_or_fn, groups, n_resamples, seed, skip_nan), level)


def paired_bootstrap(a, b, groups, n_resamples=1000, seed=0, level=0.95, skip_nan=False):
    """Return (Interval of the mean of a − b, two-sided p-value), both (N,) or functions as in `bootstrap`."""
    both = callable(a) and callable(b)
    difference = (lambda rows: a(rows) - b(rows)) if both else np.asarray(a, float) - np.asarray(b, float)
    return interval_with_p(*resample(difference, groups, n_resamples, seed, skip_nan), level)


def bootstrap_auroc(y, score, groups, n_resamples=1000, seed=0, level=0.95, skip_undefined=False):
    """Return (list of C Intervals, Interval of the mean) for the AUROC of each class, by the Bayesian bootstrap.

    y: (N, C) bool or 0/1; score: (N, C) real; groups: as in `bootstrap`. A class with equal labels only, or with NaN
    scores, raises InputError; with `skip_undefined`, it gets NaN and is left out of the mean, and so is each unknown
    label (NaN). Intervals of a class with fewer than about 25 positive groups are too narrow.
    """
    estimates, resamples = resample_aurocs(y, score, groups, n_resamples, seed, skip_undefined)
    intervals = [interval(*figures, level) for figures in zip(estimates, resamples.T, strict=True)]
    return intervals, interval(mean_of_defined(estimates), mean_of_defined(resamples), level)


def interval(estimate, resamples, level):
    """Return the percentile Interval of float64 (B,) resamples, ignoring NaN; limits are NaN without an estimate."""
    resamples = resamples[~np.isnan(resamples)]
    if np.isnan(estimate) or not len(resamples):
        return Interval(float(estimate), np.nan, np.nan)
    low, high = np.quantile(resamples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))


def interval_with_p(difference, resamples, level):
    """Return (Interval, p-value) of a difference; p is twice the smaller share of resamples beyond 0."""
    found, n = interval(difference, resamples, level), np.count_nonzero(~np.isnan(resamples))
    if np.isnan(found.low):
        return found, np.nan
    tail = min((resamples <= 0).sum(), (resamples >= 0).sum())
    return found, min(1.0, 2 * (1 + int(tail)) / (n + 1))


def number_groups(groups, n):
    """Return (group numbers int64 (n,), number of groups)."""
    codes = group_codes(groups, n)
    return codes, int(codes.max(initial=-1)) + 1


def exponential_weights(n_groups, n_resamples, seed):
    """Yield weights for the Bayesian bootstrap, float64 (up to CHUNK, n_groups), n_resamples or, of one group, none."""
    rng = np.random.default_rng(seed)
    n = n_resamples if n_groups > 1 else 0
    for start in range(0, max(n, 1), CHUNK):
        yield rng.exponential(size=(min(CHUNK, n - start), n_groups))


def resample(values_or_fn, groups, n_resamples, seed, skip_nan):
    """Return (estimate, float64 (n_resamples,))."""
    if callable(values_or_fn):
        codes, n_groups = number_groups(groups, len(groups))
        rows, sizes = np.argsort(codes, kind="stable"), np.bincount(codes)
        ends = np.cumsum(sizes)
        resamples = []
        for drawn in _draws(n_groups, n_resamples, seed):
            shift = ends[drawn] - np.cumsum(sizes[drawn])  # from positions in the resample to positions in rows
            places = np.arange(sizes[drawn].sum()) + np.repeat(shift, sizes[drawn])
            resamples.append(float(values_or_fn(rows[places])))
        return float(values_or_fn(np.arange(len(codes)))), np.array(resamples)
    values = np.asarray(values_or_fn, float)
    codes, n_groups = number_groups(groups, len(values))
    kept = ~np.isnan(values)
    if not (kept.all() or skip_nan):
        raise InputError(f"row {np.flatnonzero(~kept)[0]}: the value is NaN; skip_nan=True leaves such rows out")
    sums = np.bincount(codes[kept], values[kept], n_groups)
    counts = np.bincount(codes[kept], minlength=n_groups)
    drawn = [(sums[d].sum(), counts[d].sum()) for d in _draws(n_groups, n_resamples, seed)]
    resamples = np.array(drawn).reshape(-1, 2)
    return ratio(sums.sum(), counts.sum(), np.nan), ratio(resamples[:, 0], resamples[:, 1], np.nan)


def _draws(n_groups, n_resamples, seed):
    rng = np.random.default_rng(seed)
    return (rng.integers(n_groups, size=n_groups) for _ in range(n_resamples if n_groups > 1 else 0))


def resample_aurocs(y, score, groups, n_resamples, seed, skip_undefined):
    """Return AUROCs on all images, float64 (C,), and under weights of the groups, float64 (n_resamples, C)."""
    y, score = np.asarray(y), np.asarray(score)
    estimates = aurocs(y, score) if skip_undefined else auroc(y, score)
    codes, n_groups = number_groups(groups, len(y))
    orders = np.argsort(score, axis=0)
    resamples = []

    def of_class(c, weights):
        if np.isnan(estimates[c]):
            return np.full(len(weights), np.nan)
        order = orders[~np.isnan(y[orders[:, c], c]), c]
        ranked = score[order, c]
        starts = np.append(True, ranked[1:] != ranked[:-1])
        return _weighted_auroc(y[order, c] != 0, starts, codes[order], weights)

    with ThreadPoolExecutor(processes.cores()) as pool:
        for drawn in exponential_weights(n_groups, n_resamples, seed):
            resamples.append(np.stack(list(pool.map(of_class, range(y.shape[1]), itertools.repeat(drawn))), axis=1))
    return estimates, np.concatenate(resamples)


@compiled
def _weighted_auroc(positive, starts, group, weights):
    """Return the AUROC, float64 (B,), of rows sorted by score for each row of weights > 0 (B, groups).

    starts: positions at which the score rises. Negatives with the score of a positive count half as below it.
    """
    areas = np.empty(len(weights))
    for b in range(len(weights)):
        area = positives = below = of_positives = of_negatives = 0.0  # the last two: at the present score
        for i in range(len(positive)):
            if starts[i]:
                area += of_positives * (below + of_negatives / 2)
                positives, below, of_positives, of_negatives = positives + of_positives, below + of_negatives, 0.0, 0.0
            if positive[i]:
                of_positives += weights[b, group[i]]
            else:
                of_negatives += weights[b, group[i]]
        area += of_positives * (below + of_negatives / 2)
        areas[b] = area / ((positives + of_positives) * (below + of_negatives))
    return areas


def as_json(value):
    """Return a number for JSON, None for NaN."""
    return None if np.isnan(value) else float(value)


def as_interval(interval):
    """Return an Interval as a dict of estimate, low and high, as in score.json; NaN becomes None."""
    return {name: as_json(value) for name, value in vars(interval).items()}


def format_interval(values, digits=4):
    """Return the dict of `as_interval` as text, such as "0.8347 [0.8280, 0.8412]"; "not defined" without a value."""
    if values["estimate"] is None:
        return "not defined"
    if values["low"] is None:
        return f"{values['estimate']:.{digits}f} (no interval)"
    return "{estimate:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".format(**values, digits=digits)


ROUNDING = 1e-16  # variances of a difference up to this are 0 but for rounding


def delong_covariance(y, scores):
    """Return (AUROC float64 (K,), covariance float64 (K, K)) of K scores of the same images, for one class.

    y: (N,) bool or 0/1; scores: (N, K) real. The covariance is NaN with fewer than two positives or negatives. Source:
    DeLong et al. 1988, by sorting as in Sun and Xu 2014.
    """
    y, scores = np.asarray(y), np.asarray(scores)
    for score in scores.T:
        check_scores(y, score)
    positive, negative = scores[y != 0], scores[y == 0]
    check(len(positive) and len(negative), "all labels are equal")
    of_positive = np.stack([share_below(p, n) for p, n in zip(positive.T, negative.T, strict=True)])
    of_negative = 1 - np.stack([share_below(n, p) for p, n in zip(positive.T, negative.T, strict=True)])
    covariance = _covariance(of_positive) / len(positive) + _covariance(of_negative) / len(negative)
    return of_positive.mean(axis=1), covariance


def delong_intervals(y, score, level=0.95):
    """Return float64 (C, 3): AUROC, low and high of each class.

    y: (N, C) bool or 0/1; score: (N, C) real. The interval is symmetric on the logit scale (Pepe 2003; Qin and
    Hotilovac 2008), and NaN for an AUROC of 0 or 1 and with fewer than two positives or negatives.
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

    a, b: (N, C) real. Without variance, a difference of 0 has 0, 0, 1, any other NaN. Source: DeLong et al. 1988.
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


def share_below(values, others):
    """Return the share of `others`, (M,), below each of `values`, (N,), float64; ties count half."""
    others = np.sort(others)
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))


def _covariance(placements):
    """Return the covariance (K, K) of placements (K, M); NaN if M is 1."""
    if placements.shape[1] < 2:
        return np.full((len(placements), len(placements)), np.nan)
    return np.cov(placements).reshape(len(placements), -1)
