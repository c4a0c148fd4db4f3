"""What a network sees, its batches, its figures and its heat maps, on a small stand-in for what `prepare` leaves."""

import pickle
import random
from dataclasses import replace
from typing import get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from torch import nn

from common.infer import tta
from common.network import predict, train, train_loader
from common.nn.classifier import Classifier
from solutions.covid19 import models
from solutions.covid19.config import DEMO, VIEWS, AuditConfig, NetworkConfig
from solutions.covid19.models import apply_view, covid_network, heat_maps, view_dataset

SIDE, N = 72, 12
TINY = NetworkConfig(
    backbone="test_resnet",
    weights="none",
    size=36,
    hidden=(8,),
    dropout=0.0,
    augmentation="light",
    epochs=12,
    batch_size=4,
    lr=5e-3,
    optimizer="adam",
    weight_decay=0.0,
    schedule="constant",
    metric="-loss",
    precision="fp32",
    averaging=("last",),
)
CONFIG = replace(DEMO, network=TINY, audit=AuditConfig(margin=0.1), n_folds=2, folds=(0, 1))


@pytest.fixture
def job(job_of):
    """Stored squares whose positives have a bright patch in the lungs; a bright corner says nothing."""
    images = np.random.default_rng(0).integers(1, 60, (N, SIDE, SIDE), dtype=np.uint8)
    masks = np.zeros((N, SIDE, SIDE), np.uint8)
    masks[:, 9:-9, 6:30] = masks[:, 9:-9, -27:-9] = 1
    images[::2, 20:40, 10:26] += 180
    images[::3, :8, :8] += 180
    table = pd.DataFrame({"image_id": [f"i{k}" for k in range(N)], "row": range(N), "split": "train", "role": "main"})
    return job_of(CONFIG, table.assign(label=(np.arange(N) + 1) % 2, fold=np.arange(N) // 2 % 2), images, masks)


# ---- views ---------------------------------------------------------------------------------------------------------


def test_views_by_hand():
    image = np.arange(1, 26, dtype=np.uint8).reshape(5, 5)
    mask = np.zeros((5, 5), np.uint8)
    mask[1:3, 2] = 1
    assert apply_view(image, None, "image", 0.2) is image
    lungs, background = apply_view(image, mask, "lungs", 0.2), apply_view(image, mask, "background", 0.2)
    assert lungs[1:3, 2].tolist() == [8, 13] and lungs.sum() == 21 and lungs.dtype == np.uint8
    assert np.array_equal(lungs + background, image) and background[1, 2] == 0
    assert np.array_equal(apply_view(image, mask * 255, "lungs", 0.2), lungs)
    edge = apply_view(image, mask, "border", 0.2)
    assert (edge[1:4, 1:4] == 0).all() and np.array_equal(edge == 0, np.pad(np.ones((3, 3), bool), 1))
    assert np.array_equal(apply_view(image, mask, "border", 0.01), edge)  # one pixel at least
    mask[2:, 0] = 1  # a lung that reaches into the margin
    assert np.flatnonzero(apply_view(image, mask, "border", 0.2) != edge).tolist() == [10, 15, 20]
    assert apply_view(image, mask, "border", 0.2)[2:, 0].tolist() == [0, 0, 0]
    assert image.min() == 1  # the image itself is left alone


@pytest.mark.parametrize("augmentation", ["none", "light", "paper"])
@pytest.mark.parametrize("view", VIEWS)
def test_nothing_hidden_reaches_the_network(job, view, augmentation):
    images, masks = job.images.store.images, np.load(job.images.arrays["masks"])
    transform = models.augmentation(augmentation, TINY.size)
    hidden = np.stack([apply_view(np.ones_like(i), m, view, 0.1) == 0 for i, m in zip(images, masks, strict=True)])
    other = np.where(hidden, 255 - images, images)
    changed = np.where(hidden, images, 255 - images)
    items = [
        [view_dataset(each, masks, [3, 1], view, 0.1, TINY.size, transform)[1, seed][0] for seed in range(3)]
        for each in (images, other, changed)
    ]
    for item, same, seen in zip(*items, strict=True):
        assert item.shape == (1, 36, 36) and item.dtype == torch.uint8
        assert torch.equal(item, same) and not torch.equal(item, seen)


def test_the_image_shrinks_by_area_after_the_view(job):
    images, masks = job.images.store.images, np.load(job.images.arrays["masks"])
    image, row = view_dataset(images, masks, [5, 3], "lungs", 0.1, 36)[1]
    inside = np.where(masks[3] == 1, images[3], 0).reshape(36, 2, 36, 2).mean((1, 3))
    np.testing.assert_allclose(image[0], inside, atol=0.51)
    assert int(row) == 3
    np.testing.assert_array_equal(view_dataset(images, None, [3], "image", 0.1, SIDE)[0][0][0], images[3])


# ---- augmentation --------------------------------------------------------------------------------------------------


def test_every_named_augmentation_exists():
    names = get_type_hints(NetworkConfig)["augmentation"].__args__
    assert [models.augmentation(name, 64) is None for name in names] == [name == "none" for name in names]


def test_light_moves_within_its_limits():
    pipeline = models.light(64)
    flips, turns, zooms, shifts = [], [], [], []
    for seed in range(800):
        matrix = pipeline.transforms[0].draw(random.Random(seed))
        flips.append(np.linalg.det(matrix) < 0)
        zooms.append(np.hypot(*matrix[:2, 1]))
        turns.append(np.degrees(np.arctan2(-matrix[0, 1], matrix[1, 1])))
        shifts.append(matrix[:2, 2] / 2)
        assert np.isclose(np.hypot(*matrix[:2, 0]), zooms[-1]) and np.allclose(matrix[2], [0, 0, 1])
    assert abs(np.mean(flips) - 0.5) < 0.05
    for values, limit, middle in ((turns, 10, 0), (zooms, 0.1, 1), (np.ravel(shifts), 0.05, 0)):
        off = np.abs(np.subtract(values, middle))
        assert 0.95 * limit < off.max() <= limit + 1e-9 and abs(np.mean(off < 1e-9) - 0.25) < 0.06


def test_light_keeps_black_black_and_the_rest_near(job):
    pipeline, black, greys = models.light(64), np.zeros((64, 64), np.uint8), []
    for seed in range(60):
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        assert pipeline(image=black)["image"].max() <= 1
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        greys.append(np.median(pipeline(image=black + 100)["image"]))
    assert 80 < min(greys) < 95 and 105 < max(greys) < 120
    dataset = view_dataset(job.images.store.images, None, [0], "image", 0.1, 64, pipeline)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[0, 7][0], dataset[0, 7][0]) and not torch.equal(dataset[0, 7][0], dataset[0][0])


# ---- one training --------------------------------------------------------------------------------------------------


def test_labels_stay_with_their_rows(job):
    network = covid_network(replace(CONFIG, network=replace(TINY, augmentation="none")), 0, view="image")
    rows, expected = np.array([7, 2, 2, 5]), {}
    for row, label in ((7, 0.0), (2, 1.0), (5, 0.0)):
        expected[network.dataset(job, [row], False, False)[0][0].numpy().tobytes()] = label
    loader = train_loader(job, network, rows)
    loader.batch_sampler.set_epoch(0, 1)
    ((images, labels),) = loader
    assert [expected[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert labels.dtype == torch.float32


def test_figures_are_those_of_sklearn(job):
    logits = torch.randn(N, generator=torch.Generator().manual_seed(0)).numpy()
    truth, network = job.images.table["label"].to_numpy(), covid_network(CONFIG, 0)
    found = network.figures(job, logits, np.arange(N))
    probs = 1 / (1 + np.exp(-logits.astype(float)))
    assert list(found) == ["loss", "auroc", "accuracy"] and all(isinstance(value, float) for value in found.values())
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, probs))
    assert found["loss"] == pytest.approx(log_loss(truth, probs), rel=1e-5)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, probs >= 0.5)) != 1
    assert np.isnan(network.figures(job, logits[:1], np.arange(1))["auroc"])


