"""The challenge's rule, submission and tables, in numbers worked out by hand, and real boxes in its layout."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from benchmarks.rsna_layout import write_challenge
from benchmarks.tables import real_data
from common.config import from_dict
from common.errors import InputError
from common.options import Options
from common.post.boxes import BOX
from common.post.fusion import COLUMNS
from solutions.rsna_pneumonia import data
from solutions.rsna_pneumonia.config import CLASS_INFO, DEMO, LABELS, PAPER, SLUG, Config, check_submission
from solutions.rsna_pneumonia.postprocess import BoxRule, apply_rule, fuse_boxes, prediction_strings, read_submission
from tests.notebooks import round_trip


def boxes(*rows):
    return pd.DataFrame(rows, columns=COLUMNS).astype({name: float for name in COLUMNS[2:]})


def test_a_networks_faint_copies_of_a_box_do_not_lower_its_score():
    rows = ("a", 0, 0.8, 100, 100, 200, 200), ("a", 0, 0.1, 100, 100, 200, 190), ("a", 0, 0.6, 100, 100, 200, 200)
    table = boxes(*rows).assign(member="fcos", fold=[0, 0, 1])  # the second box is the first network's, too
    images = pd.DataFrame({"image_id": ["a"], "width": [1024], "height": [1024]})
    fused = fuse_boxes(table, images, ("fcos",), 0.3)
    np.testing.assert_allclose(fused[["score", *BOX]], [[0.7, 100, 100, 200, 200]], rtol=1e-6)


def test_the_rule_and_the_submission(tmp_path):
    found = boxes(("a", 0, 0.9, 100, 200, 200, 400), ("a", 0, 0.2, 0, 0, 9, 9), ("b", 0, 0.8, 0, 0, 50, 50))
    kept = apply_rule(found, pd.Series({"a": 0.5, "b": 0.4}), BoxRule(0.3, gate=0.5, threshold=0.3, shrink=0.875))
    assert kept[["image_id", *BOX]].to_numpy().tolist() == [["a", 106.25, 212.5, 193.75, 387.5]]
    table, path = prediction_strings(kept, ["b", "a"]), tmp_path / "submission.csv"
    assert table["PredictionString"].tolist() == ["", "0.900000 106.2 212.5 87.6 175.0"]
    table.to_csv(path, index=False)
    summary = check_submission(path, path)
    assert (summary.rows, summary.positives, summary.amount) == (2, 1, 1)
    np.testing.assert_allclose(read_submission(path)[0][BOX], [[106.2, 212.5, 193.8, 387.5]])
    for text in ("0.5 1 1 9", "0.5 1 1 nan 3", "1.5 0 0 10 10", "0.5 1000 0 25 10", "0.5 -1 0 9 9", "0.5 0 0 0 10"):
        path.write_text(f"patientId,PredictionString\na,0.5 0 0 10 10\nb,0.5 0 0 10 10 {text}\n")
        with pytest.raises(InputError, match=re.escape(f"({text}): must be five numbers")):
            read_submission(path)
    path.write_text("patientId,PredictionString\na,\nb,0.5 0.1 0.2 0.3 0.4\n")
    with pytest.raises(InputError, match=r"row 3 \(b\): the boxes lie in 0 to 1, but must be in pixels"):
        read_submission(path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a,,,,,2\n", "row 2 (a): Target '2' is neither 0 nor 1"),
        ("a,1,1,5,5,0\n", "row 2 (a): Target 0 with the box 1 1 5 5"),
        ("b,,,,,0\na,1,1,,5,1\n", "row 3 (a): Target 1 needs four numbers as its box, not 1 1 (blank) 5"),
        ("a,1,1,0,5,1\n", "must have a width and a height above 0"),
        ("a,1024,1,5,5,1\n", "the box 1024 1 5 5 begins outside the image"),
        ("a,0.1,0.1,0.5,0.5,1\n", "lies in 0 to 1, but must be in pixels"),
        ("a,1,1,5,5,1\na,,,,,0\n", "this image has both targets"),
        ("a,,,,,0\n", "no image has an opacity"),
        ("a,1,1,5,5,1\nb,,,,,0\n", "no class of b"),
        ("a,1,1,5,5,1\nc,1,1,5,5,1\n", "row 3 (c): class 'Normal', but 'Normal' in an earlier row, Target 1"),
        ("a,1,1,5,5,1\nd,,,,,0\n", "row 4 (d): class 'normal' is not one of"),
    ],
)
def test_tables_that_are_refused(rows, said, tmp_path):
    (tmp_path / LABELS).write_text(f"patientId,x,y,width,height,Target\n{rows}")
    names = "a,Lung Opacity\nc,Normal\n" + "d,normal\n" * ("d," in rows)
    (tmp_path / CLASS_INFO).write_text(f"patientId,class\n{names}")
    with pytest.raises(InputError, match=re.escape(said)):
        data.read_classes(tmp_path / CLASS_INFO, data.read_labels(tmp_path / LABELS)[1])


def test_real_boxes_in_the_layout_of_the_challenge(tmp_path):
    folder = real_data("vinbigdata") or pytest.skip("no real radiographs ($CXR_REAL_DATA/vinbigdata)")
    true = write_challenge(folder, tmp_path)
    listing = data.read_competition(SimpleNamespace(options=Options(data=tmp_path), config=DEMO))
    found = listing.tables["boxes.parquet"]
    assert len(found) == len(true) > 200 and listing.table["target"].sum() == true["image_id"].nunique()
    np.testing.assert_allclose(found[BOX], true.sort_values(["image_id", *BOX])[BOX])


def test_settings_that_a_file_does_not_name_are_the_papers():
    found = from_dict(Config, {"seed": 1})
    assert (found.seed, found.detector) == (1, PAPER.detector)


@pytest.mark.long
def test_the_notebook_gives_the_bytes_of_the_run(finished, sample, tmp_path, monkeypatch):
    run, data = finished / "run", {SLUG: sample}
    assert "figcaption" in round_trip(run, "rsna_pneumonia", data, tmp_path, monkeypatch, "chest-x-rays")
