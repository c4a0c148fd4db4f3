"""common.metrics.statistics: by hand, against all pairs counted one by one, and published figures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from common.errors import InputError
from common.metrics.statistics import bootstrap_auroc, delong_covariance, delong_intervals, delong_test


def all_pairs(y, scores):
    """The definition: every positive compared with every negative."""
    placements = []
    for score in np.asarray(scores, float).T:
        positive, negative = score[y == 1], score[y == 0]
        won = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        placements.append((won.mean(axis=1), won.mean(axis=0)))
    of_positive, of_negative = (np.array(part) for part in zip(*placements, strict=True))
    size = of_positive.shape[0]
    covariance = np.cov(of_positive).reshape(size, size) / of_positive.shape[1]
    return of_positive.mean(axis=1), covariance + np.cov(of_negative).reshape(size, size) / of_negative.shape[1]


def two_scores(seed, n=300, classes=3, better=0.5):
    rng = np.random.default_rng(seed)
    y = rng.random((n, classes)) < 0.3
    common = rng.normal(size=y.shape)
    return y, common + better * y + 0.3 * rng.normal(size=y.shape), common + 0.5 * y + 0.3 * rng.normal(size=y.shape)


def test_worked_by_hand():
    # positives 3, 1 against negatives 0, 2: placements 1 and 1/2, and 1 and 1/2 the other way; each variance 1/8
    areas, covariance = delong_covariance([1, 1, 0, 0], np.array([[3.0], [1.0], [0.0], [2.0]]))
    assert areas == pytest.approx([0.75]) and covariance == pytest.approx(np.array([[1 / 16 + 1 / 16]]))


def test_ratings_of_hanley_and_mcneil_1982():
    # 109 CT images rated 1 to 5; area 0.8932, error 0.0307, interval 0.83295 to 0.95339 as statistical packages print
    y = np.repeat([0, 1], [58, 51])
    score = np.repeat([1, 2, 3, 4, 5] * 2, [33, 6, 6, 11, 2, 3, 2, 2, 11, 33])
    (area,), ((variance,),) = delong_covariance(y, score[:, None])
    error = np.sqrt(variance)
    assert [round(area, 4), round(error, 4)] == [0.8932, 0.0307]
    assert [round(area + z * error, 5) for z in (-1.959964, 1.959964)] == [0.83295, 0.95339]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 40), st.integers(1, 12))
def test_equals_all_pairs_counted(seed, n, levels):
    rng = np.random.default_rng(seed)
    y = np.append([0, 0, 1, 1], rng.integers(0, 2, n - 4))
    scores = rng.integers(0, levels, (n, 3))
    for ours, expected in zip(delong_covariance(y, scores), all_pairs(y, scores), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-12)
    np.testing.assert_allclose(delong_covariance(y, scores)[0], roc_auc_score_by_column(y, scores), atol=1e-12)


def roc_auc_score_by_column(y, scores):
    return [roc_auc_score(y, score) for score in scores.T]


def test_intervals_are_symmetric_in_logits_and_turn_with_the_score():
    y, score, _ = two_scores(0)
    found, turned = delong_intervals(y, score), delong_intervals(y, -score)
    middle, low, high = np.log(found / (1 - found)).T
    np.testing.assert_allclose(high - middle, middle - low)
    np.testing.assert_allclose(turned, 1 - found[:, [0, 2, 1]])
    _, covariance = delong_covariance(y[:, 0], score[:, :1])
    half = (found[0, 2] - found[0, 1]) / 2
    assert half == pytest.approx(1.96 * np.sqrt(covariance[0, 0]), rel=0.02)  # the delta method
    narrow = delong_intervals(y, score, level=0.5)
    assert (found[:, 1] < narrow[:, 1]).all() and (narrow[:, 2] < found[:, 2]).all()


def test_agrees_with_the_bootstrap_of_single_images():
    y, score, _ = two_scores(1, n=2000)
    found = delong_intervals(y, score)
    drawn = np.array([[i.estimate, i.low, i.high] for i in bootstrap_auroc(y, score, None, 500)[0]])
    np.testing.assert_allclose(found[:, 0], drawn[:, 0], atol=1e-12)
    np.testing.assert_allclose(found, drawn, atol=0.2 * (found[:, 2] - found[:, 1]).min())


def test_intervals_near_one_cover_the_truth():
    rng, truth = np.random.default_rng(5), stats.norm.cdf(2.5 / np.sqrt(2))
    y = np.repeat([True, False], [15, 60])[:, None]
    found = np.concatenate([delong_intervals(y, rng.normal(size=y.shape) + 2.5 * y) for _ in range(300)])
    found = found[found[:, 0] < 1]
    covered = int(((found[:, 1] <= truth) & (truth <= found[:, 2])).sum())
    assert stats.binomtest(covered, len(found), 0.95).pvalue > 1e-3


def test_paired_test_is_the_normal_test_of_the_covariance():
    y, a, b = two_scores(2, better=0.9)
    for c, (difference, _, high, p_value) in enumerate(delong_test(y, a, b)):
        areas, cov = all_pairs(y[:, c].astype(int), np.column_stack([a[:, c], b[:, c]]))
        error = np.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
        assert difference == pytest.approx(areas[0] - areas[1])
        assert high - difference == pytest.approx(1.959964 * error)
        assert p_value == pytest.approx(2 * stats.norm.sf(abs(difference) / error))
    np.testing.assert_allclose(delong_test(y, b, a), delong_test(y, a, b)[:, [0, 2, 1, 3]] * [-1, -1, -1, 1])


def test_p_values_of_no_difference_are_uniform():
    p_values = np.concatenate([delong_test(*two_scores(seed, n=150))[:, 3] for seed in range(60)])
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_scores_that_rank_alike_do_not_differ():
    y, a, _ = two_scores(3)
    assert delong_test(y, a, np.exp(a)).tolist() == [[0, 0, 0, 1]] * 3


def test_figures_that_cannot_be_known_are_nan():
    y = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
    a = np.array([[0.3, 0.8, 0.1], [0.1, 0.9, 0.2], [0.5, 0.3, 0.3], [0.1, 0.2, 0.4]])
    nan = np.nan  # one positive; perfectly parted; absent
    np.testing.assert_allclose(delong_intervals(y, a), [[2 / 3, nan, nan], [1, nan, nan], [nan, nan, nan]])
    np.testing.assert_allclose(delong_test(y, a, -a), [[1 / 3, *[nan] * 3], [1, *[nan] * 3], [nan] * 4])
    assert np.isnan(delong_test(y, a, a)[0, 3]) and delong_test(y, a, a)[1, 3] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: delong_covariance([0, 2], [[0.1], [0.2]]), "0 or 1"),
        (lambda: delong_covariance([0, 1], [[0.1], [np.nan]]), "row 1: the score is NaN"),
        (lambda: delong_covariance([1, 1], [[0.1], [0.2]]), "all labels are equal"),
        (lambda: delong_intervals([[0], [1]], [[0.1], [np.nan]]), "row 1: the score is NaN"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
