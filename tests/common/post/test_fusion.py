import contextlib
import copy
import io
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tables import label_table
from common.errors import InputError
from common.post import batches, fusion
from common.post.batches import check_labels
from common.post.boxes import BOX, denormalise
from common.post.wbf import CONF_TYPES, _sum

peer = pytest.importorskip("ensemble_boxes", reason="the oracle ensemble-boxes is not installed")
QUICK = settings(max_examples=25, deadline=None)


def predictions(seed, models=6, boxes=100, classes=14, decimals=None, dtype=np.float64):
    """Noisy copies of shared boxes, so that clusters form; rounded scores tie."""
    rng = np.random.default_rng(seed)
    centres, sides = rng.random((60, 2)), rng.uniform(0.05, 0.3, (60, 2))
    kinds = rng.integers(0, classes, 60)
    lists = [[], [], []]
    for _ in range(models):
        chosen = rng.integers(0, 60, boxes)
        half = sides[chosen] * np.exp(rng.normal(0, 0.1, (boxes, 2))) / 2
        middle = centres[chosen] + rng.normal(0, 0.01, (boxes, 2))
        scores = rng.random(boxes) if decimals is None else rng.random(boxes).round(decimals)
        lists[0].append(np.clip(np.hstack([middle - half, middle + half]), 0, 1).astype(dtype))
        lists[1].append(np.maximum(scores, 0.01).astype(dtype))
        lists[2].append(kinds[chosen])
    return lists


def quietly(function, lists, **options):
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return function(*copy.deepcopy(lists), **options)  # it changes its arguments


def assert_identical(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a.dtype == b.dtype or not a.size)  # the peer's type of nothing is another
        assert a.tobytes() == b.tobytes()


# ---- weighted boxes fusion --------------------------------------------------------------------------------------


def test_wbf_by_hand():
    boxes = [[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], [[0, 0, 0.5, 0.25]]]
    scores, labels = [[0.75, 0.5], [0.25]], [[3, 3], [3]]
    fused, score, label = fusion.weighted_boxes_fusion(boxes, scores, labels, iou_thr=0.4)
    # IoU 0.5: y_max = (0.75 × 0.5 + 0.25 × 0.25) / 1, score (0.75 + 0.25) / 2 from both models; 0.5 from one of two
    assert fused.tolist() == [[0, 0, 0.5, 0.4375], [0.5, 0.5, 1, 1]]
    assert (score.tolist(), label.tolist()) == ([0.5, 0.25], [3, 3])
    _, score, _ = fusion.weighted_boxes_fusion(boxes, scores, labels, iou_thr=0.4, conf_type="max")
    assert score.tolist() == [0.75, 0.5]
    # weights 3 and 1: (3 × 0.75 + 0.25) / 2 × 2 / 4, and 3 × 0.5 / 4
    _, score, _ = fusion.weighted_boxes_fusion(boxes, scores, labels, [3, 1], iou_thr=0.4)
    assert score.tolist() == [0.625, 0.375]


def test_matching_is_strict_and_by_class():
    boxes = [[[0, 0, 0.5, 0.5]], [[0, 0, 0.5, 0.25]]]  # IoU exactly 0.5
    assert len(fusion.weighted_boxes_fusion(boxes, [[1], [1]], [[0], [0]], iou_thr=0.5)[0]) == 2
    assert len(fusion.weighted_boxes_fusion(boxes, [[1], [1]], [[0], [0]], iou_thr=0.4999)[0]) == 1
    assert len(fusion.weighted_boxes_fusion(boxes, [[1], [1]], [[0], [1]], iou_thr=0.4)[0]) == 2


