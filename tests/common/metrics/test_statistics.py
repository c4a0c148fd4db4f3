"""common.metrics.statistics: intervals against theory, both paths against each other, real predictions."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks.tables import label_table, real_data
from common.errors import InputError
from common.metrics.classification import mean_of_defined
from common.metrics.statistics import (
    Interval,
    as_interval,
    bootstrap,
    bootstrap_auroc,
    format_interval,
    interval_with_p,
    paired_bootstrap,
    resample_aurocs,
)


def patients(seed, n_groups=200, spread=1.0):
    """Values of 1 to 5 images a patient that share the patient's own level."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), rng.integers(1, 6, n_groups))
    return rng.normal(size=n_groups)[groups] * spread + 0.3 * rng.normal(size=len(groups)), groups


def test_interval_prints_as_in_a_table():
    interval = Interval(0.83472, 0.82801, 0.84119)
    assert str(interval) == f"{interval}" == "0.8347 [0.8280, 0.8412]"
    assert f"{interval:.2f}" == "0.83 [0.83, 0.84]"


def test_intervals_of_a_score_file():
    assert as_interval(Interval(0.5, np.nan, 1)) == {"estimate": 0.5, "low": None, "high": 1.0}
    values = {"estimate": 0.5, "low": 0.25, "high": 1.0}
    assert format_interval(values) == "0.5000 [0.2500, 1.0000]" and format_interval(values, 1) == "0.5 [0.2, 1.0]"
    assert format_interval(dict.fromkeys(values)) == "not defined"


def test_two_groups_are_enough():
    assert bootstrap([0.0, 1.0], None) == bootstrap([0.0, 1.0], ["a", "b"]) == Interval(0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("resamples", "p"),
    [([1, 2, 3], 2 / 4), ([-1, -2, -3], 2 / 4), ([-1, 1, 2, 3, 4, 5, 6, 7], 4 / 9), ([0, 1, 2, 3, np.nan], 4 / 5)],
)
def test_p_values_by_hand(resamples, p):
    interval, found = interval_with_p(0.5, np.array(resamples, float), 0.5)
    low, high = np.nanquantile(resamples, [0.25, 0.75])
    assert (interval, found) == (Interval(0.5, low, high), pytest.approx(p))
    assert np.isnan(interval_with_p(np.nan, np.array(resamples, float), 0.5)[1])


def test_both_paths_draw_the_same_patients():
    values, groups = patients(0)
    fast = bootstrap(values, groups, n_resamples=200, seed=3)
    general = bootstrap(lambda rows: values[rows].mean(), groups, n_resamples=200, seed=3)
    assert [general.estimate, general.low, general.high] == pytest.approx([fast.estimate, fast.low, fast.high])
    assert fast == bootstrap(values, groups, n_resamples=200, seed=3)
    assert fast != bootstrap(values, groups, n_resamples=200, seed=4)
    order = np.random.default_rng(1).permutation(len(values))
    shuffled = bootstrap(values[order], groups[order].astype(str), n_resamples=200, seed=3)
    assert shuffled.estimate == pytest.approx(fast.estimate)


def test_single_images_give_the_normal_interval():
    values = np.random.default_rng(0).normal(size=2000)
    interval, error = bootstrap(values, None, n_resamples=2000), values.std() / np.sqrt(2000)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    wide, narrow = bootstrap(values, None, level=0.99), bootstrap(values, None, level=0.5)
    assert wide.low < interval.low < narrow.low < narrow.high < interval.high < wide.high


def test_whole_patients_make_the_interval_as_wide_as_it_is():
    values, groups = patients(1)
    by_patient, by_image = bootstrap(values, groups), bootstrap(values, None)
    assert by_patient.high - by_patient.low > 1.5 * (by_image.high - by_image.low)
    copied = bootstrap(np.repeat(values, 4), np.repeat(groups, 4))  # copies of images are no new evidence
    assert [copied.low, copied.high] == pytest.approx([by_patient.low, by_patient.high])


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = sum(i.low <= 0 <= i.high for i in (bootstrap(*patients(seed, 60), 200, level=0.9) for seed in range(150)))
    assert stats.binomtest(covered, 150, 0.9).pvalue > 1e-3


def test_skipped_images_leave_the_mean():
    values, groups = np.array([1.0, np.nan, 0.0, 1.0, np.nan]), np.array([0, 0, 1, 2, 3])
    with pytest.raises(InputError, match="row 1: the value is NaN"):
        bootstrap(values, groups)
    skipped = bootstrap(values, groups, skip_nan=True)
    assert skipped.estimate == pytest.approx(2 / 3) and 0 <= skipped.low <= skipped.high <= 1


