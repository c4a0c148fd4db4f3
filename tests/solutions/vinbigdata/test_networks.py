"""Batches, boxes and figures of both networks, on a tiny stand-in for what `prepare` leaves."""

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from common import detection
from common.data import box_augment as augment
from common.detection import BoxDataset, boxes_by_row, collate, detect, detection_table, pack
from common.errors import InputError
from common.images import Images
from common.network import Network, train_loader
from common.nn.precision import autocast
from common.post.boxes import BOX
from solutions.vinbigdata import lungs, pipeline
from solutions.vinbigdata.config import DEMO, DetectorConfig
from solutions.vinbigdata.data import FINDINGS, truth_of

SIDE = 96
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
    metric="map",
    per_image=5,
    precision="fp32",
)
HEALTHY = replace(DEMO.healthy, backbone="test_resnet", weights="none", size=32, batch_size=4)
CONFIG = replace(DEMO, detector=TINY, healthy=HEALTHY, members=("flip",))


@pytest.fixture
def images():
    """Eight stored squares, the even ones abnormal: rectangles in images of another shape than the square."""
    rng, rows = np.random.default_rng(0), np.arange(8)
    squares = rng.integers(0, 40, (8, SIDE, SIDE), dtype=np.uint8)
    table = pd.DataFrame({"image_id": [f"i{row}" for row in rows], "row": rows, "split": "train", "ok": True})
    table["width"], table["height"] = 128 + 64 * (rows % 3), 320
    table["fold"], table["abnormal"], table["patient_id"] = rows // 2 % 2, 1 - rows % 2, ""
    table[FINDINGS] = np.isin(np.arange(14), [3, 13]) * table[["abnormal"]].to_numpy()
    boxes = []
    for row in rows[::2]:
        for class_id, box in ((3, [8, 8 + row, 40, 40 + row]), (13, [30, 4, 60, 28])):
            squares[row, box[1] : box[3], box[0] : box[2]] += 120
            scale = np.array([table["width"][row], 320] * 2) / SIDE
            boxes.append((f"i{row}", row, class_id, *(np.array(box) * scale)))
    boxes = pd.DataFrame(boxes, columns=["image_id", "row", "class_id", *BOX])
    store = SimpleNamespace(images=squares, table=table.assign(content=table["image_id"]))
    return Images(table, store, "key", "pixels", tables={"boxes.parquet": boxes})


@pytest.fixture
def job(images):
    return SimpleNamespace(config=CONFIG, images=images, workers=0, device=torch.device("cpu"), run=None)


@pytest.fixture
def detector():
    return pipeline.detector_network(CONFIG, 0, "flip")


class Oracle(nn.Module):
    """Finds the rectangles of images that it knows, mirrored or not; the score falls with the box."""

    def __init__(self, images, miss=()):
        super().__init__()
        self.squares, self.boxes, self.miss = images.store.images, boxes_by_row(images), miss

    def forward(self, images, targets=None):
        out = []
        for image in images:
            same = [(self.squares == view).all((1, 2)) for view in (image[0].numpy(), image[0].flip(-1).numpy())]
            row = int(np.flatnonzero(same[0] | same[1])[0])
            boxes, labels = self.boxes.get(row, (np.zeros((0, 4), np.float32), np.zeros(0, np.int64)))
            boxes = torch.tensor(boxes)
            if not same[0].any():
                boxes = torch.stack([SIDE - boxes[:, 2], boxes[:, 1], SIDE - boxes[:, 0], boxes[:, 3]], 1)
            kept = [i for i, label in enumerate(labels) if (row, label) not in self.miss]
            scores = torch.linspace(0.9, 0.8, 2)[: len(boxes)]
            out.append({"boxes": boxes[kept], "scores": scores[kept], "labels": torch.tensor(labels)[kept]})
        return out


def test_boxes_shrink_with_the_image_and_move_with_it(images):
    plain = BoxDataset(images.dataset(images.rows(), 48), boxes_by_row(images))
    image, target = plain[2]
    assert image.shape == (1, 48, 48) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[4, 5, 20, 21], [15, 2, 30, 14]] and target["labels"].tolist() == [3, 13]
    assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
    image, target = plain[1]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
    moved = BoxDataset(images.dataset([2], SIDE), boxes_by_row(images), augment.pipeline("flip", SIDE))
    lefts = {tuple(moved[0, seed][1]["boxes"][:, 0].round().tolist()) for seed in range(12)}
    assert lefts == {(8, 30), (56, 36)}
    assert torch.equal(moved[0][1]["boxes"], torch.tensor(boxes_by_row(images)[2][0]))  # without a seed nothing moves
    again = pickle.loads(pickle.dumps(moved))
    for seed in range(4):
        assert torch.equal(again[0, seed][0], moved[0, seed][0])


