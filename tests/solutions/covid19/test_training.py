"""Views, batches, steps and figures, on a small stand-in for what `prepare` leaves."""

import pickle
import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from torch import nn

from common.errors import InputError
from common.train.loop import fit
from solutions.covid19 import training
from solutions.covid19.config import DEMO, VIEWS, AuditConfig, NetworkConfig
from solutions.covid19.models import build_network
from solutions.covid19.training import CovidDataset, shown

SIDE = 72
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
    precision="fp32",
)


class Prepared:
    """Stored squares whose positives have a bright patch in the lungs; a bright corner says nothing."""

    def __init__(self, folder, n=12):
        rng = np.random.default_rng(0)
        images = rng.integers(1, 60, (n, SIDE, SIDE), dtype=np.uint8)
        masks = np.zeros((n, SIDE, SIDE), np.uint8)
        masks[:, 9:-9, 6:30] = masks[:, 9:-9, -27:-9] = 1
        images[::2, 20:40, 10:26] += 180
        images[::3, :8, :8] += 180
        self.truth = (np.arange(n) % 2 == 0).astype(np.float32)
        np.save(folder / "images.npy", images)
        np.save(folder / "masks.npy", masks)
        self.store = SimpleNamespace(images=np.load(folder / "images.npy", mmap_mode="r"))
        self.masks, self.all = folder / "masks.npy", np.arange(n)

    def labels(self, rows):
        return self.truth[rows]


@pytest.fixture
def data(tmp_path):
    return Prepared(tmp_path)


def context(workers=0):
    config = replace(DEMO, seed=0, audit=AuditConfig(margin=0.1))
    return SimpleNamespace(config=config, workers=workers, device=torch.device("cpu"))


# ---- views ---------------------------------------------------------------------------------------------------------


def test_views_by_hand():
    image = np.arange(1, 26, dtype=np.uint8).reshape(5, 5)
    mask = np.zeros((5, 5), np.uint8)
    mask[1:3, 2] = 1
    assert shown(image, None, "image") is image
    lungs, background = shown(image, mask, "lungs"), shown(image, mask, "background")
    assert lungs[1:3, 2].tolist() == [8, 13] and lungs.sum() == 21 and lungs.dtype == np.uint8
    assert np.array_equal(lungs + background, image) and background[1, 2] == 0
    assert np.array_equal(shown(image, mask * 255, "lungs"), lungs)
    edge = shown(image, None, "border", 0.2)
    assert (edge[1:4, 1:4] == 0).all() and np.array_equal(edge == 0, np.pad(np.ones((3, 3), bool), 1))
    assert np.array_equal(shown(image, None, "border", 0.01), edge)  # one pixel at least
    assert image.min() == 1  # the image itself is left alone


def test_what_cannot_be_shown():
    image = np.ones((6, 6), np.uint8)
    for arguments, message in (
        ((None, "lungs"), "lungs: an image of .6, 6. needs a mask"),
        ((np.ones((3, 3)), "background"), "needs a mask of its size"),
        ((None, "border"), "how wide"),
        ((None, "heart"), "'heart': choose lungs"),
    ):
        with pytest.raises(InputError, match=message):
            shown(image, *arguments)


@pytest.mark.parametrize("augmentation", ["none", "light", "paper"])
@pytest.mark.parametrize("view", VIEWS)
def test_nothing_hidden_reaches_the_network(data, view, augmentation):
    images, masks = np.array(data.store.images), np.load(data.masks)
    transform = training.augmentation(augmentation, TINY.size)
    hidden = np.stack([shown(np.ones_like(i), m, view, 0.1) == 0 for i, m in zip(images, masks, strict=True)])
    other = np.where(hidden, 255 - images, images)
    changed = np.where(hidden, images, 255 - images)
    items = [
        [CovidDataset(each, masks, [3, 1], view, 0.1, TINY.size, transform)[1, seed][0] for seed in range(3)]
        for each in (images, other, changed)
    ]
    for item, same, seen in zip(*items, strict=True):
        assert item.shape == (1, 36, 36) and item.dtype == torch.uint8
        assert torch.equal(item, same) and not torch.equal(item, seen)


def test_the_image_shrinks_by_area_after_the_view(data):
    masks = np.load(data.masks)
    image, row = CovidDataset(data.store.images, masks, [5, 3], "lungs", None, 36)[1]
    inside = np.where(masks[3] == 1, data.store.images[3], 0).reshape(36, 2, 36, 2).mean((1, 3))
    np.testing.assert_allclose(image[0], inside, atol=0.51)
    assert int(row) == 3
    whole = CovidDataset(data.store.images, None, [3], "image", None, SIDE)
    np.testing.assert_array_equal(whole[0][0][0], data.store.images[3])


def test_views_with_masks_need_them(data):
    data.masks = None
    with pytest.raises(InputError, match="background: no lungs were found"):
        training.view_dataset(data, [1], TINY, "background")
    assert len(training.view_dataset(data, [1], TINY, "border", 0.1)) == 1


# ---- augmentation --------------------------------------------------------------------------------------------------


def test_every_named_augmentation_exists():
    names = get_type_hints(NetworkConfig)["augmentation"].__args__
    assert [training.augmentation(name, 64) is None for name in names] == [name == "none" for name in names]


def test_light_moves_within_its_limits():
    pipeline = training.light(64)
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