@pytest.mark.parametrize("conf_type", CONF_TYPES)
@QUICK
@given(data=st.data())
def test_wbf_is_the_peers_bit_for_bit(conf_type, data):
    models = data.draw(st.sampled_from([1, 2, 6, 9, 19]))
    lists = predictions(
        data.draw(st.integers(0, 10**6)),
        models,
        data.draw(st.integers(1, 60)),
        data.draw(st.sampled_from([1, 3, 14])),
        data.draw(st.sampled_from([None, 1, 2])),
        data.draw(st.sampled_from([np.float64, np.float32])),
    )
    weights = data.draw(st.sampled_from([None, list(range(1, models + 1)), np.linspace(0.1, 3.3, models)]))
    options = {
        "weights": weights,
        "iou_thr": data.draw(st.sampled_from([0, 0.33, 0.4, 0.55, 0.9])),
        "skip_box_thr": data.draw(st.sampled_from([0.0, 0.3, 0.7])),  # float32 0.7 lies below 0.7
        "conf_type": conf_type,
        "allows_overflow": data.draw(st.booleans()),
    }
    theirs = quietly(peer.weighted_boxes_fusion, lists, **options)
    assert_identical(fusion.weighted_boxes_fusion(*lists, **options), theirs)


@pytest.mark.parametrize("boxes", [10, 50, 300])
def test_ties_come_in_the_peers_order(boxes):
    lists = predictions(boxes, 3, boxes, classes=1)
    lists[1] = [np.full(boxes, 0.5)] * 3
    theirs = quietly(peer.weighted_boxes_fusion, lists, iou_thr=0.5)
    assert len(np.unique(theirs[1])) < len(theirs[1])
    assert_identical(fusion.weighted_boxes_fusion(*lists, iou_thr=0.5), theirs)


def test_class_numbers_far_apart():
    lists = predictions(1, 3, 60, classes=6)
    numbers = np.array([3, 67, -61, 131, 0, 2**24 - 1])  # the first four end in the same six bits
    lists[2] = [numbers[labels] for labels in lists[2]]
    assert_identical(fusion.weighted_boxes_fusion(*lists), quietly(peer.weighted_boxes_fusion, lists))


def test_lists_empty_models_and_nothing_left():
    lists = [[[], [[0.1, 0.1, 0.4, 0.4], [0.1, 0.1, 0.4, 0.1]]], [[], [0.5, 0.9]], [[], [2, 2]]]
    assert_identical(fusion.weighted_boxes_fusion(*lists), quietly(peer.weighted_boxes_fusion, lists))
    for nothing, skip in ((lists, 0.95), ([[[]], [[]], [[]]], 0)):
        theirs = quietly(peer.weighted_boxes_fusion, nothing, skip_box_thr=skip)
        assert_identical(fusion.weighted_boxes_fusion(*nothing, skip_box_thr=skip), theirs)


def test_rounding_beyond_the_edge_is_clipped():
    lists = [[[[-1e-7, 0, 1 + 1e-7, 0.5]]], [[0.5]], [[1]]]
    ours = fusion.weighted_boxes_fusion(*lists)
    assert ours[0].tolist() == [[0, 0, 1, 0.5]]
    assert_identical(ours, quietly(peer.weighted_boxes_fusion, lists))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 16, 23, 128, 129, 200, 1000])
def test_sum_is_numpys(n):
    values = np.random.default_rng(n).random(n)
    assert _sum(values) == values.sum()


