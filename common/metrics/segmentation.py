"""Segmentation metrics of images, computed from tp, fp, fn, tn in pixels.

As in SIIM, two empty masks score 1 and a single empty one 0 (except for accuracy). `reduce`: None for one value per
image, "image" for their mean (SIIM), "pooled" for one ratio over the pixels of all images.
"""

import numpy as np

from common.errors import InputError
from common.metrics import classification
from common.metrics.classification import mean_of_defined, ratio


def counts_from_areas(intersection, pred_area, true_area, pixels):
    """Return tp, fp, fn, tn, int64 (..., 4), from areas and the images' numbers of pixels, which broadcast."""
    intersection, pred_area, true_area = _check_areas(intersection, pred_area, true_area)
    rest = pixels - (pred_area + true_area - intersection)
    parts = np.broadcast_arrays(intersection, pred_area - intersection, true_area - intersection, rest)
    return np.stack(parts, axis=-1).astype(np.int64)


def dice_from_areas(intersection, pred_area, true_area):
    """Return the Dice coefficient 2·|A∩B| / (|A| + |B|), float64 in [0, 1], 1 if both masks are empty.

    Areas are in pixels; their shapes broadcast, such as thresholds × images. SIIM's score is the mean over images.
    Raises InputError if the areas contradict each other.

    >>> dice_from_areas([5, 0, 0], [10, 0, 4], [10, 0, 0]).tolist()
    [0.5, 1.0, 0.0]
    """
    intersection, pred_area, true_area = _check_areas(intersection, pred_area, true_area)
    return ratio(2 * intersection, pred_area + true_area, 1.0)


def _over_images(metric):
    """Return `metric` as a function of counts (..., N, 4), its options and `reduce`: (..., N), or (...) if reduced."""

    def score(counts, *options, reduce=None):
        counts = np.asarray(counts)
        counts = counts.sum(axis=-2) if reduce == "pooled" else counts
        values = np.where(counts[..., :3].sum(axis=-1) == 0, 1.0, metric(counts, *options))[()]
        return mean_of_defined(values) if reduce == "image" else values

    return score


dice = f_beta = _over_images(classification.f_beta)  # Dice is F1
precision, recall = _over_images(classification.precision), _over_images(classification.recall)
accuracy = _over_images(classification.accuracy)
iou = _over_images(lambda counts: ratio(counts[..., 0], counts[..., :3].sum(axis=-1), 0.0))


def _check_areas(*areas):
    intersection, pred_area, true_area = areas = [np.asarray(area, np.float64) for area in areas]
    valid = (intersection >= 0) & (intersection <= np.minimum(pred_area, true_area))
    if not valid.all():
        raise InputError(f"image {np.argwhere(~valid)[0].tolist()}: the intersection must lie between 0 and both areas")
    return areas
