"""common.metrics.segmentation: worked by hand."""

import numpy as np
import pytest

from common.errors import InputError
from common.metrics.segmentation import (
    accuracy,
    counts_from_areas,
    dice,
    dice_from_areas,
    f_beta,
    iou,
    precision,
    recall,
)

# five images of 8 pixels: overlap, both empty, only the truth, only the prediction, equal
COUNTS = np.array([[2, 1, 2, 3], [0, 0, 0, 8], [0, 0, 1, 7], [0, 2, 0, 6], [4, 0, 0, 4]])
AREAS = [2, 0, 0, 0, 4], [3, 0, 0, 2, 4], [4, 0, 1, 0, 4]


def test_counts_follow_from_areas():
    assert counts_from_areas(*AREAS, pixels=8).tolist() == COUNTS.tolist()
    thresholds = counts_from_areas(np.array([[2, 0], [1, 0]]), np.array([[3, 0], [1, 0]]), np.array([4, 0]), 8)
    assert thresholds.tolist() == [[[2, 1, 2, 3], [0, 0, 0, 8]], [[1, 0, 3, 4], [0, 0, 0, 8]]]


def test_dice_by_hand():
    assert dice_from_areas(*AREAS).tolist() == dice(COUNTS).tolist() == pytest.approx([4 / 7, 1, 0, 0, 1])
    assert dice(COUNTS, reduce="image") == pytest.approx((4 / 7 + 2) / 5)  # not the mean of the means of batches
    assert dice(COUNTS, reduce="pooled") == pytest.approx(12 / 18)
    assert dice(COUNTS[1:2], reduce="pooled") == dice_from_areas(0, 0, 0) == 1


def test_other_figures_by_hand():
    assert iou(COUNTS).tolist() == pytest.approx([2 / 5, 1, 0, 0, 1])
    assert f_beta(COUNTS, 2.0).tolist() == pytest.approx([10 / 19, 1, 0, 0, 1])
    assert precision(COUNTS).tolist() == pytest.approx([2 / 3, 1, 0, 0, 1])
    assert recall(COUNTS).tolist() == pytest.approx([1 / 2, 1, 0, 0, 1])
    assert accuracy(COUNTS).tolist() == pytest.approx([5 / 8, 1, 7 / 8, 6 / 8, 1])
    assert iou(COUNTS, reduce="pooled") == pytest.approx(6 / 12)
    assert accuracy(COUNTS, reduce="pooled") == pytest.approx(34 / 40)
    assert precision(COUNTS, reduce="pooled") == pytest.approx(6 / 9)


def test_reducing_keeps_leading_axes():
    stacked = np.stack([COUNTS, COUNTS[::-1] * [1, 1, 1, 1]])
    assert iou(stacked, reduce="image").tolist() == pytest.approx([2.4 / 5] * 2)
    assert iou(stacked, reduce="pooled").shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dice_from_areas([1, 4], [3, 3], [4, 4]), r"image \[1\]: the intersection"),
        (lambda: dice_from_areas([-1], [3], [4]), "the intersection"),
        (lambda: dice_from_areas([1], [np.nan], [4]), "the intersection"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_f_beta_is_dice_unless_beta_is_given():
    assert f_beta(COUNTS).tolist() == dice(COUNTS).tolist() != f_beta(COUNTS, 2.0).tolist()
