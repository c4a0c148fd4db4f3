"""The embedded sample: three datasets as they unpack, repeatable, and never half there."""

import hashlib

import cv2
import numpy as np
import pytest
from PIL import Image

from common import phantom
from common.errors import InputError
from common.phantom.findings import nodule
from solutions.lung_segmentation import sample
from solutions.lung_segmentation.sample import make_sample

COUNTS, SEED = {"n_montgomery": 8, "n_shenzhen": 10, "n_jsrt": 3, "n_test": 5}, 3
SMALL = {"n_montgomery": 1, "n_shenzhen": 1, "n_jsrt": 0, "n_test": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("lungs") / "sample", **COUNTS, seed=SEED)


def files(folder, pattern):
    return {path.name: path for path in sorted(folder.glob(pattern))}


def read(path):
    return np.array(Image.open(path).convert("L"))


def mask(path):
    values = read(path)
    assert set(np.unique(values)) == {0, 255}, path  # so neither empty nor full
    return values > 0


def fingerprint(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_layout(folder):
    names = ["ChinaSet_AllFiles", "JSRT", "Montgomery", "hidden", "mask", "sample.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    montgomery = files(folder, "Montgomery/MontgomerySet/CXR_png/MCUCXR_????_?.png")
    shenzhen = files(folder, "ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png/CHNCXR_????_?.png")
    left = files(folder, "Montgomery/MontgomerySet/ManualMask/leftMask/*.png")
    united = {name.replace("_mask", "") for name in files(folder, "mask/mask/*_mask.png")}
    hidden = set(files(folder, "hidden/*.png"))
    assert (len(montgomery), len(left), len(shenzhen), len(united)) == (9, 8, 14, 10)
    assert set(left) == set(files(folder, "Montgomery/MontgomerySet/ManualMask/rightMask/*.png"))
    assert not (set(left) | united) & hidden and set(left) | united | hidden == set(montgomery) | set(shenzhen)
    assert sum(name.endswith("_1.png") for name in montgomery) == 4  # 45 % of 9
    assert sum(name.endswith("_1.png") for name in shenzhen) == 6  # 45 % of 14
    assert set(files(folder, "JSRT/All247images/*")) == {"JPCLN001.IMG", "JPCLN002.IMG", "JPCNN001.IMG"}
    for part in ("left lung", "right lung", "heart"):
        outlines = folder / "JSRT" / "scratch"
        assert set(files(outlines, f"fold1/masks/{part}/*")) == {"JPCLN001.gif", "JPCNN001.gif"}
        assert set(files(outlines, f"fold2/masks/{part}/*")) == {"JPCLN002.gif"}
    known = len(montgomery) + 2 * len(left) + len(shenzhen) + len(united) + len(hidden) + 3 + 9 + 1
    assert len(fingerprint(folder)) == known


def test_montgomery_masks_are_the_patients_sides_on_a_film_upright_or_across(folder):
    shapes = set()
    for name, path in files(folder, "Montgomery/MontgomerySet/ManualMask/leftMask/*.png").items():
        left, right = mask(path), mask(path.parent.parent / "rightMask" / name)
        image = read(path.parents[2] / "CXR_png" / name)
        assert left.shape == right.shape == image.shape and not (left & right).any()
        assert np.argwhere(right)[:, 1].max() < np.argwhere(left)[:, 1].min()  # the patient faces us
        assert not (left | right)[[0, -1]].any() and not (left | right)[:, [0, -1]].any()
        shapes.add(image.shape)
    assert shapes == {(734, 603), (603, 734)}


def test_both_lungs_are_in_the_masks_of_shenzhen_and_of_the_test_images(folder):
    masks = {name.replace("_mask", ""): path for name, path in files(folder, "mask/mask/*").items()}
    shapes = set()
    for name, path in (masks | files(folder, "hidden/*")).items():
        lungs, (image_path,) = mask(path), folder.glob(f"*/*/CXR_png/{name}")
        assert lungs.shape == read(image_path).shape and 0.15 < lungs.mean() < 0.5
        _, _, stats, _ = cv2.connectedComponentsWithStats(np.uint8(lungs))
        assert (stats[1:, cv2.CC_STAT_AREA] > 0.04 * lungs.size).sum() == 2
        shapes |= {lungs.shape} if name.startswith("CHN") else set()
    assert len(shapes) > 5 and np.min(list(shapes)) >= 425 and np.max(list(shapes)) <= 450


def test_images_and_masks_are_windows_of_the_phantom(folder):
    for case in sample._chests("CHNCXR", 10, 4, SEED):
        film = phantom.draw(case.number, 450, case.findings)
        image = read(folder / sample.SHENZHEN / "CXR_png" / f"{case.image_id}.png")
        place = cv2.matchTemplate(film.image, image, cv2.TM_SQDIFF)
        _, _, (x, y), _ = cv2.minMaxLoc(place)
        window = slice(y, y + image.shape[0]), slice(x, x + image.shape[1])
        assert np.array_equal(film.image[window], image)
        path = folder / "mask" / "mask" / f"{case.image_id}_mask.png"
        truth = mask(path if case.labelled else folder / "hidden" / f"{case.image_id}.png")
        lungs = film.lungs.left | film.lungs.right
        assert np.array_equal(lungs[window], truth) and truth.sum() == lungs.sum()  # nothing is cut off
        assert bool(film.findings) == case.image_id.endswith("_1")
        for finding in film.findings:  # the mask holds what was found
            assert (finding.mask[window] & ~truth).sum() < 0.1 * finding.mask.sum()


def test_jsrt_is_read_by_inverting_big_endian_words(folder):
    for number, case in enumerate(sample._nodules(3, SEED)):
        path = folder / "JSRT" / "All247images" / f"{case.image_id}.IMG"
        assert path.stat().st_size == 2048 * 2048 * 2
        words = np.frombuffer(path.read_bytes(), ">u2").reshape(2048, 2048)
        assert words.max() <= 4095 and len(np.unique(words)) > 2000  # all 12 bits are used
        film = phantom.draw(3_400_000 + number, 1024, (nodule,) if "LN" in path.name else ())
        shown = cv2.resize((4095 - words).astype(np.float32), (1024, 1024), interpolation=cv2.INTER_AREA)
        assert np.abs(shown * 255 / 4095 - film.image).mean() < 2
        (masks,) = (outline.parents[1] for outline in folder.glob(f"JSRT/scratch/*/masks/heart/{path.stem}.gif"))
        left, right, heart = (mask(masks / part / f"{path.stem}.gif") for part in ("left lung", "right lung", "heart"))
        assert np.array_equal(left, film.lungs.left) and np.array_equal(right, film.lungs.right)
        assert np.array_equal(heart, film.heart) and not (heart & (left | right)).any()
        assert np.argwhere(right)[:, 1].mean() < np.argwhere(heart)[:, 1].mean() < np.argwhere(left)[:, 1].mean()


def test_bytes_depend_on_the_parameters_alone(tmp_path):
    one, same, other = (
        fingerprint(make_sample(tmp_path / name, **SMALL | {"n_jsrt": 1}, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == same
    assert not set(one.values()) & set(other.values())


@pytest.mark.parametrize("name, value", [("n_montgomery", 0), ("n_shenzhen", 1.0), ("n_jsrt", -1), ("n_test", 0)])
def test_bad_parameters_are_named(tmp_path, name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        make_sample(tmp_path / "sample", **SMALL | {name: value})
    assert not list(tmp_path.iterdir())