def test_batches_of_the_detector(job, detector):
    assert detector.rows(job, 0)[0].tolist() == [2, 6]
    every = replace(CONFIG, detector=replace(TINY, healthy=9.0), members=("both",))
    network = pipeline.detector_network(every, 0, "both")
    rows, held_out = network.rows(job, 0)
    assert rows.tolist() == [2, 3, 6, 7] and held_out.tolist() == [0, 1, 4, 5]
    batches = []
    for job.workers in (0, 1):
        loader = train_loader(job, network, rows)
        loader.batch_sampler.set_epoch(0, 2)
        batches.append(list(loader))
    for (images, targets), (more, same) in zip(*batches, strict=True):
        assert images.shape == (2, 1, SIDE, SIDE) and len(targets) == 2 and torch.equal(images, more)
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, same, strict=True))


def test_the_mask_moves_with_the_image_and_keeps_its_range(images, tmp_path):
    masks = (images.store.images > 100) * np.uint8(255)
    np.save(tmp_path / "masks.npy", masks)
    images.arrays["masks"] = tmp_path / "masks.npy"
    samples = lungs.LungSamples(images.store.images, images.arrays["masks"], SIDE, [2, 1])
    assert samples[0][0].shape == (2, SIDE, SIDE) and samples[1][1] == 1
    assert torch.equal(samples[0][0], torch.from_numpy(np.stack([images.store.images[2], masks[2]])))
    transform = augment.pipeline("both", SIDE, default_mapper=True)
    data = pickle.loads(pickle.dumps(BoxDataset(samples, boxes_by_row(images), transform)))
    moved = 0
    for seed in range(12):
        (image, mask), target = data[0, seed]
        assert (mask.min(), mask.max()) == (0, 255)  # neither tone nor noise touches it
        ys, xs = np.nonzero(mask.numpy() >= 128)
        outer = torch.cat([target["boxes"][:, :2].amin(0), target["boxes"][:, 2:].amax(0)])
        np.testing.assert_allclose(outer, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=6)
        moved += not torch.equal(mask, samples[0][0][1])
    assert moved >= 10
    member = replace(CONFIG, members=("flip.lungs",))
    network = pipeline.detector_network(member, 0, "flip.lungs")
    job = SimpleNamespace(config=member, images=images)
    image, _ = network.dataset(job, np.array([2]), False, True)[0]
    model = network.build("none").eval()
    assert torch.equal(image[1], torch.from_numpy(masks[2]))
    scaled = model.scaled(image[None])
    assert torch.equal(scaled[:, :2], model.scaled(image[None, :1])[:, :2])
    assert torch.equal(scaled[:, 2:], model.scaled(image[None, 1:])[:, 2:])
    assert len(model(image[None])) == 1


def test_where_findings_lie_by_hand(images, tmp_path):
    masks = np.zeros((8, lungs.SIDE, lungs.SIDE), np.uint8)
    masks[:, 40:220, 20:100] = masks[:, 40:220, 140:240] = 255  # the lungs' box: 20 to 240, 40 to 220; middle 130
    masks[6] = 0
    np.save(tmp_path / "masks.npy", masks)
    images.arrays["masks"] = tmp_path / "masks.npy"
    boxes = [(0, 3, [20, 50, 60, 90]), (2, 3, [100, 200, 140, 210]), (4, 5, [150, 100, 250, 120]), (6, 5, [0, 0, 9, 9])]
    size = images.at([row for row, _, _ in boxes])[["width", "height"] * 2].to_numpy() / lungs.SIDE
    table = [(f"i{row}", row, k, *(box * scale)) for (row, k, box), scale in zip(boxes, size, strict=True)]
    images.tables["boxes.parquet"] = pd.DataFrame(table, columns=["image_id", "row", "class_id", *BOX])
    found = lungs.locate_findings(images).round(2)
    assert found["class"].tolist() == ["Cardiomegaly", "ILD"] and found["boxes"].tolist() == [2, 1]
    assert found.iloc[0, 2:].tolist() == [0.5, 1, 0, 0.5, 0, 0.5]  # all of the first, none of the second
    assert found.iloc[1, 2:].tolist() == [0.9, 0, 1, 0, 1, 0]  # 90 of 100 columns


