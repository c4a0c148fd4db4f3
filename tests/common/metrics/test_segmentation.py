"""common.metrics.segmentation: pixels counted and every public convention worked out by hand."""

import numpy as np
import pytest

from common.errors import InputError
from common.metrics.segmentation import (
    accuracy,
    confusion,
    counts_from_areas,
    dice,
    dice_from_areas,
    f_beta,
    iou,
    precision,
    recall,
    score,
)

# five images of 2×4 pixels: overlap, both empty, only the truth, only the prediction, equal
PRED = np.zeros((5, 2, 4), bool)
TRUTH = np.zeros((5, 2, 4), bool)
PRED[0, 0, :3] = True
TRUTH[0, 0, 1:] = True
TRUTH[0, 1, 0] = True
TRUTH[2, 0, 0] = True
PRED[3, 1, :2] = True
PRED[4, :, 2:] = TRUTH[4, :, 2:] = True
COUNTS = np.array([[2, 1, 2, 3], [0, 0, 0, 8], [0, 0, 1, 7], [0, 2, 0, 6], [4, 0, 0, 4]])
AREAS = [2, 0, 0, 0, 4], [3, 0, 0, 2, 4], [4, 0, 1, 0, 4]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_confusion_counts_pixels(dtype):
    counts = confusion(PRED.astype(dtype), TRUTH.astype(dtype))
    assert counts.dtype == np.int64 and counts.tolist() == COUNTS.tolist()
    assert confusion(PRED[0].astype(dtype), TRUTH[0].astype(dtype)).tolist() == [2, 1, 2, 3]
    assert confusion(PRED.reshape(5, 1, 2, 4), TRUTH.reshape(5, 1, 2, 4)).shape == (5, 1, 4)
    assert confusion(PRED[:0], TRUTH[:0]).shape == (0, 4)


def test_counts_follow_from_areas():
    assert counts_from_areas(*AREAS, pixels=8).tolist() == COUNTS.tolist()
    thresholds = counts_from_areas(np.array([[2, 0], [1, 0]]), np.array([[3, 0], [1, 0]]), np.array([4, 0]), 8)
    assert thresholds.tolist() == [[[2, 1, 2, 3], [0, 0, 0, 8]], [[1, 0, 3, 4], [0, 0, 0, 8]]]


def test_dice_of_each_convention():
    assert dice_from_areas(*AREAS).tolist() == pytest.approx([4 / 7, 1, 0, 0, 1])
    assert dice_from_areas(*AREAS, both_empty=0.0).tolist() == pytest.approx([4 / 7, 0, 0, 0, 1])
    skipped = dice_from_areas(*AREAS, both_empty="skip")
    assert np.isnan(skipped).tolist() == [False, True, False, False, False]
    assert dice_from_areas(*AREAS, smooth=1.0).tolist() == pytest.approx([5 / 8, 1, 1 / 2, 1 / 3, 1])
    assert dice(COUNTS).tolist() == pytest.approx(dice_from_areas(*AREAS).tolist())
    assert dice(COUNTS, reduce="image") == pytest.approx((4 / 7 + 2) / 5)
    assert dice(COUNTS, 0.0, "image") == pytest.approx((4 / 7 + 1) / 5)
    assert dice(COUNTS, "skip", "image") == pytest.approx((4 / 7 + 1) / 4)
    assert dice(COUNTS, reduce="pooled") == pytest.approx(12 / 18)


def test_mean_over_images_is_not_the_mean_of_batch_means():
    batches = [dice(COUNTS[:4], reduce="image"), dice(COUNTS[4:], reduce="image")]
    assert abs(np.mean(batches) - dice(COUNTS, reduce="image")) > 0.1


def test_other_figures_by_hand():
    assert iou(COUNTS).tolist() == pytest.approx([2 / 5, 1, 0, 0, 1])
    assert f_beta(COUNTS, 2.0).tolist() == pytest.approx([10 / 19, 1, 0, 0, 1])
    assert precision(COUNTS).tolist() == pytest.approx([2 / 3, 1, 0, 0, 1])
    assert precision(COUNTS, one_empty=1.0).tolist() == pytest.approx([2 / 3, 1, 1, 0, 1])
    assert recall(COUNTS).tolist() == pytest.approx([1 / 2, 1, 0, 0, 1])
    assert recall(COUNTS, one_empty=1.0).tolist() == pytest.approx([1 / 2, 1, 0, 1, 1])
    assert accuracy(COUNTS).tolist() == pytest.approx([5 / 8, 1, 7 / 8, 6 / 8, 1])
    assert iou(COUNTS, reduce="pooled") == pytest.approx(6 / 12)
    assert accuracy(COUNTS, reduce="pooled") == pytest.approx(34 / 40)
    assert precision(COUNTS, reduce="pooled") == pytest.approx(6 / 9)


def test_reducing_keeps_leading_axes():
    stacked = np.stack([COUNTS, COUNTS[::-1] * [1, 1, 1, 1]])
    assert iou(stacked, reduce="image").tolist() == pytest.approx([2.4 / 5] * 2)
    assert iou(stacked, reduce="pooled").shape == (2,)


def test_all_images_skipped_is_nan_without_a_warning():
    assert np.isnan(dice(COUNTS[1:2], "skip", "image"))
    assert np.isnan(dice(COUNTS[1:2], "skip", "pooled"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confusion(PRED, TRUTH[:4]), "need one shape"),
        (lambda: confusion(PRED[0, 0], TRUTH[0, 0]), "need one shape"),
        (lambda: confusion(PRED * np.uint8(255), TRUTH), "only 0 and 1"),
        (lambda: confusion(PRED, TRUTH * 0.5), "only 0 and 1"),
        (lambda: confusion(PRED, TRUTH * np.int64(-1)), "only 0 and 1"),
        (lambda: dice_from_areas([1, 4], [3, 3], [4, 4]), r"image \[1\]: the intersection"),
        (lambda: dice_from_areas([-1], [3], [4]), "the intersection"),
        (lambda: dice_from_areas([1], [np.nan], [4]), "the intersection"),
        (lambda: dice_from_areas([1, 2], [3, 3, 3], [4]), "do not fit together"),
        (lambda: counts_from_areas([1], [5], [5], 8), "9 pixels"),
        (lambda: iou(COUNTS, reduce="mean"), "reduce must be"),
        (lambda: iou(COUNTS[0], reduce="image"), "need"),
        (lambda: score(COUNTS[:, :3], accuracy), "need"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
