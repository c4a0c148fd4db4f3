"""Masks and crops of the lungs: geometry by hand, a killed run that goes on, the real segmenter."""

import dataclasses
import logging

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.tables import real_data
from common.budget import Budget
from common.data.store import prepare_store
from common.errors import InputError
from common.job import Job as Context
from common.options import Options
from common.paths import find_images, lock_folder, read_array
from common.runs import Run
from common.train.checkpoint import save_weights
from solutions.chestxray14 import lungs, report
from solutions.chestxray14.config import DEMO, LungsConfig, NetworkConfig
from solutions.chestxray14.data import open_prepared, prepare_competition
from solutions.chestxray14.lungs import find_lungs, look, lungs_made, mask_structures, open_lungs, whole
from solutions.lung_segmentation import load_segmenter, lung_region

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


class Stand:
    """A segmenter that takes the bright halves of an image for lungs, in its own order of things; counts its work."""

    structures, pixel, regions = ("left", "right"), 0.5, 2

    def __init__(self, stop=None):
        self.seen, self.stop = [], stop

    def lungs(self, probs, shape):
        big = cv2.resize(probs[:2].max(0), shape[::-1], interpolation=cv2.INTER_NEAREST)
        return (big > 127).astype(np.uint8)

    def each(self, files, finish, workers=None):
        for image_id, path in files.items():
            if self.stop is not None and len(self.seen) >= self.stop:
                raise KeyboardInterrupt
            image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
            self.seen.append(image_id)
            if image is None:
                yield image_id, None, f"{path}: unreadable"
                continue
            probs = np.zeros((2, SIDE, SIDE), np.uint8)
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


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def files(tmp_path):
    """Twelve images: two lungs that shrink from one to the next, c with none, and f that cannot be decoded."""
    made = {}
    for number, name in enumerate("abcdefghijkl"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        bottom = 56 - 2 * number
        boxes = [] if name == "c" else [(8, 16, 24, bottom), (40, 16, 56, bottom)]
        assert cv2.imwrite(str(path), image_with(boxes))
        made[name] = path
    made["f"].write_bytes(b"no image")
    return made


@pytest.fixture
def store(tmp_path, files):
    return prepare_store(files, tmp_path / "stores" / "s", 16, 1, "placeholder", frozenset("f"), progress=False)


@pytest.fixture
def context(tmp_path):
    run = Run(tmp_path / "run")

    def make(config=MASKS):
        options = Options(out=tmp_path / "run", workers=0)
        return Context("chestxray14", "demo", config, options, run, torch.device("cpu"), Budget(None))

    yield make
    run.close()


@pytest.fixture
def stand(monkeypatch):
    """`stand(stop=…)` becomes the segmenter that is loaded; it is interrupted before image number `stop`."""
    monkeypatch.setattr(lungs, "BLOCK", 4)
    monkeypatch.setattr(lungs, "BATCH", 2)

    def use(stop=None):
        made = Stand(stop)
        monkeypatch.setattr(lungs, "load_segmenter", lambda weights, device, batch_size: made)
        return made

    return use


def test_mask_crop_and_box_by_hand():
    image = image_with(TWO)
    probs = np.zeros((2, SIDE, SIDE), np.uint8)
    probs[0, 2:6, 1:3], probs[1, 2:6, 5:7] = 255, 255  # cells of 8 pixels: x from 8 to 24 and 40 to 56, y 16 to 48
    mask, crop, about = look(Stand(), image, probs, SIDE, 20)
    assert np.array_equal(mask, probs.max(0)) and mask.dtype == np.uint8
    # margins: 15 of 256 at the sides and the top, 20 at the bottom: 3.75 and 5 of 64 pixels
    assert about == [8 - 4, 16 - 4, 56 + 4, 48 + 5, "two", 2 * 16 * 32 / 64**2]
    expected = cv2.resize(image[12:53, 4:60], (20, 20), interpolation=cv2.INTER_AREA)
    assert np.array_equal(crop, expected)
    assert look(Stand(), image, probs, 0, 20)[0] is None and whole(image, (64, 64), 0, 20)[0] is None
    half, nothing, _ = look(Stand(), image, probs, 4, 0)  # a cell of the coarse mask: half lung, or a quarter
    assert nothing is None and half[1].tolist() == [128, 128, 128, 128] and half[0].tolist() == [0, 0, 0, 0]


def test_the_heart_joins_the_mask_but_not_the_box():
    heart = Stand()
    heart.structures, image = ("left", "right", "heart"), image_with(TWO)
    probs = np.zeros((3, SIDE, SIDE), np.uint8)
    probs[0, 2:6, 1:3], probs[1, 2:6, 5:7], probs[2, 6:, 3:5] = 255, 255, 255
    with_heart, _, about = look(heart, image, probs, SIDE, 0)
    without, _, plain = look(Stand(), image, probs[:2], SIDE, 0)
    assert about == plain and (with_heart[7, 3:5] == 255).all() and not without[6:, 3:5].any()
    assert np.array_equal(np.maximum(without, probs[2]) == 255, with_heart >= 128)


def test_an_image_without_lungs_is_looked_at_whole():
    image = image_with(())
    mask, crop, about = look(Stand(), image, np.zeros((2, SIDE, SIDE), np.uint8), SIDE, 16)
    assert (mask == 255).all() and about == [0, 0, 64, 64, "none", 0.0]
    assert np.array_equal(crop, cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA))
    mask, crop, about = whole(image[:8, :8], (np.int64(3000), 2000), 4, 0)
    assert mask.shape == (4, 4) and crop is None and about == [0, 0, 3000, 2000, "none", 0.0]


