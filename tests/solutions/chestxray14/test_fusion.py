"""Training on features: fusion of two views, and the linear probe."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.data.loaders import EpochSampler, FeatureDataset
from common.network import train
from common.nn.losses import bce
from solutions.chestxray14 import models
from solutions.chestxray14.models import auroc_and_loss, build_fusion, pooled_features
from solutions.chestxray14.pipeline import fold_networks
from tests.solutions.chestxray14.squares import BOTH, TINY, N, jobs_on_squares, stored_squares, view  # noqa: F401 - fixtures


@pytest.fixture
def branches(monkeypatch):
    """The Networks of fold 0 of BOTH, whose views are random networks that count as trained."""
    *views_, fusion = fold_networks(BOTH, 0)
    torch.manual_seed(0)
    models = {network.stage: network.build() for network in views_}
    loaded = type(fusion).load
    monkeypatch.setattr(
        type(fusion), "load", lambda self, run, variant=None: models.get(self.stage) or loaded(self, run, variant)
    )
    return SimpleNamespace(networks=views_, fusion=fusion, models=models.values())


class Whole(nn.Module):
    """Both frozen networks in place, with the layer that fuses them."""

    def __init__(self, branches, fusion):
        super().__init__()
        self.branches, self.fusion = nn.ModuleList(branches).requires_grad_(False).eval(), fusion

    def forward(self, images):
        return self.fusion(torch.cat([model.pooled(x) for model, x in zip(self.branches, images, strict=True)], 1))


def test_training_on_features_is_training_with_frozen_branches(job, branches):
    rows = np.array([9, 2, 4, 3, 11, 0, 1, 7])
    ours = job()
    dataset = branches.fusion.dataset(ours, rows, True, True)
    width = sum(model.width for model in branches.models)
    assert dataset.tensors[0].shape == (8, 2, width) and dataset.tensors[0].dtype == torch.float32
    seen_by = [view(ours.images, rows, one.config, one.stage) for one in branches.networks]
    layers = [build_fusion(BOTH) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    start = layers[0].weight.detach().clone()
    networks = layers[0], Whole(branches.models, layers[1])
    optimizers = [torch.optim.Adam(layer.parameters(), 1e-2) for layer in layers]
    sampler, mirrored = EpochSampler(8, 4, 0), set()
    for epoch in range(2):
        sampler.set_epoch(epoch, 2)
        for keys in sampler:
            mirrored |= {seed % 2 for _, seed in keys}
            features, labels = (torch.stack(part) for part in zip(*(dataset[key] for key in keys), strict=True))
            pixels = [
                torch.stack([view[i][0].flip(-1) if seed % 2 else view[i][0] for i, seed in keys]) for view in seen_by
            ]
            for network, inputs, optimizer in zip(networks, (features, pixels), optimizers, strict=True):
                optimizer.zero_grad()
                bce(network(inputs), labels).backward()
                optimizer.step()
    assert mirrored == {0, 1} and (layers[0].weight - start).abs().max() > 1e-2
    np.testing.assert_allclose(layers[0].weight.detach(), layers[1].weight.detach(), atol=1e-4)


def test_features_are_mirrored_only_where_the_images_were(job, branches):
    plain = replace(TINY, augmentation="none")
    for augmentation, n in (("none", 1), ("flip", 2)):
        config = replace(BOTH, whole=replace(plain, augmentation=augmentation), lungs=replace(plain, weighting=False))
        fusion = fold_networks(config, 0)[-1]
        assert fusion.dataset(job(config), np.arange(N), True, True).tensors[0].shape[1] == n
        assert fusion.dataset(job(config), np.arange(N), False, True).tensors[0].shape[1] == 1  # held-out images
    dataset = FeatureDataset(torch.stack([torch.zeros(2, 3), torch.ones(2, 3)], 1), torch.zeros(2, 14))
    assert [dataset[key][0][0].item() for key in (0, (0, 4), (1, 5))] == [0, 0, 1]


def test_fusion_through_the_loop(job, branches, monkeypatch):
    ours = job()
    for network in branches.networks:
        network.folder(ours.run).mkdir(parents=True)
        (network.folder(ours.run) / "final.safetensors").touch()
    torch.manual_seed(0)
    truth = np.tile(np.eye(3, 14, dtype=np.float32), (4, 1))
    features = pooled_features(ours, branches.networks, np.arange(N), False)
    done = train(ours, branches.fusion)
    with torch.inference_mode():
        before = auroc_and_loss(truth, build_fusion(BOTH)(torch.from_numpy(features[:, 0])).numpy())
    assert len(done.history) == 30 and done.figures["loss"] < before["loss"] / 2 and done.figures["auroc"] > 0.8
    with monkeypatch.context() as patch:  # a finished layer needs no features
        patch.setattr(models, "compute", None)
        assert train(ours, branches.fusion).figures == done.figures
    assert pooled_features(ours, branches.networks, np.arange(0), False).shape == (0, 1, features.shape[2])


def test_a_probe_trains_the_last_layer_on_features(job, tmp_path):
    """The exported network is the pretrained one, apart from its last layer, and takes images."""
    torch.manual_seed(0)
    start = models.build_network(replace(TINY, attention=False))
    save_file(start.net.state_dict(), tmp_path / "net.safetensors")
    own = replace(TINY, attention=False, frozen=True, weights=str(tmp_path / "net.safetensors"), epochs=20, lr=5e-2)
    ours = job(replace(BOTH, views="whole", whole=own))
    (network,) = fold_networks(ours.config, 0)
    mirrored, plain = (network.dataset(ours, np.arange(N), augment, True) for augment in (True, False))
    assert mirrored.tensors[0].shape == (N, 2, start.width) and plain.tensors[0].shape == (N, 1, start.width)
    done, trained = train(ours, network), network.load(ours.run).eval()
    assert done.figures["auroc"] > 0.8 and done.figures["loss"] < done.history["loss"].iloc[0]
    tensors = start.net.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in trained.net.state_dict().items())
    image = network.dataset(ours, [5], False, False)[0][0][None]
    with torch.inference_mode():
        assert torch.allclose(trained(image), trained(plain[5][0][None]), atol=1e-5)
        assert torch.allclose(trained(image.flip(-1)), trained(mirrored[5, 1][0][None]), atol=1e-5)
