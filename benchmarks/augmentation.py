"""SIIM's podium augmentation with the elastic transform of common.data.augment, against albumentations' own.

Run: OMP_NUM_THREADS=1 python -m benchmarks.augmentation (real SIIM images under CXR_REAL_DATA if there are any).
"""

import time

import albumentations as A
import cv2
import numpy as np

from benchmarks.tables import real_data
from common.data import augment
from common.data.dicom import read_image
from common.data.store import to_square

SIDE, IMAGES, ROUNDS = 512, 400, 3


def podium(kind):
    """Return the whole pipeline with `kind` as its elastic transform."""
    augment.Elastic = kind
    return augment.podium_siim(SIDE)


def alone(kind):
    """Return the transform alone, as the pipeline has it."""
    return augment.compose([kind(alpha=120.0, sigma=6.0, noise_distribution="uniform", p=1.0)])


def rate(pipeline, images, mask):
    """Return the images that a pipeline augments in a CPU second."""
    pipeline.set_random_seed(0)
    began = time.process_time()
    for number in range(IMAGES):
        pipeline(image=images[number % len(images)], mask=mask)
    return IMAGES / (time.process_time() - began)


def main():
    cv2.setNumThreads(1)
    root, rng = real_data("siim_pneumothorax"), np.random.default_rng(0)
    files = sorted(root.glob("dicom-*/*/*/*.dcm"))[:40] if root else []
    images = [to_square(read_image(file), SIDE) for file in files]
    images = images or [rng.integers(0, 256, (SIDE, SIDE), np.uint8)]
    kinds, mask = (augment.Elastic, A.ElasticTransform), np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(mask, (200, 200), 60, 1, thickness=-1)
    for name, make in (("podium", podium), ("the transform alone", alone)):
        best = [max(rate(make(kind), images, mask) for _ in range(ROUNDS)) for kind in kinds]
        print("{}: {:.0f} images a CPU second, albumentations {:.0f}: {:.2f}x".format(name, *best, best[0] / best[1]))


if __name__ == "__main__":
    main()
