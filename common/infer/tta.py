"""Test-time augmentation: a view is a pair of functions, `forward(images)` and `inverse(maps, size)`.

`forward` takes images (B, 1, H, W); `inverse` maps (B, C, h, w) back to the images' size (H, W) and orientation.
"""

import torch.nn.functional as F

from common.errors import check

IDENTITY = (lambda images: images, lambda maps, size: maps)
FLIP = (lambda images: images.flip(-1), lambda maps, size: maps.flip(-1))  # left and right exchanged


def scale(factor, multiple=32):
    """Return the view at `factor` times the size, each side rounded to a multiple of `multiple`, at least one."""
    check(0 < factor < 10, f"scale {factor}: must be between 0 and 10")

    def forward(images):
        size = [max(1, int(side * factor / multiple + 0.5)) * multiple for side in images.shape[-2:]]
        return F.interpolate(images.float(), size, mode="bilinear", antialias=True)

    return forward, lambda maps, size: F.interpolate(maps, size, mode="bilinear", antialias=True)


def views(names, sides=False):
    """Return the identity and the named views (flip, scale); sides: flipping also exchanges the first two maps."""
    flip = (FLIP[0], lambda maps, size: maps.flip(-1)[:, [1, 0, *range(2, maps.shape[1])]]) if sides else FLIP
    named = {"flip": [flip], "scale": [scale(0.875), scale(1.125)]}
    return [IDENTITY, *(view for name in names for view in named[name])]


def sigmoid(output):
    """Return float32 probabilities of logits; for a pair (mask logits, presence logit), those of the mask."""
    return (output[0] if isinstance(output, tuple) else output).float().sigmoid()


def sigmoid_and_presence(output):
    """Return the probabilities of both members of a pair (mask logits, presence logit)."""
    return sigmoid(output), output[1].float().sigmoid()


def predict_tta(model, images, views=(IDENTITY,), activation=sigmoid):
    """Return the mean over `views` of a model's output after `activation`, float32 probabilities.

    The output is masks (B, C, h, w), class probabilities (B, C), which need no `inverse`, or a tuple of these.
    """
    totals, several = None, False
    for forward, inverse in views:
        output = activation(model(forward(images)))
        several = isinstance(output, tuple)
        parts = [inverse(p, images.shape[-2:]) if p.ndim == 4 else p for p in (output if several else (output,))]
        totals = parts if totals is None else [total + part for total, part in zip(totals, parts, strict=True)]
    means = tuple(total / len(views) for total in totals)
    return means if several else means[0]
