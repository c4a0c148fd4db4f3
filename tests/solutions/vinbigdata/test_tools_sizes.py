"""Sizes of the originals: read from tables of every kind, and boxes in original pixels on resized copies."""

import dataclasses
import logging

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from common.detection import boxes_by_row, predict_boxes
from common.errors import InputError
from common.images import prepare_images
from common.network import Network
from common.post.boxes import BOX
from solutions.vinbigdata.config import DEMO
from solutions.vinbigdata.data import SIZES, log_copies, read_sizes
from solutions.vinbigdata.pipeline import SOLUTION, detector_network
from solutions.vinbigdata.postprocess import prediction_strings


def table(path, text):
    path.write_text(text)
    return path


def sizes(*rows):
    return pd.DataFrame(rows, columns=SIZES)


# ---- tables of sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image_id,width,height\na,100,200\nb,60,30\n", ""),
        ("image_id,dim0,dim1\na,200,100\nb,30,60\n", "sizes.csv: dim0 is read as the height, dim1 as the width"),
        ("x,height,image_id,width\n1,30,b,60.0\n2,200,a,100\n3,30,b,60\n4,9,c,9\n", ""),  # a row for each box
        ("image_id,dim0,dim1,width,height\na,1,1,100,200\nb,1,1,60,30\n", ""),
    ],
)
def test_tables_of_every_kind(tmp_path, caplog, text, said):
    caplog.set_level(logging.INFO)
    found = read_sizes([table(tmp_path / "sizes.csv", text)], ["b", "a"])
    assert found.to_numpy().tolist() == [["b", 60, 30], ["a", 100, 200]]
    assert found.columns.tolist() == SIZES and found["width"].dtype == np.int64
    assert caplog.text.count("\n") == bool(said) and said in caplog.text


def test_several_tables_and_folders(tmp_path):
    one = table(tmp_path / "train.csv", "image_id,dim0,dim1\na,200,100\n")
    (tmp_path / "test").mkdir()
    cv2.imwrite(str(tmp_path / "test" / "b.png"), np.zeros((30, 60), np.uint8))
    assert read_sizes([one, tmp_path / "test"], ["a", "b"]).to_numpy().tolist() == [["a", 100, 200], ["b", 60, 30]]
    (tmp_path / "run").mkdir()
    sizes(("a", 100, 200), ("c", 5, 5)).to_parquet(tmp_path / "run" / "images.parquet")
    assert read_sizes([tmp_path / "run", one], ["c", "a"])["width"].tolist() == [5, 100]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image_id,w,h\na,1,1\n", "row 1: the header must have image_id,width,height or image_id,dim0,dim1: image_id"),
        ("image_id,width,height\n", "sizes.csv: no rows under its header"),
        ("image_id,width,height\na,1,0\n", r"sizes.csv, row 2 \(a\): width '1' and height '0' must be whole numbers"),
        ("image_id,width,height\na,1.5,2\n", "width '1.5' and height '2' must be whole"),
        ("image_id,width,height\nb,9,9\na,1,2\na,2,1\n", "sizes.csv: image a has different sizes, 1 × 2 and 2 × 1"),
        ("image_id,width,height\nb,9,9\n", "sizes.csv: no width and height, in pixels, of image a"),
    ],
)
def test_sizes_that_cannot_be(tmp_path, text, reason):
    with pytest.raises(InputError, match=reason):
        read_sizes([table(tmp_path / "sizes.csv", text)], ["a"])


def test_a_run_of_another_solution_has_no_sizes(tmp_path):
    pd.DataFrame({"image_id": ["a"]}).to_parquet(tmp_path / "images.parquet")
    with pytest.raises(InputError, match=r"images\.parquet has no sizes"):
        read_sizes([tmp_path], ["a"])


def test_copies_are_logged(caplog):
    caplog.set_level(logging.INFO)
    full = sizes(("a", 2000, 3000), ("b", 2001, 3000), ("c", 2000, 3000), ("d", 40, 30))
    log_copies(full, full)
    assert not caplog.text
    # a: 2 to 3 kept; b: 341.5 rounded to 342; c: stretched; d: no copy
    log_copies(sizes(("a", 200, 300), ("b", 342, 512), ("c", 512, 512), ("d", 40, 30)), full)
    assert caplog.messages == [
        "--sizes: 3 of 4 images differ in size from their originals, 1 of them in aspect ratio (assumed "
        "stretched, not cropped or padded); the first: a, 200 × 300 for 2000 × 3000"
    ]


# ---- boxes on copies -----------------------------------------------------------------------------------------------

