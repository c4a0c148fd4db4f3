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


def _compose(transforms):
    # bilinear on 0 and 1 rounds back to 0 and 1; the nearest pixel would shift a resized mask by half a pixel
    return A.Compose(transforms, mask_interpolation=cv2.INTER_LINEAR)


def none():
    """Return the pipeline that changes nothing."""
    return _compose([])


def light(p=0.5, shift=0.03, scale=0.05, rotate=5.0):
    """Return flip and slight affine (shift in sides, scale 1 ± this, ± degrees), each with probability `p`."""
    return _compose([A.HorizontalFlip(p=p), _affine(shift, scale, rotate, p)])


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
    return _compose(paper_siim_types(p, zoom, **numbers))


def paper_siim_enrichment(zoom=(0.05, 0.10), **numbers):
    """Return the paper's four types as pipelines that always act, for the kinds of `enrichment_plan`."""
    return [_compose([transform]) for transform in paper_siim_types(1.0, zoom, **numbers)]


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
    return _compose(steps)


def _affine(shift, scale, rotate, p):
    scales, shifts = (1 - scale, 1 + scale), (-shift, shift)
    return A.Affine(scale=scales, translate_percent=shifts, rotate=(-rotate, rotate), keep_ratio=True, p=p)


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
