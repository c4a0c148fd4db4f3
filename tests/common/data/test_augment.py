"""Augmentation: masks follow images, draws are independent and within the stated ranges, the papers' numbers hold."""

import os
import random
import runpy
import socket
import sys
import time
import warnings

import numpy as np
import pytest

from common.data import augment
from common.data.augment import Lighting, Warp, compose, homography, jitter, paper_covid
from common.errors import InputError

SIZE = 128
PIPELINES = {
    "light": lambda: augment.light(p=1.0),
    "paper_siim": lambda: augment.paper_siim(p=1.0),
    "podium_siim": lambda: augment.podium_siim(SIZE, p=1.0, rare=1.0),
    **{f"type {i}": lambda i=i: augment.paper_siim_enrichment()[i] for i in range(4)},
}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the library only warns about an unknown argument
        yield


def reseed(pipeline, seed):
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))


def run(pipeline, seed, **data):
    reseed(pipeline, seed)
    return pipeline(**data)


def acted(pipeline, n):
    """Return bool (n, steps): which steps act for each of n seeds."""
    rows = []
    for seed in range(n):
        reseed(pipeline, seed)
        rows.append([step.should_apply() for step in pipeline.transforms])
    return np.array(rows)


def blob():
    """Return a dark image with one bright, off-centre ellipse, and the ellipse as a mask."""
    y, x = np.mgrid[:SIZE, :SIZE]
    inside = ((x - 50) / 20) ** 2 + ((y - 70) / 28) ** 2 <= 1
    return np.where(inside, 220, 30).astype(np.uint8), inside.astype(np.uint8)


@pytest.mark.parametrize("name", PIPELINES)
def test_one_channel_stays_and_the_mask_follows(name):
    image, mask = blob()
    pipeline, moved, offsets = PIPELINES[name](), 0, []
    for seed in range(25):
        out = run(pipeline, seed, image=image, mask=mask)
        assert out["image"].dtype == out["mask"].dtype == np.uint8
        assert out["image"].shape == out["mask"].shape == image.shape
        assert set(np.unique(out["mask"])) == {0, 1}
        masked = out["mask"] == 1
        bright = out["image"] > (out["image"][masked].mean() + out["image"][~masked].mean()) / 2
        assert (bright & masked).sum() / (bright | masked).sum() > 0.92, seed
        offsets.append(np.subtract(np.mean(np.nonzero(bright), axis=1), np.mean(np.nonzero(masked), axis=1)))
        moved += (out["mask"] != mask).any()
    assert moved >= (0 if name == "type 0" else 20)  # CLAHE moves nothing
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.35  # pixels; by nearest pixel the crop alone gives 0.47
    last = run(pipeline, 3, image=image[..., None], mask=mask)
    assert last["image"].shape == (SIZE, SIZE, 1)
    assert np.array_equal(last["image"][..., 0], run(pipeline, 3, image=image)["image"])


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
    steps = acted(augment.paper_siim(), 1600)
    counts = np.unique(steps, axis=0, return_counts=True)[1]
    assert len(counts) == 16 and counts.min() > 60 and counts.max() < 140
    assert np.abs(steps.mean(axis=0) - 0.5).max() < 0.05


@pytest.mark.parametrize(("labels", "message"), [([0, 0], "0 positives"), ([1, 1, 0], "2 positives and 1 neg")])
def test_enrichment_without_anything_to_balance_is_refused(labels, message):
    with pytest.raises(InputError, match=message):
        augment.enrichment_plan(labels, 4, 0)


def test_import_opens_no_socket(monkeypatch):
    opened = []
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: opened.append(arguments))
    monkeypatch.setattr(socket, "create_connection", lambda *arguments, **options: opened.append(arguments))
    monkeypatch.delenv("NO_ALBUMENTATIONS_UPDATE")
    for name in ("albumentations", "albumentations.check_version"):  # executed again by the next import
        monkeypatch.delitem(sys.modules, name)
    runpy.run_path(augment.__file__)
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1" and "albumentations" in sys.modules and not opened


# ---- block masking and diffused noise ----------------------------------------------------------------------------


