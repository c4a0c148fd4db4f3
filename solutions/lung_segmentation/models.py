"""Networks, including the U-Nets of fastai, Ahmed et al. and imlab-uiip (Liu et al.); losses and metrics."""

import itertools
from functools import partial

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import nn

from common.data.loaders import UNKNOWN
from common.errors import InputError, check
from common.metrics import segmentation
from common.network import Network
from common.nn import losses, models
from common.nn.weights import copy_state, read_state


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
    """fastai 2's U-Net over a pretrained encoder; the last layers also get the input image; sides: multiples of 32."""

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
            _initialise(part, nn.init.kaiming_normal_)  # without norms, torch's default would let the signal fade

    def forward(self, x):
        image, *skips, x = self.encoder(x)
        x = self.middle(x)
        for up, norm, join, skip in zip(self.up, self.norms, self.join, reversed(skips), strict=True):
            x = join(torch.relu(torch.cat([up(x), norm(skip)], 1)))
        x = torch.cat([self.shuffle(x), image], 1)
        return self.last(torch.relu(x + self.residual(x)))


def _pixel_shuffle(a, b):
    """Return layers that double the side, initialised to make the four new pixels equal (Aitken et al. 2017)."""
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
    """The U-Net of imlab-uiip/lung-segmentation-2d; widths: channels on the way down, at the bottom and up."""

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


class Equalised(models.Normalised):
    """A network with histogram equalisation: each grey level becomes the share of pixels at or below it."""

    def scaled(self, images):
        levels = images.float().round().clamp(0, 255).long().flatten(1)
        counts = levels.new_zeros((levels.shape[0], 256), dtype=torch.float32)
        counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=counts.dtype))
        shares = 255 * counts.cumsum(1) / levels.shape[1]
        return super().scaled(shares.gather(1, levels).view(images.shape))


def build_network(config, channels, weights=None):
    """Return the network of a NetworkConfig: from radiographs (B, 1, H, W), sides multiples of 32, to mask logits."""
    weights = config.weights if weights is None else weights
    if config.architecture in ("plain", "plain_no_norm", "imlab"):
        kind, depth = config.architecture, len(config.decoder) - 1
        if config.encoder or depth < 1 or weights == "imagenet" or (kind == "imlab" and depth % 2):
            raise InputError(f"network: {kind} takes no encoder, no imagenet weights, and a width for every level")
        if kind == "imlab":  # mean and standard deviation of a uniform distribution, as in equalised images
            model = Equalised(ImlabUnet(channels, config.decoder), (0.5,), (12**-0.5,), 2 ** (depth // 2))
        else:
            net = PlainUNet(channels, config.decoder, kind == "plain")
            model = models.Normalised(net, (0.5,), (0.25,), 2**depth)
        if weights != "none":
            copy_state(model, read_state(weights), str(weights), list(model.state_dict()))
        return model
    if config.architecture == "dynamicunet":
        check(not config.decoder, "network.decoder: the widths of a dynamicunet follow from its encoder")
        return models.segmenter(DynamicUnet, config.encoder, weights, channels)
    options = {"decoder_channels": config.decoder, "encoder_depth": len(config.decoder)} if config.decoder else {}
    return models.segmenter(config.architecture, config.encoder, weights, channels, **options)


def mask_loss(name):
    """Return the loss called `name`, a function of (logits, masks) that ignores UNKNOWN masks."""
    kinds = {"bce": losses.bce, "dice": losses.dice, "bce_dice": losses.bce_dice}
    loss = (kinds | {"squared_dice": partial(losses.dice, squared=True)})[name]

    def of_known(logits, masks):
        known = _known(masks)
        return loss(logits, masks) if known.all() else loss(logits[known][:, None], masks[known][:, None])

    return of_known


def _known(masks):
    return masks.flatten(2).amax(2) != UNKNOWN  # (B, C); by the maximum, as augmentation may cut off or blend pixels


def mask_areas(loss, logits, masks):
    """Return float64 (B, 3·C + 1): each channel's overlap, predicted and true pixels (−1: unknown), then the loss."""
    predicted, true, known = logits > 0, masks.bool(), _known(masks)
    areas = torch.stack([part.sum((2, 3)) * known for part in (predicted & true, predicted, true)], 2)
    areas[..., 2] -= (~known).int()
    areas = areas.flatten(1).double()
    each = torch.stack([loss(one[None], mask[None]) for one, mask in zip(logits, masks, strict=True)]).double()
    finite = torch.isfinite(logits).flatten(1).all(1)[:, None]
    return torch.cat([areas, each[:, None]], 1).masked_fill(~finite, torch.nan)


def mask_figures(measured, size):
    """Return dice and iou, averaged over images and channels, and the mean loss from the output of `mask_areas`."""
    areas = measured[:, :-1].reshape(-1, 3).astype(np.int64)
    both, predicted, true = areas[areas[:, 2] >= 0].T
    cells = segmentation.counts_from_areas(both, predicted, true, size * size)
    loss = measured[:, -1].mean()
    return {"dice": segmentation.dice(cells).mean(), "iou": segmentation.iou(cells).mean(), "loss": loss}


def mask_network(fold, stage, config, build, dataset, channels, **more):
    """Return the Network of one fold that segments `channels` structures by config.loss; its encoder can be frozen."""
    loss = mask_loss(config.loss)
    return Network(
        fold,
        stage,
        config,
        build,
        dataset,
        loss=loss,
        couples=True,  # the loss is a mean over known masks
        measure=partial(mask_areas, loss),
        figures=lambda job, areas, rows: mask_figures(areas, config.size),
        freeze=models.freeze_encoder,
        channels=channels,
        **more,
    )
