"""Boxes of one image or thousands as flat arrays: checked, gathered by class and sorted, for every way to fuse them."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numba import njit

from common.errors import InputError
from common.post.boxes import check_boxes

# numpy 1 divides a float32 array by a float64 number in float32, numpy 2 in float64. Compiled code takes it as an
# argument: its cache would keep a constant through a change of numpy.
SINGLE = bool(np.result_type(np.zeros(1, np.float32), np.float64(1)) == np.float32)
_LARGEST = 2**24  # class ids stay whole numbers in float32 up to here
_ROWS = 1 << 15  # boxes fused together: what they need stays in the processor's cache


class Batch(NamedTuple):
    """Boxes of several models on several images, the rows of an image together, those of its first model first.

    boxes: float64 (n, 4) in [0, 1]; scores: float64 (n,) from 0; labels and models: int64 (n,); starts: int64
    (images + 1,), image i having rows starts[i] … starts[i+1]-1; n_models: int, those without a box included.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    models: np.ndarray
    starts: np.ndarray
    n_models: int


class Fused(NamedTuple):
    """Boxes, scores, labels and starts after a fusion, shaped as in `Batch`, in the order of ensemble_boxes."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    starts: np.ndarray


def in_portions(fuse, starts, threads=None):
    """Join the tuples of arrays that `fuse(first image, last image + 1)` gives for some images at a time.

    starts: as in `Batch`. threads: None for one a core; the result is the same for any number.
    """
    begins = np.unique([0, *np.searchsorted(starts, np.arange(0, starts[-1], _ROWS))])
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        parts = pool.map(fuse, begins, np.append(begins[1:], len(starts) - 1))
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def one_image(boxes_list, scores_list, labels_list, skip_box_thr=0.0):
    """Check the lists of one image and join them; returns (Batch, score limit: a number, or one for each model)."""
    n = len(boxes_list)
    if n == 0 or len(scores_list) != n or len(labels_list) != n:
        raise InputError(f"{n} models' boxes, {len(scores_list)} models' scores, {len(labels_list)} models' labels")
    scores = [np.asarray(part) for part in scores_list]
    labels = [np.asarray(part) for part in labels_list]
    counts = [len(part) for part in boxes_list]
    for model, count in enumerate(counts):
        if scores[model].shape != (count,) or labels[model].shape != (count,):
            shapes = f"scores {scores[model].shape}, labels {labels[model].shape}"
            raise InputError(f"model {model}: {count} boxes, {shapes}: need as many of each")
        if scores[model].dtype.kind not in "fiu":
            raise InputError(f"model {model}: scores must be numbers, not {scores[model].dtype}")
    skip = 0.0
    if skip_box_thr:  # numpy 2 compares one float32 with a plain number in float32
        skip = [np.result_type(part.dtype.type(0), skip_box_thr).type(skip_box_thr) for part in scores]

    def where(row):
        model = np.searchsorted(np.cumsum(counts), row, side="right")
        return f"model {model}, box {row - sum(counts[:model])}"

    def joined(parts, empty):
        return np.concatenate([part for part in parts if len(part)] or [empty])

    outside = "lies outside [0, 1]: divide by the image's width and height"
    boxes = check_boxes(joined(boxes_list, np.zeros((0, 4))), where, (1, 1), outside)
    scores = check_scores(joined(scores, np.zeros(0)), where)
    labels = check_labels(joined(labels, np.zeros(0, np.int64)), where)
    models = np.repeat(np.arange(n), counts)
    return Batch(boxes, scores, labels, models, np.array([0, len(boxes)]), n), skip


def check_scores(scores, where):
    """Return numbers (n,) as float64; InputError for what is not finite or negative."""
    scores = np.ascontiguousarray(scores, np.float64)
    if len(scores) and not (scores.min() >= 0 and scores.max() < np.inf):
        row = int(np.argmin((scores >= 0) & (scores < np.inf)))
        raise InputError(f"{where(row)}: score {scores[row]:g} is not a finite number from 0")
    return scores


def check_labels(labels, where):
    """Return labels as int64 (n,); InputError for what is not a whole number."""
    if labels.dtype.kind not in "fiu":
        raise InputError(f"{where(0)}: class ids must be whole numbers, not {labels.dtype}")
    if labels.dtype.kind != "f":
        return labels.astype(np.int64)
    fits = (np.floor(labels) == labels) & (np.abs(labels) < _LARGEST)
    if not fits.all():
        row = int(np.argmin(fits))
        raise InputError(f"{where(row)}: class id {labels[row]:g} is not a whole number")
    return labels.astype(np.int64)


def check_weights(weights, n_models):
    """Return one positive weight for each model, ones for None; InputError otherwise."""
    if weights is None:
        return np.ones(n_models)
    weights = np.asarray(weights)
    if weights.shape != (n_models,) or weights.dtype.kind not in "fiu":
        raise InputError(f"need {n_models} weights, a number for each model, not {weights.tolist()}")
    if not ((weights > 0) & (weights < np.inf)).all():
        raise InputError(f"weights must be positive: leave a model out rather than give it 0, not {weights.tolist()}")
    return weights


def check_iou(iou_thr):
    """Raise InputError unless `iou_thr` lies in [0, 1]."""
    if not 0 <= iou_thr <= 1:
        raise InputError(f"iou_thr must lie in [0, 1], not {iou_thr!r}")


def check_skip(skip_box_thr, n_models):
    """Return the score limit for each model, float64 (models,); InputError for NaN."""
    skip = np.full(n_models, skip_box_thr, np.float64)
    if np.isnan(skip).any():
        raise InputError("skip_box_thr must be a number, not NaN")
    return skip


def ranked(keys, starts, argsort=np.ndarray.argsort):
    """Order that sorts `keys` (n,) within each group, largest first, equal ones as `argsort` leaves them, reversed.

    Both numpy's and numba's sort are unstable: where equal keys end depends on their number and on the processor.
    """
    order = np.empty(len(keys), np.int64)
    for begin, end in itertools.pairwise(starts.tolist()):
        order[begin:end] = argsort(keys[begin:end])[::-1]
    return order + np.repeat(starts[:-1], np.diff(starts))


@njit(cache=True, nogil=True)
def grouped(boxes, scores, labels, models, starts, weights, skip, by_label):
    """Gather the rows of each class of each image, in order; rows under `skip` or without area are left out.

    weights and skip: float64 (models,). Classes come by their number if `by_label`, else as they first appear. Returns
    (rows, their scores × weights, starts of the groups, first group of each image).
    """
    rows, weighted = np.empty(len(boxes), np.int64), np.empty(len(boxes))
    groups = np.zeros(len(boxes) + 1, np.int64)
    firsts = np.zeros(len(starts), np.int64)
    most = 0
    for image in range(len(starts) - 1):
        most = max(most, starts[image + 1] - starts[image])
    slot, seen, ends = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64)
    recent = np.zeros(64, np.int64)  # where a class was found last, by its lowest bits
    n_groups = end = 0
    for image in range(len(starts) - 1):
        begin, classes = starts[image], 0
        for row in range(begin, starts[image + 1]):
            x1, y1 = min(max(boxes[row, 0], 0.0), 1.0), min(max(boxes[row, 1], 0.0), 1.0)
            x2, y2 = min(max(boxes[row, 2], 0.0), 1.0), min(max(boxes[row, 3], 0.0), 1.0)
            slot[row - begin] = -1
            if scores[row] < skip[models[row]] or (x2 - x1) * (y2 - y1) == 0.0:
                continue
            found = recent[labels[row] & 63]
            if found >= classes or seen[found] != labels[row]:
                found = 0
                while found < classes and seen[found] != labels[row]:
                    found += 1
                recent[labels[row] & 63] = found
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
