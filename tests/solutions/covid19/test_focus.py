"""Shares of heat maps in the lungs, worked by hand, and the maps of whole stores."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from common.errors import InputError
from solutions.covid19.config import NetworkConfig
from solutions.covid19.focus import heat_maps, lung_area, share_in_lungs
from solutions.covid19.models import CovidNet


def test_share_by_hand():
    mask = np.array([[1, 1, 0, 0]] * 4, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0], heat[2, 3] = 3, 1
    assert share_in_lungs(heat, mask) == pytest.approx(0.75)
    assert share_in_lungs(heat, mask == 0) == pytest.approx(0.25)
    # two columns, 1 and 0, over four: 1, 0.75, 0.25, 0
    assert share_in_lungs([[1, 0], [1, 0]], mask) == pytest.approx(1.75 / 2)
    assert np.isnan(share_in_lungs(np.zeros((2, 2)), mask))


def test_without_preference_the_share_is_the_area():
    mask = np.zeros((6, 10), np.uint8)
    mask[1:4, 2:7] = 1
    assert lung_area(mask) == 0.25
    for shape in ((1, 1), (2, 2), (3, 5), (12, 20)):
        assert share_in_lungs(np.full(shape, 0.3), mask) == pytest.approx(0.25)
    assert lung_area(mask * 0) == 0 and lung_area(mask * 255) == 0.25


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, (3, 3), elements=st.floats(0, 1e3, width=32)),
    arrays(np.uint8, (12, 12), elements=st.integers(0, 1)),
)
def test_lungs_and_the_rest_share_all(heat, mask):
    inside, outside = share_in_lungs(heat, mask), share_in_lungs(heat, 1 - mask)
    if not heat.any():
        assert np.isnan(inside) and np.isnan(outside)
        return
    assert 0 <= inside <= 1 and inside + outside == pytest.approx(1)
    assert share_in_lungs(heat / heat.max() * 7, mask) == pytest.approx(inside, abs=1e-4)


@pytest.mark.parametrize("heat", [np.full((2, 2), np.nan), -np.ones((2, 2)), np.ones(4), np.ones((0, 2))])
def test_bad_maps(heat):
    with pytest.raises(InputError, match="a heat map must be"):
        share_in_lungs(heat, np.ones((4, 4)))


def test_bad_masks():
    with pytest.raises(InputError, match="a mask must be"):
        share_in_lungs(np.ones((2, 2)), np.ones((1, 4, 4)))
    with pytest.raises(InputError, match="a mask must be"):
        lung_area(np.ones(4))


class Cells(nn.Module):
    """One feature map: the mean grey of squares of eight pixels."""

    def forward(self, x):
        return nn.functional.avg_pool2d(x[:, :1], 8)


def test_maps_of_a_store_follow_the_view_and_the_rows():
    images = np.random.default_rng(0).integers(1, 200, (5, 64, 64), dtype=np.uint8)
    masks = np.zeros_like(images)
    masks[:, 8:40, 16:48] = 1
    data = SimpleNamespace(store=SimpleNamespace(images=images), masks=masks)
    model = CovidNet(Cells(), 1, (0, 0, 0), (1 / 255,) * 3)
    nn.init.constant_(model.head.weight, 2.0)
    config, rows = NetworkConfig(weights="none", size=32, batch_size=1), [4, 0, 3]
    cells = images.reshape(5, 4, 16, 4, 16).mean((2, 4))  # of the image as it is, a quarter of the network's

    maps = heat_maps(model, data, rows, config, "image", "cpu", progress=False)
    assert maps.shape == (3, 4, 4) and maps.dtype == np.float32 and not model.training
    np.testing.assert_allclose(maps, 2 * cells[rows] / 16, atol=0.1)  # grey levels are rounded in between

    inside = heat_maps(model, data, rows, config, "lungs", "cpu", progress=False)
    assert (inside[:, 3] == 0).all() and (inside[:, 0, 1] > 0).all()
    shares = [
        [share_in_lungs(heat, masks[row]) for heat, row in zip(each, rows, strict=True)] for each in (maps, inside)
    ]
    assert abs(np.mean(shares[0]) - lung_area(masks[0])) < 0.03 < 0.6 < min(shares[1])
    with torch.no_grad():
        edge = heat_maps(model, data, rows, config, "border", "cpu", progress=False, margin=0.1)
    assert (edge[:, 1:3, 1:3] == 0).all() and (edge[:, 0] > 0).all()
    with pytest.raises(InputError, match="no rows"):
        heat_maps(model, data, [], config, "image", "cpu")
