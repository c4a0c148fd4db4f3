"""`ensemble` as a user gives it, on submissions whose fusion is known."""

import re
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from ensemble_boxes import nms, weighted_boxes_fusion

from common import cli
from common.data.coco import write_boxes
from common.submit.validate import validate_boxes
from solutions.vinbigdata import config, postprocess, tools
from solutions.vinbigdata.data import SIZES

BAR = re.compile(r"(file|image)/s|\d+%\|")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("ensemble …")` in a folder of its own: status, text, errors."""
    monkeypatch.chdir(tmp_path)

    def run(line):
        status = cli.main("vinbigdata", config, dict, line.split(), lambda tool: tools.TOOLS)
        said = capsys.readouterr()
        lines = [line.strip() for line in re.split(r"[\r\n]+", said.err)]
        return SimpleNamespace(status=status, out=said.out, errors=[x for x in lines if x and not BAR.search(x)])

    return run


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    pd.DataFrame(rows.items(), columns=["image_id", "PredictionString"]).to_csv(path, index=False)


def read(path):
    return dict(pd.read_csv(path, dtype=str).itertuples(index=False))


@pytest.fixture
def two(tmp_path):
    """Submissions of two strangers: image a of 64 × 32 pixels, b of 16 × 16."""
    write(tmp_path / "one.csv", {"a": "7 0.8 0 0 40 8 14 0.3 0 0 1 1", "b": "14 1 0 0 1 1"})
    write(tmp_path / "two.csv", {"b": "14 0.4 0 0 1 1 3 0.5 2 4 8 16", "a": "7 0.4 0 0 40 9.5 0 0.9 40 8 64 32"})
    pd.DataFrame([("b", 16, 16, "x"), ("a", 64, 32, "y")], columns=["image_id", "width", "height", "more"]).to_csv(
        tmp_path / "sizes.csv", index=False
    )
    return tmp_path


def numbers(text):
    return np.array(text.split(), float).reshape(-1, 6)


@pytest.mark.parametrize("sizes", ["", " --sizes sizes.csv"])
def test_two_foreign_submissions(command, two, sizes):
    done = command(f"ensemble one.csv two.csv --weights 5 2 --iou 0.4 --out fused.csv{sizes}")
    assert done.status == 0 and not done.errors
    assert "4 boxes of 2 submissions fused; valid submission: fused.csv: 2 rows, 2 positive" in done.out
    found = read("fused.csv")
    assert list(found) == ["a", "b"]
    # class 7: 0.8 · 5 and 0.4 · 2, y_max (4 · 8 + 0.8 · 9.5) / 4.8; those alone: score · weight / 7
    expected = [[7, 4.8 / 7, 0, 0, 40, 8.25], [0, 0.9 * 2 / 7, 40, 8, 64, 32], [14, 0.3 * 5 / 7, 0, 0, 1, 1]]
    np.testing.assert_allclose(numbers(found["a"]), expected, rtol=1e-6)
    np.testing.assert_allclose(numbers(found["b"]), [[14, 5.8 / 7, 0, 0, 1, 1], [3, 1 / 7, 2, 4, 8, 16]], rtol=1e-6)


def test_a_coco_file_in_place_of_a_submission(command, two):
    images = pd.read_csv("sizes.csv")
    found = postprocess.parse_predictions(two / "one.csv")
    write_boxes(two / "one.json", found, images, config.CLASSES)
    pd.testing.assert_frame_equal(postprocess.parse_predictions(two / "one.json"), found)
    assert command("ensemble one.csv two.csv --out fused.csv").status == 0
    expected = read("fused.csv")
    assert command("ensemble two.csv one.json --out fused.csv").status == 0
    for name, text in read("fused.csv").items():
        np.testing.assert_allclose(numbers(text), numbers(expected[name]), rtol=1e-6)
    write_boxes(two / "one.json", found[:1], images[1:], config.CLASSES)
    done = command("ensemble two.csv one.json --out fused.csv")
    assert done.status == 2 and "one.json, no row for b (row 2 of two.csv)" in done.errors[0]


def test_equal_weights_and_another_overlap_by_default(command, two):
    write(two / "one.csv", {"a": "7 0.8 0 0 7 1", "b": "14 1 0 0 1 1"})
    write(two / "two.csv", {"a": "7 0.4 3 0 10 1", "b": "14 0.5 0 0 1 1"})
    assert command("ensemble one.csv two.csv").status == 0
    assert read("fused.csv") == {"a": "7 0.4 0 0 7 1 7 0.2 3 0 10 1", "b": "14 0.75 0 0 1 1"}  # 0.4 is not above 0.4
    assert command("ensemble one.csv two.csv --iou 0.3 --conf-type max").status == 0
    assert numbers(read("fused.csv")["a"])[:, 1].tolist() == pytest.approx([0.8])
    assert command("ensemble one.csv two.csv --skip 0.5 --iou 0.3").status == 0
    assert read("fused.csv")["a"] == "7 0.4 0 0 7 1"
    assert command("ensemble two.csv --skip 0.5").status == 0
    assert read("fused.csv")["a"] == "14 1 0 0 1 1"  # nothing is left of it


def random_submissions(folder, n_images=12):
    rng = np.random.default_rng(0)
    pixels = {f"i{k}": tuple(map(int, rng.integers(500, 3000, 2))) for k in range(n_images)}
    tables = []
    for k in range(3):
        rows = {}
        for name, size in pixels.items():
            corner = rng.uniform(0, 0.6, (30, 2))
            boxes = (np.hstack([corner, corner + rng.uniform(0.05, 0.4, (30, 2))]) * (*size, *size)).round(2)
            labels, scores = rng.integers(0, 3, 30), rng.random(30).round(6)
            rows[name] = " ".join(map(str, np.column_stack([labels.astype(object), scores, boxes]).ravel()))
        write(folder / f"{k}.csv", rows)
        tables.append({name: numbers(text) for name, text in rows.items()})
    pd.DataFrame([(k, *v) for k, v in pixels.items()], columns=SIZES).to_csv(folder / "sizes.csv", index=False)
    return pixels, tables


@pytest.mark.parametrize("sizes", ["", " --sizes sizes.csv"])
def test_the_boxes_are_those_of_ensemble_boxes(command, tmp_path, sizes):
    pixels, tables = random_submissions(tmp_path)
    assert command(f"ensemble 0.csv 1.csv 2.csv --weights 5 2 1 --iou 0.5 --skip 0.1 --out wbf.csv{sizes}").status == 0
    assert command(f"ensemble 0.csv 1.csv 2.csv --weights 5 2 1 --method nms --out nms.csv{sizes}").status == 0
    found, kept = read("wbf.csv"), read("nms.csv")
    expected = {}
    for name, size in pixels.items():
        parts = [table[name] for table in tables]
        lists = [[p[:, 2:] / (*size, *size) for p in parts], [p[:, 1] for p in parts], [p[:, 0] for p in parts]]
        boxes, scores, labels = weighted_boxes_fusion(*lists, weights=[5, 2, 1], iou_thr=0.5, skip_box_thr=0.1)
        expected[name] = np.column_stack([labels, scores, boxes * (*size, *size)])
        boxes, scores, labels = nms(*lists, iou_thr=0.4, weights=[5, 2, 1])
        order = np.argsort(-scores)
        own = numbers(kept[name])
        np.testing.assert_allclose(own[:, 1], scores[order], rtol=1e-9)
        np.testing.assert_allclose(own[:, 2:], (boxes * (*size, *size))[order], rtol=1e-9)
    top = max(1.0, max(rows[:, 1].max() for rows in expected.values()))
    assert top > 1  # the library's scores pass 1 with these weights
    for name, rows in expected.items():
        own = numbers(found[name])
        np.testing.assert_allclose(own[:, 1], rows[:, 1] / top, rtol=1e-5)
        np.testing.assert_allclose(own[:, 2:], rows[:, 2:], atol=0.01)
        assert own[:, 0].tolist() == rows[:, 0].tolist()


def test_runs_and_their_sizes(command, two):
    (two / "run").mkdir()
    (two / "one.csv").rename(two / "run" / "submission.csv")
    write(two / "two.csv", {"a": "0 0.5 30 8 64.5 32", "b": "14 1 0 0 1 1"})  # half a pixel too wide
    assert command("ensemble run two.csv").status == 0
    assert read("fused.csv")["a"] == "7 0.4 0 0 40 8 0 0.25 30 8 64.5 32 14 0.15 0 0 1 1"
    pd.read_csv(two / "sizes.csv").to_parquet(two / "run" / "images.parquet")
    assert command("ensemble run two.csv").status == 0
    assert numbers(read("fused.csv")["a"])[1].tolist() == [0, 0.25, 30, 8, 64, 32]
    validate_boxes("fused.csv", "two.csv", sizes={"a": (64, 32), "b": (16, 16)})


def test_sizes_of_a_folder_of_images(command, two):
    (two / "test").mkdir()
    cv2.imwrite("test/a.png", np.zeros((32, 64), np.uint8))
    done = command("ensemble one.csv two.csv --sizes test")
    assert done.status == 2 and done.errors == ["error: test: no width and height, in pixels, of image b"]
    cv2.imwrite("test/b.png", np.zeros((16, 16), np.uint8))
    assert command("ensemble one.csv two.csv --sizes test").status == 0
    cv2.imwrite("test/a.png", np.zeros((64, 32), np.uint8))
    done = command("ensemble one.csv two.csv --sizes test")
    assert done.errors == [
        "error: one.csv, row 2 (a): entry 1 (7 0.8 0 0 40 8): the box must have x_min < x_max and y_min < y_max, from "
        "0 on within 32 x 64 pixels"
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("ensemble", "name the submissions to fuse: CSV files, or folders of runs"),
        ("ensemble one.csv missing.csv", "missing.csv: no such file"),
        ("ensemble one.csv test", "test: contains no submission.csv; run the verb `submit` first"),
        ("ensemble one.csv two.csv --weights 1", "--weights: 1 for 2 submissions"),
        ("ensemble one.csv two.csv --weights 1 0", "--weights must be positive numbers, not 1 0"),
        ("ensemble one.csv two.csv --weights 1 inf", "--weights must be positive numbers, not 1 inf"),
        ("ensemble one.csv two.csv --iou 1.5", "--iou must lie in [0, 1], not 1.5"),
        ("ensemble one.csv two.csv --skip nan", "--skip must lie in [0, 1], not nan"),
        ("ensemble one.csv ./one.csv", "one.csv: given twice; to give a submission more weight, use --weights"),
        ("ensemble one.csv two.csv --out two.csv", "--out two.csv: is one of the submissions to fuse"),
        ("ensemble one.csv two.csv --method nms --conf-type max", "--conf-type max: belongs to --method wbf"),
        ("ensemble one.csv two.csv --sizes one.csv", "one.csv, row 1: the header must have image_id,width,height"),
        ("ensemble one.csv other.csv", "other.csv, row 3 ('c'): one.csv has no such image (and 1 further"),
        ("ensemble one.csv inverted.csv", "inverted.csv, row 2 (a): entry 1 (7 0.5 9 0 3 4): the box must have x_min"),
        ("ensemble one.csv two.csv --weights 1e308 1", "--weights must be positive numbers, not 1e+308 1"),
        ("ensemble one.csv two.csv --wieghts 1 2", "Unrecognized"),
        ("ensemble one.csv two.csv --out test", "--out test: is a folder; name a file"),
        ("ensemble one.csv two.csv --out one.csv/x.csv", "--out one.csv/x.csv: one.csv is a file, not a folder"),
        ("ensemble one.csv two.csv --out /dev/null", "--out /dev/null: is not a regular file"),
        ("ensemble zero.csv one.csv", "two overlapping boxes of score 0 have no weighted mean"),
        ("ensemble one.csv run", "run: a run of another solution"),
        ("ensemble empty.csv one.csv", "empty.csv: empty file"),
        ("ensemble one.csv header.csv", "header.csv: no rows under its header"),
        ("ensemble one.csv nan.csv", "nan.csv, row 3 (b): entry 1 (7 nan 0 0 3 4): not a number"),
    ],
)
def test_what_cannot_be_fused(command, two, line, reason):
    (two / "test").mkdir()
    write(two / "other.csv", {"a": "14 1 0 0 1 1", "c": "14 1 0 0 1 1"})
    write(two / "inverted.csv", {"a": "7 0.5 9 0 3 4", "b": "14 1 0 0 1 1"})
    write(two / "nan.csv", {"a": "14 1 0 0 1 1", "b": "7 nan 0 0 3 4"})
    write(two / "zero.csv", {"a": "14 1 0 0 1 1", "b": "3 0 1 1 9 9 3 0 1 1 9 8"})
    write(two / "run" / "submission.csv", {"a": "14 1 0 0 1 1", "b": "14 1 0 0 1 1"})
    (two / "run" / "config.json").write_text('{"solution": "siim_pneumothorax"}')
    (two / "empty.csv").write_text("")
    (two / "header.csv").write_text("image_id,PredictionString\n")
    done = command(line)
    assert done.status == 2 and len(done.errors) == 1 and reason in done.errors[0]
    assert not (two / "fused.csv").exists()


def test_a_blank_row_counts_as_no_boxes_and_no_vote(command, tmp_path):
    (tmp_path / "one.csv").write_text("image_id,PredictionString\nb,\na,7 0.8 0 0 10 10\n")
    write(tmp_path / "two.csv", {"a": "7 0.4 0 0 10 10", "b": "14 0.5 0 0 1 1"})
    done = command("ensemble one.csv two.csv --out new/deep/fused.csv")
    assert done.status == 0 and not done.errors
    assert done.out.startswith("one.csv: accepted, 1 blank rows (the first is row 2)")
    rows = read("new/deep/fused.csv")
    assert list(rows) == ["b", "a"] and rows["b"] == "14 0.5 0 0 1 1"  # one.csv does not use the class: no vote
    np.testing.assert_allclose(numbers(rows["a"]), [[7, 0.6, 0, 0, 10, 10]], rtol=1e-6)
