"""The head and Grad-CAM worked by hand on a network of one convolution, then timm's networks against autograd."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import InputError
from common.nn.classifier import Classifier
from common.train.checkpoint import load_weights
from solutions.covid19.config import ORIGINS, NetworkConfig
from solutions.covid19.models import Adversarial, adversarial_loss, build_network


def config(backbone="test_resnet", size=64, **options):
    return NetworkConfig(**{"backbone": backbone, "weights": "none", "size": size, "hidden": (), **options})


def images(size, channels=1, n=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def by_hand(hidden=()):
    """A network whose two feature maps are the image x and 10 - x."""
    net = nn.Conv2d(3, 2, 1)
    net.weight.data = torch.tensor([[1.0, 0, 0], [-1, 0, 0]])[..., None, None]
    net.bias.data = torch.tensor([0.0, 10])
    return Classifier(net, 2, (0, 0, 0), (1 / 255,) * 3, 1, hidden, dropout=0.5).eval()


X = torch.tensor([[[[0, 4], [8, 4]]]], dtype=torch.uint8)  # mean 4, so the pooled features are 4 and 6


def test_one_layer_by_hand():
    model = by_hand()
    model.head.weight.data, model.head.bias.data = torch.tensor([[1.0, -1]]), torch.tensor([0.5])
    np.testing.assert_allclose(model.features(X).detach()[0, 1], [[10, 6], [2, 6]], atol=1e-5)
    assert model(X).item() == pytest.approx(4 - 6 + 0.5)
    # the gradient in a cell is the weight / 4; (x - (10 - x)) / 4 is -2.5, -0.5, 1.5, -0.5
    np.testing.assert_allclose(model.heat(X)[0], [[0, 0], [1.5, 0]], atol=1e-5)
    np.testing.assert_allclose(model.heat(X, -1)[0], [[2.5, 0.5], [0, 0.5]], atol=1e-5)  # against the class


def test_hidden_layers_by_hand():
    model = by_hand(hidden=(2,))
    model.hidden[0].weight.data = torch.tensor([[1.0, -1], [0.5, 0.25]])
    model.hidden[0].bias.data = torch.tensor([1.0, 0])  # 4 - 6 + 1 is under 0: the first unit is silent
    model.head.weight.data, model.head.bias.data = torch.tensor([[5.0, 2]]), torch.tensor([-1.0])
    assert model(X).item() == pytest.approx(2 * (0.5 * 4 + 0.25 * 6) - 1)
    # through the second unit alone: 2 * (0.5 x + 0.25 (10 - x)) / 4 = 1.25 + x / 8
    np.testing.assert_allclose(model.heat(X)[0], [[1.25, 1.75], [2.25, 1.75]], atol=1e-5)


def test_dropout_comes_before_the_last_layer_and_in_training_alone():
    model = by_hand()
    model.head.weight.data, model.head.bias.data = torch.tensor([[1.0, 1]]), torch.tensor([0.0])
    assert model(X).item() == model(X).item() == pytest.approx(10)
    torch.manual_seed(0)
    assert {round(model.train()(X).item()) for _ in range(64)} == {0, 8, 12, 20}  # each feature doubled or left out


@pytest.mark.parametrize(
    ("backbone", "size", "cells"),
    [("hrnet_w18_small", 64, 2), ("tf_efficientnet_lite0", 96, 3), ("resnet18", 128, 4), ("convnext_atto", 64, 2)],
)
def test_without_hidden_layers_grad_cam_is_the_class_activation_map(backbone, size, cells):
    torch.manual_seed(0)
    model = build_network(config(backbone, size)).eval()
    nn.init.normal_(model.head.weight)
    batch = images(size)
    with torch.inference_mode():
        features, logits, heat = model.features(batch), model(batch), model.heat(batch)
        cam = torch.einsum("k,bkhw->bhw", model.head.weight[0], features)
    assert features.shape == (2, model.width, cells, cells) and features.dtype == torch.float32
    assert logits.shape == (2, 1) and logits.dtype == heat.dtype == torch.float32 and model.loaded is None
    np.testing.assert_allclose(heat, cam.clamp_min(0) / cells**2, rtol=1e-4, atol=1e-6)
    bias = model.head.bias.item()
    np.testing.assert_allclose(cam.mean((1, 2)) + bias, logits[:, 0], rtol=1e-3, atol=1e-4)
    assert (logits[0] - logits[1]).abs() > 1e-5  # of the images, not of the bias alone


def test_grad_cam_is_that_of_autograd_image_by_image():
    torch.manual_seed(0)
    model = build_network(config("resnet18", hidden=(8, 4))).eval()
    assert [tuple(layer.weight.shape) for layer in (*model.hidden[::2], model.head)] == [(8, 512), (4, 8), (1, 4)]
    batch, expected = images(64, n=3), []
    for image in batch:
        features = model.features(image[None])
        features.retain_grad()
        model(features.mean((2, 3))).sum().backward()
        expected.append((features.grad.mean((2, 3), keepdim=True) * features).sum(1).clamp_min(0)[0].detach())
    model.zero_grad()
    assert max(each.max() for each in expected) > 0
    for around in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with around():
            heat = model.heat(batch)
        np.testing.assert_allclose(heat, torch.stack(expected), rtol=1e-3, atol=1e-6)
        assert not heat.requires_grad and all(p.grad is None for p in model.parameters())


def test_the_adversary_learns_collections_and_the_features_unlearn_them():
    torch.manual_seed(0)
    net, target = nn.Conv2d(3, 2, 1), torch.tensor([[1.0, 3]])
    model = Adversarial(net, 2, (0, 0, 0), (1 / 255,) * 3, dropout=0.0, strength=0.5).train()
    output = model(X)
    assert output.shape == (1, 1 + 2 * ORIGINS)
    adversarial_loss(output, target).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    pooled = model.pooled(X)
    origins = model.origin(pooled)[:, ORIGINS:]  # those given the label 1
    torch.testing.assert_close(output[:, 1 + ORIGINS :], origins)
    label, origin = nn.functional.softplus(-model.head(pooled)).sum(), -origins.log_softmax(1)[0, 3]
    heads = [*model.head.parameters(), *model.origin.parameters()]
    plain = torch.autograd.grad(label + origin, heads, retain_graph=True)
    names = [name for name, _ in model.named_parameters() if not name.startswith("net.")]
    assert all(torch.allclose(found[name], grad, atol=1e-6) for name, grad in zip(names, plain, strict=True))
    reversed_ = torch.autograd.grad(label - 0.5 * origin, list(net.parameters()))
    assert torch.allclose(found["net.weight"], reversed_[0], atol=1e-5) and found["net.weight"].abs().max() > 0
    model.eval()
    assert torch.equal(model(X), model.head(model.pooled(X)))
    assert adversarial_loss(model(X), target).item() == pytest.approx(label.item(), rel=1e-5)


def test_the_head_stays_exact_in_low_precision():
    torch.manual_seed(0)
    model = build_network(config("tf_efficientnet_lite0", hidden=(16,), dropout=0.0)).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(64, n=4))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_weights_from_a_file(tmp_path):
    path = tmp_path / "whole.safetensors"
    save_file(build_network(config(hidden=(4,))).state_dict(), path)
    deeper = build_network(config(hidden=(6,)), str(path))  # a backbone goes into a network with another head
    assert {name.split(".")[0] for name in deeper.loaded.new} == {"hidden", "head"}
    with pytest.raises(InputError, match=r"whole\.safetensors"):
        load_weights(path, build_network(config(hidden=(6,))))


def test_networks_that_cannot_be_built():
    with pytest.raises(InputError, match="similar names: hrnet_w32"):
        build_network(config("hrnet_w23"))
    with pytest.raises(InputError, match="one gray channel"):
        build_network(config())(images(64, 2))