def test_light_keeps_black_black_and_the_rest_near(data):
    pipeline, black, greys = training.light(64), np.zeros((64, 64), np.uint8), []
    for seed in range(60):
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        assert pipeline(image=black)["image"].max() <= 1
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        greys.append(np.median(pipeline(image=black + 100)["image"]))
    assert 80 < min(greys) < 95 and 105 < max(greys) < 120
    dataset = CovidDataset(data.store.images, None, [0], "image", None, 64, pipeline)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[0, 7][0], dataset[0, 7][0]) and not torch.equal(dataset[0, 7][0], dataset[0][0])


# ---- batches -------------------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_the_workers(data):
    batches = []
    for workers in (0, 2):
        loader = training.train_loader(context(workers), data, data.all, data.truth, TINY, "lungs")
        loader.batch_sampler.set_epoch(1, 2)
        batches.append(list(loader))
    assert len(batches[0]) == 3 and batches[0][0][0].shape == (4, 1, 36, 36)
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    labels = torch.cat([labels for _, labels in batches[0]])
    assert labels.dtype == torch.float32 and sorted(labels.tolist()) == [0] * 6 + [1] * 6


def test_labels_stay_with_their_rows(data):
    rows = [7, 2, 2, 5]
    loader = training.train_loader(context(), data, rows, [1, 0, 0, 1], replace(TINY, augmentation="none"), "image")
    loader.batch_sampler.set_epoch(0, 1)
    expected = {
        training.view_dataset(data, [row], TINY, "image")[0][0].numpy().tobytes(): label
        for row, label in ((7, 1.0), (2, 0.0), (5, 1.0))
    }
    for images, labels in loader:
        assert [expected[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_labels_must_be_known(data):
    for labels, message in (
        ([0, 1, np.nan, 1], "row 2 has the label nan"),
        ([0, 1, 1, -1], "row 3 has the label -1"),
        ([0, 1], "4 rows need as many labels"),
    ):
        with pytest.raises(InputError, match=message):
            training.train_loader(context(), data, [0, 1, 2, 3], labels, TINY, "lungs")


def test_step_by_hand():
    logits = torch.tensor([[0.0], [np.log(3.0)]])  # probabilities 1/2 and 3/4
    batch = torch.zeros(2, 1, 4, 4), torch.tensor([1.0, 0.0])
    assert training.step(lambda _: logits, batch, "cpu").item() == pytest.approx((np.log(2) + np.log(4)) / 2)


def test_figures_are_those_of_sklearn():
    class Fixed(nn.Module):
        def forward(self, images):
            return logits[images[:, 0, 0, 0].long()]

    logits = torch.randn(9, 1, generator=torch.Generator().manual_seed(0))
    labels = np.array([0, 1, 1, 0, 0, 1, 0, 1, 0], np.float32)
    loader = [(torch.arange(i, i + 3).reshape(3, 1, 1, 1), None) for i in (0, 3, 6)]
    found = training.figures(Fixed(), loader, labels, "cpu")
    probs = logits[:, 0].sigmoid().double().numpy()
    assert list(found) == ["loss", "auroc", "accuracy"] and all(isinstance(value, float) for value in found.values())
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, probs))
    assert found["loss"] == pytest.approx(log_loss(labels, probs), rel=1e-5)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, probs >= 0.5)) != 1
    assert np.isnan(training.figures(Fixed(), loader, np.ones(9), "cpu")["auroc"])
    logits[4] = torch.nan
    with pytest.raises(InputError, match="no number any more"):
        training.figures(Fixed(), loader, labels, "cpu")


def trained(data, folder, view, epochs):
    config, ctx = replace(TINY, augmentation="none", epochs=epochs, averaging=("last",)), context()
    torch.manual_seed(0)
    loader = training.train_loader(ctx, data, data.all, data.truth, config, view)
    shown = training.held_out_loader(ctx, data, data.all, config, view)
    look = partial(training.figures, loader=shown, labels=data.truth, device=ctx.device)
    model = build_network(config)
    return model, fit(model, partial(training.step, device=ctx.device), loader, look, config, folder, device=ctx.device)


def test_a_dozen_images_are_learnt_by_heart(data, tmp_path):
    model, done = trained(data, tmp_path / "fold0" / "lungs", "lungs", 12)
    assert done.figures["auroc"] == done.figures["accuracy"] == 1.0
    probs = training.predict([model], data, [8, 1, 0], TINY, "lungs", "cpu", progress=False)
    assert probs.dtype == np.float64 and probs.shape == (3,) and (probs > 0.5).tolist() == [True, False, True]
    both = training.predict([model, model], data, [8], TINY, "lungs", "cpu", ("flip",), progress=False)
    with torch.inference_mode():
        image = training.view_dataset(data, [8], TINY, "lungs")[0][0][None]
        expected = (model(image).sigmoid() + model(image.flip(-1)).sigmoid()) / 2
    np.testing.assert_allclose(both, expected[0], atol=1e-6)
    assert training.predict([model], data, [], TINY, "lungs", "cpu").shape == (0,)
    edge = training.predict([model], data, [8], TINY, "border", "cpu", progress=False, margin=0.1)
    assert abs(edge[0] - probs[0]) > 1e-3
    with pytest.raises(InputError, match="how wide"):
        training.predict([model], data, [8], TINY, "border", "cpu", progress=False)