@pytest.mark.parametrize("method", [fusion.weighted_boxes_fusion, fusion.nms, fusion.soft_nms])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"boxes": [[[10, 10, 200, 300]], [[0, 0, 1, 1]]]}, r"model 0, box 0: \(10, .* outside \[0, 1\]: divide"),
        ({"boxes": [[[0, 0, 1, 1]], [[-0.1, 0, 1, 1]]]}, "model 1, box 0: .* outside"),
        ({"boxes": [[[0, 0, 1, 1]], [[0.5, 0, 0.1, 1]]]}, "model 1, box 0: .* inverted"),
        ({"boxes": [[[0, 0, np.nan, 1]], [[0, 0, 1, 1]]]}, "model 0, box 0: .* finite"),
        ({"boxes": [[[0, 0, 1, 1]]]}, "1 models' boxes"),
        ({"boxes": [], "scores": [], "labels": []}, "0 models' boxes"),
        ({"boxes": [[[0, 0, 1]], [[0, 0, 1]]]}, r"boxes must have shape \(n, 4\)"),
        ({"scores": [[np.nan], [0.5]]}, "model 0, box 0: score nan"),
        ({"scores": [[0.5], [-0.1]]}, "model 1, box 0: score -0.1"),
        ({"scores": [[0.5], [np.inf]]}, "model 1, box 0: score inf"),
        ({"scores": [[0.5], [0.5, 0.6]]}, "model 1: 1 boxes, scores"),
        ({"scores": [[0.5], [[0.5]]]}, "model 1: 1 boxes, scores"),
        ({"scores": [[0.5], [True]]}, "model 1: scores must be numbers"),
        ({"scores": [["a"], ["b"]]}, "scores must be numbers"),
        ({"labels": [[1, 1], [1]]}, r"model 0: 1 boxes, scores \(1,\), labels \(2,\)"),
        ({"labels": [[1], [1.5]]}, "model 1, box 0: class id 1.5"),
        ({"labels": [[1.0], [np.nan]]}, "class id nan"),
        ({"labels": [["a"], ["b"]]}, "class ids must be whole"),
        ({"weights": [1, 0]}, "weights must be positive"),
        ({"weights": [1, -1]}, "weights must be positive"),
        ({"weights": [1, np.nan]}, "weights must be positive"),
        ({"weights": [1, 2, 3]}, "need 2 weights"),
        ({"iou_thr": 1.5}, "iou_thr"),
        ({"iou_thr": np.nan}, "iou_thr"),
    ],
)
def test_refused(method, change, message):
    good = {"boxes": [[[0, 0, 1, 1]], [[0, 0, 1, 1]]], "scores": [[0.5], [0.5]], "labels": [[1], [1]]}
    lists = [change.get(key, value) for key, value in good.items()]
    with pytest.raises(InputError, match=message):
        method(*lists, **{key: value for key, value in change.items() if key not in good})


def test_refused_options():
    lists = [[[[0, 0, 1, 1]]] * 2, [[0.0], [0.0]], [[1], [1]]]
    with pytest.raises(InputError, match="conf_type"):
        fusion.weighted_boxes_fusion(*lists, conf_type="mean")
    with pytest.raises(InputError, match="skip_box_thr must be a number"):
        fusion.weighted_boxes_fusion(*lists, skip_box_thr=np.nan)
    for method in (fusion.weighted_boxes_fusion, fusion.non_maximum_weighted):  # the peer: boxes of NaN
        with pytest.raises(InputError, match=r"score 0 .*skip_box_thr"):
            method(*lists)
    for options in ({"method": 3}, {"sigma": 0}, {"thresh": np.nan}):
        with pytest.raises(InputError, match="cannot use"):
            fusion.soft_nms(*lists, **options)
    with pytest.raises(InputError, match="class id"):
        check_labels(np.array([1e9]), "row {}".format)


# ---- suppression ------------------------------------------------------------------------------------------------


@QUICK
@given(data=st.data())
def test_suppression_is_the_peers_bit_for_bit(data):
    models = data.draw(st.sampled_from([1, 2, 6, 9]))
    lists = predictions(
        data.draw(st.integers(0, 10**6)),
        models,
        data.draw(st.integers(1, 60)),
        data.draw(st.sampled_from([1, 3, 14])),
        data.draw(st.sampled_from([None, 1, 2])),
    )
    weights = data.draw(st.sampled_from([None, list(range(1, models + 1)), np.linspace(0.1, 3.3, models)]))
    common = {"weights": weights, "iou_thr": data.draw(st.sampled_from([0, 0.33, 0.5, 0.9]))}
    for name, options in [
        ("nms", {}),
        ("soft_nms", {"method": 1, "thresh": 0.05}),
        ("soft_nms", {"method": 2, "thresh": 0.05, "sigma": 0.3}),
        ("non_maximum_weighted", {"skip_box_thr": data.draw(st.sampled_from([0.0, 0.3]))}),
    ]:
        theirs = quietly(getattr(peer, name), lists, **common, **options)
        assert_identical(getattr(fusion, name)(*lists, **common, **options), theirs)


