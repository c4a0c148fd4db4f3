"""Augmentation: no warning, one channel, the mask on the image, independent draws, and the paper's enrichment count."""

import os
import random
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from common.data import augment
from common.errors import InputError

SIZE = 128
PIPELINES = {
    "none": lambda: augment.none(),
    "light": lambda: augment.light(p=1.0),
    "paper_siim": lambda: augment.paper_siim(p=1.0),
    "podium_siim": lambda: augment.podium_siim(SIZE, p=1.0, rare=1.0),
    **{f"type {i}": lambda i=i: augment.paper_siim_enrichment()[i] for i in range(4)},
}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the library only warns about an argument that it does not know
        yield


def run(pipeline, seed, **data):
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return pipeline(**data)


def blob():
    """A dark radiograph stand-in with one bright, off-centre, smooth-edged ellipse, and the ellipse as a mask."""
    y, x = np.mgrid[:SIZE, :SIZE]
    distance = ((x - 50) / 20) ** 2 + ((y - 70) / 28) ** 2
    image = np.where(distance <= 1, 220, 30).astype(np.uint8)
    return image, (distance <= 1).astype(np.uint8)


@pytest.mark.parametrize("name", PIPELINES)
def test_one_channel_stays_and_the_mask_follows(name):
    image, mask = blob()
    pipeline, moved, offsets = PIPELINES[name](), 0, []
    for seed in range(25):
        out = run(pipeline, seed, image=image, mask=mask)
        assert out["image"].dtype == out["mask"].dtype == np.uint8
        assert out["image"].shape == out["mask"].shape == image.shape
        assert set(np.unique(out["mask"])) == {0, 1}
        level = (out["image"][out["mask"] == 1].mean() + out["image"][out["mask"] == 0].mean()) / 2
        masked = out["mask"] == 1
        bright = out["image"] > level
        overlap = (bright & masked).sum() / (bright | masked).sum()
        assert overlap > 0.92, (seed, overlap)
        offsets.append(np.subtract(np.mean(np.nonzero(bright), axis=1), np.mean(np.nonzero(masked), axis=1)))
        moved += (out["mask"] != mask).any()
    assert moved >= (0 if name in ("none", "type 0") else 20)  # CLAHE moves nothing
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.35  # pixels; by nearest pixel the crop alone gives 0.47
    last = run(pipeline, 3, image=image[..., None], mask=mask)
    assert last["image"].shape == (SIZE, SIZE, 1)
    assert np.array_equal(last["image"][..., 0], run(pipeline, 3, image=image)["image"])


def test_none_changes_nothing():
    image, mask = blob()
    out = run(augment.none(), 0, image=image, mask=mask)
    assert np.array_equal(out["image"], image) and np.array_equal(out["mask"], mask)


@pytest.mark.parametrize(("kind", "low", "high"), [(2, 1.05, 1.10), (3, 0.90, 0.95)])
def test_zoom_scales_both_sides_alike_within_the_papers_range(kind, low, high):
    pipeline = augment.paper_siim_enrichment()[kind]
    square = np.zeros((200, 200), np.uint8)
    square[50:150, 50:150] = 1
    sides = []
    for seed in range(40):
        mask = run(pipeline, seed, image=square, mask=square)["mask"]
        height, width = mask.any(1).sum(), mask.any(0).sum()
        assert abs(int(height) - int(width)) <= 1
        sides.append(width / 100)
    assert low - 0.011 <= min(sides) < low + 0.02 and high - 0.02 < max(sides) <= high + 0.011


def test_the_papers_probabilities_are_independent():
    """All sixteen subsets of the four types occur, each type half of the time: the steps share no draw."""
    pipeline = augment.paper_siim()
    acted = []
    for seed in range(1600):
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        acted.append(tuple(step.should_apply() for step in pipeline.transforms))
    counts = np.unique(acted, axis=0, return_counts=True)[1]
    assert len(counts) == 16 and counts.min() > 60 and counts.max() < 140
    assert np.abs(np.mean(acted, axis=0) - 0.5).max() < 0.05


