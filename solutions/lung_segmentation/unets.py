"""The U-Nets of fastai (Berger et al.) and of imlab-uiip (Liu et al.)."""

import itertools

import segmentation_models_pytorch as smp
import torch
from torch import nn

from common.nn.models import Normalised


class DynamicUnet(nn.Module):
    """fastai's U-Net over a pretrained encoder: pixel shuffle up, the input joined before the last layers.

    Images (B, 3, H, W), sides multiples of 32 → logits (B, classes, H, W). Norms are only on the encoder's maps.
    Source: `DynamicUnet` of fastai 2 with its defaults (no blur, no self-attention).
    """

    def __init__(self, encoder, encoder_weights, classes):
        super().__init__()
        self.encoder = smp.encoders.get_encoder(encoder, weights=encoder_weights)
        first, *skips, deepest = self.encoder.out_channels
        self.middle = nn.Sequential(nn.BatchNorm2d(deepest), nn.ReLU(), *_convolutions(deepest, 2 * deepest, deepest))
        self.blocks, width = nn.ModuleList(), deepest
        for number, skip in enumerate(reversed(skips), 1):
            self.blocks.append(_Up(width, skip, halved=number == len(skips)))
            width = self.blocks[-1].width
        self.shuffle, width = _pixel_shuffle(width, width), width + first
        self.residual = _convolutions(width, width, width)[:-1]
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        image, *skips, x = self.encoder(x)
        x = self.middle(x)
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = block(x, skip)
        x = torch.cat([self.shuffle(x), image], 1)
        return self.last(torch.relu(x + self.residual(x)))


class _Up(nn.Module):
    def __init__(self, width, skip, halved):
        super().__init__()
        joined = width // 2 + skip
        self.width = joined // 2 if halved else joined
        self.shuffle, self.norm = _pixel_shuffle(width, width // 2), nn.BatchNorm2d(skip)
        self.convolutions = _convolutions(joined, self.width, self.width)

    def forward(self, x, skip):
        return self.convolutions(torch.relu(torch.cat([self.shuffle(x), self.norm(skip)], 1)))


def _convolutions(*widths):
    layers = [(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(part for pair in layers for part in pair))


def _pixel_shuffle(a, b):
    """Return layers that double the side, initialised so that the four new pixels are equal (Aitken et al. 2017)."""
    convolution = nn.Conv2d(a, 4 * b, 1)
    with torch.no_grad():
        convolution.weight.copy_(convolution.weight[::4].repeat_interleave(4, 0))
        convolution.bias.copy_(convolution.bias[::4].repeat_interleave(4, 0))
    return nn.Sequential(convolution, nn.ReLU(), nn.PixelShuffle(2))


class ImlabUnet(nn.Module):
    """The U-Net of imlab-uiip/lung-segmentation-2d: no norms, upsampling by repeated pixels, and a 3 × 3 last layer.

    Images (B, 1, H, W) → logits (B, channels, H, W). widths: channels on the way down, at the bottom and on the way up;
    theirs are 32-64-64-128-256-256-256-128-64. Initialised as Keras does.
    """

    def __init__(self, channels, widths):
        super().__init__()
        depth = len(widths) // 2
        down, up = widths[:depth], widths[depth + 1 :]
        self.down = nn.ModuleList(_convolutions(a, b, b) for a, b in zip((1, *down), down, strict=False))
        self.bottom = _convolutions(*widths[depth - 1 : depth + 1])
        self.up = nn.ModuleList(_convolutions(a, b, b) for a, b in zip(widths[depth:], up, strict=False))
        self.join = nn.ModuleList(_convolutions(a + b, b) for a, b in zip(down[::-1], up, strict=True))
        self.last = nn.Conv2d(up[-1], channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = nn.functional.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for up, join, skip in zip(self.up, self.join, reversed(skips), strict=True):
            x = join(torch.cat([skip, up(nn.functional.interpolate(x, scale_factor=2))], 1))
        return self.last(x)


class Equalised(Normalised):
    """A network whose images are equalised first: each grey level becomes the share of pixels at or under it."""

    def scaled(self, images):
        levels = images.float().round().clamp(0, 255).long().flatten(1)
        counts = torch.zeros(len(levels), 256, device=levels.device)
        counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=counts.dtype))
        shares = 255 * counts.cumsum(1) / levels.shape[1]
        return super().scaled(shares.gather(1, levels).view(images.shape))
