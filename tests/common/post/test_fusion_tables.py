"""Tables fused, and the boxes of several raters."""

import time

import numpy as np
import pandas as pd
import pytest

from benchmarks.tables import label_table
from common.errors import InputError
from common.post.batches import Batch, group_rows
from common.post.boxes import BOX
from common.post.fusion import fuse_raters, fuse_table
from common.post.suppression import first_boxes
from common.post.wbf import mean_boxes

SIZES = pd.DataFrame({"image_id": ["b", "a", "c"], "width": [2000, 1000, 500], "height": [1000, 800, 400]})


def table(*rows):
    return pd.DataFrame(rows, columns=["image_id", "class_id", "score", *BOX])


def test_table_by_hand():
    first = table(["a", 3, 0.75, 0, 0, 500, 400], ["b", 3, 0.5, 100, 100, 300, 200])
    second = table(["a", 3, 0.25, 0, 0, 500, 200])
    fused = fuse_table([first, second], SIZES, iou_thr=0.4)
    assert fused.to_numpy().tolist() == [["b", 3, 0.25, 100, 100, 300, 200], ["a", 3, 0.5, 0, 0, 500, 350]]
    assert fused.dtypes.astype(str).tolist()[1:] == ["int64"] + ["float64"] * 5
    assert len(fuse_table([table()], SIZES)) == len(fuse_table([table()], SIZES.iloc[:0])) == 0
    assert fuse_table([table()], SIZES).columns.tolist() == ["image_id", "class_id", "score", *BOX]


def test_no_finding_is_averaged_never_fused():
    first = table(["a", 14, 0.8, 0, 0, 1, 1], ["b", 14, 0.4, 0, 0, 1, 1], ["b", 3, 0.5, 0, 0, 100, 100])
    second = table(["a", 14, 0.2, 0, 0, 1, 1])
    without = table(["a", 3, 1.0, 0, 0, 100, 100])
    fused = fuse_table([first, second, without], SIZES, [3, 1, 4])
    # a: (3 × 0.8 + 1 × 0.2) / 4; b: (3 × 0.4 + 1 × 0) / 4; the third never uses the class and has no say
    healthy = fused[fused["class_id"] == 14].set_index("image_id")
    np.testing.assert_allclose(healthy["score"][["a", "b"]], [0.65, 0.3], rtol=1e-15)
    assert healthy[BOX].to_numpy().tolist() == [[0, 0, 1, 1]] * 2
    assert fused["image_id"].tolist() == ["b", "b", "a", "a"] and fused["class_id"].tolist() == [3, 14, 3, 14]
    ones = table(["a", 14, 1, 0, 0, 1, 1])
    assert fuse_table([ones] * 3, SIZES, [0.1, 0.2, 0.7])["score"].tolist() == [1.0]
    assert len(fuse_table([ones] * 2, SIZES, no_finding=None)) == 1  # then it is a class like any other
    zero = table(["a", 0, 0.5, 0, 0, 1, 1], ["a", 3, 0.5, 0, 0, 100, 100])
    assert fuse_table([zero], SIZES, no_finding=0)["class_id"].tolist() == [3, 0]


@pytest.mark.parametrize("class_id", [-3, 0, 2**24 - 1])
def test_without_a_list_of_classes_every_whole_number_that_float32_holds_is_one(class_id):
    assert fuse_table([table(["a", class_id, 0.5, 0, 0, 10, 10])], SIZES)["class_id"].tolist() == [class_id]
    for wrong in (2**24, -(2**24), 0.5):
        with pytest.raises(InputError, match=r"row 0, image a: class id .* is not a whole number"):
            fuse_table([table(["a", wrong, 0.5, 0, 0, 10, 10])], SIZES)


def test_fused_boxes_stay_inside():
    tables = [table(["a", 1, score, 0, 0, 1000, 800]) for score in (0.3, 0.1, 0.7, 0.9, 0.77)]
    assert (fuse_table(tables, SIZES)[BOX].to_numpy() <= [1000, 800, 1000, 800]).all()


GOOD = ["a", 3, 0.5, 0, 0, 10, 10]


