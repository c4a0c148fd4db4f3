"""Augmentation that moves image and mask by one homography, fastai's lighting, and the COVID-19 paper's pipeline.

As in common.data.augment: uint8 (H, W) or (H, W, 1) in and out, masks of 0/1 follow.
"""

from math import cos, exp, log, radians, sin

import cv2
import numpy as np

# the library from there, where its look-up of newer versions is switched off
from common.data.augment import A, compose


class Warp(A.DualTransform):
    """Move image and mask by one homography, so that several movements blur the pixels only once.

    draw: takes a random.Random, gives the matrix (3, 3) from source to target in coordinates of −1 to 1, x to the right
    and y downwards; border: OpenCV's border mode (black by default); size: side of what comes out.
    """

    def __init__(self, size, draw, border=cv2.BORDER_CONSTANT):
        super().__init__(p=1.0)
        self.size, self.draw, self.border = size, draw, border

    def get_params_dependent_on_data(self, params, data):
        height, width = params["shape"][:2]
        centred = np.linalg.inv(_centred(self.size, self.size)), _centred(height, width)
        return {"matrix": centred[0] @ self.draw(self.py_random) @ centred[1]}

    def apply(self, img, matrix, **params):
        side = self.size, self.size
        out = cv2.warpPerspective(img, matrix, side, flags=cv2.INTER_LINEAR, borderMode=self.border)
        return out.reshape(side + img.shape[2:])

    def apply_to_mask(self, mask, matrix, **params):
        return self.apply(mask, matrix)


def _centred(height, width):
    """Matrix from indices of pixels to coordinates of −1 to 1 over the image."""
    return np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]])


def moved(turn=0.0, zoom=(1.0, 1.0), shear=0.0, shift=(0.0, 0.0), keystone=(0.0, 0.0)):
    """Matrix that scales, shears along x, turns (degrees), tilts and shifts (halves of the side), in this order."""
    c, s = cos(radians(turn)), sin(radians(turn))
    flat = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[zoom[0], shear * zoom[1], 0], [0, zoom[1], 0], [0, 0, 1]]
    if any(keystone):
        x, y = keystone  # by how much one edge grows and the opposite one shrinks
        corners = np.float32([[-1, -1], [-1, 1], [1, -1], [1, 1]])
        tilted = np.float32([[-1 - y, -1 - x], [-1 + y, 1 + x], [1 + y, -1 + x], [1 - y, 1 - x]])
        flat = cv2.getPerspectiveTransform(corners, tilted) @ flat
    return np.array([[1, 0, shift[0]], [0, 1, shift[1]], [0, 0, 1]]) @ flat


def either(random, p, limit):
    """A number of −limit to limit with probability p, else 0; random: a random.Random."""
    return random.uniform(-limit, limit) if random.random() < p else 0.0


class Lighting(A.ImageOnlyTransform):
    """Change brightness and contrast as fastai does: a shift and a factor on the logit of the grey level.

    Each happens with probability `p`. brightness b: shift by the logit of 0.5 ± b/2 at most; contrast c: factor from
    1 − c to 1 / (1 − c).
    """

    def __init__(self, brightness=0.2, contrast=0.2, p=0.75):
        super().__init__(p=1.0)
        self.brightness, self.contrast, self.each = brightness, contrast, p

    def get_params(self):
        level = 0.5 + either(self.py_random, self.each, self.brightness / 2)
        factor = exp(either(self.py_random, self.each, -log(1 - self.contrast)))
        return {"shift": log(level / (1 - level)), "factor": factor}

    def apply(self, img, shift, factor, **params):
        grey = np.clip(np.arange(256) / 255, 1e-3, 1 - 1e-3)
        table = 255 / (1 + np.exp(-(factor * np.log(grey / (1 - grey)) + shift)))
        return cv2.LUT(img, np.rint(table).astype(np.uint8)).reshape(img.shape)


def paper_covid(size, noise=0.5 * 0.25):
    """Return Ahmed et al.'s table 3: scale of x, rotation, shear, pad and crop, gamma, salt and pepper, blur, noise.

    The blur's kernel of 11 pixels belongs to the paper's 512: it shrinks with `size`, and is read as a Gaussian with
    OpenCV's sigma for 11, which is 2. The table's noise of 0.5 would, as a share of the grey range, leave nothing to
    see: it is read as half the standard deviation of an image, which is about 0.25 of that range. Scale comes first,
    then shear and rotation.
    """
    kernel, sigma = 2 * round(5 * size / 512) + 1, 2 * size / 512
    return compose(
        [
            Warp(size, _paper_covid_matrix),
            A.RandomGamma((50, 300), p=1.0),
            A.SaltAndPepper((0.01, 0.01), p=0.3),
            A.GaussianBlur((kernel, kernel), (sigma, sigma), p=0.5),
            A.GaussNoise((noise, noise), p=0.3),
        ]
    )


def _paper_covid_matrix(random):
    return moved(random.uniform(-45, 45), (random.uniform(0.8, 1.1), 1.0), either(random, 0.7, 0.2))
