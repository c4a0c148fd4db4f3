"""The embedded sample: phantom radiographs with multilabel annotations such as a user might have."""

import cv2

from common import phantom
from common.phantom import findings
from common.phantom.sample import in_threads, write_rows, write_sample

VERSION, SIDE = 1, 256
KINDS = {"effusion": findings.effusion, "mass": findings.mass, "pneumothorax": findings.pneumothorax}


def make_sample(folder, n_train=60, n_test=12, seed=0):
    """Write the sample into `folder` and return it as a Path; a complete sample with the same parameters is reused.

    It has images/<patient>_<visit>.png, labels.csv, sample_submission.csv and the test labels, hidden/truth.csv.
    """
    least = {"n_train": 8, "n_test": 1, "seed": 0}
    return write_sample(folder, "own", VERSION, _write, least, n_train=n_train, n_test=n_test, seed=seed)


def _write(folder, n_train, n_test, seed):
    cases, first = [], 1_000_000 * seed
    for number in range(n_train + n_test):
        names = [name for k, name in enumerate(KINDS) if (number // 2 + k) % 3 == 0 or number % 4 == k]
        cases.append((f"p{number // 2:04d}_{number % 2}", f"p{number // 2:04d}", names[: 1 + number % 2]))
    (folder / "images").mkdir(parents=True)

    def write(number):
        image_id, _, names = cases[number]
        film = phantom.draw(first + number, SIDE, [KINDS[name] for name in names], first + number // 2)
        cv2.imwrite(str(folder / "images" / f"{image_id}.png"), film.image)

    in_threads(write, range(len(cases)))
    rows = [[image_id, patient, *(int(name in names) for name in KINDS)] for image_id, patient, names in cases]
    header, neutral = ["image_id", "patient_id", *KINDS], [[case[0], *[0.5] * len(KINDS)] for case in cases[n_train:]]
    write_rows(folder / "labels.csv", [header, *rows[:n_train]])
    write_rows(folder / "hidden" / "truth.csv", [header, *rows[n_train:]])
    write_rows(folder / "sample_submission.csv", [["image_id", *KINDS], *neutral])
