"""Batches, steps and figures of both trainings, on a tiny stand-in for what `prepare` leaves."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from common.budget import Budget, Stopped
from common.errors import InputError
from common.infer.predict import predict_probs
from common.nn.precision import autocast
from common.train.loop import fit
from solutions.vinbigdata import training
from solutions.vinbigdata.config import AUGMENTATIONS, DEMO, DetectorConfig, HealthyConfig
from solutions.vinbigdata.models import build_detector, build_healthy, load_detector, load_healthy
from solutions.vinbigdata.training import BoxDataset, collate, detect, detection_table, packed

SIDE = 96
BOX = ["x_min", "y_min", "x_max", "y_max"]
TINY = DetectorConfig(
    architecture="fcos",
    backbone="test_resnet",
    weights="none",
    size=SIDE,
    channels=64,
    epochs=2,
    batch_size=2,
    lr=1e-3,
    optimizer="adamw",
    per_image=5,
    precision="fp32",
)


class Prepared:
    """Eight stored squares, the even ones abnormal: rectangles in images of another shape than the square."""

    def __init__(self, n=8):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 40, (n, SIDE, SIDE), dtype=np.uint8)
        rows = np.arange(n)
        self.table = pd.DataFrame({"image_id": [f"i{row}" for row in rows], "row": rows})
        self.table["width"], self.table["height"] = 128 + 64 * (rows % 3), 320
        self.table["fold"], self.table["abnormal"], self.table["split"] = rows // 2 % 2, 1 - rows % 2, "train"
        self.square = {row: np.array([[8, 8 + row, 40, 40 + row], [30, 4, 60, 28]], np.float32) for row in rows[::2]}
        for row, boxes in self.square.items():
            for x_min, y_min, x_max, y_max in boxes.astype(int):
                images[row, y_min:y_max, x_min:x_max] += 120
        self.store = SimpleNamespace(images=images)

    def rows(self, split="train", folds=(0, 1)):
        return self.table.loc[self.table["fold"].isin(list(folds)), "row"].to_numpy()

    def boxes_of(self, row):
        boxes = self.square.get(row, np.zeros((0, 4), np.float32))
        return boxes, np.array([3, 13][: len(boxes)])

    def truth(self, rows):
        out = []
        for row, (image_id, width, height) in self.table.set_index("row")[["image_id", "width", "height"]].iterrows():
            if row in list(rows):
                boxes, labels = self.boxes_of(row)
                scaled = boxes * np.array([width, height, width, height]) / SIDE
                out += [(image_id, label, *box) for label, box in zip(labels, scaled.tolist(), strict=True)]
                out += [] if len(boxes) else [(image_id, 14, 0.0, 0.0, 1.0, 1.0)]
        return pd.DataFrame(out, columns=["image_id", "class_id", *BOX])


class Oracle(nn.Module):
    """Finds the stand-in's rectangles in images that it knows, mirrored or not; the score falls with the box."""

    def __init__(self, data, miss=()):
        super().__init__()
        self.data, self.miss = data, miss

    def forward(self, images, targets=None):
        out = []
        for image in images:
            same = [
                (self.data.store.images == view).all((1, 2)) for view in (image[0].numpy(), image[0].flip(-1).numpy())
            ]
            row = int(np.flatnonzero(same[0] | same[1])[0])
            boxes, labels = self.data.boxes_of(row)
            boxes = torch.tensor(boxes)
            if not same[0].any():
                boxes = torch.stack([SIDE - boxes[:, 2], boxes[:, 1], SIDE - boxes[:, 0], boxes[:, 3]], 1)
            kept = [i for i, label in enumerate(labels) if (row, label) not in self.miss]
            scores = torch.linspace(0.9, 0.8, 2)[: len(boxes)]
            out.append({"boxes": boxes[kept], "scores": scores[kept], "labels": torch.tensor(labels)[kept]})
        return out


def context(**options):
    return SimpleNamespace(config=replace(DEMO, seed=0), workers=0, device=torch.device("cpu"), **options)


def test_boxes_shrink_with_the_image_and_move_with_it():
    data = Prepared()
    plain = BoxDataset(data.store.images, data.boxes_of, data.rows(), 48)
    image, target = plain[2]
    assert image.shape == (1, 48, 48) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[4, 5, 20, 21], [15, 2, 30, 14]] and target["labels"].tolist() == [3, 13]
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
    image, target = plain[1]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    moved = BoxDataset(data.store.images, data.boxes_of, [2], SIDE, training.augmentation("flip", SIDE))
    lefts = {tuple(moved[0, seed][1]["boxes"][:, 0].tolist()) for seed in range(12)}
    assert {tuple(round(x) for x in left) for left in lefts} == {(8, 30), (56, 36)}
    assert torch.equal(moved[0][1]["boxes"], torch.tensor(data.square[2]))  # without a seed nothing moves
    again = pickle.loads(pickle.dumps(moved))
    for seed in range(4):
        assert torch.equal(again[0, seed][0], moved[0, seed][0])


