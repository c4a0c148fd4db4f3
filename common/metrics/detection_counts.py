"""RSNA's metric of 2018: tp / (tp + fp + fn) of an image's boxes, averaged over IoU thresholds and images."""

from dataclasses import dataclass, replace

import numpy as np

from common.metrics.classification import ratio
from common.metrics.detection import Rule, match, read_tables

RULE = Rule(best_unmatched=True, n_classes=1, no_finding=None)
THRESHOLDS = np.arange(40, 80, 5) / 100  # the IoU must exceed them


@dataclass(frozen=True, eq=False)
class Matches:
    """Boxes matched at every threshold: image int64 (n,), score (n,), found bool (8, n); truth: (N,) true boxes."""

    image: np.ndarray
    score: np.ndarray
    found: np.ndarray
    truth: np.ndarray


def match_boxes(detections, truth, ids):
    """Return the Matches of detections with true boxes in the images `ids`, by falling score.

    Boxes of lower scores do not affect higher ones, so a single matching serves all score thresholds.
    """
    _, boxes, true = read_tables(detections, truth, ids, RULE)
    found = [match(boxes, true, replace(RULE, iou_threshold=float(each))) >= 0 for each in THRESHOLDS]
    return Matches(boxes.image, boxes.score, np.stack(found), np.bincount(true.image, minlength=len(ids)))


def image_scores(matches, threshold=0.0, gate=True):
    """Return each image's score, float64 (N,), from its boxes with at least `threshold`, none if `gate` is False.

    NaN for images with neither true nor predicted boxes; images with predicted boxes only score 0.
    """
    n = len(matches.truth)
    kept = (matches.score >= threshold) & np.broadcast_to(gate, n)[matches.image]
    tp = np.stack([np.bincount(matches.image[kept], found[kept], n) for found in matches.found])
    union = np.bincount(matches.image[kept], minlength=n) + matches.truth - tp
    return ratio(tp, union, np.nan).mean(axis=0)


def mean_score(scores):
    """Return the mean of the image scores that are not NaN, 0 if all are."""
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else 0.0
