"""Augmentation pipelines for single-channel radiographs and their masks.

Pipelines take and return uint8 (H, W) or (H, W, 1), and an optional 0/1 mask, to which geometric transforms apply too;
only `Warp` may change the size. The dataset sets the random generators for each sample (common.data.loaders).
"""

import os
from math import cos, exp, log, radians, sin

import cv2
import numpy as np

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise its import queries the network for newer versions

import albumentations as A

from common.data.loaders import passes
from common.errors import InputError


def compose(transforms):
    """Return the pipeline of a list of albumentations transforms."""
    # bilinear, rounded back to 0 and 1: nearest-neighbour would shift a resized mask by half a pixel
    return A.Compose(transforms, mask_interpolation=cv2.INTER_LINEAR)


def crop_near_mask(side, p=0.8):
    """Return a random crop of `side` pixels that, with probability `p`, contains a part of the mask, if any."""
    return A.OneOf([A.CropNonEmptyMaskIfExists(side, side, p=p), A.RandomCrop(side, side, p=1 - p)], p=1.0)


def light(p=0.5):
    """Return flip and slight affine, each with probability `p`: shift by 0.03 sides, scale 1 ± 0.05, ± 5 degrees."""
    return compose([A.HorizontalFlip(p=p), _affine(0.03, 0.05, 5.0, p)])


def paper_siim(p=0.5):
    """Return the SIIM paper's pipeline: CLAHE, optical distortion, zoom in and zoom out, each with probability `p`.

    Zooming out leaves a black border. The paper does not give the coefficient of the distortion.
    """
    steps = [
        A.CLAHE(clip_limit=(1.0, 4.0), tile_grid_size=(8, 8), p=p),
        A.OpticalDistortion(distort_limit=(-0.05, 0.05), p=p),
        A.Affine(scale=(1.05, 1.10), keep_ratio=True, p=p),
        A.Affine(scale=(0.90, 0.95), keep_ratio=True, p=p),
    ]
    return compose(steps)


def paper_siim_enrichment():
    """Return the four transforms of `paper_siim`, always applied, for the kinds of `enrichment_plan`."""
    return [compose([transform]) for transform in paper_siim(1.0).transforms]


def podium_siim(size, p=0.5, rare=0.3):
    """Return the kinds of transforms that SIIM's top solutions share, for images of `size` × `size`.

    With probability `p` each: flip, affine. With probability `rare` each: brightness, contrast or gamma; elastic, grid
    or optical distortion; a square crop of at least 0.75 of the side, resized back. The numbers are ours.
    """
    tones = [
        A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.0, p=1.0),
        A.RandomBrightnessContrast(brightness_limit=0.0, contrast_limit=0.2, p=1.0),
        A.RandomGamma(gamma_limit=(80, 120), p=1.0),
    ]
    warps = [
        Elastic(alpha=120.0, sigma=6.0, noise_distribution="uniform", p=1.0),
        A.GridDistortion(distort_limit=0.2, p=1.0),
        A.OpticalDistortion(distort_limit=0.1, p=1.0),
    ]
    cropped = A.RandomSizedCrop(min_max_height=(round(0.75 * size), size), size=(size, size), p=rare)
    moved = _affine(0.06, 0.1, 15.0, p)
    return compose([A.HorizontalFlip(p=p), moved, A.OneOf(tones, p=rare), A.OneOf(warps, p=rare), cropped])


def paper_covid(size):
    """Return Ahmed et al.'s table 3: scale of x, shear, rotation, gamma, salt and pepper, blur, noise, in this order.

    The blur's kernel of 11 pixels refers to the paper's 512 pixels and shrinks with `size`. We take it for a Gaussian
    with OpenCV's sigma for 11, which is 2. The table's noise of 0.5 would hide everything as a share of the grey range;
    we take it as half the standard deviation of an image, which is about 0.25 of that range.
    """
    kernel, sigma, noise = 2 * round(5 * size / 512) + 1, 2 * size / 512, 0.5 * 0.25
    steps = [
        Warp(size, _draw_covid_matrix),
        A.RandomGamma((50, 300), p=1.0),
        A.SaltAndPepper((0.01, 0.01), p=0.3),
        A.GaussianBlur((kernel, kernel), (sigma, sigma), p=0.5),
        A.GaussNoise((noise, noise), p=0.3),
    ]
    return compose(steps)