def test_batches_of_the_detector():
    data, ctx = Prepared(), context()
    assert training.detector_rows(ctx, data, 0, abnormal_only=True).tolist() == [2, 6]
    assert training.detector_rows(ctx, data, 0, abnormal_only=False).tolist() == [2, 3, 6, 7]
    batches = []
    for workers in (0, 1):
        ctx.workers = workers
        loader = training.detector_loader(ctx, data, data.rows(), TINY, "both")
        loader.batch_sampler.set_epoch(0, 2)
        batches.append(list(loader))
    for (images, targets), (more, same) in zip(*batches, strict=True):
        assert images.shape == (2, 1, SIDE, SIDE) and len(targets) == 2 and torch.equal(images, more)
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, same, strict=True))


def test_every_named_augmentation_exists():
    assert all(callable(training.augmentation(name, 256)) or name == "none" for name in AUGMENTATIONS)


def test_the_table_by_hand():
    table = pd.DataFrame({"row": [0, 1], "image_id": ["a", "b"], "width": [300, 2021], "height": [600, 2500]})
    found = np.full((2, 3, 6), np.nan, np.float32)
    found[0, 0] = 0.5, 7, 10, 20, 100, 50
    found[0, 1] = 0.25, 2, 10, 20, 10, 50  # cut to nothing
    found[1, 0] = 0.75, 13, 0, 0, 100, 100
    out = detection_table(found, table, [1, 0], 100)  # the first row of `found` is image b
    assert out.columns.tolist() == ["image_id", "class_id", "score", *BOX]
    assert out.to_numpy().tolist() == [["b", 7, 0.5, 202.1, 500, 2021, 1250], ["a", 13, 0.75, 0, 0, 300, 600]]
    assert out["class_id"].dtype == np.int64 and out["x_max"].dtype == np.float64
    for width in range(1, 3000, 7):  # what ends at the border ends there, whatever the numbers
        found[0, 0, 2:] = 0, 0, 96, 96
        table["width"] = width
        assert detection_table(found, table, [0, 1], 96)["x_max"][0] == width
    assert len(detection_table(np.full((2, 3, 6), np.nan), table, [0, 1], 96)) == 0


def test_mirrored_boxes_come_back_and_are_one():
    data = Prepared()
    images = torch.from_numpy(data.store.images)[:, None]
    plain, both = detect(Oracle(data), images, (), TINY), detect(Oracle(data), images, ("flip",), TINY)
    for one, other in zip(plain, both, strict=True):
        assert torch.equal(one["boxes"], other["boxes"]) and torch.equal(one["labels"], other["labels"])
    one = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "scores": torch.tensor([0.4]), "labels": torch.tensor([5])}
    two = {"boxes": torch.tensor([[86.5, 0, 96, 10]]), "scores": torch.tensor([0.6]), "labels": torch.tensor([5])}
    answers = iter([[one], [two]])
    merged = detect(lambda images: next(answers), images[:1], ("flip",), TINY)[0]
    assert merged["boxes"].tolist() == [[0, 0, 9.5, 10]] and merged["scores"].tolist() == [pytest.approx(0.6)]
    with pytest.raises(InputError, match="scale"):
        detect(Oracle(data), images, ("scale",), TINY)


def test_predictions_in_the_pixels_of_the_originals():
    data = Prepared()
    rows = np.array([5, 4, 0])
    for views in ((), ("flip",)):
        out = training.predict_boxes(Oracle(data), data, rows, TINY, torch.device("cpu"), views, progress=False)
        assert out["image_id"].tolist() == ["i4", "i4", "i0", "i0"]
        expected = pd.concat([data.truth([4]), data.truth([0])])
        np.testing.assert_allclose(out[BOX], expected[BOX])
        assert out["class_id"].tolist() == expected["class_id"].tolist()
    short = training.predict_boxes(Oracle(data), data, rows, replace(TINY, per_image=1), torch.device("cpu"))
    assert short["class_id"].tolist() == [3, 3]


def test_figures_of_a_detector_by_hand():
    data, rows = Prepared(), np.arange(8)
    loader = training.held_out_loader(context(), data, rows, TINY)
    figures = training.detector_figures(Oracle(data), loader, data, rows, TINY, torch.device("cpu"))
    assert figures == {"map": 1.0, "map_coco": pytest.approx(1.0)}
    missed = Oracle(data, miss={(0, 3), (2, 3)})  # half of class 3; class 13 whole; 12 classes do not occur
    figures = training.detector_figures(missed, loader, data, rows, TINY, torch.device("cpu"))
    assert figures["map"] == pytest.approx((0.5 + 1) / 2)


