"""What is built: the gate, the segmenter, their losses and what is frozen at first."""

from functools import partial

from common.data import augment
from common.infer import tta
from common.nn import losses, models
from common.train.checkpoint import load_weights


def build_classifier(config, weights=None):
    """The gate of a ClassifierConfig: radiographs (B, 1, H, W) to one logit each."""
    return models.classifier(config.backbone, 1, config.weights if weights is None else weights)


def build_segmenter(config, weights=None):
    """The network of a SegmenterConfig: radiographs to mask logits, with `presence_head` also a presence logit."""
    weights = config.weights if weights is None else weights
    return models.segmenter(config.architecture, config.encoder, weights, empty_head=config.presence_head)


def load_classifier(config, path):
    """The trained gate whose weights lie in `path`."""
    model = build_classifier(config, "none")
    load_weights(path, model)
    return model


def load_segmenter(config, path):
    """The trained segmenter whose weights lie in `path`."""
    model = build_segmenter(config, "none")
    load_weights(path, model)
    return model


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
