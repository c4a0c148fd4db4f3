"""Feature maps of timm's networks, the exact layer, and weights for the backbone alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from common.errors import InputError
from common.nn.backbone import ExactLinear, build_backbone, feature_map
from common.nn.weights import load_pretrained


@pytest.mark.parametrize(
    ("name", "size", "width", "cells"),
    [
        ("resnet18", 64, 512, 2),
        ("tf_efficientnet_lite0", 96, 1280, 3),
        ("swin_tiny_patch4_window7_224", 96, 768, 3),
        ("vit_tiny_patch16_224", 80, 192, 5),
    ],
)
def test_the_last_map_channels_first(name, size, width, cells):
    net, found = build_backbone(name, size)
    assert net.training and found == width
    with torch.inference_mode():
        assert feature_map(net.eval(), torch.rand(2, 3, size, size)).shape == (2, width, cells, cells)


def test_tokens_lie_where_their_patches_do():
    class Patches(nn.Module):
        num_prefix_tokens = 2

        def forward(self, x):
            tokens = F.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
            return torch.cat([torch.full_like(tokens[:, :2], -1), tokens], 1)

    x = torch.rand(2, 3, 12, 12)
    assert torch.equal(feature_map(Patches(), x), F.avg_pool2d(x, 4))


def test_drop_path_grows_towards_the_last_block():
    net, _ = build_backbone("test_vit", 64, 0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3) and rates == sorted(rates)
    with pytest.raises(InputError, match="drop_path_rate"):
        build_backbone("densenet121", 64, 0.3)


def test_networks_without_a_feature_map_are_refused():
    with pytest.raises(InputError, match=r"mixer_s16_224.* no feature map of images of 224 px"):
        build_backbone("mixer_s16_224", 224)
    with pytest.raises(InputError, match=r"72 px .its patches are 16"):
        build_backbone("vit_tiny_patch16_224", 72)
    with pytest.raises(InputError, match="is not a feature map"):
        feature_map(nn.Flatten(), torch.rand(1, 3, 4, 4))


def test_the_exact_layer_is_exact_under_autocast():
    layer, x = ExactLinear(1, 1), torch.tensor([[1.0], [1.001]])
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = layer(x), F.linear(x, layer.weight, layer.bias)
    assert found.dtype == torch.float32 and torch.equal(found, x)
    assert plain[0] == plain[1]  # what it is there for: bf16 has no number between 1 and 1.0078


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Conv2d(3, 2, 1), nn.Linear(2, 1)


def test_weights_of_the_backbone_must_be_whole(tmp_path):
    model, other, names = Whole(), Whole(), ["net.weight", "net.bias"]
    load_pretrained(model, "resnet18", "none", names)
    assert model.loaded is None
    save_file({f"net.{k}": v for k, v in other.net.state_dict().items()}, tmp_path / "net.safetensors")
    load_pretrained(model, "resnet18", str(tmp_path / "net.safetensors"), names)
    np.testing.assert_array_equal(model.net.weight.detach(), other.net.weight.detach())
    assert {name.split(".")[0] for name in model.loaded.new} == {"head"}
    save_file({"net.weight": other.net.weight.detach()}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"part\.safetensors"):
        load_pretrained(model, "resnet18", str(tmp_path / "part.safetensors"), names)
