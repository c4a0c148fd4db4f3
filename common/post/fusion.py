"""Fuse the detection tables of several models, or the boxes of several raters, into one table."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd

from common.errors import InputError, check
from common.post.batches import Batch, check_iou, check_weights, fuse_in_portions, sort_by
from common.post.boxes import BOX, read_boxes, read_numbers, refuse, refuse_repeated, require_columns
from common.post.suppression import fuse_nms, fuse_nmw, fuse_soft_nms
from common.post.wbf import fuse_wbf, mean_boxes

NO_FINDING = 14  # VinBigData's class of an image without findings; its box is 0 0 1 1, in pixels


def fuse_table(tables, sizes, weights=None, fuse=fuse_wbf, no_finding=NO_FINDING, **options):
    """Return one table of the detections of several models, fused image by image and class by class.

    tables: one DataFrame per model (a list, or a dict from names for error messages): image_id, class_id, score >= 0,
    x_min, y_min, x_max, y_max in pixels. sizes: DataFrame of image_id, width, height, one row per image. weights: one
    positive number per model, or None. fuse: `fuse_wbf`, `fuse_nms`, `fuse_soft_nms` or `fuse_nmw`, called with
    `options` on boxes divided by the size of their image.
    The class `no_finding` (None for no such class) is averaged, not fused: its score is the weighted mean over all
    models that use this class, with 0 for images in which such a model does not, and its box is 0 0 1 1.
    The result has the same columns: images in the order of `sizes`, the boxes of each best first, no finding last,
    boxes inside the image. Raises InputError for bad weights, and naming table, row and image as `read_boxes` does.
    """
    named = tables.items() if isinstance(tables, dict) else [(f"table {k}", table) for k, table in enumerate(tables)]
    check(named, "no tables to fuse")
    pixels, index = _sizes(sizes)
    weights = None if weights is None else check_weights(weights, len(named))
    healthy = np.full((len(named), len(index)), np.nan)
    parts = [_part(name, table, index, pixels, no_finding, healthy[k]) for k, (name, table) in enumerate(named)]
    limits = np.tile(pixels, 2)
    sorted_by_image = [sort_by(part[0], np.arange(len(part[0])), len(index)) for part in parts]
    starts = sum(each for _, each in sorted_by_image)

    def fuse_images(begin, end):
        rows = [order[own[begin] : own[end]] for order, own in sorted_by_image]
        taken = ([array.take(some, axis=0) for array in part] for part, some in zip(parts, rows, strict=True))
        images, labels, scores, boxes = (np.concatenate(arrays) for arrays in zip(*taken, strict=True))
        models = np.repeat(np.arange(len(parts)), list(map(len, rows)))
        order, part = sort_by(images - begin, np.arange(len(images)), end - begin)
        shares = boxes.take(order, axis=0) / limits.take(images[order], axis=0)
        fused = fuse(Batch(shares, scores[order], labels[order], models[order], part, len(named)), weights, **options)
        found = np.repeat(np.arange(begin, end), np.diff(fused.starts))
        of_found = limits.take(found, axis=0)
        inside = np.clip(fused.boxes * of_found, 0.0, of_found)
        return found, fused.labels, fused.scores.astype(np.float64, copy=False), inside

    images, labels, scores, boxes = fuse_in_portions(fuse_images, starts)
    parts.clear()
    found, mean = _no_finding_scores(healthy, weights)
    images = np.concatenate([images, found])
    order = np.argsort(images, kind="stable")
    columns = {
        "image_id": index.take(images[order]),
        "class_id": np.concatenate([labels, np.full(len(found), no_finding or 0)])[order],
        "score": np.concatenate([scores, mean])[order],
    }
    boxes = np.concatenate([boxes, np.tile([0.0, 0.0, 1.0, 1.0], (len(found), 1))])[order]
    return pd.DataFrame(columns | {name: boxes[:, k] for k, name in enumerate(BOX)})


def fuse_raters(table, iou_thr=0.5, join=mean_boxes, no_finding=NO_FINDING):
    """Return one truth table from the boxes of several raters, fused image by image and class by class.

    table: DataFrame of image_id, class_id, rad_id, x_min, y_min, x_max, y_max in pixels, one row per box, or one row of
    the class `no_finding` for a rater without boxes. join: `mean_boxes` (weighted boxes fusion with equal scores) or
    `first_boxes` (NMS in the order of raters). Boxes match if IoU > iou_thr; the order of rows does not matter.
    The result has image_id (sorted), class_id, x_min, y_min, x_max, y_max, votes (raters with a box in the fused box)
    and raters (of the image); `no_finding 0 0 1 1` only if no rater drew a box. Raises InputError, naming row and
    image, for missing columns or values and boxes without area.
    """
    require_columns("raters", table, ["image_id", "rad_id"])
    check_iou(iou_thr)
    numbers = read_numbers("raters", table, ["class_id", *BOX])
    images, ids = pd.factorize(table["image_id"], sort=True)
    raters, _ = pd.factorize(table["rad_id"], sort=True)
    finding, low, high = numbers[:, 0] != no_finding, numbers[:, 1:3], numbers[:, 3:]
    faults = (
        ((images < 0) | (raters < 0), "needs an image_id and a rad_id"),
        (np.floor(numbers[:, 0]) != numbers[:, 0], "class id {class_id:g} is not a whole number"),
        (finding & ~np.isfinite(numbers).all(axis=1), "the box is not four finite numbers"),
        (finding & (low >= high).any(axis=1), "the box has no area"),
    )
    refuse("raters", table, faults)
    labels, rows = numbers[:, 0].astype(np.int64), np.flatnonzero(finding)
    boxes = numbers[rows, 1:]

    order = np.lexsort((*boxes.T, raters[rows], labels[rows], images[rows]))
    rows, boxes = rows[order], boxes[order]
    new = (np.diff(images[rows], prepend=-1) != 0) | (np.diff(labels[rows], prepend=-1) != 0)
    boxes, cluster = join(boxes, np.append(np.flatnonzero(new), len(rows)), iou_thr)
    _, first = np.unique(cluster, return_index=True)
    empty = np.setdiff1d(np.arange(len(ids)), images[rows])
    readers = _count_distinct(images, raters, len(ids))
    columns = {
        "image_id": np.append(images[rows[first]], empty),
        "class_id": np.append(labels[rows[first]], np.full(len(empty), no_finding or 0)),
        **{name: np.append(boxes[:, k], np.full(len(empty), k // 2)) for k, name in enumerate(BOX)},
        "votes": np.append(_count_distinct(cluster, raters[rows], len(boxes)), readers[empty]),
    }
    fused = pd.DataFrame(columns).sort_values("image_id", kind="stable", ignore_index=True)
    fused["raters"] = readers[fused["image_id"]]
    fused["image_id"] = ids.take(fused["image_id"])
    return fused


def _sizes(sizes):
    """Return widths and heights, float64 (images, 2), and the Index of the images."""
    pixels, index = read_numbers("sizes", sizes, ["width", "height"]), pd.Index(sizes["image_id"])
    usable = ((pixels > 0) & (pixels < np.inf)).all(axis=1)
    refuse("sizes", sizes, [(index.duplicated() | index.isna(), "missing or repeated"), (~usable, "no usable size")])
    return pixels, index


def _part(name, table, index, pixels, no_finding, healthy):
    """Return checked image numbers, classes, scores and boxes; write the scores of `no_finding` to `healthy`."""
    images, labels, boxes, scores = read_boxes(name, table, index, no_finding, sizes=pixels)
    rows = np.flatnonzero(labels == no_finding)
    if len(rows):
        refuse_repeated(name, table, images, rows, no_finding)
        healthy[images[rows]] = scores[rows]
        rows = np.flatnonzero(labels != no_finding)
        images, labels, scores, boxes = images[rows], labels[rows], scores[rows], boxes[rows]
    return images, labels, scores, boxes


def _no_finding_scores(healthy, weights):
    """Return image numbers and mean scores of `healthy` (models, images; NaN: no row), see `fuse_table`."""
    given = ~np.isnan(healthy)
    weights = np.where(given.any(axis=1), 1.0 if weights is None else weights, 0.0)
    found = np.flatnonzero(given.any(axis=0))
    probs = np.nan_to_num(healthy[:, found])
    mean = weights @ probs / max(weights.sum(), np.finfo(float).tiny)
    return found, np.minimum(mean, probs.max(axis=0, initial=0))  # a mean of ones could exceed 1 by rounding


def _count_distinct(groups, values, n):
    """Return the number of distinct `values` in each of the groups 0 … n-1."""
    return pd.Series(values).groupby(groups).nunique().reindex(range(n), fill_value=0).to_numpy()


# ---- members of an ensemble, each with one network per fold; detections have member and fold ------------------------

COLUMNS = ["image_id", "class_id", "score", *BOX]
METHODS = {"wbf": fuse_wbf, "nms": fuse_nms, "nmw": fuse_nmw}
METHODS["soft_nms"] = partial(fuse_soft_nms, thresh=0.0, decayed=True)


def fuse(tables, images, weights, iou, skip=0.0, method="wbf", no_finding=NO_FINDING, **options):
    """Return the fused detections of several models; boxes of the class `no_finding`, if any, are averaged instead.

    tables: dict from a name to detections; weights: one per table; skip: lowest score of a finding; method: a key of
    METHODS, or "none"; options, errors: as in `fuse_table`. If weights raise scores above 1, all are scaled down.
    """
    if skip > 0:  # otherwise avoid the copies
        tables = {k: table[(table["score"] >= skip) | (table["class_id"] == no_finding)] for k, table in tables.items()}
    if method == "none":
        return pd.concat(tables.values(), ignore_index=True)[COLUMNS]
    fused = fuse_table(tables, images, weights, METHODS[method], no_finding, iou_thr=iou, **options)
    finding = fused["class_id"] != no_finding
    fused.loc[finding, "score"] /= max(1.0, fused.loc[finding, "score"].max())
    return fused


@dataclass(frozen=True)
class FusionRule:
    """Parameters for fusing the boxes of several networks.

    weights: one per member. Boxes of a class that overlap by more than `iou` are fused; those with a score below `skip`
    are left out. Before fusion, each network keeps its best `limit` boxes per image (0: all), after removing those that
    a better box of their class overlaps by more than `nms` (1: none). conf_type: of weighted boxes fusion.
    """

    weights: tuple[float, ...]
    iou: float
    skip: float = 0.0
    nms: float = 1.0
    limit: int = 0
    conf_type: Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"] = "avg"

    def __post_init__(self):
        if not (self.weights and all(0 < weight < np.inf for weight in self.weights)):
            raise InputError(f"weights must be positive numbers, one per member, not {self.weights}")
        if not all(0 <= value <= 1 for value in (self.iou, self.skip, self.nms)) or self.limit < 0:
            raise InputError(f"iou, skip and nms must lie in [0, 1], limit must be 0 or more: {self}")


def fuse_members(table, images, members, rule, method="wbf", no_finding=NO_FINDING):
    """Return the fused boxes of `members`, whose weights are rule.weights in this order.

    Fusion counts boxes, not networks, so three copies of a box from one network weigh as much as three networks that
    agree; rule.nms and rule.limit prevent this. Boxes of several folds' networks on the same images are first fused to
    one set per member, so that test images have as many voters as the out-of-fold images that chose the rule.
    """
    return join_members(own_boxes(table, images, members, rule, method, no_finding), images, rule, method, no_finding)


def own_boxes(table, images, members, rule, method="wbf", no_finding=NO_FINDING):
    """Return {member: its boxes} after suppression, limit and fusion over folds; see `fuse_members`."""
    found = {}
    repeated = len(table[["image_id", "fold"]].drop_duplicates()) > table["image_id"].nunique()
    for member in members:
        own, folds = table.loc[table["member"] == member, [*COLUMNS, "fold"]], sorted(table["fold"].unique())
        if repeated and len(folds) > 1:
            parts = {f"{member}, fold {k}": _suppress(own[own["fold"] == k], images, rule, no_finding) for k in folds}
            found[member] = join_members(parts, images, replace(rule, weights=(1.0,) * len(parts)), method, no_finding)
        else:
            found[member] = _suppress(own[COLUMNS], images, rule, no_finding)
    return found


def join_members(tables, images, rule, method="wbf", no_finding=NO_FINDING):
    """Return the fused boxes of {member: boxes}; the boxes of a single member are returned unchanged."""
    method = method if len(tables) > 1 else "none"
    options = {"conf_type": rule.conf_type} if method == "wbf" else {}
    return fuse(tables, images, rule.weights, rule.iou, 0.0, method, no_finding, **options)


def _suppress(table, images, rule, no_finding):
    table = table[(table["score"] >= rule.skip) | (table["class_id"] == no_finding)]
    if rule.nms < 1 and len(table):
        table = fuse({"": table}, images, [1.0], rule.nms, method="nms", no_finding=no_finding)
    if rule.limit:
        ranks = table.groupby("image_id")["score"].rank(method="first", ascending=False)
        table = table[ranks <= rule.limit]
    return table
