"""The embedded sample: phantom radiographs laid out as Kaggle unpacks ChestX-ray14 (nih-chest-xrays/data).

Like the real set: PNG files in several folders, some with four channels; follow-up images that share their patient's
anatomy; larger chests on AP films; rows that end in extra commas; boxes for eight classes of the test images. Unlike
it: images are half as wide; labels are equally frequent, conspicuous and correct; every finding of the eight classes
has a box; and 40 % of the images are healthy instead of 54 %.
"""

from functools import partial
from typing import NamedTuple

import cv2
import numpy as np

from common import phantom
from common.phantom import findings as draws
from common.phantom.sample import NIH_HEADER, crop, draw_findings, draw_visits, in_threads, write_rows, write_sample
from solutions.chestxray14.config import BOX_SIDE, LABELS, NO_FINDING

VERSION = 1  # raise it whenever the files for a seed change
SIDE = 512  # pixels; NIH's images have BOX_SIDE
HEALTHY = 0.4
COLOURED = 40  # one image in so many has four channels; in NIH's set, 519 images do
CLOSER = 1.07  # how much larger the chest is on an AP film
AP = 0.4  # share of AP films, as in NIH's set
# Ways to draw each label. Findings that move a border of the lungs come before those inside the lungs.
FINDINGS = {
    "Emphysema": (draws.emphysema,),
    "Cardiomegaly": (draws.cardiomegaly,),
    "Hernia": (draws.hernia,),
    "Pneumothorax": (partial(draws.pneumothorax, share=0.15), partial(draws.pneumothorax, share=0.25)),
    "Effusion": (draws.effusion,),
    "Pleural_Thickening": (partial(draws.pleural_thickening, radius=(0.2, 0.26), depth=(0.05, 0.06)),),
    "Edema": (draws.edema,),
    "Pneumonia": (draws.pneumonia,),
    "Atelectasis": (partial(draws.atelectasis, density=(0.22, 0.28)),),
    "Consolidation": (partial(draws.consolidation, density=0.26),),
    "Infiltration": (partial(draws.infiltration, density=0.24, radius=(0.1, 0.14)),),
    "Mass": (partial(draws.mass, radius=(0.05, 0.08), density=(0.2, 0.28)),),
    "Fibrosis": (partial(draws.fibrosis, radius=(0.08, 0.11)),),
    "Nodule": (partial(draws.nodule, radius=(0.025, 0.038), density=(0.22, 0.3)),),
}
BOXED = LABELS[:8]  # in BBox_List_2017.csv, where Infiltration is called Infiltrate
FILMS = {  # sides of the detectors' images and their pixel spacing in mm
    "AP": ((2500, 2048, "0.168"), (3056, 2544, "0.139"), (2048, 2500, "0.168")),
    "PA": ((2992, 2991, "0.143"), (2500, 2048, "0.168"), (2021, 2021, "0.194311")),
}
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"


def make_sample(folder, n_train=96, n_test=32, seed=0):
    """Write the sample into `folder` and return it as a Path; a complete sample of the same parameters is kept.

    Holds images_001/images/<patient>_<follow-up>.png (512 × 512), images_002 and Kaggle's tables and lists.
    """
    return write_sample(folder, "chestxray14", VERSION, _write, n_train=n_train, n_test=n_test, seed=seed)


def _write(folder, n_train, n_test, seed):
    cases = _plan(n_train, n_test, seed)
    folders = [folder / f"images_{part:03d}" / "images" for part in (1, 2)]
    for images in folders:
        images.mkdir(parents=True)
    places = [folders[2 * i >= len(cases)] for i in range(len(cases))]
    found = in_threads(_write_image, places, cases)
    write_rows(folder / "Data_Entry_2017.csv", [_row(seed, case) for case in cases], NIH_HEADER, "\n")
    tests = [pair for pair in zip(cases, found, strict=True) if pair[0].split == "test"]
    boxes = [_box(case, label, boxes[label]) for label in BOXED for case, boxes in tests if label in boxes]
    write_rows(folder / "BBox_List_2017.csv", boxes, BOX_HEADER, "\n")
    for split, name in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        write_rows(folder / name, [[case.file_name] for case in cases if case.split == split], end="\n")


class _Case(NamedTuple):
    split: str
    number: int  # seed of the phantom
    person: int  # seed of the anatomy
    patient: int
    visit: int  # counts the patient's images
    labels: tuple  # in drawing order
    view: str

    @property
    def file_name(self):
        return f"{self.patient:08d}_{self.visit:03d}.png"


def _plan(n_train, n_test, seed):
    """Return one _Case per image, in the order of patients: patient, visit, list, labels and view."""
    rng, first = np.random.default_rng([seed, 1]), 1_000_000 * seed
    people, counts, names = [], {"train": n_train, "test": n_test}, list(FINDINGS)
    for split, count in counts.items():
        firsts = np.flatnonzero(np.array(draw_visits(rng, count)) == 0)
        people += [(split, images) for images in np.split(np.arange(count), firsts[1:])]
    labels = {split: draw_findings(rng, count, names, round(HEALTHY * count), 1, 4) for split, count in counts.items()}
    cases = []
    for patient, k in enumerate(rng.permutation(len(people)), 1):
        split, images = people[k]
        for visit, i in enumerate(images):
            view = "AP" if rng.random() < AP else "PA"
            cases.append(_Case(split, first + len(cases), first + patient, patient, visit, labels[split][i], view))
    return cases


def _write_image(folder, case):
    """Draw and write one image; return the boxes (x, y, width, height) of its labels, in its pixels."""
    rng = np.random.default_rng([case.number, 1])
    ways = [FINDINGS[label] for label in case.labels]
    findings = [way[rng.integers(len(way))] for way in ways]
    film = phantom.draw(case.number, SIDE if case.view == "PA" else round(CLOSER * SIDE), findings, case.person)
    window = _window(film.lungs.left | film.lungs.right)
    image = np.ascontiguousarray(film.image[window])
    if case.number % COLOURED == COLOURED - 1:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGRA)
    _, png = cv2.imencode(".png", image)
    (folder / case.file_name).write_bytes(png.tobytes())
    masks = (np.uint8(finding.mask[window]) for finding in film.findings)
    return {label: cv2.boundingRect(mask) for label, mask in zip(case.labels, masks, strict=True)}


def _window(lungs):
    """Return the slices that crop a film to SIDE pixels around the middle of the lungs."""
    x, y, width, height = cv2.boundingRect(np.uint8(lungs))
    return crop((y + (height - SIDE) // 2, x + (width - SIDE) // 2), (SIDE, SIDE), len(lungs))


def _row(seed, case):
    """Return a row of the label table; sex and age belong to the patient."""
    person, film = np.random.default_rng([seed, 2, case.patient]), np.random.default_rng([case.number, 2])
    sex, age = "FM"[person.integers(2)], person.integers(18, 85) + case.visit
    width, height, spacing = FILMS[case.view][film.integers(len(FILMS[case.view]))]
    labels = "|".join(sorted(case.labels)) or NO_FINDING
    who = case.file_name, labels, case.visit, case.patient, age, sex, case.view
    return *who, width, height, spacing, spacing, ""


def _box(case, label, box):
    """Return a row of the box table, in pixels of NIH's images."""
    name = "Infiltrate" if label == "Infiltration" else label
    return case.file_name, name, *(edge * BOX_SIDE / SIDE for edge in box)
