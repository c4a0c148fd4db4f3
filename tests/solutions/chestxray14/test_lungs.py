"""Masks and crops of the lungs: geometry by hand, what `prepare` keeps of them, the real segmenter."""

import dataclasses
import logging

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.tables import real_data
from common.budget import Budget
from common.errors import InputError
from common.images import prepare_images
from common.job import Job
from common.options import Options
from common.paths import find_images
from common.runs import Run
from common.train.checkpoint import load_weights, save_weights
from solutions.chestxray14 import report
from solutions.chestxray14.config import DEMO, LungsConfig, NetworkConfig
from solutions.chestxray14.data import LUNG_TABLE, lung_settings, mask_and_crop
from solutions.chestxray14.pipeline import SOLUTION
from solutions.lung_segmentation import config as segmenter_config
from solutions.lung_segmentation import load_segmenter, lung_region, segmenter
from solutions.lung_segmentation.models import build_network as build_segmenter
from solutions.lung_segmentation.segmenter import SHIPPED, save_segmenter

SIDE = 8  # of the stand-in's probability maps
NETWORK = NetworkConfig(backbone="tf_efficientnet_lite0", weights="none", resize=32, size=32)
MASKS = dataclasses.replace(
    DEMO,
    whole=dataclasses.replace(NETWORK, weighting=True),
    lungs=NETWORK,
    store_size=32,
    segmenter=LungsConfig(crop_size=32, mask_size=8),
)
BOTH = dataclasses.replace(MASKS, views="both")
CROPS = dataclasses.replace(BOTH, whole=NETWORK)


class Segmenter:
    """Stands in for a segmenter: takes the bright halves of an image for lungs."""

    structures = ("left", "right")

    def parts(self, probs, shape):
        big = [cv2.resize(part, shape[::-1], interpolation=cv2.INTER_NEAREST) > 127 for part in probs]
        return dict(zip(self.structures, np.array(big, np.uint8), strict=True))

    def each(self, files, finish, workers, load):
        for image_id, path in files.items():
            image = load(path)
            probs = np.zeros((len(self.structures), SIDE, SIDE), np.uint8)
            small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
            probs[0, :, :4], probs[1, :, 4:] = small[:, :4], small[:, 4:]
            yield image_id, finish(image_id, image, probs), ""


def image_with(boxes, size=64):
    """An image, dark but for its bright boxes (x_min, y_min, x_max, y_max)."""
    image = np.full((size, size), 20, np.uint8)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = 220
    return image


TWO = ((8, 16, 24, 48), (40, 16, 56, 48))


def test_mask_crop_and_box_by_hand():
    image = image_with(TWO)
    probs = np.zeros((2, SIDE, SIDE), np.uint8)
    probs[0, 2:6, 1:3], probs[1, 2:6, 5:7] = 255, 255  # cells of 8 pixels: x from 8 to 24 and 40 to 56, y 16 to 48
    (mask, crop), about = mask_and_crop(Segmenter(), image, probs, None, SIDE, 20)
    assert np.array_equal(mask, probs.max(0)) and mask.dtype == np.uint8
    # margins: 15 of 256 at the sides and the top, 20 at the bottom: 3.75 and 5 of 64 pixels
    assert about == [8 - 4, 16 - 4, 56 + 4, 48 + 5, "two", 2 * 16 * 32 / 64**2]
    expected = cv2.resize(image[12:53, 4:60], (20, 20), interpolation=cv2.INTER_AREA)
    assert np.array_equal(crop, expected)
    (only,), _ = mask_and_crop(Segmenter(), image, probs, None, 0, 20)
    assert np.array_equal(only, crop)
    (half,), _ = mask_and_crop(
        Segmenter(), image, probs, None, 4, 0
    )  # a cell of the coarse mask: half lung, or a quarter
    assert half[1].tolist() == [128, 128, 128, 128] and half[0].tolist() == [0, 0, 0, 0]


def test_the_heart_joins_the_mask_but_not_the_box():
    heart = Segmenter()
    heart.structures, image = ("left", "right", "heart"), image_with(TWO)
    probs = np.zeros((3, SIDE, SIDE), np.uint8)
    probs[0, 2:6, 1:3], probs[1, 2:6, 5:7], probs[2, 6:, 3:5] = 255, 255, 255
    (with_heart,), about = mask_and_crop(heart, image, probs, None, SIDE, 0)
    (without,), plain = mask_and_crop(Segmenter(), image, probs[:2], None, SIDE, 0)
    assert about == plain and (with_heart[7, 3:5] == 255).all() and not without[6:, 3:5].any()
    assert np.array_equal(np.maximum(without, probs[2]) == 255, with_heart >= 128)