SMALL = dataclasses.replace(
    DEMO,
    detector=dataclasses.replace(DEMO.detector, size=96),
    healthy=dataclasses.replace(DEMO.healthy, size=32),
    store_size=96,
)
# a and t: 192 wide, 384 high, as copies 96 × 96; b: 60 × 30 as 20 × 10. What a's box 40 80 120 240 covers is bright in
# the copy at 20 20 60 60, and what t's would cover at 10 40 20 90.
TRAIN = """image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max
a,Cardiomegaly,3,R1,40,80,120,240
b,No finding,14,R1,,,,
"""
ORIGINALS = "image_id,dim0,dim1\na,384,192\nb,30,60\nt,384,192\n"


class Bright(torch.nn.Module):
    """Finds the bright rectangle of an image."""

    def forward(self, images):
        found = []
        for image in images:
            y, x = torch.nonzero(image[0] > 128, as_tuple=True)
            box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
            found.append({"boxes": box[None], "scores": torch.ones(1), "labels": torch.tensor([3])})
        return found


@pytest.fixture
def make(tmp_path, make_job):
    """`make(**options)`: a job on a competition of copies."""
    data = tmp_path / "data"
    for name, height, width, rectangle in [
        ("train/a", 96, 96, np.s_[20:60, 20:60]),
        ("train/b", 10, 20, np.s_[:0]),
        ("test/t", 96, 96, np.s_[40:90, 10:20]),
    ]:
        pixels = np.zeros((height, width), np.uint8)
        pixels[rectangle] = 255
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(data / f"{name}.png"), pixels)
    table(data / "train.csv", TRAIN)
    table(data / "sample_submission.csv", "image_id,PredictionString\nt,14 1 0 0 1 1\n")

    return lambda out="run", **options: make_job(SMALL, data, out, **options)


def prepare(job):
    return prepare_images(job, SOLUTION)


def test_boxes_of_originals_on_copies_there_and_back(make, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    originals = table(tmp_path / "train_meta.csv", ORIGINALS)
    job = make(sizes=(originals,))
    images = prepare(job)
    assert "3 of 3 images differ in size from their originals, 2 of them in aspect ratio" in caplog.text
    assert images.table[SIZES].to_numpy().tolist() == [["a", 192, 384], ["b", 60, 30], ["t", 192, 384]]
    assert images.tables["boxes.parquet"][BOX].to_numpy().tolist() == [[40, 80, 120, 240]]
    boxes, labels = boxes_by_row(images)[0]
    assert boxes.tolist() == [[20, 20, 60, 60]] and labels.tolist() == [3]  # times 96 / 192 and 96 / 384
    assert (np.argwhere(images.store.images[0] > 128).min(axis=0) == 20).all()

    monkeypatch.setattr(Network, "load", lambda self, run: Bright())
    found = predict_boxes(job, detector_network(SMALL, 0, "flip"), np.array([0, 2]))
    strings = prediction_strings(found, ["a", "b", "t"], images.table)
    assert strings["PredictionString"].tolist() == ["3 1 40 80 120 240", "14 1 0 0 1 1", "3 1 20 160 40 360"]
    assert str(originals) in (tmp_path / "run" / "manifest.json").read_text()


def test_the_sizes_may_be_in_the_table_of_boxes(make, tmp_path):
    more = table(tmp_path / "t.csv", "image_id,dim0,dim1\nt,384,192\n")
    job = make(sizes=(tmp_path / "data" / "train.csv", more))
    sides = ["width,height", "192,384", "60,30"]
    rows = [f"{row},{more}" for row, more in zip(TRAIN.splitlines(), sides, strict=True)]
    table(job.options.data / "train.csv", "\n".join(rows))
    images = prepare(job)
    assert images.table[SIZES].to_numpy().tolist() == [["a", 192, 384], ["b", 60, 30], ["t", 192, 384]]
    assert boxes_by_row(images)[0][0].tolist() == [[20, 20, 60, 60]]


def test_without_the_sizes_the_boxes_do_not_fit(make):
    job = make()
    table(job.options.data / "train.csv", TRAIN.replace("40,80,120,240", "60,140,90,190"))
    with pytest.raises(InputError, match=r"row 2 \(a\): .* outside its image of 96 × 96 pixels; .* --sizes"):
        prepare(job)


def test_other_sizes_are_other_trainings_and_other_predictions(make, tmp_path):
    first = table(tmp_path / "first.csv", ORIGINALS)
    other = table(tmp_path / "other.csv", ORIGINALS.replace("t,384", "t,768"))
    third = table(tmp_path / "third.csv", ORIGINALS.replace("a,384", "a,768"))
    before, again, after = (prepare(make(sizes=(path,))) for path in (first, first, other))
    assert (again.key, again.pixels_key) == (before.key, before.pixels_key)
    assert after.key == before.key and after.pixels_key != before.pixels_key  # boxes on t were in other pixels
    assert prepare(make(sizes=(third,))).key != before.key
    with pytest.raises(InputError, match=r"short\.csv: no width and height, in pixels, of image t"):
        prepare(make(sizes=(table(tmp_path / "short.csv", ORIGINALS.replace("t,384,192\n", "")),)))