def test_what_find_lungs_leaves(context, store, files, stand, said):
    work = stand()
    folder = find_lungs(context(BOTH), store, files)
    assert folder.parent == store.folder.parent and folder.name.startswith("s-lungs-")
    assert {path.name for path in folder.iterdir()} == {"masks.npy", "crops.npy", "lungs.parquet"}
    found = open_lungs(folder, lungs_made(BOTH))
    masks, crops = read_array(found.masks), read_array(found.crops)
    assert masks.shape == (12, 8, 8) and crops.shape == (12, 32, 32) and masks.dtype == crops.dtype == np.uint8
    table = found.table.set_index("image_id")
    assert table.index.tolist() == list(files) and table["row"].tolist() == list(range(12))
    assert table.loc[["c", "f"], "rule"].tolist() == ["none"] * 2 and (table.drop(["c", "f"])["rule"] == "two").all()
    assert "f" not in work.seen and (masks[[2, 5]] == 255).all() and (crops[5] == 128).all()
    assert "no lungs found in 2 images: looked at whole, the first is c" in said.text
    for row, name in ((0, "a"), (7, "h")):
        image, where = cv2.imread(str(files[name]), cv2.IMREAD_GRAYSCALE), table.loc[name]
        part = image[where["y_min"] : where["y_max"], where["x_min"] : where["x_max"]]
        assert np.array_equal(crops[row], cv2.resize(part, (32, 32), interpolation=cv2.INTER_AREA))
    assert not work.stop and find_lungs(context(BOTH), store, files) == folder and len(work.seen) == 11
    plain = find_lungs(context(MASKS), store, files)  # without crops: another folder
    assert plain != folder and open_lungs(plain, lungs_made(MASKS)).crops is None
    assert np.array_equal(read_array(plain / "masks.npy"), masks)
    boxes = find_lungs(context(CROPS), store, files)  # nothing is weighted: no masks
    assert {path.name for path in boxes.iterdir()} == {"crops.npy", "lungs.parquet"}
    assert np.array_equal(read_array(boxes / "crops.npy"), crops)
    opened = open_lungs(boxes, lungs_made(CROPS))
    assert opened.masks is None
    pd.testing.assert_frame_equal(opened.table, found.table)
    (folder / "masks.npy").write_bytes(b"")
    with pytest.raises(InputError, match="damaged array"):
        open_lungs(folder, lungs_made(BOTH))
    (folder / "masks.npy").unlink()
    with pytest.raises(InputError, match=r"masks\.npy: no such file"):
        open_lungs(folder, lungs_made(BOTH))


