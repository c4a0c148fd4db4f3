"""Averages of weights against hand-made numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from common.config import FitConfig
from common.train.averaging import Ema, average, best_epochs, epochs_of, epochs_to_keep, reestimate_batch_norm


def test_average_is_the_mean_and_keeps_counters():
    pairs = (([1.0, 4.0], 3), ([3.0, 8.0], 7))
    out = average({"w": torch.tensor(w), "n": torch.tensor(n)} for w, n in pairs)
    assert out["w"].tolist() == [2.0, 6.0] and out["n"].item() == 7


def test_the_window_is_at_the_peak_and_the_first_of_equals():
    for scores, size, expected in (([0, 1, 5, 6, 5, 1], 3, [2, 3, 4]), ([2] * 4, 2, [0, 1]), ([1, 2], 4, [0, 1])):
        assert epochs_of("window", scores, FitConfig(window=size)) == expected


def test_best_epochs_prefers_the_earlier_of_equals():
    assert best_epochs([0.5, 0.9, 0.9, 0.1, 0.8], 3) == [1, 2, 4]
    assert best_epochs([0.7, 0.7], 1) == [0]


def test_variants_name_their_epochs():
    config = FitConfig(epochs=8, window=2, best_k=2, classic_start=0.75)
    scores = [0, 1, 2, 9, 8, 1, 7, 3]
    expected = {"last": [7], "best": [3], "best_k": [3, 4], "window": [3, 4], "classic": [6, 7]}
    assert {variant: epochs_of(variant, scores, config) for variant in expected} == expected
    cycles = FitConfig(epochs=8, frozen_epochs=1, cycles=3)  # cycles begin in epochs 1, 3 and 6
    assert epochs_of("classic", scores, cycles) == [2, 5, 7]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_a_later_average_needs_is_deleted(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 15))
    config = FitConfig(
        epochs=n,
        cycles=int(rng.integers(1, n + 1)),
        window=int(rng.integers(1, 5)),
        best_k=int(rng.integers(1, 4)),
        averaging=("last", "best", "best_k", "window", "classic"),
    )
    scores, left = [], set()
    for epoch in range(n):
        scores.append(float(rng.integers(0, 5)))
        left = (left | {epoch}) & epochs_to_keep(scores, config)
    for variant in config.averaging:
        assert set(epochs_of(variant, scores, config)) <= left


def test_ema_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema = Ema(model, decay=0.9)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update(model)  # decay (1 + 1) / (10 + 1)
    assert ema.state["weight"].item() == pytest.approx(1 - 2 / 11)


def test_reestimated_batch_norm_is_the_mean_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5))
    batches = [torch.randn(4, 2, 5, 5) * 3 + 1 for _ in range(6)]
    model.eval()
    reestimate_batch_norm(model, batches, lambda m, b: m(b))
    norm = model[0]
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))
    assert norm.momentum == 0.1 and not model.training and not norm.training
