"""Build the network of a configuration; its losses and what is measured of its masks."""

from functools import partial

import numpy as np
import torch

from common.data.loaders import UNKNOWN
from common.errors import InputError
from common.metrics import segmentation
from common.nn import losses, models
from common.nn.weights import copy_state, read_state
from solutions.lung_segmentation.unets import DynamicUnet, Equalised, ImlabUnet, PlainUNet


def build_network(config, channels, weights=None):
    """Return the network of a NetworkConfig: radiographs (B, 1, H, W), sides multiples of 32, to logits (B, C, H, W).

    Raises InputError for unknown names, and for a decoder that does not fit.
    """
    weights = config.weights if weights is None else weights
    if config.architecture in ("plain", "plain_no_norm", "imlab"):
        kind, depth = config.architecture, len(config.decoder) - 1
        if config.encoder or depth < 1 or weights == "imagenet" or (kind == "imlab" and depth % 2):
            raise InputError(f"network: {kind} takes no encoder, no imagenet weights, and a width for every level")
        if kind == "imlab":  # equalised images have the mean and deviation of a uniform distribution
            model = Equalised(ImlabUnet(channels, config.decoder), (0.5,), (12**-0.5,), 2 ** (depth // 2))
        else:
            net = PlainUNet(channels, config.decoder, kind == "plain")
            model = models.Normalised(net, (0.5,), (0.25,), 2**depth)
        if weights != "none":
            copy_state(model, read_state(weights), str(weights), list(model.state_dict()))
        return model
    if config.architecture == "dynamicunet":
        if config.decoder:
            raise InputError("network.decoder: the widths of a dynamicunet follow from its encoder")
        return models.segmenter(DynamicUnet, config.encoder, weights, channels)
    options = {"decoder_channels": config.decoder, "encoder_depth": len(config.decoder)} if config.decoder else {}
    return models.segmenter(config.architecture, config.encoder, weights, channels, **options)


def mask_loss(name):
    """Return the loss of this name, a function of (logits, masks) in which UNKNOWN masks take no part."""
    loss = {
        "bce": losses.bce,
        "dice": losses.dice,
        "squared_dice": partial(losses.dice, squared=True),
        "bce_dice": lambda logits, masks: losses.bce(logits, masks) + losses.dice(logits, masks),
    }[name]

    def of_known(logits, masks):
        known = _known(masks)
        return loss(logits, masks) if known.all() else loss(logits[known][:, None], masks[known][:, None])

    return of_known


def _known(masks):
    return masks.flatten(2).amax(2) != UNKNOWN  # (B, C); augmentation may have cut off or blended some of the pixels


def mask_areas(loss, logits, masks):
    """Return overlap, predicted (at 0.5) and true pixels of each channel, then the loss, (B, 3·C + 1) float64.

    An image with a logit that is not finite gets NaN, an unknown mask −1 true pixels.
    """
    predicted, true, known = logits > 0, masks.bool(), _known(masks)
    areas = torch.stack([part.sum((2, 3)) * known for part in (predicted & true, predicted, true)], 2)
    areas[..., 2] -= (~known).int()
    areas = areas.flatten(1).double()
    each = torch.stack([loss(one[None], mask[None]) for one, mask in zip(logits, masks, strict=True)]).double()
    finite = torch.isfinite(logits).flatten(1).all(1)[:, None]
    return torch.cat([areas, each[:, None]], 1).masked_fill(~finite, torch.nan)


def mask_figures(measured, size):
    """Return dice and iou, means over images and channels, and the mean loss, from what `mask_areas` measured."""
    areas = measured[:, :-1].reshape(-1, 3).astype(np.int64)
    both, predicted, true = areas[areas[:, 2] >= 0].T
    cells = segmentation.counts_from_areas(both, predicted, true, size * size)
    loss = measured[:, -1].mean()
    return {"dice": segmentation.dice(cells).mean(), "iou": segmentation.iou(cells).mean(), "loss": loss}
