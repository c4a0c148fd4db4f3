"""Probabilities to lung masks, and lung masks to the box in which a classifier looks.

A mask is bool or uint8 (height, width), any one non-zero value being lung; masks returned are uint8 of 0 and 1.
Regions are joined by edges and corners (8). A box is (x_min, y_min, x_max, y_max) in whole pixels, ends open. Sources
(Ahmed et al., Liu et al.) are those of solutions.lung_segmentation.config.
"""

import math
import operator
from typing import NamedTuple

import cv2
import numpy as np

from common.errors import InputError
from common.post.regions import label, quantise, region_overlaps, resize_mask_probs

from .config import CLOSINGS, DILATIONS, GATE_AREA, MARGIN, MARGIN_BOTTOM, ONE_LUNG_RATIO, REFERENCE_SIDE

# What is under these is never taken for a lung, or a speck beside the spine would win over the second lung: Liu et al.
# go by the distance to the centre alone. In 642 hand-drawn masks (Montgomery, Shenzhen) the smaller lung has at least
# 1.8 % of the image and 0.10 of the larger lung, and those under a third are dropped anyway.
LEAST_SHARE = 0.005  # of the image
LEAST_OF_LARGEST = 0.1


class Verdict(NamedTuple):
    """What the area gate says of a mask: ok, the reason ("" when ok), and the lungs' area as a share of the image."""

    ok: bool
    reason: str
    area: float


class LungRegion(NamedTuple):
    """Where the lungs lie: the box with its margins, the rule that gave it, and the mask of the regions it rests on.

    rule: "two", both lungs found; "mirrored", one found and its mirror image boxed with it; "one", a single region
    that spans both halves of the image, as lungs do that have grown together. `mask` holds no mirrored pixels.
    """

    box: tuple[int, int, int, int]
    rule: str
    mask: np.ndarray


def clean_up(mask, dilations=DILATIONS, closings=CLOSINGS):
    """Widen a mask to the edges of the lungs and close its gaps: dilations, then closings, as uint8 (height, width).

    The counts are those of a 3 × 3 square at 512 × 512 pixels. n such steps reach n pixels, so at another size one
    step reaches round(n · height / 512) rows and round(n · width / 512) columns: as if the image, stretched to
    512 × 512, had been treated there. n closings are n dilations followed by n erosions; nothing comes in from
    beyond the image's border. Raises InputError for counts that are not whole numbers from 0. Source: Ahmed et al.,
    section 3.2, which does not give the structuring element.
    """
    pixels = _foreground(mask)
    wider = cv2.dilate(pixels, _rectangle(pixels.shape, _count(dilations, "dilations")))
    return cv2.morphologyEx(wider, cv2.MORPH_CLOSE, _rectangle(pixels.shape, _count(closings, "closings")))


def main_regions(mask, count):
    """Keep the `count` largest regions of a mask and fill their holes; count 0 leaves the mask as it is.

    Returns uint8 (height, width). Among equals the uppermost comes first, then the leftmost. A hole is background
    that cannot reach the image's border by edges. Raises InputError for a count that is not a whole number from 0.
    """
    pixels = _foreground(mask)
    if _count(count, "regions") == 0:
        return pixels
    areas, _ = region_overlaps(pixels)
    largest = np.argsort(-areas, kind="stable")[:count]
    around = np.pad(_selected(label(pixels)[0], largest), 1)
    cv2.floodFill(around, None, (0, 0), 2)
    return (around[1:-1, 1:-1] != 2).view(np.uint8)


def decide(probs, shape, pixel, regions):
    """Turn a probability map into the mask of an image: resized, cut at `pixel`, then `main_regions`.

    probs: uint8 (h, w), q standing for q / 255; shape: (height, width) of the image; pixel: least probability of
    lung, in [0, 1]; regions: largest regions kept, 0 for all. Returns uint8 (height, width). Raises InputError.
    """
    return main_regions(resize_mask_probs(probs, _shape(shape)) >= quantise(pixel), regions)


def judge(mask, gate=GATE_AREA):
    """Say whether a mask shows enough lung for its image to be used, as a Verdict.

    gate: least share of the image that must be lung, in [0, 1]; the default is Ahmed et al.'s 50,000 of 512 × 512
    pixels, which the paper applies after `clean_up` and found by trial. A mask in which `lung_region` finds nothing but
    specks never passes. Raises InputError.
    """
    if not 0 <= gate <= 1:
        raise InputError(f"the area gate must lie in [0, 1], not {gate!r}")
    region = lung_region(mask)
    area = np.count_nonzero(mask) / np.asarray(mask).size
    if region is None:
        return Verdict(False, "no lung found", area)
    if area >= gate:
        return Verdict(True, "", area)
    # Rounded away from each other, or a mask just under the gate would read as one that reaches it.
    found = f"{math.floor(area * 1000) / 10:g} % of the image, the gate asks for {math.ceil(gate * 1000) / 10:g} %"
    lungs = "one lung only: it covers" if region.rule == "mirrored" else "lungs cover"
    return Verdict(False, f"{lungs} {found}", area)


