"""Small folders of images and labels, and what `read` makes of them."""

import json
from types import SimpleNamespace

import cv2
import numpy as np

from common import phantom
from common.options import Options
from common.phantom.findings import effusion, mass
from solutions.own.config import DEMO, replace
from solutions.own.data import read
from solutions.own.labels import find_labels, task_of


def write_images(folder, names, size=(8, 8), value=9):
    """Write grey images and return `folder`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), np.full(size, value, np.uint8))
    return folder


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_coco(path, images, annotations, classes=("nodule", "mass"), size=(8, 8)):
    """Write a COCO file of images (name, …) and annotations (image number, class number, further fields)."""
    images = [{"id": 10 + k, "file_name": name, "width": size[1], "height": size[0]} for k, name in enumerate(images)]
    found = [{"id": k, "image_id": 10 + i, "category_id": 5 + c} | more for k, (i, c, more) in enumerate(annotations)]
    categories = [{"id": 5 + k, "name": name} for k, name in enumerate(classes)]
    path.write_text(json.dumps({"images": images, "annotations": found, "categories": categories}))
    return path


def read_folder(folder, test=None, on_unlabelled="error", id_map=None, **settings):
    """Return the Listing of a folder with these settings."""
    config = replace(DEMO, **settings)
    options = Options(data=folder, test=test, on_unlabelled=on_unlabelled, id_map=id_map)
    if config.task == "auto":
        config = replace(config, task=task_of(find_labels(folder, config.labels)))
    return read(SimpleNamespace(config=config, options=options))


def boxed_sample(folder, n_train=8, n_test=2):
    """Write phantoms with boxes.csv-like labels, every other one without a finding, and return `folder`."""
    rows, films = ["image_id,class,x_min,y_min,x_max,y_max"], range(n_train + n_test)
    (folder / "images").mkdir(parents=True)
    for number in films:
        film = phantom.draw(number, 128, [(effusion, mass)[number // 2 % 2]] * (number % 2))
        cv2.imwrite(str(folder / "images" / f"i{number}.png"), film.image)
        rows += [f"i{number},{each.name},{','.join(map(str, each.box))}" for each in film.findings] or [
            f"i{number},,,,,"
        ]
    write_lines(folder / "sample_submission.csv", "image_id", *(f"i{number}" for number in films[n_train:]))
    write_lines(folder / "labels.csv", *(row for row in rows if row.split(",")[0] not in ("i8", "i9")))
    return folder


def masked_sample(folder, n_train=8, n_test=2):
    """Write phantoms with masks of heart and lungs, and return `folder`."""
    for number in range(n_train + n_test):
        film = phantom.draw(number, 256)
        masks = {"heart": film.heart, "lungs": film.lungs.left | film.lungs.right} if number < n_train else {}
        parts = {f"masks/{name}": mask * np.uint8(255) for name, mask in masks.items()}
        for name, pixels in ({"images": film.image} | parts).items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name / f"i{number}.png"), pixels)
    write_lines(
        folder / "sample_submission.csv", "image_id", *(f"i{number}" for number in range(n_train, n_train + n_test))
    )
    return folder
