"""Compiled weighted boxes fusion (Solovyev, Wang and Gabruseva 2021) for thousands of images at once.

Results equal ensemble_boxes 1.0.9 bit for bit; with 8 or more models, sums of weights may differ in the last bit.
"""

import numpy as np

from common.errors import check
from common.jit import compiled
from common.post.batches import Fused, check_iou, check_weights, rank_groups, rank_rows

CONF_TYPES = ("avg", "max", "box_and_model_avg", "absent_model_aware_avg")
_AVG, _MAX, _BOX_AND_MODEL, _ABSENT = range(4)


def fuse_wbf(batch, weights=None, iou_thr=0.55, conf_type="avg"):
    """Return `Fused`: in each image of a `Batch`, boxes of a class with IoU > iou_thr become their weighted mean.

    weights: one positive number per model. Raises InputError if overlapping boxes all have the score 0.
    """
    weights = check_weights(weights, batch.n_models)
    check_iou(iou_thr)
    check(conf_type in CONF_TYPES, f"conf_type must be one of {', '.join(CONF_TYPES)}, not {conf_type!r}")
    rule = CONF_TYPES.index(conf_type)
    total = float(weights.max() if rule == _MAX else weights.sum())
    weights = weights.astype(np.float64)
    rows, least = rank_groups(batch, weights), float(iou_thr)
    boxes, scores, member, starts, _ = _cluster(batch.boxes, batch.models, weights, total, *rows, least, rule, 1.0)
    check(len(starts) != 0, "two overlapping boxes of score 0 have no weighted mean: leave out boxes of score 0")
    order = rank_rows(scores, starts)
    return Fused(boxes.take(order, axis=0), scores[order], batch.labels[member[order]], starts)


def mean_boxes(boxes, starts, iou_thr):
    """Average overlapping boxes (n, 4) of equal score, group by group: each joins the mean with the highest IoU.

    boxes: float64 (n, 4) >= 0 in any unit; starts: int64 (groups + 1,). Returns the means, float64 (m, 4), in the order
    of the groups, and the number of each box's mean, int64 (n,).

    >>> boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 12], [50, 50, 60, 60]])
    >>> mean_boxes(boxes, np.array([0, 3]), 0.5)[0].tolist()
    [[0.0, 0.0, 10.0, 11.0], [50.0, 50.0, 60.0, 60.0]]
    """
    n = len(boxes)
    rows, models, firsts = np.arange(n), np.zeros(n, np.int64), np.arange(len(starts))
    fused = _cluster(boxes, models, np.ones(1), 1.0, rows, np.ones(n), starts, firsts, float(iou_thr), _AVG, np.inf)
    return fused[0], fused[-1]


@compiled(error_model="numpy")
def _cluster(boxes, models, weights, total, rows, scores, groups, firsts, iou_thr, rule, limit):
    """Fuse each group, whose rows are sorted by weighted score, best first; boxes are clipped to 0 … limit.

    Returns boxes, scores, one row of each cluster, the first cluster of each image (none if the scores of a cluster sum
    to 0), and the cluster of each entry of `rows`.
    """
    n = len(rows)
    fused, area, sums = np.empty((n, 4)), np.empty(n), np.empty((n, 4), np.float32)
    conf, weight, top, size = np.empty(n), np.empty(n), np.empty(n), np.empty(n, np.int64)
    member, cluster = np.empty(n, np.int64), np.empty(n, np.int64)
    starts, box = np.zeros(len(firsts), np.int64), np.empty(4)
    count = 0
    for image in range(len(firsts) - 1):
        for group in range(firsts[image], firsts[image + 1]):
            first = count
            for i in range(groups[group], groups[group + 1]):
                score, model_weight = scores[i], weights[models[rows[i]]]
                for d in range(4):
                    box[d] = min(max(boxes[rows[i], d], 0.0), limit)
                k = _best_match(fused, area, first, count, box, iou_thr)
                if k < 0:
                    k, count = count, count + 1
                    conf[k] = weight[k] = top[k] = 0.0
                    sums[k] = 0.0
                    member[k], size[k] = rows[i], 0
                cluster[i] = k
                size[k] += 1
                conf[k] += score
                weight[k] += model_weight
                top[k] = max(top[k], score)
                alone = size[k] == 1  # a single box keeps its float64 coordinates
                if conf[k] == 0.0 and not alone:
                    return fused, conf, member, starts[:0], cluster
                for d in range(4):
                    sums[k, d] = np.float32(np.float64(sums[k, d]) + score * box[d])
                    fused[k, d] = box[d] if alone else np.float64(np.float32(np.float64(sums[k, d]) / conf[k]))
                area[k] = (fused[k, 2] - fused[k, 0]) * (fused[k, 3] - fused[k, 1])
            part = slice(groups[group], groups[group + 1])
            _rescale(conf, weight, top, size, first, count, cluster[part], models, rows[part], weights, total, rule)
        starts[image + 1] = count
    return fused[:count], conf[:count], member[:count], starts, cluster


@compiled(error_model="numpy")
def _best_match(fused, area, first, count, box, iou_thr):
    own = (box[2] - box[0]) * (box[3] - box[1])
    best, found = iou_thr, -1
    for k in range(first, count):
        # no branch for disjoint boxes: a branch misprediction costs more than the division
        width = max(min(fused[k, 2], box[2]) - max(fused[k, 0], box[0]), 0.0)
        height = max(min(fused[k, 3], box[3]) - max(fused[k, 1], box[1]), 0.0)
        common = width * height
        iou = common / (area[k] + own - common)
        if iou > best:
            best, found = iou, k
    return found


@compiled(error_model="numpy")
def _rescale(conf, weight, top, size, first, count, cluster, models, rows, weights, total, rule):
    """Turn the sums of clusters first … count-1 of a group into scores."""
    present = np.zeros((count - first if rule in (_BOX_AND_MODEL, _ABSENT) else 0, len(weights)), np.bool_)
    for i in range(len(rows) if len(present) else 0):
        present[cluster[i] - first, models[rows[i]]] = True
    for k in range(first, count):
        if size[k] > 1:  # ensemble_boxes rounds means of several boxes to float32
            conf[k] = np.float64(np.float32(top[k] if rule == _MAX else conf[k] / size[k]))
            weight[k] = np.float64(np.float32(weight[k]))
        if rule == _AVG:
            conf[k] = conf[k] * min(len(weights), size[k]) / total
        elif rule == _MAX:
            conf[k] = conf[k] / total
        elif rule == _BOX_AND_MODEL:
            conf[k] = conf[k] * size[k] / weight[k]
            conf[k] = conf[k] * weights[present[k - first]].sum() / total
        else:
            conf[k] = conf[k] * size[k] / (weight[k] + weights[~present[k - first]].sum())
