import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import InputError
from common.nn.losses import bce
from common.nn.norms import batch_norms, set_frozen_eval
from solutions.chestxray14.config import LABELS, Config, NetworkConfig
from solutions.chestxray14.models import FusionNet, box_loss, build_fusion, build_network


def config(backbone="test_resnet", size=64, **options):
    return NetworkConfig(**{"backbone": backbone, "weights": "none", "size": size, "resize": size, **options})


def images(size, channels=1, n=2):
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(
    ("backbone", "size", "cells", "added"),
    [
        ("densenet121", 64, 2, True),
        ("densenet121", 64, 2, False),
        ("resnet50", 64, 2, False),
        ("tf_efficientnet_lite0", 64, 2, True),
        ("convnext_atto", 64, 2, True),
        ("mobilenetv3_small_050", 64, 2, False),
        ("swin_tiny_patch4_window7_224", 96, 3, True),
        ("vit_tiny_patch16_224", 80, 5, True),
    ],
)
def test_maps_and_the_bias_are_the_logits(backbone, size, cells, added):
    torch.manual_seed(0)
    model = build_network(config(backbone, size, attention=added, weighting=added)).eval()
    assert model.loaded is None
    batch = images(size, 1 + added)
    with torch.inference_mode():
        logits, cam, features = model(batch), model.cam(batch), model.features(batch)
        assert features.shape == (2, model.width, cells, cells) and cam.shape == (2, 14, cells, cells)
        assert logits.shape == (2, len(LABELS)) and logits.dtype == torch.float32
        np.testing.assert_allclose(cam.mean((2, 3)) + model.head.bias, logits, atol=2e-5)
        np.testing.assert_allclose(model.pooled(batch), features.mean((2, 3)), atol=1e-6)
        assert (logits[0] - logits[1]).abs().max() > 1e-5  # of the images, not of the bias alone


def test_weighting_is_the_pooled_mask_on_the_plain_map():
    torch.manual_seed(0)
    weighted = build_network(config("tf_efficientnet_lite0", 96, weighting=True)).eval()
    plain = build_network(config("tf_efficientnet_lite0", 96)).eval()
    plain.load_state_dict(weighted.state_dict())
    batch = images(96, 2)
    batch[:, 1] = 0
    batch[0, 1, :32, :32] = 255
    batch[0, 1, 40:56, 64:] = 102  # 0.4 over half of the cell
    with torch.inference_mode():
        found, whole = weighted.features(batch), plain.features(batch[:, :1])
        expected = torch.tensor([[1, 0, 0], [0, 0, 0.2], [0, 0, 0]])
        np.testing.assert_allclose(found[0], whole[0] * expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1], whole[1], rtol=1e-4, atol=1e-6)  # an empty mask counts as a full one
        assert torch.equal(
            weighted(torch.cat([batch[:, :1], torch.full_like(batch[:, 1:], 255)], 1)), plain(batch[:, :1])
        )


def test_binary_masks_keep_whole_cells():
    torch.manual_seed(0)
    weighted = build_network(config("tf_efficientnet_lite0", 96, weighting=True, masks="binary")).eval()
    batch = images(96, 2)[:1]
    batch[:, 1] = 0
    batch[0, 1, :32, :16] = 255  # half of the first cell
    batch[0, 1, 32:64, 32:47] = 255  # less than half of the middle one
    whole = torch.cat([batch[:, :1], torch.full_like(batch[:, 1:], 255)], 1)
    with torch.inference_mode():
        expected = weighted.features(whole) * torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
        np.testing.assert_allclose(weighted.features(batch), expected, rtol=1e-4, atol=1e-6)