def test_block_mask_replaces_each_of_the_four_halves_and_leaves_the_mask():
    image, mask = np.full((9, 6), 50, np.uint8), np.eye(9, 6, dtype=np.uint8)
    pipeline = compose([augment.BlockMask(gray=200, p=1.0)])
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
    noise, image = augment.DiffusedNoise(), np.full(shape, 60, np.uint8)
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
    def apply(level, discs=1):
        return augment.DiffusedNoise().apply(image, circles=[(0.5, 0.5, 0.2)] * discs, level=level)

    image = np.full((100, 100), 200, np.uint8)
    assert np.array_equal(apply(0.1, discs=2), apply(0.1)) and apply(0.1).max() == 225
    assert apply(0.6).max() == 255 and apply(-0.9).min() == 0 and np.array_equal(apply(0.0), image)


def test_diffused_noise_draws_within_its_numbers_and_leaves_the_mask():
    pipeline = compose([augment.DiffusedNoise((2, 4), (0.05, 0.1), (0.2, 0.6), p=1.0)])
    image, mask = blob()
    peaks, counts = [], set()
    for seed in range(100):
        out = run(pipeline, seed, image=np.zeros_like(image), mask=mask)
        assert np.array_equal(out["mask"], mask)
        peaks.append(out["image"].max() / 255)
        reseed(pipeline, seed)
        drawn = pipeline.transforms[0].get_params()["circles"]
        counts.add(len(drawn))
        assert all(0 <= x <= 1 and 0 <= y <= 1 and 0.05 <= r <= 0.1 for x, y, r in drawn)
    assert counts == {2, 3, 4} and 0.55 < max(peaks) <= 0.6 and 0.1 < min(peaks) < 0.25


# ---- homographies, lighting, table 3 of the COVID-19 paper -------------------------------------------------------


def warped(matrix, image, size=None):
    warp = Warp(size or len(image), lambda _: np.array(matrix, float))
    return run(compose([warp]), 0, image=image)["image"]


def test_warp_by_known_matrices():
    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    assert np.array_equal(warped(np.eye(3), image), image) and warped(np.eye(3), image, size=4).shape == (4, 4)
    for clockwise in ([[0, -1, 0], [1, 0, 0], [0, 0, 1]], homography(turn=90)):  # right goes down
        assert np.array_equal(warped(clockwise, image), np.rot90(image, -1))
    right = warped([[1, 0, 2 * 3 / 8], [0, 1, 0], [0, 0, 1]], image)  # by 3 of 8 pixels
    assert np.array_equal(right[:, 3:], image[:, :-3]) and (right[:, :3] == 0).all()
    narrow = warped([[0.5, 0, 0], [0, 1, 0], [0, 0, 1]], np.full((8, 8), 9, np.uint8))
    assert (narrow[:, 2:6] == 9).all() and (narrow[:, [0, 1, 6, 7]] == 0).all()
    corners = homography(keystone=(0.0, 0.2)) @ np.array([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]], float).T
    assert np.allclose(corners[:2] / corners[2], [[-1.2, 1.2, -0.8, 0.8], [-1, -1, 1, 1]], atol=1e-6)


def test_paper_covid_geometry_of_the_table():
    scales, angles, shears = [], [], []
    for seed in range(600):
        matrix = augment._draw_covid_matrix(random.Random(seed))
        angle = np.arctan2(matrix[1, 0], matrix[0, 0])
        back = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]] @ matrix[:2, :2]
        assert np.allclose(back[1], [0, 1]) and np.allclose(matrix[:2, 2], 0)  # y keeps its scale, the centre its place
        scales.append(back[0, 0])
        angles.append(np.degrees(angle))
        shears.append(back[0, 1])
    assert 0.8 <= min(scales) < 0.805 and 1.095 < max(scales) <= 1.1
    assert -45 <= min(angles) < -44 and 44 < max(angles) <= 45
    assert -0.2 <= min(shears) < -0.19 and 0.19 < max(shears) <= 0.2
    assert abs(np.mean(np.abs(shears) > 1e-9) - 0.7) < 0.06


def test_paper_covid_tones_of_the_table():
    pipeline, grey = paper_covid(512), np.full((SIZE, SIZE), 128, np.uint8)
    assert np.abs(acted(pipeline, 1000).mean(axis=0) - [1, 1, 0.3, 0.5, 0.3]).max() < 0.05

    def images(step, n):
        alone = compose([pipeline.transforms[step]])
        return [run(alone, seed, image=grey)["image"] for seed in range(n)]

    levels = [np.median(image) for image in images(1, 300)]
    assert 31 <= min(levels) < 36 and 176 < max(levels) <= 181  # 255 · 0.502 ** 3 = 32.3 and ** 0.5 = 180.7
    assert abs(max((image != 128).mean() for image in images(2, 12)) - 0.01) < 0.002
    assert abs(max(image.std() for image in images(4, 12)) / 255 - 0.125) < 0.005


