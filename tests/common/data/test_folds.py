"""common.data.folds: no shared group, even labels, the same folds for the same images, and files that round-trip."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tables import label_table
from common.data.folds import group_codes, holdout, load_folds, make_folds, quartile_strata, save_folds, shared_groups
from common.errors import InputError
from tests.running import prevalence_deviation


def table(seed, n=400, n_groups=120, n_labels=4):
    """Random multilabel rows with shares from 30 % down to 3 %, and patients of uneven size."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, n_labels)) < np.geomspace(0.3, 0.03, n_labels)).astype(int)
    return labels, (n_groups * rng.random(n) ** 2).astype(int)


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_whole_and_labels_are_even(seed):
    labels, groups = table(seed)
    folds = make_folds(labels, 5, groups, seed)
    assert folds.dtype == np.int64 and set(folds) == set(range(5))
    assert shared_groups(folds, groups) == 0
    counts = np.array([labels[folds == k].sum(axis=0) for k in range(5)])
    assert (np.ptp(counts, axis=0) <= 0.12 * labels.sum(axis=0) + 2).all()
    assert np.ptp(np.bincount(folds)) <= 8


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-2, 4), min_size=12, max_size=80), st.integers(2, 6), st.integers(0, 99))
def test_single_images_of_a_class_spread_to_within_one(classes, n_folds, seed):
    folds = make_folds(np.array(classes), n_folds, seed=seed)
    for c in set(classes):
        counts = np.bincount(folds[np.array(classes) == c], minlength=n_folds)
        assert counts.max() - counts.min() <= (2 if c == max(classes, key=classes.count) else 1)
    assert np.ptp(np.bincount(folds, minlength=n_folds)) <= 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 7))
def test_the_order_of_the_rows_does_not_matter(seed, n_folds):
    labels, groups = table(seed, n=90, n_groups=40)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    folds = make_folds(labels, n_folds, groups, seed)
    assert (make_folds(labels[shuffled], n_folds, groups[shuffled], seed) == folds[shuffled]).all()
    sets = labels @ (1 << np.arange(labels.shape[1]))
    alone, alone_shuffled = make_folds(labels, n_folds), make_folds(labels[shuffled], n_folds)
    assert (pd.crosstab(sets, alone).to_numpy() == pd.crosstab(sets[shuffled], alone_shuffled).to_numpy()).all()


def test_the_seed_alone_decides():
    labels, groups = table(0)
    assert (make_folds(labels, 5, groups, 1) == make_folds(labels, 5, groups, 1)).all()
    assert (make_folds(labels, 5, groups, 1) != make_folds(labels, 5, groups, 2)).mean() > 0.2
    assert (make_folds(labels[:, 0], 5, seed=1) != make_folds(labels[:, 0], 5, seed=2)).mean() > 0.2


@pytest.mark.parametrize(
    "rename", [str, float, lambda g: (g, "a"), lambda g: g if g % 2 else str(g)], ids=["str", "float", "tuple", "mixed"]
)
def test_any_hashable_value_is_a_group(rename):
    labels, groups = table(3)
    assert shared_groups(make_folds(labels, 4, [rename(g) for g in groups]), groups) == 0


def test_groups_of_a_filtered_table_keep_their_rows():
    groups = pd.Series(["b", "a", "b"], index=[7, 3, 5])
    assert group_codes(groups, 3).tolist() == [1, 0, 1]


def test_rare_class_lands_in_different_folds():
    labels = np.zeros((50, 1), int)
    labels[[4, 17, 30]] = 1
    folds = make_folds(labels, 5)
    assert len(set(folds[[4, 17, 30]])) == 3
    assert np.bincount(folds).tolist() == [10] * 5


def test_a_class_that_never_occurs_changes_nothing():
    labels, groups = table(1)
    wider = np.column_stack([labels, np.zeros(len(labels), int)])
    assert (make_folds(wider, 5, groups) == make_folds(labels, 5, groups)).all()


def test_one_giant_group_leaves_no_fold_empty():
    labels = np.r_[np.zeros(90, int), np.arange(4)]
    groups = np.r_[np.zeros(90, int), 1 + np.arange(4)]
    assert sorted(np.bincount(make_folds(labels, 5, groups))) == [1, 1, 1, 1, 90]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.8])
def test_holdout_takes_its_share_of_every_label(fraction):
    labels, groups = table(5, n=4000, n_groups=1500)
    chosen = holdout(labels, fraction, groups)
    assert chosen.dtype == bool and shared_groups(chosen, groups) == 0
    assert abs(chosen.mean() - fraction) < 0.005
    assert prevalence_deviation(labels, chosen) < 0.05


def test_holdout_of_one_class_is_rounded_to_the_nearest_number():
    for n in range(3, 60):  # cost (2·filled + share) / size is Sainte-Laguë's rule; without the 2, D'Hondt's, it is not
        assert abs(holdout(np.zeros(n, int), 0.2).sum() - 0.2 * n) <= 0.5
    present = np.arange(12_047) < 2_669
    chosen = holdout(present, 0.2)
    assert chosen.sum() == 2409 and chosen[present].sum() == 534  # SIIM: 2409.4 and 533.8


