"""Class activation maps (h, w): fusion, and boxes in pixels with exclusive ends. Source: Zhou et al. 2016."""

import cv2
import numpy as np

from common.post.boxes import iou_matrix


def place(cam, box, shape):
    """Return a map (h, w) stretched over a box in an image of `shape`, float32 (H, W); outside, its minimum."""
    cam, (height, width) = np.ascontiguousarray(cam, np.float32), shape
    x_min, y_min, x_max, y_max = np.round(np.asarray(box, float)).astype(int).tolist()
    out = np.full((height, width), cam.min(), np.float32)
    out[y_min:y_max, x_min:x_max] = cv2.resize(cam, (x_max - x_min, y_max - y_min), interpolation=cv2.INTER_LINEAR)
    return out


def normalise(cam):
    """Return a map rescaled from [minimum, maximum] to [0, 1], float32; zeros if all values are equal."""
    low, high = float(cam.min()), float(cam.max())
    return np.float32(cam - low) / np.float32(high - low) if high > low else np.zeros_like(cam, np.float32)


def fuse(maps):
    """Return the normalised sum of maps of one image, float32 (H, W) in [0, 1]: Liu et al., SDFN, equations 5 and 6.

    Normalise the maps of networks with separate final layers first, since their scales differ.
    """
    return normalise(np.sum(maps, axis=0))


def largest_box(cam, threshold):
    """Return the box, float64 (4,), of the largest (uppermost) 8-connected region >= a threshold in (0, 1], or None."""
    above = np.uint8(cam >= np.float32(threshold))
    stats = cv2.connectedComponentsWithStats(above, connectivity=8)[2][1:]  # without the background
    if not len(stats):
        return None
    x, y, width, height = stats[stats[:, cv2.CC_STAT_AREA].argmax(), :4]
    return np.array([x, y, x + width, y + height], float)


def peak(cam):
    """Return the position (x, y) of the map's maximum (mean if several), pixel centres at halves; None if flat."""
    if cam.max() == cam.min():
        return None
    rows, columns = np.nonzero(cam == cam.max())
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def guided_box(cam, box):
    """Return a box of the true box's size around the local maximum at which it overlaps the true box most.

    This is not a prediction, since it uses the true box. CXR-IRNet's code measures such boxes, but swaps rows and
    columns and takes centres of dilated blobs for peaks. Here, a peak is a maximum within 1/32 of the side.
    """
    box = np.asarray(box, float)
    reach = max(cam.shape) // 32
    highest = cv2.dilate(cam, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
    rows, columns = np.nonzero((cam == highest) & (cam > cam.min()))
    if not len(rows):
        return None
    size = box[2:] - box[:2]
    corners = np.maximum(np.stack([columns, rows], axis=1) + 0.5 - size / 2, 0)
    boxes = np.concatenate([corners, corners + size], axis=1)
    return boxes[iou_matrix(boxes, box)[:, 0].argmax()]
