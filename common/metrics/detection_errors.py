"""Detection errors and the AP that each kind costs: TIDE (Bolya et al. 2020), with any matching rule.

For a false positive, "same" is its highest IoU with the image's true boxes of its class, "other" its highest IoU with
those of other classes, t the rule's threshold and b the background's. The first condition that holds names the error:
localisation    b <= same, not over t: right class, badly placed. Correction: replace its box by the true one.
classification  other over t: well placed, wrong class. Correction: replace its class by the true box's.
duplicate       same over t, but a detection of higher score found the box. Correction: remove it.
background      neither reaches b: nothing is there. Correction: remove it.
both            b <= other: badly placed and wrong class. Correction: remove it.
missed          a true box that no detection found and no localisation or classification error points to. Correction:
                remove the true box; a class left without true boxes keeps its AP.
If several localisation and classification errors point to one true box, only the one with the highest score (if equal,
the localisation) is corrected as above; the others, and those that point to a box already found, are removed.
The gain of an error is the AP with only this kind corrected minus the actual AP; gains do not add up to 1 - AP.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from common.errors import InputError, check
from common.jit import compiled
from common.metrics.classification import mean_of_defined
from common.metrics.detection import VOC2010, class_aps, match, read_tables
from common.post.boxes import iou

ERRORS = ("localisation", "classification", "duplicate", "background", "both", "missed")
NAMES = np.array(["correct", *ERRORS, None], object)  # in this file, errors are positions in NAMES
CORRECT, LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND, BOTH, MISSED, LEFT_OUT = range(len(NAMES))


@dataclass(frozen=True, eq=False)
class Breakdown:
    """The errors of a table of detections.

    summary: DataFrame by error: count (of the counted classes) and ap_gained (of the mean AP). gains: float64
    DataFrame, AP gained by class_id × error. detections: image_id, class_id, score, error ("correct" for none, missing
    for rows that the rule leaves out), truth_row (the true box, -1 for none). truth: image_id, class_id, error.
    """

    summary: pd.DataFrame
    gains: pd.DataFrame
    detections: pd.DataFrame
    truth: pd.DataFrame


def error_breakdown(detections, truth, images=None, rule=VOC2010, background_iou=0.1):
    """Return the Breakdown: the error of every detection and true box, and the AP gained by correcting each kind.

    Tables and errors raised as in `detection.evaluate`; background_iou: in (0, rule.iou_threshold).
    """
    if not 0 < background_iou < rule.iou_threshold:
        raise InputError(f"background_iou must lie between 0 and {rule.iou_threshold}, not {background_iou}")
    images, boxes, true = read_tables(detections, truth, images, rule)
    check(np.isin(true.class_id, rule.counted_classes).any(), "the truth has no box of the counted classes")
    error, target = _errors(boxes, true, match(boxes, true, rule), rule, background_iou)
    state = np.full(len(true.image), MISSED)
    for kind in (CLASSIFICATION, LOCALISATION, CORRECT):  # later kinds override earlier ones
        state[target[error == kind]] = kind
    before = _aps(boxes, true, boxes.class_id, error == CORRECT, error != LEFT_OUT, np.ones(len(state)), rule)
    after = [_corrected(boxes, true, error, target, state, kind, rule) for kind in range(1, LEFT_OUT)]
    gains = [np.where(np.isnan(aps), before, aps) - before for aps in after]
    gains = pd.DataFrame(dict(zip(ERRORS, gains, strict=True)), pd.Index(rule.counted_classes, name="class_id"))
    counts = np.bincount(error[np.isin(boxes.class_id, rule.counted_classes)], minlength=len(NAMES))
    counts[MISSED] = (state[np.isin(true.class_id, rule.counted_classes)] == MISSED).sum()
    summary = {"count": counts[1:LEFT_OUT], "ap_gained": mean_of_defined(gains.to_numpy().T)}
    summary = pd.DataFrame(summary, pd.Index(ERRORS, name="error"))
    found = _table(images, boxes, score=boxes.score, error=NAMES[error], truth_row=target)
    return Breakdown(summary, gains, found, _table(images, true, error=NAMES[state]))


def _errors(boxes, true, truth_row, rule, background_iou):
    """Return the error of each detection and the row of its true box (-1 for none), int64 (n,) both."""
    same, same_row, other, other_row = _best(
        *(boxes.rows, boxes.image, boxes.class_id, boxes.box),
        *(true.rows, true.starts[:: rule.n_classes], true.class_id, true.box),
    )
    over = np.greater_equal if rule.inclusive else np.greater
    well_placed = over(same, rule.iou_threshold)
    badly_placed, nothing = (same >= background_iou) & ~well_placed, np.maximum(same, other) < background_iou
    conditions = [truth_row >= 0, badly_placed, over(other, rule.iou_threshold), well_placed, nothing]
    error = np.select(conditions, [CORRECT, LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND], BOTH)
    target = np.select(conditions, [truth_row, same_row, other_row, same_row, -1], -1)
    left_out = np.ones(len(error), bool)
    left_out[boxes.rows] = False
    error[left_out], target[left_out] = LEFT_OUT, -1
    return error, target


def _corrected(boxes, true, error, target, state, kind, rule):
    """Return the AP of each counted class with the errors of one kind corrected."""
    class_id, found, kept = boxes.class_id.copy(), error == CORRECT, (error != LEFT_OUT) & (error != kind)
    weights = np.where((state == MISSED) & (kind == MISSED), 0.0, 1.0)
    pointing = np.flatnonzero((error == LOCALISATION) | (error == CLASSIFICATION))
    pointing = pointing[state[target[pointing]] != CORRECT]
    pointing = pointing[np.lexsort((error[pointing], -boxes.score[pointing]))]
    best = pointing[np.unique(target[pointing], return_index=True)[1]]
    fixed = best[error[best] == kind]
    class_id[fixed], found[fixed], kept[fixed] = true.class_id[target[fixed]], True, True
    return _aps(boxes, true, class_id, found, kept, weights, rule)


def _aps(boxes, true, class_id, found, kept, true_weights, rule):
    rows = np.flatnonzero(kept)
    rows = rows[np.lexsort((boxes.image[rows], -boxes.score[rows], class_id[rows]))]
    starts = np.append(0, np.cumsum(np.bincount(class_id[rows], minlength=rule.n_classes)))
    totals = np.bincount(true.class_id, true_weights, rule.n_classes)[None]
    weights = np.ones((1, boxes.image.max(initial=0) + 1))
    return class_aps(starts, boxes.score[rows], found[rows], boxes.image[rows], weights, totals, rule)[0]


def _table(images, boxes, **columns):
    return pd.DataFrame({"image_id": images[boxes.image], "class_id": boxes.class_id, **columns})


@compiled
def _best(rows, image, class_id, box, true_rows, image_starts, true_class, true_box):
    """Return each detection's highest IoU and its true box (-1 for none), in its class and in all others."""
    overlaps, best = np.zeros((2, len(image))), np.full((2, len(image)), -1)
    for row in rows:
        for true in true_rows[image_starts[image[row]] : image_starts[image[row] + 1]]:
            other = int(true_class[true] != class_id[row])
            overlap = iou(box[row], true_box[true])
            if overlap > overlaps[other, row]:
                overlaps[other, row], best[other, row] = overlap, true
    return overlaps[0], best[0], overlaps[1], best[1]
