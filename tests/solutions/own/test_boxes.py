"""Boxes of a CSV or a COCO file, their checks and scores; and a run on them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from pycocotools.coco import COCO

from common.errors import InputError
from common.metrics.detection import evaluate
from common.paths import read_json
from common.post.boxes import BOX
from common.submit.table import read_table
from solutions.own import boxes
from solutions.own.config import DEMO
from tests.solutions.contract import NET
from tests.solutions.own.folders import boxed_sample, read_folder, write_coco, write_images, write_lines

HEADER = "image_id,class,x_min,y_min,x_max,y_max"
TINY = f"""--store-size 96 --detector.backbone {NET} --detector.weights none --detector.size 96 --detector.channels 64
    --detector.epochs 1 --detector.batch-size 4 --detector.precision fp32 --workers 0""".split()


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "data", ["a.png", "b.png", "c.png"], (20, 40))


def stored(folder, **settings):
    """Return boxes.parquet of a folder of images of 40 × 20 pixels."""
    listing = read_folder(folder, **settings)
    table = listing.table.assign(row=range(len(listing.table)), width=40, height=20, ok=True)
    job = SimpleNamespace(config=replace(DEMO, **settings))
    return boxes.refine(job, replace(listing, table=table), None)


def test_boxes_in_pixels_in_shares_and_of_coco_are_the_same(folder):
    write_lines(folder / "labels.csv", HEADER, "a,mass,4,5,8,10", "a,mass,0,0,40,20", "b,nodule,10,0,20,10", "c,,,,,")
    listing = stored(folder, on_rare="keep")
    table = listing.tables["boxes.parquet"]
    assert table[["image_id", "class_id", *BOX]].to_numpy().tolist() == [
        *(["a", 0, 0, 0, 40, 20], ["a", 0, 4, 5, 8, 10], ["b", 1, 10, 0, 20, 10])
    ]
    assert listing.strata.tolist() == [[1, 0], [0, 1], [0, 0]]  # c is an image without a box
    write_lines(
        folder / "labels.csv", HEADER, "a,mass,.1,.25,.2,.5", "a,mass,0,0,1,1", "b,nodule,.25,0,.5,.5", "c,,,,,"
    )
    again = stored(folder, boxes="fraction", on_rare="keep").tables["boxes.parquet"]
    np.testing.assert_allclose(again[BOX], table[BOX])
    (folder / "labels.csv").unlink()
    found = [(0, 1, [4, 5, 4, 5]), (0, 1, [0, 0, 40, 20]), (1, 0, [10, 0, 10, 10])]
    found = [(image, k, {"bbox": box}) for image, k, box in found]
    write_coco(folder / "labels.json", ["a.png", "b.png", "c.png"], found, size=(20, 40))
    coco = stored(folder, on_rare="keep")
    assert coco.about["classes"] == ["nodule", "mass"]
    np.testing.assert_allclose(coco.tables["boxes.parquet"][BOX], table[BOX])
    write_coco(folder / "labels.json", ["a.png", "b.png", "c.png"], found, size=(40, 80))  # the files were halved
    halved = stored(folder, on_rare="keep")
    np.testing.assert_allclose(halved.tables["boxes.parquet"][BOX], table[BOX] / 2)
    write_coco(folder / "labels.json", ["a.png", "b.png", "c.png"], found, size=(40, 40))
    with pytest.raises(InputError, match="annotation 0: a box in an image of 40 × 40 pixels, but its file has 40 × 20"):
        stored(folder, on_rare="keep")


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ("a,mass,4,5,48,10", {}, r"row 2: the box .* lies outside its image of 40 × 20 pixels .--boxes pixels"),
        ("a,mass,-3,5,8,10", {}, "lies outside its image"),
        ("a,mass,8,5,4,10", {}, "row 2: the box .* has no area"),
        ("a,mass,.1,.2,.5,.5", {}, r"labels.csv: all boxes lie in \[0, 1\]; --boxes fraction"),
        ("a,mass,4,5,8,10", {"boxes": "fraction"}, r"lies outside .*--boxes fraction"),
        ("a,mass,4,5,,10", {}, "row 2: a box needs four numbers"),
        ("a,mass,4,5,x,10", {}, "row 2: a box needs four numbers"),
    ],
)
def test_bad_boxes(row, settings, said, folder):
    write_lines(folder / "labels.csv", HEADER, row, "b,,,,,", "c,,,,,")
    with pytest.raises(InputError, match=said):
        stored(folder, on_rare="keep", **settings)


def test_boxes_of_an_image_in_two_patients(folder):
    write_lines(folder / "labels.csv", f"{HEADER},patient_id", "a,mass,4,5,8,10,p", "a,mass,1,1,3,3,q", "b,,,,,,q")
    with pytest.raises(InputError, match="row 3: patient_id differs from that in an earlier row of the image"):
        read_folder(folder)


def test_counts_at_thresholds():
    found = pd.DataFrame({"image_id": ["a", "a", "b"], "class_id": [0, 0, 1], "score": [0.9, 0.4, 0.7]})
    found[BOX] = [[0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]]
    truth = found[["image_id", "class_id", *BOX]].drop(index=1)
    result = evaluate(found, truth, ["a", "b"], boxes.rule(2))
    both, first = np.array([True, True]), np.array([True, False])
    assert boxes.count_boxes(result, both, np.array([0.5, 0.5])).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert boxes.count_boxes(result, both, np.array([0.3, np.nan])).tolist() == [[1, 2, 1], [0, 0, 1]]
    assert boxes.count_boxes(result, first, np.array([0.95, 0.5])).tolist() == [[0, 0, 1], [0, 0, 0]]


def test_a_run_on_boxes(command, tmp_path):
    data = boxed_sample(tmp_path / "boxed")
    result = command("run", "podium", "--data", data, "--out", "mine", *TINY, "--n-folds", "2", "--folds", "0", "1")
    assert result.status == 0, result
    score = read_json(tmp_path / "mine" / "score.json")
    assert {"map", "map_40", "map_coco", "f1"} <= set(score) and score["images"] == 8
    rows = read_table(tmp_path / "mine" / "submission.csv")
    assert rows.columns.tolist() == boxes.COLUMNS and set(rows["image_id"]) == {"i8", "i9"}
    answers = COCO(str(tmp_path / "mine" / "submission.coco.json"))
    assert len(answers.getAnnIds()) == (rows["keep"] == "1").sum()
    words = ["infer", "mine", "--data", data, "--out", "again.csv", "--workers", "0"]
    assert command(*words).status == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "mine" / "submission.csv").read_bytes()
    result = command("table", "mine", "--resamples", "20", "--out", "table.csv")
    assert result.status == 0, result
    figures = pd.read_csv(tmp_path / "table.csv").set_index("metric")["pooled"]
    assert figures["mAP"] == pytest.approx(score["map"]["estimate"]) and len(figures) == 3
