"""Masks and verdicts of stored images: dilated and closed as the paper does, and passed by the area gate."""

import dataclasses
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from common.data.store import prepare_store
from common.errors import InputError
from common.options import Options
from common.paths import read_array
from solutions.covid19.config import DEMO, LungsConfig
from solutions.covid19.data import COLOURED, MASKS, UNREADABLE, find_lungs, lungs_key
from solutions.lung_segmentation import segmenter

SIDE = 64
BOXES = {"both": [(16, 48, 8, 24), (16, 48, 40, 56)], "small": [(20, 30, 10, 16), (20, 30, 44, 50)], "none": []}


def boxes(*parts):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for top, bottom, left, right in parts:
        mask[top:bottom, left:right] = 1
    return mask


class Segmenter:
    """Finds the lungs that an image's grey level names."""

    def each(self, sources, finish, workers=None, load=None):
        for name, source in sources.items():
            image = load(source)
            yield name, finish(name, image, image), ""

    def lungs(self, probs, shape):
        return boxes(*list(BOXES.values())[int(probs[0, 0]) // 50 - 1])


@pytest.fixture
def find(tmp_path, monkeypatch):
    """`find(**lungs)`: the lungs of images with both lungs, small ones, none, a photo and an unreadable file."""
    monkeypatch.setattr(segmenter, "load_segmenter", lambda weights, device: Segmenter())
    for number, name in enumerate(BOXES, 1):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((80, 70), 50 * number, np.uint8))
    hue = np.dstack([np.tile(np.linspace(0, 179, 70), (80, 1)), np.full((80, 70), 200), np.full((80, 70), 180)])
    cv2.imwrite(str(tmp_path / "photo.png"), cv2.cvtColor(hue.astype(np.uint8), cv2.COLOR_HSV2BGR))
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    names = [*BOXES, "photo", "torn"]
    files = {name: tmp_path / f"{name}.png" for name in names}
    store = prepare_store(files, tmp_path / "stores" / "covid", SIDE, 1, "placeholder", frozenset(names), False)
    return lambda **about: find_lungs(job_with(**about), store)


def job_with(**about):
    network = dataclasses.replace(DEMO.network, size=SIDE)
    config = dataclasses.replace(DEMO, lungs=LungsConfig(**about), store_size=SIDE, network=network)
    return SimpleNamespace(config=config, device=torch.device("cpu"), options=Options())


def test_masks_are_widened_and_closed_and_judged(find):
    table, arrays = find()
    masks = read_array(arrays[MASKS])
    assert masks.shape == (5, SIDE, SIDE) and masks.dtype == np.uint8
    for mask, raw in zip(masks, BOXES.values(), strict=False):  # 8 steps of 512 are one of 64, 2 are none
        assert (mask == ndimage.binary_dilation(boxes(*raw), np.ones((3, 3)))).all()
    assert not masks[2:].any()
    assert table["image_id"].tolist() == [*BOXES, "photo", "torn"] and table["row"].tolist() == [0, 1, 2, 3, 4]
    assert table["usable"].tolist() == [True, False, False, False, False]
    assert table["area"].tolist() == pytest.approx([mask.mean() for mask in masks])
    assert table["reason"].tolist() == ["", table["reason"][1], "no lung found", COLOURED, UNREADABLE]
    assert table["reason"][1].startswith("lungs cover 4.6 % of the image, the gate requires 19.1 %")


def test_the_gate_is_the_share_of_the_widened_lungs(find):
    table = find(dilations=0, closings=0)[0]
    assert table["area"][0] == 2 * 32 * 16 / SIDE**2 and table["area"][1] == 2 * 10 * 6 / SIDE**2
    assert table["usable"].tolist() == [True, False, False, False, False]
    assert find(dilations=0, closings=0, gate=0.02)[0]["usable"].tolist() == [True, True, False, False, False]


def test_lungs_follow_from_settings_and_weights(tmp_path):
    shipped = lungs_key(job_with().config)
    (tmp_path / "other.safetensors").write_bytes(b"other")
    other = lungs_key(job_with(weights=str(tmp_path / "other.safetensors")).config)
    assert other["weights"] != shipped["weights"] and other | {"weights": 0} == shipped | {"weights": 0}
    with pytest.raises(InputError, match=r"nowhere: no such file \(--lungs.weights\)"):
        lungs_key(job_with(weights=str(tmp_path / "nowhere")).config)
