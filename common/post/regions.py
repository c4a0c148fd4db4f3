"""Connected regions of masks and of thresholded probability maps.

A probability map is uint8, q standing for q / 255. Foreground is every value >= `threshold`: 1 for a mask, more for a
probability map, so that no separate mask is needed. Pixels are connected by edges and corners (`connectivity` 8,
OpenCV's default) or by edges only (4, scipy.ndimage's default).
"""

import math

import cv2
import numpy as np

from common.errors import InputError
from common.jit import compiled

_BLOCK = 128  # pixels compared at once: enough to vectorise, yet cheap to repeat one by one at an edge


def remove_small(mask, min_area, connectivity=8, threshold=1):
    """Return a mask without its regions of fewer than `min_area` pixels.

    mask: bool or uint8 (height, width). The result is uint8 of 0 and 1 in the same memory order. Raises InputError for
    other arrays.

    >>> remove_small(np.array([[1, 1, 0, 1]], np.uint8), 2).tolist()
    [[1, 1, 0, 0]]
    """
    pixels = _checked(mask, connectivity, threshold)
    if not pixels.flags.c_contiguous and pixels.flags.f_contiguous:  # transposing keeps the regions
        return remove_small(pixels.T, min_area, connectivity, threshold).T
    pixels = np.ascontiguousarray(pixels)
    return _keep_large(pixels, threshold, min_area, connectivity == 8, np.zeros(pixels.shape, np.uint8))


def region_overlaps(mask, truth=None, connectivity=8, threshold=1):
    """Return the area of each region, in the order of `label`, and its pixels in a true mask, both int64 (n,)."""
    pixels = np.ascontiguousarray(_checked(mask, connectivity, threshold))
    if truth is None:
        return _measure(pixels, threshold, np.empty((0, 0), np.uint8), connectivity == 8)
    truth = np.ascontiguousarray(_checked(truth, connectivity, 1))
    if truth.shape != pixels.shape:
        raise InputError(f"the true mask is {truth.shape} pixels, the mask {pixels.shape}")
    return _measure(pixels, threshold, truth, connectivity == 8)


def label(mask, connectivity=8, threshold=1):
    """Return (labels int32 (height, width), count): regions numbered from 1, row-major by first pixel."""
    pixels = np.ascontiguousarray(_checked(mask, connectivity, threshold))
    return _label(pixels, threshold, connectivity == 8, np.zeros(pixels.shape, np.int32))


def quantise(t):
    """Return ceil(t * 255), allowing for rounding errors: p >= t on stored probabilities is q >= quantise(t)."""
    if not 0 <= t <= 1:
        raise InputError(f"a threshold must lie in [0, 1], not {t!r}")
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
    if connectivity not in (4, 8):
        raise InputError(f"connectivity must be 4 or 8, not {connectivity!r}")
    if threshold not in range(1, 256):
        raise InputError(f"a threshold on uint8 must be a whole number from 1 to 255, not {threshold!r}")
    return mask.view(np.uint8)


@compiled
def _find_row_runs(pixels, threshold):
    """Return starts and ends (columns) of the runs of all rows, and the first run of each row."""
    height, width = pixels.shape
    threshold = np.uint8(threshold)
    starts = np.empty(height * (width // 2 + 1), np.int32)  # mostly untouched, so it costs only address space
    ends = np.empty_like(starts)
    first = np.empty(height + 1, np.int64)
    n = 0
    for y in range(height):
        row, inside = pixels[y], False
        first[y] = n
        for block in range(0, width, _BLOCK):
            part = row[block : block + _BLOCK]
            changes = False
            for i in range(len(part)):
                changes |= (part[i] >= threshold) != inside
            if not changes:
                continue
            for i in range(len(part)):
                if (part[i] >= threshold) != inside:
                    if inside:
                        ends[n] = block + i
                        n += 1
                    else:
                        starts[n] = block + i
                    inside = not inside
        if inside:
            ends[n] = width
            n += 1
    first[height] = n
    return starts[:n], ends[:n], first


@compiled
def _find_root(parent, k):
    while parent[k] != k:
        parent[k] = parent[parent[k]]
        k = parent[k]
    return k


@compiled
def _find_regions(pixels, threshold, corners):
    """Return the row runs, the region of each, numbered from 0 by first run, and the number of regions."""
    starts, ends, first = _find_row_runs(pixels, threshold)
    reach = 1 if corners else 0
    region = np.arange(len(starts))
    for y in range(1, len(first) - 1):
        above = first[y - 1]
        for k in range(first[y], first[y + 1]):
            while above < first[y] and ends[above] + reach <= starts[k]:
                above += 1
            touching = above
            while touching < first[y] and starts[touching] < ends[k] + reach:
                a, b = _find_root(region, k), _find_root(region, touching)
                region[max(a, b)] = min(a, b)
                touching += 1
    n = 0
    for k in range(len(region)):  # a parent precedes its children and so already has its final number
        if region[k] == k:
            region[k] = n
            n += 1
        else:
            region[k] = region[region[k]]
    return starts, ends, first, region, n


@compiled
def _measure(pixels, threshold, truth, corners):
    starts, ends, first, region, n = _find_regions(pixels, threshold, corners)
    areas, overlaps = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for y in range(len(first) - 1):
        for k in range(first[y], first[y + 1]):
            areas[region[k]] += ends[k] - starts[k]
            if truth.size:
                part = truth[y, starts[k] : ends[k]]
                common = 0
                for i in range(len(part)):
                    common += part[i] != 0
                overlaps[region[k]] += common
    return areas, overlaps


@compiled
def _label(pixels, threshold, corners, labels):
    starts, ends, first, region, n = _find_regions(pixels, threshold, corners)
    for y in range(len(first) - 1):
        for k in range(first[y], first[y + 1]):
            labels[y, starts[k] : ends[k]] = region[k] + 1
    return labels, n


@compiled
def _keep_large(pixels, threshold, min_area, corners, kept):
    starts, ends, first, region, n = _find_regions(pixels, threshold, corners)
    areas = np.zeros(n, np.int64)
    for k in range(len(region)):
        areas[region[k]] += ends[k] - starts[k]
    for y in range(len(first) - 1):
        for k in range(first[y], first[y + 1]):
            if areas[region[k]] >= min_area:
                kept[y, starts[k] : ends[k]] = 1
    return kept
