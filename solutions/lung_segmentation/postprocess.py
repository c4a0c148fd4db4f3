"""Turn probabilities into lung masks, score the masks, and turn them into boxes that classifiers crop.

A mask is bool or uint8 (height, width) with a single non-zero value; returned masks are uint8 of 0 and 1. Regions are
8-connected. A box is (x_min, y_min, x_max, y_max) in whole pixels, ends exclusive. config.py gives the sources.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from common import processes
from common.data.loaders import UNKNOWN
from common.errors import InputError
from common.metrics import segmentation
from common.metrics.statistics import as_interval, bootstrap
from common.post.regions import label, quantise, region_overlaps, resize_mask_probs

from .config import CLOSINGS, DILATIONS, GATE_AREA, MARGIN, MARGIN_BOTTOM, ONE_LUNG_RATIO, REFERENCE_SIDE, STRUCTURES

# Smaller regions never count as a lung: Liu et al. use only the distance to the centre, so a speck beside the spine
# could win over the second lung. In 642 hand-drawn masks (Montgomery, Shenzhen) the smaller lung covers at least 1.8 %
# of the image and a tenth of the larger lung. Lungs under a third of the other are dropped anyway.
LEAST_SHARE, LEAST_OF_LARGEST = 0.005, 0.1  # share of the image, share of the largest region


class Verdict(NamedTuple):
    """The area gate's verdict on a mask: ok, the reason ("" if ok), and the lungs' share of the image."""

    ok: bool
    reason: str
    area: float


class LungRegion(NamedTuple):
    """The box around the lungs including margins, the rule that gave it, and the mask of the regions used.

    rule: "two", two lungs and nothing else; "removed", two after false positives were removed; "mirrored", one lung,
    boxed with its mirror image; "one_side", two parts of one lung, also boxed with their mirror image; "one", a single
    region that spans both halves of the image, such as merged lungs. `mask` has no mirrored pixels.
    """

    box: tuple[int, int, int, int]
    rule: str
    mask: np.ndarray


def clean_up(mask, dilations=DILATIONS, closings=CLOSINGS):
    """Return a mask, uint8 (height, width), widened by dilations and with its gaps closed (Ahmed et al., section 3.2).

    At 512 × 512 pixels, n steps with a 3 × 3 square; at other sizes, a single step with a square scaled accordingly.
    """
    pixels = _foreground(mask)
    wider = cv2.dilate(pixels, _rectangle(pixels.shape, dilations))
    return cv2.morphologyEx(wider, cv2.MORPH_CLOSE, _rectangle(pixels.shape, closings))


def main_regions(mask, count):
    """Return the `count` largest regions of a mask (0: all), the upper of equal ones; holes are filled unless 0."""
    pixels = _foreground(mask)
    if count == 0:
        return pixels
    areas, _ = region_overlaps(pixels)
    largest = np.argsort(-areas, kind="stable")[:count]
    around = np.pad(np.isin(label(pixels)[0], largest + 1).view(np.uint8), 1)
    cv2.floodFill(around, None, (0, 0), 2)
    return (around[1:-1, 1:-1] != 2).view(np.uint8)


def decide(probs, shape, pixel, regions):
    """Return an image's mask from its probability map uint8 (h, w): resized, thresholded, then `main_regions`."""
    return main_regions(resize_mask_probs(probs, shape) >= quantise(pixel), regions)


def apply_gate(mask, gate=GATE_AREA):
    """Return the Verdict on whether a mask has enough lung (by default Ahmed et al.'s share) to be used."""
    region = lung_region(mask)
    area = np.count_nonzero(mask) / np.asarray(mask).size
    if region is None:
        return Verdict(False, "no lung found", area)
    if area >= gate:
        return Verdict(True, "", area)
    # Rounded in opposite directions, lest a mask just under the gate seem to reach it.
    found = f"{math.floor(area * 1000) / 10:g} % of the image, the gate requires {math.ceil(gate * 1000) / 10:g} %"
    lungs = "only one lung, covering" if region.rule in ("mirrored", "one_side") else "lungs cover"
    return Verdict(False, f"{lungs} {found}", area)


def lung_region(mask):
    """Return the LungRegion around both lungs, even if the mask lacks one or has extra regions; None without lungs.

    The lung region generator of Liu et al., section 2.2: of the regions that are not specks, take the two whose
    centroids are nearest the image's centre. Drop the smaller one if its area is under a third of the larger one's. A
    single remaining region is mirrored about the vertical centre line and boxed with its mirror image. Margins (15 of
    256 pixels, 20 at the bottom) scale with the mask's sides, and the box is clipped.
    Beyond the paper, the same ratio at the centre line tells two lungs from one: a single region with at least that
    share on both sides is two merged lungs; two regions on one side, one above the other, are parts of one lung, which
    is mirrored.
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
    lungs = np.isin(labels, kept + 1).view(np.uint8)
    corners = stats[kept, :2]
    left, top = corners.min(axis=0).tolist()
    right, bottom = (corners + stats[kept, 2:4]).max(axis=0).tolist()
    rule = "one" if len(kept) == 1 else "two" if len(large) == 2 else "removed"
    across, down = np.ptp(centroids[kept], axis=0)
    halves = np.count_nonzero(lungs[:, : width // 2]), np.count_nonzero(lungs[:, (width + 1) // 2 :])
    if min(halves) < ONE_LUNG_RATIO * max(halves) and (rule == "one" or down > across):
        rule = "mirrored" if rule == "one" else "one_side"
        left, right = min(left, width - right), max(right, width - left)
    aside = round(MARGIN * width)
    box = (
        max(left - aside, 0),
        max(top - round(MARGIN * height), 0),
        min(right + aside, width),
        min(bottom + round(MARGIN_BOTTOM * height), height),
    )
    return LungRegion(box, rule, lungs)


def lung_boxes(masks):
    """Return the box (x_min, y_min, x_max, y_max), ends exclusive, of each mask's `lung_region`, or None."""
    return [None if (region := lung_region(mask)) is None else region.box for mask in masks]