def test_packed_boxes_are_the_first_and_zeros():
    found = [
        {"boxes": torch.arange(8.0).reshape(2, 4), "scores": torch.tensor([0.9, 0.1]), "labels": torch.tensor([4, 0])}
    ]
    assert pack(found, 1).tolist() == [[[pytest.approx(0.9), 4, 0, 1, 2, 3]]]
    assert pack(found, 4).shape == (1, 4, 6) and not pack(found, 4)[0, 2:].any()


def test_the_table_by_hand(images):
    images.table.loc[[0, 1], ["width", "height"]] = [[300, 600], [2021, 2500]]
    images.__post_init__()
    packed = np.zeros((2, 3, 6), np.float32)
    packed[0, 0] = 0.5, 7, 10, 20, 100, 50
    packed[0, 1] = 0.25, 2, 10, 20, 10, 50  # cut to nothing
    packed[1, 0] = 0.75, 13, 0, 0, 100, 100
    out = detection_table(packed, images, [1, 0], 100)  # the first row of `packed` is image i1
    assert out.columns.tolist() == ["image_id", "class_id", "score", *BOX]
    assert out.to_numpy().tolist() == [["i1", 7, 0.5, 202.1, 500, 2021, 1250], ["i0", 13, 0.75, 0, 0, 300, 600]]
    assert out["class_id"].dtype == np.int64 and out["x_max"].dtype == np.float64
    for width in range(1, 3000, 7):  # what ends at the border ends there, whatever the numbers
        packed[0, 0, 2:] = 0, 0, 96, 96
        images.table["width"] = width
        images.__post_init__()
        assert detection_table(packed, images, [0, 1], 96)["x_max"][0] == width


def test_mirrored_boxes_come_back_and_are_one(images):
    batch = torch.from_numpy(images.store.images)[:, None]
    plain, both = (detect(Oracle(images), batch, flip, TINY) for flip in (False, True))
    for one, other in zip(plain, both, strict=True):
        assert torch.equal(one["boxes"], other["boxes"]) and torch.equal(one["labels"], other["labels"])
    one = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "scores": torch.tensor([0.4]), "labels": torch.tensor([5])}
    two = {"boxes": torch.tensor([[86.5, 0, 96, 10]]), "scores": torch.tensor([0.6]), "labels": torch.tensor([5])}
    answers = iter([[one], [two]])
    merged = detect(lambda images: next(answers), batch[:1], True, TINY)[0]
    assert merged["boxes"].tolist() == [[0, 0, 9.5, 10]] and merged["scores"].tolist() == [pytest.approx(0.6)]


def test_predictions_in_the_pixels_of_the_originals(job, images, detector, monkeypatch):
    monkeypatch.setattr(Network, "load", lambda self, run: Oracle(images))
    rows = np.array([5, 4, 0])
    for tta in ((), ("flip",)):
        job.config = replace(CONFIG, tta=tta)
        out = detection.predict_boxes(job, detector, rows)
        assert out["image_id"].tolist() == ["i4", "i4", "i0", "i0"]
        expected = pd.concat([truth_of(images, [4]), truth_of(images, [0])])
        np.testing.assert_allclose(out[BOX], expected[BOX], rtol=1e-6)
        assert out["class_id"].tolist() == expected["class_id"].tolist()
    short = replace(detector, config=replace(TINY, per_image=1))
    assert detection.predict_boxes(job, short, rows)["class_id"].tolist() == [3, 3]
    assert detection.predict_boxes(job, detector, rows[:0]).empty


class Halves(nn.Module):
    """Finds the left half of each image, surer of small ones, and in images of 64 px the upper half too."""

    def forward(self, batch):
        side = batch.shape[-1]
        boxes = torch.tensor([[0.0, 0, side / 2, side], [0, 0, side, side / 2]])[: 1 + (side == 64)]
        found = {"boxes": boxes, "scores": torch.tensor([48 / side, 0.6])[: len(boxes)]}
        return [found | {"labels": torch.tensor([3, 5])[: len(boxes)]} for _ in batch]


