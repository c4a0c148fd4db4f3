"""Views, batches and figures, on a small stand-in for what `prepare` leaves."""

import pickle
from dataclasses import replace
from typing import get_type_hints

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from common.errors import InputError
from common.infer import tta
from common.network import predict, train, train_loader
from common.nn.losses import asymmetric, bce, pairwise_auc
from common.post.boxes import BOX
from solutions.chestxray14 import models
from solutions.chestxray14.comparison import epoch_chosen
from solutions.chestxray14.config import LABELS, NetworkConfig
from solutions.chestxray14.data import BOX_TABLE, FURTHER_BOXES, boxes_of, check_boxes
from solutions.chestxray14.models import ViewDataset, auroc_and_loss, box_loss
from solutions.chestxray14.pipeline import fold_networks
from tests.solutions.chestxray14.squares import BOTH, SIDE, TINY, N, jobs_on_squares, stored_squares, view  # noqa: F401 - fixtures


def test_the_view_is_the_centre_of_the_resized_image_and_mask(images):
    dataset = view(images, [5, 3], TINY, "whole")
    image, row = dataset[1]
    assert image.shape == (2, 64, 64) and image.dtype == torch.uint8 and int(row) == 3
    np.testing.assert_array_equal(image[0], images.store.images[3, 4:68, 4:68])
    mask = cv2.resize(np.load(images.arrays["masks"])[3], (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(image[1], mask[4:68, 4:68])
    smaller = view(images, [3], replace(TINY, resize=36, size=33, weighting=False), "lungs")[0][0]
    shrunk = cv2.resize(255 - images.store.images[3], (36, 36), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(smaller, shrunk[None, 1:34, 1:34])


def test_a_flip_moves_image_and_mask(images):
    flipped = view(images, [0], TINY, "whole", augment=True)
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
    dataset = ViewDataset(images, [0], 96, 96, tmp_path / "masks.npy", models.podium(96))
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


def test_boxes_move_with_the_image(images):
    """A box of 512 × 512 of 1024 is a quarter of the grid; mirrored images have mirrored boxes; others have none."""
    table = pd.DataFrame({"image_id": "", "row": [3, 3, 7], "label": [0, 1, 1]})  # row 7 shows class 1 too
    table[["x_min", "y_min", "x_max", "y_max"]] = [[0, 0, 512, 512], [0, 0, 512, 512], [512, 512, 1024, 1024]]
    images.tables[FURTHER_BOXES] = table
    images.tables[BOX_TABLE] = table[:0]
    config = replace(TINY, resize=64, size=64, box_loss=1.0, weighting=False)
    rows = np.array([0, 3, 7])
    assert boxes_of(images, rows)["row"].tolist() == [3, 7]  # the label of row 3 is class 0: its other box is not used
    dataset = view(images, rows, config, "whole", augment=True, targets=True)
    plain, box = dataset[1][1], np.zeros((32, 32), np.uint8)
    box[:16, :16] = 255
    assert plain["labels"][0] == 1 and np.array_equal(plain["boxes"][0], box) and not plain["boxes"][1:].any()
    assert not dataset[0][1]["boxes"].any()
    seen = {dataset[1, seed][1]["boxes"][0].numpy().tobytes() for seed in range(8)}
    assert seen == {box.tobytes(), box[:, ::-1].tobytes()}
    for seed in range(4):  # the image is mirrored when its box is
        mirrored = dataset[1, seed][1]["boxes"][0, 0, -1] > 0
        assert torch.equal(dataset[1, seed][0], dataset[1][0].flip(-1) if mirrored else dataset[1][0])
    held_out = view(images, rows, config, "whole", targets=True)
    assert held_out[1][1].shape == (14,)
    few = view(images, np.array([0, 1]), config, "whole", augment=True, targets=True)  # as `plan` may decode
    assert not few[0][1]["boxes"].any() and few[0][1]["labels"].shape == (14,)


def test_a_fold_without_a_box_to_learn_from_is_refused(job):
    boxed = job(replace(BOTH, views="whole", whole=replace(TINY, weighting=False, box_loss=1.0)))
    row, table = boxed.images.rows(folds=[1])[0], boxed.images.table
    table.loc[table["row"] == row, LABELS[0]] = 1
    boxed.images.__post_init__()
    boxes = pd.DataFrame({"image_id": "", "row": [row], "label": 0} | dict.fromkeys(BOX, 0.0))
    boxed.images.tables = {BOX_TABLE: boxes[:0], FURTHER_BOXES: boxes}
    boxed.config = replace(boxed.config, folds=(0,))
    check_boxes(boxed)
    boxed.config = replace(boxed.config, folds=(0, 1))
    with pytest.raises(InputError, match=r"whole\.box_loss: no training image of fold 1 has a box"):
        check_boxes(boxed)


def test_boxes_draw_the_maps_into_them(job):
    """The bright patches tell the labels; with boxes around them the maps have more of their evidence there."""
    found, options = {}, replace(TINY, weighting=False, attention=False, epochs=10, lr=1e-2)
    corners = np.array([[0, 0, 512, 512], [512, 0, 1024, 512], [512, 512, 1024, 1024]])  # of the three kinds of patch
    grids = torch.zeros(N, len(LABELS), 2, 2, dtype=torch.uint8)
    for row in range(N):
        grids[row, row % 3, row % 3 // 2, int(row % 3 > 0)] = 255
    for weight in (0.0, 2.0):
        ours = job(replace(BOTH, views="whole", whole=replace(options, box_loss=weight)))
        table = ours.images.table
        label = table[list(LABELS)].to_numpy().argmax(1)
        boxes = pd.DataFrame({"image_id": table["image_id"], "row": table["row"], "label": label})
        boxes[["x_min", "y_min", "x_max", "y_max"]] = corners[label]
        ours.images.tables.update({BOX_TABLE: boxes[:0], FURTHER_BOXES: boxes})
        network = fold_networks(ours.config, 0)[0]
        train(ours, network)
        seen = network.dataset(ours, np.arange(N), False, False)
        with torch.inference_mode():
            maps = network.load(ours.run).eval().cam(torch.stack([seen[row][0] for row in range(N)]))
        found[weight] = box_loss(maps, grids).item()
    assert found[2.0] < found[0.0] - 0.2


def test_the_loss_of_a_batch_has_what_the_network_is_trained_with():
    images, labels = torch.rand(4, 1, 8, 8) * 255, torch.eye(4, 14)
    model = lambda images: images.mean((1, 2, 3))[:, None] * torch.linspace(-0.1, 0.1, 14)  # noqa: E731
    loss = lambda **options: models.training_loss(NetworkConfig(**options), model, images, labels).item()  # noqa: E731
    plain = loss()
    assert plain == bce(model(images), labels).item()
    assert loss(label_smoothing=0.2) == pytest.approx(bce(model(images), labels * 0.8 + 0.1).item())
    assert loss(loss="asymmetric") == asymmetric(model(images), labels).item()
    assert loss(auc_loss=2.0) == pytest.approx(plain + 2 * pairwise_auc(model(images), labels).item())
    torch.manual_seed(2)
    share, order = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(4)
    assert order.tolist() != [0, 1, 2, 3] and 0.01 < share < 0.99
    mixed = [share * part + (1 - share) * part[order] for part in (images, labels)]
    torch.manual_seed(2)
    assert loss(mixup=0.4) == pytest.approx(bce(model(mixed[0]), mixed[1]).item(), rel=1e-5)


def test_a_class_whose_auroc_no_longer_rises_leaves_the_loss():
    rises, peaks = dict.fromkeys(LABELS, (0.5, 0.6, 0.7, 0.8)), {"Mass": (0.5, 0.9, 0.7, 0.9), "Hernia": (np.nan,) * 4}
    peaks["Edema"] = (0.9, np.nan, 0.7, 0.8)
    scores, active = rises | peaks, np.ones(14, bool)
    history = [{f"auroc_{label}": values[k] for label, values in scores.items()} for k in range(4)]
    for epochs, patience, stopped in (
        (0, 1, ()), (2, 1, ("Edema",)), (3, 1, ("Edema", "Mass")), (3, 2, ("Edema",)), (4, 3, ("Edema",)), (4, 4, ())
    ):  # fmt: skip
        models.stop_classes(patience, active, history[:epochs])
        assert [label for label in LABELS if not active[LABELS.index(label)]] == sorted(stopped, key=LABELS.index)
    active[:] = np.arange(14) % 2
    model, labels = nn.Linear(3, 14), torch.eye(4, 14)
    images = torch.rand(4, 3)
    loss = models.training_loss(NetworkConfig(), model, images, labels, active)
    assert loss.item() == models.training_loss(NetworkConfig(), model, images, labels).item()
    loss.backward()
    assert (model.weight.grad.abs().sum(1) > 0).tolist() == active.tolist()


def test_stopped_classes_are_those_of_the_history(job):
    options = replace(TINY, weighting=False, attention=False, epochs=6, class_patience=1)
    ours = job(replace(BOTH, views="whole", whole=options))
    network, seen = fold_networks(ours.config, 0)[0], []
    step = lambda *args: seen.append(network.step.keywords["active"].copy()) or network.step(*args)  # noqa: E731
    history = train(ours, replace(network, step=step)).history
    for epoch, found in enumerate(seen[::2]):  # two batches an epoch
        wanted = np.ones(14, bool)
        models.stop_classes(1, wanted, history.iloc[:epoch].to_dict("records"))
        assert (found == wanted).all()
    assert epoch_chosen(ours.config) and not seen[-1].all()


def test_every_named_augmentation_exists():
    names = get_type_hints(NetworkConfig)["augmentation"].__args__
    assert [models.AUGMENTATIONS[name](64) is None for name in names] == [name == "none" for name in names]


def test_batches_do_not_depend_on_the_workers(job):
    config, batches = replace(BOTH, whole=replace(TINY, augmentation="podium")), []
    for workers in (0, 2):
        loader = train_loader(job(config, workers), fold_networks(config, 0)[0], np.arange(N))
        loader.batch_sampler.set_epoch(1, 2)
        batches.append(list(loader))
    assert len(batches[0]) == 2 and batches[0][0][0].shape == (6, 2, 64, 64)
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    labels = torch.cat([labels for _, labels in batches[0]])
    assert labels.dtype == torch.float32 and torch.equal(labels.sum(0)[:4], torch.tensor([4.0, 4, 4, 0]))


def test_an_empty_mask_is_named(images, tmp_path):
    masks = np.load(images.arrays["masks"])
    masks[4] = 0
    np.save(tmp_path / "empty.npy", masks)
    images.arrays["masks"] = tmp_path / "empty.npy"
    with pytest.raises(InputError, match=r"empty\.npy: the mask of row 4 is empty"):
        view(images, [4], TINY, "whole")[0]


def test_figures_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    truth, logits = np.eye(3, 14, dtype=np.float32)[np.arange(9) % 3], rng.normal(size=(9, 14)).astype(np.float32)
    truth[:, 5] = 1  # one kind only: no AUROC
    found, probs = auroc_and_loss(truth, logits), 1 / (1 + np.exp(-logits.astype(float)))
    assert found["auroc"] == pytest.approx(np.mean([roc_auc_score(truth[:, c], probs[:, c]) for c in range(3)]))
    assert found["loss"] == pytest.approx(log_loss(truth.ravel(), probs.ravel()), rel=1e-5)


def test_a_dozen_images_are_learnt_by_heart(job):
    config = replace(BOTH, views="whole", whole=replace(TINY, augmentation="none", epochs=18, averaging=("last",)))
    ours, (network,) = job(config), fold_networks(config, 0)
    done = train(ours, network)
    assert done.figures["auroc"] == 1.0 and done.history["train_loss"].iloc[-1] < 0.1
    probs = predict(ours, [network], [8, 0, 1])
    assert probs.shape == (3, 14) and probs[:, :3].argmax(0).tolist() == [1, 2, 0]
    both, model = predict(ours, [network], [8], [tta.IDENTITY, tta.FLIP]), network.load(ours.run).eval()
    with torch.inference_mode():
        image = view(ours.images, [8], config.whole, "whole")[0][0][None]
        expected = (model(image).sigmoid() + model(image.flip(-1)).sigmoid()) / 2
    np.testing.assert_allclose(both, expected, atol=1e-6)
