"""The competition's own annotations, written as a submission: the format, the fusion of raters and the metric agree."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.tables import label_table
from common.metrics.detection import evaluate
from common.post.boxes import BOX
from common.post.fusion import fuse_raters
from common.submit.table import write_submission
from common.submit.validate import validate_boxes
from solutions.vinbigdata.config import NO_FINDING
from solutions.vinbigdata.postprocess import parse_predictions, prediction_strings


@pytest.fixture(scope="module")
def truth():
    path = label_table("vinbigdata-train.csv.gz")
    if path is None:
        pytest.skip("needs the label tables of torchxrayvision")
    table = pd.read_csv(path)
    assert len(table) == 67_914 and table["image_id"].nunique() == 15_000
    return fuse_raters(table, 0.4)


@pytest.fixture(scope="module")
def images(truth):
    """The table does not know the images' sizes: they end here where their last box does."""
    last = truth.groupby("image_id", sort=False)[["x_max", "y_max"]].max()
    return last.set_axis(["width", "height"], axis=1).reset_index()


def submitted(path, detections, images):
    write_submission(path, prediction_strings(detections, images["image_id"], images))
    sizes = {image_id: (width, height) for image_id, width, height in images.itertuples(index=False)}
    return validate_boxes(path, path, sizes=sizes)


def test_the_fused_annotations_score_1_and_no_order_matters(truth, images, tmp_path):
    path = tmp_path / "submission.csv"
    summary = submitted(path, truth.assign(score=1.0), images)
    findings = int((truth["class_id"] != NO_FINDING).sum())
    assert (summary.rows, summary.positives, summary.amount) == (15_000, 4_394, findings)
    assert (pd.read_csv(path)["PredictionString"] == "14 1 0 0 1 1").sum() == 10_606
    found = parse_predictions(path, images)
    columns = ["image_id", "class_id", *BOX]
    back, given = (each[columns].sort_values(columns, ignore_index=True) for each in (found, truth))
    pd.testing.assert_frame_equal(back, given, check_exact=True)  # not a digit was lost
    result = evaluate(found, truth)
    assert result.mean_ap == 1.0 and result.classes["ap"].tolist() == [1.0] * 15

    lines = path.read_text().splitlines(keepends=True)
    np.random.default_rng(0).shuffle(rows := lines[1:])
    (tmp_path / "shuffled.csv").write_text(lines[0] + "".join(rows))
    shuffled = parse_predictions(tmp_path / "shuffled.csv", images, images["image_id"])
    assert not shuffled["image_id"].equals(found["image_id"])
    again = evaluate(shuffled.sample(frac=1, random_state=0), truth.sample(frac=1, random_state=1))
    assert again.mean_ap == 1.0 and again.classes["ap"].tolist() == [1.0] * 15


def test_a_class_that_is_wrong_by_one_costs_what_it_must(truth, images, tmp_path):
    """Class 0 becomes class 1 in every tenth image that has it: recall falls in one, precision in the other."""
    of_0 = truth.loc[truth["class_id"] == 0, "image_id"].unique()
    wrong = truth["image_id"].isin(of_0[::10]) & (truth["class_id"] == 0)
    submitted(tmp_path / "wrong.csv", truth.assign(score=1.0, class_id=truth["class_id"] + wrong), images)
    result = evaluate(parse_predictions(tmp_path / "wrong.csv", images), truth)
    totals = truth["class_id"].value_counts()
    ap = result.classes["ap"]
    assert 300 < wrong.sum() < 400
    # all scores are equal: one point of the curve; what is left of class 0 is right, all of class 1 was found
    assert ap[0] == pytest.approx(1 - wrong.sum() / totals[0], abs=1e-12)
    assert ap[1] == pytest.approx(totals[1] / (totals[1] + wrong.sum()), abs=1e-12)
    assert ap[2:].tolist() == [1.0] * 13 and result.mean_ap == pytest.approx((13 + ap[0] + ap[1]) / 15, abs=1e-12)
