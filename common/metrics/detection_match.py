"""Matching of detections and true boxes, independent of the order of the rows in their tables."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from common.errors import InputError
from common.jit import compiled
from common.post.batches import sort_by
from common.post.boxes import iou
from common.post.tables import read_boxes, refuse_repeated, require_columns


@dataclass(frozen=True, eq=False)
class Boxes:
    """A table as arrays in the order of its rows, and the rows sorted into groups of one image and class.

    image, class_id: int64 (n,); box: float64 (n, 4); score: float64 (n,), None for the truth. rows: int64 (m,), by
    image, class and falling score; group g = image × n_classes + class holds rows[starts[g] : starts[g + 1]]. ranked:
    the same rows by class and falling score, class c from class_starts[c] on; None for the truth.
    """

    image: np.ndarray
    class_id: np.ndarray
    box: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    score: np.ndarray | None = None
    ranked: np.ndarray | None = None
    class_starts: np.ndarray | None = None


def read_tables(detections, truth, images, rule):
    """Return (image ids as an Index, Boxes of the detections, Boxes of the truth) under `rule`, a detection.Rule.

    images: unique ids of all images; None for those of the truth. Raises InputError for tables that are incomplete or
    contradict the rule or each other.
    """
    if images is None:
        require_columns("truth", truth, ["image_id"])
        images = pd.Index(truth["image_id"].unique()).dropna().sort_values()
    images = pd.Index(images)
    if not len(images) or images.hasnans or not images.is_unique:
        raise InputError("images: need at least one, each named once")
    return images, _detections(detections, images, rule), _truth(truth, images, rule)


def _detections(table, images, rule):
    image, class_id, box, score = read_boxes("detections", table, images, rule.no_finding, rule.n_classes, highest=1.0)
    group, n_groups = image * rule.n_classes + class_id, len(images) * rule.n_classes
    if rule.tied_as_listed:
        ranked, _ = sort_by(image, np.arange(len(image)), len(images))
        ranked = ranked[np.argsort(-score[ranked], kind="stable")]
        rows, starts = sort_by(group, ranked, n_groups)
    else:
        ranked = np.argsort(-score)
        rows, starts = sort_by(group, ranked, n_groups)
        _order_ties(rows, group, score, box)
    if rule.max_per_class is not None:
        kept, ranks = np.ones(len(rows), bool), np.arange(len(rows)) - np.repeat(starts[:-1], np.diff(starts))
        kept[rows[ranks >= rule.max_per_class]] = False
        rows, ranked = rows[kept[rows]], ranked[kept[ranked]]
        starts = np.append(0, np.cumsum(np.bincount(group[rows], minlength=n_groups)))
    return Boxes(image, class_id, box, rows, starts, score, *sort_by(class_id, ranked, rule.n_classes))


def _truth(table, images, rule):
    image, class_id, box, _ = read_boxes("truth", table, images, rule.no_finding, rule.n_classes, scored=False)
    for row in np.flatnonzero((box[:, 2:] == box[:, :2]).any(axis=1))[:1]:
        raise InputError(f"truth, row {row}, image {table['image_id'].iloc[row]}: the box has no area")
    if rule.no_finding is not None:
        refuse_repeated("truth", table, image, np.flatnonzero(class_id == rule.no_finding), rule.no_finding)
    group = image * rule.n_classes + class_id
    rows, starts = sort_by(group, np.arange(len(group)), len(images) * rule.n_classes)
    if not rule.tied_as_listed:
        _order_ties(rows, group, np.zeros(len(group)), box)
    return Boxes(image, class_id, box, rows, starts)


def _order_ties(rows, group, score, box):
    """Sort, in place, neighbouring rows of one group and score by their boxes, equal boxes by row."""
    groups, scores = group[rows], score[rows]
    tied = (groups[1:] == groups[:-1]) & (scores[1:] == scores[:-1])
    if tied.any():
        places = np.flatnonzero(np.append(False, tied) | np.append(tied, False))
        some = rows[places]
        rows[places] = some[np.lexsort((some, *box[some].T[::-1], -scores[places], groups[places]))]


def match(found_by, true, rule):
    """Return int64 (n,): for each detection of `found_by` (Boxes) the row of the box of `true` that it found, or -1."""
    taken, truth_row = np.zeros(len(true.image), bool), np.full(len(found_by.image), -1)
    _match(
        *(found_by.rows, found_by.starts, found_by.box, true.rows, true.starts, true.box, taken, truth_row),
        *(rule.iou_threshold, rule.inclusive, rule.best_unmatched, rule.tied_as_listed),
    )
    return truth_row


@compiled
def _match(rows, starts, box, true_rows, true_starts, true_box, taken, truth_row, least, inclusive, unmatched, last):
    for group in range(len(starts) - 1):
        candidates = true_rows[true_starts[group] : true_starts[group + 1]]
        for row in rows[starts[group] : starts[group + 1]] if len(candidates) else rows[:0]:
            best, best_iou = -1, 0.0
            for candidate in candidates:
                if unmatched and taken[candidate]:
                    continue
                overlap = iou(box[row], true_box[candidate])
                if overlap > best_iou or (last and overlap == best_iou):
                    best, best_iou = candidate, overlap
            if best >= 0 and not taken[best] and (best_iou > least or (inclusive and best_iou == least)):
                taken[best], truth_row[row] = True, best