def test_prevalence_deviation_by_hand():
    folds = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    one_column = np.array([[1], [0], [0], [0], [1], [0], [0], [0]])
    assert prevalence_deviation(one_column, folds) == 0
    two_of_three = np.array([[1, 0], [1, 0], [0, 0], [0, 0], [1, 0], [1, 0], [1, 0], [1, 0]])
    assert prevalence_deviation(two_of_three, folds) == pytest.approx(1.0)  # rows without a label: 2/4 against 2/8


def test_shared_groups_by_hand():
    assert shared_groups([0, 0, 1, 1, 1], ["a", "b", "b", "c", "c"]) == 2
    assert shared_groups([0, 1, 2, 0], ["a", "a", "a", "b"]) == 3


def test_quartile_strata_by_hand():
    present = np.array([True, False, True, True, True, False, True])
    area = np.array([10, 0, 40, 20, 30, np.nan, 50.0])  # quartiles of 10 … 50: 20, 30, 40
    assert quartile_strata(present, area).tolist() == [1, 0, 3, 1, 2, 0, 4]
    assert quartile_strata(np.zeros(3, bool), np.zeros(3)).tolist() == [0, 0, 0]
    assert quartile_strata(np.ones(2, bool), np.array([0, 5])).tolist() == [1, 4]  # no area is an area


def test_folds_round_trip_in_another_order(tmp_path):
    ids, path = ["1.2.3", "NA", "007", "a,b"], tmp_path / "deep" / "folds.csv"
    save_folds(path, ids, np.array([0, 2, 1, 2]), groups=[5, 6, 7, 6], note="5 folds\nby patient")
    assert path.read_text().splitlines()[:3] == ["# 5 folds by patient", "image_id,fold,group", "1.2.3,0,5"]
    assert load_folds(path, ids[::-1]).tolist() == [2, 1, 2, 0]
    save_folds(path, ids, np.array([0, 2, 1, 2]))
    assert path.read_text().startswith("image_id,fold\n1.2.3,0\n")
    assert load_folds(path, ids).dtype == np.int64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_id,fold\na,0\n", "1 images missing, the first is 'b'"),
        ("image_id,fold\na,0\nb,1\nc,1\n", "1 images not in the image table, the first is 'c'"),
        ("image_id,fold\na,0\nb,1\na,1\n", "'a' appears twice"),
        ("image_id,fold\na,0\nb,one\n", "without a valid fold, the first is 'b'"),
        ("image_id,fold\na,0\nb,-1\n", "without a valid fold, the first is 'b'"),
        ("image_id,fold\na,0\nb\n", "without a valid fold, the first is 'b'"),
        ("id,fold\na,0\n", "header"),
        ("", "empty file"),
    ],
)
def test_unusable_fold_files_are_named(tmp_path, text, message):
    path = tmp_path / "folds.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_folds(path, ["a", "b"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_folds([0, 1, 0], 4), "4 folds need as many groups, there are 3"),
        (lambda: make_folds([0, 1, 0], 3, ["a", "a", "b"]), "there are 2"),
        (lambda: make_folds([0, 1, 0], 2, ["a", "b"]), "2 groups for 3 images"),
        (lambda: make_folds([0, 1, 0], 2, ["a", None, "b"]), "row 1: the group is missing"),
        (lambda: make_folds([0, 1, 0], 2, np.array([1, 2, np.nan])), "row 2: the group is missing"),
        (lambda: make_folds([0, 1, 0], 2, [["a"], ["b"], ["c"]]), "groups are not usable"),
        (lambda: holdout([0, 1, 0], 1.0), "fraction"),
        (lambda: holdout([0, 1, 0], 0.0), "fraction"),
        (lambda: holdout([0, 1, 0], float("nan")), "fraction"),
        (lambda: load_folds("none.csv", ["a"]), "none.csv: no such file"),
        (lambda: save_folds("unwritten.csv", ["a", "a"], np.array([0, 1])), "'a' appears twice"),
    ],
)
def test_bad_input_is_refused(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        call()
    assert not list(tmp_path.iterdir())


def test_nih_table_keeps_its_promise():
    path = label_table("Data_Entry_2017_v2020.csv.gz")
    if path is None:
        pytest.skip("the NIH table comes with the package torchxrayvision")
    nih = pd.read_csv(path, usecols=["Finding Labels", "Patient ID"])
    labels = nih["Finding Labels"].str.get_dummies("|").drop(columns="No Finding").to_numpy()
    folds = make_folds(labels, 5, nih["Patient ID"])
    assert shared_groups(folds, nih["Patient ID"]) == 0
    assert prevalence_deviation(labels, folds) <= 0.015
    assert np.abs(np.bincount(folds) * 5 / len(folds) - 1).max() <= 0.01
    by_image = make_folds(labels, 5)
    assert shared_groups(by_image, nih["Patient ID"]) > 0.5 * len(nih)
