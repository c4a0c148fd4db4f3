"""common.metrics.classification against scikit-learn, hand-worked counts and an exhaustive threshold search."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from common.errors import InputError
from common.metrics import classification as cl

LABELS_AND_SCORES = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=60).filter(
    lambda rows: len({y for y, _ in rows}) == 2
)


def unpack(rows):
    y, score = np.array(rows).T
    return y.astype(bool), score / 7


@settings(max_examples=60, deadline=None)
@given(LABELS_AND_SCORES)
def test_auroc_is_scikit_learns_with_ties(rows):
    y, score = unpack(rows)
    assert cl.auroc(y, score) == pytest.approx(sk.roc_auc_score(y, score), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_auroc_is_scikit_learns_on_many_rows(dtype):
    rng = np.random.default_rng(0)
    y = rng.random((5000, 3)) < [0.5, 0.1, 0.01]
    score = (rng.random((5000, 3)) + 0.3 * y).astype(dtype)
    expected = [sk.roc_auc_score(y[:, c], score[:, c]) for c in range(3)]
    assert np.abs(cl.auroc(y.astype(int), score) - expected).max() < 1e-12


def test_auroc_by_hand():
    assert cl.auroc([0, 1, 0, 1], [0.1, 0.4, 0.35, 0.8]) == 1.0
    assert cl.auroc([0, 1, 0, 1], [0.1, 0.1, 0.35, 0.8]) == 0.625  # pairs: ½, 0, 1, 1 of 4
    assert cl.auroc([0, 1, 1], [-np.inf, -np.inf, np.inf]) == 0.75
    assert cl.auroc([0, 1, 1], [5, 5, 5]) == 0.5


def test_undefined_areas_are_named_or_refused():
    y, score = np.array([[0, 1], [0, 0]]), np.array([[0.1, 0.3], [0.2, 0.1]])
    with pytest.raises(InputError, match="class 0"):
        cl.auroc(y, score)
    values = cl.auroc(y, score, undefined=np.nan)
    assert np.isnan(values[0]) and values[1] == 1
    assert cl.auroc([0, 1], [np.nan, 1], undefined=0.5) == 0.5


@settings(max_examples=60, deadline=None)
@given(LABELS_AND_SCORES, st.integers(0, 7), st.sampled_from([0.5, 1.0, 2.0]))
def test_counted_figures_equal_scikit_learn(rows, cut, beta):
    y, score = unpack(rows)
    called = score >= cut / 7
    counts = cl.confusion_counts(y, score, cut / 7)
    tn, fp, fn, tp = sk.confusion_matrix(y, called, labels=[False, True]).ravel()
    assert counts.tolist() == [tp, fp, fn, tn]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = [
            (cl.precision(counts), sk.precision_score(y, called, zero_division=0)),
            (cl.recall(counts), sk.recall_score(y, called)),
            (cl.specificity(counts), sk.recall_score(~y, ~called)),
            (cl.accuracy(counts), sk.accuracy_score(y, called)),
            (cl.f_beta(counts, beta), sk.fbeta_score(y, called, beta=beta)),
            (cl.mcc(counts), sk.matthews_corrcoef(y, called)),
        ]
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_ratios_without_a_denominator():
    nothing_called = [0, 0, 3, 7]
    assert cl.precision(nothing_called) == cl.mcc(nothing_called) == cl.f_beta([0, 0, 0, 7]) == 0
    assert cl.specificity([3, 0, 1, 0], 1.0) == 1 and cl.recall([0, 3, 0, 1]) == 0
    assert np.isnan(cl.recall([0, 3, 0, 1], np.nan))


def test_mcc_of_pixel_counts_does_not_overflow():
    expected = 446 / 461_916**0.5  # (90·5 − 4·1) / √(94·91·9·6)
    scaled = np.array([90, 4, 1, 5]) * np.array([[1], [10**7]])
    assert cl.mcc(scaled).tolist() == pytest.approx([expected, expected])


def test_counts_of_several_classes_take_a_threshold_each():
    y, score = np.array([[1, 0], [0, 1], [1, 1]]), np.array([[0.9, 0.2], [0.6, 0.6], [0.2, 0.7]])
    assert cl.confusion_counts(y, score, 0.6).tolist() == [[1, 1, 1, 0], [2, 0, 0, 1]]
    assert cl.confusion_counts(y, score, [0.7, 0.7]).tolist() == [[1, 0, 1, 1], [1, 0, 1, 1]]


@settings(max_examples=60, deadline=None)
@given(LABELS_AND_SCORES, st.sampled_from([cl.mcc, cl.accuracy, cl.f_beta]))
def test_best_threshold_beats_every_other(rows, metric):
    y, score = unpack(rows)
    threshold, value = cl.best_threshold(y, score, metric)
    assert metric(cl.confusion_counts(y, score, threshold)) == value
    assert value == max(metric(cl.confusion_counts(y, score, t)) for t in [*score, 2.0])


def test_best_threshold_lies_between_two_scores():
    assert cl.best_threshold([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9], cl.f_beta) == pytest.approx((0.4, 1.0))
    assert cl.best_threshold([1, 1], [0.3, 0.9], cl.accuracy) == (0.3, 1.0)
    nothing, value = cl.best_threshold([0, 0, 0], [0.3, 0.9, 1.0], cl.accuracy)
    assert nothing > 1.0 and value == 1.0


def test_best_threshold_separates_neighbouring_floats():
    low = np.float32(0.3)
    score = np.array([low, np.nextafter(low, np.float32(1))])
    threshold, value = cl.best_threshold([0, 1], score, cl.accuracy)
    assert value == 1 and (score >= threshold).tolist() == [False, True]
    assert cl.confusion_counts([0, 1], score, threshold).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cl.auroc([0, 1], [0.1, 0.2, 0.3]), "need one shape"),
        (lambda: cl.auroc([], []), "need one shape"),
        (lambda: cl.auroc([0, 2], [0.1, 0.2]), "labels must be 0 or 1"),
        (lambda: cl.auroc([0, np.nan], [0.1, 0.2]), "labels must be 0 or 1"),
        (lambda: cl.auroc([0, 1], ["a", "b"]), "scores real numbers"),
        (lambda: cl.auroc([0, 1], [np.nan, 0.2]), "NaN scores"),
        (lambda: cl.cut_points([0, 1], [0.2, np.nan]), "row 1: the score is NaN"),
        (lambda: cl.cut_points([[0, 1]], [[0.2, 0.1]]), "need one shape"),
        (lambda: cl.confusion_counts([0, 1], [0.2, np.nan], 0.5), "row 1: the score is NaN"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_mean_of_defined_leaves_out_nan_along_the_last_axis():
    assert cl.mean_of_defined(np.array([1.0, np.nan, 3.0])) == 2
    assert cl.mean_of_defined(np.array([[[1.0, np.nan], [np.nan, np.nan]]])).tolist() == [
        [1.0, pytest.approx(np.nan, nan_ok=True)]
    ]