def test_a_dozen_images_are_learnt_by_heart(job):
    every = np.arange(N)
    config = replace(CONFIG, network=replace(TINY, augmentation="none"))
    network = covid_network(config, 0, rows=lambda job, fold: (every, every))
    done = train(job, network)
    assert done.figures["auroc"] == done.figures["accuracy"] == 1.0
    probs = predict(job, [network], np.array([8, 1, 0]))[:, 0]
    assert (probs > 0.5).tolist() == [True, False, True]
    model = network.load(job.run).eval()
    both = predict(job, [network, network], np.array([8]), tta.views(("flip",)))[0]
    with torch.inference_mode():
        image = network.dataset(job, [8], False, False)[0][0][None]
        expected = (model(image).sigmoid() + model(image.flip(-1)).sigmoid()) / 2
    np.testing.assert_allclose(both, expected[0], atol=1e-6)
    assert tta.views(()) == [tta.IDENTITY]


class Cells(nn.Module):
    """One feature map: the mean grey of squares of nine pixels."""

    def forward(self, x):
        return nn.functional.avg_pool2d(x[:, :1], 9)


def test_heat_maps_follow_the_view_and_the_rows(job, monkeypatch):
    model = Classifier(Cells(), 1, (0, 0, 0), (1 / 255,) * 3)
    nn.init.constant_(model.head.weight, 2.0)
    monkeypatch.setattr(models.Network, "load", lambda network, run: model)
    rows, images = np.array([4, 0, 3]), job.images.store.images
    cells = images.reshape(N, 4, 18, 4, 18).mean((2, 4))  # of the image as it is, twice the network's side
    maps = heat_maps(job, covid_network(CONFIG, 0, view="image"), rows, "cpu", "")
    assert maps.shape == (3, 4, 4) and maps.dtype == np.float32 and not model.training
    np.testing.assert_allclose(maps, 2 * cells[rows] / 16, atol=0.1)  # grey levels are rounded in between
    with torch.no_grad():
        edge = heat_maps(job, covid_network(CONFIG, 0, view="border"), rows, "cpu", "")
    assert (edge[:, 1:3, 1:3] == 0).all() and (edge[:, 0] > 0).all()
