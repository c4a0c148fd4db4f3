"""From networks' boxes to the submission, in numbers worked out by hand: traps of the format, the metric and fusion."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tables import real_data
from common.errors import InputError
from common.metrics.detection import evaluate
from common.post.boxes import BOX, scale
from common.post.fusion import fuse, fuse_members
from common.submit.validate import validate_boxes
from solutions.vinbigdata.config import DEMO, PAPER, PODIUM, DecisionConfig, FusionConfig
from solutions.vinbigdata.postprocess import DecisionRule, apply_rule, list_rules, parse_predictions, prediction_strings
from tests.solutions.vinbigdata.tables import rows_of, some_boxes, table, true

ONE = DecisionRule((1.0,), 0.4)
TWO = DecisionRule((1.0, 1.0), 0.4)


def sizes(**pixels):
    return pd.DataFrame([(name, *size) for name, size in pixels.items()], columns=["image_id", "width", "height"])


def written(path, **strings):
    pd.DataFrame({"image_id": list(strings), "PredictionString": list(strings.values())}).to_csv(path, index=False)
    return path


# ---- the format ----------------------------------------------------------------------------------------------------


def test_the_string_of_each_image():
    found = table(
        ("b", 7, 0.1, 10, 20.5, 30, 40),
        ("b", 14, 0.25, 0, 0, 1, 1),
        ("b", 0, 0.30000000000000004, 1 / 3, 0, 5, 6),
        ("a", 13, 1, 0, 0, 640, 480),
        ("b", 3, 1e-12, 0, 0, 1, 1),
    )
    rows = prediction_strings(found, ["c", "b", "a"], sizes(a=(640, 480), b=(100, 50), c=(5, 5)))
    assert rows.columns.tolist() == ["image_id", "PredictionString"]
    assert rows.to_numpy().tolist() == [
        ["c", "14 1 0 0 1 1"],
        ["b", "0 0.30000000000000004 0.3333333333333333 0 5 6 14 0.25 0 0 1 1 7 0.1 10 20.5 30 40 3 1e-12 0 0 1 1"],
        ["a", "13 1 0 0 640 480"],
    ]


def test_boxes_are_inside_their_image_in_x_and_y_apart():
    found = table(("a", 1, 0.9, -1, -1, 401, 101), ("a", 2, 0.8, 400, 3, 400.5, 9))  # the second: no area
    rows = prediction_strings(found, ["a"], sizes(a=(400, 100)))
    assert rows["PredictionString"].tolist() == ["1 0.9 0 0 400 100"]


COORDINATE = st.floats(0, 500) | st.integers(0, 500).map(float)
ENTRY = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 13),
    st.floats(0, 1),
    COORDINATE,
    COORDINATE,
    st.floats(1.5, 500),  # boxes within a pixel are taken for normalised ones
    st.floats(1e-3, 500),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ENTRY, max_size=12))
def test_nothing_is_lost_on_the_way(tmp_path_factory, entries):
    found = table(*((*entry[:5], entry[3] + entry[5], entry[4] + entry[6]) for entry in entries))
    path, ids = tmp_path_factory.mktemp("csv") / "s.csv", ["c", "a", "b"]
    prediction_strings(found, ids, sizes(a=(1000, 1000), b=(1000, 1000), c=(1000, 1000))).to_csv(path, index=False)
    back = parse_predictions(path)
    assert validate_boxes(path, path).rows == 3 and set(back["image_id"]) == set(ids)
    assert sorted(rows_of(back[back["class_id"] != 14])) == sorted(rows_of(found))
    assert set(back.loc[back["class_id"] == 14, "image_id"]) == set(ids) - set(found["image_id"])


def test_the_real_sample_submission():
    folder = real_data("vinbigdata")
    if folder is None:
        pytest.skip("no real data: CXR_REAL_DATA is not set")
    found = parse_predictions(folder / "sample_submission.csv")
    assert len(found) == 78 and (found["class_id"] == 14).all() and (found["score"] == 1).all()


# ---- the metric ----------------------------------------------------------------------------------------------------


def test_a_score_by_hand_whatever_the_order_of_rows(tmp_path):
    truth = true(("a", 7, 100, 100, 200, 200), ("b", 7, 50, 50, 100, 100), ("c", 14, 0, 0, 1, 1), ("d", 14, 0, 0, 1, 1))
    found = table(
        ("a", 7, 0.9, 100, 100, 200, 200),
        ("a", 7, 0.8, 100, 100, 200, 190),  # of the same true box: a false positive
        ("b", 7, 0.7, 50, 50, 100, 90),  # IoU 0.8
        ("c", 14, 1, 0, 0, 1, 1),
        ("b", 14, 0.5, 0, 0, 1, 1),  # false
        ("d", 14, 0.4, 0, 0, 1, 1),
    )
    both = (0.5 * 1 + 0.5 * 2 / 3) / 1  # of class 7 and of 14: right, wrong, right
    for seed in range(5):
        path = tmp_path / f"{seed}.csv"
        shuffled = found.sample(frac=1, random_state=seed)
        prediction_strings(shuffled, ["d", "b", "a", "c"]).to_csv(path, index=False)
        result = evaluate(parse_predictions(path).sample(frac=1, random_state=seed), truth)
        assert result.mean_ap == pytest.approx(both, abs=1e-12)
        assert result.classes["ap"][[7, 14]].tolist() == pytest.approx([both, both], abs=1e-12)


def test_the_truth_as_a_submission_scores_1(tmp_path):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 500, (60, 2))
    boxes = np.hstack([corner, corner + rng.uniform(1, 300, (60, 2))])
    ids = [f"i{k % 25}" for k in range(60)]
    truth = true(*((name, k % 14, *box) for k, (name, box) in enumerate(zip(ids, boxes, strict=True))))
    truth = pd.concat([truth, true(*((f"h{k}", 14, 0, 0, 1, 1) for k in range(9)))])
    found = apply_rule(truth[truth["class_id"] < 14].assign(score=0.5), truth["image_id"].unique(), None, ONE)
    path = tmp_path / "s.csv"
    prediction_strings(found, truth["image_id"].unique()).to_csv(path, index=False)
    assert evaluate(parse_predictions(path), truth).classes["ap"].tolist() == [1.0] * 15


# ---- the decision --------------------------------------------------------------------------------------------------

HEALTHY = pd.Series({"over": 0.9, "at": 0.8, "between": 0.5, "low": 0.3, "none": 0.1})
BOXES = table(*((name, 7, 0.6, 1, 2, 3, 4) for name in HEALTHY.index if name != "none"))


def no_finding(found):
    return {name: score for name, label, score, *_ in rows_of(found) if label == 14}


def boxes_of(found):
    return [name for name, label, *_ in rows_of(found) if label != 14]


def test_the_papers_rule():
    found = apply_rule(BOXES, HEALTHY.index, HEALTHY.to_frame("healthy"), replace(ONE, alpha=0.8, beta=0.3))
    assert boxes_of(found) == ["at", "between", "low"]
    assert no_finding(found) == {"over": 1.0, "at": 0.8, "between": 0.5, "none": 1.0}  # none: its row cannot be empty
    assert set(map(tuple, found.loc[found["class_id"] == 14, BOX].to_numpy())) == {(0, 0, 1, 1)}


def test_the_winners_rule():
    found = apply_rule(BOXES, HEALTHY.index, HEALTHY.replace(0.3, 0.0).to_frame("healthy"), replace(ONE, beta=-1))
    assert boxes_of(found) == ["over", "at", "between", "low"]
    assert no_finding(found) == {**HEALTHY, "low": 0.0}


def test_the_2cc_before_the_detectors_leaves_the_same_boxes():
    found, _ = some_boxes(3)
    ids = sorted(found["image_id"].unique())
    health = pd.DataFrame({"healthy": np.linspace(0, 1, len(ids))}, ids)
    rule, images = replace(TWO, alpha=0.6, beta=0.3), sizes(**dict.fromkeys(ids, (3000, 1000)))
    after = apply_rule(fuse_members(found.assign(fold=0), images, ["x", "y"], rule), ids, health, rule)
    seen = found[health["healthy"][found["image_id"]].to_numpy() <= 0.6]
    before = apply_rule(fuse_members(seen.assign(fold=0), images, ["x", "y"], rule), ids, health, rule)
    assert 0 < len(seen) < len(found) and sorted(rows_of(before)) == sorted(rows_of(after))


def test_boxes_alone():
    assert no_finding(apply_rule(BOXES, HEALTHY.index, None, ONE)) == {"none": 1.0}
    assert no_finding(apply_rule(table(), ["a"], None, ONE)) == {"a": 1.0}


def test_scores_are_scaled_by_the_probabilities_of_image_and_class():
    found = table(("a", 7, 0.8, 0, 0, 8, 8), ("a", 3, 0.5, 0, 0, 8, 8), ("b", 7, 0.8, 0, 0, 8, 8))
    present = {str(k): [0.0, 0.0] for k in range(14)} | {"7": [0.25, 0.81], "3": [1.0, 0.0]}
    health = pd.DataFrame({"healthy": [0.36, 0.75], **present}, ["a", "b"])
    scaled = apply_rule(found, ["a", "b"], health, replace(ONE, gamma=0.5, delta=0.5))
    assert scaled["score"].tolist() == pytest.approx([0.8 * 0.8 * 0.5, 0.5 * 0.8, 0.8 * 0.5 * 0.9])
    boxed = apply_rule(found, ["a", "b"], health, replace(ONE, gamma=2.0, beta=0.5))
    assert no_finding(boxed) == {"b": 0.75} and boxed["score"][2] == pytest.approx(0.8 / 16)


def test_what_a_rule_may_be():
    for wrong in (
        {"alpha": 0.2, "beta": 0.3},
        {"alpha": 1.1},
        {"beta": -2},
        {"iou": 2},
        {"weights": (0.0,)},
        {"gamma": -1},
    ):
        with pytest.raises(InputError, match="must"):
            DecisionRule(**{"weights": (1.0,), "iou": 0.4, **wrong})


def test_the_rules_of_the_presets():
    assert list_rules(PAPER.fusion, PAPER.decision, PAPER.fusion.weights) == [
        DecisionRule((5, 2, 1, 1, 1, 1), iou=0.4, skip=0, alpha=0.997, beta=0.3)
    ]
    demo = list_rules(DEMO.fusion, DEMO.decision, (1, 1))
    assert len(demo) == 3 * 4 + 1 and [rule.beta for rule in demo].count(-1) == 1
    assert len(list_rules(PODIUM.fusion, PODIUM.decision, (1, 1, 1))) == 3 * 2 * 2 * 2 * (1 + 2 * 3) * 3
    several = FusionConfig(nms=(0.5, 1.0), limit=(0, 9), conf_type=("avg", "max"))
    assert len(list_rules(several, DecisionConfig(gamma=(0, 1, 2), delta=(0, 1)), (1,))) == 8 * 6
    plain = list_rules(FusionConfig(iou=(0.3, 0.4), method="none"), DecisionConfig(("none",)), (1,))
    assert plain == [DecisionRule((1,), 0.3)]
    some = list_rules(FusionConfig(), DecisionConfig(alpha=(0.2, 0.9), beta=(0.1, 0.5)), (1,))
    assert [(rule.alpha, rule.beta) for rule in some] == [(0.2, 0.1), (0.9, 0.1), (0.9, 0.5)]
    with pytest.raises(InputError, match="no rule to try"):
        list_rules(FusionConfig(), DecisionConfig(alpha=(0.2,), beta=(0.5,)), (1,))
    (equal,) = list_rules(FusionConfig(), DecisionConfig(alpha=(0.2,), beta=(0.2,)), (1,))
    assert (equal.alpha, equal.beta) == (0.2, 0.2)


def test_soft_suppression_returns_every_decayed_score_above_0_and_no_fusion_every_box():
    boxes = {
        "one": table(("a", 3, 0.8, 0, 0, 50, 50), ("a", 3, 0.6, 0, 0, 50, 25)),  # IoU 0.5
        "two": table(("a", 3, 1e-6, 60, 60, 90, 90), ("a", 3, 0.0, 10, 70, 20, 90)),
    }
    soft = fuse(boxes, sizes(a=(100, 100)), [1, 1], 0.4, method="soft_nms")
    np.testing.assert_allclose(soft["score"], np.array([0.8, 0.6 * np.exp(-0.5), 1e-6]) / 2)  # a half of the weights
    every = fuse(boxes, sizes(a=(100, 100)), [1, 1], 0.4, method="none")
    assert every.index.tolist() == [0, 1, 2, 3] and every["score"].tolist() == [0.8, 0.6, 1e-6, 0]


# ---- fusion --------------------------------------------------------------------------------------------------------

SQUARE = sizes(a=(16, 16), b=(16, 16))


def test_fused_by_hand():
    found = pd.concat(
        [
            table(("a", 7, 0.8, 0, 0, 8, 8), ("a", 3, 0.8, 0, 0, 8, 8), ("b", 7, 0.6, 1, 1, 3, 3), member="x"),
            table(("a", 7, 0.4, 0, 0, 8, 9.5), member="y"),
        ]
    )
    fused = fuse_members(found, SQUARE, ["x", "y"], DecisionRule((5.0, 2.0), 0.4))
    # 0.8 · 5 = 4 and 0.4 · 2 = 0.8: y_max (4 · 8 + 0.8 · 9.5) / 4.8, score (4.8 / 2) · 2 / 7; alone: 4 / 7 and 3 / 7
    assert [row[:2] for row in rows_of(fused)] == [("a", 7), ("a", 3), ("b", 7)]
    np.testing.assert_allclose(fused["score"], [4.8 / 7, 4 / 7, 3 / 7], rtol=1e-6)
    np.testing.assert_allclose(fused[BOX], [[0, 0, 8, 8.25], [0, 0, 8, 8], [1, 1, 3, 3]], rtol=1e-6)


def test_scores_above_1_are_brought_back_in_order():
    boxes = [("a", 7, 0.9, 0, 0, 8, 8), ("a", 7, 0.9, 0, 0, 8, 8), ("a", 7, 0.3, 10, 10, 12, 12)]
    fused = fuse({"x": table(*boxes), "y": table(("a", 3, 0.6, 0, 0, 8, 8))}, SQUARE, [5, 1], 0.4)
    # 4.5 · 2 / 6 = 1.5, 0.3 · 5 / 6 = 0.25 and 0.6 / 6 = 0.1, all divided by 1.5
    assert fused["class_id"].tolist() == [7, 7, 3]
    np.testing.assert_allclose(fused["score"], [1, 0.25 / 1.5, 0.1 / 1.5], rtol=1e-6)


def test_no_finding_is_averaged_not_fused():
    x, y = table(("a", 14, 0.9, 0, 0, 1, 1), ("a", 7, 0.01, 0, 0, 1, 1)), table(("a", 14, 0.3, 0, 0, 1, 1))
    fused = fuse({"x": x, "y": y}, SQUARE, [2, 1], 0.4, skip=0.5)  # skip is for boxes of findings
    assert rows_of(fused) == [("a", 14, pytest.approx((2 * 0.9 + 0.3) / 3), 0, 0, 1, 1)]


def test_boxes_in_other_pixels_inverted_or_nan_are_not_fused():
    for box, reason in (
        ((0, 0, 17, 9), "outside its image"),
        ((9, 0, 3, 3), "inverted"),
        ((0, np.nan, 3, 3), "finite"),
    ):
        with pytest.raises(InputError, match=f"x, row 0, image a.*{reason}"):
            fuse({"x": table(("a", 7, 0.5, *box))}, SQUARE, [1], 0.4)
    with pytest.raises(InputError, match="weights must be positive"):
        fuse({"x": BOXES[:0], "y": BOXES[:0]}, SQUARE, [1, 0], 0.4)


def test_fusion_knows_no_direction_and_no_order():
    found, _ = some_boxes()
    found["fold"] = 0
    ids = found["image_id"].unique()
    here = pd.DataFrame({"image_id": ids, "width": 3000, "height": 1000})
    fused = fuse_members(found, here, ["x", "y"], DecisionRule((2.0, 1.0), 0.4))
    assert 30 <= len(fused) < 60
    shuffled = fuse_members(found.sample(frac=1, random_state=1), here, ["x", "y"], DecisionRule((2.0, 1.0), 0.4))
    assert sorted(rows_of(fused)) == sorted(rows_of(shuffled))
    other = fuse_members(found, here, ["y", "x"], DecisionRule((1.0, 2.0), 0.4))  # the weights go with the members
    np.testing.assert_allclose(sorted(fused["score"]), sorted(other["score"]), rtol=1e-6)
    found[BOX] = scale(found[BOX], 512 / 3000, 512 / 1000)  # as the network sees it
    seen = fuse_members(found, here.assign(width=512, height=512), ["x", "y"], DecisionRule((2.0, 1.0), 0.4))
    np.testing.assert_allclose(scale(seen[BOX], 3000 / 512, 1000 / 512), fused[BOX], atol=0.01)


def test_one_network_alone_is_not_fused():
    found = table(("a", 7, 0.8, 0, 0, 8, 8), ("a", 7, 0.4, 0, 0, 8, 9), ("a", 3, 0.05, 0, 0, 8, 8), member="x", fold=0)
    rule = DecisionRule((5.0,), 0.4, skip=0.1)
    assert rows_of(fuse_members(found, SQUARE, ["x"], rule)) == rows_of(found[:2])
    again = pd.concat([found, found.assign(fold=1)])  # two folds' networks on one image are two
    assert len(fuse_members(again, SQUARE, ["x"], rule)) == 1


def test_copies_of_one_networks_box_do_not_outvote_the_others():
    x = table(*(("a", 7, 0.8 - k / 100, 0, 0, 8, 8 + k / 8) for k in range(3)), member="x")
    y = table(("a", 7, 0.4, 10, 10, 12, 12), member="y")
    found, rule = pd.concat([x, y, y.assign(member="z")[:0]]), DecisionRule((1.0, 1.0, 1.0), 0.4)
    of = ("x", "y", "z")
    assert fuse_members(found, SQUARE, of, rule)["score"].tolist() == pytest.approx([0.79, 0.4 / 3], rel=1e-6)
    for single in (replace(rule, nms=0.5), replace(rule, limit=1)):
        fused = fuse_members(found, SQUARE, of, single)
        assert fused["score"].tolist() == pytest.approx([0.8 / 3, 0.4 / 3], rel=1e-6)
    best = fuse_members(found, SQUARE, of, replace(rule, nms=0.5, conf_type="max"))
    assert best["score"].tolist() == pytest.approx([0.8, 0.4], rel=1e-6)


def test_each_folds_network_counts_where_all_predict_the_same_images():
    found, _ = some_boxes()
    here = pd.DataFrame({"image_id": found["image_id"].unique(), "width": 3000, "height": 1000})
    folds = found.assign(fold=(found["member"] == "y").astype(int), member="only")
    as_members = fuse_members(found.assign(fold=0), here, ["x", "y"], TWO)
    assert rows_of(fuse_members(folds, here, ["only"], ONE)) == rows_of(as_members)
