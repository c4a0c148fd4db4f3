"""Regions of masks at 1024 x 1024 against scikit-image, scipy and OpenCV, with identical results.

Run: python -m benchmarks.regions    (about half a minute; needs torchxrayvision, whose wheel carries the label table)

The masks are real SIIM masks (24 images, the runs of each united) with specks of 1 to 7 pixels' radius strewn over
them, as a segmenter leaves them; the probability maps are these masks blurred. Peers, all with 8-connectivity:
- skimage.morphology.remove_small_objects on the bool mask
- scipy.ndimage.label, np.bincount and a look-up
- cv2.connectedComponentsWithStats and a look-up; "alone" is that call without the look-up
"""

import inspect
import sys

import cv2
import numpy as np
import pandas as pd
from scipy import ndimage
from skimage.morphology import remove_small_objects

from benchmarks.rle import timings
from benchmarks.tables import label_table
from common.post import regions, rle

MIN_AREA = 300
EIGHT = np.ones((3, 3))
# scikit-image renamed the option in 0.26, and counts the limit itself as small under the new name
RENAMED = "max_size" in inspect.signature(remove_small_objects).parameters
LIMIT = {"max_size": MIN_AREA - 1} if RENAMED else {"min_size": MIN_AREA}


def with_skimage(mask):
    return remove_small_objects(mask.view(bool), connectivity=2, **LIMIT)


def with_scipy(mask):
    labels, _ = ndimage.label(mask, EIGHT)
    large = np.bincount(labels.ravel()) >= MIN_AREA
    large[0] = False
    return large[labels]


def labelled_by_opencv(mask):
    return cv2.connectedComponentsWithStats(mask, connectivity=8)


def with_opencv(mask):
    _, labels, stats, _ = labelled_by_opencv(mask)
    large = stats[:, cv2.CC_STAT_AREA] >= MIN_AREA
    large[0] = False
    return large[labels]


def overlaps_with_scipy(probs, truth, at):
    labels, count = ndimage.label(probs >= at, EIGHT)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return areas, np.bincount(labels[truth > 0], minlength=count + 1)[1:]


def ours(mask):
    return regions.remove_small(mask, MIN_AREA)


def speckled(mask, count, rng):
    mask = mask.copy()
    for x, y, radius in zip(*rng.integers(0, 1024, (2, count)).tolist(), rng.integers(1, 8, count), strict=True):
        cv2.circle(mask, (x, y), int(radius), 1, -1)
    return mask


def main():
    path = label_table("siim-pneumothorax-train-rle.csv.gz")
    if path is None:
        sys.exit("skipped: torchxrayvision, which carries the label table, is not installed")
    cv2.setNumThreads(1)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    positive = table[table.iloc[:, 1].str.strip() != "-1"]
    images = list(positive.groupby(positive.columns[0], sort=True)[positive.columns[1]])[::112]
    truths = [rle.paint(rle.union([rle.parse(text) for text in texts]), order="C") for _, texts in images]
    print(f"{len(truths)} masks of 1024 x 1024, regions of fewer than {MIN_AREA} pixels removed, one thread")
    print(f"{'microseconds a mask':24}{'ours':>8}{'skimage':>10}{'scipy':>10}{'OpenCV':>10}{'alone':>10}   ratios")
    rng = np.random.default_rng(0)
    peers = [with_skimage, with_scipy, with_opencv]
    for specks in (0, 30, 300):
        masks = [speckled(truth, specks, rng) for truth in truths]
        for mask in masks:
            assert all((ours(mask) == peer(mask)).all() for peer in peers)
            labels, count = ndimage.label(mask, EIGHT)
            assert regions.label(mask)[1] == count and (regions.label(mask)[0] == labels).all()
        report(f"{specks} specks", timings([ours, *peers, labelled_by_opencv], masks))

    maps = [cv2.GaussianBlur(speckled(truth, 30, rng) * 255, (0, 0), 4) for truth in truths]
    print(f"\n{'areas and overlaps':24}{'ours':>8}{'scipy':>10}   ratio    (uint8 probability maps, no mask made)")
    for at in (regions.quantise(t) for t in (0.2, 0.5, 0.8)):
        pairs = list(zip(maps, truths, strict=True))
        for pair in pairs:
            np.testing.assert_array_equal(regions.region_overlaps(*pair, threshold=at), overlaps_with_scipy(*pair, at))
        functions = [
            lambda pair, at=at: regions.region_overlaps(*pair, threshold=at),
            lambda pair, at=at: overlaps_with_scipy(*pair, at),
        ]
        report(f"probability >= {at}/255", timings(functions, pairs))
    empty = [np.zeros((1024, 1024), np.uint8)]
    (alone,) = timings([lambda probs: regions.region_overlaps(probs, threshold=128)], empty, rounds=20)
    print(f"an empty map: {alone * 1e6:.0f}")


def report(name, times):
    columns = "".join(f"{t * 1e6:{width}.0f}" for t, width in zip(times, (8, 10, 10, 10, 10), strict=False))
    print(f"{name:24}{columns}   {' '.join(f'{t / times[0]:.1f}' for t in times[1:])}")


if __name__ == "__main__":
    main()
