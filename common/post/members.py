"""Fusion of the boxes of an ensemble's members, each of one network per fold; detections have member and fold."""

import itertools
from functools import partial

import pandas as pd

from common.post.boxes import BOX
from common.post.fusion import NO_FINDING, fuse_table
from common.post.suppression import fuse_nms, fuse_nmw, fuse_soft_nms
from common.post.wbf import fuse_wbf

COLUMNS = ["image_id", "class_id", "score", *BOX]
METHODS = {
    "wbf": fuse_wbf,
    "nms": fuse_nms,
    "soft_nms": partial(fuse_soft_nms, thresh=0.0, decayed=True),
    "nmw": fuse_nmw,
}


def fuse(tables, images, weights, iou, skip=0.0, method="wbf", no_finding=NO_FINDING, **options):
    """Return the fused detections of several models; boxes of the class `no_finding`, if any, are averaged instead.

    tables: dict from a name to detections; weights: one per table; skip: lowest score of a finding; method: a key of
    METHODS, or "none"; options and errors: as in `fuse_table`. Scores above 1, from unequal weights, are all divided by
    the highest.
    """
    kept = {name: table[(table["score"] >= skip) | (table["class_id"] == no_finding)] for name, table in tables.items()}
    if method == "none":
        return pd.concat(kept.values(), ignore_index=True)[COLUMNS]
    fused = fuse_table(kept, images, weights, METHODS[method], no_finding, iou_thr=iou, **options)
    finding = fused["class_id"] != no_finding
    fused.loc[finding, "score"] /= max(1.0, fused.loc[finding, "score"].max())
    return fused


def fuse_members(table, images, members, rule, method="wbf", no_finding=NO_FINDING):
    """Return the fused boxes of `members`, whose weights are rule.weights in this order.

    Several folds that predicted the same images count as models of their member's weight.
    """
    tables, owners = split_members(table, members)
    method = method if len(tables) > 1 else "none"
    return fuse(tables, images, [rule.weights[k] for k in owners], rule.iou, rule.skip, method, no_finding)


def split_members(table, members):
    """Return {network's name: boxes}, and the index in `members` of each network; see `fuse_members`."""
    per_member = [table[table["member"] == member] for member in members]
    if len(table[["image_id", "fold"]].drop_duplicates()) == table["image_id"].nunique():
        return dict(zip(members, per_member, strict=True)), list(range(len(members)))
    keys = list(itertools.product(range(len(members)), sorted(table["fold"].unique())))
    tables = {f"{members[k]}, fold {fold}": per_member[k][per_member[k]["fold"] == fold] for k, fold in keys}
    return tables, [k for k, _ in keys]