def test_an_image_without_lungs_counts_as_a_whole():
    image, file = image_with(()), {"width": np.int64(64), "height": 64}
    (mask, crop), about = mask_and_crop(Segmenter(), image, np.zeros((2, SIDE, SIDE), np.uint8), file, SIDE, 16)
    assert (mask == 255).all() and about == [0, 0, 64, 64, "none", 0.0]
    assert np.array_equal(crop, cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA))
    (mask,), about = mask_and_crop(None, image[:8, :8], None, {"width": np.int64(3000), "height": 2000}, 4, 0)
    assert mask.tolist() == [[255] * 4] * 4 and about == [0, 0, 3000, 2000, "none", 0.0]


def test_what_lungs_follow_from(tmp_path):
    made = lung_settings(MASKS)
    assert made["segmenter.crop_size"] is None and made["segmenter.mask_size"] == 8
    assert lung_settings(BOTH)["segmenter.crop_size"] == 32
    assert lung_settings(CROPS)["segmenter.mask_size"] is None
    assert lung_settings(dataclasses.replace(MASKS, views="lungs"))["segmenter.mask_size"] is None
    assert set(lung_settings(dataclasses.replace(MASKS, whole=NETWORK)).values()) == {None}
    path = tmp_path / "own.safetensors"
    config = dataclasses.replace(MASKS, segmenter=LungsConfig(weights=str(path), crop_size=32))
    with pytest.raises(InputError, match=r"own\.safetensors: no such file \(--segmenter\.weights\)"):
        lung_settings(config)
    path.write_bytes(b"x")
    assert lung_settings(config)["segmenter.weights"] != made["segmenter.weights"]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """`job(config)`: a Job on eleven images, of which c shows no lungs; the segmenter is the stand-in."""
    names = "abcdefghijk"
    for number, name in enumerate(names):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        bottom = 56 - 2 * number
        assert cv2.imwrite(str(path), image_with([] if name == "c" else [(8, 16, 24, bottom), (40, 16, 56, bottom)]))
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    rows = [f"{name}.png,{'Mass' if n % 2 else 'No Finding'},0,{n + 1},50,F,AP" for n, name in enumerate(names)]
    (tmp_path / "data" / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "data" / "train_val_list.txt").write_text("\n".join(names[:8]))
    (tmp_path / "data" / "test_list.txt").write_text("\n".join(names[8:]))
    monkeypatch.setattr(segmenter, "load_segmenter", lambda weights, device: Segmenter())
    run = Run(tmp_path / "run")

    def make(config):
        options = Options(data=tmp_path / "data", out=tmp_path / "run", workers=0)
        return Job("chestxray14", "demo", config, options, run, torch.device("cpu"), Budget(None), recipe=SOLUTION)

    yield make
    run.close()


def test_prepare_keeps_the_lungs(job, tmp_path, caplog):
    """Masks for the weighting, crops for the lungs' network; a run follows from the segmenter's settings."""
    caplog.set_level(logging.INFO)
    images = prepare_images(job(BOTH), SOLUTION)
    table = images.tables[LUNG_TABLE]
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "run" / LUNG_TABLE))
    assert table["image_id"].tolist() == images.table["image_id"].tolist() == list("abcdefghijk")
    assert table["row"].tolist() == list(range(11)) and (table["rule"] == "two").sum() == 10
    masks, crops = np.load(images.arrays["masks"]), np.load(images.arrays["crops"])
    assert masks.shape == (11, 8, 8) and crops.shape == (11, 32, 32) and (masks[2] == 255).all()
    assert "no lungs found in 1 images, which count as a whole; the first is c" in caplog.text
    left, top, right, bottom = table.loc[7, ["x_min", "y_min", "x_max", "y_max"]]
    part = cv2.imread(str(tmp_path / "data" / "h.png"), cv2.IMREAD_GRAYSCALE)[top:bottom, left:right]
    assert np.array_equal(crops[7], cv2.resize(part, (32, 32), interpolation=cv2.INTER_AREA))
    again = job(BOTH).images
    assert (again.key, again.pixels_key) == (images.key, images.pixels_key)
    coarse = dataclasses.replace(BOTH, segmenter=LungsConfig(crop_size=32, mask_size=16))
    with pytest.raises(InputError, match=r"prepared with --segmenter\.mask-size 8, not 16"):
        _ = job(coarse).images
    assert prepare_images(job(coarse), SOLUTION).key != images.key
    boxes = prepare_images(job(CROPS), SOLUTION)
    assert set(boxes.arrays) == {"crops"} and boxes.about["structures"] is None
    page = report._lungs(boxes).body  # of boxes and crops alone
    assert "Boxes of the lungs" in page and "Region that weights" not in page
    plain = prepare_images(job(dataclasses.replace(MASKS, whole=NETWORK)), SOLUTION)
    assert not plain.arrays and LUNG_TABLE not in plain.tables


