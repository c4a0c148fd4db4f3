"""Non-maximum suppression, soft-NMS and non-maximum weighting, compiled, for thousands of images at once.

Results equal ensemble_boxes 1.0.9 bit for bit on float64 input.
"""

import numpy as np
from numba import njit

from common.errors import InputError
from common.post.batches import SINGLE, Fused, check_iou, check_weights, group_rows, rank_rows
from common.post.boxes import iou


def fuse_nms(batch, weights=None, iou_thr=0.5):
    """Return `Fused`: the boxes of a `Batch` without those that overlap a better one of their class by IoU > iou_thr.

    weights: one positive number per model; scores are multiplied by the model's share of the sum. The boxes of an image
    are sorted by class, then best first.
    """
    check_iou(iou_thr)
    scores, rows, groups, firsts = _by_class(batch, weights)
    order = rank_rows(scores[rows], groups, _argsort)
    boxes = np.clip(batch.boxes, 0, 1)
    keepers = _find_keepers(boxes, rows[order], groups, float(iou_thr))
    kept = keepers == np.arange(len(keepers))
    starts = np.append(0, np.cumsum(kept))[groups[firsts]]
    rows = rows[order][kept]
    return Fused(boxes[rows], scores[rows], batch.labels[rows], starts)


def fuse_soft_nms(batch, weights=None, iou_thr=0.5, sigma=0.5, thresh=0.001, decayed=False):
    """Return `Fused`: each better box decays a score by exp(-IoU² / sigma); boxes with `thresh` or less are removed.

    weights as in `fuse_nms`; iou_thr is checked but has no effect on Gaussian decay. decayed: return the decayed
    scores; ensemble_boxes returns the original ones. Source: Bodla et al. 2017. Memory: 16 bytes per pair of boxes of
    one class on one image, one image at a time.
    """
    check_iou(iou_thr)
    if not sigma > 0 or not np.isfinite(thresh):
        raise InputError(f"cannot use sigma {sigma!r} (must be > 0), thresh {thresh!r}")
    scores, rows, groups, firsts = _by_class(batch, weights)
    boxes = np.clip(batch.boxes, 0, 1)
    order, values = np.empty_like(rows), np.empty(len(rows))
    for image in range(len(batch.starts) - 1):
        part = groups[firsts[image] : firsts[image + 1] + 1]
        if len(part) < 2:
            continue
        overlaps = _pairwise_iou(boxes, rows, part)
        factors = np.exp(-(overlaps * overlaps) / sigma)  # by numpy: compiled exp differs in the last bit
        _decay_scores(factors, scores, rows, part, order, values)
    kept = values > thresh
    starts = np.append(0, np.cumsum(kept))[groups[firsts]]
    rows = order[kept]
    return Fused(boxes[rows], values[kept] if decayed else scores[rows], batch.labels[rows], starts)


def fuse_nmw(batch, weights=None, iou_thr=0.55):
    """Return `Fused`, float32: boxes averaged with the best box they overlap by IoU > iou_thr, weighted by score × IoU.

    The score is that of the best box. weights: one positive number per model. Raises InputError if overlapping boxes
    all have the score 0. Source: Zhou et al. 2017.
    """
    check_iou(iou_thr)
    weights = check_weights(weights, batch.n_models)
    weights = (weights / weights.max()).astype(np.float64)
    rows, scores, groups, firsts = group_rows(*batch[:5], weights, False)
    order = rank_rows(scores, groups)
    rows, scores = rows[order], scores[order]
    boxes, leaders, starts = _average(np.clip(batch.boxes, 0, 1), rows, scores, groups, firsts, float(iou_thr), SINGLE)
    if len(starts) == 0:
        raise InputError("a box of score 0 has no weighted mean: leave out boxes of score 0")
    scores = scores[leaders].astype(np.float32)
    order = rank_rows(scores, starts)
    return Fused(boxes[order], scores[order], batch.labels[rows[leaders[order]]], starts)


def first_boxes(boxes, starts, iou_thr):
    """Keep the first of overlapping boxes in each group; arguments and results as in `wbf.mean_boxes`."""
    keepers = _find_keepers(boxes, np.arange(len(boxes)), starts, float(iou_thr))
    kept, cluster = np.unique(keepers, return_inverse=True)
    return boxes[kept], cluster.reshape(-1)


def _by_class(batch, weights):
    scores = batch.scores
    if weights is not None:
        weights = check_weights(weights, batch.n_models)
        scores = scores * weights[batch.models] / weights.sum()
    rows, _, groups, firsts = group_rows(*batch[:5], np.ones(batch.n_models), True)
    return scores, rows, groups, firsts


@njit(cache=True, nogil=True)
def _argsort(keys):
    return np.argsort(keys)


@njit(cache=True, nogil=True)
def _find_keepers(boxes, rows, groups, iou_thr):
    """Return for each entry of `rows`, best first in its group, the entry that suppresses it, or its own index."""
    keepers = np.full(len(rows), -1, np.int64)
    for group in range(len(groups) - 1):
        for i in range(groups[group], groups[group + 1]):
            if keepers[i] >= 0:
                continue
            keepers[i] = i
            for j in range(i + 1, groups[group + 1]):
                if keepers[j] < 0 and iou(boxes[rows[i]], boxes[rows[j]]) > iou_thr:
                    keepers[j] = i
    return keepers


@njit(cache=True, nogil=True)
def _pairwise_iou(boxes, rows, groups):
    """Return the IoU of all pairs of boxes in each group, as concatenated square matrices."""
    n = 0
    for group in range(len(groups) - 1):
        n += (groups[group + 1] - groups[group]) ** 2
    overlaps, at = np.empty(n), 0
    for group in range(len(groups) - 1):
        begin, size = groups[group], groups[group + 1] - groups[group]
        square = overlaps[at : at + size * size].reshape(size, size)
        for i in range(size):
            for j in range(i, size):
                square[i, j] = square[j, i] = iou(boxes[rows[begin + i]], boxes[rows[begin + j]])
        at += size * size
    return overlaps


@njit(cache=True, nogil=True)
def _decay_scores(factors, scores, rows, groups, order, values):
    """Write the rows of each group to `order` as they are chosen, and their final scores to `values`."""
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
def _average(boxes, rows, scores, groups, firsts, iou_thr, single):
    """Return the means, the best entry of `rows` in each, and the starts of the images, empty if a sum is 0."""
    sums, conf = np.zeros((len(rows), 4), np.float32), np.zeros(len(rows))
    leaders, starts, count = np.empty(len(rows), np.int64), np.zeros(len(firsts), np.int64), 0
    for image in range(len(firsts) - 1):
        for group in range(firsts[image], firsts[image + 1]):
            first = count
            for i in range(groups[group], groups[group + 1]):
                best, found = iou_thr, -1
                for k in range(first, count):
                    overlap = iou(boxes[rows[leaders[k]]], boxes[rows[i]])
                    if overlap > best:
                        best, found = overlap, k
                if found < 0:
                    found, count = count, count + 1
                    leaders[found] = i
                weight = scores[i] * iou(boxes[rows[i]], boxes[rows[leaders[found]]])
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
