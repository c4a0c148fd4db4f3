from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from common.images import Images
from common.job import Job
from solutions.chestxray14 import comparison, report
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.data import BOX_TABLE, LUNG_TABLE

N = len(LABELS)
BOXES = pd.DataFrame({"row": [1, 2, 2], "label": [0, 0, 3], "x_min": 100, "y_min": 300, "x_max": 500, "y_max": 700})


@pytest.fixture
def images():
    """Four images of 64 × 64, two of them the test's."""
    truth = np.zeros((4, N), np.int8)
    truth[[0, 1, 2, 2], [0, 0, 0, 3]] = 1
    table = pd.DataFrame(truth, columns=LABELS).assign(
        row=range(4),
        image_id=list("abcd"),
        patient_id=list("abcd"),
        width=128,
        height=256,
        split=["train", "train", "test", "test"],
        fold=[0, 1, -1, -1],
    )
    store = SimpleNamespace(images=np.full((4, 64, 64), 90, np.uint8))
    return Images(table, store, "", "", {"structures": ["lungs", "heart"]}, {BOX_TABLE: BOXES})


@pytest.fixture
def job(images, tmp_path):
    for name, ids in (("oof", ["a", "b"]), ("test", ["c", "d"])):
        probs = np.linspace(0.1, 0.8, 2 * N).reshape(2, N)
        table = pd.DataFrame(probs, columns=LABELS)
        table.insert(0, "image_id", ids)
        table.to_parquet(tmp_path / f"{name}.parquet")
    step = {"key": "first"}
    run = SimpleNamespace(path=lambda name: tmp_path / name, step=lambda name: step)
    job = Job("chestxray14", "demo", SimpleNamespace(views="whole"), None, run, "cuda", None)
    job.images = images
    return job


@pytest.fixture
def drawn(monkeypatch):
    """What galleries are asked to draw, in order: (items, title)."""
    seen = []
    monkeypatch.setattr(report, "gallery", lambda items, title, overlay: seen.append((items, title)) or title)
    return seen


def test_pictures_are_of_the_most_confident_predictions(job, drawn):
    table = comparison.results(job, "test")[""]
    assert table["image_id"].tolist() == ["c", "d"]
    report.confident_galleries(job.images, table)
    (right, _), (wrong, _) = drawn
    assert [item[3].split(" · ")[1] for item in right] == ["c", "c"]  # Atelectasis and Infiltration
    assert len(wrong) == N and all(item[3].endswith("d") for item in wrong)  # the second row ranks higher
    ((box, name),) = right[0][1]
    assert (box == np.array([100, 300, 500, 700]) / 16).all() and name == LABELS[0] and wrong[0][1] == []
    job.images = Images(job.images.table.assign(**dict.fromkeys(LABELS, -1)), None, "", "")
    assert len(comparison.results(job, "test")[""]) == 0


def test_lungs_boxes_are_shown_by_their_rules(images, drawn, tmp_path):
    assert report._lungs(images) is None
    images.tables[LUNG_TABLE] = pd.DataFrame(
        {
            "row": range(4),
            "x_min": 32,
            "y_min": 64,
            "x_max": 96,
            "y_max": 192,
            "rule": ["two", "two", "mirrored", "none"],
            "area": 0.3,
        }
    )
    images.arrays |= {name: tmp_path / f"{name}.npy" for name in ("crops", "masks")}
    np.save(images.arrays["crops"], np.arange(4, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2))
    np.save(images.arrays["masks"], np.full((4, 16, 16), 255, np.uint8))
    assert "lungs and heart" in report._lungs(images).body
    (masks, _), (boxes, _) = drawn
    assert len(masks) == 4 and masks[0][2].shape == (64, 64) and masks[0][2].all()
    assert [item[3] for item in boxes[::2]] == ["a: two", "c: mirrored", "d: none"]
    assert [item[0].max() for item in boxes[1::2]] == [0, 2, 3]  # the crop of the same image
    assert boxes[0][2][0][0].tolist() == [16, 16, 48, 48]  # 128 × 256 px stretched to 64 × 64
