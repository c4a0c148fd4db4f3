"""Non-maximum suppression, its soft form and non-maximum weighting, compiled, for one image or thousands.

Results are bit for bit those of ensemble_boxes 1.0.9 on float64 input. Bad input is refused as by `common.post.wbf`.
"""

import numpy as np
from numba import njit

from common.errors import InputError
from common.post.batches import SINGLE, Fused, check_iou, check_skip, check_weights, grouped, one_image, ranked

LINEAR, GAUSSIAN = 1, 2


def nms(boxes_list, scores_list, labels_list, iou_thr=0.5, weights=None):
    """Keep, class by class, the best boxes of one image and none that overlaps a kept one by IoU > iou_thr.

    Arguments as in `wbf.weighted_boxes_fusion`; with weights, scores are multiplied by the model's share of them.
    Returns boxes (m, 4) and scores (m,) float64, labels (m,) int64, by class, then best first.
    """
    return fuse_nms(one_image(boxes_list, scores_list, labels_list)[0], weights, iou_thr)[:3]


def soft_nms(
    boxes_list,
    scores_list,
    labels_list,
    method=GAUSSIAN,
    iou_thr=0.5,
    sigma=0.5,
    thresh=0.001,
    weights=None,
    decayed=False,
):
    """Lower scores by the overlap with better boxes, and drop boxes whose score falls to `thresh` (Bodla et al. 2017).

    Arguments and results as in `nms`. method: LINEAR (score × (1 - IoU) where IoU > iou_thr) or GAUSSIAN (score ×
    exp(-IoU² / sigma)). As in ensemble_boxes the boxes kept carry their scores from before; `decayed` gives the
    lowered ones.
    """
    batch = one_image(boxes_list, scores_list, labels_list)[0]
    return fuse_soft_nms(batch, weights, method, iou_thr, sigma, thresh, decayed)[:3]


def non_maximum_weighted(boxes_list, scores_list, labels_list, weights=None, iou_thr=0.55, skip_box_thr=0.0):
    """Average boxes with the best one that they overlap, weighted by score × IoU; its score stays (Zhou et al. 2017).

    Arguments as in `wbf.weighted_boxes_fusion`; results too, but float32.
    """
    batch, skip = one_image(boxes_list, scores_list, labels_list, skip_box_thr)
    fused = fuse_nmw(batch, weights, iou_thr, skip)
    return fused.boxes, fused.scores, fused.labels.astype(np.float32)


def fuse_nms(batch, weights=None, iou_thr=0.5):
    """Apply `nms` to each image of a checked `batches.Batch`; returns `batches.Fused`."""
    check_iou(iou_thr)
    scores, rows, groups, firsts = _by_class(batch, weights)
    order = ranked(scores[rows], groups, _argsort)
    boxes = np.clip(batch.boxes, 0, 1)
    keepers = _keepers(boxes, rows[order], groups, float(iou_thr))
    kept = keepers == np.arange(len(keepers))
    starts = np.append(0, np.cumsum(kept))[groups[firsts]]
    rows = rows[order][kept]
    return Fused(boxes[rows], scores[rows], batch.labels[rows], starts)


def fuse_soft_nms(batch, weights=None, method=GAUSSIAN, iou_thr=0.5, sigma=0.5, thresh=0.001, decayed=False):
    """Apply `soft_nms` to each image of a checked `batches.Batch`; returns `batches.Fused`.

    Memory: 16 bytes for each pair of boxes of one class on one image, an image at a time.
    """
    check_iou(iou_thr)
    if method not in (LINEAR, GAUSSIAN) or not sigma > 0 or not np.isfinite(thresh):
        raise InputError(f"cannot use method {method!r} (1 or 2), sigma {sigma!r} (above 0), thresh {thresh!r}")
    scores, rows, groups, firsts = _by_class(batch, weights)
    boxes = np.clip(batch.boxes, 0, 1)
    order, values = np.empty_like(rows), np.empty(len(rows))
    for image in range(len(batch.starts) - 1):
        part = groups[firsts[image] : firsts[image + 1] + 1]
        if len(part) < 2:
            continue
        overlaps = _overlaps(boxes, rows, part)
        if method == LINEAR:
            factors = np.where(overlaps > iou_thr, 1 - overlaps, 1.0)
        else:  # by numpy: compiled exp differs from it in the last bit
            factors = np.exp(-(overlaps * overlaps) / sigma)
        _decay(factors, scores, rows, part, order, values)
    kept = values > thresh
    starts = np.append(0, np.cumsum(kept))[groups[firsts]]
    rows = order[kept]
    return Fused(boxes[rows], values[kept] if decayed else scores[rows], batch.labels[rows], starts)


