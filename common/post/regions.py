"""Connected regions of masks and of thresholded probability maps.

A probability map is uint8, with q representing q / 255. Foreground is every value >= `threshold`: 1 for a mask, more
for a probability map, so no separate mask is needed. Pixels are connected by edges and corners (`connectivity` 8,
OpenCV's default) or by edges only (4, scipy.ndimage's default).
"""

import math

import cv2
import numpy as np

from common.errors import InputError, check
from common.jit import compiled


def remove_small(mask, min_area, connectivity=8, threshold=1):
    """Return a mask without regions of fewer than `min_area` pixels.

    mask: bool or uint8 (height, width), else InputError. The result is uint8 of 0 and 1 in the same memory order.

    >>> remove_small(np.array([[1, 1, 0, 1]], np.uint8), 2).tolist()
    [[1, 1, 0, 0]]
    """
    pixels = _checked(mask, connectivity, threshold)
    if not pixels.flags.c_contiguous and pixels.flags.f_contiguous:  # transposing keeps the regions
        return remove_small(pixels.T, min_area, connectivity, threshold).T
    *runs, region, areas = _find_regions(pixels, threshold, connectivity)
    return _paint(*runs, (areas >= min_area).astype(np.uint8)[region], np.zeros(pixels.shape, np.uint8))


def region_overlaps(mask, truth=None, connectivity=8, threshold=1):
    """Return each region's area, in the order of `label`, and its overlap with a true mask, both int64 (n,)."""
    pixels = _checked(mask, connectivity, threshold)
    *runs, region, areas = _find_regions(pixels, threshold, connectivity)
    if truth is None:
        return areas, np.zeros_like(areas)
    truth = _checked(truth, connectivity, 1)
    check(truth.shape == pixels.shape, f"the true mask is {truth.shape} pixels, the mask {pixels.shape}")
    return areas, _count_common(*runs, region, truth, np.zeros_like(areas))


def label(mask, connectivity=8, threshold=1):
    """Return (labels int32 (height, width), count): regions numbered from 1, row-major by first pixel."""
    pixels = _checked(mask, connectivity, threshold)
    *runs, region, areas = _find_regions(pixels, threshold, connectivity)
    return _paint(*runs, region + 1, np.zeros(pixels.shape, np.int32)), len(areas)


def quantise(t):
    """Return ceil(t * 255), allowing for rounding errors: p >= t on stored probabilities is q >= quantise(t)."""
    check(0 <= t <= 1, f"a threshold must lie in [0, 1], not {t!r}")
    return math.ceil(t * 255 - 1e-9)


def resize_mask_probs(probs, size=(1024, 1024)):
    """Return a uint8 probability map resized bilinearly to `size` (height, width), to be thresholded afterwards."""
    if probs.dtype != np.uint8 or probs.ndim != 2:
        raise InputError(f"probabilities must be uint8 (height, width), not {probs.dtype} {probs.shape}")
    return cv2.resize(probs, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def _checked(mask, connectivity, threshold):
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8):
        raise InputError(f"a mask must be bool or uint8 with 2 dimensions, not {mask.dtype} with {mask.ndim}")
    check(connectivity in (4, 8), f"connectivity must be 4 or 8, not {connectivity!r}")
    check(threshold in range(1, 256), f"a threshold on uint8 must be a whole number from 1 to 255, not {threshold!r}")
    return mask.view(np.uint8)


def _find_regions(pixels, threshold, connectivity):
    """Return rows, starts and ends of all runs, each run's region (from 0 by first run), and the regions' areas."""
    height, width = pixels.shape
    inside = np.zeros((height, width + 1), bool)
    inside[:, 1:] = pixels >= threshold
    # there is one outside pixel between the end of a row and the next row
    edges = np.flatnonzero(np.diff(np.append(inside.reshape(-1), False)))
    (rows, starts), ends = np.divmod(edges[::2], width + 1), edges[1::2] % (width + 1)
    region = _join_runs(rows, starts, ends, 1 if connectivity == 8 else 0)
    return rows, starts, ends, region, np.bincount(region, ends - starts).astype(np.int64)


@compiled
def _find_root(parent, k):
    while parent[k] != k:
        parent[k] = parent[parent[k]]
        k = parent[k]
    return k


@compiled
def _join_runs(rows, starts, ends, reach):
    """Return the region of each run; runs of adjacent rows touch if fewer than `reach` + 1 columns lie between."""
    region = np.arange(len(rows))
    above = 0  # the first run of the previous row that may touch
    for k in range(len(rows)):
        while rows[above] < rows[k] - 1 or (rows[above] == rows[k] - 1 and ends[above] + reach <= starts[k]):
            above += 1
        touching = above
        while rows[touching] == rows[k] - 1 and starts[touching] < ends[k] + reach:
            a, b = _find_root(region, k), _find_root(region, touching)
            region[max(a, b)] = min(a, b)
            touching += 1
    n = 0
    for k in range(len(region)):  # a parent precedes its children, so its number is already final
        if region[k] == k:
            region[k] = n
            n += 1
        else:
            region[k] = region[region[k]]
    return region


@compiled
def _count_common(rows, starts, ends, region, truth, overlaps):
    for k in range(len(rows)):
        part, common = truth[rows[k], starts[k] : ends[k]], 0
        for i in range(len(part)):
            common += part[i] != 0
        overlaps[region[k]] += common
    return overlaps


@compiled
def _paint(rows, starts, ends, values, out):
    for k in range(len(rows)):
        if values[k]:
            out[rows[k], starts[k] : ends[k]] = values[k]
    return out
