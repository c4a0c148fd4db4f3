"""Augmentation pipelines for single-channel radiographs and their masks, one function a recipe, every number named.

Each takes and gives back uint8 (H, W) or (H, W, 1), with an optional mask of 0/1 that follows; the size stays.
Randomness comes from the generators that the dataset sets for each sample (common.data.loaders).
"""

import os

import cv2
import numpy as np

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would open a socket at import

import albumentations as A

from common.data.loaders import passes
from common.errors import InputError


def compose(transforms):
    """Return the pipeline of albumentations' `transforms`, in order."""
    # bilinear on 0 and 1 rounds back to 0 and 1; the nearest pixel would shift a resized mask by half a pixel
    return A.Compose(transforms, mask_interpolation=cv2.INTER_LINEAR)


def none():
    """Return the pipeline that changes nothing."""
    return compose([])


def light(p=0.5, shift=0.03, scale=0.05, rotate=5.0):
    """Return flip and slight affine (shift in sides, scale 1 ± this, ± degrees), each with probability `p`."""
    return compose([A.HorizontalFlip(p=p), _affine(shift, scale, rotate, p)])


def paper_siim_types(p=0.5, zoom=(0.05, 0.10), clip_limit=4.0, tiles=(8, 8), distortion=0.05):
    """Return the SIIM paper's four transforms as a list: CLAHE, optical distortion, zoom in, zoom out.

    p: probability of each; zoom: least and greatest change of scale; clip_limit and tiles: CLAHE's, distortion: ± the
    optical coefficient, which the paper does not give. Zooming out leaves a black border.
    """
    low, high = zoom
    if not 0 <= low <= high < 1:
        raise InputError(f"zoom {zoom}: expected 0 <= low <= high < 1")
    return [
        A.CLAHE(clip_limit=(1.0, clip_limit), tile_grid_size=tiles, p=p),
        A.OpticalDistortion(distort_limit=(-distortion, distortion), p=p),
        A.Affine(scale=(1 + low, 1 + high), keep_ratio=True, p=p),
        A.Affine(scale=(1 - high, 1 - low), keep_ratio=True, p=p),
    ]


def paper_siim(p=0.5, zoom=(0.05, 0.10), **numbers):
    """Return the SIIM paper's pipeline for its Xception classifier; the arguments are those of `paper_siim_types`."""
    return compose(paper_siim_types(p, zoom, **numbers))


def paper_siim_enrichment(zoom=(0.05, 0.10), **numbers):
    """Return the paper's four types as pipelines that always act, for the kinds of `enrichment_plan`."""
    return [compose([transform]) for transform in paper_siim_types(1.0, zoom, **numbers)]


def podium_siim(
    size, p=0.5, rare=0.3, affine=(0.06, 0.1, 15.0), tone=(0.2, 0.2, 20), warp=(120.0, 6.0, 0.2, 0.1), crop=0.75
):
    """Return the kinds of transform that SIIM's first places share, for images of `size` × `size`.

    With probability `p` each: flip; affine (shift as a fraction of the side, scale 1 ± this, rotation ± degrees).
    With probability `rare` each: one of brightness, contrast (± fractions) and gamma (± percent), in `tone`; one of
    elastic (alpha and sigma in pixels), grid and optical distortion (± limits), in `warp`; a square crop of at least
    `crop` of the side, resized back. The numbers are ours, moderate enough for a chest.
    """
    if not 0 < crop <= 1:
        raise InputError(f"crop {crop}: must be above 0 and at most 1")
    brightness, contrast, gamma = tone
    alpha, sigma, grid, optical = warp
    tones = [
        A.RandomBrightnessContrast(brightness_limit=brightness, contrast_limit=0.0, p=1.0),
        A.RandomBrightnessContrast(brightness_limit=0.0, contrast_limit=contrast, p=1.0),
        A.RandomGamma(gamma_limit=(100 - gamma, 100 + gamma), p=1.0),
    ]
    warps = [
        A.ElasticTransform(alpha=alpha, sigma=sigma, noise_distribution="uniform", p=1.0),
        A.GridDistortion(distort_limit=grid, p=1.0),
        A.OpticalDistortion(distort_limit=optical, p=1.0),
    ]
    cropped = A.RandomSizedCrop(min_max_height=(max(1, round(crop * size)), size), size=(size, size), p=rare)
    steps = [A.HorizontalFlip(p=p), _affine(*affine, p), A.OneOf(tones, p=rare), A.OneOf(warps, p=rare), cropped]
    return compose(steps)


def _affine(shift, scale, rotate, p):
    scales, shifts = (1 - scale, 1 + scale), (-shift, shift)
    return A.Affine(scale=scales, translate_percent=shifts, rotate=(-rotate, rotate), keep_ratio=True, p=p)