class Interrupted(Budget):
    """Is spent after so many looks."""

    def __init__(self, looks):
        self.looks, self.reason, self.training = looks, "enough", False

    def spent(self):
        self.looks -= 1
        return self.looks < 0


def test_an_interrupted_training_ends_as_an_undisturbed_one(tmp_path):
    data, ctx, rows = Prepared(), context(), np.arange(4)
    config = replace(TINY, architecture="faster_rcnn", averaging=("last", "ema"))

    def train(folder, budget):
        torch.manual_seed(0)
        loader = training.detector_loader(ctx, data, rows, config, "built_in")
        shown = training.held_out_loader(ctx, data, rows, config)
        return fit(
            build_detector(config),
            lambda model, batch: training.detector_step(model, batch, ctx.device),
            loader,
            lambda model: training.detector_figures(model, shown, data, rows, config, ctx.device),
            config,
            folder,
            device=ctx.device,
            budget=budget,
        )

    whole = train(tmp_path / "whole", Interrupted(1000))
    assert list(whole.history.columns) == ["epoch", "lr", "train_loss", "map", "map_coco"]
    with pytest.raises(Stopped):
        train(tmp_path / "parts", Interrupted(2))
    parts = train(tmp_path / "parts", Interrupted(1000))
    one, other = (load_detector(config, fitted.folder / "final.safetensors").state_dict() for fitted in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = load_detector(config, whole.folder / "final.safetensors")
    assert len(training.predict_boxes(model, data, rows, config, ctx.device, ("flip",), progress=False)) > 0


def test_a_detector_learns_the_rectangles():
    data, ctx = Prepared(4), context()
    config = replace(TINY, lr=3e-3)
    torch.manual_seed(0)
    model = build_detector(config)
    batch = collate([BoxDataset(data.store.images, data.boxes_of, np.arange(4), SIDE)[i] for i in range(4)])
    optimizer, losses = torch.optim.AdamW(model.parameters(), config.lr), []
    for _ in range(45):
        with autocast("cpu", torch.bfloat16):
            loss = training.detector_step(model.train(), batch, ctx.device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    training.detector_step(model.eval(), batch, ctx.device)  # as when batch norms are estimated anew
    loader = training.held_out_loader(ctx, data, np.arange(4), config)
    with torch.inference_mode():
        figures = training.detector_figures(model.eval(), loader, data, np.arange(4), config, ctx.device)
    assert figures["map"] > 0.9


def test_the_healthy_classifier(tmp_path):
    data, ctx, rows = Prepared(), context(), np.arange(8)
    config = HealthyConfig(
        backbone="test_resnet", weights="none", size=32, epochs=2, batch_size=4, lr=2e-3, precision="fp32"
    )
    loader = training.healthy_loader(ctx, data, rows, config)
    loader.batch_sampler.set_epoch(0, 1)
    targets = torch.cat([targets for _, targets in loader])
    assert targets.shape == (8, 1) and targets.dtype == torch.float32 and targets.sum() == 4
    shown = training.held_out_loader(ctx, data, rows, config)

    def dark(model):  # the stand-in's healthy images are the dark ones
        return training.healthy_figures(model, shown, data, rows, ctx.device)

    def brightness(images):
        return 30 - images.float().mean((1, 2, 3), keepdim=True)[:, :, 0, 0]

    assert dark(brightness) == {"auroc": 1.0, "accuracy": 1.0}
    assert dark(lambda images: -brightness(images)) == {"auroc": 0.0, "accuracy": 0.0}
    with pytest.raises(InputError, match="no number"):
        dark(lambda images: brightness(images) * float("nan"))
    torch.manual_seed(0)
    fitted = fit(
        build_healthy(config),
        lambda model, batch: training.healthy_step(model, batch, ctx.device),
        loader,
        dark,
        config,
        tmp_path / "healthy",
        device=ctx.device,
    )
    assert set(fitted.figures) >= {"auroc", "accuracy"}
    model = load_healthy(config, fitted.folder / "final.safetensors")
    probs = predict_probs([model], data.store.images, rows, config.size, device="cpu", progress=False)
    assert probs.shape == (8, 1)


def test_packed_keeps_the_first_and_fills_with_nan():
    found = {
        "boxes": torch.arange(8.0).reshape(2, 4),
        "scores": torch.tensor([0.9, 0.1]),
        "labels": torch.tensor([4, 0]),
    }
    assert packed(found, 1).tolist() == [[pytest.approx(0.9), 4, 0, 1, 2, 3]]
    assert np.isnan(packed(found, 4)[2:]).all() and packed(found, 4).shape == (4, 6)