def test_soft_nms_by_hand():
    lists = [[[[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.25]]], [[0.8, 0.6]], [[0, 0]]]  # IoU 0.5
    assert fusion.soft_nms(*lists, method=1, iou_thr=0.4)[1].tolist() == [0.8, 0.6]
    assert fusion.soft_nms(*lists, method=1, iou_thr=0.4, decayed=True)[1].tolist() == [0.8, 0.3]
    assert fusion.soft_nms(*lists, method=1, iou_thr=0.5, decayed=True)[1].tolist() == [0.8, 0.6]
    scores = fusion.soft_nms(*lists, sigma=0.5, decayed=True)[1]
    np.testing.assert_allclose(scores, [0.8, 0.6 * np.exp(-0.5)], rtol=1e-15)
    assert len(fusion.soft_nms(*lists, method=1, iou_thr=0.4, thresh=0.3)[0]) == 1


def test_suppression_of_nothing():
    for method in (fusion.nms, fusion.soft_nms, fusion.non_maximum_weighted):
        assert [len(part) for part in method([[], []], [[], []], [[], []])] == [0, 0, 0]


# ---- tables -----------------------------------------------------------------------------------------------------

SIZES = pd.DataFrame({"image_id": ["b", "a", "c"], "width": [2000, 1000, 500], "height": [1000, 800, 400]})


def table(*rows):
    return pd.DataFrame(rows, columns=["image_id", "class_id", "score", *BOX])


def tables_of(images, sizes):
    """One table a model from the normalised lists of several images, the images in another order in each."""
    tables = []
    for model in range(len(next(iter(images.values()))[0])):
        parts = []
        for image_id in sorted(images, reverse=model % 2 == 1):
            boxes, scores, labels = (part[model] for part in images[image_id])
            part = pd.DataFrame(denormalise(boxes, sizes.loc[image_id].to_numpy()), columns=BOX)
            parts.append(part.assign(image_id=image_id, class_id=labels, score=scores))
        tables.append(pd.concat(parts, ignore_index=True))
    return tables


@pytest.mark.parametrize(
    "fuse, method, options",
    [
        (fusion.fuse_wbf, peer.weighted_boxes_fusion, {"iou_thr": 0.4, "skip_box_thr": 0.1}),
        (fusion.fuse_wbf, peer.weighted_boxes_fusion, {"iou_thr": 0.5, "conf_type": "absent_model_aware_avg"}),
        (fusion.fuse_nms, peer.nms, {"iou_thr": 0.4}),
        (fusion.fuse_soft_nms, peer.soft_nms, {"thresh": 0.1}),
        (fusion.fuse_nmw, peer.non_maximum_weighted, {"iou_thr": 0.4}),
    ],
)
def test_a_table_is_its_images_fused_one_by_one(fuse, method, options, monkeypatch):
    monkeypatch.setattr(batches, "_ROWS", 100)  # several portions
    # powers of two, so that pixels divided by them are the numbers from before
    sizes = pd.DataFrame({"image_id": [f"i{k}" for k in range(7)], "width": 1024, "height": 2048})
    images = {f"i{k}": predictions(k, 3, 25, 4, decimals=2) for k in range(0, 7, 2)}
    weights = [3, 2, 0.5]
    ours = fusion.fuse_table(tables_of(images, sizes.set_index("image_id")), sizes, weights, fuse, **options)
    assert list(ours["image_id"].unique()) == list(images)
    for threads in (1, 3):
        again = fusion.fuse_table(
            tables_of(images, sizes.set_index("image_id")), sizes, weights, fuse, threads=threads, **options
        )
        pd.testing.assert_frame_equal(again, ours, check_exact=True)
    for image_id, lists in images.items():
        boxes, scores, labels = quietly(method, lists, weights=weights, **options)
        rows = ours[ours["image_id"] == image_id]
        assert (rows["score"].to_numpy() == scores).all() and (rows["class_id"].to_numpy() == labels).all()
        assert (rows[BOX].to_numpy() == denormalise(np.minimum(boxes, 1), [1024, 2048])).all()


