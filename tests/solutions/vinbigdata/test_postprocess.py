"""From networks' boxes to the submission, in numbers worked out by hand: traps of the format, the metric and fusion."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tables import real_data
from common.config import from_dict
from common.errors import InputError
from common.metrics.detection import evaluate
from common.post.boxes import BOX, scale
from common.submit.validate import validate_boxes
from solutions.vinbigdata.config import DEMO, PAPER, PODIUM, DecisionConfig, FusionConfig
from solutions.vinbigdata.postprocess import (
    COLUMNS,
    DecisionRule,
    apply_rule,
    fuse,
    fuse_members,
    parse_predictions,
    prediction_strings,
    rules,
)
from solutions.vinbigdata.tuning import FINDINGS, rank_weights, search_weights, tune_detection

ONE = DecisionRule((1.0,), 0.4)
TWO = DecisionRule((1.0, 1.0), 0.4)


def table(*rows, member=None, fold=0):
    """Detections (image_id, class_id, score, x_min, y_min, x_max, y_max)."""
    found = pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(["score", *BOX], float))
    return found if member is None else found.assign(member=member, fold=fold)


def true(*rows):
    return pd.DataFrame(rows, columns=["image_id", "class_id", *BOX])


def sizes(**pixels):
    return pd.DataFrame([(name, *size) for name, size in pixels.items()], columns=["image_id", "width", "height"])


def rows_of(found):
    return [tuple(row) for row in found[COLUMNS].itertuples(index=False)]


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
    turned = table(("a", 1, 0.9, 0, 0, 90, 300))  # as if width and height had been confused
    with pytest.raises(InputError, match=r"image a: the box lies outside its image: 1 0.9 \[0.0, 0.0, 90.0, 300.0\]"):
        prediction_strings(turned, ["a"], sizes(a=(400, 100)))
    assert prediction_strings(turned, ["a"], sizes(a=(100, 400)))["PredictionString"][0] == "1 0.9 0 0 90 300"


def test_network_boxes_scale_by_width_and_height_apart():
    square = np.array([[64, 64, 128, 192]])  # in a store of 256 pixels, of an image of 1024 × 512
    assert scale(square, np.array([1024 / 256]), np.array([512 / 256])).tolist() == [[256, 128, 512, 384]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("x", 1, 0.5, 0, 0, 1, 1), "image x: has boxes, but is not among the 1 images"),
        (("a", 1, 0.5, 5, 0, 1, 1), "image a: not a box: 1 0.5"),
        (("a", 1, 0.5, 0, np.nan, 1, 1), "image a: not a box"),
        (("a", 1, 1.5, 0, 0, 1, 1), "image a: the score must lie in"),
        (("a", 1, np.nan, 0, 0, 1, 1), "image a: the score must lie in"),
        (("a", 15, 0.5, 0, 0, 1, 1), "image a: the class must be 0 to 14"),
        (("a", 14, 0.5, 0, 0, 9, 9), "image a: No finding has the box 0 0 1 1"),
    ],
)
def test_what_cannot_be_submitted_is_refused(row, reason):
    with pytest.raises(InputError, match=reason):
        prediction_strings(table(row), ["a"])


def test_ids_and_sizes_must_be_known():
    with pytest.raises(InputError, match="image a: is there twice"):
        prediction_strings(table(), ["a", "b", "a"])
    with pytest.raises(InputError, match="image b: no width and height are known"):
        prediction_strings(table(), ["a", "b"], sizes(a=(4, 4)))


COORDINATE = st.floats(0, 500) | st.integers(0, 500).map(float)
ENTRY = st.tuples(
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 13),
    st.floats(0, 1),
    COORDINATE,
    COORDINATE,
    st.floats(1e-3, 500),
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


def test_a_foreign_submission(tmp_path):
    path = written(tmp_path / "s.csv", a="7 0.5 10 20 30.5 40 14 0.25 0.0 0.0 1.0 1.0", b="14 1 0 0 1 1")
    found = parse_predictions(path)
    assert rows_of(found) == [("a", 7, 0.5, 10, 20, 30.5, 40), ("a", 14, 0.25, 0, 0, 1, 1), ("b", 14, 1, 0, 0, 1, 1)]
    assert found.dtypes[1:].astype(str).tolist() == ["int64"] + ["float64"] * 5
    cut = parse_predictions(path, images=sizes(a=(30, 40), b=(9, 9)))  # half a pixel too wide
    assert cut.loc[0, BOX].tolist() == [10, 20, 30, 40] and rows_of(cut)[1:] == rows_of(found)[1:]
    with pytest.raises(InputError, match=r"s.csv, row 2 \(a\): entry 1 .* within 40 x 30 pixels"):
        parse_predictions(path, images=sizes(a=(40, 30), b=(9, 9)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("7 0.5 30 20 10 40", r"row 3 \(b\): entry 1 \(7 0.5 30 20 10 40\): the box must have x_min < x_max"),
        ("7 0.5 1 1 nan 4", "row 3 .*not a number"),
        ("7 1.5 1 1 4 4", "row 3 .*the score must lie in 0 to 1"),
        ("0.5 7 1 1 4 4", "row 3 .*the class must be 0 to 14"),
        ("15 0.5 1 1 4 4", "row 3 .*the class must be 0 to 14"),
        ("7 0.5 1 1 4", "row 3 .*5 values"),
        ("14 0.5 0 0 100 100", "row 3 .*class 14 .* has the box 0 0 1 1"),
        ("14 1 0 0 1 1 7 0.5 -2 0 1 1", r"row 3 \(b\): entry 2 \(7 0.5 -2 0 1 1\): the box must .* from 0 on$"),
    ],
)
def test_a_foreign_submission_is_refused_by_row(tmp_path, text, reason):
    path = written(tmp_path / "s.csv", a="14 1 0 0 1 1", b=text)
    with pytest.raises(InputError, match=f"s.csv, {reason}"):
        parse_predictions(path)


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


def test_an_overlap_of_0_4_does_not_match():
    truth = true(("a", 7, 0, 0, 7, 1))
    assert evaluate(table(("a", 7, 1, 3, 0, 10, 1)), truth).mean_ap == 0  # 4 of 10 pixels
    assert evaluate(table(("a", 7, 1, 2.99, 0, 9.99, 1)), truth).mean_ap == 1


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

HEALTHY = {"over": 0.9, "at": 0.8, "between": 0.5, "low": 0.3, "none": 0.1}
BOXES = table(*((name, 7, 0.6, 1, 2, 3, 4) for name in HEALTHY if name != "none"))


def no_finding(found):
    return {name: score for name, label, score, *_ in rows_of(found) if label == 14}


def boxes_of(found):
    return [name for name, label, *_ in rows_of(found) if label != 14]


def test_the_papers_rule():
    found = apply_rule(BOXES, list(HEALTHY), HEALTHY, replace(ONE, alpha=0.8, beta=0.3))
    assert boxes_of(found) == ["at", "between", "low"]
    assert no_finding(found) == {"over": 1.0, "at": 0.8, "between": 0.5, "none": 1.0}  # none: its row cannot be empty
    assert set(map(tuple, found.loc[found["class_id"] == 14, BOX].to_numpy())) == {(0, 0, 1, 1)}


def test_the_winners_rule():
    found = apply_rule(BOXES, list(HEALTHY), {**HEALTHY, "low": 0.0}, replace(ONE, beta=-1))
    assert boxes_of(found) == ["over", "at", "between", "low"]
    assert no_finding(found) == {**HEALTHY, "low": 0.0}


def test_boxes_alone():
    assert no_finding(apply_rule(BOXES, list(HEALTHY), None, ONE)) == {"none": 1.0}
    assert no_finding(apply_rule(table(), ["a"], None, ONE)) == {"a": 1.0}


def test_what_a_rule_needs():
    rule = replace(ONE, beta=-1)
    for healthy in (None, {"over": 0.5}, {**HEALTHY, "at": 1.5}, {**HEALTHY, "at": np.nan}):
        with pytest.raises(InputError, match=r"image (over|at): the rule needs its probability of health"):
            apply_rule(BOXES, list(HEALTHY), healthy, rule)
    with pytest.raises(InputError, match="image low: has boxes, but is not among the 1 images"):
        apply_rule(BOXES[3:], ["over"], None, ONE)
    with pytest.raises(InputError, match="image a: a box of class 14 among those of findings"):
        apply_rule(table(("a", 14, 1, 0, 0, 1, 1)), ["a"], None, ONE)
    for wrong in ({"alpha": 0.2, "beta": 0.3}, {"alpha": 1.1}, {"beta": -2}, {"iou": 2}, {"weights": (0.0,)}):
        with pytest.raises(InputError, match="must"):
            DecisionRule(**{"weights": (1.0,), "iou": 0.4, **wrong})


def test_the_rules_of_the_presets():
    assert rules(PAPER.fusion, PAPER.decision, PAPER.fusion.weights) == [
        DecisionRule((5, 2, 1, 1, 1, 1), iou=0.4, skip=0, alpha=0.997, beta=0.3)
    ]
    demo = rules(DEMO.fusion, DEMO.decision, (1, 1))
    assert len(demo) == 3 * 4 + 1 and [rule.beta for rule in demo].count(-1) == 1
    assert len(rules(PODIUM.fusion, PODIUM.decision, (1, 1, 1))) == 3 * 2 * (1 + 2 * 3)
    plain = rules(FusionConfig(iou=(0.3, 0.4), method="none"), DecisionConfig(("none",)), (1,))
    assert plain == [DecisionRule((1,), 0.3)]
    some = rules(FusionConfig(), DecisionConfig(alpha=(0.2, 0.9), beta=(0.1, 0.5)), (1,))
    assert [(rule.alpha, rule.beta) for rule in some] == [(0.2, 0.1), (0.9, 0.1), (0.9, 0.5)]
    with pytest.raises(InputError, match="no rule to try"):
        rules(FusionConfig(), DecisionConfig(alpha=(0.2,), beta=(0.5,)), (1,))


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


def test_boxes_fuse_above_the_overlap_not_at_it():
    two = {"x": table(("a", 7, 0.8, 0, 0, 7, 1)), "y": table(("a", 7, 0.4, 3, 0, 10, 1))}  # 4 of 10 pixels
    assert len(fuse(two, SQUARE, [1, 1], 0.4)) == 2 and len(fuse(two, SQUARE, [1, 1], 0.3999)) == 1


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
    with pytest.raises(InputError, match="image a: a box of class 14 among those of findings"):
        fuse_members(x.assign(member="x", fold=0), SQUARE, ["x"], ONE)


def test_boxes_in_other_pixels_inverted_or_nan_are_not_fused():
    for box, reason in (
        ((0, 0, 17, 9), "outside its image"),
        ((9, 0, 3, 3), "inverted"),
        ((0, np.nan, 3, 3), "finite"),
    ):
        with pytest.raises(InputError, match=f"x, row 0, image a.*{reason}"):
            fuse({"x": table(("a", 7, 0.5, *box))}, SQUARE, [1], 0.4)
    with pytest.raises(InputError, match=r"x, row 0, image a.*score nan"):
        fuse({"x": table(("a", 7, np.nan, 0, 0, 3, 3))}, SQUARE, [1], 0.4)
    with pytest.raises(InputError, match="weights must be positive"):
        fuse({"x": BOXES[:0], "y": BOXES[:0]}, SQUARE, [1, 0], 0.4)


def some_boxes(seed=0, n=30, members=("x", "y"), width=3000, height=1000):
    rng, parts = np.random.default_rng(seed), []
    truth = rng.uniform(0, 0.6, (n, 2))
    truth = np.hstack([truth, truth + rng.uniform(0.1, 0.3, (n, 2))])
    labels, images = rng.integers(0, 4, n), rng.integers(0, n // 2, n)
    pixels = np.array([width, height] * 2)
    for member in members:
        moved = np.sort((truth + rng.normal(0, 0.02, truth.shape)).clip(0, 1).reshape(n, 2, 2), axis=1).reshape(n, 4)
        false = rng.random(n) < 0.3
        part = pd.DataFrame(
            {"image_id": [f"i{k}" for k in images], "class_id": np.where(false, (labels + 1) % 4, labels)}
        )
        parts.append(part.assign(score=rng.random(n), **dict(zip(BOX, (moved * pixels).T, strict=True)), member=member))
    boxes = pd.DataFrame(truth * pixels, columns=BOX)
    true_boxes = pd.DataFrame({"image_id": parts[0]["image_id"], "class_id": labels}).join(boxes)
    return pd.concat(parts, ignore_index=True), true_boxes


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


def test_each_folds_network_counts_where_all_predict_the_same_images():
    found, _ = some_boxes()
    here = pd.DataFrame({"image_id": found["image_id"].unique(), "width": 3000, "height": 1000})
    folds = found.assign(fold=(found["member"] == "y").astype(int), member="only")
    as_members = fuse_members(found.assign(fold=0), here, ["x", "y"], TWO)
    assert rows_of(fuse_members(folds, here, ["only"], ONE)) == rows_of(as_members)
    with pytest.raises(InputError, match="boxes of the member 'y', where the members are x"):
        fuse_members(found.assign(fold=0), here, ["x"], ONE)
    with pytest.raises(InputError, match="1 weights for 2 members"):
        fuse_members(found.assign(fold=0), here, ["x", "y"], ONE)


@pytest.mark.parametrize("method", ["nms", "soft_nms", "nmw", "none"])
def test_other_fusions(method):
    rows = [("a", 7, 0.8, 0, 0, 8, 8), ("a", 7, 0.4, 0, 0, 8, 8), ("a", 7, 0.05, 10, 10, 12, 12)]
    fused = fuse({"x": table(*rows)}, SQUARE, [1.0], 0.4, 0.1, method)
    kept = {"nms": [0.8], "nmw": [0.8], "none": [0.8, 0.4], "soft_nms": [0.8, 0.4 * np.exp(-1 / 0.5)]}[method]
    np.testing.assert_allclose(fused["score"], kept, rtol=1e-6)


# ---- the search ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    """Boxes of two members, truth, images in three folds, and probabilities of health."""
    found, truth = some_boxes(seed=3, n=120)
    rng, healthy = np.random.default_rng(1), [f"h{k}" for k in range(40)]
    images = pd.DataFrame({"image_id": sorted({f"i{k}" for k in range(60)} & set(truth["image_id"])) + healthy})
    images = images.assign(width=3000, height=1000, fold=rng.integers(0, 3, len(images)))
    images["patient_id"] = [f"p{k // 2}" for k in range(len(images))]
    false = found.sample(50, random_state=0).assign(image_id=rng.choice(healthy, 50))
    found = pd.concat([found, false], ignore_index=True)
    found["fold"] = images.set_index("image_id")["fold"][found["image_id"]].to_numpy()
    truth = pd.concat([truth, true(*((name, 14, 0, 0, 1, 1) for name in healthy))], ignore_index=True)
    level = images["image_id"].str.startswith("h") * 0.4 + rng.uniform(0.05, 0.6, len(images))
    return found, truth, images, dict(zip(images["image_id"], level, strict=True))


FUSION = FusionConfig(weights=(2.0,), iou=(0.3, 0.6), skip=(0.0, 0.2))
DECISION = DecisionConfig(alpha=(0.6, 0.8, 0.95), beta=(0.3, 0.5))


def of(frame, ids):
    return frame[frame["image_id"].isin(ids)]


def test_each_part_has_the_rule_that_the_others_chose(case):
    found, truth, images, healthy = case
    tuned = tune_detection(found, truth, images, healthy, ["x", "y"], FUSION, DECISION, n_resamples=50)
    shares = {None: images["image_id"]} | {k: images.loc[images["fold"] != k, "image_id"] for k in range(3)}
    pieces = []
    for part, ids in shares.items():
        own = [evaluate(of(found[found["member"] == m], ids), of(truth, ids), ids) for m in ("x", "y")]
        own = [result.classes["ap"][:14].mean() for result in own]
        grid = rules(FUSION, DECISION, (2, 1) if own[0] >= own[1] else (1, 2))
        scores = {}
        for rule in grid:  # without weights of images, memory or sharing
            fused = fuse_members(found, images, ["x", "y"], rule)
            scores[rule] = evaluate(apply_rule(of(fused, ids), ids, healthy, rule), of(truth, ids), ids).mean_ap
        chosen = tuned.rule if part is None else tuned.part_rules[part]
        assert scores[chosen] == pytest.approx(max(scores.values()), abs=1e-9)
        if part is None:
            assert tuned.naive == pytest.approx(scores[chosen]) and min(scores.values()) < tuned.naive
            assert tuned.surface["map"].tolist() == pytest.approx(list(scores.values()))
            assert tuned.members["map"].tolist() == pytest.approx(own)
        else:
            here = images.loc[images["fold"] == part, "image_id"]
            fused = of(fuse_members(found, images, ["x", "y"], chosen), here)
            pieces.append(apply_rule(fused, here, healthy, chosen))
    nested = pd.concat(pieces)
    assert sorted(rows_of(nested)) == sorted(rows_of(tuned.detections))
    assert tuned.score.estimate == pytest.approx(evaluate(nested, truth, images["image_id"]).mean_ap)
    assert tuned.score.low < tuned.score.estimate < tuned.score.high and not tuned.halves
    assert len(tuned.class_scores) == 15 and (tuned.parts == images["fold"]).all()
    saved = json.loads(json.dumps(tuned.as_dict()))
    assert from_dict(DecisionRule, saved["rule"]) == tuned.rule and set(saved["part_rules"]) == {"0", "1", "2"}


def test_one_fold_is_halved_by_patient(case):
    found, truth, images, healthy = case
    tuned = tune_detection(
        found.assign(fold=0), truth, images.assign(fold=0), healthy, ["x", "y"], FUSION, DECISION, n_resamples=10
    )
    assert tuned.halves and set(tuned.parts) == set(tuned.part_rules) == {0, 1}
    assert pd.Series(tuned.parts).groupby(images["patient_id"]).nunique().max() == 1
    shuffled = tune_detection(
        found.assign(fold=0).sample(frac=1, random_state=0),
        truth.sample(frac=1, random_state=0),
        images.assign(fold=0),
        healthy,
        ["x", "y"],
        FUSION,
        DECISION,
        n_resamples=10,
    )
    first, second = shuffled.as_dict(), tuned.as_dict()
    assert first.pop("score") == pytest.approx(second.pop("score")) and first == second


def test_of_equal_rules_the_middle_one_wins(case):
    found, truth, images, healthy = case
    above = DecisionConfig(alpha=(0.991, 0.992, 0.995, 0.997, 0.999), beta=(0.5,))  # no image lies between them
    tuned = tune_detection(found, truth, images, healthy, ["x", "y"], FusionConfig(), above, n_resamples=10)
    assert tuned.rule.alpha == 0.995


def test_weights_may_be_searched(case):
    found, truth, images, healthy = case
    fixed, tried = (
        tune_detection(
            found,
            truth,
            images,
            healthy,
            ["x", "y"],
            FusionConfig(weights=(1.0,), try_weights=values),
            DECISION,
            n_resamples=10,
        )
        for values in ((), (1.0, 3.0))
    )
    assert set(tried.rule.weights) <= {1.0, 3.0} and tried.naive >= fixed.naive
    assert tried.members["weight"].tolist() == list(tried.rule.weights) and fixed.rule.weights == (1, 1)


def test_the_best_member_alone_is_chosen_part_by_part(case):
    found, truth, images, healthy = case
    config = FusionConfig(weights=(2.0,), method="best")
    tuned = tune_detection(found, truth, images, healthy, ["x", "y"], config, DecisionConfig(("none",)), n_resamples=10)
    for part, rule in tuned.part_rules.items():
        ids = images.loc[images["fold"] != part, "image_id"]
        own = [evaluate(of(found[found["member"] == m], ids), of(truth, ids), ids, FINDINGS) for m in ("x", "y")]
        best = ("x", "y")[int(np.argmax([result.mean_ap for result in own]))]
        assert rule.weights == ((2, 1) if best == "x" else (1, 2))
        here = images.loc[images["fold"] == part, "image_id"]
        alone = apply_rule(of(found[found["member"] == best], here), here, healthy, rule)
        assert sorted(rows_of(of(tuned.detections, here))) == sorted(rows_of(alone))


def test_the_sweep_shows_the_fusion_of_the_rule_under_wide_ranges(case):
    found, truth, images, healthy = case
    tuned = tune_detection(found, truth, images, healthy, ["x", "y"], FUSION, DECISION, n_resamples=10)
    row = tuned.sweep[(tuned.sweep["alpha"] == 0.9) & (tuned.sweep["beta"] == 0.5)].iloc[0]
    fused = fuse_members(found, images, ["x", "y"], tuned.rule)
    decided = apply_rule(fused, images["image_id"], healthy, replace(tuned.rule, alpha=0.9, beta=0.5))
    assert row["map"] == pytest.approx(evaluate(decided, truth, images["image_id"]).mean_ap)
    assert (tuned.sweep["beta"] <= tuned.sweep["alpha"]).all() and tuned.sweep["beta"].min() == -1


def test_weights_go_to_the_best_first():
    assert rank_weights((5, 2), [0.1, 0.4, 0.3, 0.2]) == (1, 5, 2, 1)
    assert rank_weights((5, 2, 1), [0.2, 0.3]) == (2, 5)
    assert rank_weights((5, 2), [0.2, 0.2]) == (5, 2)
    asked = []

    def score_of(weights):
        asked.append(weights)
        return -abs(weights[0] - 3 * weights[1])  # best at 3 : 1, or 6 : 2

    assert search_weights(score_of, (1, 1), (1, 2, 3)) == (3, 1) and len(asked) == 1 + 2 * 6


def test_out_of_fold_boxes_come_from_one_fold(case):
    found, truth, images, healthy = case
    with pytest.raises(InputError, match="out-of-fold boxes: an image has boxes of more than one fold"):
        twice = pd.concat([found, found.assign(fold=7)])
        tune_detection(twice, truth, images, healthy, ["x", "y"], FUSION, DECISION)
