import pytest
import torch
from torch import nn

from common.errors import InputError
from common.infer.tta import FLIP, IDENTITY, predict_tta, scale, sigmoid, sigmoid_and_presence


class Columns(nn.Module):
    """Logits that are the image plus its column number: a network that is not symmetric."""

    def forward(self, x):
        return x.float() + torch.arange(x.shape[-1], dtype=torch.float32)


def test_flip_by_hand():
    image = torch.tensor([[[[0.0, 1.0, 2.0]]]])
    # plain logits 0, 2, 4; on the flipped image 2, 2, 2, which is flipped back
    expected = (torch.tensor([0.0, 2.0, 4.0]).sigmoid() + torch.tensor([2.0, 2.0, 2.0]).sigmoid()) / 2
    torch.testing.assert_close(predict_tta(Columns(), image, (IDENTITY, FLIP))[0, 0, 0], expected)


def test_every_view_of_a_pointwise_network_comes_back_in_place():
    ramp = torch.linspace(-2, 2, 96).expand(2, 1, 64, 96) * torch.linspace(0.5, 1, 64)[:, None]
    expected = predict_tta(nn.Identity(), ramp)
    for view in (FLIP, scale(0.75), scale(1.25), scale(1.5), scale(0.5)):
        torch.testing.assert_close(predict_tta(nn.Identity(), ramp, (view,)), expected, atol=0.02, rtol=0)
    moved = predict_tta(nn.Identity(), ramp, ((FLIP[0], IDENTITY[1]),))
    assert (moved - expected).abs().max() > 0.5  # the test would see a view that is not undone


@pytest.mark.parametrize(
    ("factor", "size", "expected"),
    [
        (0.75, (512, 512), (384, 384)),
        (1.25, (512, 256), (640, 320)),
        (0.8, (512, 512), (416, 416)),
        (0.1, (64, 64), (32, 32)),
    ],
)
def test_scaled_sizes_are_multiples_of_32(factor, size, expected):
    forward, inverse = scale(factor)
    image = torch.full((1, 1, *size), 200, dtype=torch.uint8)
    assert forward(image).shape[-2:] == expected and forward(image).mean() == 200
    assert inverse(torch.zeros(1, 1, *expected), size).shape[-2:] == size


def test_classes_are_averaged_as_they_are():
    model = lambda x: x.float().mean((2, 3)) + x[:, :, 0, 0]  # noqa: E731
    image = torch.tensor([[[[0.0, 2.0]]]])
    expected = (torch.tensor(1.0).sigmoid() + torch.tensor(3.0).sigmoid()) / 2
    torch.testing.assert_close(predict_tta(model, image, (IDENTITY, FLIP)), expected.reshape(1, 1))


def test_activations_of_a_pair():
    pair = (torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), torch.tensor([[3.0]]))
    assert sigmoid(pair).dtype == torch.float32 and sigmoid(pair).unique().tolist() == [0.5]
    torch.testing.assert_close(sigmoid_and_presence(pair)[1], torch.tensor([[3.0]]).sigmoid())


def test_a_scale_of_nothing_is_refused():
    with pytest.raises(InputError, match="scale 0: must be between 0 and 10"):
        scale(0)
