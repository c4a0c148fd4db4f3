"""The embedded sample: phantom radiographs with labels for one of the tasks, as a user could have them."""

import os
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from common import phantom
from common.phantom import findings
from common.phantom.sample import write_rows, write_sample
from common.post.boxes import BOX
from common.post.rle import ABSOLUTE, encode

VERSION, SIDE = 1, 256
KINDS = {"effusion": findings.effusion, "mass": findings.mass, "pneumothorax": findings.pneumothorax}


def make_sample(folder, n_train=60, n_test=12, task="multilabel", seed=0):
    """Write the sample into `folder` and return it as a Path; a complete sample of the same parameters is kept.

    n_train, n_test: images, two per patient; task: as in config.TASKS. Holds images/<visit>/<patient>.png, the labels,
    sample_submission.csv and the hidden labels of the test images.
    """
    parameters = {"sample": "own", "version": VERSION, "n_train": n_train, "n_test": n_test, "seed": seed, "task": task}
    least = {"n_train": 8, "n_test": 1, "seed": 0}
    return write_sample(folder, parameters, least, lambda path: _write(path, n_train, n_test, task, seed))


def _write(folder, n_train, n_test, task, seed):
    cases, first = [], 1_000_000 * seed
    for number in range(n_train + n_test):
        names = [name for k, name in enumerate(KINDS) if (number // 2 + k) % 3 == 0 or number % 4 == k]
        cases.append((f"p{number // 2:04d}_{number % 2}", f"p{number // 2:04d}", names[: 1 + number % 2]))
    (folder / "images").mkdir(parents=True)

    def write(number):
        image_id, _, names = cases[number]
        labelled = number < n_train
        film = phantom.draw(first + number, SIDE, [KINDS[name] for name in names], first + number // 2)
        cv2.imwrite(str(folder / "images" / f"{image_id}.png"), film.image)
        masks = {"lungs": film.lungs.left | film.lungs.right, "heart": film.heart}
        for name, mask in masks.items() if task == "segmentation" and labelled else ():
            (folder / "masks" / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / "masks" / name / f"{image_id}.png"), mask * np.uint8(255))
        if task == "detection":
            return [[image_id, found.name, *found.box] for found in film.findings] or [[image_id, *[""] * 5]]
        return [encode(mask, ABSOLUTE) for mask in masks.values()]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn = list(pool.map(write, range(len(cases))))
    if task == "segmentation":
        truth = [[case[0], *texts] for case, texts in zip(cases, drawn, strict=True)][n_train:]
        write_rows(folder / "hidden" / "truth.csv", [["image_id", "lungs", "heart"], *truth])
        write_rows(folder / "sample_submission.csv", [["image_id"], *([case[0]] for case in cases[n_train:])])
        return
    if task == "detection":
        header = ["image_id", "class", *BOX]
        parts = [row for rows in drawn[:n_train] for row in rows], [row for rows in drawn[n_train:] for row in rows]
        write_rows(folder / "labels.csv", [header, *parts[0]])
        write_rows(folder / "hidden" / "truth.csv", [header, *parts[1]])
        write_rows(folder / "sample_submission.csv", [["image_id"], *([case[0]] for case in cases[n_train:])])
        return
    rows = [[image_id, patient, *(int(name in names) for name in KINDS)] for image_id, patient, names in cases]
    header, neutral = ["image_id", "patient_id", *KINDS], [[case[0], *[0.5] * len(KINDS)] for case in cases[n_train:]]
    write_rows(folder / "labels.csv", [header, *rows[:n_train]])
    write_rows(folder / "hidden" / "truth.csv", [header, *rows[n_train:]])
    write_rows(folder / "sample_submission.csv", [["image_id", *KINDS], *neutral])