def test_lighting_works_on_the_logit():
    image = np.array([[85, 128, 0, 255]], np.uint8)
    lighting = Lighting()
    brighter = lighting.apply(image, shift=np.log(0.6 / 0.4), factor=1.0)
    assert brighter[0, :2].tolist() == [109, 153]  # odds 0.5 · 1.5 = 0.75 → 3/7; odds 1.0079 · 1.5 → 0.6019
    assert lighting.apply(image, shift=0.0, factor=1.0)[0, :2].tolist() == [85, 128]
    assert lighting.apply(image, shift=0.0, factor=2.0)[0, 0] == 51  # odds 0.25 → 1/5
    levels = [run(compose([Lighting(0.2, 0.0)]), seed, image=image)["image"][0, 1] for seed in range(300)]
    assert 102 <= min(levels) <= 104 and 151 <= max(levels) <= 154 and abs(np.mean(np.equal(levels, 128)) - 0.25) < 0.08
    draws = np.array([jitter(random.Random(seed), 0.7, 3.0) for seed in range(600)])
    assert -3 <= draws.min() < -2.9 and 2.9 < draws.max() <= 3 and abs(np.mean(draws == 0) - 0.3) < 0.06


def test_a_warped_mask_goes_where_its_image_goes():
    mask, areas = blob()[1], set()
    moving = compose(paper_covid(SIZE).transforms[:1])
    for seed in range(20):
        out = run(moving, seed, image=mask * np.uint8(255), mask=mask)
        assert ((out["image"] >= 128) != (out["mask"] == 1)).mean() < 1e-3
        areas.add(int(out["mask"].sum()))
    assert len(areas) > 10


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
    assert np.array_equal(indices, augment.enrichment_plan(labels, 4, seed=0)[0])
    assert not np.array_equal(indices, augment.enrichment_plan(labels, 4, seed=1)[0])
    indices, kinds = augment.enrichment_plan([0, 1, 0], 4, 0)  # nothing to add
    assert indices.tolist() == [0, 1, 2] and kinds.tolist() == [-1, -1, -1]


def test_seeding_is_cheap_beside_the_pipeline():
    image = np.kron(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8), np.ones((8, 8), np.uint8))
    data = {"image": image, "mask": (image > 128).astype(np.uint8)}

    def cost(work, n):
        start = time.process_time()
        for seed in range(n):
            work(seed)
        return (time.process_time() - start) / n

    for pipeline in (augment.light(), augment.paper_siim(), augment.podium_siim(512)):
        seeding = cost(lambda seed, p=pipeline: reseed(p, seed), 200)
        assert seeding < cost(lambda seed, p=pipeline: p.set_random_seed(seed), 200)
        assert seeding < cost(lambda seed, p=pipeline: run(p, seed, **data), 40)


def test_elastic_has_the_statistics_of_albumentations():
    """Displacements along both axes: standard deviation, and correlation at distances of up to three sigmas."""

    def statistics(kind):
        transform, found = kind(alpha=120.0, sigma=6.0, noise_distribution="uniform"), []
        transform.set_random_seed(0)
        for _ in range(12):
            maps = transform.get_params_dependent_on_data({"shape": (400, 448)}, {})
            x, y = maps["map_x"] - np.arange(448), maps["map_y"] - np.arange(400)[:, None]
            for lines in (x[24:-24, 24:-24], y.T[24:-24, 24:-24]):
                alike = ((lines[:, lag:] * lines[:, :-lag]).mean() / lines.var() for lag in (3, 6, 9, 18))
                found.append([lines.std(), *alike, np.corrcoef(x.ravel(), y.ravel())[0, 1]])
        return np.mean(found, axis=0)

    theirs, ours = statistics(augment.A.ElasticTransform), statistics(augment.Elastic)
    assert ours[0] == pytest.approx(theirs[0], rel=0.03)
    np.testing.assert_allclose(ours[1:], theirs[1:], atol=0.03)
