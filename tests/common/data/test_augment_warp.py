"""One homography, lighting on the logit, and table 3 of the COVID-19 paper."""

import random

import numpy as np

from common.data import augment_warp
from common.data.augment import compose
from common.data.augment_warp import Lighting, Warp, either, moved, paper_covid

SIZE = 96


def run(pipeline, seed, **data):
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return pipeline(**data)


def warped(matrix, image, size=None):
    warp = Warp(size or len(image), lambda _: np.array(matrix, float))
    return run(compose([warp]), 0, image=image)["image"]


def test_warp_by_known_matrices():
    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    assert np.array_equal(warped(np.eye(3), image), image)
    clockwise = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # right goes down
    assert np.array_equal(warped(clockwise, image), np.rot90(image, -1))
    right = warped([[1, 0, 2 * 3 / 8], [0, 1, 0], [0, 0, 1]], image)  # by 3 of 8 pixels
    assert np.array_equal(right[:, 3:], image[:, :-3]) and (right[:, :3] == 0).all()
    narrow = warped([[0.5, 0, 0], [0, 1, 0], [0, 0, 1]], np.full((8, 8), 9, np.uint8))
    assert (narrow[:, 2:6] == 9).all() and (narrow[:, :2] == 0).all() and (narrow[:, 6:] == 0).all()
    assert warped(np.eye(3), image, size=4).shape == (4, 4)
    assert np.array_equal(warped(moved(turn=90), image), np.rot90(image, -1))


def test_moved_tilts_by_the_given_share_of_the_half_side():
    matrix = moved(keystone=(0.0, 0.2))
    corners = matrix @ np.array([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]], float).T
    assert np.allclose(corners[:2] / corners[2], [[-1.2, 1.2, -0.8, 0.8], [-1, -1, 1, 1]], atol=1e-6)


def test_paper_covid_geometry_of_the_table():
    scales, angles, shears = [], [], []
    for seed in range(600):
        matrix = augment_warp._paper_covid_matrix(random.Random(seed))
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
    pipeline = paper_covid(512)
    acted = []
    for seed in range(1000):
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        acted.append([step.should_apply() for step in pipeline.transforms])
    assert np.abs(np.mean(acted, axis=0) - [1, 1, 0.3, 0.5, 0.3]).max() < 0.05
    grey, levels = np.full((SIZE, SIZE), 128, np.uint8), []
    for seed in range(300):
        levels.append(np.median(run(compose([pipeline.transforms[1]]), seed, image=grey)["image"]))
    assert 31 <= min(levels) < 36 and 176 < max(levels) <= 181  # 255 · 0.502 ** 3 = 32.3 and ** 0.5 = 180.7
    salt, noise = (
        [run(compose([pipeline.transforms[i]]), seed, image=grey)["image"] for seed in range(12)] for i in (2, 4)
    )
    assert abs(max((image != 128).mean() for image in salt) - 0.01) < 0.002
    assert abs(max(image.std() for image in noise) / 255 - 0.125) < 0.005


def test_lighting_works_on_the_logit():
    image = np.array([[85, 128, 0, 255]], np.uint8)
    lighting = Lighting()
    brighter = lighting.apply(image, shift=np.log(0.6 / 0.4), factor=1.0)
    assert brighter[0, :2].tolist() == [109, 153]  # odds 0.5 · 1.5 = 0.75 → 3/7; odds 1.0079 · 1.5 → 0.6019
    assert lighting.apply(image, shift=0.0, factor=1.0)[0, :2].tolist() == [85, 128]
    harder = lighting.apply(image, shift=0.0, factor=2.0)
    assert harder[0, 0] == 51  # odds 0.25 → 1/5
    levels = [run(compose([Lighting(0.2, 0.0)]), seed, image=image)["image"][0, 1] for seed in range(300)]
    assert 102 <= min(levels) <= 104 and 151 <= max(levels) <= 154 and abs(np.mean(np.equal(levels, 128)) - 0.25) < 0.08


def test_either_draws_up_to_the_limit_or_nothing():
    draws = np.array([either(random.Random(seed), 0.7, 3.0) for seed in range(600)])
    assert -3 <= draws.min() < -2.9 and 2.9 < draws.max() <= 3 and abs(np.mean(draws == 0) - 0.3) < 0.06


def test_a_mask_goes_where_its_image_goes():
    y, x = np.mgrid[:SIZE, :SIZE]
    mask = (((x - 30) / 13) ** 2 + ((y - 46) / 30) ** 2 <= 1).astype(np.uint8)
    moving, areas = compose(paper_covid(SIZE).transforms[:1]), set()
    for seed in range(20):
        out = run(moving, seed, image=mask * np.uint8(255), mask=mask)
        assert ((out["image"] >= 128) != (out["mask"] == 1)).mean() < 1e-3
        areas.add(int(out["mask"].sum()))
    assert len(areas) > 10
