"""Segmentation metrics of images, from tp, fp, fn, tn counted in pixels.

An image where both masks are empty scores 1, one where only one is empty scores 0 (accuracy excepted), as in SIIM.
`reduce`: None for one value per image, "image" for their mean (SIIM), "pooled" for one ratio over the pixels of all
images.
"""

import numpy as np

from common.errors import InputError
from common.metrics import classification
from common.metrics.classification import mean_of_defined, ratio


def counts_from_areas(intersection, pred_area, true_area, pixels):
    """Return tp, fp, fn, tn, int64 (..., 4), from areas in pixels and the number of pixels of an image.

    All arguments broadcast. Raises InputError if the areas contradict each other.
    """
    intersection, pred_area, true_area = _check_areas(intersection, pred_area, true_area)
    rest = pixels - (pred_area + true_area - intersection)
    parts = np.broadcast_arrays(intersection, pred_area - intersection, true_area - intersection, rest)
    return np.stack(parts, axis=-1).astype(np.int64)


def dice_from_areas(intersection, pred_area, true_area):
    """Return the Dice coefficient 2·|A∩B| / (|A| + |B|), float64 in [0, 1], 1 where both masks are empty.

    Areas in pixels, of any shapes that broadcast, such as thresholds × images. SIIM's score is the mean over images.
    Raises InputError if the areas contradict each other.

    >>> dice_from_areas([5, 0, 0], [10, 0, 4], [10, 0, 0]).tolist()
    [0.5, 1.0, 0.0]
    """
    intersection, pred_area, true_area = _check_areas(intersection, pred_area, true_area)
    return ratio(2 * intersection, pred_area + true_area, 1.0)


def f_beta(counts, beta=1.0, reduce=None):
    """Return the F-beta score. counts: (..., N, 4) with tp, fp, fn, tn; the result is (..., N), or (...) if reduced."""
    return _score(counts, lambda c: classification.f_beta(c, beta), reduce)


def dice(counts, reduce=None):
    """Return the Dice coefficient 2·tp / (2·tp + fp + fn), which is F1; shapes as in `f_beta`."""
    return _score(counts, classification.f_beta, reduce)


def iou(counts, reduce=None):
    """Return the Jaccard index tp / (tp + fp + fn); shapes as in `f_beta`."""
    return _score(counts, lambda c: ratio(c[..., 0], c[..., :3].sum(axis=-1), 0.0), reduce)


def precision(counts, reduce=None):
    """Return tp / (tp + fp); shapes as in `f_beta`."""
    return _score(counts, classification.precision, reduce)


def recall(counts, reduce=None):
    """Return tp / (tp + fn); shapes as in `f_beta`."""
    return _score(counts, classification.recall, reduce)


def accuracy(counts, reduce=None):
    """Return the share of pixels that agree, (tp + tn) / all; shapes as in `f_beta`."""
    return _score(counts, classification.accuracy, reduce)


def _score(counts, metric, reduce):
    counts = np.asarray(counts)
    counts = counts.sum(axis=-2) if reduce == "pooled" else counts
    values = np.where(counts[..., :3].sum(axis=-1) == 0, 1.0, metric(counts))[()]
    return mean_of_defined(values) if reduce == "image" else values


def _check_areas(*areas):
    intersection, pred_area, true_area = areas = [np.asarray(area, np.float64) for area in areas]
    valid = (intersection >= 0) & (intersection <= np.minimum(pred_area, true_area))
    if not valid.all():
        raise InputError(f"image {np.argwhere(~valid)[0].tolist()}: the intersection must lie between 0 and both areas")
    return areas
