"""CXR-IRNet's and SDFN's networks on timm backbones, their datasets (whole image or lungs), losses and metrics."""

import random
from functools import cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# albumentations comes from this module, which switches off its online version check
from common.data.augment import A, compose
from common.data.loaders import FeatureDataset, SampleDataset
from common.errors import InputError, check, log
from common.metrics.classification import auroc, mean_of_defined
from common.network import compute
from common.nn import models
from common.nn.backbone import ExactLinear, build_backbone, feature_map
from common.nn.classifier import Classifier, build_classifier
from common.nn.losses import asymmetric, bce, pairwise_auc
from common.nn.norms import batch_norms
from common.post.boxes import BOX
from solutions.chestxray14.config import BOX_SIDE, LABELS
from solutions.chestxray14.data import boxes_of, labels_of

GRID = 32  # side of the grids of boxes, finer than any network's feature map


class MultiScaleAttention(nn.Module):
    """Weight each pixel of an image by an attention map from several scales: (B, C, H, W) → the same shape.

    Source: Fang et al., CXR-IRNet, 3.2 and 4 (kernels 5 and 9). The paper leaves open the convolutions' channels (here
    the image's), padding (zeros), `last` (3, as in their code) and initialisation: the last one starts with weights 0
    and bias 2, so every pixel has weight 0.88 and images stay close to what the backbone was pretrained on.
    """

    def __init__(self, channels=3, kernels=(5, 9), last=3):
        super().__init__()
        self.scales = nn.ModuleList(nn.Conv2d(channels, channels, k, padding=k // 2, bias=False) for k in kernels)
        self.join = nn.Conv2d(2 + 2 * len(kernels), 1, last, padding=last // 2)
        nn.init.zeros_(self.join.weight)
        nn.init.constant_(self.join.bias, 2.0)

    def weights(self, images):
        """Return the attention map (B, 1, H, W), in 0 to 1, from each scale's maximum and mean over channels."""
        scales = [images, *(scale(images) for scale in self.scales)]
        maps = [reduced for x in scales for reduced in (x.amax(1, keepdim=True), x.mean(1, keepdim=True))]
        return torch.sigmoid(self.join(torch.cat(maps, 1)))

    def forward(self, images):
        return images * self.weights(images)


def pool_masks(masks, shape, binary=False):
    """Return masks (B, 1, H, W) average-pooled to `shape`, all ones for an empty mask; binary: thresholded at 0.5."""
    pooled = F.adaptive_avg_pool2d(masks, shape)
    pooled = (pooled >= 0.5).to(masks.dtype) if binary else pooled
    return torch.where(pooled.amax((1, 2, 3), keepdim=True) == 0, 1.0, pooled)


def weigh_features(features, masks, binary=False):
    """Return features (B, K, h, w) multiplied by masks (B, 1, H, W), pooled as by `pool_masks`.

    Source: Fang et al., CXR-IRNet, 3.3: "pixels are either 1 … or 0"; their code pools first and then binarises at 0.5.
    """
    return features * pool_masks(masks.to(features.dtype), features.shape[-2:], binary)


class ChestNet(Classifier):
    """Map radiographs to 14 logits: attention, backbone, feature weighting, mean pooling and a linear layer.

    Input: images (B, 1, H, W), uint8 or float in 0 to 255; with `weighting` (B, 2, H, W), whose second channel is the
    share of lung in each pixel, 0 to 255; or pooled features (B, K). Output: float32 (B, 14), with `with_maps` also the
    maps of `cam`. Sources: Fang et al., CXR-IRNet, 3.2 and 3.3. Without attention and weighting, this is CheXNet
    (Rajpurkar et al.) and a branch of SDFN (B.3).
    """

    def __init__(self, *args, attention=False, weighting=False, binary=False, **options):
        super().__init__(*args, **options)
        self.attention = MultiScaleAttention() if attention else nn.Identity()
        self.weighting, self.binary = weighting, binary

    def features(self, images):
        """Return the backbone's last feature map, float32 (B, K, h, w), weighted if `weighting` is on."""
        if images.ndim != 4 or images.shape[1] != 1 + self.weighting:
            wanted = "a gray and a mask channel, (B, 2, H, W)" if self.weighting else "one gray channel, (B, 1, H, W)"
            raise InputError(f"images {tuple(images.shape)}: expected {wanted}")
        maps = feature_map(self.net, self.attention(self.scaled(images[:, :1]))).float()
        return weigh_features(maps, images[:, 1:].float() / 255, self.binary) if self.weighting else maps

    def forward(self, images, with_maps=False):
        features = images if images.ndim == 2 else self.features(images)
        logits = super().forward(features if images.ndim == 2 else features.mean((2, 3)))
        return (logits, self.maps(features)) if with_maps else logits


class FusionNet(ExactLinear):
    """SDFN's last stage (B.4): map the concatenated features of both frozen networks, (B, K1 + K2), to 14 logits."""

    @torch.inference_mode()
    def probs(self, features):
        """Return probabilities, float64 (n, 14), for `pooled_features` (n, V, K1 + K2), averaged over the V views."""
        return self(torch.from_numpy(features).to(self.weight.device)).sigmoid().double().mean(1).cpu().numpy()


def build_network(config, weights=None):
    """Return the ChestNet of a NetworkConfig, with pretrained weights: `weights`, by default those of the config."""
    options = {"attention": config.attention, "weighting": config.weighting, "binary": config.masks == "binary"}
    options |= {"drop_path": config.drop_path}
    model = build_classifier(config, len(LABELS), weights, ChestNet, **options)
    for module in [model.net] if config.frozen else batch_norms(model.net) if config.frozen_norms else ():
        module.requires_grad_(False)
    return model


@cache
def feature_width(backbone, size):
    """Return the number of channels of a backbone's last feature map, without changing the random state."""
    with torch.random.fork_rng(devices=[]):
        return build_backbone(models.timm_name(backbone), size)[1]


def build_fusion(config, weights=None):
    """Return the FusionNet over the features of both networks of a Config."""
    return FusionNet(sum(feature_width(one.backbone, one.size) for one in (config.whole, config.lungs)), len(LABELS))


def box_loss(maps, boxes):
    """Return the mean, over class maps with boxes, of −log of the share of the map's softmax inside its boxes.

    maps: (B, C, h, w) real, softmax over cells; boxes: uint8 (B, C, H, W), 255 inside, all 0 for maps without boxes.
    """
    inside = F.adaptive_avg_pool2d(boxes.float() / 255, maps.shape[-2:]).flatten(2)
    most = inside.amax(2, keepdim=True)
    shares = (maps.flatten(2).softmax(2) * inside / most.clamp_min(1e-6)).sum(2).clamp_min(1e-6)
    boxed = most[..., 0] > 0
    return -(shares.log() * boxed).sum() / boxed.sum().clamp_min(1)


LOSSES = {"bce": bce, "asymmetric": asymmetric}


def stop_classes(patience, active, history):
    """Set `active`, bool (14,), the classes that still train: those whose best AUROC is under `patience` epochs old.

    history: list of each epoch's metrics, with auroc_<class>. A class without AUROC stays active. Source: task-wise
    early stopping, Zhang et al. 2014 (Facial landmark detection by deep multi-task learning), who compare losses.
    """
    for k, label in enumerate(LABELS):
        scores = np.array([epoch[f"auroc_{label}"] for epoch in history])
        active[k] = not np.isfinite(scores).any() or len(scores) - 1 - np.nanargmax(scores) < patience


def training_loss(config, model, images, target, active=None):
    """Return a batch's loss under a NetworkConfig: the label loss plus the weighted pairwise AUC and box losses.

    active: bool (14,), the classes whose logits get a gradient; None for all.
    """
    labels = target["labels"] if config.box_loss else target
    if config.mixup:
        share = torch.distributions.Beta(config.mixup, config.mixup).sample().item()
        order = torch.randperm(len(images), device=images.device)
        images, labels = (share * part + (1 - share) * part[order] for part in (images.float(), labels))
    logits, maps = model(images, with_maps=True) if config.box_loss else (model(images), None)
    if active is not None:  # the others get no gradient
        logits = torch.where(torch.from_numpy(active).to(logits.device), logits, logits.detach())
    loss = LOSSES[config.loss](logits, labels + config.label_smoothing * (0.5 - labels))
    if config.auc_loss:
        loss = loss + config.auc_loss * pairwise_auc(logits, labels)
    return loss if maps is None else loss + config.box_loss * box_loss(maps, target["boxes"])


def auroc_and_loss(labels, logits, by_class=False):
    """Return the metrics of logits, float32 (n, 14): loss, and auroc, the mean over classes with both 0s and 1s.

    by_class: also auroc_<class>, NaN for a class without both.
    """
    loss = bce(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    found = auroc(labels, logits, undefined=np.nan)
    classes = {f"auroc_{label}": float(value) for label, value in zip(LABELS, found, strict=True)} if by_class else {}
    return {"auroc": mean_of_defined(found), "loss": loss} | classes


def podium(size):
    """Return the augmentations of the podium preset for images of `size` pixels; their parameters are our own."""
    moved = A.Affine(scale=(0.92, 1.08), translate_percent=(-0.05, 0.05), rotate=(-10.0, 10.0), keep_ratio=True, p=0.5)
    cropped = A.RandomResizedCrop((size, size), scale=(0.7, 1.0), ratio=(0.9, 1.11), p=0.5)
    return compose([A.HorizontalFlip(p=0.5), cropped, moved, A.RandomBrightnessContrast(0.2, 0.2, p=0.5)])


# Augmentation pipelines by their name in a configuration, as functions of the image size in pixels.
AUGMENTATIONS = {"none": lambda size: None, "flip": lambda size: compose([A.HorizontalFlip(p=0.5)]), "podium": podium}


class ViewDataset(SampleDataset):
    """Store images as input of a network; an item is `(image uint8 (1 or 2, size, size), target)`.

    Each image is scaled to `resize`, augmented if the key is `(index, seed)`, and centre-cropped to `size` pixels.
    masks: path of a `.npy`, uint8 (N, m, m), augmented like the image to become its second channel. labels: float32
    (n, 14); without them the target is the store row. boxes: from `boxes_of`, augmented like the image; the target is
    then a dict of labels and boxes, uint8 (14, GRID, GRID), 255 inside. Raises InputError for an empty mask.
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
    """Return the ViewDataset of store rows for a stage (whole or lungs) with the NetworkConfig `config`."""
    images = job.images
    pixels = images.store.images if stage == "whole" else images.arrays["crops"]
    masks = images.arrays["masks"] if config.weighting else None
    transform = AUGMENTATIONS[config.augmentation](config.resize) if augment else None
    labels = labels_of(images, rows) if targets else None
    boxes = boxes_of(images, rows) if config.box_loss and augment else None
    return ViewDataset(pixels, rows, config.resize, config.size, masks, transform, labels, boxes)


def feature_dataset(job, branches, rows, flips, trained=True):
    """Return the FeatureDataset of store rows, see `pooled_features`."""
    log.info(f"fold{branches[0].fold}: features of {len(rows):,} images from {len(branches)} frozen networks")
    found = pooled_features(job, branches, rows, flips, trained), labels_of(job.images, rows)
    return FeatureDataset(*map(torch.from_numpy, found))


def pooled_features(job, branches, rows, flips, trained=True):
    """Return the concatenated pooled features of frozen networks, float32 (n, V, K1 + K2).

    branches: the Networks in the order of the columns; unless `trained`, they have their initial weights. V is 2 with
    `flips` (the image, then its mirror image), else 1.
    """
    widths = [feature_width(branch.config.backbone, branch.config.size) for branch in branches]
    found = np.empty((len(rows), 1 + flips, sum(widths)), np.float32)
    parts = np.split(found, np.cumsum(widths)[:-1], axis=2)
    for branch, columns in zip(branches, parts, strict=True) if len(rows) else ():
        model = branch.load(job.run) if trained else branch.build(None)

        def pooled(images, model=model):
            return torch.stack([model.pooled(view) for view in (images, images.flip(-1))[: 1 + flips]], 1)

        title, amp = f"features {branch.stage}", branch.config.precision
        columns[:] = compute(job, branch, model, pooled, rows, title, amp=amp)
    return found
