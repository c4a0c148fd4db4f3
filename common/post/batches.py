"""Boxes of many images as flat arrays: checked, grouped by class and sorted, for every fusion method."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from common import processes
from common.errors import InputError
from common.jit import compiled

# numpy 1 divides a float32 array by a float64 scalar in float32, numpy 2 in float64. Compiled code gets this as an
# argument, because a constant would stay in numba's cache after a change of numpy.
SINGLE = bool(np.result_type(np.zeros(1, np.float32), np.float64(1)) == np.float32)
_ROWS = 1 << 15  # boxes fused at a time, few enough for the processor's cache


class Batch(NamedTuple):
    """Boxes of several models on several images, sorted by image, then by model.

    boxes: float64 (n, 4) in [0, 1]; scores: float64 (n,) >= 0; labels and models: int64 (n,); starts: int64
    (images + 1,), the rows of image i being starts[i] … starts[i+1]-1; n_models: int, models without a box included.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    models: np.ndarray
    starts: np.ndarray
    n_models: int


class Fused(NamedTuple):
    """Fused boxes, scores, labels and starts, shaped as in `Batch`, in the order of ensemble_boxes."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    starts: np.ndarray


def fuse_in_portions(fuse, starts, threads=None):
    """Call `fuse(first image, last image + 1)` on portions of the images in threads and join the arrays it returns."""
    begins = np.unique([0, *np.searchsorted(starts, np.arange(0, starts[-1], _ROWS))])
    with ThreadPoolExecutor(threads or processes.cores()) as pool:
        parts = pool.map(fuse, begins, np.append(begins[1:], len(starts) - 1))
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def check_weights(weights, n_models):
    """Return one positive weight per model, ones for None; raise InputError otherwise."""
    if weights is None:
        return np.ones(n_models)
    weights = np.asarray(weights)
    if weights.shape != (n_models,) or weights.dtype.kind not in "fiu":
        raise InputError(f"need {n_models} weights, one number per model, not {weights.tolist()}")
    if not ((weights > 0) & (weights < np.inf)).all():
        raise InputError(f"weights must be positive: leave out a model instead of giving it 0, not {weights.tolist()}")
    return weights


def check_iou(iou_thr):
    """Raise InputError unless `iou_thr` lies in [0, 1]."""
    if not 0 <= iou_thr <= 1:
        raise InputError(f"iou_thr must lie in [0, 1], not {iou_thr!r}")


def rank_rows(keys, starts, argsort=np.ndarray.argsort):
    """Return the order that sorts `keys` (n,) within each group, largest first, ties as ensemble_boxes has them."""
    order = np.empty(len(keys), np.int64)
    for begin, end in itertools.pairwise(starts.tolist()):
        order[begin:end] = argsort(keys[begin:end])[::-1]
    return order + np.repeat(starts[:-1], np.diff(starts))


@compiled
def group_rows(boxes, scores, labels, models, starts, weights, by_label):
    """Return rows by class, without empty boxes, scores × weights, starts of groups, and each image's first group."""
    rows, weighted = np.empty(len(boxes), np.int64), np.empty(len(boxes))
    groups = np.zeros(len(boxes) + 1, np.int64)
    firsts = np.zeros(len(starts), np.int64)
    most = 0
    for image in range(len(starts) - 1):
        most = max(most, starts[image + 1] - starts[image])
    slot, seen, ends = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64)
    n_groups = end = 0
    for image in range(len(starts) - 1):
        begin, classes = starts[image], 0
        for row in range(begin, starts[image + 1]):
            x1, y1 = min(max(boxes[row, 0], 0.0), 1.0), min(max(boxes[row, 1], 0.0), 1.0)
            x2, y2 = min(max(boxes[row, 2], 0.0), 1.0), min(max(boxes[row, 3], 0.0), 1.0)
            slot[row - begin] = -1
            if (x2 - x1) * (y2 - y1) == 0.0:
                continue
            found = 0
            while found < classes and seen[found] != labels[row]:
                found += 1
            if found == classes:
                seen[found], ends[found] = labels[row], 0
                classes += 1
            slot[row - begin] = found
            ends[found] += 1
        order = np.argsort(seen[:classes]) if by_label else np.arange(classes)
        for k in order:
            groups[n_groups] = end
            n_groups += 1
            end += ends[k]
            ends[k] = groups[n_groups - 1]
        for row in range(begin, starts[image + 1]):
            found = slot[row - begin]
            if found >= 0:
                rows[ends[found]], weighted[ends[found]] = row, scores[row] * weights[models[row]]
                ends[found] += 1
        firsts[image + 1] = n_groups
    groups[n_groups] = end
    return rows[:end], weighted[:end], groups[: n_groups + 1], firsts


@compiled
def sort_by(keys, rows, n_keys):
    """Return (rows by keys[row], int64 (n_keys + 1,) where each key in [0, n_keys) starts): a stable counting sort."""
    starts = np.zeros(n_keys + 1, np.int64)
    for row in rows:
        starts[keys[row] + 1] += 1
    for key in range(n_keys):
        starts[key + 1] += starts[key]
    free, out = starts[:-1].copy(), np.empty_like(rows)
    for row in rows:
        out[free[keys[row]]] = row
        free[keys[row]] += 1
    return out, starts