def test_paired_bootstrap_sees_a_difference_that_lies_within_both_intervals():
    values, groups = patients(2)
    better = values + 0.02 + 0.05 * np.random.default_rng(5).normal(size=len(values))
    difference, p_value = paired_bootstrap(better, values, groups)
    assert bootstrap(values, groups).low < bootstrap(better, groups).estimate < bootstrap(values, groups).high
    assert difference.low > 0 and p_value == pytest.approx(2 / 1001)
    assert paired_bootstrap(values, better, groups)[0].estimate == pytest.approx(-difference.estimate)
    same, p_same = paired_bootstrap(values, values, groups)
    assert (same.low, same.high, p_same) == (0, 0, 1)


def test_p_values_of_no_difference_are_uniform():
    rng = np.random.default_rng(7)
    p_values = [paired_bootstrap(rng.normal(size=80), rng.normal(size=80), None, 200)[1] for _ in range(150)]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def weighted_areas(y, score, groups, n_resamples, seed):
    """AUROC (n_resamples, C) by scikit-learn under exponential weights of the groups, in the order of their text."""
    names = sorted(set(groups.tolist()), key=repr)
    drawn = np.random.default_rng(seed).exponential(size=(n_resamples, len(names)))
    weights = drawn[:, [names.index(group) for group in groups.tolist()]]
    columns = range(y.shape[1])
    return np.array([[roc_auc_score(y[:, c], score[:, c], sample_weight=w) for c in columns] for w in weights])


def limits(resamples):
    return np.quantile(resamples, [0.025, 0.975], axis=0)


def test_bootstrap_auroc_equals_scikit_learn_under_every_weight():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 80, 300)
    y = rng.random((300, 3)) < [0.5, 0.2, 0.1]
    score = np.round(rng.random((300, 3)) + 0.3 * y, 1)
    intervals, mean = bootstrap_auroc(y, score, groups, n_resamples=60, seed=2)  # fewer than are drawn at once
    expected = weighted_areas(y, score, groups, 60, 2)
    np.testing.assert_allclose([i.estimate for i in intervals], [roc_auc_score(y[:, c], score[:, c]) for c in range(3)])
    np.testing.assert_allclose(np.transpose([(i.low, i.high) for i in intervals]), limits(expected), atol=1e-6)
    np.testing.assert_allclose([mean.low, mean.high], limits(expected.mean(axis=1)), atol=1e-6)
    assert mean.estimate == pytest.approx(np.mean([i.estimate for i in intervals]))
    order = rng.permutation(300)
    assert bootstrap_auroc(y[order], score[order], groups[order], 60, 2)[1].low == pytest.approx(mean.low)


def test_a_rare_class_stays_in_every_resample():
    rng = np.random.default_rng(1)
    y = np.column_stack([rng.random(400) < 0.5, np.arange(400) < 2])  # the second one: two images of one patient
    groups, score = np.arange(400) // 2, rng.random((400, 2))
    score[:2, 1] = 0.9
    (common, rare), mean = bootstrap_auroc(y, score, groups, n_resamples=200, seed=0)
    resamples = weighted_areas(y, score, groups, 200, 0)
    assert np.isfinite(resamples).all()
    np.testing.assert_allclose([mean.low, mean.high], limits(resamples.mean(axis=1)), atol=1e-6)
    assert common.high < mean.low and rare.low > 0.8  # a mean over the classes that are there would reach down to these


def test_an_unknown_label_changes_its_own_class_alone():
    rng = np.random.default_rng(2)
    groups, y, score = np.arange(200) // 2, (rng.random((200, 2)) < [0.5, 0.1]).astype(float), rng.random((200, 2))
    (_, rare), _ = bootstrap_auroc(y, score, groups, 60)
    y[:3, 0], known = np.nan, np.arange(200) >= 3
    (common, same), mean = bootstrap_auroc(y, score, groups, 60, skip_undefined=True)
    names = sorted(set(groups.tolist()), key=repr)
    drawn = np.random.default_rng(0).exponential(size=(60, len(names)))
    weights = drawn[:, [names.index(group) for group in groups[known].tolist()]]
    expected = [roc_auc_score(y[known, 0], score[known, 0], sample_weight=w) for w in weights]
    np.testing.assert_allclose([common.low, common.high], limits(expected), atol=1e-6)
    assert same == rare and common.low < mean.low < mean.estimate == (common.estimate + rare.estimate) / 2


