"""Turn the boxes of several networks into a submission, and read submissions."""

import itertools
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from common.errors import InputError, check
from common.post.boxes import BOX
from common.post.fusion import COLUMNS, FusionRule, fuse_members
from common.submit.sides import read_sides, write_sides
from solutions.rsna_pneumonia.config import SAMPLE, SIDE


@dataclass(frozen=True)
class BoxRule:
    """The rule that turns boxes into a submission: chosen out of fold, applied unchanged to test images.

    Boxes that overlap by more than `iou` are fused; an image keeps its boxes if the gate's probability of an opacity is
    at least `gate`; boxes with a score of at least `threshold` stay, their sides multiplied by `shrink`.
    """

    iou: float
    gate: float
    threshold: float
    shrink: float

    def __post_init__(self):
        if not (0 < self.shrink <= 1 and all(0 <= each <= 1 for each in (self.iou, self.gate, self.threshold))):
            raise InputError(f"iou, gate and threshold must lie in [0, 1], shrink in (0, 1]: {self}")


def list_rules(decision):
    """Return every BoxRule of a DecisionConfig."""
    values = [getattr(decision, field.name) for field in fields(BoxRule)]
    check(all(values), f"no rule to try: an empty list in {decision}")
    return [BoxRule(*map(float, each)) for each in itertools.product(*values)]


def fuse_boxes(table, images, members, iou):
    """Return the boxes of all networks as one table: NMS within a network, weighted boxes fusion between networks."""
    return fuse_members(table, images, members, FusionRule((1.0,) * len(members), iou, nms=iou))


def shrink_boxes(detections, factor):
    """Return the detections with both sides of each box multiplied by `factor` around its centre."""
    low, high = (detections[names].to_numpy() for names in (BOX[:2], BOX[2:]))
    centre, half = (low + high) / 2, (high - low) / 2 * factor
    return detections.assign(**dict(zip(BOX, np.hstack([centre - half, centre + half]).T, strict=True)))


def apply_rule(detections, gate, rule):
    """Return the fused detections that a BoxRule keeps, shrunk; gate: Series from image_id to probability."""
    kept = (detections["score"] >= rule.threshold) & (detections["image_id"].map(gate) >= rule.gate)
    return shrink_boxes(detections.loc[kept, COLUMNS], rule.shrink)


prediction_strings = partial(write_sides, columns=SAMPLE, side=SIDE)
read_submission = partial(read_sides, columns=SAMPLE, side=SIDE)
