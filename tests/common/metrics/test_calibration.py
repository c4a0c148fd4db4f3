"""common.metrics.calibration: operating points and probabilities worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from common.errors import InputError
from common.metrics.calibration import (
    choose_thresholds,
    expected_calibration_error,
    fit_temperature,
    nested_counts,
    nested_temperature,
    reliability,
    risk_by_coverage,
    youden,
)
from common.metrics.classification import recall, specificity


def findings(seed, n=400):
    rng = np.random.default_rng(seed)
    prob = rng.random((n, 2)) ** 2
    return rng.random((n, 2)) < prob, prob


def test_thresholds_of_float32_scores_lie_between_them():
    low = np.float32(0.3)
    score = np.array([[low], [np.nextafter(low, np.float32(1))]])
    (threshold,) = choose_thresholds([[0], [1]], score)
    assert score[0, 0] < threshold < score[1, 0]


def test_youden_of_known_counts():
    assert youden([8, 10, 2, 30]) == pytest.approx(0.8 + 0.75 - 1)


def test_threshold_is_scikit_learns_and_nan_without_both_kinds():
    y, score = findings(0)
    for c, threshold in enumerate(choose_thresholds(y, score)):
        false, true, cuts = roc_curve(y[:, c], score[:, c])
        best = np.argmax(true - false)
        called = score[:, c] >= threshold
        np.testing.assert_array_equal(called, score[:, c] >= cuts[best])
    assert np.isnan(choose_thresholds(y & [True, False], score)).tolist() == [False, True]


def test_each_fold_is_judged_by_the_threshold_of_the_others():
    # fold a separates at 0.5, fold b at 0.25: judged by the other's threshold, each makes the mistakes of its shift
    y = np.array([[0], [0], [1], [1], [0], [1], [1], [1]])
    score = np.array([[0.1], [0.4], [0.6], [0.9], [0.1], [0.4], [0.6], [0.9]])
    counts, thresholds = nested_counts(y, score, ["a"] * 4 + ["b"] * 4)
    np.testing.assert_allclose(thresholds, [[0.25], [0.5]])
    assert counts.tolist() == [[2 + 2, 1, 1, 1 + 1]]
    assert recall(counts) == pytest.approx(4 / 5) and specificity(counts) == pytest.approx(2 / 3)


def test_fold_whose_others_lack_a_class_is_left_out_for_it():
    y = np.array([[1, 1], [0, 0], [1, 0], [0, 0]])
    score = np.array([[0.9, 0.9], [0.1, 0.1], [0.8, 0.2], [0.2, 0.1]])
    counts, thresholds = nested_counts(y, score, [0, 0, 1, 1])
    assert np.isnan(thresholds[0, 1]) and counts.sum(axis=1).tolist() == [4, 2]


def test_nested_figures_of_noise_are_no_better_than_chance():
    rng = np.random.default_rng(0)
    y, score = rng.random((3000, 1)) < 0.1, rng.random((3000, 1))
    counts, _ = nested_counts(y, score, np.arange(3000) % 5)
    assert abs(youden(counts)[0]) < 0.1


def test_a_temperature_undoes_logits_that_are_too_large():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 2))
    y, prob = rng.random(logits.shape) < special.expit(logits), special.expit(3 * logits)
    assert fit_temperature(y, prob) == pytest.approx(3, rel=0.1)
    folds = np.arange(len(y)) % 2
    y[folds == 0] = ~y[folds == 0]  # a fold of other labels has no say in its own temperature
    scaled = nested_temperature(y, prob, folds)
    other = fit_temperature(y[folds == 1], prob[folds == 1])
    np.testing.assert_allclose(special.logit(scaled[folds == 0]), 3 * logits[folds == 0] / other, rtol=1e-4)
    assert fit_temperature([[0], [1]], [[0.0], [1.0]]) < 0.1 and fit_temperature([[1], [0]], [[0.1], [0.9]]) > 19


def test_risk_by_coverage_by_hand():
    """The other fold's thresholds are 0.65 and 0.5, so that 0.6 is the only wrong call, and the least certain one."""
    y = np.array([[0], [0], [1], [1]] * 2)
    prob = np.array([[0.1], [0.2], [0.8], [0.9], [0.1], [0.6], [0.7], [0.95]])
    risk = risk_by_coverage(y, prob, np.repeat([0, 1], 4))
    np.testing.assert_allclose(risk, [0] * 7 + [1 / 8])
    classes = risk_by_coverage(np.c_[y, y * 0], np.c_[prob, prob], np.repeat([0, 1], 4))
    np.testing.assert_allclose(classes, risk)  # a class without thresholds does not count
    assert np.isnan(risk_by_coverage(y * 0, prob, np.repeat([0, 1], 4))).all()


def test_reliability_by_hand():
    mean, share, images = reliability([0, 0, 1, 1, 0, 1], [0.1, 0.2, 0.3, 0.4, 0.8, 0.9], n_bins=3)
    np.testing.assert_allclose(mean, [0.15, 0.35, 0.85])
    np.testing.assert_allclose(share, [0, 1, 0.5])
    assert images.tolist() == [2, 2, 2]
    error = expected_calibration_error([[0], [0], [1], [1], [0], [1]], [[0.1], [0.2], [0.3], [0.4], [0.8], [0.9]], 3)
    assert error == pytest.approx([(0.15 + 0.65 + 0.35) / 3])


def test_reliability_is_scikit_learns_with_quantile_bins():
    y, prob = findings(2, n=1000)
    mean, share, images = reliability(y[:, 0], prob[:, 0], 10)
    true, predicted = calibration_curve(y[:, 0], prob[:, 0], n_bins=10, strategy="quantile")
    np.testing.assert_allclose(mean, predicted, atol=1e-12)
    np.testing.assert_allclose(share, true, atol=1e-12)
    assert (images == 100).all()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0, 0.1, 0.5, 0.9, 1])), min_size=1, max_size=30), st.randoms()
)
def test_order_of_the_rows_does_not_matter(rows, random):
    def figures(rows):
        y, prob = (np.array(column, float) for column in zip(*rows, strict=True))
        return np.concatenate([*reliability(y, prob, 4), expected_calibration_error(y[:, None], prob[:, None], 4)])

    first = figures(rows)
    random.shuffle(rows)
    np.testing.assert_allclose(figures(rows), first, atol=1e-12)
    assert 0 <= first[-1] <= 1


def test_probabilities_that_mean_what_they_say_are_told_from_shrunk_ones():
    y, prob = findings(3, n=20_000)
    honest, shrunk = expected_calibration_error(y, prob), expected_calibration_error(y, prob / 3)
    assert (honest < 0.015).all() and (shrunk > 0.15).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_thresholds([[0], [2]], [[0.1], [0.2]]), "0 or 1"),
        (lambda: choose_thresholds([0, 1], [0.1, 0.2]), r"one shape \(N, C\)"),
        (lambda: choose_thresholds([[0], [1]], [[0.1], [np.nan]]), "row 1: the score is NaN"),
        (lambda: expected_calibration_error([[0], [1]], [[0.1], [1.2]]), "probabilities must lie"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