def fuse_nmw(batch, weights=None, iou_thr=0.55, skip_box_thr=0.0):
    """Apply `non_maximum_weighted` to each image of a checked `batches.Batch`; returns `batches.Fused`, float32."""
    check_iou(iou_thr)
    weights = check_weights(weights, batch.n_models)
    weights = (weights / weights.max()).astype(np.float64)
    skip = check_skip(skip_box_thr, batch.n_models)
    rows, scores, groups, firsts = grouped(*batch[:5], weights, skip, False)
    order = ranked(scores, groups)
    rows, scores = rows[order], scores[order]
    boxes, leaders, starts = _weighted(np.clip(batch.boxes, 0, 1), rows, scores, groups, firsts, float(iou_thr), SINGLE)
    if len(starts) == 0:
        raise InputError("a box of score 0 has no weighted mean: set skip_box_thr above 0")
    scores = scores[leaders].astype(np.float32)
    order = ranked(scores, starts)
    return Fused(boxes[order], scores[order], batch.labels[rows[leaders[order]]], starts)


def first_boxes(boxes, starts, iou_thr):
    """Keep the first of overlapping boxes within groups; arguments and results of `wbf.mean_boxes`."""
    keepers = _keepers(boxes, np.arange(len(boxes)), starts, float(iou_thr))
    kept, cluster = np.unique(keepers, return_inverse=True)
    return boxes[kept], cluster.reshape(-1)


def _by_class(batch, weights):
    scores = batch.scores
    if weights is not None:
        weights = check_weights(weights, batch.n_models)
        scores = scores * weights[batch.models] / weights.sum()
    nothing = np.full(batch.n_models, -np.inf)
    rows, _, groups, firsts = grouped(*batch[:5], np.ones(batch.n_models), nothing, True)
    return scores, rows, groups, firsts


@njit(cache=True, nogil=True)
def _argsort(keys):
    return np.argsort(keys)


@njit(cache=True, nogil=True, error_model="numpy")
def _iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


@njit(cache=True, nogil=True)
def _keepers(boxes, rows, groups, iou_thr):
    """For each entry of `rows`, best first in its group, the entry that suppressed it, or itself where it is kept."""
    keepers = np.full(len(rows), -1, np.int64)
    for group in range(len(groups) - 1):
        for i in range(groups[group], groups[group + 1]):
            if keepers[i] >= 0:
                continue
            keepers[i] = i
            for j in range(i + 1, groups[group + 1]):
                if keepers[j] < 0 and _iou(boxes[rows[i]], boxes[rows[j]]) > iou_thr:
                    keepers[j] = i
    return keepers


@njit(cache=True, nogil=True)
def _overlaps(boxes, rows, groups):
    """IoU of all pairs of boxes within each group, one square after the other."""
    n = 0
    for group in range(len(groups) - 1):
        n += (groups[group + 1] - groups[group]) ** 2
    overlaps, at = np.empty(n), 0
    for group in range(len(groups) - 1):
        begin, size = groups[group], groups[group + 1] - groups[group]
        square = overlaps[at : at + size * size].reshape(size, size)
        for i in range(size):
            for j in range(i, size):
                square[i, j] = square[j, i] = _iou(boxes[rows[begin + i]], boxes[rows[begin + j]])
        at += size * size
    return overlaps


@njit(cache=True, nogil=True)
def _decay(factors, scores, rows, groups, order, values):
    """Write the rows of each group as they are taken, and their scores when the last has been taken."""
    at = 0
    for group in range(len(groups) - 1):
        begin, size = groups[group], groups[group + 1] - groups[group]
        square = factors[at : at + size * size].reshape(size, size)
        place, value = np.arange(size), scores[rows[begin : begin + size]]
        for i in range(size):
            best = i
            for j in range(i + 1, size):
                if value[j] > value[best]:
                    best = j
            place[i], place[best] = place[best], place[i]
            value[i], value[best] = value[best], value[i]
            for j in range(i + 1, size):
                value[j] *= square[place[i], place[j]]
        for i in range(size):
            order[begin + i], values[begin + i] = rows[begin + place[i]], value[i]
        at += size * size


@njit(cache=True, nogil=True, error_model="numpy")
def _weighted(boxes, rows, scores, groups, firsts, iou_thr, single):
    """Return the means, the entry of `rows` that leads each, and the starts of the images, none where a sum is 0."""
    sums, conf = np.zeros((len(rows), 4), np.float32), np.zeros(len(rows))
    leaders, starts, count = np.empty(len(rows), np.int64), np.zeros(len(firsts), np.int64), 0
    for image in range(len(firsts) - 1):
        for group in range(firsts[image], firsts[image + 1]):
            first = count
            for i in range(groups[group], groups[group + 1]):
                best, found = iou_thr, -1
                for k in range(first, count):
                    iou = _iou(boxes[rows[leaders[k]]], boxes[rows[i]])
                    if iou > best:
                        best, found = iou, k
                if found < 0:
                    found, count = count, count + 1
                    leaders[found] = i
                weight = scores[i] * _iou(boxes[rows[i]], boxes[rows[leaders[found]]])
                conf[found] += weight
                for d in range(4):
                    sums[found, d] = np.float32(np.float64(sums[found, d]) + weight * boxes[rows[i], d])
        starts[image + 1] = count
    for k in range(count):
        divisor = np.float64(np.float32(conf[k])) if single else conf[k]
        if divisor == 0.0:
            return sums, leaders, starts[:0]
        for d in range(4):
            sums[k, d] = np.float32(np.float64(sums[k, d]) / divisor)
    return sums[:count], leaders[:count], starts
