"""The embedded sample: phantom radiographs in the file layout of the VinBigData competition.

Like the real data: DICOM of 10 to 16 bits, JPEG 2000 or raw, some MONOCHROME1, none square; three or four classes in an
abnormal image; three radiologists per image, nearly always R8, R9 and R10 for abnormal images, who differ in a box's
position, size and class and miss findings, but agree on whether there are any. Unlike them: half of the images are
healthy instead of 71 %; only six classes occur, equally often, at most once per image, as large and dense findings; and
the images are a fifth as wide, so that a few dozen are enough for training.
"""

import threading
import uuid
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
from pydicom.uid import JPEG2000Lossless

from common import phantom
from common.errors import check
from common.phantom import findings as draws
from common.phantom.sample import crop, draw_findings, in_threads, make_dicom, write_dicom, write_rows, write_sample
from solutions.vinbigdata.config import CLASSES, NO_FINDING, NOTHING, SAMPLE

VERSION = 2  # raise it whenever the files for a seed change
HEADER = ("image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max")
# How a class is drawn; findings that move a border of the lungs come before those inside the lungs.
FINDINGS = {
    "Cardiomegaly": draws.cardiomegaly,
    "Aortic enlargement": draws.aortic_enlargement,
    "Pneumothorax": partial(draws.pneumothorax, share=0.25),
    "Pleural effusion": draws.effusion,
    "Consolidation": partial(draws.consolidation, density=0.3, radius=(0.11, 0.15)),
    "Nodule/Mass": partial(draws.mass, density=(0.34, 0.4), radius=(0.07, 0.1)),
}
MISTAKEN = {"Consolidation": "Nodule/Mass", "Nodule/Mass": "Consolidation", "Pleural effusion": "Consolidation"}
MISTAKES, MISSES, JITTER = 0.08, 0.12, 0.05  # shares of findings; std of an edge as a share of the box's side
KEEN, KEEN_SHARE = (8, 9, 10), 0.94  # three raters, and the share of abnormal images that they read
BITS = (10, 12, 14, 16)
RAW, INVERTED = 3, 5  # every third image is not compressed, every fifth is MONOCHROME1
LEAST, MOST = 480, 640  # side of a film before cropping, in pixels

_one_encoder = threading.Lock()  # pylibjpeg-openjpeg 2.6's encoder crashes with two threads at a time


def make_sample(folder, n_train=64, n_test=12, seed=0, healthy=50):
    """Write the sample into `folder` and return it as a Path; a complete sample with the same parameters is reused.

    healthy: percentage of images without a finding, 0 to 90. Besides the competition's files, it has hidden/truth.csv:
    the test images' true boxes in the format of train.csv. Raises InputError as `write_sample` does.
    """
    check(healthy in range(91), f"sample: healthy={healthy!r} must be a whole percentage from 0 to 90")
    parameters = {"n_train": n_train, "n_test": n_test, "seed": seed, "healthy": healthy}
    least = {"n_train": 4, "n_test": 1, "seed": 0, "healthy": 0}
    return write_sample(folder, "vinbigdata", VERSION, _write, least, **parameters)


def _write(folder, n_train, n_test, seed, healthy):
    cases = [*_plan("train", n_train, seed, healthy), *_plan("test", n_test, seed, healthy)]
    pairs = list(zip(cases, in_threads(partial(_write_image, folder), cases), strict=True))
    read = [row for case, image in pairs[:n_train] for row in _readings(case, *image)]
    order = np.random.default_rng([seed, 3]).permutation(len(read))
    write_rows(folder / "train.csv", [HEADER, *(read[i] for i in order)])
    truth = [row for case, (_, boxes) in pairs[n_train:] for row in _rows(case, 0, boxes)]
    write_rows(folder / "hidden" / "truth.csv", [HEADER, *truth])
    rows = [(image_id, NOTHING) for image_id in sorted(case.image_id for case in cases[n_train:])]
    write_rows(folder / "sample_submission.csv", [SAMPLE, *rows])


class _Case(NamedTuple):
    split: str
    number: int  # seed of the phantom
    classes: tuple  # names, in the order in which they are drawn

    @property
    def image_id(self):
        return uuid.uuid5(uuid.NAMESPACE_OID, f"vinbigdata sample {self.number}").hex