@pytest.mark.parametrize(
    "row, message",
    [
        (["z", 3, 0.5, 0, 0, 10, 10], "table 1, row 1, image z: not one of the 3 images"),
        ([None, 3, 0.5, 0, 0, 10, 10], "row 1.*not one of the 3 images"),
        (["a", 3.5, 0.5, 0, 0, 10, 10], "table 1, row 1, image a: class id 3.5"),
        (["a", 3, np.nan, 0, 0, 10, 10], "table 1, row 1, image a: score nan"),
        (["a", 3, -1, 0, 0, 10, 10], "row 1.*score -1"),
        (["a", 3, np.inf, 0, 0, 10, 10], "row 1.*score inf"),
        (["a", 1e9, 0.5, 0, 0, 10, 10], "row 1.*class id 1e"),
        (["a", 3, 0.5, 0, 0, 1001, 10], r"row 1, image a: \(0, 0, 1001, 10\) lies outside its image: clip"),
        (["a", 3, 0.5, 0, 0, 10, 801], "outside"),
        (["a", 3, 0.5, 20, 0, 10, 10], "row 1.*inverted"),
        (["a", 3, 0.5, np.nan, 0, 10, 10], "row 1.*finite"),
        (["a", 3, "x", 0, 0, 10, 10], "table 1, row 1, image a: score is 'x', not a number"),
        (["a", 14, 0.5, 0, 0, 1000, 800], "row 1.*class 14 .no finding. must have the box 0 0 1 1"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(InputError, match=message):
        fuse_table([table(GOOD), table(GOOD, row)], SIZES)


def test_bad_tables():
    double = table(["a", 14, 0.5, 0, 0, 1, 1], GOOD, ["a", 14, 0.5, 0, 0, 1, 1])
    with pytest.raises(InputError, match=r"mine.csv, row 2, image a: a second row of class 14"):
        fuse_table({"mine.csv": double}, SIZES)
    with pytest.raises(InputError, match=r"row 2, image a: .*inverted"):  # rows counted with those of class 14
        fuse_table([table(["a", 14, 0.5, 0, 0, 1, 1], GOOD, ["a", 3, 0.5, 9, 0, 1, 1])], SIZES)
    with pytest.raises(InputError, match=r"table 0: .* score, x_min missing"):
        fuse_table([table(GOOD).drop(columns=["score", "x_min"])], SIZES)
    with pytest.raises(InputError, match="no tables"):
        fuse_table([], SIZES)
    with pytest.raises(InputError, match="need 1 weights"):
        fuse_table([table(GOOD)], SIZES, [1, 2])
    with pytest.raises(InputError, match="weights must be positive"):
        fuse_table([table(GOOD)], SIZES, [0])
    with pytest.raises(InputError, match="sizes: needs"):
        fuse_table([table(GOOD)], SIZES.drop(columns="width"))
    with pytest.raises(InputError, match="sizes, row 3, image a: missing or repeated"):
        fuse_table([table(GOOD)], pd.concat([SIZES, SIZES.iloc[1:]], ignore_index=True))
    with pytest.raises(InputError, match="sizes, row 1, image a: no usable"):
        fuse_table([table(GOOD)], SIZES.assign(width=[1, 0, 1]))


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
    fused = fuse_raters(READ, 0.4)
    # two boxes of R8 and one of R9 make one box with two votes; y_max = (50 + 60 + 100) / 3
    assert fused.columns.tolist() == ["image_id", "class_id", *BOX, "votes", "raters"]
    rows = fused.to_numpy().tolist()
    assert ["a", 3, 0, 0, 100, 70, 2, 3] in rows and ["a", 3, 500, 500, 600, 600, 1, 3] in rows
    assert rows[2:] == [["a", 5, 0, 0, 100, 100, 1, 3], ["b", 14, 0, 0, 1, 1, 2, 2], ["c", 0, 7, 8, 9, 10, 1, 2]]
    kept = fuse_raters(READ, 0.4, first_boxes)  # R10, R8, R9 by name; R8's first box has y_max 50
    assert kept.drop(columns=["y_max"]).equals(fused.drop(columns=["y_max"]))
    assert sorted(kept["y_max"][:2]) == [50, 600]


@pytest.mark.parametrize("join", [mean_boxes, first_boxes])
def test_the_order_of_the_rows_does_not_matter(join):
    for seed in range(5):
        shuffled = READ.sample(frac=1, random_state=seed)
        pd.testing.assert_frame_equal(fuse_raters(shuffled, 0.4, join), fuse_raters(READ, 0.4, join))


def test_raters_nobody_or_nothing():
    assert len(fuse_raters(READ.iloc[:0])) == 0
    only = fuse_raters(READ[READ["class_id"] == 14])
    assert only["image_id"].tolist() == ["b", "c"] and only["votes"].tolist() == [2, 1]
    assert fuse_raters(READ[READ["class_id"] != 14])["class_id"].tolist() == [3, 3, 5, 0]


@pytest.mark.parametrize(
    "row, message",
    [
        (["a", 3, "R1", 0, 0, np.nan, 5], "raters, row 9, image a: .*finite"),
        (["a", 3, "R1", 5, 0, 2, 5], "row 9, image a: the box has no area"),
        (["a", 3, "R1", 5, 0, 5, 5], "row 9, image a: the box has no area"),
        (["a", 3, None, 0, 0, 5, 5], "row 9, image a: needs an image_id and a rad_id"),
        (["a", np.nan, "R1", 0, 0, 5, 5], "row 9, image a: class id nan"),
        (["a", 3, "R1", "x", 0, 5, 5], "row 9, image a: x_min is 'x', not a number"),
    ],
)
def test_bad_raters(row, message):
    with pytest.raises(InputError, match=message):
        fuse_raters(raters(*READ.astype(object).to_numpy().tolist(), row))
    with pytest.raises(InputError, match="rad_id missing"):
        fuse_raters(READ.drop(columns="rad_id"))


def test_real_raters():
    path = label_table("vinbigdata-train.csv.gz")
    if path is None:
        pytest.skip("torchxrayvision, which carries the label table, is not installed")
    real = pd.read_csv(path)
    fuse_raters(real.head(100))
    begin = time.process_time()
    fused = fuse_raters(real, 0.4)
    assert time.process_time() - begin < 40  # some 2 s: a guard against quadratic work, on slow machines too
    assert (len(real), fused["image_id"].nunique(), (fused["class_id"] == 14).sum()) == (67914, 15000, 10606)
    assert (fused["raters"] == 3).all() and fused["votes"].between(1, 3).all()
    peer = pytest.importorskip("ensemble_boxes", reason="the oracle ensemble-boxes is not installed")
    # the peer, fed so that its order of equal scores is ours: by rater, then by coordinates
    drawn = real[real["class_id"] != 14]
    for image_id, rows in list(drawn.groupby("image_id"))[::40]:
        for class_id, part in rows.sort_values(["rad_id", *BOX]).groupby("class_id"):
            boxes, order = part[BOX].to_numpy(), np.ones(len(part)).argsort()[::-1]
            fed = np.empty_like(boxes)
            fed[order] = boxes / 4096  # a power of two: nothing is rounded
            lists = [[fed], [np.ones(len(part))], [np.zeros(len(part))]]
            theirs = peer.weighted_boxes_fusion(*lists, iou_thr=0.4)[0] * 4096
            ours = fused[(fused["image_id"] == image_id) & (fused["class_id"] == class_id)][BOX].to_numpy()
            assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))


def test_boxes_without_area_are_left_out_of_their_groups_and_the_rest_stays():
    boxes = np.array([[0, 0, 1, 1], [0.5, 0.5, 0.5, 1], [0, 0, 0.5, 0.5], [0.2, 0.2, 0.4, 0.4]])
    scores, labels, models = np.array([0.9, 0.8, 0.7, 0.6]), np.array([2, 1, 1, 2]), np.zeros(4, np.int64)
    weights = np.array([0.5])
    for by_label, order in ((True, [2, 0, 3]), (False, [0, 3, 2])):
        found = group_rows(Batch(boxes, scores, labels, models, np.array([0, 4]), 1), weights, by_label)
        rows, weighted, groups, firsts = (part.tolist() for part in found)
        assert rows == order and weighted == [scores[row] / 2 for row in order]
        assert groups == ([0, 1, 3] if by_label else [0, 2, 3]) and firsts == [0, 2]


def test_raters_without_a_finding_get_class_0_where_it_means_no_finding():
    raters = pd.DataFrame(
        [("a", 0, "r1", 0.0, 0.0, 1.0, 1.0), ("a", 0, "r2", 0.0, 0.0, 1.0, 1.0)],
        columns=["image_id", "class_id", "rad_id", *BOX],
    )
    assert fuse_raters(raters, no_finding=0)["class_id"].tolist() == [0]
