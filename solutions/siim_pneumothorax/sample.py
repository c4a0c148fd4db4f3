"""The embedded sample: phantom radiographs in the file layout of the SIIM-ACR Pneumothorax competition.

Like the real data: 1024×1024 8-bit DICOM, several images per patient (only nih_id.csv names patients), ages without a
unit, a space in train-rle.csv's header and before its values, one row per component, rows of a second reader. Unlike
them: 50 % positive images, not 22 %, with large, dark pneumothoraces, so that small networks learn from few images.
"""

import uuid
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np

from common import phantom
from common.phantom.findings import pneumothorax
from common.phantom.sample import draw_visits, in_threads, make_uuid, nih_dicom, write_dicom, write_rows, write_sample
from common.post import rle

VERSION = 2  # raise it whenever the files for a seed change
POSITIVE = 0.5
SHARES = (0.20, 0.45)  # share of its lung that a pneumothorax fills, drawn log-uniformly
DARKNESS = (0.14, 0.18)
BILATERAL, SECOND_READER = 0.1, 0.15  # shares of the positives
RAW = 12  # every 12th image is stored uncompressed
SIZE = 1024


def make_sample(folder, n_train=96, n_test=16, seed=0):
    """Write the sample into `folder` and return it as a Path; a complete sample with the same parameters is reused.

    Besides the competition's files, it has nih_id.csv (training images only) and hidden/truth.csv, the test masks.
    """
    return write_sample(folder, "siim_pneumothorax", VERSION, _write, n_train=n_train, n_test=n_test, seed=seed)


def _write(folder, n_train, n_test, seed):
    cases = _plan("train", n_train, seed) + _plan("test", n_test, seed)
    written = in_threads(partial(_write_image, folder, seed), cases)
    train, test = written[:n_train], written[n_train:]
    for name, images in (("train-rle.csv", train), ("hidden/truth.csv", test)):
        rows = [(image_id, f" {run}") for image_id, runs, _ in images for run in runs]
        write_rows(folder / name, [("ImageId", " EncodedPixels"), *rows])
    empty = [(image_id, "-1") for image_id, _, _ in test]
    write_rows(folder / "sample_submission.csv", [("ImageId", "EncodedPixels"), *empty])
    names = [(image_id, *nih) for image_id, _, nih in train]
    write_rows(folder / "nih_id.csv", [("Kaggle_ID", "NIH_ID", "patient_id"), *names])


class _Case(NamedTuple):
    split: str
    number: int
    patient: int
    visit: int  # index among the patient's images
    air: tuple  # (side, share of the lung) of each pneumothorax
    second_reader: bool


def _plan(split, count, seed):
    """Return the cases of a split: patients with their visits, and an exact share of positives in random order."""
    rng = np.random.default_rng([seed, split == "train"])
    visits = draw_visits(rng, count)
    first, last = (1, 20000) if split == "train" else (20000, 30806)  # no patient is in both splits
    people = iter(np.sort(rng.choice(np.arange(first, last), count, replace=False)).tolist())
    patients = []
    for visit in visits:
        patients.append(patients[-1] if visit else next(people))
    positive = rng.permutation(count)[: max(round(POSITIVE * count), 1)]
    both, again = (set(positive[: round(share * len(positive))].tolist()) for share in (BILATERAL, SECOND_READER))
    air = {}
    for i in positive.tolist():
        sides = ("left", "right") if i in both else (str(rng.choice(("left", "right"))),)
        air[i] = tuple((side, float(np.exp(rng.uniform(*np.log(SHARES))))) for side in sides)
    return [_Case(split, i, patients[i], visits[i], air.get(i, ()), i in again) for i in range(count)]


def _write_image(folder, seed, case):
    """Draw and write one image; return its id, its run-length strings and (NIH name, patient)."""
    number = 1_000_000 * seed + 500_000 * (case.split == "test") + case.number
    findings = [partial(pneumothorax, side=side, share=share, darkness=DARKNESS) for side, share in case.air]
    film = phantom.draw(number, SIZE, findings, patient=100_000 * seed + case.patient)
    levels = ("study", "series", "image")
    study, series, image_id = (f"2.25.{make_uuid('siim_pneumothorax sample', number, level).int}" for level in levels)
    raw, view = case.number % RAW == RAW - 1, "AP" if case.number % 3 == 0 else "PA"
    person = np.random.default_rng([seed, 2, case.patient])
    dataset = nih_dicom(film.image, study, series, image_id, str(uuid.UUID(int=int(image_id[5:]))), view, person, raw)
    write_dicom(folder / f"dicom-images-{case.split}" / study / series / f"{image_id}.dcm", dataset)
    masks = [part for finding in film.findings for part in _components(finding.mask)]
    if case.second_reader:
        brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
        masks += [cv2.dilate(np.roll(mask, 5, axis=0), brush) for mask in masks]
    runs = [rle.encode(mask) for mask in masks] or ["-1"]
    return image_id, runs, (f"{case.patient:08d}_{case.visit:03d}.png", case.patient)


def _components(mask):
    """Return the 8-connected components of a bool mask, uint8 each."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8))
    return [np.uint8(labels == k) for k in range(1, count)]