def lung_region(mask):
    """Find the box around both lungs, even where the mask lacks one or holds more; None where there is no lung.

    The lung region generator of Liu et al., section 2.2: of the regions that are not specks (LEAST_SHARE of the image,
    LEAST_OF_LARGEST of the largest region), the two whose centroids lie nearest the image's centre, in pixels; the
    smaller is dropped if it has less than a third of the larger's area, and what is left alone is mirrored about the
    vertical centre line and boxed with its mirror image. The margins, 15 of 256 pixels and 20 at the bottom, are
    taken as fractions of the mask's width and height, and the box is clipped to the mask.

    Beyond the paper, that line tells how many lungs there are, a third being the measure again: one region with so
    much of it on both sides is two lungs in one and boxed as it is; two regions on one side, one above the other, are
    parts of one lung and mirrored. Raises InputError.
    """
    pixels = _foreground(mask)
    height, width = pixels.shape
    _, labels, stats, centroids = cv2.connectedComponentsWithStats(pixels, connectivity=8)
    stats, centroids = stats[1:], centroids[1:]  # without the background
    areas = stats[:, cv2.CC_STAT_AREA]
    least = max(LEAST_SHARE * pixels.size, LEAST_OF_LARGEST * areas.max(initial=0))
    large = np.flatnonzero(areas >= least)
    if len(large) == 0:
        return None
    from_centre = np.linalg.norm(centroids[large] - ((width - 1) / 2, (height - 1) / 2), axis=1)
    nearest = large[np.argsort(from_centre, kind="stable")[:2]]
    kept = nearest[areas[nearest] >= ONE_LUNG_RATIO * areas[nearest].max()]
    lungs = _selected(labels, kept)
    corners = stats[kept, :2]
    left, top = corners.min(axis=0).tolist()
    right, bottom = (corners + stats[kept, 2:4]).max(axis=0).tolist()
    rule = "one" if len(kept) == 1 else "two"
    across, down = np.ptp(centroids[kept], axis=0)
    halves = np.count_nonzero(lungs[:, : width // 2]), np.count_nonzero(lungs[:, (width + 1) // 2 :])
    if min(halves) < ONE_LUNG_RATIO * max(halves) and (rule == "one" or down > across):
        rule = "mirrored"
        left, right = min(left, width - right), max(right, width - left)
    aside = round(MARGIN * width)
    box = (
        max(left - aside, 0),
        max(top - round(MARGIN * height), 0),
        min(right + aside, width),
        min(bottom + round(MARGIN_BOTTOM * height), height),
    )
    return LungRegion(box, rule, lungs)


def scale_box(box, from_shape, to_shape):
    """Carry a box from an image of one size to the same image at another, as ints that cover at least the box.

    Shapes are (height, width). Raises InputError for a box that does not lie inside `from_shape`.
    """
    (from_height, from_width), (to_height, to_width) = _shape(from_shape), _shape(to_shape)
    x_min, y_min, x_max, y_max = _box(box, from_height, from_width)
    return (
        x_min * to_width // from_width,
        y_min * to_height // from_height,
        -(-x_max * to_width // from_width),
        -(-y_max * to_height // from_height),
    )


def crop(image, box):
    """Copy the pixels of a box out of an image, (height, width) or (height, width, channels) of any dtype.

    Raises InputError for a box that does not lie inside the image.
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3):
        raise InputError(f"cannot crop an array of shape {image.shape}: need height and width")
    x_min, y_min, x_max, y_max = _box(box, *image.shape[:2])
    return image[y_min:y_max, x_min:x_max].copy()


def _foreground(mask):
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8) or mask.size == 0:
        raise InputError(f"a mask must be bool or uint8 (height, width), not {mask.dtype} of shape {mask.shape}")
    pixels = np.ascontiguousarray(mask != 0).view(np.uint8)
    top = mask.max()
    if top > 1 and np.count_nonzero(mask == top) != np.count_nonzero(pixels):
        raise InputError("a mask must hold one value beside 0; probabilities go through decide first")
    return pixels


def _selected(labels, regions):
    chosen = np.zeros(labels.shape, bool)
    for region in regions:
        chosen |= labels == region + 1
    return chosen.view(np.uint8)


def _rectangle(shape, steps):
    rows, columns = (2 * math.floor(steps * side / REFERENCE_SIDE + 0.5) + 1 for side in shape)
    return np.ones((rows, columns), np.uint8)


def _count(value, name):
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise InputError(f"{name} must be a whole number from 0, not {value!r}")
    return int(value)


def _whole(values, count, what):
    try:
        whole = tuple(operator.index(value) for value in values)
    except TypeError:
        whole = ()
    if len(whole) != count:
        raise InputError(f"{what} must be {count} whole numbers, not {values!r}")
    return whole


def _shape(shape):
    height, width = _whole(shape, 2, "a shape (height, width)")
    if height < 1 or width < 1:
        raise InputError(f"a shape must have a positive height and width, not {shape!r}")
    return height, width


def _box(box, height, width):
    x_min, y_min, x_max, y_max = _whole(box, 4, "a box (x_min, y_min, x_max, y_max)")
    if not (0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height):
        raise InputError(f"the box {box!r} does not lie inside the image of height {height}, width {width}")
    return x_min, y_min, x_max, y_max
