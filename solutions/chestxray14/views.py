"""What the networks see: the whole image or the crop around the lungs, augmented; and the features of frozen ones."""

import random

import cv2
import numpy as np
import torch
from torch.utils.data import TensorDataset

# albumentations from there, where its look-up of newer versions is switched off
from common.data.augment import A, compose
from common.data.loaders import SampleDataset
from common.errors import InputError, check
from common.infer.predict import predict_probs
from common.post.boxes import BOX
from solutions.chestxray14.config import BOX_SIDE, LABELS
from solutions.chestxray14.data import boxes_of, labels_of
from solutions.chestxray14.models import feature_width

GRID = 32  # side of the grids of boxes, finer than any network's feature map


def podium(size):
    """Return our pipeline for the podium preset, for images of `size` pixels; its numbers are ours."""
    moved = A.Affine(scale=(0.92, 1.08), translate_percent=(-0.05, 0.05), rotate=(-10.0, 10.0), keep_ratio=True, p=0.5)
    cropped = A.RandomResizedCrop((size, size), scale=(0.7, 1.0), ratio=(0.9, 1.11), p=0.5)
    soft = size / 512
    grain = [
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3 * soft, 1.2 * soft), p=1.0),
        A.GaussNoise((0.005, 0.03), p=1.0),
    ]
    lit = A.RandomBrightnessContrast(0.2, 0.2, p=0.5)
    return compose([A.HorizontalFlip(p=0.5), cropped, moved, lit, A.OneOf(grain, p=0.15)])


# What a configuration names: size of the images in pixels → pipeline.
AUGMENTATIONS = {"none": lambda size: None, "flip": lambda size: compose([A.HorizontalFlip(p=0.5)]), "podium": podium}


class ViewDataset(SampleDataset):
    """Images of a store as a network sees them; an item is `(image uint8 (1 or 2, size, size), target)`.

    Each is scaled to `resize`, augmented where the key is `(index, seed)`, and its centre of `size` pixels cut out.
    masks: path of a `.npy` uint8 (N, m, m); moved with the image it becomes the second channel. labels: float32 (n,
    14); without them the target is the store row. boxes: of `boxes_of`; moved with the image they make the target a
    dict of labels and boxes, uint8 (14, GRID, GRID), 255 inside. Raises InputError for an empty mask.
    """

    def __init__(self, images, rows, resize, size, masks=None, transform=None, labels=None, boxes=None):
        super().__init__(images, size=resize, rows=rows)
        self.masks = None if masks is None else SampleDataset(masks, size=resize, rows=rows)
        self.centre = slice((resize - size) // 2, (resize - size) // 2 + size)
        self.transform, self.labels = transform, labels
        self.boxes = None if boxes is None else dict(list(boxes.groupby("row")))

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, row = super().__getitem__(index)
        planes = {"image": image[0].numpy()}
        if self.masks is not None:
            planes["mask"] = self.masks[index][0][0].numpy()
            check(planes["mask"].any(), f"{self.masks.path}: the mask of row {int(row)} is empty; run prepare again")
        boxes = None if self.boxes is None else self.boxes.get(int(row))
        if boxes is not None:
            planes["masks"] = np.zeros((len(boxes), *image.shape[1:]), np.uint8)
            corners = np.round(boxes[BOX].to_numpy() * image.shape[1] / BOX_SIDE).astype(int)
            for plane, (left, top, right, bottom) in zip(planes["masks"], corners, strict=True):
                plane[top : max(bottom, top + 1), left : max(right, left + 1)] = 255
        if self.transform is not None and seed is not None:
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            planes = self.transform(**planes)
        target = row if self.labels is None else torch.from_numpy(self.labels[index])
        if self.boxes is not None:
            grids = np.zeros((len(LABELS), GRID, GRID), np.uint8)
            for plane, label in zip(planes.get("masks", ()), () if boxes is None else boxes["label"], strict=True):
                grid = cv2.resize(plane[self.centre, self.centre], (GRID, GRID), interpolation=cv2.INTER_AREA)
                grids[label] = np.maximum(grids[label], grid)
            target = {"labels": target, "boxes": torch.from_numpy(grids)}
        planes = [planes[name][self.centre, self.centre] for name in ("image", "mask") if name in planes]
        return torch.from_numpy(np.stack(planes)), target


def view_dataset(job, rows, augment=False, targets=False, *, config, stage):
    """Return the ViewDataset of store rows for a stage, whole or lungs, and its NetworkConfig."""
    images = job.images
    pixels = images.store.images if stage == "whole" else images.arrays["crops"]
    masks = images.arrays["masks"] if config.weighting else None
    transform = AUGMENTATIONS[config.augmentation](config.resize) if augment else None
    labels = labels_of(images, rows) if targets else None
    boxes = boxes_of(images, rows) if config.box_loss and augment else None
    if boxes is not None and not len(boxes):
        raise InputError(
            f"{stage}.box_loss: no training image has a box of a finding that its labels name; NIH's boxes are all on "
            "the official test list, so name others with --boxes"
        )
    return ViewDataset(pixels, rows, config.resize, config.size, masks, transform, labels, boxes)


class FeatureDataset(TensorDataset):
    """Frozen networks' features (n, V, K) with labels (n, 14); the seed of a key `(index, seed)` chooses the view."""

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        features, labels = super().__getitem__(index)
        return features[seed % len(features)], labels


def pooled_features(job, branches, rows, flips):
    """Return the pooled features of frozen networks side by side, float32 (n, V, K1 + K2).

    branches: the trained Networks, in the order of the columns. V is 2 with `flips`: the image, then its mirror.
    """
    widths = [feature_width(branch.config.backbone, branch.config.size) for branch in branches]
    found = np.empty((len(rows), 1 + flips, sum(widths)), np.float32)
    parts = np.split(found, np.cumsum(widths)[:-1], axis=2)
    for branch, columns in zip(branches, parts, strict=True) if len(rows) else ():
        config, model = branch.config, branch.load(job.run)
        model.to(job.device, memory_format=torch.channels_last).eval()

        def pooled(images, model=model):
            return torch.stack([model.pooled(view) for view in (images, images.flip(-1))[: 1 + flips]], 1)

        how = {"batch_size": 2 * config.batch_size, "device": job.device, "amp": config.precision}
        how |= {
            "workers": job.workers,
            "activation": lambda features: features,
            "progress": f"features, {branch.stage}",
        }
        columns[:] = predict_probs([pooled], branch.dataset(job, rows, False, False), **how)
    return found
