"""The lungs beside a store: shared by runs, resumable to the same bytes, damaged files and other processes named."""

import dataclasses
import logging
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from common.data.store import prepare_store
from common.errors import InputError
from common.paths import lock_folder, read_array
from common.train.checkpoint import save_weights
from solutions.lung_segmentation import find_lungs, structures_of, weights_file
from solutions.lung_segmentation import segmenter as module

NAMES = "abcdefghijkl"
JOB = SimpleNamespace(options=SimpleNamespace(workers=0, device="cpu"))


@dataclasses.dataclass
class Segmenter:
    """Stands in for a segmenter: the probabilities are the image itself; it is interrupted before image `stop`."""

    stop: int | None = None
    seen: list = dataclasses.field(default_factory=list)

    def each(self, files, finish, workers, load):
        for name, path in files.items():
            if self.stop is not None and len(self.seen) >= self.stop:
                raise KeyboardInterrupt
            self.seen.append(name)
            try:
                image = load(path)
            except InputError as error:
                yield name, None, str(error)
                continue
            yield name, finish(name, image, image), ""


@pytest.fixture
def segmenter(monkeypatch):
    """`segmenter(stop=…)` replaces the segmenter that is loaded; blocks are of four images."""
    monkeypatch.setattr(module, "BLOCK", 4)

    def use(stop=None):
        made = Segmenter(stop)
        monkeypatch.setattr(module, "load_segmenter", lambda weights, device: made)
        return made

    return use


@pytest.fixture
def files(tmp_path):
    """Twelve images of 16 × 16 pixels, of which f cannot be decoded and i is a colour picture."""
    paths = {name: tmp_path / f"{name}.png" for name in NAMES}
    for grey, path in enumerate(paths.values(), 100):
        cv2.imwrite(str(path), np.full((16, 16), grey, np.uint8))
    paths["f"].write_bytes(b"no image")
    hue = np.dstack([np.tile(np.linspace(0, 179, 16), (16, 1)), np.full((16, 16), 200), np.full((16, 16), 180)])
    cv2.imwrite(str(paths["i"]), cv2.cvtColor(hue.astype(np.uint8), cv2.COLOR_HSV2BGR))
    return paths


@pytest.fixture
def store(tmp_path, files):
    return prepare_store(files, tmp_path / "stores" / "s", 8, 1, "placeholder", frozenset(NAMES), progress=False)


def find(store, files=None, sides=(("masks", 4), ("crops", 2)), **settings):
    """Find lungs whose arrays and column `grey` are an image's first pixel, 0 for skipped ones."""

    def describe(segmenter, image, probs, about):
        if probs is None:
            return [np.zeros((side, side), np.uint8) for _, side in sides], [0, int(about["width"])]
        return [np.full((side, side), probs[0, 0], np.uint8) for _, side in sides], [int(image[0, 0]), image.shape[0]]

    weights = weights_file("shipped", "--weights")
    found = find_lungs(JOB, store, weights, settings, dict(sides), ["grey", "side"], describe, files)
    return SimpleNamespace(table=found[0], arrays=found[1])


def folder_of(found):
    return found.arrays["masks"].parent


def test_every_image_has_a_row_in_table_and_arrays(store, files, segmenter):
    work = segmenter()
    found = find(store, files)
    grey = [0 if name in "fi" else 100 + place for place, name in enumerate(NAMES)]
    assert found.table["image_id"].tolist() == list(NAMES) and found.table["row"].tolist() == list(range(12))
    assert found.table["grey"].tolist() == grey and not {5, 8} & set(work.seen)
    assert found.table["side"].tolist() == [8 if name == "f" else 16 for name in NAMES]
    masks, crops = read_array(found.arrays["masks"]), read_array(found.arrays["crops"])
    assert masks.shape == (12, 4, 4) and crops.shape == (12, 2, 2) and masks.dtype == crops.dtype == np.uint8
    assert masks[:, 0, 0].tolist() == crops[:, 1, 1].tolist() == grey
    assert {path.name for path in folder_of(found).iterdir()} == {"masks.npy", "crops.npy", "lungs.parquet"}
    assert folder_of(found).parent == store.folder.parent and folder_of(found).name.startswith("s-lungs-")


def test_without_originals_the_stored_images_are_read(store, segmenter):
    segmenter()
    table = find(store).table
    assert table["grey"].tolist()[:5] == [100, 101, 102, 103, 104] and (table["side"][:5] == 8).all()


def test_runs_with_the_same_settings_share_the_lungs(store, files, segmenter):
    work = segmenter()
    first = find(store, files)
    assert folder_of(find(store, files)) == folder_of(first) and len(work.seen) == 10
    assert folder_of(find(store, files, gate=0.1)) != folder_of(first) and len(work.seen) == 20


@pytest.mark.parametrize(("stop", "done"), [(0, 0), (3, 0), (5, 4), (9, 8)])
def test_a_killed_run_continues_to_the_same_bytes(stop, done, store, files, segmenter, caplog):
    caplog.set_level(logging.INFO)
    segmenter()
    folder = folder_of(find(store, files))
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    work = segmenter(stop)
    with pytest.raises(KeyboardInterrupt):
        find(store, files)
    (folder / f"block-{done}.npz").write_bytes(b"torn")  # as a full disk may leave it
    before, work = work, segmenter()
    find(store, files)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted
    assert f"continuing, {done + 4} of 12" in caplog.text  # the torn block is found again
    assert work.seen == [row for row in range(done, len(NAMES)) if NAMES[row] not in "fi"] and len(before.seen) == stop


def test_what_cannot_be_used_is_named(store, files, segmenter, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such file \(--segmenter.weights\)"):
        weights_file(tmp_path / "nowhere", "--segmenter.weights")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other")
    with pytest.raises(InputError, match=r"other\.safetensors"):
        find_lungs(JOB, store, other, {}, {}, [], None)
    segmenter()
    files["h"].unlink()  # the store has the image, but its original has gone
    with pytest.raises(InputError, match=r"h\.png"):
        find(store, files)
    (folder,) = store.folder.parent.glob("s-lungs-*")
    with lock_folder(folder, "testing"), pytest.raises(InputError, match="another process is finding these lungs"):
        find(store)


def test_damaged_lungs_are_named_and_incomplete_ones_found_again(store, segmenter):
    work = segmenter()
    folder = folder_of(find(store))
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for name, content, message in (
        ("lungs.parquet", b"PAR1", "lungs.parquet: damaged table"),
        ("masks.npy", b"", "masks.npy: damaged array"),
        ("crops.npy", whole[folder / "crops.npy"][:130], "crops.npy: damaged array"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            find(store)
        (folder / name).write_bytes(whole[folder / name])
    np.save(folder / "masks.npy", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(InputError, match=r"damaged lungs \(array and table disagree\)"):
        find(store)
    (folder / "lungs.parquet").unlink()
    before = len(work.seen)
    assert folder_of(find(store)) == folder and len(work.seen) == 2 * before


def test_structures_of_a_weights_file(tmp_path):
    save_weights(tmp_path / "heart.safetensors", {"a": torch.zeros(1)}, structures="lungs_heart")
    assert structures_of(tmp_path / "heart.safetensors") == ("left", "right", "heart")
    assert structures_of(weights_file("shipped", "--weights")) == ("left", "right", "heart")