def test_what_weights_the_features_is_said(job, caplog, tmp_path):
    """A segmenter without the heart, which belongs to CXR-IRNet's weighting, is told wherever features are weighted."""
    caplog.set_level(logging.INFO)
    lungs = tmp_path / "lungs.safetensors"
    about = load_weights(SHIPPED)[1] | {"structures": "left_right"}
    save_weights(lungs, {"a": torch.zeros(1)}, **about)
    segmenter = LungsConfig(weights=str(lungs), crop_size=32, mask_size=8)
    prepare_images(job(dataclasses.replace(CROPS, segmenter=segmenter)), SOLUTION)
    assert "no heart" not in caplog.text
    images = prepare_images(job(dataclasses.replace(MASKS, segmenter=segmenter)), SOLUTION)
    said = "the segmenter has no heart: features are weighted by the lungs alone, in CXR-IRNet by lungs and heart"
    assert f"{said}; --segmenter.weights takes a segmenter that has it" in caplog.text
    assert images.about["structures"] == ["lungs"] and images.about["said"].endswith(f"; {said}")


def test_a_segmenter_file_with_the_heart_weights_features_by_it(job, tmp_path, caplog, monkeypatch):
    """From a file of three structures, read by the real segmenter, to the masks; only its probabilities are drawn."""
    caplog.set_level(logging.INFO)

    def draw(segmenter, squares):  # the bright halves, and between them the heart
        probs = np.zeros((len(squares), 3, 32, 32), np.uint8)
        probs[:, 0, :, :16], probs[:, 1, :, 16:] = squares[:, :, :16], squares[:, :, 16:]
        probs[:, 2, 12:20, 12:20] = 255
        return probs

    plain = {"architecture": "plain", "encoder": "", "decoder": (4, 8), "weights": "none", "frozen_epochs": 0}
    network = segmenter_config.NetworkConfig(size=32, **plain)
    about = {"network": network, "structures": "lungs_heart", "pixel": 0.5, "regions": 2}
    save_segmenter(tmp_path / "heart.safetensors", build_segmenter(network, 3, "none"), about)
    monkeypatch.setattr(segmenter, "load_segmenter", load_segmenter)
    monkeypatch.setattr(type(load_segmenter(tmp_path / "heart.safetensors", "cpu")), "_predict", draw)
    own = LungsConfig(weights=str(tmp_path / "heart.safetensors"), crop_size=32, mask_size=8)
    images = prepare_images(job(dataclasses.replace(MASKS, segmenter=own)), SOLUTION)
    mask = np.load(images.arrays["masks"])[0]
    assert (mask[3:5, 3:5] == 255).all() and (mask[2:7, [1, 2, 5, 6]] == 255).all()  # the heart, and the lungs
    assert not mask[:2].any() and not mask[5:, 3:5].any()
    assert images.tables[LUNG_TABLE].loc[0, "area"] == pytest.approx(2 * 16 * 40 / 64**2, rel=0.05)  # of lung alone
    assert images.about["structures"] == ["lungs", "heart"] and "no heart" not in caplog.text
    assert "Region that weights the features: lungs and heart" in report._lungs(images).body


def test_real_lungs():
    folder = real_data("chestxray14")
    if folder is None:
        pytest.skip("no real radiographs ($CXR_REAL_DATA/chestxray14)")
    files = dict(list(find_images(folder).items())[:3])
    segmenter = load_segmenter(device="cpu")
    for _, result, problem in segmenter.each(
        files,
        lambda name, image, probs: (
            mask_and_crop(segmenter, image, probs, None, 64, 64),
            segmenter.parts(probs, image.shape),
            segmenter.lungs(probs, image.shape),
        ),
        1,
    ):
        assert not problem
        ((small, crop), about), parts, mask = result
        region = np.maximum.reduce(list(parts.values()))
        assert 0.03 < parts["heart"].mean() < 0.2
        assert about[:4] == list(lung_region(mask).box) and about[4] == "two" and 0.15 < about[5] < 0.6
        assert abs(small.mean() / 255 - region.mean()) < 0.01 and crop.shape == (64, 64)
        assert about[5] == pytest.approx(mask.mean())
