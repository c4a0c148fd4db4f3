"""Compiled NMS, soft-NMS and non-maximum weighting; results for float64 equal ensemble_boxes 1.0.9 bit for bit."""

import math

import numpy as np

from common.errors import check
from common.jit import compiled
from common.post.batches import Fused, check_iou, check_weights, group_rows, rank_groups, rank_rows
from common.post.boxes import iou


def fuse_nms(batch, weights=None, iou_thr=0.5):
    """Return `Fused`: the boxes of a `Batch` except those that a better box of the class overlaps by > iou_thr."""
    check_iou(iou_thr)
    scores, rows, groups, firsts = _by_class(batch, weights)
    rows = rows[rank_rows(scores[rows], groups, _argsort)]
    boxes = np.clip(batch.boxes, 0, 1)
    kept = _find_keepers(boxes, rows, groups, float(iou_thr)) == np.arange(len(rows))
    starts, rows = np.append(0, np.cumsum(kept))[groups[firsts]], rows[kept]
    return Fused(boxes[rows], scores[rows], batch.labels[rows], starts)


def fuse_soft_nms(batch, weights=None, iou_thr=0.5, sigma=0.5, thresh=0.001, decayed=False):
    """Return `Fused`: better boxes decay a score by exp(-IoU² / sigma); under `thresh`, drop it (Bodla 2017).

    iou_thr has no effect. decayed: return the decayed scores; ensemble_boxes returns the original ones.
    """
    check_iou(iou_thr)
    check(sigma > 0 and np.isfinite(thresh), f"cannot use sigma {sigma!r} (must be > 0), thresh {thresh!r}")
    scores, rows, groups, firsts = _by_class(batch, weights)
    boxes = np.clip(batch.boxes, 0, 1)
    order, values = _decay_scores(boxes, scores, rows, groups, float(sigma))
    kept = values > thresh
    starts = np.append(0, np.cumsum(kept))[groups[firsts]]
    rows = order[kept]
    return Fused(boxes[rows], values[kept] if decayed else scores[rows], batch.labels[rows], starts)


def fuse_nmw(batch, weights=None, iou_thr=0.55):
    """Return `Fused`, float32: boxes averaged with the best box of IoU > iou_thr, with weights score × IoU.

    The score is the best box's. Raises InputError if overlapping boxes all have the score 0. Source: Zhou et al. 2017.
    """
    check_iou(iou_thr)
    weights = check_weights(weights, batch.n_models)
    weights = (weights / weights.max()).astype(np.float64)
    rows, scores, groups, firsts = rank_groups(batch, weights)
    boxes, leaders, starts = _average(np.clip(batch.boxes, 0, 1), rows, scores, groups, firsts, float(iou_thr))
    check(len(starts) != 0, "a box of score 0 has no weighted mean: leave out boxes of score 0")
    scores = scores[leaders].astype(np.float32)
    order = rank_rows(scores, starts)
    return Fused(boxes[order], scores[order], batch.labels[rows[leaders[order]]], starts)


def first_boxes(boxes, starts, iou_thr):
    """Keep the first of overlapping boxes in each group; arguments and results as for `wbf.mean_boxes`."""
    keepers = _find_keepers(boxes, np.arange(len(boxes)), starts, float(iou_thr))
    kept, cluster = np.unique(keepers, return_inverse=True)
    return boxes[kept], cluster.reshape(-1)


def _by_class(batch, weights):
    scores = batch.scores
    if weights is not None:
        weights = check_weights(weights, batch.n_models)
        scores = scores * weights[batch.models] / weights.sum()
    rows, _, groups, firsts = group_rows(batch, np.ones(batch.n_models), True)
    return scores, rows, groups, firsts


@compiled
def _argsort(keys):
    return np.argsort(keys)


@compiled
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


@compiled
def _decay_scores(boxes, scores, rows, groups, sigma):
    """Return the rows of each group in the order in which they are chosen, and their final scores."""
    order, values = np.empty_like(rows), np.empty(len(rows))
    for group in range(len(groups) - 1):
        begin, size = groups[group], groups[group + 1] - groups[group]
        place, value = rows[begin : begin + size].copy(), scores[rows[begin : begin + size]]
        for i in range(size):
            best = i
            for j in range(i + 1, size):
                if value[j] > value[best]:
                    best = j
            place[i], place[best] = place[best], place[i]
            value[i], value[best] = value[best], value[i]
            for j in range(i + 1, size):
                overlap = iou(boxes[place[i]], boxes[place[j]])
                value[j] *= math.exp(-(overlap * overlap) / sigma)
        order[begin : begin + size], values[begin : begin + size] = place, value
    return order, values


@compiled(error_model="numpy")
def _average(boxes, rows, scores, groups, firsts, iou_thr):
    """Return the means, each one's best entry of `rows`, and the starts of images (empty if scores sum to 0)."""
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
        if conf[k] == 0.0:
            return sums, leaders, starts[:0]
        for d in range(4):
            sums[k, d] = np.float32(np.float64(sums[k, d]) / conf[k])
    return sums[:count], leaders[:count], starts
