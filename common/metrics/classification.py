"""Classification scores of one class against the rest: ranking figures from scores, the others from tp, fp, fn, tn.

A row is called positive where its score is at least the threshold. `zero_division` is the value of a ratio without a
denominator (0 as in scikit-learn, or NaN); `undefined` that of a ranking figure which does not exist.
"""

import numpy as np

from common.errors import InputError


def cut_points(y, score):
    """Return the distinct scores, falling, and the true and false positives (int64) at each taken as threshold.

    y: (N,) bool or 0/1; score: (N,) real. Raises InputError on other values, NaN among the scores or no rows.
    """
    y, score = _checked(y, score)
    if np.isnan(score).any():
        raise InputError(f"row {np.flatnonzero(np.isnan(score))[0]}: the score is NaN")
    order = np.argsort(score)[::-1]
    score, tp = score[order], np.cumsum(y[order], dtype=np.int64)
    last = np.append(np.flatnonzero(score[1:] != score[:-1]), len(score) - 1)
    return score[last], tp[last], last + 1 - tp[last]


def auroc(y, score, undefined=None):
    """Return the area under the ROC curve, ties counted half: float for (N,), float64 (C,) for (N, C).

    y: bool or 0/1; score: real, of the same shape. Labels of one kind only or NaN among the scores give `undefined`
    (such as NaN), or raise InputError where that is None.
    """
    return _by_class(_auroc, y, score, undefined)


def average_precision(y, score, undefined=None):
    """Return Σ (recall gained × precision) over falling thresholds; shapes and errors as in `auroc`."""
    return _by_class(_average_precision, y, score, undefined)


def confusion_counts(y, score, threshold):
    """Return int64 (4,) with tp, fp, fn, tn at `threshold`; (C, 4) for y and score (N, C), thresholds (C,) or one.

    Raises InputError on shapes that differ, labels other than 0 and 1 or NaN.
    """
    y, score = _checked(y, score, ndims=(1, 2))
    if np.isnan(score).any() or np.isnan(threshold).any():
        raise InputError("NaN among the scores or thresholds")
    called = score.astype(np.float64) >= threshold
    return np.stack([(called & y).sum(0), (called & ~y).sum(0), (~called & y).sum(0), (~called & ~y).sum(0)], axis=-1)


def precision(counts, zero_division=0.0):
    """Return tp / (tp + fp); counts (..., 4) give float64 (...)."""
    tp, fp, _, _ = _split(counts)
    return ratio(tp, tp + fp, zero_division)


def recall(counts, zero_division=0.0):
    """Return tp / (tp + fn); counts (..., 4) give float64 (...)."""
    tp, _, fn, _ = _split(counts)
    return ratio(tp, tp + fn, zero_division)


sensitivity = recall


def specificity(counts, zero_division=0.0):
    """Return tn / (tn + fp); counts (..., 4) give float64 (...)."""
    _, fp, _, tn = _split(counts)
    return ratio(tn, tn + fp, zero_division)


def accuracy(counts, zero_division=0.0):
    """Return (tp + tn) / all; counts (..., 4) give float64 (...)."""
    tp, fp, fn, tn = _split(counts)
    return ratio(tp + tn, tp + fp + fn + tn, zero_division)


def f_beta(counts, beta=1.0, zero_division=0.0):
    """Return (1+β²)·tp / ((1+β²)·tp + β²·fn + fp); counts (..., 4) give float64 (...)."""
    tp, fp, fn, _ = _split(counts)
    return ratio((1 + beta**2) * tp, beta**2 * (tp + fn) + tp + fp, zero_division)


def mcc(counts, zero_division=0.0):
    """Return the Matthews correlation coefficient, in [-1, 1]; counts (..., 4) give float64 (...)."""
    tp, fp, fn, tn = _split(counts)
    return ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)), zero_division)


def best_threshold(y, score, metric):
    """Return (threshold, value) with the highest metric over all thresholds that divide the rows differently.

    y, score: (N,) as in `cut_points`; metric: a function of counts (M, 4) giving (M,), such as `mcc`, `accuracy` or
    `f_beta`; NaN values are passed over. The threshold is the middle between two scores, in the precision of the
    scores; calling nothing and everything positive are tried too. Of equal values the highest threshold wins.
    """
    scores, tp, fp = cut_points(y, score)
    counts = np.stack([tp, fp, tp[-1] - tp, fp[-1] - fp], axis=-1)
    values = np.asarray(metric(np.concatenate([[[0, 0, tp[-1], fp[-1]]], counts])))
    if np.isnan(values).all():
        raise InputError("the metric is NaN at every threshold")
    best = int(np.nanargmax(values))
    if best == 0:
        return float(np.nextafter(scores[0], np.inf, dtype=scores.dtype)), float(values[0])
    upper, lower = scores[best - 1], scores[min(best, len(scores) - 1)]
    middle = lower / 2 + upper / 2
    return float(middle if lower < middle <= upper else upper), float(values[best])


def ratio(numerator, denominator, undefined):
    """Return numerator / denominator as float64, `undefined` where the denominator is 0."""
    values = np.full(np.shape(denominator), float(undefined))
    return np.divide(numerator, denominator, out=values, where=denominator != 0)[()]


def mean_of_defined(values):
    """Return the mean over the last axis of the values that are not NaN; NaN where all are."""
    kept = ~np.isnan(values)
    return ratio(np.where(kept, values, 0.0).sum(axis=-1), kept.sum(axis=-1), np.nan)


def _auroc(y, score):
    _, tp, fp = cut_points(y, score)
    tp, fp = np.append(0, tp), np.append(0, fp)
    return (np.diff(fp) * (tp[1:] + tp[:-1])).sum() / (2.0 * tp[-1] * fp[-1])


def _average_precision(y, score):
    _, tp, fp = cut_points(y, score)
    return (np.diff(tp, prepend=0) * (tp / (tp + fp))).sum() / tp[-1]


def _by_class(figure, y, score, undefined):
    y, score = _checked(y, score, ndims=(1, 2))
    values = []
    for c, (labels, scores) in enumerate(zip(np.atleast_2d(y.T), np.atleast_2d(score.T), strict=True)):
        if labels.all() or not labels.any() or np.isnan(scores).any():
            if undefined is None:
                raise InputError(f"class {c}: labels of one kind only, or NaN among the scores")
            values.append(float(undefined))
        else:
            values.append(float(figure(labels, scores)))
    return values[0] if y.ndim == 1 else np.array(values)


def _checked(y, score, ndims=(1,)):
    y, score = np.asarray(y), np.asarray(score)
    if y.shape != score.shape or y.ndim not in ndims or not y.size:
        raise InputError(f"labels {y.shape} and scores {score.shape}: need one shape (N,){' or (N, C)' * (2 in ndims)}")
    if score.dtype.kind not in "biuf" or y.dtype.kind not in "biuf" or ((y != 0) & (y != 1)).any():
        raise InputError("labels must be 0 or 1 and scores real numbers")
    return y.astype(bool), score if score.dtype.kind == "f" else score.astype(np.float64)


def _split(counts):
    counts = np.asarray(counts, np.float64)
    if counts.ndim < 1 or counts.shape[-1] != 4:
        raise InputError(f"counts {counts.shape}: need (..., 4) with tp, fp, fn, tn")
    return np.moveaxis(counts, -1, 0)
