"""Lung masks of all images: an input channel for detectors, and the positions of findings within the lungs."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from common.data.loaders import SampleDataset
from common.data.store import to_square
from common.paths import read_array
from common.post.boxes import BOX
from solutions.lung_segmentation import find_lungs, weights_file
from solutions.vinbigdata.config import CLASSES

SIDE, FILE = 256, "lungs.safetensors"  # side of the masks in pixels; name of the exported segmenter


def assets(config):
    """Return the files that an export needs, by name: the segmenter, if a member needs it."""
    return {FILE: weights_file(config.lungs, "--lungs")} if config.needs_lungs else {}


def with_lungs(refine):
    """Return `refine` with the array `masks` added, uint8 (N, SIDE, SIDE), 255 for lung, if a member needs it.

    The mask of a placeholder or a colour picture is empty.
    """

    def refined(job, listing, store):
        listing = refine(job, listing, store)
        for weights in assets(job.config).values():
            _, masks = find_lungs(job, store, weights, {"mask_size": SIDE}, {"masks": SIDE}, ["x"], _describe)
            listing = replace(listing, arrays=masks)
        return listing

    return refined


def _describe(segmenter, image, probs, about):
    lungs = np.zeros_like(image) if probs is None else segmenter.lungs(probs, image.shape)
    return [to_square(lungs * np.uint8(255), SIDE)], [None]


class LungSamples(SampleDataset):
    """Images with their lung mask as the second channel, uint8 (2, H, W); masks: path of all store rows' masks."""

    def __init__(self, images, masks, size, rows):
        super().__init__(images, size=size, rows=rows)
        self.masks = SampleDataset(masks, size=size, rows=rows)

    def __getitem__(self, key):
        image, row = super().__getitem__(key)
        return torch.cat([image, self.masks[key][0]]), row


def samples(job, rows, size):
    """Return the LungSamples of store rows at `size` pixels."""
    return LungSamples(job.images.store.images, job.images.arrays["masks"], size, rows)


def locate_findings(images):
    """Return where the true boxes of each class lie: a table of class, boxes and shares.

    in_lungs: mean share of a box that is lung. right, left (the patient's), upper, middle, lower: shares of boxes with
    their centre in that half or third of the bounding box of both lungs. Images without lungs are left out.
    """
    masks, boxes, found = read_array(images.arrays["masks"]), images.tables["boxes.parquet"], []
    sizes = images.at(boxes["row"])[["width", "height", "width", "height"]].to_numpy(float)
    scaled = (boxes[BOX].to_numpy() * SIDE / sizes).round(6)
    for row, class_id, box in zip(boxes["row"], boxes["class_id"], scaled, strict=True):
        ys, xs = np.nonzero(masks[row] >= 128)
        if len(ys):
            (x, y), (left, top) = (box[:2] + box[2:]) / 2, box[:2].astype(int)
            right, bottom = np.maximum(np.ceil(box[2:]).astype(int), (left + 1, top + 1))
            third = np.clip(3 * (y - ys.min()) // (np.ptp(ys) + 1), 0, 2)
            inside = (masks[row, top:bottom, left:right] >= 128).mean()
            on_right = x < (xs.min() + xs.max() + 1) / 2
            found.append([class_id, 1, inside, on_right, not on_right, *(third == k for k in range(3))])
    names = ["class", "boxes", "in_lungs", "right", "left", "upper", "middle", "lower"]
    table = pd.DataFrame(found, columns=names).astype(float).groupby("class")
    shares = table.mean().assign(boxes=table.size()).rename(index=lambda k: CLASSES[int(k)])
    return shares.reset_index()
