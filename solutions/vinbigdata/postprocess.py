"""Boxes of several networks to the rows of the submission: fused, decided on by the classifier, written and read back.

Detections are tables image_id, class_id, score, x_min, y_min, x_max, y_max, in original pixels. Until `apply_rule` adds
No finding (class 14, box 0 0 1 1) they hold findings alone, so that class is never fused. Those of networks have member
and fold beside it. `images` are tables of image_id, width and height.
"""

import itertools
import logging
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import InputError
from common.post.boxes import BOX, clip
from common.post.fusion import fuse_table
from common.post.suppression import fuse_nms, fuse_nmw, fuse_soft_nms
from common.post.wbf import fuse_wbf
from common.submit.boxes import EDGE, find_faults, read_entries, repair_entries
from common.submit.table import read_table
from common.submit.validate import id_problems, refuse_rows, row_problems
from solutions.vinbigdata.config import CLASSES, NO_FINDING

log = logging.getLogger(__name__)
COLUMNS = ["image_id", "class_id", "score", *BOX]
HEADER = ["image_id", "PredictionString"]
NOTHING = "14 1 0 0 1 1"
METHODS = {
    "wbf": fuse_wbf,
    "nms": fuse_nms,
    "soft_nms": partial(fuse_soft_nms, thresh=0.0, decayed=True),
    "nmw": fuse_nmw,
}


@dataclass(frozen=True)
class DecisionRule:
    """What makes one answer of several: searched on out-of-fold boxes and applied unchanged to the test images.

    Boxes of score `skip` or more are fused above the overlap `iou`, `weights` being the members'. Where the
    probability of health exceeds `alpha`, all boxes give way to `14 1 0 0 1 1`; where it exceeds `beta` only, a box of
    No finding joins them, its score the probability. beta -1 adds it everywhere, 1 nowhere; alpha 1 keeps all boxes.
    The paper does not say which score the joining box has.
    """

    weights: tuple[float, ...]
    iou: float
    skip: float = 0.0
    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self):
        if not (self.weights and all(0 < weight < np.inf for weight in self.weights)):
            raise InputError(f"weights must be positive numbers, one a member, not {self.weights}")
        if not (all(0 <= value <= 1 for value in (self.iou, self.skip, self.alpha)) and -1 <= self.beta <= self.alpha):
            raise InputError(f"iou, skip and alpha must lie in [0, 1], beta in [-1, alpha]: {self}")


def rules(fusion, decision, weights):
    """Every DecisionRule that a FusionConfig and a DecisionConfig allow for these weights; beta never above alpha."""
    of_rule = {
        "replace": [{"alpha": a, "beta": b} for a, b in itertools.product(decision.alpha, decision.beta) if b <= a],
        "append": [{"beta": -1.0}],
        "none": [{}],
    }
    decisions = [each for rule in decision.rule for each in of_rule[rule]]
    overlaps = fusion.iou[:1] if fusion.method == "none" else fusion.iou
    every = itertools.product(overlaps, fusion.skip, decisions)
    found = [DecisionRule(tuple(weights), iou, skip, **rest) for iou, skip, rest in every]
    if not found:
        raise InputError(f"no rule to try: an empty list, or every beta above every alpha, in {fusion} and {decision}")
    return found


# ---- fusion and decision -------------------------------------------------------------------------------------------


def fuse(tables, images, weights, iou, skip=0.0, method="wbf", **options):
    """Fuse the detections of several models; class 14, where there is any, is averaged instead.

    tables: dict from a name to detections; weights: a positive number a table; skip: least score of a finding; method:
    a key of METHODS, or "none" for all boxes as they are; options and errors: as in `common.post.fusion.fuse_table`.
    Weighted fusion by unequal weights can bring scores above 1: all are then divided by the highest, which leaves every
    order as it is, but makes scores of two sets no longer comparable.
    """
    # NaN is not under `skip`: it stays, to be refused
    kept = {name: table[~(table["score"] < skip) | (table["class_id"] == NO_FINDING)] for name, table in tables.items()}
    if method == "none":
        return pd.concat(kept.values(), ignore_index=True)[COLUMNS]
    fused = fuse_table(kept, images, weights, METHODS[method], iou_thr=iou, **options)
    finding = fused["class_id"] != NO_FINDING
    fused.loc[finding, "score"] /= max(1.0, fused.loc[finding, "score"].max())
    return fused


