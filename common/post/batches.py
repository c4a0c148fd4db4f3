"""Boxes of many images as flat arrays: checked, grouped by class and sorted, for every fusion method."""

import itertools
from typing import NamedTuple

import numpy as np
import pandas as pd

from common.errors import InputError, check
from common.jit import compiled

_ROWS = 1 << 15  # boxes fused at a time, so that they fit the processor's cache


class Batch(NamedTuple):
    """Boxes of several models on several images, sorted by image, then by model.

    boxes: float64 (n, 4) in [0, 1]; scores: float64 (n,) >= 0; labels and models: int64 (n,); starts: int64
    (images + 1,), the rows of image i being starts[i] … starts[i+1]-1; n_models: int, including models without boxes.
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


def fuse_in_portions(fuse, starts):
    """Call `fuse(first image, last image + 1)` on portions of the images and join the arrays it returns."""
    begins = np.unique([0, *np.searchsorted(starts, np.arange(0, starts[-1], _ROWS))])
    parts = list(map(fuse, begins, np.append(begins[1:], len(starts) - 1)))
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
    check(0 <= iou_thr <= 1, f"iou_thr must lie in [0, 1], not {iou_thr!r}")


def rank_rows(keys, starts, argsort=np.ndarray.argsort):
    """Return the order that sorts `keys` (n,) within each group, largest first, with ties as in ensemble_boxes."""
    order = np.empty(len(keys), np.int64)
    for begin, end in itertools.pairwise(starts.tolist()):
        order[begin:end] = argsort(keys[begin:end])[::-1]
    return order + np.repeat(starts[:-1], np.diff(starts))


def group_rows(batch, weights, by_label):
    """Return rows by class, without empty boxes, scores × weights, starts of groups, and each image's first group.

    The classes of an image are ordered by their first rows or, if `by_label`, by their numbers.
    """
    boxes = np.clip(batch.boxes, 0.0, 1.0)
    rows = np.flatnonzero((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) != 0)
    labels, n_images = batch.labels[rows] - batch.labels.min(initial=0), len(batch.starts) - 1
    most = labels.max(initial=0) + 1
    images = np.repeat(np.arange(n_images), np.diff(batch.starts))[rows]
    codes, keys = pd.factorize(images * most + labels, sort=by_label)
    order, groups = sort_by(codes, np.arange(len(codes)), len(keys))
    rows = rows[order]
    firsts = np.searchsorted(keys // most, np.arange(n_images + 1))
    return rows, batch.scores[rows] * weights[batch.models[rows]], groups, firsts


def rank_groups(batch, weights):
    """Return what `group_rows` does, by first rows, with each group sorted by weighted score, best first."""
    rows, scores, groups, firsts = group_rows(batch, weights, False)
    order = rank_rows(scores, groups)
    return rows[order], scores[order], groups, firsts


@compiled
def sort_by(keys, rows, n_keys):
    """Return (rows by keys[row], int64 (n_keys + 1,) where each key in [0, n_keys) starts): a stable counting sort."""
    starts = np.zeros(n_keys + 1, np.int64)
    for row in rows:
        starts[keys[row] + 1] += 1
    starts = np.cumsum(starts)
    free, out = starts[:-1].copy(), np.empty_like(rows)
    for row in rows:
        out[free[keys[row]]] = row
        free[keys[row]] += 1
    return out, starts
