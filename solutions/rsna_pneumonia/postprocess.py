"""From the boxes of several networks to a submission, and the check of submissions."""

import itertools
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from common.errors import InputError
from common.post.boxes import BOX
from common.post.members import COLUMNS, fuse, split_members
from common.submit.boxes import parse_sides
from common.submit.table import read_table
from common.submit.validate import Summary, id_problems, refuse_rows, row_problems
from solutions.rsna_pneumonia.config import SAMPLE, SIDE


@dataclass(frozen=True)
class BoxRule:
    """How boxes become a submission: chosen on out-of-fold images, applied unchanged to test images.

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
    if not all(values):
        raise InputError(f"no rule to try: an empty list in {decision}")
    return [BoxRule(*map(float, each)) for each in itertools.product(*values)]


def fuse_boxes(table, images, members, iou):
    """Return the boxes of all networks as one table: weighted boxes fusion, or NMS if there is only one network."""
    tables, _ = split_members(table, members)
    return fuse(tables, images, [1.0] * len(tables), iou, method="wbf" if len(tables) > 1 else "nms")


def shrink_boxes(detections, factor):
    """Return the detections with both sides of each box multiplied by `factor`; its centre stays."""
    low, high = (detections[names].to_numpy() for names in (BOX[:2], BOX[2:]))
    centre, half = (low + high) / 2, (high - low) / 2 * factor
    return detections.assign(**dict(zip(BOX, np.hstack([centre - half, centre + half]).T, strict=True)))


def apply_rule(detections, gate, rule):
    """Return the fused detections that a BoxRule keeps, shrunk; gate: Series from image_id to probability."""
    kept = (detections["score"] >= rule.threshold) & (detections["image_id"].map(gate) >= rule.gate)
    return shrink_boxes(detections.loc[kept, COLUMNS], rule.shrink)


def prediction_strings(detections, ids):
    """Return the submission: `confidence x y width height` …, best first, in tenths of a pixel; blank without boxes."""
    texts = {image_id: [] for image_id in ids}
    for row in detections.sort_values("score", ascending=False, kind="stable").itertuples():
        x, y, right, bottom = (round(min(max(getattr(row, name), 0), SIDE), 1) for name in BOX)
        if right > x and bottom > y:
            texts[row.image_id].append(f"{row.score:.6f} {x:.1f} {y:.1f} {right - x:.1f} {bottom - y:.1f}")
    return pd.DataFrame({SAMPLE[0]: ids, SAMPLE[1]: [" ".join(texts[image_id]) for image_id in ids]}, dtype=str)


def read_submission(path, ids=None):
    """Return detections and ids of a submission. Raises InputError unless it is valid and has `ids`, if given."""
    table = read_table(path, SAMPLE)
    (found, faults), own = parse_sides(table, SIDE), table[SAMPLE[0]]
    refuse_rows(path, id_problems(own, own if ids is None else ids) + row_problems(own, faults))
    return found, own


def check(path, sample):
    """Return the Summary of a submission. Raises InputError unless it is valid for the images of the file `sample`."""
    found, ids = read_submission(path, read_table(sample, SAMPLE)[SAMPLE[0]])
    return Summary(str(path), len(ids), found["image_id"].nunique(), len(found), "boxes")