def paired(y, a, b, groups, n_resamples, seed=0):
    """Return (Interval, p) of AUROC(a) − AUROC(b) of each class and of their mean, as `table` computes them."""
    (of_a, all_a), (of_b, all_b) = (resample_aurocs(y, each, groups, n_resamples, seed, True) for each in (a, b))
    gains = [*zip(of_a - of_b, (all_a - all_b).T, strict=True)]
    gains.append((mean_of_defined(of_a) - mean_of_defined(of_b), mean_of_defined(all_a) - mean_of_defined(all_b)))
    return [interval_with_p(*gain, 0.95) for gain in gains]


def test_paired_differences_weigh_both_alike():
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 60, 200)
    y = rng.random((200, 2)) < [0.4, 0.2]
    a, b = (np.round(rng.random((200, 2)) + shift * y, 1) for shift in (0.4, 0.1))
    *pairs, (mean, p_mean) = paired(y, a, b, groups, 60, 1)
    gains = weighted_areas(y, a, groups, 60, 1) - weighted_areas(y, b, groups, 60, 1)
    gains = np.column_stack([gains, gains.mean(axis=1)])
    for (interval, p_value), resamples in zip([*pairs, (mean, p_mean)], gains.T, strict=True):
        np.testing.assert_allclose([interval.low, interval.high], limits(resamples), atol=1e-6)
        assert p_value == min(1, 2 * (1 + min((resamples <= 0).sum(), (resamples >= 0).sum())) / 61)
    assert mean.estimate == pytest.approx(np.mean([interval.estimate for interval, _ in pairs]))
    turned = paired(y, b, a, groups, 60, 1)[-1]
    assert turned[0].estimate == pytest.approx(-mean.estimate) and turned[1] == p_mean


def test_intervals_of_the_area_cover_the_truth_about_as_often_as_they_say():
    truth, covered = stats.norm.cdf(1 / np.sqrt(2)), 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        y = np.repeat([True, False], [60, 140])[:, None]
        interval = bootstrap_auroc(y, rng.normal(size=y.shape) + y, None, 200, level=0.9)[1]
        covered += interval.low <= truth <= interval.high
    assert stats.binomtest(covered, 150, 0.9).pvalue > 1e-3


def test_paired_differences_of_like_scores_and_of_an_absent_class():
    rng = np.random.default_rng(4)
    y, score = np.column_stack([rng.random(60) < 0.5, np.zeros(60, bool)]), rng.random((60, 2))
    same, absent, (mean, p_mean) = paired(y, score, 2 * score, None, 50)
    assert (same[0].low, same[0].high, same[1]) == (0, 0, 1) and (mean.estimate, p_mean) == (0, 1)
    assert np.isnan([absent[0].estimate, absent[1]]).all()


def test_class_with_one_kind_of_label():
    rng = np.random.default_rng(0)
    y = np.column_stack([rng.random(60) < 0.5, np.zeros(60, bool), np.arange(60) < 1])
    score = rng.random((60, 3))
    with pytest.raises(InputError, match="class 1"):
        bootstrap_auroc(y, score, None)
    intervals, mean = bootstrap_auroc(y, score, None, skip_undefined=True)
    assert np.isnan([intervals[1].estimate, intervals[1].low, intervals[1].high]).all()
    assert intervals[2].low <= intervals[2].estimate <= intervals[2].high
    assert mean.estimate == pytest.approx((intervals[0].estimate + intervals[2].estimate) / 2)


@pytest.mark.parametrize(("call", "message"), [(lambda: bootstrap([1.0, 2.0], ["a"]), "1 groups for 2 images")])
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_public_densenet_on_nih():
    folder, table = real_data("chestxray14"), label_table("Data_Entry_2017_v2020.csv.gz")
    if folder is None or table is None:
        pytest.skip("needs CXR_REAL_DATA with chestxray14, and the package torchxrayvision")
    predictions = pd.read_csv(folder / "densenet121_test_predictions.csv", index_col=0)
    truth = pd.read_csv(table, index_col=0).loc[predictions.index]
    names = [column.removeprefix("prob_") for column in predictions.columns]
    y = truth["Finding Labels"].str.get_dummies("|")[names].to_numpy()
    intervals, mean = bootstrap_auroc(y, predictions.to_numpy(), truth["Patient ID"], n_resamples=100)
    assert len(intervals) == 14
    assert mean.estimate == pytest.approx(0.8384, abs=5e-4) and mean.low < 0.8384 < mean.high
