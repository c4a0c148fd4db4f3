"""The U-Nets of fastai (Berger et al.), of Ahmed et al. and of imlab-uiip (Liu et al.)."""

import itertools

import segmentation_models_pytorch as smp
import torch
from torch import nn

from common.nn.models import Normalised


def _convolutions(*widths, norms=False):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=not norms), *[nn.BatchNorm2d(b)] * norms, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _initialise(network, draw):
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            draw(module.weight)
            nn.init.zeros_(module.bias)


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
        self.up, self.norms, self.join, width = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), deepest
        for number, skip in enumerate(reversed(skips), 1):
            self.up.append(_pixel_shuffle(width, width // 2))
            self.norms.append(nn.BatchNorm2d(skip))
            joined = width // 2 + skip
            width = joined // 2 if number == len(skips) else joined
            self.join.append(_convolutions(joined, width, width))
        self.shuffle, width = _pixel_shuffle(width, width), width + first
        self.residual = _convolutions(width, width, width)[:-1]
        self.last = nn.Conv2d(width, classes, 1)
        for part in (self.middle, self.join, self.residual):
            _initialise(part, nn.init.kaiming_normal_)  # without norms, torch's own would let the signal fade

    def forward(self, x):
        image, *skips, x = self.encoder(x)
        x = self.middle(x)
        for up, norm, join, skip in zip(self.up, self.norms, self.join, reversed(skips), strict=True):
            x = join(torch.relu(torch.cat([up(x), norm(skip)], 1)))
        x = torch.cat([self.shuffle(x), image], 1)
        return self.last(torch.relu(x + self.residual(x)))


def _pixel_shuffle(a, b):
    """Return layers that double the side, initialised so that the four new pixels are equal (Aitken et al. 2017)."""
    convolution = nn.Conv2d(a, 4 * b, 1)
    _initialise(convolution, nn.init.kaiming_normal_)
    with torch.no_grad():
        convolution.weight.copy_(convolution.weight[::4].repeat_interleave(4, 0))
    return nn.Sequential(convolution, nn.ReLU(), nn.PixelShuffle(2))


class PlainUNet(nn.Module):
    """A U-Net with two 3×3 convolutions per level, max pooling down and transposed convolutions up.

    Images (B, 1, H, W), H and W multiples of 2^(levels − 1) → logits (B, channels, H, W). widths: channels of the
    levels, 32 to 512 in Ahmed et al. norms: whether each convolution has batch norm. Source: Ronneberger et al. 2015.
    """

    def __init__(self, channels, widths, norms=True):
        super().__init__()
        self.down = nn.ModuleList(_convolutions(a, b, b, norms=norms) for a, b in itertools.pairwise((1, *widths)))
        pairs = list(itertools.pairwise(widths[::-1]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.join = nn.ModuleList(_convolutions(2 * b, b, b, norms=norms) for _, b in pairs)
        self.last = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x):
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.last(x)


class ImlabUnet(PlainUNet):
    """The U-Net of imlab-uiip/lung-segmentation-2d: no norms, upsampling by repeated pixels, and a 3 × 3 last layer.

    widths: channels on the way down, at the bottom and on the way up; theirs are 32-64-64-128-256-256-256-128-64.
    Initialised as Keras does.
    """

    def __init__(self, channels, widths):
        nn.Module.__init__(self)
        depth = len(widths) // 2
        down, up = widths[:depth], widths[depth + 1 :]
        self.down = nn.ModuleList(_convolutions(a, b, b) for a, b in itertools.pairwise((1, *down)))
        self.down.append(_convolutions(down[-1], widths[depth]))
        pairs = zip(widths[depth:], up, strict=False)
        self.up = nn.ModuleList(nn.Sequential(nn.Upsample(scale_factor=2), _convolutions(a, b, b)) for a, b in pairs)
        self.join = nn.ModuleList(_convolutions(a + b, b) for a, b in zip(down[::-1], up, strict=True))
        self.last = nn.Conv2d(up[-1], channels, 3, padding=1)
        _initialise(self, nn.init.xavier_uniform_)


class Equalised(Normalised):
    """A network whose images are equalised first: each grey level becomes the share of pixels at or under it."""

    def scaled(self, images):
        levels = images.float().round().clamp(0, 255).long().flatten(1)
        counts = levels.new_zeros((levels.shape[0], 256), dtype=torch.float32)
        counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=counts.dtype))
        shares = 255 * counts.cumsum(1) / levels.shape[1]
        return super().scaled(shares.gather(1, levels).view(images.shape))
