"""Metrics of one class against the rest; a row is predicted positive if its score is at least the threshold."""

import numpy as np

from common.errors import InputError, check


def check_scores(y, score, ndims=(1,), nan="refused"):
    """Return labels as bool and scores as floats, both (N,) or (N, C), depending on `ndims`.

    nan: whether NaN scores are "refused" or "allowed". Raises InputError for other shapes, labels and scores.
    """
    y, score = np.asarray(y), np.asarray(score)
    if y.shape != score.shape or y.ndim not in ndims or not y.size:
        wanted = " or ".join(("(N,)", "(N, C)")[n - 1] for n in ndims)
        raise InputError(f"labels {y.shape} and scores {score.shape}: need one shape {wanted}")
    if score.dtype.kind not in "biuf" or y.dtype.kind not in "biuf" or ((y != 0) & (y != 1)).any():
        raise InputError("labels must be 0 or 1 and scores real numbers")
    if nan == "refused" and np.isnan(score).any():
        raise InputError(f"row {np.argwhere(np.isnan(score))[0][0]}: the score is NaN")
    return y.astype(bool), score if score.dtype.kind == "f" else score.astype(np.float64)


def cut_points(y, score):
    """Return the distinct scores of (N,), descending, and the true and false positives (int64) at each threshold."""
    y, score = check_scores(y, score)
    order = np.argsort(score)[::-1]
    score, tp = score[order], np.cumsum(y[order], dtype=np.int64)
    last = np.append(np.flatnonzero(score[1:] != score[:-1]), len(score) - 1)
    return score[last], tp[last], last + 1 - tp[last]


def auroc(y, score, undefined=None):
    """Return the area under the ROC curve, ties counted half: float for (N,), float64 (C,) for (N, C).

    y: bool or 0/1; score: real, of the same shape. A class whose labels are all equal or whose scores contain NaN
    gets `undefined` (such as NaN), or raises InputError if `undefined` is None.

    >>> auroc([1, 0, 1, 0], [0.9, 0.2, 0.4, 0.4])
    0.875
    """
    y, score = check_scores(y, score, (1, 2), nan="allowed")
    areas = []
    for c, (labels, scores) in enumerate(zip(np.atleast_2d(y.T), np.atleast_2d(score.T), strict=True)):
        if labels.all() or not labels.any() or np.isnan(scores).any():
            check(undefined is not None, f"class {c}: all labels are equal, or there are NaN scores")
            areas.append(float(undefined))
        else:
            tp, fp = (np.append(0, counts) for counts in cut_points(labels, scores)[1:])
            areas.append(float((np.diff(fp) * (tp[1:] + tp[:-1])).sum() / (2.0 * tp[-1] * fp[-1])))
    return areas[0] if y.ndim == 1 else np.array(areas)


def aurocs(y, score):
    """Return the AUROC of each class over the rows whose label is known (not NaN), float64 (C,), NaN if undefined."""
    pairs = [(t[~np.isnan(t)], s[~np.isnan(t)]) for t, s in zip(y.T, score.T, strict=True)]
    return np.array([auroc(t, s, np.nan) if len(t) else np.nan for t, s in pairs])


def confusion_counts(y, score, threshold):
    """Return tp, fp, fn, tn at `threshold`, int64 (4,); (C, 4) for y and score (N, C) and one or C thresholds."""
    y, score = check_scores(y, score, (1, 2))
    called = score.astype(np.float64) >= threshold
    return np.stack([(called & y).sum(0), (called & ~y).sum(0), (~called & y).sum(0), (~called & ~y).sum(0)], axis=-1)


def precision(counts):
    """Return tp / (tp + fp), 0 without predicted positives. Here and below, counts (..., 4) give float64 (...)."""
    tp, fp, _, _ = _split(counts)
    return ratio(tp, tp + fp, 0.0)


def recall(counts, undefined=0.0):
    """Return tp / (tp + fn), the sensitivity; `undefined` without positives."""
    tp, _, fn, _ = _split(counts)
    return ratio(tp, tp + fn, undefined)


def specificity(counts, undefined=0.0):
    """Return tn / (tn + fp); `undefined` without negatives."""
    _, fp, _, tn = _split(counts)
    return ratio(tn, tn + fp, undefined)


def accuracy(counts):
    """Return (tp + tn) / all, 0 without rows."""
    tp, fp, fn, tn = _split(counts)
    return ratio(tp + tn, tp + fp + fn + tn, 0.0)


def f_beta(counts, beta=1.0):
    """Return (1+β²)·tp / ((1+β²)·tp + β²·fn + fp), 0 if undefined."""
    tp, fp, fn, _ = _split(counts)
    return ratio((1 + beta**2) * tp, beta**2 * (tp + fn) + tp + fp, 0.0)


def mcc(counts):
    """Return the Matthews correlation coefficient, in [-1, 1], 0 if undefined."""
    tp, fp, fn, tn = _split(counts)
    return ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)), 0.0)


def best_threshold(y, score, metric):
    """Return (threshold, value) with the highest metric over all thresholds that split the rows differently.

    y, score: (N,); metric: maps counts (M, 4) to values (M,), NaN skipped. The threshold is the midpoint of two scores,
    or beyond all of them; if values are equal, the highest threshold wins.
    """
    scores, tp, fp = cut_points(y, score)
    counts = np.stack([tp, fp, tp[-1] - tp, fp[-1] - fp], axis=-1)
    values = np.asarray(metric(np.concatenate([[[0, 0, tp[-1], fp[-1]]], counts])))
    best = int(np.nanargmax(values))
    if best == 0:
        return float(np.nextafter(scores[0], np.inf, dtype=scores.dtype)), float(values[0])
    upper, lower = scores[best - 1], scores[min(best, len(scores) - 1)]
    middle = lower / 2 + upper / 2
    return float(middle if lower < middle <= upper else upper), float(values[best])


def ratio(numerator, denominator, undefined):
    """Return numerator / denominator as float64, `undefined` if the denominator is 0."""
    values = np.full(np.shape(denominator), float(undefined))
    return np.divide(numerator, denominator, out=values, where=denominator != 0)[()]


def mean_of_defined(values):
    """Return the mean over the last axis, ignoring NaN; NaN if all values are NaN."""
    kept = ~np.isnan(values)
    return ratio(np.where(kept, values, 0.0).sum(axis=-1), kept.sum(axis=-1), np.nan)


def _split(counts):
    return np.moveaxis(np.asarray(counts, np.float64), -1, 0)
