import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from common.infer.ensemble import mean_masks, mean_tables


def table(ids, a, b=None, fold=None):
    columns = {
        "image_id": list(ids),
        **({"fold": fold} if fold is not None else {}),
        "a": a,
        "b": a if b is None else b,
    }
    return pd.DataFrame(columns)


def test_means_by_hand_in_the_first_tables_order():
    first, second = table("xyz", [0.0, 0.5, 1.0], [1, 1, 1]), table("zyx", [0.0, 0.1, 0.4], [0, 0, 0])
    plain = mean_tables([first, second])
    assert plain["image_id"].tolist() == ["x", "y", "z"] and plain.columns.tolist() == ["image_id", "a", "b"]
    np.testing.assert_allclose(plain["a"], [0.2, 0.3, 0.5])
    weighted = mean_tables([first, second], weights=[3, 1])
    np.testing.assert_allclose(weighted["a"], [0.1, 0.4, 0.75])
    np.testing.assert_allclose(weighted["b"], [0.75] * 3)


def test_rank_means_by_hand():
    first, second = table("xyzw", [0.1, 0.2, 0.3, 0.4]), table("xyzw", [1e-4, 1e-4, 3e-4, 2e-4])
    # (rank − ½) / 4: ⅛ ⅜ ⅝ ⅞ and, the tie at rank 1.5, ¼ ¼ ⅞ ⅝
    expected = [(0.125 + 0.25) / 2, (0.375 + 0.25) / 2, (0.625 + 0.875) / 2, (0.875 + 0.625) / 2]
    np.testing.assert_allclose(mean_tables([first, second], by_rank=True)["a"], expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.integers(1, 3))
def test_copies_of_one_table_average_to_it(values, copies):
    one = table([f"i{k}" for k in range(len(values))], values)
    shuffled = [one.sample(frac=1, random_state=seed) for seed in range(copies)]
    np.testing.assert_allclose(mean_tables([one, *shuffled])[["a", "b"]], one[["a", "b"]], atol=1e-12)


def test_a_fold_stays_where_all_agree():
    same = mean_tables([table("xy", [0, 1], fold=[0, 1]), table("yx", [0, 1], fold=[1, 0])])
    assert same["fold"].tolist() == [0, 1] and same.columns[1] == "fold"
    other = mean_tables([table("xy", [0, 1], fold=[0, 0]), table("xy", [0, 1], fold=[0, 1])])
    assert other["fold"].tolist() == [0, -1]


@pytest.mark.parametrize(
    ("second", "line"),
    [
        (table("xw", [0, 1]), "table 2: image '[wy]' is in only one"),
        (table("xx", [0, 1]), "table 2: image 'x' twice"),
        (table("xy", [0, 1]).rename(columns={"b": "c"}), r"table 2: columns \['image_id', 'a', 'c'\]"),
        (table("xy", [0, np.nan]), "table 2: image 'y' has a cell without a number"),
        (table("xy", ["0", "?"]), "table 2: image 'y' has a cell without a number"),
    ],
)
def test_tables_that_disagree_are_named(second, line):
    with pytest.raises(InputError, match=line):
        mean_tables([table("xy", [0, 1]), second])


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")]])
def test_unusable_weights_are_named(weights):
    with pytest.raises(InputError, match="for 2 inputs: one each"):
        mean_tables([table("x", [0]), table("x", [0])], weights)


def test_no_tables_are_refused():
    with pytest.raises(InputError, match="for 0 inputs"):
        mean_tables([])


def test_mask_means_round_halves_up(tmp_path):
    a = np.array([0, 1, 255, 254, 10], dtype=np.uint8).reshape(5, 1, 1)
    b = np.array([0, 2, 255, 255, 20], dtype=np.uint8).reshape(5, 1, 1)
    np.save(tmp_path / "a.npy", a)
    ids = [list("vwxyz")] * 2
    mean = mean_masks([tmp_path / "a.npy", b], ids, tmp_path / "mean.npy", chunk=2)
    assert isinstance(mean, np.memmap) and mean.ravel().tolist() == [0, 2, 255, 255, 15]
    weighted = mean_masks([a, b], ids, tmp_path / "w.npy", weights=[3, 1])
    assert weighted.ravel().tolist() == [0, 1, 255, 254, 13]  # 12.5 rounds up


def test_six_masks_whose_mean_is_a_half_in_no_binary_fraction(tmp_path):
    masks = [np.full((1, 1, 1), value, np.uint8) for value in (1, 1, 1, 0, 0, 0)]
    assert mean_masks(masks, [["x"]] * 6, tmp_path / "m.npy").item() == 1


@pytest.mark.parametrize(
    ("second", "ids", "line"),
    [
        (np.zeros((2, 4, 4), np.uint8), ["x", "z"], "masks 2: row 1 is 'z', in the first it is 'y'"),
        (np.zeros((2, 4, 4), np.uint8), ["x"], "masks 2: uint8 .* of 1 ids"),
        (np.zeros((2, 4, 5), np.uint8), ["x", "y"], r"not uint8 \(2, 4, 4\)"),
        (np.zeros((2, 4, 4), np.float32), ["x", "y"], "masks 2: float32"),
        ("gone.npy", ["x", "y"], "gone.npy: not a readable .npy file"),
    ],
)
def test_masks_that_disagree_are_named(tmp_path, second, ids, line):
    with pytest.raises(InputError, match=line):
        mean_masks([np.zeros((2, 4, 4), np.uint8), second], [["x", "y"], ids], tmp_path / "m.npy")
    assert not (tmp_path / "m.npy").exists()
