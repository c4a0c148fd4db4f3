"""Losses, augmentations and metrics of the gate and the segmenter."""

from functools import partial

import numpy as np
import torch

from common import detection
from common.data import augment
from common.metrics import classification, segmentation
from common.nn import losses
from solutions.siim_pneumothorax.config import SIZE


def mask_loss(config):
    """Return the loss of a SegmenterConfig as a function of (logits, masks)."""
    weight = config.positive_weight
    return {
        "focal_dice": partial(losses.focal_dice, pos_weight=weight, focal_weight=config.focal_weight),
        "combo": partial(losses.combo, pos_weight=weight),
        "tversky": losses.tversky,
        "focal_tversky": partial(losses.tversky, gamma=0.75),
        "boundary": lambda logits, masks: losses.bce_dice(logits, masks, weight) + losses.boundary(logits, masks),
        "lovasz": lambda logits, masks: losses.bce(logits, masks, weight) + losses.lovasz_hinge(logits, masks),
        "bce_dice": partial(losses.bce_dice, pos_weight=weight),
    }[config.loss]


def augmentation(name, size, crop=0):
    """Return the named augmentation pipeline for images of `size` pixels; crop: side of a final random crop, or 0."""
    found = {"paper": augment.paper_siim, "podium": partial(augment.podium_siim, size), "light": augment.light}[name]()
    return augment.compose([*found.transforms, augment.crop_near_mask(crop)]) if crop else found


def gate_figures(present, probs):
    """Return mcc, precision, recall and accuracy at the threshold 0.5, and auroc; present: (n,) of 0 and 1."""
    counts = classification.confusion_counts(present, probs, 0.5)
    further = {name: getattr(classification, name)(counts) for name in ("mcc", "precision", "recall")}
    return detection.gate_figures(present, probs) | further


def mask_areas(output, masks):
    """Return the pixels of overlap, prediction (at 0.5) and truth, (B, 3) float64; NaN if any logit is not finite."""
    logits, masks = output[0] if isinstance(output, tuple) else output, masks.bool()
    predicted = logits > 0
    areas = torch.stack([predicted & masks, predicted, masks], 1).flatten(2).sum(2, dtype=torch.int32).double()
    return areas.masked_fill(~torch.isfinite(logits).flatten(1).all(1)[:, None], torch.nan)


def mask_figures(areas, size):
    """Return a segmenter's mean metrics from `mask_areas`; dice empties masks under 1,000 pixels (at 1024 px)."""
    both, predicted, true = areas.astype(np.int64).T
    cells = segmentation.counts_from_areas(both, predicted, true, size * size)
    kept = predicted >= 1000 * (size / SIZE) ** 2
    return {
        "iou": segmentation.iou(cells, reduce="image"),
        "f1": segmentation.f_beta(cells, 1, reduce="image"),
        "f2": segmentation.f_beta(cells, 2, reduce="image"),
        "dice": segmentation.dice_from_areas(both * kept, predicted * kept, true).mean(),
    }
