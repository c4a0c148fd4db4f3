"""Class activation maps: laid over the image they belong to, fused, and turned into regions and boxes.

A map is real (h, w), higher where more speaks for the class. Boxes are x_min, y_min, x_max, y_max in pixels of the
image, ends open. Source: Zhou et al. 2016, Learning deep features for discriminative localization.
"""

from typing import NamedTuple

import cv2
import numpy as np

from common.errors import InputError
from common.post.boxes import iou_matrix


class Region(NamedTuple):
    """A connected part of a map: its box, float64 (4,), and its pixels, bool (H, W)."""

    box: np.ndarray
    mask: np.ndarray


def place(cam, box, shape):
    """Stretch a map bilinearly over a box of an image of `shape` (H, W); float32 (H, W).

    Outside the box, where the network did not look, the map gets its lowest value: zero would be its highest where all
    of it is negative. The corners of the box are rounded to whole pixels. Raises InputError for a map that is not
    finite numbers (h, w), and for a box that is empty or reaches beyond the image.
    """
    cam = _checked(cam)
    x_min, y_min, x_max, y_max = np.round(np.asarray(box, float)).astype(int).tolist()
    height, width = shape
    if not (0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height):
        raise InputError(f"the box {np.asarray(box).tolist()} is no part of an image of {width} × {height} pixels")
    out = np.full((height, width), cam.min(), np.float32)
    out[y_min:y_max, x_min:x_max] = cv2.resize(cam, (x_max - x_min, y_max - y_min), interpolation=cv2.INTER_LINEAR)
    return out


def normalise(cam):
    """Stretch the values of a map from its lowest to its highest over [0, 1]; float32, zeros where all are equal."""
    cam = _checked(cam)
    low, high = float(cam.min()), float(cam.max())
    return (cam - low) / np.float32(high - low) if high > low else np.zeros_like(cam)


def fuse(maps):
    """Add maps of one image and normalise the sum; float32 (H, W) in [0, 1].

    Maps of branches whose features one layer weighs add up as their shares of its logit do. Those of networks with
    layers of their own lie on scales of their own: normalise them first, as their probabilities count alike. Source:
    Liu et al., SDFN, equations 5 and 6. Raises InputError for no maps, or maps of several shapes.
    """
    maps = [_checked(cam) for cam in maps]
    if len({cam.shape for cam in maps}) != 1:
        raise InputError(f"maps to fuse must have one shape, not {sorted({cam.shape for cam in maps})}")
    return normalise(np.sum(maps, axis=0))


def largest_region(cam, threshold):
    """The largest 8-connected Region where the map is at least `threshold`, of several the uppermost; None where none.

    A threshold is above 0 and at most 1, for a map as `normalise` gives it. Raises InputError for others.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"a threshold of a map must lie above 0 and be at most 1, not {threshold}")
    above = (_checked(cam) >= np.float32(threshold)).view(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    if len(stats) < 2:  # the background alone
        return None
    best = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    x, y, width, height = stats[best, :4].tolist()
    return Region(np.array([x, y, x + width, y + height], float), labels == best)


def region_iou(mask, box):
    """Intersection over union of the pixels of a mask (H, W) and the pixels whose centres lie in a box, in [0, 1]."""
    mask = np.asarray(mask, bool)
    inside = _inside(box, mask.shape)
    common = np.count_nonzero(mask[inside])
    union = np.count_nonzero(mask) + mask[inside].size - common
    return common / union if union else 0.0


def peak(cam):
    """Where the map is highest, as (x, y); the middle of several such pixels, None where all are equal.

    Positions are those of pixel centres: the first pixel lies at 0.5.
    """
    cam = _checked(cam)
    if cam.max() == cam.min():
        return None
    rows, columns = np.nonzero(cam == cam.max())
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def guided_box(cam, box):
    """The box of the true box's size around that local maximum of the map from which it fits the true box best.

    It is told the size and chooses by the truth, so it is no prediction; but the code that CXR-IRNet's authors released
    measures such boxes, and its figures can be laid beside no other measure. A maximum is a pixel that none within 1/32
    of the image's side exceeds. Boxes are moved, not cut, where they reach over the left or the upper edge. Returns
    float64 (4,), None where the map is flat.
    """
    cam, box = _checked(cam), np.asarray(box, float)
    reach = max(cam.shape) // 32
    highest = cv2.dilate(cam, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    rows, columns = np.nonzero((cam == highest) & (cam > cam.min()))
    if not len(rows):
        return None
    size = box[2:] - box[:2]
    corners = np.maximum(np.stack([columns, rows], axis=1) + 0.5 - size / 2, 0)
    boxes = np.concatenate([corners, corners + size], axis=1)
    return boxes[iou_matrix(boxes, box)[:, 0].argmax()]


def _inside(box, shape):
    x_min, y_min, x_max, y_max = (max(0, int(np.ceil(edge - 0.5))) for edge in box)  # centres lie at halves
    return slice(y_min, min(y_max, shape[0])), slice(x_min, min(x_max, shape[1]))


def _checked(cam):
    cam = np.asarray(cam)
    if cam.ndim != 2 or cam.size == 0 or cam.dtype.kind not in "fiu" or not np.isfinite(cam).all():
        raise InputError(f"a class activation map must be finite numbers (h, w), not {cam.dtype} {cam.shape}")
    return np.ascontiguousarray(cam, np.float32)