@pytest.mark.parametrize("stop", [0, 3, 5, 10])
def test_a_killed_run_goes_on_where_it_was(stop, context, store, files, stand, said):
    stand()
    folder = find_lungs(context(BOTH), store, files)
    names = ("masks.npy", "crops.npy", "lungs.parquet")
    wanted = {name: (folder / name).read_bytes() for name in names}
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    said.clear()
    work = stand(stop=stop)
    with pytest.raises(KeyboardInterrupt):
        find_lungs(context(BOTH), store, files)
    partial = folder.with_name(folder.name + ".partial")
    with open(partial / "crops.npy", "ab") as file:  # what a kill leaves behind the last state
        file.write(b"torn")
    with open(partial / "journal", "a") as file:
        file.write('[[1, 2, 3, 4, "tw')
    work = stand()
    assert find_lungs(context(BOTH), store, files) == folder and not partial.exists()
    # blocks of four images, those that are looked at in pairs: f (row 5) is not, so that the second block ends at i
    done = {0: 0, 3: 0, 5: 4, 10: 9}[stop]
    assert ("lungs: continuing" in said.text) == (done > 0)
    assert len(work.seen) == 11 - done + (done > 5)
    assert {name: (folder / name).read_bytes() for name in names} == wanted


def test_unfinished_work_of_other_images_is_not_used(context, store, files, stand):
    with pytest.raises(KeyboardInterrupt):
        stand(stop=6) and find_lungs(context(MASKS), store, files)
    partial = next(store.folder.parent.glob("*.partial"))
    lines = (partial / "journal").read_text().splitlines()
    assert len(lines) == 2
    (partial / "journal").write_text("\n".join(["0" * 16, *lines[1:]]) + "\n")
    work = stand()
    find_lungs(context(MASKS), store, files)
    assert len(work.seen) == 11


def test_what_cannot_be_used(context, store, files, stand, tmp_path):
    other = dataclasses.replace(MASKS, segmenter=LungsConfig(weights=str(tmp_path / "no.safetensors"), crop_size=32))
    with pytest.raises(InputError, match=r"no\.safetensors: no such file \(--segmenter\.weights\)"):
        find_lungs(context(other), store, files)
    stand()
    files["h"].unlink()  # an image of the store whose original has gone: no guess, and nothing kept for good
    with pytest.raises(InputError, match=r"h\.png: unreadable"):
        find_lungs(context(MASKS), store, files)
    with (
        lock_folder(tmp_path, ""),
        pytest.raises(InputError, match="another process is at it"),
        lock_folder(tmp_path, "at it"),
    ):
        pass


def test_what_lungs_follow_from(tmp_path):
    made = lungs_made(MASKS)
    assert made["crop_size"] == 0 and made["mask_size"] == 8 and lungs_made(BOTH)["crop_size"] == 32
    (tmp_path / "own.safetensors").write_bytes(b"x")
    config = dataclasses.replace(MASKS, segmenter=LungsConfig(weights=str(tmp_path / "own.safetensors"), crop_size=32))
    assert lungs_made(config)["segmenter"] != made["segmenter"]
    assert lungs_made(CROPS)["mask_size"] == 0 and lungs_made(CROPS)["crop_size"] == 32
    assert lungs_made(dataclasses.replace(MASKS, views="lungs"))["mask_size"] == 0  # whole.weighting without `whole`


