"""What is built: the gate, the segmenter, their losses and what is frozen at first."""

from functools import partial

import numpy as np
import torch

from common.data import augment
from common.infer import tta
from common.metrics import classification, segmentation
from common.nn import losses, models
from solutions.siim_pneumothorax.config import SIZE


def build_classifier(config, weights=None):
    """The gate of a ClassifierConfig: radiographs (B, 1, H, W) to one logit each."""
    return models.classifier(config.backbone, 1, config.weights if weights is None else weights)


def build_segmenter(config, weights=None):
    """The network of a SegmenterConfig: radiographs to mask logits, with `presence_head` also a presence logit."""
    weights = config.weights if weights is None else weights
    return models.segmenter(config.architecture, config.encoder, weights, empty_head=config.presence_head)


def freeze_body(model, frozen):
    """Train the new last layer alone while `frozen` (paper, 4.1.1)."""
    models.freeze_all_but_head(model) if frozen else model.requires_grad_(True)


def freeze_half(model, frozen):
    """Train the second half of the layers alone while `frozen` (paper, 4.1.2)."""
    models.freeze_first_half(model) if frozen else model.requires_grad_(True)


def mask_loss(config):
    """The loss of a SegmenterConfig as a function of (logits, masks)."""
    weight = config.positive_weight
    return {
        "focal_dice": losses.focal_dice,
        "combo": partial(losses.combo, pos_weight=weight),
        "tversky": losses.tversky,
        "lovasz": lambda logits, masks: losses.bce(logits, masks, weight) + losses.lovasz_hinge(logits, masks),
        "bce_dice": lambda logits, masks: losses.bce(logits, masks, weight) + losses.dice(logits, masks),
    }[config.loss]


def augmentation(name, size):
    """The augmentation pipeline that a configuration names, for images of `size` pixels."""
    return {"paper": augment.paper_siim, "podium": partial(augment.podium_siim, size), "light": augment.light}[name]()


def views(names):
    """The image itself and the test-time views that a configuration names."""
    named = {"flip": [tta.FLIP], "scale": [tta.scale(0.875), tta.scale(1.125)]}
    return [tta.IDENTITY, *(view for name in names for view in named[name])]


def gate_figures(present, probs):
    """Return the figures of a gate at the probability 0.5: mcc, precision, recall, accuracy; and auroc.

    present: (n,) of 0 and 1; probs: (n,) probabilities.
    """
    counts = classification.confusion_counts(present, probs, 0.5)
    return {
        "mcc": classification.mcc(counts),
        "auroc": classification.auroc(present, probs, undefined=np.nan),
        "precision": classification.precision(counts),
        "recall": classification.recall(counts),
        "accuracy": classification.accuracy(counts),
    }


def mask_areas(output, masks):
    """Return the pixels of both masks, of the predicted one at 0.5 and of the true one, (B, 3) float64.

    A logit that is not finite makes its image's NaN.
    """
    logits, masks = output[0] if isinstance(output, tuple) else output, masks.bool()
    predicted = logits > 0
    areas = torch.stack([part.sum((1, 2, 3)) for part in (predicted & masks, predicted, masks)], 1).double()
    return areas.masked_fill(~torch.isfinite(logits).flatten(1).all(1)[:, None], torch.nan)


def mask_figures(areas, size):
    """Return the figures of a segmenter from its `mask_areas` (n, 3), means over images, both empty being 1.

    iou, f1 and f2 of the plain masks at `size` pixels; dice where masks under 1,000 pixels (of 1024 × 1024) count as
    empty, which is nearer to what a tuned rule will make of them.
    """
    both, predicted, true = areas.astype(np.int64).T
    cells = segmentation.counts_from_areas(both, predicted, true, size * size)
    kept = predicted >= 1000 * (size / SIZE) ** 2
    return {
        "iou": segmentation.iou(cells, reduce="image"),
        "f1": segmentation.f_beta(cells, 1, reduce="image"),
        "f2": segmentation.f_beta(cells, 2, reduce="image"),
        "dice": segmentation.dice_from_areas(both * kept, predicted * kept, true).mean(),
    }
