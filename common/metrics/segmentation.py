"""Segmentation scores: pixels are counted first, and every figure is derived from tp, fp, fn, tn.

Options, for the conventions in which public scorers differ:
both_empty: value of an image where neither mask has a pixel: 1.0 (SIIM), 0.0, or "skip" (NaN, left out of the mean).
one_empty: value of precision or recall where only its denominator is empty; the other figures are 0 there.
reduce: None for one value an image, "image" for their mean (SIIM), "pooled" for one ratio over the pixels of all
images. A mean of the means of batches is none of them and is not offered.
"""

import numpy as np

from common.errors import InputError
from common.metrics import classification
from common.metrics.classification import mean_of_defined, ratio


def confusion(pred, truth):
    """Count the pixels of binary masks: int64 (..., 4) with tp, fp, fn, tn.

    pred, truth: bool, or integers 0 and 1, of one shape (..., H, W). Raises InputError on other shapes or values,
    such as probabilities that were not thresholded.
    """
    pred, truth = _binary(pred, "pred"), _binary(truth, "truth")
    if pred.shape != truth.shape or pred.ndim < 2:
        raise InputError(f"masks {pred.shape} and {truth.shape}: need one shape (..., H, W)")
    height, width = pred.shape[-2:]
    pairs = zip(pred.reshape(-1, height, width), truth.reshape(-1, height, width), strict=True)
    # np.count_nonzero of one whole mask is vectorised, along an axis it is not
    areas = [(np.count_nonzero(p & t), np.count_nonzero(p), np.count_nonzero(t)) for p, t in pairs]
    both, predicted, true = np.reshape(areas, (-1, 3)).T.astype(np.int64)
    counts = np.stack([both, predicted - both, true - both, height * width - predicted - true + both], axis=-1)
    return counts.reshape(*pred.shape[:-2], 4)


def counts_from_areas(intersection, pred_area, true_area, pixels):
    """Return int64 (..., 4) with tp, fp, fn, tn from areas in pixels and the number of pixels of an image.

    All arguments broadcast. Raises InputError where the areas contradict each other.
    """
    intersection, pred_area, true_area = _areas(intersection, pred_area, true_area)
    union = pred_area + true_area - intersection
    if (union > pixels).any():
        raise InputError(f"the union of two masks has {int(union.max())} pixels, more than the image")
    parts = np.broadcast_arrays(intersection, pred_area - intersection, true_area - intersection, pixels - union)
    return np.stack(parts, axis=-1).astype(np.int64)


def dice_from_areas(intersection, pred_area, true_area, both_empty=1.0, smooth=0.0):
    """Return the Dice coefficient (2·|A∩B| + smooth) / (|A| + |B| + smooth): float64 in [0, 1], by default SIIM's.

    Areas in pixels, of any shapes that broadcast, such as thresholds × images. The score of SIIM is the mean over
    images. smooth: 0 in an honest score, 1 in many public ones. Raises InputError where areas contradict each other.
    """
    intersection, pred_area, true_area = _areas(intersection, pred_area, true_area)
    total = pred_area + true_area
    return _fill_empty(ratio(2 * intersection + smooth, total + smooth, 0.0), total == 0, both_empty)


def score(counts, metric, both_empty=1.0, reduce=None):
    """Apply `metric`, a function of counts (..., 4) giving (...), to images under the conventions above.

    counts: (..., N, 4) with tp, fp, fn, tn. Returns float64 (..., N), or (...) if reduced. Raises InputError on other
    shapes or an unknown `reduce`.
    """
    counts = np.asarray(counts)
    if reduce not in (None, "image", "pooled"):
        raise InputError(f"reduce must be None, 'image' or 'pooled', not {reduce!r}")
    if counts.ndim < 1 + (reduce is not None) or counts.shape[-1] != 4:
        raise InputError(f"counts {counts.shape}: need (..., 4) with tp, fp, fn, tn, to reduce (..., N, 4)")
    counts = counts.sum(axis=-2) if reduce == "pooled" else counts
    values = _fill_empty(metric(counts), counts[..., :3].sum(axis=-1) == 0, both_empty)
    return mean_of_defined(values) if reduce == "image" else values


def f_beta(counts, beta=1.0, both_empty=1.0, reduce=None):
    """Return F-beta of the pixels; counts and result as in `score`."""
    return score(counts, lambda c: classification.f_beta(c, beta), both_empty, reduce)


def dice(counts, both_empty=1.0, reduce=None):
    """Return the Dice coefficient 2·tp / (2·tp + fp + fn), which is F1; counts and result as in `score`."""
    return score(counts, classification.f_beta, both_empty, reduce)


def iou(counts, both_empty=1.0, reduce=None):
    """Return the Jaccard index tp / (tp + fp + fn); counts and result as in `score`."""
    return score(counts, lambda c: ratio(c[..., 0], c[..., :3].sum(axis=-1), 0.0), both_empty, reduce)


def precision(counts, both_empty=1.0, reduce=None, one_empty=0.0):
    """Return tp / (tp + fp), `one_empty` where only the prediction is empty; counts and result as in `score`."""
    return score(counts, lambda c: classification.precision(c, one_empty), both_empty, reduce)


def recall(counts, both_empty=1.0, reduce=None, one_empty=0.0):
    """Return tp / (tp + fn), `one_empty` where only the truth is empty; counts and result as in `score`."""
    return score(counts, lambda c: classification.recall(c, one_empty), both_empty, reduce)


def accuracy(counts, reduce=None):
    """Return the share of pixels that agree, (tp + tn) / all; counts and result as in `score`."""
    return score(counts, classification.accuracy, 1.0, reduce)


def _fill_empty(values, is_empty, both_empty):
    return np.where(is_empty, np.nan if both_empty == "skip" else float(both_empty), values)[()]


def _areas(*areas):
    intersection, pred_area, true_area = areas = [np.asarray(area) for area in areas]
    try:
        smaller = np.minimum(pred_area, true_area)
        sound = (intersection >= 0) & (intersection <= smaller)
    except ValueError:
        raise InputError(f"areas of shapes {[area.shape for area in areas]} do not fit together") from None
    if not sound.all():
        raise InputError(f"image {np.argwhere(~sound)[0].tolist()}: the intersection must lie between 0 and both areas")
    return [area.astype(np.float64) for area in areas]


def _binary(mask, name):
    mask = np.asarray(mask)
    if mask.dtype.kind not in "biu" or (mask.dtype.kind != "b" and mask.size and (mask.min() < 0 or mask.max() > 1)):
        raise InputError(f"{name} ({mask.dtype}) must hold only 0 and 1; threshold probabilities before counting")
    return mask.astype(bool, copy=False)