def fuse_members(table, images, members, rule, method="wbf"):
    """Fuse the boxes of `members`, in the order of rule.weights; returns detections.

    Where several folds predicted the same images, as they do the test set, the network of each fold is a model of its
    own, of its member's weight. The boxes of one network alone are left as they are. Raises InputError for other
    members, class 14, and as `fuse` does.
    """
    tables, owners = split_members(table, members)
    if len(rule.weights) != len(members):
        raise InputError(f"{len(rule.weights)} weights for {len(members)} members")
    method = method if len(tables) > 1 else "none"
    return fuse(tables, images, [rule.weights[k] for k in owners], rule.iou, rule.skip, method)


def split_members(table, members):
    """Return (dict from a network's name to its boxes, place in `members` of each); see `fuse_members`."""
    unknown = sorted(set(table["member"].unique()) - set(members))
    if unknown:
        raise InputError(f"boxes of the member {unknown[0]!r}, where the members are {', '.join(members)}")
    _refuse_no_finding(table)
    per_member = [table[table["member"] == member] for member in members]
    if len(table[["image_id", "fold"]].drop_duplicates()) == table["image_id"].nunique():
        return dict(zip(members, per_member, strict=True)), list(range(len(members)))
    tables = {
        (k, fold): per_member[k][per_member[k]["fold"] == fold]
        for k, fold in itertools.product(range(len(members)), sorted(table["fold"].unique()))
    }
    return {f"{members[k]}, fold {fold}": part for (k, fold), part in tables.items()}, [k for k, _ in tables]


def apply_rule(detections, image_ids, healthy, rule):
    """Return what is submitted for `image_ids`: detections with rows of class 14, at least one row an image.

    detections: findings alone. healthy: dict or Series from image_id to the probability of health in [0, 1]; None
    suits a rule that does not ask for it (alpha and beta 1). An image left without any box gets `14 1 0 0 1 1`, since
    that is what its row will say. Raises InputError for class 14, unknown images, and a missing probability.
    """
    _refuse_no_finding(detections)
    ids = pd.Index(image_ids)
    at = _places(detections, ids)
    probs = _health(healthy, ids) if min(rule.alpha, rule.beta) < 1 else np.zeros(len(ids))
    replaced, joined = probs > rule.alpha, probs > rule.beta
    kept = ~replaced[at]
    empty = np.bincount(at[kept], minlength=len(ids)) == 0
    score = np.where(replaced | ~joined, 1.0, probs)
    added = np.flatnonzero(joined | empty)
    boxes = pd.DataFrame({"image_id": ids[added], "class_id": NO_FINDING, "score": score[added]})
    parts = [detections.loc[kept, COLUMNS], boxes.assign(x_min=0.0, y_min=0.0, x_max=1.0, y_max=1.0)]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def _refuse_no_finding(table):
    for image_id in table.loc[table["class_id"] == NO_FINDING, "image_id"].head(1):
        raise InputError(f"image {image_id}: a box of class {NO_FINDING} among those of findings, which are fused")


def _health(healthy, ids):
    probs = pd.Series({} if healthy is None else healthy, dtype=float).reindex(ids).to_numpy()
    for row in np.flatnonzero(~((probs >= 0) & (probs <= 1)))[:1]:
        raise InputError(f"image {ids[row]}: the rule needs its probability of health, in [0, 1]")
    return probs


def _places(table, ids):
    """Place in `ids` of each row's image, int64 (n,)."""
    at = ids.get_indexer(table["image_id"])
    for row in np.flatnonzero(at < 0)[:1]:
        raise InputError(f"image {table['image_id'].iloc[row]}: has boxes, but is not among the {len(ids)} images")
    return at


# ---- the competition's format --------------------------------------------------------------------------------------


