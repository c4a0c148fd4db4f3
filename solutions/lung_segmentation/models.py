"""Build a U-Net with a pretrained encoder, or the plain U-Net of the papers that train from scratch."""

from functools import partial

import numpy as np
import torch
from torch import nn

from common.errors import InputError
from common.metrics import segmentation
from common.nn import losses, models
from common.nn.weights import copy_state, read_state
from solutions.lung_segmentation.unets import DynamicUnet, Equalised, ImlabUnet


class PlainUNet(nn.Module):
    """A U-Net with two 3×3 convolutions per level, max pooling down and transposed convolutions up.

    Images (B, 1, H, W), H and W multiples of 2^(levels − 1) → logits (B, channels, H, W). widths: channels of the
    levels, 32 to 512 in Ahmed et al. norms: whether each convolution has batch norm. Source: Ronneberger et al. 2015.
    """

    def __init__(self, channels, widths, norms=True):
        super().__init__()
        self.down = nn.ModuleList(_two(a, b, norms) for a, b in zip((1, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.join = nn.ModuleList(_two(2 * b, b, norms) for _, b in pairs)
        self.last = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x):
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.last(x)


def _two(a, b, norms):
    parts = []
    for c in (a, b):
        parts += [nn.Conv2d(c, b, 3, padding=1, bias=not norms), *[nn.BatchNorm2d(b)] * norms, nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


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
    """Return the loss of this name, a function of (logits, masks)."""
    return {
        "bce": losses.bce,
        "dice": losses.dice,
        "squared_dice": partial(losses.dice, squared=True),
        "bce_dice": lambda logits, masks: losses.bce(logits, masks) + losses.dice(logits, masks),
    }[name]


def mask_areas(loss, logits, masks):
    """Return overlap, predicted (at 0.5) and true pixels of each channel, then the loss, (B, 3·C + 1) float64.

    An image with a logit that is not finite gets NaN.
    """
    predicted, true = logits > 0, masks.bool()
    areas = torch.stack([part.sum((2, 3)) for part in (predicted & true, predicted, true)], 2).flatten(1).double()
    each = torch.stack([loss(one[None], mask[None]) for one, mask in zip(logits, masks, strict=True)]).double()
    finite = torch.isfinite(logits).flatten(1).all(1)[:, None]
    return torch.cat([areas, each[:, None]], 1).masked_fill(~finite, torch.nan)


def mask_figures(measured, size):
    """Return dice and iou, means over images and channels, and the mean loss, from what `mask_areas` measured."""
    both, predicted, true = measured[:, :-1].reshape(len(measured), -1, 3).transpose(2, 0, 1).astype(np.int64)
    cells = segmentation.counts_from_areas(both, predicted, true, size * size)
    loss = measured[:, -1].mean()
    return {"dice": segmentation.dice(cells).mean(), "iou": segmentation.iou(cells).mean(), "loss": loss}
