"""Views, batches, steps and figures, on a small stand-in for what `prepare` leaves."""

import pickle
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import get_type_hints

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from common.data.loaders import EpochSampler
from common.errors import InputError
from common.train.loop import fit
from solutions.chestxray14 import training
from solutions.chestxray14.config import DEMO, FusionConfig, NetworkConfig
from solutions.chestxray14.models import build_fusion, build_network
from solutions.chestxray14.training import ViewDataset, view_dataset

SIDE, CELLS = 72, 24
TINY = NetworkConfig(
    backbone="test_resnet",
    weights="none",
    resize=72,
    size=64,
    attention=True,
    weighting=True,
    epochs=12,
    batch_size=6,
    lr=5e-3,
    optimizer="adam",
    weight_decay=0.0,
    schedule="constant",
    precision="fp32",
)


class Prepared:
    """Stored squares whose class is where a bright patch lies in the lungs; their crops are the negatives."""

    def __init__(self, folder, n=12):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 60, (n, SIDE, SIDE), dtype=np.uint8)
        self.truth = np.zeros((n, 14), np.float32)
        masks = np.zeros((n, CELLS, CELLS), np.uint8)
        masks[:, 3:-3, 2:10] = masks[:, 3:-3, -9:-3] = 255
        for row in range(n):
            kind = row % 3
            self.truth[row, kind] = 1
            top, left = [(12, 12), (12, 48), (44, 48)][kind]
            images[row, top : top + 16, left : left + 14] += 180
        np.save(folder / "images.npy", images)
        np.save(folder / "crops.npy", 255 - images)
        np.save(folder / "masks.npy", masks)
        self.store = SimpleNamespace(images=np.load(folder / "images.npy", mmap_mode="r"))
        self.masks, self.crops, self.all = folder / "masks.npy", folder / "crops.npy", np.arange(n)

    def labels(self, rows):
        return self.truth[rows]


@pytest.fixture
def data(tmp_path):
    return Prepared(tmp_path)


def context(config=DEMO, workers=0):
    return SimpleNamespace(config=replace(config, seed=0), workers=workers, device=torch.device("cpu"))


def centre(planes, size=64):
    start = (planes.shape[-1] - size) // 2
    return planes[..., start : start + size, start : start + size]


