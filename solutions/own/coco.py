"""Read COCO's masks (polygons, run lengths) and write run lengths; common/data/coco.py handles the rest of COCO."""

import cv2
import numpy as np

from common.errors import InputError
from common.post.rle import area, paint

OUTSIDE = 1.0  # pixels by which a polygon may exceed its image


def draw(outline, shape, where):
    """Return the mask of a COCO `segmentation` (polygons or run lengths), bool (height, width).

    Raises InputError, beginning with `where`, for a polygon outside the image and a mask of another size.
    """
    height, width = shape
    if isinstance(outline, dict):
        if list(outline["size"]) != [height, width]:
            sizes = f"size {outline['size']}, but its image has [{height}, {width}]"
            raise InputError(f"{where}: a run-length mask of {sizes} (height, width)")
        counts = outline["counts"]
        counts = _decode(counts) if isinstance(counts, str) else counts
        if min(counts, default=0) < 0 or sum(counts) != height * width:
            raise InputError(f"{where}: run lengths of {sum(counts)} pixels, but its image has {height * width}")
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    mask = np.zeros(shape, np.uint8)
    for polygon in outline:
        points = np.asarray(polygon, float).reshape(-1, 2)
        if (points < -OUTSIDE).any() or (points > np.array([width, height]) + OUTSIDE).any():
            raise InputError(f"{where}: the polygon leaves its image of {width} × {height} pixels")
        # COCO's integers are edges of pixels, OpenCV's are centres; shift=4: sixteenths of a pixel
        part = np.zeros(shape, np.uint8)
        cv2.fillPoly(part, [np.round((points - 0.5) * 16).astype(np.int32)], 1, shift=4)
        mask |= part
    return mask > 0


def _decode(text):
    """Return the run lengths of COCO's compressed string: 5 bits per character, differences to two runs before."""
    counts, place = [], 0
    while place < len(text):
        value, bits, more = 0, 0, True
        while more and place < len(text):
            code = ord(text[place]) - 48
            value, bits, more, place = value | (code & 31) << bits, bits + 5, bool(code & 32), place + 1
        value -= (1 << bits) if code & 16 else 0
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts


def mask_fields(runs, image):
    """Return an annotation's mask fields for runs of `common.post.rle`; image: its row in the run's table."""
    shape = int(image.height), int(image.width)
    counts = np.diff([0, *runs.ravel().tolist(), shape[0] * shape[1]]).tolist()
    box = cv2.boundingRect(paint(runs, shape, order="C"))
    return {"segmentation": {"size": list(shape), "counts": counts}, "bbox": list(box), "area": area(runs)}
