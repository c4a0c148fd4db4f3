"""RSNA's metric, worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from common.metrics.detection_counts import image_scores, match_boxes, mean_score
from common.post.fusion import COLUMNS


def boxes(*rows):
    return pd.DataFrame(rows, columns=COLUMNS).astype({name: float for name in COLUMNS[2:]})


def test_the_metric_by_hand():
    truth = boxes(("a", 0, 1, 0, 0, 10, 10), ("a", 0, 1, 50, 50, 60, 60), ("b", 0, 1, 0, 0, 10, 10))
    found = boxes(
        ("a", 0, 0.9, 0, 0, 10, 6),  # IoU 0.6: above four of the eight thresholds, 0.4 to 0.55
        ("b", 0, 0.8, 0, 0, 10, 8),  # IoU 0.8: above all of them
        ("b", 0, 0.7, 0, 0, 10, 10),  # IoU 1, but the box is taken by the one with the higher score
        ("c", 0, 0.3, 0, 0, 5, 5),  # no true box: 0
    )
    matches = match_boxes(found, truth.drop(columns="score"), ["a", "b", "c", "d"])
    scores = image_scores(matches)  # a: one found and one missed; b: one found and one false; d: does not count
    np.testing.assert_allclose(scores, [4 / 8 * 1 / 2, 1 / 2, 0, np.nan])
    assert mean_score(scores) == pytest.approx((1 / 4 + 1 / 2) / 3)
    np.testing.assert_allclose(image_scores(matches, 0.75), [1 / 4, 1, np.nan, np.nan])  # without boxes, nor does c
    np.testing.assert_allclose(image_scores(matches, 0, np.arange(4) > 0), [0, 1 / 2, 0, np.nan])  # a: both missed