def scale_box(box, from_shape, to_shape):
    """Return a box scaled from one image (height, width) to another, as ints that cover at least the box."""
    edges = zip(map(int, box), from_shape[::-1] * 2, to_shape[::-1] * 2, (1, 1, -1, -1), strict=True)
    return tuple(out * (out * edge * to // own) for edge, own, to, out in edges)  # the last two are rounded up


def _foreground(mask):
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8) or mask.size == 0:
        raise InputError(f"a mask must be bool or uint8 (height, width), not {mask.dtype} of shape {mask.shape}")
    pixels = np.ascontiguousarray(mask != 0).view(np.uint8)
    if mask.max() > 1 and np.count_nonzero(mask == mask.max()) != np.count_nonzero(pixels):
        raise InputError("a mask must have a single value besides 0; pass probabilities to `decide` first")
    return pixels


def _rectangle(shape, steps):
    rows, columns = (2 * math.floor(steps * side / REFERENCE_SIDE + 0.5) + 1 for side in shape)
    return np.ones((rows, columns), np.uint8)


@dataclass(frozen=True)
class MaskRule:
    """The decision rule: pixels of probability `pixel` or more, then the `regions` largest regions (0: all)."""

    pixel: float = 0.5
    regions: int = 0

    def parts(self, probs, shape, structures):
        """Return masks (C, *shape) of uint8 maps; a channel of one lung or the heart keeps half of the `regions`."""
        maps = probs[None] if probs.ndim == 2 else probs
        kept = self.regions if structures == "lungs" else -(-self.regions // 2)
        return np.stack([decide(np.ascontiguousarray(part), shape, self.pixel, kept) for part in maps])

    def lungs(self, probs, shape, structures):
        """Return the lungs' mask, uint8 (height, width)."""
        return self.parts(probs, shape, structures)[:2].max(0)


def rules(decision):
    """Return every rule that a DecisionConfig allows."""
    return [MaskRule(pixel, regions) for pixel in decision.pixel for regions in decision.regions]


def measure(truth, rows, probs, tried, structures):
    """Return pixel counts per image, rule and structure: int64 (N, rules, S, 4) of overlap, predicted, true, all.

    truth(row): the true masks of a store row at its original size, uint8 (C, height, width). A mask that was not drawn
    is all UNKNOWN and has counts of 0. The S structures: both lungs united, then each channel if there are several.
    """

    def of_image(row, position):
        true, maps = truth(row), probs[position]
        counts = []
        for rule in tried:
            parts = rule.parts(maps, true.shape[1:], structures)
            pairs = [(parts[:2].max(0), true[:2].max(0)), *(zip(parts, true, strict=True) if len(true) > 1 else ())]
            areas = [(*map(np.count_nonzero, (p & t, p, t)), t.size) for p, t in pairs]
            known = [t.flat[0] != UNKNOWN for _, t in pairs]
            counts.append(np.array(areas) * np.array(known)[:, None])
        return counts

    with ThreadPoolExecutor(processes.cores()) as pool:
        found = pool.map(of_image, map(int, rows), range(len(rows)))
        return np.array(list(tqdm(found, "measure", len(rows), leave=False)), np.int64)


def figures(table, areas, structures):
    """Return the metrics of all images, each dataset and each structure, and the table with dice and iou added.

    Each metric has an interval over patients: <name> is a mean over images, <name>_pooled is over all pixels.
    """
    lungs, groups = areas[:, 0], table["patient_id"].to_numpy()
    found = _figures(lungs, groups) | {"datasets": {}, "structures": {}}
    for name, rows in table.groupby("dataset").indices.items():
        if len(set(groups[rows])) > 1:
            found["datasets"][name] = _figures(lungs[rows], groups[rows])
    for number, name in enumerate(STRUCTURES[structures] if areas.shape[1] > 1 else (), start=1):
        drawn = areas[:, number, 3] > 0
        if drawn.any():
            found["structures"][name] = _figures(areas[drawn, number], groups[drawn])
    cells = segmentation.counts_from_areas(*lungs.T)
    return found, table.assign(dice=segmentation.dice(cells), iou=segmentation.iou(cells))


def _figures(areas, groups):
    cells = segmentation.counts_from_areas(*areas.T)
    found = {"images": len(cells), "patients": len(set(groups))}
    for name in ("dice", "iou", "precision", "recall", "accuracy"):
        metric = getattr(segmentation, name)
        found[name] = as_interval(bootstrap(metric(cells), groups))
        pooled = bootstrap(lambda rows, metric=metric: float(metric(cells[rows], reduce="pooled")), groups)
        found[f"{name}_pooled"] = as_interval(pooled)
    return found