def _draw_covid_matrix(random):
    return homography(random.uniform(-45, 45), (random.uniform(0.8, 1.1), 1.0), jitter(random, 0.7, 0.2))


def _affine(shift, scale, rotate, p):
    scales, shifts = (1 - scale, 1 + scale), (-shift, shift)
    return A.Affine(scale=scales, translate_percent=shifts, rotate=(-rotate, rotate), keep_ratio=True, p=p)


class Elastic(A.ElasticTransform):
    """Albumentations' elastic transform, made cheaper by drawing displacements on a grid of half a sigma.

    The displacements' standard deviation and correlation stay within 2 %; noise_distribution is always uniform.
    """

    def get_params_dependent_on_data(self, params, data):
        (height, width), step = params["shape"][:2], self.sigma / 2
        noise = self.random_generator.uniform(-1, 1, (round(height / step) + 1, round(width / step) + 1, 2))
        field = cv2.GaussianBlur(noise.astype(np.float32), (0, 0), 2.0, borderType=cv2.BORDER_REPLICATE)
        field = cv2.resize(field, (width, height)) * np.float32(self.alpha / step)
        x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
        return {"map_x": field[..., 0] + x, "map_y": field[..., 1] + y[:, None]}


class Warp(A.DualTransform):
    """Apply one homography to image and mask, so combined geometric transforms interpolate the pixels only once.

    draw: takes a random.Random, returns the matrix (3, 3) from source to target in coordinates of −1 to 1, x to the
    right and y downwards. border: OpenCV's border mode, black by default. size: side of the output.
    """

    def __init__(self, size, draw, border=cv2.BORDER_CONSTANT):
        super().__init__(p=1.0)
        self.size, self.draw, self.border = size, draw, border

    def get_params_dependent_on_data(self, params, data):
        to_pixels = np.linalg.inv(_normalise_pixels(self.size, self.size))
        return {"matrix": to_pixels @ self.draw(self.py_random) @ _normalise_pixels(*params["shape"][:2])}

    def apply(self, img, matrix, **params):
        side = self.size, self.size
        out = cv2.warpPerspective(img, matrix, side, flags=cv2.INTER_LINEAR, borderMode=self.border)
        return out.reshape(side + img.shape[2:])


def _normalise_pixels(height, width):
    """Return the matrix from pixel indices to coordinates of −1 to 1 over the image."""
    return np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]])


def homography(turn=0.0, zoom=(1.0, 1.0), shear=0.0, shift=(0.0, 0.0), keystone=(0.0, 0.0)):
    """Return the matrix that scales, shears along x, rotates (degrees), tilts and shifts (half sides), in this order.

    keystone: the amount by which one edge grows and the opposite one shrinks, along x and y, in half sides.
    """
    c, s = cos(radians(turn)), sin(radians(turn))
    matrix = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[zoom[0], shear * zoom[1], 0], [0, zoom[1], 0], [0, 0, 1]]
    if any(keystone):
        x, y = keystone
        corners = np.float32([[-1, -1], [-1, 1], [1, -1], [1, 1]])
        tilted = np.float32([[-1 - y, -1 - x], [-1 + y, 1 + x], [1 + y, -1 + x], [1 - y, 1 - x]])
        matrix = cv2.getPerspectiveTransform(corners, tilted) @ matrix
    return np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1]]) @ matrix


def jitter(random, p, limit):
    """Return a number from −limit to limit with probability p, else 0; random: a random.Random."""
    return random.uniform(-limit, limit) if random.random() < p else 0.0