def _plan(split, count, seed, healthy):
    """Return the cases of a split: exact shares in random order, all classes equally often."""
    rng, first = np.random.default_rng([seed, split == "train"]), 1_000_000 * seed + 500_000 * (split == "test")
    found = draw_findings(rng, count, list(FINDINGS), round(healthy * count / 100), 3, 4)
    return [_Case(split, first + i, names) for i, names in enumerate(found)]


def _write_image(folder, case):
    """Draw and write one image; return its (width, height) and true boxes, [(class, box)]."""
    rng = np.random.default_rng([case.number, 1])
    film = phantom.draw(case.number, int(rng.integers(LEAST, MOST)), [FINDINGS[name] for name in case.classes])
    rows, columns = _window(np.any([*film.lungs, *(finding.mask for finding in film.findings)], axis=0), rng)
    image = film.image[rows, columns]
    write_dicom(folder / case.split / f"{case.image_id}.dicom", _dataset(image, case, rng))
    corner = np.tile([columns.start, rows.start], 2)
    boxes = [(name, finding.box - corner) for name, finding in zip(case.classes, film.findings, strict=True)]
    return image.shape[::-1], boxes


def _window(kept, rng):
    """Return the slices of a window on the film, portrait or landscape, that contains the whole mask `kept`."""
    size, shares = len(kept), rng.permutation([rng.uniform(0.75, 0.9), 1])
    margin = np.ones((size // 20, size // 20), np.uint8)
    x, y, wide, high = cv2.boundingRect(cv2.dilate(np.uint8(kept), margin))
    sides = [max(side, int(share * size)) for side, share in zip((high, wide), shares, strict=True)]
    return crop((y + high // 2 - sides[0] // 2, x + wide // 2 - sides[1] // 2), sides, size)


def _dataset(image, case, rng):
    """Return the DICOM of one image, with grey levels spread over more bits, like those of a detector."""
    bits = BITS[case.number % len(BITS)]
    levels = (image + rng.uniform(-0.5, 0.5, image.shape)) * ((2**bits - 1) / 255)
    levels = np.clip(np.rint(levels), 0, 2**bits - 1).astype("<u2")
    inverted, sex, age = case.number % INVERTED == INVERTED - 1, "FM"[rng.integers(2)], f"{rng.integers(18, 90):03d}Y"
    levels = np.uint16(2**bits - 1) - levels if inverted else levels
    dataset = make_dicom(levels, f"2.25.{int(case.image_id, 16)}", sex, age, bits)
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    if case.number % RAW != RAW - 1:
        with _one_encoder:
            dataset.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    return dataset


def _readings(case, sides, boxes):
    """Return the rows of an image's three radiologists, with the findings that each of them sees."""
    rng = np.random.default_rng([case.number, 2])
    keen = case.classes and rng.random() < KEEN_SHARE
    rows = []
    for reader in KEEN if keen else np.sort(rng.choice(np.arange(1, 18), 3, replace=False)).tolist():
        seen = rng.random(len(boxes)) >= MISSES
        if boxes and not seen.any():  # in the real set every rater of an abnormal image finds something
            seen[rng.integers(len(boxes))] = True
        rows += _rows(case, reader, [_reading(*boxes[i], sides, rng) for i in np.flatnonzero(seen)])
    return rows


def _reading(name, box, sides, rng):
    """Return one radiologist's class and box for a finding."""
    name = MISTAKEN.get(name, name) if rng.random() < MISTAKES else name
    off = np.clip(rng.normal(0, JITTER, 4), -0.2, 0.2) * np.tile(box[2:] - box[:2], 2)
    return name, np.clip(np.rint(box + off), 0, np.tile(sides, 2))


def _rows(case, reader, boxes):
    """Return the rows of train.csv by one radiologist."""
    found = [(name, *(f"{edge:.1f}" for edge in box)) for name, box in boxes] or [(CLASSES[NO_FINDING], *[""] * 4)]
    return [(case.image_id, name, CLASSES.index(name), f"R{reader}", *edges) for name, *edges in found]
