"""Masks and verdicts of stored images: cleaned up as the paper does, shared by runs, whole or not at all."""

import dataclasses
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from common.data.store import prepare_store
from common.errors import InputError
from common.paths import lock_folder, read_array
from solutions.covid19 import lungs
from solutions.covid19.config import DEMO, LungsConfig
from solutions.covid19.lungs import COLOURED, UNREADABLE, find_lungs, lungs_made, open_lungs

SIDE = 64
BOXES = {"both": [(16, 48, 8, 24), (16, 48, 40, 56)], "small": [(20, 30, 10, 16), (20, 30, 44, 50)], "none": []}


def boxes(*parts):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for top, bottom, left, right in parts:
        mask[top:bottom, left:right] = 1
    return mask


class Segmenter:
    """Finds the lungs that an image's grey level names; counts the images."""

    def __init__(self):
        self.seen = 0

    def masks(self, images):
        for image in images:
            self.seen += 1
            yield boxes(*list(BOXES.values())[int(image[0, 0]) // 50 - 1])


@pytest.fixture
def segmenter(monkeypatch):
    found = Segmenter()
    monkeypatch.setattr(lungs, "load_segmenter", lambda weights, device: found)
    return found


@pytest.fixture
def store(tmp_path):
    """Images with both lungs, small ones and none, a colour picture and a file that cannot be read."""
    for number, name in enumerate(BOXES, 1):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((80, 70), 50 * number, np.uint8))
    hue = np.dstack([np.tile(np.linspace(0, 179, 70), (80, 1)), np.full((80, 70), 200), np.full((80, 70), 180)])
    cv2.imwrite(str(tmp_path / "photo.png"), cv2.cvtColor(hue.astype(np.uint8), cv2.COLOR_HSV2BGR))
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    names = [*BOXES, "photo", "torn"]
    files = {name: tmp_path / f"{name}.png" for name in names}
    return prepare_store(files, tmp_path / "stores" / "covid", SIDE, 1, "placeholder", frozenset(names), False)


def context(**about):
    config = dataclasses.replace(
        DEMO, lungs=LungsConfig(**about), store_size=SIDE, network=dataclasses.replace(DEMO.network, size=SIDE)
    )
    return SimpleNamespace(config=config, device=torch.device("cpu"))


def test_masks_are_widened_and_closed_and_judged(store, segmenter):
    found = open_lungs(find_lungs(context(), store))
    masks = read_array(found.masks)
    assert masks.shape == (5, SIDE, SIDE) and masks.dtype == np.uint8 and segmenter.seen == 3
    for mask, raw in zip(masks, BOXES.values(), strict=False):  # 8 steps of 512 are one of 64, 2 are none
        assert (mask == ndimage.binary_dilation(boxes(*raw), np.ones((3, 3)))).all()
    assert not masks[2:].any()
    table = found.table
    assert list(table.columns) == ["image_id", "row", "area", "usable", "reason"]
    assert table["image_id"].tolist() == [*BOXES, "photo", "torn"] and table["row"].tolist() == [0, 1, 2, 3, 4]
    assert table["usable"].tolist() == [True, False, False, False, False]
    assert table["area"].tolist() == pytest.approx([mask.mean() for mask in masks])
    assert table["reason"].tolist() == ["", table["reason"][1], "no lung found", COLOURED, UNREADABLE]
    assert table["reason"][1].startswith("lungs cover 4.6 % of the image, the gate asks for 19.1 %")


def test_the_gate_is_the_share_of_the_widened_lungs(store, segmenter):
    config = context(dilations=0, closings=0)
    table = open_lungs(find_lungs(config, store)).table
    assert table["area"][0] == 2 * 32 * 16 / SIDE**2 and table["area"][1] == 2 * 10 * 6 / SIDE**2
    assert table["usable"].tolist() == [True, False, False, False, False]
    assert table["reason"][1].startswith("lungs cover 2.9 %")
    low = open_lungs(find_lungs(context(dilations=0, closings=0, gate=0.02), store)).table
    assert low["usable"].tolist() == [True, True, False, False, False]


def test_runs_of_the_same_settings_share_the_lungs(store, segmenter):
    folder = find_lungs(context(), store)
    assert find_lungs(context(), store) == folder and segmenter.seen == 3
    assert folder.name.startswith("covid-lungs-") and folder.parent == store.folder.parent
    assert find_lungs(context(gate=0.1), store) != folder and segmenter.seen == 6


def test_work_that_was_cut_off_begins_again(store, segmenter, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lungs, "write_table", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            find_lungs(context(), store)
    (partial,) = store.folder.parent.glob("*.partial")
    with lock_folder(partial, "testing"), pytest.raises(InputError, match="another process is finding these lungs"):
        find_lungs(context(), store)
    folder = find_lungs(context(), store)
    assert not list(store.folder.parent.glob("*.partial")) and segmenter.seen == 6
    assert open_lungs(folder).table["usable"].sum() == 1
    (folder / "lungs.parquet").unlink()  # what is not whole is made anew
    assert find_lungs(context(), store) == folder and segmenter.seen == 9


def test_damaged_lungs_are_named(store, segmenter):
    folder = find_lungs(context(), store)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for name, content, said in (
        ("lungs.parquet", b"PAR1", "lungs.parquet: damaged table"),
        ("masks.npy", b"", "masks.npy: damaged array"),
        ("masks.npy", whole[folder / "masks.npy"][:200], "masks.npy: damaged array"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=said):
            open_lungs(folder)
        (folder / name).write_bytes(whole[folder / name])
    np.save(folder / "masks.npy", np.zeros((4, SIDE, SIDE), np.uint8))
    with pytest.raises(InputError, match=r"damaged lungs \(array and table disagree\)"):
        open_lungs(folder)
    with pytest.raises(InputError, match="no such file"):
        open_lungs(store.folder)


def test_what_the_lungs_follow_from(tmp_path):
    shipped = lungs_made(context().config)
    assert set(shipped) == {"segmenter", "dilations", "closings", "gate"}
    (tmp_path / "other.safetensors").write_bytes(b"other")
    other = lungs_made(context(weights=str(tmp_path / "other.safetensors")).config)
    assert other["segmenter"] != shipped["segmenter"] and other | shipped == shipped
    with pytest.raises(InputError, match=r"nowhere: no such file \(--lungs.weights\)"):
        lungs_made(context(weights=str(tmp_path / "nowhere")).config)


def test_a_file_that_is_no_segmenter_is_named(store, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match=r"other.safetensors"):
        find_lungs(context(weights=str(tmp_path / "other.safetensors")), store)
    assert not list(store.folder.parent.glob("*lungs*"))
