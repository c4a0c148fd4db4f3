"""Figures of predictions, against tables worked out by hand and the numbers of others."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from common.data.folds import make_folds
from common.errors import InputError
from common.metrics.calibration import choose_thresholds
from solutions.covid19.comparison import (
    RATES,
    auroc_interval,
    fold_table,
    nested_thresholds,
    pooled_rates,
    read_probabilities,
    same_source,
    summarise,
)


def table(label, probability, fold=0, role="main", home=False, patients=None):
    """Out-of-fold predictions, a patient each unless told otherwise."""
    patients = [f"p{k}" for k in range(len(label))] if patients is None else patients
    return pd.DataFrame(
        {
            "image_id": [f"i{k}" for k in range(len(label))],
            "fold": fold,
            "label": label,
            "probability": np.asarray(probability, float),
            "role": role,
            "home": home,
            "patient_id": patients,
        }
    )


# ---- folds ---------------------------------------------------------------------------------------------------------


def test_a_row_a_fold_counted_by_hand():
    oof = table([1, 1, 0, 0, 0, 1, 0, 0], [0.9, 0.4, 0.5, 0.1, 0.2, 0.5, 0.3, 0.4], fold=[3, 3, 3, 3, 3, 1, 1, 1])
    found = fold_table(oof, np.full(8, 0.5))
    assert found[["fold", "images", "tp", "fn", "tn", "fp"]].to_numpy().tolist() == [
        [1, 3, 1, 0, 2, 0],
        [3, 5, 1, 1, 2, 1],  # what reaches the threshold is called: 0.5 is
    ]
    np.testing.assert_allclose(found[[*RATES]], [[1, 1, 1], [3 / 5, 1 / 2, 2 / 3]])
    cuts = oof["fold"].map({3: 0.15, 1: 0.95}).to_numpy()
    found = fold_table(oof, cuts)
    assert found[["tp", "fn", "tn", "fp"]].to_numpy().tolist() == [[0, 1, 2, 0], [2, 0, 1, 2]]


def test_a_fold_without_one_of_the_labels_has_no_figure_for_it():
    row = fold_table(table([1, 1, 1], [0.9, 0.9, 0.1]), np.full(3, 0.5)).iloc[0]
    assert np.isnan(row[["specificity", "specificity_low", "specificity_high"]].astype(float)).all()
    assert row["sensitivity"] == row["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_wilson_s(right, of, low, high):
    called = np.arange(of) < right
    row = fold_table(table(np.ones(of, int), called.astype(float)), np.full(of, 0.5)).iloc[0]
    assert row["sensitivity"] == right / of
    assert (row["sensitivity_low"], row["sensitivity_high"]) == pytest.approx((low, high), abs=5e-5)
    p, z = right / of, 1.959963984540054
    middle, half = p + z**2 / (2 * of), z * np.sqrt(p * (1 - p) / of + z**2 / (4 * of**2))
    assert row["accuracy_low"] == pytest.approx(max(0, (middle - half) / (1 + z**2 / of)), abs=1e-12)
    assert row["accuracy_high"] == pytest.approx((middle + half) / (1 + z**2 / of), abs=1e-12)


# ---- thresholds ----------------------------------------------------------------------------------------------------


def test_each_fold_s_threshold_is_chosen_on_the_others():
    # alone, fold 0 parts at 0.35, fold 1 at 0.75
    oof = table([0, 0, 1, 1, 0, 0, 1, 1], [0.1, 0.3, 0.4, 0.6, 0.2, 0.7, 0.8, 0.9], fold=[0, 0, 0, 0, 1, 1, 1, 1])
    chosen, cuts = nested_thresholds(oof)
    assert cuts == pytest.approx([0.75] * 4 + [0.35] * 4)
    assert chosen == pytest.approx(0.35)  # all together: 4 of 4 and 3 of 4
    assert fold_table(oof, cuts)[["tp", "fn", "tn", "fp"]].to_numpy().tolist() == [[0, 2, 2, 0], [2, 0, 1, 1]]


def test_a_fold_whose_others_have_one_label_takes_a_half():
    oof = table([1, 1, 0, 1], [0.9, 0.8, 0.1, 0.7], fold=[0, 0, 1, 1])
    chosen, cuts = nested_thresholds(oof)
    assert cuts.tolist()[2:] == [0.5, 0.5] and chosen == pytest.approx(0.4)


def test_one_fold_alone_and_labels_of_one_kind():
    oof = table([0, 0, 1, 1, 0, 0, 1, 1], [0.1, 0.3, 0.4, 0.6, 0.2, 0.7, 0.8, 0.9], fold=5)
    chosen, cuts = nested_thresholds(oof)
    halves = make_folds(oof[["label"]].to_numpy(), 2, oof["patient_id"].to_numpy(), 0)
    for half in (0, 1):  # each by the other's
        other = oof[halves != half]
        (cut,) = choose_thresholds(other[["label"]].to_numpy(), other[["probability"]].to_numpy())
        assert (cuts[halves == half] == cut).all()
    assert len(set(cuts)) == 2 and chosen == pytest.approx(0.35)
    with pytest.raises(InputError, match="with and without COVID-19"):
        nested_thresholds(table([1, 1, 1], [0.1, 0.2, 0.3], fold=[0, 1, 1]))


# ---- pooled --------------------------------------------------------------------------------------------------------


def test_rates_and_their_intervals_draw_patients():
    label, probs = np.tile([1, 1, 0, 0, 0], 20), np.tile([0.9, 0.2, 0.1, 0.2, 0.8], 20)
    alone = pooled_rates(table(label, probs), np.full(100, 0.5))
    assert [alone[name].estimate for name in RATES] == pytest.approx([0.6, 0.5, 2 / 3])
    grouped = pooled_rates(table(label, probs, patients=[f"p{k // 25}" for k in range(100)]), np.full(100, 0.5))
    assert grouped["accuracy"].estimate == alone["accuracy"].estimate
    width = {name: (interval.high - interval.low) for name, interval in alone.items()}
    assert width["sensitivity"] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 40), rel=0.15)
    assert grouped["accuracy"].high - grouped["accuracy"].low < 1e-9 < width["accuracy"]  # all groups are alike
    again = pooled_rates(table(label, probs), np.full(100, 0.5))
    assert again == alone and pooled_rates(table(label, probs), np.full(100, 0.5), seed=1) != alone


def test_a_rate_of_no_image_is_not_defined():
    found = pooled_rates(table([1, 1], [0.9, 0.1]), np.full(2, 0.5))
    assert np.isnan(found["specificity"].estimate) and found["sensitivity"].estimate == 0.5


def test_auroc_interval():
    label, probs = np.tile([1, 1, 0, 0], 10), np.random.default_rng(0).uniform(size=40)
    names = [f"p{k // 2}" for k in range(40)]
    found = auroc_interval(label, probs, names)
    assert found.estimate == pytest.approx(roc_auc_score(label, probs)) and found.low < found.estimate < found.high
    assert np.isnan(auroc_interval(np.ones(40), probs, names).estimate)
    assert np.isnan(auroc_interval(label, probs, ["p"] * 40).low)


# ---- the same collections ------------------------------------------------------------------------------------------


@pytest.fixture
def leaning():
    """30 COVID-19 and 30 other images of Home, 30 of Elsewhere that alone are told apart, a patient for every two."""
    rng, n = np.random.default_rng(0), 30
    probs = np.concatenate([rng.uniform(0.6, 0.9, 2 * n), rng.uniform(0.1, 0.4, n)])
    return table(
        [1] * n + [0] * 2 * n,
        probs,
        role=["main"] * n + ["same_source"] * n + ["main"] * n,
        home=[True] * 2 * n + [False] * n,
        fold=np.arange(3 * n) % 2,
        patients=[f"p{k // 2}" for k in range(3 * n)],
    )


def test_the_same_collections_and_the_fall(leaning):
    found, home = same_source(leaning), leaning[leaning["home"]]
    expected = roc_auc_score(home["label"], home["probability"])
    assert found["auroc"]["estimate"] == pytest.approx(expected) and 0.3 < expected < 0.7
    assert found["auroc"]["low"] < 0.5 < found["auroc"]["high"]
    assert found["fall"]["estimate"] == pytest.approx(1 - expected)  # the headline is 1
    assert 0 < found["fall"]["low"] < found["fall"]["estimate"] < found["fall"]["high"]
    assert found["specificity"]["estimate"] == 0.0  # all of them are called
    assert (found["negatives"], found["positives"], found["patients"]) == (30, 30, 30)
    assert found["trained_on"] is False
    assert same_source(leaning.assign(role="main"))["trained_on"] is True


def test_no_fall_where_the_collections_are_judged_alike(leaning):
    probs = np.random.default_rng(1).uniform(size=90) / 2 + 0.4 * leaning["label"]
    fall = same_source(leaning.assign(probability=probs))["fall"]
    assert fall["low"] < 0 < fall["high"] and abs(fall["estimate"]) < 0.1


@pytest.mark.parametrize("gone", [lambda t: t["home"] & (t["label"] == 0), lambda t: t["label"] == 1])
def test_without_both_kinds_the_same_collections_say_nothing(leaning, gone):
    assert same_source(leaning[~gone(leaning)]) is None


def test_a_fall_of_so_few_patients_that_a_draw_may_miss_them():
    oof = table(
        [1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1], role=["main", "main", "same_source", "main"], home=[True, True, True, False]
    )
    fall = same_source(oof)["fall"]
    assert fall["estimate"] == pytest.approx(1 - 0.5) and fall["low"] <= 0.5 <= fall["high"]


def test_images_of_unknown_finding_do_not_count(leaning):
    odd = leaning.iloc[:3].assign(label=-1, role="", patient_id=["u1", "u2", "u3"])
    assert same_source(pd.concat([leaning, odd], ignore_index=True)) == same_source(leaning)


# ---- the summary ---------------------------------------------------------------------------------------------------


def test_summary(leaning):
    of_fold = {0: 0.7, 1: 0.35}
    cuts = leaning.loc[leaning["role"] == "main", "fold"].map(of_fold).to_numpy()
    found = summarise(leaning, cuts)
    main = leaning[leaning["role"] == "main"]
    right = (main["probability"] >= cuts) == main["label"]
    assert found["auroc"]["estimate"] == 1.0 and found["accuracy"]["estimate"] == 1.0
    assert found["tuned"]["accuracy"]["estimate"] == pytest.approx(right.mean()) and right.mean() < 1
    assert found["tuned"]["sensitivity"]["estimate"] == pytest.approx(right[main["label"] == 1].mean())
    assert (found["images"], found["patients"], found["folds"]) == (60, 30, 2)
    assert found["same_source"] == same_source(leaning)
    # the images that are scored alone change nothing but the figures of the same collections
    assert summarise(main, cuts) == found | {"same_source": None}


def test_a_summary_is_plain_json_also_where_little_is_defined():
    one = summarise(table([1, 0], [0.9, 0.1], fold=4), [0.5, 0.5])
    assert one["same_source"] is None
    with pytest.raises(InputError, match="at least two patients"):
        summarise(table([1, 0], [0.9, 0.1], patients=["a", "a"]), [0.5, 0.5])
    assert json.loads(json.dumps(one, allow_nan=False)) == one


def test_names_of_files_are_those_of_a_run_s_images(tmp_path):
    (tmp_path / "p.csv").write_text("image,probability\ncase 1 day 0.png,0.5\ncase(3).png,0.25\n")
    assert read_probabilities(tmp_path / "p.csv")["probability"].to_dict() == {"case-1-day-0": 0.5, "case-3-": 0.25}