def prediction_strings(detections, image_ids, images=None):
    """The submission as a table image_id, PredictionString: `class score x_min y_min x_max y_max` repeated, best first.

    Numbers have the fewest digits from which float64 gives them back, so no score or box changes. Where `images` are
    given, up to EDGE pixels beyond an image are cut off; a box of no area is left out, and an image without any box
    gets `14 1 0 0 1 1`. Raises InputError for unknown or double images, boxes further outside, inverted or of class 14
    but not 0 0 1 1, and for scores outside [0, 1].
    """
    ids = pd.Index(image_ids)
    if not ids.is_unique:
        raise InputError(f"image {ids[ids.duplicated()][0]}: is there twice")
    at, class_id = _places(detections, ids), detections["class_id"].to_numpy().astype(int)
    score, boxes = detections["score"].to_numpy(np.float64), detections[BOX].to_numpy(np.float64)
    finding = class_id != NO_FINDING

    def refuse(wrong, reason):
        for row in np.flatnonzero(wrong)[:1]:
            raise InputError(f"image {ids[at[row]]}: {reason}: {class_id[row]} {score[row]:g} {boxes[row].tolist()}")

    refuse((class_id < 0) | (class_id > NO_FINDING), f"the class must be 0 to {NO_FINDING}")
    refuse(~((score >= 0) & (score <= 1)), "the score must lie in [0, 1]")
    refuse(~np.isfinite(boxes).all(axis=1) | (boxes[:, :2] > boxes[:, 2:]).any(axis=1), "not a box")
    refuse(~finding & (boxes != [0, 0, 1, 1]).any(axis=1), "No finding has the box 0 0 1 1")
    limits = np.inf if images is None else _pixels(images, ids)[at]
    outside = (boxes[:, :2] < -EDGE) | (boxes[:, 2:] > limits + EDGE)
    refuse(finding & outside.any(axis=1), "the box lies outside its image")
    boxes = np.maximum(boxes, 0) if images is None else clip(boxes, limits)
    kept = np.flatnonzero((boxes[:, :2] < boxes[:, 2:]).all(axis=1))
    kept = kept[np.lexsort((class_id[kept], -score[kept], at[kept]))]
    columns = [_digits(column[kept]) for column in (class_id, score, *boxes.T)]
    starts = np.append(0, np.cumsum(np.bincount(at[kept], minlength=len(ids))))
    entries = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pc.binary_join_element_wise(*columns, " "))
    texts = [text or NOTHING for text in pc.binary_join(entries, " ").to_pylist()]
    return pd.DataFrame({HEADER[0]: ids, HEADER[1]: texts}, dtype=str)


def parse_predictions(path, images=None, ids=None, source="the sample submission"):
    """Read a submission, ours or another's, as detections, in its order; class 14 included.

    ids: the images it must have, in any order, which `source` has. A row may be blank (no entries), columns may be
    more, and what `common.submit.boxes.repair_entries` changes is accepted: all of it is said in one line of the log.
    images: where given, boxes end within their image. Raises InputError naming file, row and entry for whatever else
    `validate_boxes` refuses: values that make no entries, inverted boxes, NaN, scores outside [0, 1], double ids.
    """
    table = read_table(path)
    if not set(HEADER) <= set(table.columns):
        raise InputError(f"{path}, row 1: the header must have {','.join(HEADER)}: {','.join(table.columns)[:200]}")
    if not len(table):
        raise InputError(f"{path}: no rows under its header")
    own, texts = (table[name] for name in HEADER)
    refuse_rows(path, id_problems(own, own if ids is None else ids, source))
    pixels = None if images is None else _pixels(images, pd.Index(own))
    entries, notes = repair_entries(read_entries(texts), NO_FINDING, pixels)
    refuse_rows(path, row_problems(own, find_faults(entries, len(CLASSES), NO_FINDING, pixels, blank=True)))
    if (texts == "").any():
        notes.append(f"{(texts == '').sum():,} blank rows have no entries (first row {(texts == '').argmax() + 2})")
    if table.shape[1] > len(HEADER):
        notes.append(f"columns not read: {', '.join(table.columns.difference(HEADER, sort=False))[:200]}")
    if notes:
        log.info(f"{path}: accepted, {'; '.join(notes)}")
    columns = {"image_id": own.take(entries.row).array, "class_id": entries.class_id.astype(np.int64)}
    columns |= {"score": entries.score, **dict(zip(BOX, entries.boxes.T, strict=True))}
    return pd.DataFrame(columns)


def _pixels(images, ids):
    """Width and height of `ids`, float64 (n, 2)."""
    pixels = images.set_index("image_id")[["width", "height"]].reindex(ids).to_numpy(np.float64)
    for row in np.flatnonzero(~(pixels > 0).all(axis=1))[:1]:
        raise InputError(f"image {ids[row]}: no width and height are known")
    return pixels


def _digits(values):
    """The fewest digits that give each float64 back; pyarrow finds them ten times faster than repr."""
    return pc.cast(pa.array(values), pa.string())
