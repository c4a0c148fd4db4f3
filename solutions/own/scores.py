"""Scores of classification; labels are 0, 1 and NaN for unknown."""

import numpy as np

from common.metrics import classification as metrics
from common.metrics.calibration import choose_thresholds, nested_counts
from common.metrics.statistics import bootstrap, bootstrap_auroc


def mean_auroc(truth, probs, groups, seed=0, n_resamples=1000):
    """Return the Interval of the mean AUROC over classes, (n, C); with unknown labels, from fewer resamples."""
    if np.isnan(truth).any():
        mean = lambda at: metrics.mean_of_defined(aurocs(truth[at], probs[at]))  # noqa: E731
        return bootstrap(mean, groups, n_resamples // 5, seed)
    return bootstrap_auroc(truth, probs, groups, n_resamples, seed, skip_undefined=True)[1]


def aurocs(truth, scores):
    """Return the AUROC of each class over the images whose label is known, float64 (C,), NaN where undefined."""
    pairs = [(t[~np.isnan(t)], s[~np.isnan(t)]) for t, s in zip(truth.T, scores.T, strict=True)]
    return np.array([metrics.auroc(t, s, np.nan) if len(t) else np.nan for t, s in pairs])


def average_precision(y, scores):
    """Return the average precision, the step-wise area under the precision-recall curve; NaN without positives."""
    if not y.any():
        return np.nan
    _, tp, fp = metrics.cut_points(y, scores)
    return float((np.diff(tp, prepend=0) / tp[-1] * tp / (tp + fp)).sum())


def class_row(truth, probs, parts, groups, seed):
    """Return the figures of one class over the images whose label is known."""
    known = ~np.isnan(truth)
    y, p, part, people = truth[known, None], probs[known, None], parts[known], groups[known]
    row = {"images": len(y), "positive": int(y.sum()), "positive_patients": len(set(people[y[:, 0] > 0].tolist()))}
    if len(set(people.tolist())) > 1 and len(set(part.tolist())) > 1:
        (area,), _ = bootstrap_auroc(y, p, people, seed=seed, skip_undefined=True)
        row |= {"auroc": area.estimate, "low": area.low, "high": area.high}
        row |= {"average_precision": average_precision(y[:, 0], p[:, 0]), "threshold": choose_thresholds(y, p)[0]}
        (counts,), _ = nested_counts(y, p, part)
        row |= {"sensitivity": metrics.recall(counts, np.nan), "specificity": metrics.specificity(counts, np.nan)}
        row |= {"f1": metrics.f_beta(counts), "accuracy": metrics.accuracy(counts)}
    names = ("auroc", "low", "high", "average_precision", "threshold", "sensitivity", "specificity", "f1", "accuracy")
    return row | {name: row.get(name, np.nan) for name in names}


def as_json(value):
    """Return a number for JSON, None for NaN."""
    return None if np.isnan(value) else float(value)