def test_table_by_hand():
    first = table(["a", 3, 0.75, 0, 0, 500, 400], ["b", 3, 0.5, 100, 100, 300, 200])
    second = table(["a", 3, 0.25, 0, 0, 500, 200])
    fused = fusion.fuse_table([first, second], SIZES, iou_thr=0.4)
    assert fused.to_numpy().tolist() == [["b", 3, 0.25, 100, 100, 300, 200], ["a", 3, 0.5, 0, 0, 500, 350]]
    assert fused.dtypes.astype(str).tolist()[1:] == ["int64"] + ["float64"] * 5
    assert len(fusion.fuse_table([table()], SIZES)) == len(fusion.fuse_table([table()], SIZES.iloc[:0])) == 0
    assert fusion.fuse_table([table()], SIZES).columns.tolist() == ["image_id", "class_id", "score", *BOX]


def test_no_finding_is_averaged_never_fused():
    first = table(["a", 14, 0.8, 0, 0, 1, 1], ["b", 14, 0.4, 0, 0, 1, 1], ["b", 3, 0.5, 0, 0, 100, 100])
    second = table(["a", 14, 0.2, 0, 0, 1, 1])
    without = table(["a", 3, 1.0, 0, 0, 100, 100])
    fused = fusion.fuse_table([first, second, without], SIZES, [3, 1, 4])
    # a: (3 × 0.8 + 1 × 0.2) / 4; b: (3 × 0.4 + 1 × 0) / 4; the third never uses the class and has no say
    healthy = fused[fused["class_id"] == 14].set_index("image_id")
    np.testing.assert_allclose(healthy["score"][["a", "b"]], [0.65, 0.3], rtol=1e-15)
    assert healthy[BOX].to_numpy().tolist() == [[0, 0, 1, 1]] * 2
    assert fused["image_id"].tolist() == ["b", "b", "a", "a"] and fused["class_id"].tolist() == [3, 14, 3, 14]
    ones = table(["a", 14, 1, 0, 0, 1, 1])
    assert fusion.fuse_table([ones] * 3, SIZES, [0.1, 0.2, 0.7])["score"].tolist() == [1.0]
    assert len(fusion.fuse_table([ones] * 2, SIZES, no_finding=None)) == 1  # then it is a class like any other


def test_fused_boxes_stay_inside():
    tables = [table(["a", 1, score, 0, 0, 1000, 800]) for score in (0.3, 0.1, 0.7, 0.9, 0.77)]
    assert (fusion.fuse_table(tables, SIZES)[BOX].to_numpy() <= [1000, 800, 1000, 800]).all()


GOOD = ["a", 3, 0.5, 0, 0, 10, 10]


