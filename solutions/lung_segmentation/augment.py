"""Augmentation pipelines for lung segmentation; config.py names the papers.

Each takes uint8 (H, W) images of `size` × `size` with masks of 0/1, (H, W) or (H, W, C), and keeps sizes and types.
"""

from functools import partial
from math import exp

import cv2
import numpy as np

from common.data.augment import A, BlockMask, DiffusedNoise, Lighting, Warp, compose, homography, jitter, paper_covid

unet = paper_covid  # Ahmed et al. use one pipeline for segmentation and classification


class Objects(A.ImageOnlyTransform):
    """Draw `count` (min, max) letters, patches (a third of them black), wires or electrodes, as seen on radiographs."""

    words = ("L", "R", "AP", "PA", "L PA", "AP SUPINE", "PORTABLE", "UPRIGHT", "12:40", "SEMI-ERECT")

    def __init__(self, count=(1, 3), p=0.5):
        super().__init__(p=p)
        self.count = count

    def get_params(self):
        return {"seed": self.py_random.getrandbits(63)}

    def apply(self, img, seed, **params):
        rng = np.random.default_rng(seed)
        height, width = img.shape[:2]
        side, extent = min(height, width), np.array([width, height])
        light, dark = np.zeros((2, height, width), np.uint8)
        for _ in range(rng.integers(*self.count, endpoint=True)):
            kind, level = rng.integers(5), int(rng.integers(50, 256))
            at = (rng.random(2) * extent).astype(int)
            thick = max(1, round(rng.uniform(0.003, 0.01) * side))
            if kind == 0:
                scale = rng.uniform(0.025, 0.08) * side / 22  # capital letters of OpenCV's font are 22 pixels high
                word = self.words[rng.integers(len(self.words))]
                font, light_grey = cv2.FONT_HERSHEY_SIMPLEX, 255 - level // 4
                cv2.putText(light, word, at.tolist(), font, scale, light_grey, thick, cv2.LINE_AA)
            elif kind == 1:
                end = at + (rng.uniform(0.03, 0.25, 2) * extent).astype(int)
                cv2.rectangle(dark if rng.random() < 1 / 3 else light, at.tolist(), end.tolist(), 255, -1)
            elif kind == 2:
                cv2.circle(light, at.tolist(), round(rng.uniform(0.01, 0.03) * side), level, thick, cv2.LINE_AA)
            else:
                t = np.linspace(0, 1, 24)[:, None]
                a, b, c = rng.uniform(-0.1, 1.1, (3, 2)) * extent
                curve = ((1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c).astype(np.int32)
                cv2.polylines(light, [curve], False, level // 2, thick, cv2.LINE_AA)
        return cv2.subtract(cv2.add(img.reshape(height, width), light), dark).reshape(img.shape)


class Mirror(A.HorizontalFlip):
    """Mirror image and masks and swap the first two of several masks, since left and right lung change sides."""

    def apply_to_mask(self, mask, **params):
        mask = super().apply_to_mask(mask, **params)
        return mask[..., [1, 0, *range(2, mask.shape[2])]] if mask.ndim == 3 and mask.shape[2] > 1 else mask


class Consolidation(A.ImageOnlyTransform):
    """Make one or both lungs opaque (entirely, below a sloping line or in a blob) without changing the masks."""

    @property
    def targets_as_params(self):
        return ["mask"]

    def get_params_dependent_on_data(self, params, data):
        masks = data["mask"]
        return {"seed": self.py_random.getrandbits(63), "masks": masks[..., None] if masks.ndim == 2 else masks}

    def apply(self, img, seed, masks, **params):
        rng, grey = np.random.default_rng(seed), img.reshape(img.shape[:2]).astype(np.float32)
        height, width = grey.shape
        lungs = masks[..., :2].max(-1) == 1
        columns = np.flatnonzero(lungs.any(0))
        if not len(columns):
            return img
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        level = np.quantile(grey[~lungs], rng.uniform(0.6, 0.95)) if (~lungs).any() else 200
        noise = rng.normal(0, 1, (8, 8)).astype(np.float32)
        texture = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        opacity = np.zeros_like(grey)
        for left in rng.permutation(2)[: 1 + (rng.random() < 0.2)]:
            lung = lungs & ((x > columns.mean()) == left)
            rows = np.flatnonzero(lung.any(1))
            if not len(rows):
                continue
            top, bottom = rows[[0, -1]]
            kind, part = rng.integers(3), np.ones_like(grey)
            if kind == 1:
                edge = top + rng.uniform(0.2, 0.9) * (bottom - top) + rng.uniform(-0.4, 0.4) * (x - x[lung].mean())
                part = (y > edge).astype(np.float32)
            elif kind == 2:
                inside = np.flatnonzero(lung)
                middle, radii = rng.choice(inside), rng.uniform(0.1, 0.5, 2) * (bottom - top)
                part = np.exp(-(((x - middle % width) / radii[0]) ** 2) - ((y - middle // width) / radii[1]) ** 2)
            opacity = np.maximum(opacity, part * lung * rng.uniform(0.5, 1.0))
        opacity = cv2.GaussianBlur(opacity, (0, 0), rng.uniform(0.01, 0.04) * width)  # beyond the lung's edge, too
        return np.clip(grey + opacity * (level + 12 * texture - grey) + 0.5, 0, 255).astype(np.uint8).reshape(img.shape)


def _simple_matrix(random, p, rotate, zoom, warp, pad=0.0):
    scale = random.uniform(1, zoom) if random.random() < p else 1.0
    shift = [random.uniform(-1, 1) * (scale - 1) for _ in range(2)]  # any crop of the image
    tilt = (random.uniform(-warp, warp), random.uniform(-warp, warp)) if random.random() < p else (0.0, 0.0)
    turn = jitter(random, p, rotate)
    shift = [part + 2 * jitter(random, p, pad) for part in shift]  # any crop of the padded image
    return homography(turn, (scale, scale), 0.0, shift, tilt)


def simple(size, flip=True, then=(), rotate=10.0, zoom=1.1, warp=0.2, lighting=0.2, pad=0.05, p=0.75):
    """Return Berger et al.'s simple pipeline: flip, crop with zoom, pad, rotation, warp, brightness and contrast.

    The paper gives no numbers. Its range test and two phases suggest fastai, so numbers, formulas and the reflected
    border are the defaults of fastai's `aug_transforms`. pad, a share of the side, has no default there; 0.05 is ours.
    """
    draw = partial(_simple_matrix, p=p, rotate=rotate, zoom=zoom, warp=warp, pad=pad)
    moved = [*[Mirror(p=0.5)] * flip, Warp(size, draw, cv2.BORDER_REFLECT_101), Lighting(lighting, lighting, p)]
    return compose([*moved, *then])


def complex_(size, flip=True, diffused=0.5, block=0.25, gray=217, **numbers):
    """Return Berger et al.'s complex pipeline: `simple`, then noise and masking with probabilities of our own."""
    return simple(size, flip, [DiffusedNoise(p=diffused), BlockMask(gray, p=block)], **numbers)


def affine(size, rotate=10.0, shift=0.1, zoom=0.2):
    """Return Liu et al.'s affine pipeline (rotation, shift, zoom) with imlab-uiip/lung-segmentation-2d's numbers."""
    return compose([Warp(size, partial(_affine_matrix, rotate=rotate, shift=shift, zoom=zoom), cv2.BORDER_REPLICATE)])


def _affine_matrix(random, rotate, shift, zoom):
    turn = random.uniform(-rotate, rotate)
    shifts, zooms = ([random.uniform(-limit, limit) for _ in range(2)] for limit in (2 * shift, zoom))
    return homography(turn, [1 / (1 + part) for part in zooms], 0.0, shifts)


def strong(size, flip=True):
    """Return our own strong pipeline, for networks that must work on images of other hospitals and devices."""
    soft = size / 256
    cut, padded = A.CropAndPad(percent=(-0.15, 0.0), keep_size=False), A.PadIfNeeded(size, size, position="random")
    coarse = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}
    focus = [
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.4 * soft, 1.5 * soft)),
        A.Sharpen(alpha=(0.1, 0.4)),
        A.Downscale(scale_range=(0.4, 0.8), interpolation_pair=coarse),
    ]
    return compose(
        [
            *[Mirror(p=0.5)] * flip,
            Warp(size, _strong_matrix),
            Consolidation(p=0.15),
            DiffusedNoise((1, 5), (0.03, 0.25), strength=(-0.25, 0.5), p=0.3),
            Lighting(0.5, 0.4, p=0.5),
            A.RandomGamma((55, 180), p=0.3),
            A.RandomBrightnessContrast(0.25, (-0.5, 0.4), p=0.3),
            A.CLAHE((1.0, 4.0), p=0.15),
            Objects(p=0.3),
            A.OneOf(focus, p=0.3),
            A.GaussNoise((0.01, 0.06), p=0.2),
            A.InvertImg(p=0.03),
            A.Sequential([cut, padded], p=0.15),
            A.ImageCompression(quality_range=(25, 90), p=0.3),
        ]
    )


def _strong_matrix(random):
    quarters = random.choice((1, 2, 3)) if random.random() < 0.04 else 0
    turn = jitter(random, 0.8, 25.0 if random.random() < 0.25 else 10.0)
    # sometimes small in a wide black border, or cropped so that part of the lungs is outside
    wide = random.random() < 0.15
    zoom = exp(random.uniform(-0.6, 0.4) if wide else jitter(random, 0.8, 0.15))
    aspect = exp(jitter(random, 0.4, 0.12))
    shift = (jitter(random, 0.7, 0.15), jitter(random, 0.7, 0.15))
    tilt = (jitter(random, 0.3, 0.12), jitter(random, 0.3, 0.12))
    return homography(turn + 90 * quarters, (zoom * aspect, zoom / aspect), jitter(random, 0.2, 0.12), shift, tilt)


def pipeline(name, size, flip):
    """Return the pipeline called `name`, None for "none"; flip: whether images may be mirrored."""
    flips = {"flip": flip} if name in ("simple", "complex", "strong") else {}
    makers = {"unet": unet, "affine": affine, "simple": simple, "complex": complex_, "strong": strong}
    return None if name == "none" else makers[name](size, **flips)