def test_frozen_norms_keep_their_statistics(tmp_path):
    """Then the gradients of accumulated small batches are those of one large batch."""
    torch.manual_seed(0)
    save_file(build_network(config()).net.state_dict(), tmp_path / "net.safetensors")
    model = build_network(config(weights=str(tmp_path / "net.safetensors"), frozen_norms=True)).train()
    set_frozen_eval(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    batch, labels = images(64, n=4), torch.zeros(4, len(LABELS))
    bce(model(batch), labels).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        (bce(model(batch[part]), labels[part]) / 2).backward()
    for one, other in zip(grads, (p.grad for p in model.parameters() if p.requires_grad), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    assert before and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(p.requires_grad for norm in batch_norms(model) for p in norm.parameters())


def test_the_box_loss_asks_where_the_evidence_is():
    maps, boxes = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    boxes[0, 1, :2, :2] = 255  # the first of four cells, of class 1
    assert box_loss(maps, boxes).item() == pytest.approx(np.log(4))  # evidence everywhere alike
    maps[0, 1, 0, 0] = 3.0
    share = np.exp(3) / (np.exp(3) + 3)
    assert box_loss(maps, boxes).item() == pytest.approx(-np.log(share), abs=1e-5)
    assert box_loss(maps + 7, boxes).item() == pytest.approx(-np.log(share), abs=1e-5)  # the level is free
    boxes[0, 2, 2:, 2:] = 255  # two maps count, their mean
    assert box_loss(maps, boxes).item() == pytest.approx((np.log(4) - np.log(share)) / 2, abs=1e-5)
    assert box_loss(maps, torch.zeros_like(boxes)).item() == 0
    maps.requires_grad_(True)
    box_loss(maps, boxes).backward()
    assert maps.grad[0, 0].abs().sum() == 0 and maps.grad[0, 1, 0, 0] < 0 < maps.grad[0, 1, 1, 1]


def test_attention_starts_as_a_dimmed_image():
    torch.manual_seed(0)
    model = build_network(config(attention=True)).eval()
    plain = build_network(config()).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("attention.")})
    x = model.scaled(images(64))
    with torch.inference_mode():
        expected = plain.net(x * torch.sigmoid(torch.tensor(2.0))).mean((2, 3))
        np.testing.assert_allclose(model.pooled(images(64)), expected, rtol=1e-4, atol=1e-6)


def test_the_last_layer_stays_exact_in_low_precision():
    torch.manual_seed(0)
    model = build_network(config("tf_efficientnet_lite0", attention=True, weighting=True)).train()
    batch = images(64, 2, 4).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        model.eval()
        np.testing.assert_allclose(model.cam(batch).mean((2, 3)) + model.head.bias, model(batch), atol=1e-5)


def test_weights_from_imagenet_and_from_a_file(tmp_path):
    model = build_network(config("tf_efficientnet_lite0", weights="imagenet", attention=True)).eval()
    assert "ImageNet" in model.loaded.source
    assert {name.split(".")[0] for name in model.loaded.new} == {"attention", "head"}
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    again = build_network(config("tf_efficientnet_lite0", attention=True), str(tmp_path / "whole.safetensors")).eval()
    assert again.loaded.new == ()
    with torch.inference_mode():
        assert torch.equal(model(images(64)), again(images(64)))
    with pytest.raises(InputError, match="of another network"):
        build_network(config("densenet121", weights=str(tmp_path / "whole.safetensors")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "densnet121"}, "similar names: densenet121"),
        ({"backbone": "mixer_s16_224", "size": 224}, r"mixer_s16_224.* no feature map"),
        ({"backbone": "vit_tiny_patch16_224", "size": 72}, "72 px .its patches are 16"),
    ],
)
def test_networks_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        build_network(config(**options))


def test_wrong_channels_are_told():
    with pytest.raises(InputError, match="mask channel"):
        build_network(config(weighting=True))(images(64))
    with pytest.raises(InputError, match="one gray channel"):
        build_network(config())(images(64, 2))


def test_fusion_weighs_both_branches():
    one, other = config(), config("tf_efficientnet_lite0")
    torch.manual_seed(0)
    wide = build_fusion(Config(views="both", whole=one, lungs=other, store_size=256))
    after = torch.rand(1)
    assert wide.weight.shape == (14, sum(build_network(branch).width for branch in (one, other)))
    torch.manual_seed(0)
    fusion = FusionNet(wide.in_features, 14)  # looking at the branches' widths draws nothing
    assert torch.equal(fusion.weight, wide.weight) and torch.equal(torch.rand(1), after)
    fusion = FusionNet(5, 14)
    features = np.random.default_rng(0).normal(size=(10000, 2, 5)).astype(np.float32)  # more than one block
    weight, bias = (part.detach().double().numpy() for part in (fusion.weight, fusion.bias))
    probs = 1 / (1 + np.exp(-(features.astype(float) @ weight.T + bias)))
    found = fusion.probs(features[:, :1])
    assert found.shape == (10000, 14) and found.dtype == np.float64
    np.testing.assert_allclose(found, probs[:, 0], atol=1e-6)
    np.testing.assert_allclose(fusion.probs(features), probs.mean(1), atol=1e-6)
    assert fusion.probs(features[:0]).shape == (0, 14)
