"""Training images composed of several images with boxes: mosaic and mixup.

A part is (image uint8 (C, S, S), boxes float32 (n, 4) in its pixels, labels int64 (n,)); so is every result.
"""

import cv2
import numpy as np

MIXUP = 1.5  # both parameters of the Beta distribution of mixup's share. Source: Zhang et al. 2019
CENTRE = 0.3, 0.7  # fractions of the side between which a mosaic's parts meet; ours (YOLOX: 0.25 to 0.75)


def mosaic(parts, x, y):
    """Return the image of four parts, in reading order, that meet at the pixel x, y.

    Each part is shrunk to its quarter, so boxes stay exact; YOLOv4 (Bochkovskiy et al. 2020) crops the parts instead.
    """
    out, boxes, side = np.empty_like(parts[0][0]), [], parts[0][0].shape[-1]
    corners = [(0, 0, x, y), (x, 0, side, y), (0, y, x, side), (x, y, side, side)]
    for (image, found, _), (left, top, right, bottom) in zip(parts, corners, strict=True):
        size = right - left, bottom - top
        out[:, top:bottom, left:right] = [cv2.resize(p, size, interpolation=cv2.INTER_AREA) for p in image]
        boxes.append(found * np.tile(np.float32(size) / side, 2) + np.float32([left, top] * 2))
    return out, np.concatenate(boxes), np.concatenate([labels for *_, labels in parts])


def mixup(one, other, share):
    """Return the weighted mean of two images, `share` being the first one's weight, with the boxes of both.

    Source: Zhang et al. 2019, Bag of Freebies for Training Object Detection Neural Networks.
    """
    image = np.rint(one[0] * np.float32(share) + other[0] * np.float32(1 - share)).astype(np.uint8)
    return image, *map(np.concatenate, zip(one[1:], other[1:], strict=True))


def mix(read, index, n, chances, rng):
    """Return part `index` of n, read by read(index), possibly made into a mosaic and then possibly mixed up.

    chances: probabilities of a mosaic and of mixup, in [0, 1]; the other parts are drawn from all n.
    """
    part = read(index)
    if rng.random() < chances[0]:
        x, y = rng.integers(*np.round(np.multiply(CENTRE, part[0].shape[-1])).astype(int), 2, endpoint=True)
        parts = [part, *map(read, rng.integers(n, size=3))]
        part = mosaic([parts[k] for k in rng.permutation(4)], x, y)
    if rng.random() < chances[1]:
        part = mixup(part, read(rng.integers(n)), rng.beta(MIXUP, MIXUP))
    return part