def test_boxes_of_several_sizes_are_voters(job, images, detector, monkeypatch):
    monkeypatch.setattr(Network, "load", lambda self, run: Halves())
    rows = np.array([5, 4])
    job.config = replace(CONFIG, tta_scales=(0.7, 1.3))  # of 96 px: 64 and 128
    out = detection.predict_boxes(job, detector, rows)
    sizes = images.at(rows)[["width", "height"]].to_numpy()
    assert out["image_id"].tolist() == ["i5", "i5", "i4", "i4"] and out["class_id"].tolist() == [3, 5, 3, 5]
    # found by all three, and by one of three
    assert out["score"].to_numpy() == pytest.approx([(0.5 + 0.75 + 0.375) / 3, 0.2] * 2)
    np.testing.assert_allclose(out[BOX].to_numpy()[::2], [[0, 0, width / 2, height] for width, height in sizes])
    one = replace(detector, config=replace(TINY, per_image=1))
    assert detection.predict_boxes(job, one, rows)["class_id"].tolist() == [3, 3]
    assert detection.predict_boxes(job, detector, rows[:0]).empty
    for scales in ((0.0,), (5.0,)):
        with pytest.raises(InputError, match="tta_scales"):
            replace(CONFIG, tta_scales=scales)
    with pytest.raises(InputError, match="EfficientDet takes one size only"):
        replace(CONFIG, members=("efficientdet-flip@128",), tta_scales=(0.5,))


def test_mosaics_of_the_training_rows(job, images):
    mosaic = replace(CONFIG, detector=replace(TINY, mosaic=1.0))
    network = pipeline.detector_network(mosaic, 0, "flip")
    data = network.dataset(job, network.rows(job, 0)[0], True, True)
    for seed in range(6):
        image, target = data[0, seed]
        assert image.shape == (1, SIDE, SIDE) and len(target["boxes"]) == 8  # of four abnormal images
        for x_min, y_min, x_max, y_max in target["boxes"].round().int().tolist():
            assert image[0, y_min + 1 : y_max - 1, x_min + 1 : x_max - 1].float().mean() > 110
    assert torch.equal(data[0, 5][0], image) and len(data[0][1]["boxes"]) == 2
    with pytest.raises(InputError, match="mosaic, mixup"):
        replace(TINY, mixup=1.5)


def figures_of(job, network, model):
    images, rows = torch.from_numpy(job.images.store.images)[:, None], np.arange(8)
    return network.figures(job, network.measure(model(images), None), rows)


def test_a_specialist_trains_and_votes_on_its_classes_alone(job, images, monkeypatch):
    member = "pulmonary=flip"  # class 13
    job.config = config = replace(CONFIG, members=("flip", member), detector=replace(TINY, healthy=1.0), folds=(0,))
    images.tables["boxes.parquet"] = images.tables["boxes.parquet"].query("row != 2 or class_id != 13")
    images.table.loc[2, "c13"] = 0
    images.__post_init__()
    network = pipeline.detector_network(config, 0, member)
    assert (network.stage, network.config) == (member, config.detector)
    rows, held_out = network.rows(job, 0)
    assert 6 in rows and len(rows) == 2 and held_out.tolist() == [0, 1, 4, 5]  # as many images without the class
    assert network.taught(job, np.array([6, 2])).tolist() == [6]  # of a teacher's, those with a box of the class
    targets = dict(zip(rows.tolist(), (target for _, target in network.dataset(job, rows, False, True)), strict=True))
    assert targets[6]["labels"].tolist() == [13] and not len(targets[min(set(rows) - {6})]["labels"])
    missed = Oracle(images, miss={(row, 3) for row in range(8)})
    assert figures_of(job, network, missed) == {"map": 1.0, "map_coco": pytest.approx(1.0)}
    assert figures_of(job, pipeline.detector_network(config, 0, "flip"), missed)["map"] == pytest.approx(0.5)
    monkeypatch.setattr(Network, "load", lambda self, run: Oracle(images))
    monkeypatch.setattr(detection, "predict_logits", lambda job, same, rows, title: np.zeros((len(rows), 1)))
    found = pipeline.predict_rows(job, [0], held_out, None, "")[""]
    assert found.groupby("member")["class_id"].unique().map(sorted).to_dict() == {"flip": [3, 13], member: [13]}
    aortic = pipeline.detector_network(config, 0, "aortic=flip")
    assert not len(aortic.rows(job, 0)[0])
    assert figures_of(job, aortic, missed) == {"map": 0, "map_coco": 0}