def test_bad_numbers():
    with pytest.raises(InputError, match="zoom"):
        augment.paper_siim(zoom=(0.1, 0.05))
    with pytest.raises(InputError, match="crop"):
        augment.podium_siim(64, crop=0.0)


def test_import_opens_no_socket():
    code = (
        "import socket, urllib.request\n"
        "def refuse(*a, **k): raise SystemExit('opened')\n"
        "socket.socket.connect = socket.create_connection = urllib.request.urlopen = refuse\n"
        "import common.data.augment, albumentations.check_version as c\n"
        "print('quiet')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "quiet", done.stderr


# ---- block masking and diffused noise ----------------------------------------------------------------------------


def test_block_mask_replaces_each_of_the_four_halves_and_leaves_the_mask():
    image, mask = np.full((9, 6), 50, np.uint8), np.eye(9, 6, dtype=np.uint8)
    pipeline = augment.compose([augment.BlockMask(gray=200, p=1.0)])
    halves = {}
    for seed in range(400):
        out = run(pipeline, seed, image=image, mask=mask)
        assert np.array_equal(out["mask"], mask) and set(np.unique(out["image"])) == {50, 200}
        gray = out["image"] == 200
        key = tuple(int(v) for i in np.nonzero(gray) for v in (i.min(), i.max() + 1))
        halves[key] = halves.get(key, 0) + 1
        assert gray.sum() == (key[1] - key[0]) * (key[3] - key[2])  # a full rectangle
    assert set(halves) == {(0, 4, 0, 6), (4, 9, 0, 6), (0, 9, 0, 3), (0, 9, 3, 6)} and min(halves.values()) > 70
    assert (image == 50).all()


@pytest.mark.parametrize("shape", [(200, 200), (200, 300), (640, 512), (200, 200, 1)])
def test_diffused_noise_brightens_its_disc_and_nothing_else(shape):
    noise, image = augment.DiffusedNoise(sigma=0.05), np.full(shape, 60, np.uint8)
    side = min(shape[:2])
    rise = noise.apply(image, circles=[(0.5, 0.5, 0.25)], level=0.4).astype(int) - image
    assert rise.shape == shape and rise.min() == 0
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    away = np.hypot(x - shape[1] / 2, y - shape[0] / 2) / side
    rise = rise.reshape(shape[:2])
    assert rise[away > 0.25 + 4 * 0.05].max() == 0
    assert rise[away < 0.05].min() >= 101 and rise.max() == 102  # 0.4 of 255
    assert abs(rise[np.abs(away - 0.25) < 0.01].mean() / 102 - 0.48) < 0.05  # about half at the edge
    centre = (rise * x).sum() / rise.sum(), (rise * y).sum() / rise.sum()
    assert np.allclose(centre, (shape[1] / 2, shape[0] / 2), atol=0.01 * side)


def test_diffused_noise_is_a_union_saturates_and_darkens():
    noise, image = augment.DiffusedNoise(), np.full((100, 100), 200, np.uint8)
    twice = noise.apply(image, circles=[(0.5, 0.5, 0.2)] * 2, level=0.1)
    assert np.array_equal(twice, noise.apply(image, circles=[(0.5, 0.5, 0.2)], level=0.1)) and twice.max() == 225
    assert noise.apply(image, circles=[(0.5, 0.5, 0.2)], level=0.6).max() == 255
    assert noise.apply(image, circles=[(0.5, 0.5, 0.2)], level=-0.9).min() == 0
    assert np.array_equal(noise.apply(image, circles=[(0.5, 0.5, 0.2)], level=0.0), image)


def test_diffused_noise_draws_within_its_numbers_and_leaves_the_mask():
    pipeline = augment.compose([augment.DiffusedNoise((2, 4), (0.05, 0.1), 0.02, (0.2, 0.6), p=1.0)])
    image, mask = blob()
    peaks, counts = [], set()
    for seed in range(100):
        out = run(pipeline, seed, image=np.zeros_like(image), mask=mask)
        assert np.array_equal(out["mask"], mask)
        peaks.append(out["image"].max() / 255)
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        drawn = pipeline.transforms[0].get_params()["circles"]
        counts.add(len(drawn))
        assert all(0 <= x <= 1 and 0 <= y <= 1 and 0.05 <= r <= 0.1 for x, y, r in drawn)
    assert counts == {2, 3, 4} and max(peaks) <= 0.6 and max(peaks) > 0.55 and 0.15 < min(peaks) < 0.25


def test_bad_numbers_of_the_noises():
    for numbers in ({"discs": (0, 2)}, {"discs": (3, 2)}, {"radius": (0.2, 0.1)}, {"sigma": 0}):
        with pytest.raises(InputError, match="need positive numbers"):
            augment.DiffusedNoise(**numbers)
    with pytest.raises(InputError, match="strength"):
        augment.DiffusedNoise(strength=(0.2, 60))
    with pytest.raises(InputError, match="gray 300"):
        augment.BlockMask(gray=300)


# ---- enrichment ----------------------------------------------------------------------------------------------------


def test_enrichment_count_of_the_whole_siim_set():
    labels = np.zeros(12047, int)
    labels[::4][:2669] = 1
    indices, kinds = augment.enrichment_plan(labels, 4, seed=0)
    assert np.array_equal(indices[:12047], np.arange(12047)) and (kinds[:12047] == -1).all()
    assert np.bincount(kinds[12047:]).tolist() == [1677] * 4  # (9,378 − 2,669) / 4 = 1,677.25
    assert (labels[indices] == 1).sum() == 9377 and (labels[indices] == 0).sum() == 9378
    copies = np.bincount(indices[12047:], minlength=12047)[labels == 1]
    assert set(copies) == {2, 3}  # 6,708 copies of 2,669 positives
    again, _ = augment.enrichment_plan(labels, 4, seed=0)
    other, _ = augment.enrichment_plan(labels, 4, seed=1)
    assert np.array_equal(indices, again) and not np.array_equal(indices, other)


def test_enrichment_with_nothing_to_add_and_with_bad_labels():
    indices, kinds = augment.enrichment_plan([0, 1, 0], 4, 0)
    assert indices.tolist() == [0, 1, 2] and kinds.tolist() == [-1, -1, -1]
    for labels, message in (([0, 0], "0 positives"), ([1, 1, 0], "2 positives and 1 neg"), ([0, 2], "0 and 1")):
        with pytest.raises(InputError, match=message):
            augment.enrichment_plan(labels, 4, 0)


def test_cost_per_image():
    """Prints (pytest -s) the milliseconds for an image and mask of 512 px; checks that seeding is cheap beside them."""
    image = np.kron(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8), np.ones((8, 8), np.uint8))
    mask = (image > 128).astype(np.uint8)
    pipelines = {"light": augment.light(), "paper_siim": augment.paper_siim(), "podium_siim": augment.podium_siim(512)}

    def cost(work, n):
        start = time.process_time()
        for seed in range(n):
            work(seed)
        return 1000 * (time.process_time() - start) / n

    for name, pipeline in pipelines.items():
        whole = cost(lambda seed, p=pipeline: run(p, seed, image=image, mask=mask), 40)
        shared = cost(lambda s, p=pipeline: p.set_random_state(np.random.default_rng(s), random.Random(s)), 200)
        single = cost(lambda s, p=pipeline: p.set_random_seed(s), 200)
        print(f"{name}: {whole:.2f} ms, of which seeding {shared:.3f} (set_random_seed {single:.3f})")
        assert shared < single and shared < whole
