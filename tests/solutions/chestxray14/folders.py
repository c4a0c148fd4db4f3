"""A small folder of the competition, as Kaggle gives it, and the job of a run on it."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from common.budget import Budget
from common.errors import InputError
from common.images import prepare_images
from common.job import Job
from common.options import Options
from common.runs import Run
from solutions.chestxray14.config import DEMO
from solutions.chestxray14.pipeline import SOLUTION

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h]"
SMALL = dataclasses.replace(
    DEMO, whole=dataclasses.replace(DEMO.whole, resize=32, size=32, weighting=False), store_size=32
)
# (image, labels); patients 1 to 4 train, 5 and 6 test
ROWS = [
    ("00000001_000", "Cardiomegaly|Effusion"),
    ("00000001_001", "No Finding"),
    ("00000002_000", "Hernia"),
    ("00000003_000", "No Finding"),
    ("00000004_000", "Cardiomegaly"),
    ("00000005_000", "Mass"),
    ("00000005_001", "No Finding"),
    ("00000006_000", "Infiltration|Hernia"),
]
TRAIN, TEST = [name for name, _ in ROWS[:5]], [name for name, _ in ROWS[5:]]


def line(name, labels="No Finding", age="58", sex="M", view="PA", follow_up=None, patient=None):
    follow_up = int(name[-3:]) if follow_up is None else follow_up
    patient = int(name[:8]) if patient is None else patient
    return f"{name}.png,{labels},{follow_up},{patient},{age},{sex},{view},2500,2048,0.168,0.168"


def write_table(path, lines, header=HEADER):
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def write_list(path, names):
    path.write_text("".join(f"{name}.png\n" for name in names))
    return path


def write_image(path, value=90, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, value, size[0]).astype(np.uint8)
    assert cv2.imwrite(str(path), np.tile(ramp, (size[1], 1)))


def prepare(job):
    return prepare_images(job, SOLUTION)


def refusal(work, *args):
    with pytest.raises(InputError) as caught:
        work(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """The competition as Kaggle gives it, in two of its twelve image folders."""
    root = tmp_path / "data"
    for number, (name, _) in enumerate(ROWS):
        write_image(root / f"images_{number // 5 + 1:03}" / "images" / f"{name}.png", 20 + 20 * number)
    write_table(root / "Data_Entry_2017.csv", [line(*row) for row in ROWS])
    write_list(root / "train_val_list.txt", TRAIN)
    write_list(root / "test_list.txt", TEST)
    boxes = ["00000006_000.png,Infiltrate,100.5,200,300,400", "00000005_000.png,Mass,0,0,1024,1024"]
    write_table(root / "BBox_List_2017.csv", boxes, BOX_HEADER)
    return root


@pytest.fixture
def job(tmp_path, folder):
    """`job(config, **options)`: what a verb gets; runs of one test share the store."""
    runs = []

    def make(config=SMALL, out="run", **options):
        while runs:
            runs.pop().close()
        runs.append(Run(tmp_path / out))
        options = Options(**{"data": folder, "out": tmp_path / out, "workers": 0} | options)
        device, recipe = torch.device("cpu"), SOLUTION
        return Job("chestxray14", "demo", config, options, runs[-1], device, Budget(None), recipe=recipe)

    yield make
    for run in runs:
        run.close()
