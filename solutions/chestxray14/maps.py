"""Class activation maps of a run's networks, for images that they did not train on."""

from typing import NamedTuple

import cv2
import numpy as np
import torch

from common.errors import check
from common.infer.cam import fuse, normalise, place
from common.network import compute
from common.paths import read_array
from common.post.boxes import BOX
from solutions.chestxray14.config import BOX_SIDE
from solutions.chestxray14.data import BOX_TABLE, LUNG_TABLE
from solutions.chestxray14.models import pool_masks


class Maps(NamedTuple):
    """Class activation maps of n (image, class) pairs: each stage's maps and their position in the image.

    cams: stage → float32 (n, h, w); places: stage → float64 (n, 4), pixels of the 1024 × 1024 image. rescaled: whether
    the stages' maps are normalised before they are added. masks: if features are weighted, uint8 (n, S, S), 255 times
    the share of lung, so that `heat` attributes the evidence of a border cell to the lung part of that cell.
    """

    cams: dict
    places: dict
    rescaled: bool = False
    masks: np.ndarray | None = None

    def heat(self, k):
        """Return map k over the whole image, fused over the stages, float32 (1024, 1024) in [0, 1]."""
        shape = (BOX_SIDE, BOX_SIDE)
        placed = {stage: place(cams[k], self.places[stage][k], shape) for stage, cams in self.cams.items()}
        if self.masks is not None:
            share = cv2.resize(np.float32(self.masks[k]) / 255, shape, interpolation=cv2.INTER_LINEAR)
            low = placed["whole"].min()
            placed["whole"] = low + (placed["whole"] - low) * share
        return fuse([normalise(cam) if self.rescaled else cam for cam in placed.values()])


def usable_boxes(images, folds, boxes=None):
    """Return the true boxes on images that at least one network did not train on, and the number of other boxes."""
    table = images.table[["row", "patient_id", "split", "fold", "ok"]]
    boxes = (images.tables[BOX_TABLE] if boxes is None else boxes).merge(table, on="row", how="left")
    unseen = boxes["ok"] & ((boxes["split"] == "test") | boxes["fold"].isin(list(folds)))
    usable = boxes[unseen].drop(columns="ok").reset_index(drop=True)
    check(len(usable), f"no true box lies on an image that the networks did not train on ({len(boxes)} boxes in all)")
    usable["map"] = usable.groupby(["row", "label"], sort=False).ngroup()
    return usable, len(boxes) - len(usable)


def class_maps(job, boxes, alone=False):
    """Return the Maps of the pairs in `boxes`: for test images the mean over folds, for others their own fold's map."""
    config, images, pairs = job.config, job.images, boxes.drop_duplicates("map").sort_values("map")
    sums, count, stages = {}, np.zeros((len(pairs), 1, 1), np.float32), ("whole",) if alone else config.stages
    for fold in config.folds:
        mine = np.flatnonzero((pairs["split"] == "test") | (pairs["fold"] == fold))
        if not len(mine):
            continue
        count[mine] += 1
        rows, at = np.unique(pairs["row"].to_numpy()[mine], return_inverse=True)
        networks = {one.stage: one for one in job.recipe.networks(job) if one.fold == fold}
        models, heads = {stage: networks[stage].load(job.run) for stage in stages}, [None] * len(stages)
        if config.is_fused and not alone:
            weight = networks["fusion"].load(job.run).weight.detach()
            heads = weight.split([model.width for model in models.values()], dim=1)
        for (stage, model), head in zip(models.items(), heads, strict=True):
            cams = network_cams(job, networks[stage], model, rows, head)
            total = sums.setdefault(stage, np.zeros((len(pairs), *cams.shape[2:]), np.float32))
            total[mine] += cams[at, pairs["label"].to_numpy()[mine]]
    cams, rows = {stage: total / count for stage, total in sums.items()}, pairs["row"].to_numpy()
    places = {stage: view_places(images, rows, getattr(config, stage), stage) for stage in cams}
    masks = read_array(images.arrays["masks"])[rows] if config.weights_features else None
    return Maps(cams, places, len(cams) > 1 and not config.is_fused, masks)


def network_cams(job, network, model, rows, head=None):
    """Return class activation maps, float32 (n, 14, h, w); head: weights (14, K) that replace the model's own."""
    config = network.config
    if head is not None:
        model.head.weight.data = head

    def cams(images):
        found = model.cam(images)
        return from_the_lowest(found, images[:, 1:], config.masks == "binary") if config.weighting else found

    return compute(job, network, model, cams, rows, f"maps, fold {network.fold}, {network.stage}")


def from_the_lowest(cams, masks, binary=False):
    """Return the maps of weighted features, measured from the lowest evidence before weighting.

    Weighting sets maps to 0 outside the lungs, which is their peak if all evidence in the lungs is negative. Measured
    from the lowest value, a cell shows its additional evidence times its share of lung. cams: (B, C, h, w); masks:
    (B, 1, H, W), 0 to 255. Maps of images without lungs are only shifted by a constant.
    """
    share = pool_masks(masks.float() / 255, cams.shape[-2:], binary)
    low = torch.where(share > 0, cams / share, torch.inf).amin((2, 3), keepdim=True)
    return cams - share * low


def view_places(images, rows, config, stage):
    """Return the box of the network's input, a centre crop, float64 (n, 4), in pixels of the 1024 × 1024 image."""
    if stage == "whole":
        views = np.tile([0.0, 0.0, BOX_SIDE, BOX_SIDE], (len(rows), 1))
    else:
        sides = images.at(rows)[["width", "height", "width", "height"]].to_numpy(float)
        views = images.tables[LUNG_TABLE].loc[rows, BOX].to_numpy(float) * BOX_SIDE / sides
    start = (config.resize - config.size) // 2
    corners, sides = views[:, :2], views[:, 2:] - views[:, :2]
    return np.concatenate([corners + sides * edge / config.resize for edge in (start, start + config.size)], axis=1)