class Lighting(A.ImageOnlyTransform):
    """Change brightness and contrast like fastai, by adding to and multiplying the logit of the grey level.

    Each with probability p. brightness b: shift up to the logit of 0.5 ± b/2; contrast c: factor 1 − c to 1 / (1 − c).
    """

    def __init__(self, brightness=0.2, contrast=0.2, p=0.75):
        super().__init__(p=1.0)
        self.brightness, self.contrast, self.each = brightness, contrast, p

    def get_params(self):
        level = 0.5 + jitter(self.py_random, self.each, self.brightness / 2)
        factor = exp(jitter(self.py_random, self.each, -log(1 - self.contrast)))
        return {"shift": log(level / (1 - level)), "factor": factor}

    def apply(self, img, shift, factor, **params):
        grey = np.clip(np.arange(256) / 255, 1e-3, 1 - 1e-3)
        table = 255 / (1 + np.exp(-(factor * np.log(grey / (1 - grey)) + shift)))
        return cv2.LUT(img, np.rint(table).astype(np.uint8)).reshape(img.shape)


class BlockMask(A.ImageOnlyTransform):
    """Replace the left, right, upper or lower half of the image by the grey level `gray`; masks are unchanged.

    Source: Selvan et al. 2020 (arXiv:2005.10052), whose published code uses 0.85 of the full range for all four halves.
    """

    def __init__(self, gray=217, p=0.5):
        super().__init__(p=p)
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
    """Add the union of random discs, smoothed by a Gaussian, to the brightness; masks and boxes are unchanged.

    discs: smallest and largest number; centres lie anywhere in the image. radius, sigma (of the Gaussian): fractions of
    the shorter side. strength: range of the value added inside a large disc, as a fraction of 255, negative: darker.
    Source: Selvan et al. 2020 (arXiv:2005.10052), whose published code draws 10 to 20 discs of at least 25 pixels'
    radius on 640 × 512, smooths by 25 pixels and adds 0.6, less 0.1 everywhere; the other limits are ours.
    """

    sigma = 0.05

    def __init__(self, discs=(10, 20), radius=(0.05, 0.15), strength=(0.2, 0.6), p=0.5):
        super().__init__(p=p)
        self.discs, self.radius, self.strength = discs, radius, strength

    def get_params(self):
        draw = self.py_random.uniform
        discs = [(draw(0, 1), draw(0, 1), draw(*self.radius)) for _ in range(self.py_random.randint(*self.discs))]
        return {"circles": discs, "level": draw(*self.strength)}

    def apply(self, img, circles, level, **params):
        height, width = img.shape[:2]
        # three grid points per sigma are fine enough for the smooth field, at a cost nearly independent of image size
        step = max(1.0, self.sigma * min(height, width) / 3)
        h, w = max(1, round(height / step)), max(1, round(width / step))
        field = np.zeros((h, w), np.float32)
        for x, y, radius in circles:  # in sixteenths of a grid step
            centre, size = (round(16 * (x * w - 0.5)), round(16 * (y * h - 0.5))), round(16 * radius * min(h, w))
            cv2.circle(field, centre, size, abs(level) * 255, thickness=-1, shift=4)
        field = cv2.GaussianBlur(field, (0, 0), self.sigma * min(h, w), borderType=cv2.BORDER_REPLICATE)
        field = np.rint(cv2.resize(field, (width, height))).astype(np.uint8)
        field = np.broadcast_to(field.reshape(field.shape + (1,) * (img.ndim - 2)), img.shape)
        return (cv2.add if level > 0 else cv2.subtract)(img, field).reshape(img.shape)


def enrichment_plan(labels, n_types, seed):
    """Return int64 `(indices, kinds)` of a training set balanced by augmented copies of its positives.

    labels: (n,) of 0/1. The first n entries are the samples themselves, with kind −1 (no augmentation). They are
    followed by (negatives − positives) / n_types copies, rounded down, of each kind 0 to n_types − 1; the numbers of
    copies of two positives differ by at most one. Raises InputError if there are no positives, or more positives than
    negatives. Source: the enrichment alternative of the SIIM paper.
    """
    positives = np.flatnonzero(np.asarray(labels) == 1)
    negatives = len(labels) - len(positives)
    if not 0 < len(positives) <= negatives:
        raise InputError(f"{len(positives)} positives and {negatives} negatives: copies cannot balance them")
    share = (negatives - len(positives)) // n_types
    copies = passes(positives, 0, share * n_types, seed, 2)
    kinds = np.concatenate([np.full(len(labels), -1), np.repeat(np.arange(n_types), share)])
    return np.concatenate([np.arange(len(labels)), copies]), kinds