class BlockMask(A.ImageOnlyTransform):
    """Replace one half of the image, left, right, top or bottom, by the grey level `gray`; the mask stays.

    Source: Selvan et al. 2020 (arXiv:2005.10052), whose published code uses 0.85 of the full range for all four halves.
    """

    def __init__(self, gray=217, p=0.5):
        super().__init__(p=p)
        if not 0 <= gray <= 255:
            raise InputError(f"gray {gray}: must be a grey level from 0 to 255")
        self.gray = gray

    def get_params(self):
        return {"across": self.py_random.random() < 0.5, "first": self.py_random.random() < 0.5}

    def apply(self, img, across, first, **params):
        out = img.copy()
        lines = out.swapaxes(0, 1) if across else out
        middle = len(lines) // 2
        lines[slice(middle) if first else slice(middle, None)] = self.gray
        return out


class DiffusedNoise(A.ImageOnlyTransform):
    """Add the union of random discs, smoothed by a Gaussian, as brightness; masks and boxes stay.

    discs: least and greatest number; radius and sigma (the Gaussian's) in shorter sides of the image; strength: range
    of what is added inside a large disc, as a fraction of the full range 255, negative for darker. The discs' centres
    are anywhere in the image. Source: Selvan et al. 2020 (arXiv:2005.10052), whose published code draws 10 to 20 discs
    of at least 25 pixels' radius on 640 × 512, smooths by 25 pixels and adds 0.6, less 0.1 everywhere; the other limits
    are ours.
    """

    def __init__(self, discs=(10, 20), radius=(0.05, 0.15), sigma=0.05, strength=(0.2, 0.6), p=0.5):
        super().__init__(p=p)
        if not (1 <= discs[0] <= discs[1] and 0 < radius[0] <= radius[1] and sigma > 0):
            raise InputError(f"discs {discs}, radius {radius}, sigma {sigma}: need positive numbers, the lesser first")
        if not -1 <= strength[0] <= strength[1] <= 1:
            raise InputError(f"strength {strength}: need a range within -1 to 1")
        self.discs, self.radius, self.sigma, self.strength = discs, radius, sigma, strength

    def get_params(self):
        draw = self.py_random.uniform
        discs = [(draw(0, 1), draw(0, 1), draw(*self.radius)) for _ in range(self.py_random.randint(*self.discs))]
        return {"circles": discs, "level": draw(*self.strength)}

    def apply(self, img, circles, level, **params):
        height, width = img.shape[:2]
        # the smooth field is made on a grid of three points a sigma: the cost hardly grows with the image
        step = max(1.0, self.sigma * min(height, width) / 3)
        h, w = max(1, round(height / step)), max(1, round(width / step))
        field = np.zeros((h, w), np.float32)
        for x, y, radius in circles:  # in sixteenths of the grid's step
            centre, size = (round(16 * (x * w - 0.5)), round(16 * (y * h - 0.5))), round(16 * radius * min(h, w))
            cv2.circle(field, centre, size, abs(level) * 255, thickness=-1, shift=4)
        field = cv2.GaussianBlur(field, (0, 0), self.sigma * min(h, w), borderType=cv2.BORDER_REPLICATE)
        field = (
            np.rint(cv2.resize(field, (width, height))).astype(np.uint8).reshape(img.shape[:2] + (1,) * (img.ndim - 2))
        )
        return (cv2.add if level > 0 else cv2.subtract)(img, np.broadcast_to(field, img.shape)).reshape(img.shape)


def enrichment_plan(labels, n_types, seed):
    """Return `(indices, kinds)` of a training set balanced by augmented copies of its positives.

    labels: (n,) of 0/1. The first n entries are the samples themselves with kind −1, without augmentation. After them
    come (negatives − positives) / n_types copies, rounded down, of each kind 0 to n_types − 1, every positive copied
    equally often within one. Both arrays are int64. Raises InputError without positives, or with more positives than
    negatives. Source: the enrichment alternative of the SIIM paper.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise InputError(f"labels: expected a vector of 0 and 1, got shape {labels.shape}")
    positives = np.flatnonzero(labels == 1)
    negatives = len(labels) - len(positives)
    if not 0 < len(positives) <= negatives:
        raise InputError(f"{len(positives)} positives and {negatives} negatives: nothing to balance by copies")
    share = (negatives - len(positives)) // n_types
    copies = passes(positives, 0, share * n_types, seed, 2)
    kinds = np.concatenate([np.full(len(labels), -1), np.repeat(np.arange(n_types), share)])
    return np.concatenate([np.arange(len(labels)), copies]), kinds