def test_figures_of_a_detector_by_hand(job, images, detector):
    assert figures_of(job, detector, Oracle(images)) == {"map": 1.0, "map_coco": pytest.approx(1.0)}
    missed = Oracle(images, miss={(0, 3), (2, 3)})  # half of class 3; class 13 whole; 12 classes do not occur
    assert figures_of(job, detector, missed)["map"] == pytest.approx((0.5 + 1) / 2)


def test_a_detector_learns_the_rectangles(job, images, detector):
    images.table.loc[4:, "fold"] = -1
    torch.manual_seed(0)
    model, rows = detector.build(None), np.arange(4)
    data = detector.dataset(job, rows, True, True)
    batch = collate([data[i] for i in range(4)])
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(45):
        with autocast("cpu", torch.bfloat16):
            loss = detector.step(model.train(), *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with torch.inference_mode():
        found = detector.step(model.eval(), *batch)  # in eval mode, as when batch norms are estimated anew: no loss
    assert detector.figures(job, detector.measure(found, None), rows)["map"] > 0.9


def test_the_healthy_classifier(job):
    network = pipeline.healthy_network(CONFIG, 0, "test_resnet")
    loader = train_loader(job, network, np.arange(8))
    loader.batch_sampler.set_epoch(0, 1)
    targets = torch.cat([targets for _, targets in loader])
    assert targets.shape == (8, 1) and targets.dtype == torch.float32 and targets.sum() == 4

    def brightness(images):
        return 30 - images.float().mean((1, 2, 3), keepdim=True)[:, :, 0, 0]

    assert figures_of(job, network, brightness) == {"auroc": 1.0, "accuracy": 1.0}  # the healthy images are dark
    assert figures_of(job, network, lambda images: -brightness(images)) == {"auroc": 0.0, "accuracy": 0.0}


@pytest.mark.parametrize(("folds", "healthy_folds"), [((0, 3), 5), ((0,), 5), ((1, 0, 2), 2), ((0, 3), 0)])
def test_each_classifier_predicts_the_test_images_once(folds, healthy_folds, job, images, monkeypatch):
    images.table["split"], images.table["fold"] = "test", -1
    images.__post_init__()
    job.config = replace(CONFIG, n_folds=10, folds=folds, healthy_folds=healthy_folds)
    monkeypatch.setattr(detection, "predict_boxes", lambda *args: pd.DataFrame({"image_id": ["i1"], "score": [0.5]}))
    asked = []

    def predict(job, networks, rows, views, title):
        asked.append(networks[0].fold)
        return np.full((len(rows), 1), networks[0].fold, np.float32)

    monkeypatch.setattr(detection, "predict", predict)
    parts = [pipeline.predict_rows(job, [fold], images.rows("test"), None, "") for fold in folds]
    trained = job.config.healthy_trained
    assert asked == list(trained)
    healthy = pipeline.pool("_healthy", [part["_healthy"] for part in parts])
    assert healthy["image_id"].tolist() == images.table["image_id"].tolist() and (healthy["fold"] == -1).all()
    np.testing.assert_allclose(healthy["healthy"], 1 / (1 + np.exp(-np.mean(trained))), rtol=1e-12)
    assert pipeline.pool("", [part[""] for part in parts])["fold"].tolist() == list(folds)


def test_the_logits_of_several_classifiers_are_averaged(job, images, monkeypatch):
    job.config = replace(CONFIG, healthy_more=("resnet18",))
    stages = [network.stage for network in pipeline.networks(job)]
    assert stages == ["flip", "healthy", "healthy-resnet18"] * 2
    monkeypatch.setattr(detection, "predict_boxes", lambda *args: pd.DataFrame({"image_id": ["i1"], "score": [0.5]}))
    values = {"healthy": 1.0, "healthy-resnet18": 4.0}
    monkeypatch.setattr(
        detection, "predict", lambda job, one, rows, *rest: np.full((len(rows), 1), values[one[0].stage])
    )
    out = pipeline.predict_rows(job, [0], images.rows(folds=[0]), None, "")["_healthy"]
    np.testing.assert_allclose(out["healthy"], 1 / (1 + np.exp(-2.5)), rtol=1e-12)
    np.testing.assert_allclose(out["first"], 1 / (1 + np.exp(-1)), rtol=1e-12)
    job.config = CONFIG
    assert "first" not in pipeline.predict_rows(job, [0], images.rows(folds=[0]), None, "")["_healthy"]
    assert pipeline.SOLUTION.prediction_key(CONFIG) != pipeline.SOLUTION.prediction_key(
        replace(CONFIG, healthy_more=("resnet18",))
    )
