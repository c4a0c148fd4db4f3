"""Augmentation pipelines for detectors; geometric transforms apply to the boxes too, and image sizes do not change.

Each takes and returns uint8 (H, W) images with `bboxes`, float (n, 4) in pixels, and their `labels`. Flips, rotations
and scaling move findings to the other side or change their shape, but the paper and the winners use them too.
"""

import cv2
import numpy as np

# imported from there, since that module switches off the check for new versions
from common.data.augment import A, DiffusedNoise


def compose(transforms):
    """Return the pipeline of `transforms` for images with boxes.

    Boxes are clipped at the border, and dropped if a step leaves < 0.3 of the area (our choice) or a side < 1 pixel.
    """
    boxes = A.BboxParams("pascal_voc", ["labels"], min_visibility=0.3, min_width=1, min_height=1, clip=True)
    return A.Compose(transforms, bbox_params=boxes)


def brightness(p):
    """Return a transform that blends the image with black, weight 0.7 to 1.3, as Detectron2 does."""
    return A.ColorJitter(brightness=(0.7, 1.3), contrast=(1, 1), saturation=(1, 1), hue=(0, 0), p=p)


def contrast(p):
    """Return a transform that blends the image with its mean grey level, weight 0.7 to 1.3, as Detectron2 does."""
    return A.ColorJitter(brightness=(1, 1), contrast=(0.7, 1.3), saturation=(1, 1), hue=(0, 0), p=p)


def crop(most, p):
    """Return a crop of up to `most` of the height and of the width, stretched to the image's size."""
    return A.CropAndPad(percent=(-most / 2, 0.0), keep_size=True, p=p)


class ShortSide(A.DualTransform):
    """Shrink the image by 640, 672 … 800 over 800, as for a shorter side of that length; pad the right and the bottom.

    The padding is ImageNet's mean grey level, 0 for a mask. Source: Detectron2's default mapper and its batches.
    """

    def get_params(self):
        return {"factor": self.py_random.randrange(640, 801, 32) / 800}

    def apply(self, img, factor, fill=114, **params):
        height, width = (round(side * factor) for side in img.shape[:2])
        out = np.full_like(img, fill)
        out[:height, :width] = cv2.resize(img, (width, height)).reshape(height, width, *img.shape[2:])
        return out

    def apply_to_mask(self, mask, **params):
        return self.apply(mask, **params, fill=0)

    def apply_to_bboxes(self, bboxes, factor, **params):
        out = bboxes.copy()  # as fractions of the sides; further columns stay
        out[:, :4] *= np.tile([round(side * factor) / side for side in params["shape"][1::-1]], 2)
        return out


def pipeline(name, size, default_mapper=False):
    """Return the pipeline of an augmentation by its name for images of `size` pixels, None if it changes nothing.

    built_in: the transforms of Detectron2 that Berger et al. use. Contrast and brightness by 0.7 to 1.3, rotation by
    ± 10 degrees and a crop of at least 0.8 of each side, with probability 0.2 each; flip with 0.5; Gaussian blur with
    kernel 5. Saturation has no effect on grey images. For the blur, the paper gives neither a probability (0.2 here)
    nor an image size; sigma is OpenCV's for kernel 5 at 1024 pixels, scaled with the size. Rotation shrinks the image
    until its corners are inside, like Detectron2's larger canvas; a rotated box becomes its bounding box.
    noise: diffused noise with our probability of 0.5, since the paper gives none. both: built_in, then noise. podium:
    the winners' transforms with our parameters. default_mapper: add Detectron2's flip and jitter of the shorter side.
    """
    tone, turn = [contrast(0.2), brightness(0.2)], A.SafeRotate((-10, 10), p=0.2)
    flip, noise = A.HorizontalFlip(p=0.5), DiffusedNoise(p=0.5)
    rest = [crop(0.2, 0.2), flip, _blur(size, 0.2)]
    steps = {
        "none": [],
        "flip": [flip],
        "built_in": [*tone, turn, *rest],
        "built_in_no_rotation": [*tone, *rest],
        "noise": [noise],
        "both": [*tone, turn, *rest, noise],
        "both_no_rotation": [*tone, *rest, noise],
        "podium": _podium(size),
    }[name]
    steps = [*steps, *([A.HorizontalFlip(p=0.5), ShortSide(p=1.0)] if default_mapper else [])]
    return compose([*steps, A.NoOp()]) if steps else None  # NoOp: the library warns if no step supports boxes


def _podium(size):
    """Return flip; shift, scale and rotation in one step; crop; tone; blur or sharpening; noise, sometimes dark."""
    moved = A.Affine(scale=(0.9, 1.1), translate_percent=(-0.06, 0.06), rotate=(-10.0, 10.0), keep_ratio=True, p=0.5)
    tone = [brightness(1.0), contrast(1.0), A.RandomGamma((80, 125), p=1.0), A.CLAHE((1.0, 3.0), p=1.0)]
    focus = [_blur(size, 1.0), A.Sharpen(alpha=(0.1, 0.3), p=1.0)]
    shade = DiffusedNoise((3, 10), strength=(-0.15, 0.3), p=0.15)
    return [A.HorizontalFlip(p=0.5), moved, crop(0.25, 0.3), A.OneOf(tone, p=0.5), A.OneOf(focus, p=0.15), shade]


def _blur(size, p):
    sigma = 1.1 * size / 1024
    return A.GaussianBlur(blur_limit=(5, 5), sigma_limit=(sigma, sigma), p=p)