def test_what_weights_the_features_is_said(context, store, files, stand, said, tmp_path):
    """The shipped segmenter knows no heart, which CXR-IRNet's weighting has."""
    stand()
    assert mask_structures(MASKS) == ["lungs"] and mask_structures(CROPS) is None
    find_lungs(context(CROPS), store, files)
    assert "weighting by the lungs alone" not in said.text
    find_lungs(context(MASKS), store, files)
    assert "weighting by the lungs alone; CXR-IRNet's is by lungs and heart" in said.text
    said.clear()
    save_weights(tmp_path / "heart.safetensors", {"a": torch.zeros(1)}, structures="lungs_heart")
    segmenter = LungsConfig(weights=str(tmp_path / "heart.safetensors"), crop_size=32, mask_size=8)
    heart = dataclasses.replace(MASKS, segmenter=segmenter)
    assert mask_structures(heart) == ["lungs", "heart"]
    find_lungs(context(heart), store, files)
    assert "lungs alone" not in said.text


def test_prepare_with_lungs(tmp_path, files, stand):
    """The run has the table and the paths; its key follows the segmenter, and the settings are held to."""
    names = [name for name in files if name != "f"]
    files["f"].unlink()
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    rows = [f"{name}.png,{'Mass' if n % 2 else 'No Finding'},0,{n + 1},50,F,AP" for n, name in enumerate(names)]
    (tmp_path / "data" / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "data" / "train_val_list.txt").write_text("\n".join(names[:8]))
    (tmp_path / "data" / "test_list.txt").write_text("\n".join(names[8:]))
    stand()
    run = Run(tmp_path / "run")

    def context(config):
        options = Options(data=tmp_path / "data", out=tmp_path / "run", workers=0)
        return Context("chestxray14", "demo", config, options, run, torch.device("cpu"), Budget(None))

    prepared = prepare_competition(context(BOTH))
    assert len(prepared.lungs) == 11 and prepared.masks.is_file() and prepared.crops.is_file()
    pd.testing.assert_frame_equal(prepared.lungs, pd.read_parquet(run.path("lungs.parquet")))
    assert prepared.lungs["image_id"].tolist() == prepared.table["image_id"].tolist()
    assert prepared.structures == ["lungs"] and "; weighting by the lungs alone" in prepared.official["said"]
    again = open_prepared(context(BOTH))
    assert (again.key, again.pixels_key) == (prepared.key, prepared.pixels_key)
    coarse = dataclasses.replace(BOTH, segmenter=LungsConfig(crop_size=32, mask_size=16))
    with pytest.raises(InputError, match="prepared with another segmenter, mask_size or crop_size; run `prepare`"):
        open_prepared(context(coarse))
    assert prepare_competition(context(coarse)).key != prepared.key
    plain = dataclasses.replace(MASKS, whole=NETWORK)
    assert open_prepared(context(plain)).lungs is None
    boxes = prepare_competition(context(CROPS))
    assert boxes.masks is None and boxes.crops.is_file() and boxes.structures is None
    page = report._lungs(boxes).body  # of boxes and crops alone
    assert "Boxes of the lungs" in page and "Region that weights" not in page
    run.close()


def test_real_lungs():
    folder = real_data("chestxray14")
    if folder is None:
        pytest.skip("no real radiographs ($CXR_REAL_DATA/chestxray14)")
    files = dict(list(find_images(folder).items())[:3])
    segmenter, made = load_segmenter(device="cpu"), {}
    for image_id, result, problem in segmenter.each(
        files, lambda name, image, probs: look(segmenter, image, probs, 64, 64), 1
    ):
        assert not problem
        made[image_id] = result
    for image_id, image, mask, _ in segmenter.read(files, 1):
        small, crop, about = made[image_id]
        assert about[:4] == list(lung_region(mask).box) and about[4] == "two" and 0.15 < about[5] < 0.6
        assert abs(small.mean() / 255 - mask.mean()) < 0.01 and crop.shape == (64, 64)
        assert about[5] == pytest.approx(mask.mean()) and image.shape == mask.shape
