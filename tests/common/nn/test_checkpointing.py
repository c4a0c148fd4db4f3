"""Gradient checkpointing: equal gradients from fewer saved activations, in backbones that can do it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from common.config import FitConfig, GateConfig
from common.cost import Machine, measure
from common.errors import InputError
from common.network import Network, save_memory
from common.nn.detectors import retinanet
from common.nn.losses import bce
from common.nn.models import checkpoint_backbone, classifier, segmenter
from common.nn.norms import set_frozen_eval
from common.options import Options

IMAGES = torch.randint(0, 256, (2, 1, 96, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
BOXES = [{"boxes": torch.tensor([[8.0, 8, 60, 60]]), "labels": torch.tensor([1])}] * 2


def loss_of(model):
    return sum(model(IMAGES, BOXES).values()) if hasattr(model, "background") else model(IMAGES).square().mean()


def gradients_and_bytes(model):
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(0)
    model.zero_grad()
    set_frozen_eval(model.train())
    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(model)
    loss.backward()
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    size = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in owned)
    return [p.grad.clone() for p in model.parameters() if p.requires_grad], size


@pytest.mark.parametrize(
    ("build", "most"),
    [
        (lambda: classifier("convnext_atto", 2, "none", drop_path_rate=0.2), 0.3),
        (lambda: classifier("vit_tiny_patch16_224", 2, "none", img_size=96, depth=4), 0.3),
        (lambda: segmenter("unet", "convnext_atto", "none"), 0.7),
        (lambda: retinanet("resnet18", 2, 96, "none", channels=64), 0.9),  # its norms are frozen
    ],
    ids=["convnext", "vit", "segmenter", "detector"],
)
def test_gradients_are_equal_and_fewer_activations_are_kept(build, most):
    torch.manual_seed(0)
    model = build()
    plain, whole = gradients_and_bytes(model)
    checkpoint_backbone(model)
    again, less = gradients_and_bytes(model)
    assert less < most * whole
    torch.testing.assert_close(again, plain)


def test_networks_that_cannot_are_refused():
    for name, reason in (("legacy_xception", "no timm backbone"), ("resnet18", "batch norms are frozen")):
        with pytest.raises(InputError, match=f"--grad-checkpointing.*{reason}"):
            checkpoint_backbone(classifier(name, 2, "none"))


def test_plan_counts_less_and_networks_without_a_backbone_are_left_alone():
    config = GateConfig(batch_size=2, precision="fp32")
    build = lambda weights: classifier("convnext_atto", 1, "none")  # noqa: E731
    network = Network(0, "gate", config, build, None, bce, None, None)
    items, machine = [(image, torch.ones(1)) for image in IMAGES], Machine(1, "T4", 2, 2, 14.7, None)
    jobs = [
        SimpleNamespace(config=SimpleNamespace(seed=0), device=torch.device("cpu"), options=Options(**given))
        for given in ({}, {"grad_checkpointing": True})
    ]
    plain, saving = (measure(job, network, items, machine) for job in jobs)
    assert saving.each < 0.3 * plain.each and saving.fixed == plain.fixed
    assert saving.train == pytest.approx(4 / 3 * plain.train)
    save_memory(jobs[1], replace(network, config=FitConfig()), torch.nn.Linear(2, 1))