def test_the_view_is_the_centre_of_the_resized_image_and_mask(data):
    dataset = view_dataset(data, [5, 3], TINY, "whole")
    image, row = dataset[1]
    assert image.shape == (2, 64, 64) and image.dtype == torch.uint8 and int(row) == 3
    np.testing.assert_array_equal(image[0], data.store.images[3, 4:68, 4:68])
    mask = cv2.resize(np.load(data.masks)[3], (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(image[1], mask[4:68, 4:68])
    smaller = view_dataset(data, [3], replace(TINY, resize=36, size=33, weighting=False), "lungs")[0][0]
    shrunk = cv2.resize(255 - data.store.images[3], (36, 36), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(smaller, shrunk[None, 1:34, 1:34])


def test_a_flip_moves_image_and_mask(data):
    flipped = view_dataset(data, [0], TINY, "whole", training.augmentation("flip", 72))
    plain, seen = flipped[0][0], set()
    for seed in range(12):
        moved = flipped[0, seed][0]
        seen.add(torch.equal(moved, plain))
        assert torch.equal(moved, plain) or torch.equal(moved, plain.flip(-1))
    assert seen == {True, False} and not torch.equal(plain, plain.flip(-1))


def test_strong_augmentation_keeps_image_and_mask_together(tmp_path):
    mask = np.zeros((1, 96, 96), np.uint8)
    mask[0, 20:70, 15:40] = mask[0, 25:75, 55:85] = 255
    np.save(tmp_path / "masks.npy", mask)
    images = (60 + mask // 2).astype(np.uint8)
    dataset = ViewDataset(images, [0], 96, 96, tmp_path / "masks.npy", training.augmentation("podium", 96))
    overlaps, moved = [], set()
    for seed in range(40):
        image, lungs = dataset[0, seed][0].numpy()
        inside = lungs > 127
        bright = image > (np.median(image[inside]) + np.median(image[~inside])) / 2
        overlaps.append((bright & inside).sum() / (bright | inside).sum())
        moved.add(int(inside.sum()))
    assert min(overlaps) > 0.98 and len(moved) > 15
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[0, 7][0], dataset[0, 7][0])


def test_every_named_augmentation_exists():
    names = get_type_hints(NetworkConfig)["augmentation"].__args__
    assert [training.augmentation(name, 64) is None for name in names] == [name == "none" for name in names]


def test_batches_do_not_depend_on_the_workers(data):
    config, batches = replace(TINY, augmentation="podium"), []
    for workers in (0, 2):
        loader = training.train_loader(context(workers=workers), data, data.all, config, "whole")
        loader.batch_sampler.set_epoch(1, 2)
        batches.append(list(loader))
    assert len(batches[0]) == 2 and batches[0][0][0].shape == (6, 2, 64, 64)
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    labels = torch.cat([labels for _, labels in batches[0]])
    assert labels.dtype == torch.float32 and torch.equal(labels.sum(0)[:4], torch.tensor([4.0, 4, 4, 0]))


def test_what_is_missing_is_told(data, tmp_path):
    data.truth[7, 2] = np.nan
    with pytest.raises(InputError, match="row 7 has no label"):
        training.train_loader(context(), data, data.all, TINY, "whole")
    training.held_out_loader(context(), data, data.all, TINY, "whole")
    masks = np.load(data.masks)
    masks[4] = 0
    np.save(tmp_path / "empty.npy", masks)
    data.masks = tmp_path / "empty.npy"
    with pytest.raises(InputError, match=r"empty\.npy: the mask of row 4 is empty"):
        view_dataset(data, [4], TINY, "whole")[0]
    data.masks = data.crops = None
    with pytest.raises(InputError, match="no lungs were found"):
        view_dataset(data, [4], TINY, "whole")
    with pytest.raises(InputError, match="lungs: no lungs were found"):
        view_dataset(data, [4], replace(TINY, weighting=False), "lungs")


def test_figures_are_those_of_sklearn(data):
    class Fixed(nn.Module):
        def forward(self, images):
            return logits[images[:, 0, 0, 0].long()]

    rows = np.arange(9)
    logits = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    data.truth[:9, 5] = 1  # one kind only: no AUROC
    loader = [(torch.arange(i, i + 3).reshape(3, 1, 1, 1), None) for i in (0, 3, 6)]
    found = training.figures(Fixed(), loader, data, rows, "cpu")
    truth, probs = data.truth[:9], logits.sigmoid().double().numpy()
    assert found["auroc"] == pytest.approx(np.mean([roc_auc_score(truth[:, c], probs[:, c]) for c in range(3)]))
    assert found["loss"] == pytest.approx(log_loss(truth.ravel(), probs.ravel()), rel=1e-5)
    logits[4, 2] = torch.nan
    with pytest.raises(InputError, match="no number any more"):
        training.figures(Fixed(), loader, data, rows, "cpu")


def trained(data, folder, config, stage="whole"):
    ctx = context()
    torch.manual_seed(0)
    loader = training.train_loader(ctx, data, data.all, config, stage)
    shown = training.held_out_loader(ctx, data, data.all, config, stage)
    look = partial(training.figures, loader=shown, data=data, rows=data.all, device=ctx.device)
    model, step = build_network(config), partial(training.step, device=ctx.device)
    return model, fit(model, step, loader, look, config, folder, device=ctx.device)


def test_a_dozen_images_are_learnt_by_heart(data, tmp_path):
    config = replace(TINY, augmentation="none", epochs=18, averaging=("last",))
    model, done = trained(data, tmp_path / "fold0" / "whole", config)
    assert done.figures["auroc"] == 1.0 and done.history["train_loss"].iloc[-1] < 0.1
    probs = training.predict_view([model], data, [8, 0, 1], config, "whole", "cpu", progress=False)
    assert probs.dtype == np.float64 and probs.shape == (3, 14) and probs[:, :3].argmax(0).tolist() == [1, 2, 0]
    both = training.predict_view([model, model], data, [8], config, "whole", "cpu", ("flip",), progress=False)
    with torch.inference_mode():
        image = view_dataset(data, [8], config, "whole")[0][0][None]
        expected = (model(image).sigmoid() + model(image.flip(-1)).sigmoid()) / 2
    np.testing.assert_allclose(both, expected, atol=1e-6)


class Whole(nn.Module):
    """Both frozen networks in place, with the layer that fuses them."""

    def __init__(self, branches, fusion):
        super().__init__()
        self.branches, self.fusion = nn.ModuleList(branches.values()).requires_grad_(False).eval(), fusion

    def forward(self, images):
        return self.fusion(torch.cat([model.pooled(x) for model, x in zip(self.branches, images, strict=True)], 1))


def test_training_on_features_is_training_with_frozen_branches(data):
    config = replace(
        DEMO,
        views="both",
        whole=TINY,
        lungs=replace(TINY, weighting=False, size=32, resize=36),
        segmenter=replace(DEMO.segmenter, crop_size=SIDE),
        fusion=FusionConfig(batch_size=4, epochs=2),
    )
    ctx, rows = context(config), np.array([9, 2, 4, 3, 11, 0, 1, 7])
    torch.manual_seed(0)
    branches = {stage: build_network(getattr(config, stage)) for stage in config.stages}
    widths = [model.width for model in branches.values()]
    features = training.pooled_features(ctx, data, rows, branches, config)
    assert features.shape == (8, 2, sum(widths)) and features.dtype == np.float32
    views = [view_dataset(data, rows, getattr(config, stage), stage) for stage in config.stages]
    layers = [build_fusion(*widths) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    start = layers[0].weight.detach().clone()
    networks = layers[0], Whole(branches, layers[1])
    optimizers = [torch.optim.Adam(layer.parameters(), 1e-2) for layer in layers]
    loader = training.fusion_loader(ctx, data, rows, features, config.fusion)
    sampler, mirrored = EpochSampler(8, 4, 0), set()
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch, 2)
        sampler.set_epoch(epoch, 2)
        for batch, keys in zip(loader, sampler, strict=True):
            mirrored |= {seed % 2 for _, seed in keys}
            seen = [
                torch.stack([view[i][0].flip(-1) if seed % 2 else view[i][0] for i, seed in keys]) for view in views
            ]
            labels = torch.tensor(data.truth[rows[[i for i, _ in keys]]])
            assert torch.equal(batch[1], labels)
            loss = training.step(networks[0], batch, "cpu"), training.bce(networks[1](seen), labels)
            for part, optimizer in zip(loss, optimizers, strict=True):
                optimizer.zero_grad()
                part.backward()
                optimizer.step()
    assert mirrored == {0, 1} and (layers[0].weight - start).abs().max() > 1e-2
    np.testing.assert_allclose(layers[0].weight.detach(), layers[1].weight.detach(), atol=1e-4)
    with torch.inference_mode():
        found = training.fusion_figures(layers[0], features, data, rows, "cpu")
        logits = networks[1]([torch.stack([view[i][0] for i in range(8)]) for view in views])
    assert found["loss"] == pytest.approx(training.bce(logits, torch.tensor(data.truth[rows])).item(), rel=1e-3)


def test_features_are_mirrored_only_where_the_images_were(data):
    plain = replace(TINY, augmentation="none")
    for augmentation, seen in (("none", {0.0}), ("flip", {0.0, 1.0})):
        config = replace(
            DEMO, views="both", whole=replace(plain, augmentation=augmentation), lungs=replace(plain, weighting=False)
        )
        features = np.stack([np.zeros((12, 3), np.float32), np.ones((12, 3), np.float32)], 1)
        loader = training.fusion_loader(context(config), data, data.all, features, FusionConfig(batch_size=6))
        loader.batch_sampler.set_epoch(0, 1)
        assert set(torch.cat([x for x, _ in loader]).unique().tolist()) == seen


def test_fusion_through_the_loop(data, tmp_path):
    config = replace(
        DEMO,
        views="both",
        whole=TINY,
        lungs=replace(TINY, weighting=False),
        fusion=FusionConfig(batch_size=6, epochs=30, lr=3e-2, precision="fp32", schedule="constant"),
    )
    ctx = context(config)
    torch.manual_seed(0)
    branches = {stage: build_network(getattr(config, stage)) for stage in config.stages}
    widths = [model.width for model in branches.values()]
    features = training.pooled_features(ctx, data, data.all, branches, config, shared=True)
    fusion = build_fusion(*widths)
    look = partial(training.fusion_figures, features=features, data=data, rows=data.all, device=ctx.device)
    with torch.inference_mode():
        before = look(fusion)
    done = fit(
        fusion,
        partial(training.step, device=ctx.device),
        training.fusion_loader(ctx, data, data.all, features, config.fusion),
        look,
        config.fusion,
        tmp_path / "fold0" / "fusion",
        device=ctx.device,
    )
    assert len(done.history) == 30 and done.figures["loss"] < before["loss"] / 2 and done.figures["auroc"] > 0.8
    assert fusion.probs(features, flip=True).shape == (12, 14)
    assert training.pooled_features(ctx, data, data.all[:0], branches, config).shape == (0, 2, sum(widths))