@pytest.mark.parametrize(
    "row, message",
    [
        (["z", 3, 0.5, 0, 0, 10, 10], "table 1, row 1, image z has no row in the table of image sizes"),
        ([None, 3, 0.5, 0, 0, 10, 10], "row 1.*no row in the table"),
        (["a", 3.5, 0.5, 0, 0, 10, 10], "table 1, row 1, image a: class id 3.5"),
        (["a", 3, np.nan, 0, 0, 10, 10], "table 1, row 1, image a: score nan"),
        (["a", 3, -1, 0, 0, 10, 10], "row 1.*score -1"),
        (["a", 3, 0.5, 0, 0, 1001, 10], r"row 1, image a: \(0, 0, 1001, 10\) lies outside its image: clip"),
        (["a", 3, 0.5, 0, 0, 10, 801], "outside"),
        (["a", 3, 0.5, 20, 0, 10, 10], "row 1.*inverted"),
        (["a", 3, 0.5, np.nan, 0, 10, 10], "row 1.*finite"),
        (["a", 3, "x", 0, 0, 10, 10], "table 1: the column score must hold numbers"),
        (["a", 14, 0.5, 0, 0, 1000, 800], "row 1.*class 14 must have the box 0 0 1 1"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(InputError, match=message):
        fusion.fuse_table([table(GOOD), table(GOOD, row)], SIZES)


def test_bad_tables():
    double = table(["a", 14, 0.5, 0, 0, 1, 1], GOOD, ["a", 14, 0.5, 0, 0, 1, 1])
    with pytest.raises(InputError, match=r"mine.csv, row 2, image a: a second row of class 14"):
        fusion.fuse_table({"mine.csv": double}, SIZES)
    with pytest.raises(InputError, match=r"row 2, image a: .*inverted"):  # rows counted with those of class 14
        fusion.fuse_table([table(["a", 14, 0.5, 0, 0, 1, 1], GOOD, ["a", 3, 0.5, 9, 0, 1, 1])], SIZES)
    with pytest.raises(InputError, match=r"table 0: .* score, x_min missing"):
        fusion.fuse_table([table(GOOD).drop(columns=["score", "x_min"])], SIZES)
    with pytest.raises(InputError, match="no tables"):
        fusion.fuse_table([], SIZES)
    with pytest.raises(InputError, match="need 1 weights"):
        fusion.fuse_table([table(GOOD)], SIZES, [1, 2])
    with pytest.raises(InputError, match="weights must be positive"):
        fusion.fuse_table([table(GOOD)], SIZES, [0])
    with pytest.raises(InputError, match="sizes: needs"):
        fusion.fuse_table([table(GOOD)], SIZES.drop(columns="width"))
    with pytest.raises(InputError, match="sizes, row 3: image a is missing or there twice"):
        fusion.fuse_table([table(GOOD)], pd.concat([SIZES, SIZES.iloc[1:]], ignore_index=True))
    with pytest.raises(InputError, match="sizes, row 0: image b has no usable"):
        fusion.fuse_table([table(GOOD)], SIZES.assign(width=[0, 1, 1]))


# ---- raters -----------------------------------------------------------------------------------------------------


def raters(*rows):
    return pd.DataFrame(rows, columns=["image_id", "class_id", "rad_id", *BOX])


READ = raters(
    ["b", 14, "R1", np.nan, np.nan, np.nan, np.nan],
    ["a", 3, "R9", 0, 0, 100, 100],
    ["a", 3, "R8", 0, 0, 100, 60],
    ["a", 3, "R8", 0, 0, 100, 50],
    ["a", 3, "R10", 500, 500, 600, 600],
    ["a", 5, "R9", 0, 0, 100, 100],
    ["b", 14, "R2", np.nan, np.nan, np.nan, np.nan],
    ["c", 14, "R2", np.nan, np.nan, np.nan, np.nan],
    ["c", 0, "R1", 7, 8, 9, 10],
)


def test_raters_by_hand():
    fused = fusion.fuse_raters(READ, 0.4)
    # two boxes of R8 and one of R9 make one box with two votes; y_max = (50 + 60 + 100) / 3
    assert fused.columns.tolist() == ["image_id", "class_id", *BOX, "votes", "raters"]
    rows = fused.to_numpy().tolist()
    assert ["a", 3, 0, 0, 100, 70, 2, 3] in rows and ["a", 3, 500, 500, 600, 600, 1, 3] in rows
    assert rows[2:] == [["a", 5, 0, 0, 100, 100, 1, 3], ["b", 14, 0, 0, 1, 1, 2, 2], ["c", 0, 7, 8, 9, 10, 1, 2]]
    kept = fusion.fuse_raters(READ, 0.4, fusion.first_boxes)  # R10, R8, R9 by name; R8's first box has y_max 50
    assert kept.drop(columns=["y_max"]).equals(fused.drop(columns=["y_max"]))
    assert sorted(kept["y_max"][:2]) == [50, 600]


@pytest.mark.parametrize("join", [fusion.mean_boxes, fusion.first_boxes])
def test_the_order_of_the_rows_does_not_matter(join):
    for seed in range(5):
        shuffled = READ.sample(frac=1, random_state=seed)
        pd.testing.assert_frame_equal(fusion.fuse_raters(shuffled, 0.4, join), fusion.fuse_raters(READ, 0.4, join))


def test_raters_nobody_or_nothing():
    assert len(fusion.fuse_raters(READ.iloc[:0])) == 0
    only = fusion.fuse_raters(READ[READ["class_id"] == 14])
    assert only["image_id"].tolist() == ["b", "c"] and only["votes"].tolist() == [2, 1]
    assert fusion.fuse_raters(READ[READ["class_id"] != 14])["class_id"].tolist() == [3, 3, 5, 0]


@pytest.mark.parametrize(
    "row, message",
    [
        (["a", 3, "R1", 0, 0, np.nan, 5], "raters, row 9, image a: .*finite"),
        (["a", 3, "R1", 5, 0, 2, 5], "row 9, image a: .*inverted"),
        (["a", 3, "R1", 5, 0, 5, 5], "row 9, image a: the box has no area"),
        (["a", 3, None, 0, 0, 5, 5], "row 9: needs an image_id and a rad_id"),
        (["a", np.nan, "R1", 0, 0, 5, 5], "row 9, image a: class id nan"),
        (["a", 3, "R1", "x", 0, 5, 5], "the column x_min must hold numbers"),
    ],
)
def test_bad_raters(row, message):
    with pytest.raises(InputError, match=message):
        fusion.fuse_raters(raters(*READ.astype(object).to_numpy().tolist(), row))
    with pytest.raises(InputError, match="rad_id missing"):
        fusion.fuse_raters(READ.drop(columns="rad_id"))


def test_real_raters():
    path = label_table("vinbigdata-train.csv.gz")
    if path is None:
        pytest.skip("torchxrayvision, which carries the label table, is not installed")
    real = pd.read_csv(path)
    fusion.fuse_raters(real.head(100))
    begin = time.process_time()
    fused = fusion.fuse_raters(real, 0.4)
    assert time.process_time() - begin < 40  # some 2 s: a guard against quadratic work, on slow machines too
    assert (len(real), fused["image_id"].nunique(), (fused["class_id"] == 14).sum()) == (67914, 15000, 10606)
    assert (fused["raters"] == 3).all() and fused["votes"].between(1, 3).all()
    # the peer, fed so that its order of equal scores is ours: by rater, then by coordinates
    drawn = real[real["class_id"] != 14]
    for image_id, rows in list(drawn.groupby("image_id"))[::40]:
        for class_id, part in rows.sort_values(["rad_id", *BOX]).groupby("class_id"):
            boxes, order = part[BOX].to_numpy(), np.ones(len(part)).argsort()[::-1]
            fed = np.empty_like(boxes)
            fed[order] = boxes / 4096  # a power of two: nothing is rounded
            lists = [[fed], [np.ones(len(part))], [np.zeros(len(part))]]
            theirs = quietly(peer.weighted_boxes_fusion, lists, iou_thr=0.4)[0] * 4096
            ours = fused[(fused["image_id"] == image_id) & (fused["class_id"] == class_id)][BOX].to_numpy()
            assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))
