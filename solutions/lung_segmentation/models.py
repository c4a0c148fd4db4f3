"""What is built: a U-Net over a pretrained encoder, or the plain one of the papers that train from scratch."""

from functools import partial

import torch
from torch import nn

from common.errors import InputError
from common.infer import tta
from common.nn import losses, models
from common.nn.weights import copy_state, read_state
from common.train.checkpoint import load_weights


class PlainUNet(nn.Module):
    """A U-Net of two 3×3 convolutions a level, max pooling down and transposed convolutions up.

    Images (B, 1, H, W), H and W multiples of 2^(levels − 1) → logits (B, channels, H, W). widths: channels of the
    levels, 32 to 512 in Ahmed et al. Batch norm follows each convolution. Source: Ronneberger et al. 2015.
    """

    def __init__(self, channels, widths):
        super().__init__()
        self.down = nn.ModuleList(_two(a, b) for a, b in zip((1, *widths), widths, strict=False))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.join = nn.ModuleList(_two(2 * b, b) for _, b in pairs)
        self.last = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x):
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.last(x)


def _two(a, b):
    parts = [(nn.Conv2d(c, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)) for c in (a, b)]
    return nn.Sequential(*parts[0], *parts[1])


def build_network(config, channels, weights=None):
    """The network of a NetworkConfig: radiographs (B, 1, H, W), sides multiples of 32, to logits (B, channels, H, W).

    Raises InputError for names that the libraries do not know, and for a decoder that does not fit.
    """
    weights = config.weights if weights is None else weights
    if config.architecture == "plain":
        if config.encoder or len(config.decoder) < 2 or weights == "imagenet":
            raise InputError("network: a plain U-Net has no encoder, no imagenet weights, and a width for every level")
        model = models.Normalised(PlainUNet(channels, config.decoder), (0.5,), (0.25,), 2 ** (len(config.decoder) - 1))
        if weights != "none":
            copy_state(model, read_state(weights), str(weights), list(model.state_dict()))
        return model
    options = {"decoder_channels": config.decoder, "encoder_depth": len(config.decoder)} if config.decoder else {}
    return models.segmenter(config.architecture, config.encoder, weights, channels, **options)


def load_network(config, channels, path):
    """The trained network whose weights lie in `path`."""
    model = build_network(config, channels, "none")
    load_weights(path, model)
    return model


def freeze_encoder(model, frozen):
    """Train decoder and head alone while `frozen` (Berger et al., first phase)."""
    models.freeze_encoder(model) if frozen else model.requires_grad_(True)


def mask_loss(name):
    """The loss that a configuration names, as a function of (logits, masks)."""
    return {
        "bce": losses.bce,
        "dice": losses.dice,
        "squared_dice": partial(losses.dice, squared=True),
        "bce_dice": lambda logits, masks: losses.bce(logits, masks) + losses.dice(logits, masks),
    }[name]


def views(names):
    """The image itself and the test-time views that a configuration names."""
    named = {"flip": [tta.FLIP], "scale": [tta.scale(0.875), tta.scale(1.125)]}
    return [tta.IDENTITY, *(view for name in names for view in named[name])]
