"""common.metrics.detection_errors: one scene with every kind of error worked by hand, and what must hold on any."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from common.metrics.detection import Rule, evaluate
from common.metrics.detection_errors import ERRORS, error_breakdown
from common.post.boxes import BOX

SQUARE, HALF, THIN = (0, 0, 100, 100), (0, 0, 100, 35), (0, 0, 100, 5)  # IoU with SQUARE 1, 0.35 and 0.05
AWAY = (500, 500, 600, 600)

TRUTH = pd.DataFrame(
    [("a", 0, *SQUARE), ("b", 0, *SQUARE), ("c", 1, *SQUARE), ("d", 0, *SQUARE), ("e", 1, *SQUARE)],
    columns=["image_id", "class_id", *BOX],
)
FOUND = pd.DataFrame(
    [
        ("a", 0, 0.9, *SQUARE),  # correct
        ("a", 0, 0.8, *SQUARE),  # duplicate
        ("b", 0, 0.7, *HALF),  # localisation
        ("c", 0, 0.6, *SQUARE),  # classification
        ("d", 1, 0.5, *HALF),  # both
        ("d", 0, 0.4, *THIN),  # background
        ("a", 1, 0.3, *AWAY),  # background
        ("e", 1, 0.2, *SQUARE),  # correct
    ],
    columns=["image_id", "class_id", "score", *BOX],
)


def test_every_kind_of_error_by_hand():
    breakdown = error_breakdown(FOUND, TRUTH)
    names = ["correct", "duplicate", "localisation", "classification", "both", "background", "background", "correct"]
    assert breakdown.detections["error"].tolist() == names
    assert breakdown.detections["truth_row"].tolist() == [0, 0, 1, 2, -1, -1, -1, 4]
    assert breakdown.detections["score"].tolist() == FOUND["score"].tolist()
    assert breakdown.truth["error"].tolist() == ["correct", "localisation", "classification", "missed", "correct"]
    assert breakdown.summary["count"].to_dict() == dict(zip(ERRORS, [1, 1, 1, 2, 1, 1], strict=True))
    assert (breakdown.summary.index.name, breakdown.gains.index.name) == ("error", "class_id")
    # as it is: class 0 finds 1 of 3 boxes first, class 1 one of 2 at precision 1/3
    assert evaluate(FOUND, TRUTH).mean_ap == pytest.approx((1 / 3 + 1 / 6) / 2)
    gains = {
        "localisation": (2 / 3 / 3, 0),  # one more of 3, third in line: precision 2/3
        "classification": (0, (1 + 2 / 4) / 2 - 1 / 6),  # c found first; e now at 2/4
        "duplicate": (0, 0),
        "background": (0, 1 / 4 - 1 / 6),  # one false positive less before e
        "both": (0, 1 / 4 - 1 / 6),
        "missed": (1 / 2 - 1 / 3, 0),  # 1 of 2
    }
    for kind, by_class in gains.items():
        assert breakdown.gains.loc[[0, 1], kind].tolist() == pytest.approx(by_class, abs=1e-12)
        assert breakdown.summary.loc[kind, "ap_gained"] == pytest.approx(sum(by_class) / 2, abs=1e-12)


def test_of_several_errors_that_point_to_one_box_the_highest_score_is_mended():
    found = FOUND.iloc[[2, 2, 3]].assign(score=[0.5, 0.4, 0.9], image_id="b", class_id=[0, 0, 1])
    truth = TRUTH.iloc[[1]]
    breakdown = error_breakdown(found, truth)
    assert breakdown.detections["error"].tolist() == ["localisation", "localisation", "classification"]
    assert breakdown.summary["ap_gained"].loc[["localisation", "classification"]].tolist() == [0, 1]
    tied = error_breakdown(found.assign(score=0.5), truth)
    assert tied.summary["ap_gained"].loc[["localisation", "classification"]].tolist() == [1, 0]


def test_an_error_that_points_to_a_box_already_found_is_gone_once_mended():
    found = FOUND.iloc[[0, 2]].assign(image_id="a", score=[0.8, 0.9])
    breakdown = error_breakdown(found, TRUTH.iloc[[0]])
    assert breakdown.detections["error"].tolist() == ["correct", "localisation"]
    assert breakdown.truth["error"].tolist() == ["correct"]
    assert breakdown.summary.loc["localisation", "ap_gained"] == 0.5  # from 1/2 to 1


def test_the_least_overlap_is_not_background():
    found = pd.DataFrame([("b", 1, 0.9, 0, 0, 100, 10), ("b", 1, 0.8, 0, 0, 100, 9)], columns=FOUND.columns)
    breakdown = error_breakdown(found, TRUTH)  # IoU 0.1 and 0.09 with a box of another class
    assert breakdown.detections["error"].tolist() == ["both", "background"]


def test_no_finding_is_missed_or_background():
    truth = pd.DataFrame([("a", 14, 0, 0, 1, 1), ("b", 3, *SQUARE)], columns=TRUTH.columns)
    found = pd.DataFrame([("b", 14, 0.9, 0, 0, 1, 1)], columns=FOUND.columns)
    breakdown = error_breakdown(found, truth)
    assert breakdown.detections["error"].tolist() == ["background"]
    assert breakdown.truth["error"].tolist() == ["missed", "missed"]
    assert breakdown.summary.loc["missed", "ap_gained"] == 0  # no true box of either class is left


def test_rows_left_out_and_classes_that_do_not_count():
    breakdown = error_breakdown(FOUND, TRUTH, rule=Rule(max_per_class=1, counted=(1,)))
    assert breakdown.detections["error"].isna().tolist() == [False, True, *[False] * 6]
    assert breakdown.detections["truth_row"].tolist()[1] == -1
    assert breakdown.summary["count"].to_dict() == dict(zip(ERRORS, [0, 0, 0, 1, 1, 0], strict=True))
    assert breakdown.gains.index.tolist() == [1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_what_holds_on_any_table(seed):
    rng = np.random.default_rng(seed)

    def boxes(n):
        corner = rng.integers(0, 60, (n, 2))
        table = pd.DataFrame(np.hstack([corner, corner + rng.integers(20, 60, (n, 2))]), columns=BOX)
        return table.assign(image_id=rng.integers(0, 6, n), class_id=rng.integers(0, 3, n))

    truth, found = boxes(25), boxes(80).assign(score=rng.integers(0, 9, 80) / 8)
    rule = Rule(n_classes=3, no_finding=None)
    breakdown, result = error_breakdown(found, truth, range(6), rule), evaluate(found, truth, range(6), rule)
    counts = breakdown.summary["count"]
    correct = (breakdown.detections["error"] == "correct").to_numpy()
    assert counts.drop("missed").sum() + correct.sum() == len(found)
    assert (correct == (result.truth_row >= 0)).all() and correct.sum() == (breakdown.truth["error"] == "correct").sum()
    gains = breakdown.gains.drop(columns="classification")
    assert (gains.dropna().to_numpy() >= -1e-12).all()
    assert set(gains.dropna().index) == set(truth["class_id"])  # a class without true boxes has no AP to gain
    order = rng.permutation(len(found))
    mixed = error_breakdown(found.iloc[order], truth.sample(frac=1, random_state=seed), range(6), rule)
    pd.testing.assert_frame_equal(mixed.gains, breakdown.gains, check_exact=True)
    pd.testing.assert_frame_equal(mixed.summary, breakdown.summary, check_exact=True)
    kept = found[~breakdown.detections["error"].isin(["background", "both", "duplicate"])]
    gain = evaluate(kept, truth, range(6), rule).mean_ap - result.mean_ap
    assert gain >= breakdown.summary["ap_gained"].loc[["background", "both", "duplicate"]].max() - 1e-12


@pytest.mark.parametrize("background_iou", [0, 0.4, float("nan")])
def test_bad_thresholds_are_refused(background_iou):
    with pytest.raises(InputError, match="background_iou"):
        error_breakdown(FOUND, TRUTH, background_iou=background_iou)


def test_a_truth_without_boxes_is_refused():
    with pytest.raises(InputError, match="no box"):
        error_breakdown(FOUND, TRUTH.iloc[:0], images=list("abcde"))
