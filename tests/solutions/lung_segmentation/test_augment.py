"""The recipes' pipelines: sizes, types, masks on their images, several channels, seeds, and the papers' ranges."""

import pickle
import random
import warnings

import numpy as np
import pytest

from common.data.augment import compose
from solutions.lung_segmentation import augment

SIZE = 96
RECIPES = {
    "simple": augment.simple,
    "complex": augment.complex_,
    "unet": augment.unet,
    "affine": augment.affine,
    "strong": augment.strong,
}
FLIPPING = [name for name in RECIPES if name not in ("unet", "affine")]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the library only warns about an argument that it does not know
        yield


def run(pipeline, seed, **data):
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return pipeline(**data)


def lungs():
    """Two ellipses of unlike size as masks (H, W, 2), the first at the left, and a radiograph stand-in."""
    y, x = np.mgrid[:SIZE, :SIZE]
    masks = [((x - cx) / 13) ** 2 + ((y - 46) / height) ** 2 <= 1 for cx, height in ((28, 30), (68, 24))]
    image = 170 + 20 * np.sin(y / 5) - 110 * (masks[0] | masks[1])
    return image.astype(np.uint8), np.stack(masks, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("name", RECIPES)
def test_size_type_channels_and_seed(name):
    image, masks = lungs()
    pipeline = RECIPES[name](SIZE)
    copy = pickle.loads(pickle.dumps(pipeline))  # as a spawned worker has it
    state, seen = random.getstate(), set()
    before = image.copy(), masks.copy()
    for seed in range(40):
        out = run(pipeline, seed, image=image, mask=masks)
        assert out["image"].shape == image.shape and out["mask"].shape == masks.shape
        assert out["image"].dtype == out["mask"].dtype == np.uint8 and out["mask"].max() <= 1
        np.random.seed(seed)  # noqa: NPY002 - the process's own generator must decide nothing
        again = run(copy, seed, image=image, mask=masks)
        assert np.array_equal(out["image"], again["image"]) and np.array_equal(out["mask"], again["mask"])
        for channel in range(2):  # a mask alone goes where it goes among others
            alone = run(pipeline, seed, image=image, mask=np.ascontiguousarray(masks[..., channel]))["mask"]
            # OpenCV rounds two channels otherwise than one; a mirrored left lung is the right lung
            assert min((alone != out["mask"][..., k]).sum() for k in (channel, 1 - channel)) <= 8
        seen.add(out["image"].tobytes())
    assert len(seen) >= 38 and random.getstate() == state
    assert np.array_equal(image, before[0]) and np.array_equal(masks, before[1])


@pytest.mark.parametrize("name", RECIPES)
def test_masks_stay_on_their_image(name):
    """The steps that move anything, given the mask itself as the image, give the same from both."""
    _, masks = lungs()
    pipeline, together = RECIPES[name](SIZE), np.maximum(masks[..., 0], masks[..., 1])
    moving = compose(
        [
            step
            for step in pipeline.transforms
            if not isinstance(step, augment.A.ImageOnlyTransform) and not isinstance(step, augment.A.OneOf)
        ]
    )
    assert len(moving.transforms) >= 1
    moved = 0
    for seed in range(60):
        out = run(moving, seed, image=together * np.uint8(255), mask=together)
        assert ((out["image"] >= 128) != (out["mask"] == 1)).mean() < 1e-3
        moved += not np.array_equal(out["mask"], together)
    assert moved > 40


def test_a_mirrored_left_lung_is_a_right_lung():
    image, masks = lungs()
    masks = np.dstack([masks, masks[..., 0]])
    out = run(compose([augment.Mirror(p=1.0)]), 0, image=image, mask=masks)
    assert (out["mask"] == masks[:, ::-1][..., [1, 0, 2]]).all() and (out["image"] == image[:, ::-1]).all()
    one = run(compose([augment.Mirror(p=1.0)]), 0, image=image, mask=masks[..., 0])["mask"]
    assert (one == masks[:, ::-1, 0]).all()


def test_consolidations_brighten_lungs_and_leave_masks():
    image, masks = lungs()
    image = np.where(masks.max(-1) > 0, 60, 180).astype(np.uint8)
    changes = []
    for seed in range(20):
        out = run(compose([augment.Consolidation(p=1.0)]), seed, image=image, mask=masks)
        change = out["image"].astype(int) - image
        assert (out["mask"] == masks).all() and change[masks.max(-1) > 0].mean() > 0.5
        assert abs(change[:4]).max() < 30  # far above the lungs
        changes.append(change[masks.max(-1) > 0].max())
    assert np.mean(changes) > 60
    empty = np.zeros_like(masks)
    assert (run(compose([augment.Consolidation(p=1.0)]), 0, image=image, mask=empty)["image"] == image).all()


@pytest.mark.parametrize("name", RECIPES)
def test_only_asked_for_flips_exchange_the_sides(name):
    image, masks = lungs()
    if name == "strong":  # without its rare quarter turns
        pipeline = compose([augment.Warp(SIZE, lambda r: matrix_without_quarters(r))])
    else:
        pipeline = RECIPES[name](SIZE) if name not in FLIPPING else RECIPES[name](SIZE, flip=False)
    for seed in range(40):
        out = run(pipeline, seed, image=image, mask=masks)["mask"]
        first, second = (np.nonzero(out[..., c])[1].mean() for c in range(2))
        assert first < second
    if name in FLIPPING:
        flips = RECIPES[name](SIZE, flip=True)
        acted = 0
        for seed in range(400):
            flips.set_random_state(np.random.default_rng(seed), random.Random(seed))
            acted += flips.transforms[0].should_apply()
        assert isinstance(flips.transforms[0], augment.A.HorizontalFlip) and 160 < acted < 240


def matrix_without_quarters(random_state):
    while True:
        matrix = augment._strong_matrix(random_state)
        if matrix[0, 0] > 0.3:
            return matrix


# ---- the papers' numbers -------------------------------------------------------------------------------------------


def test_simple_draws_fastais_ranges():
    tilts = [augment._simple_matrix(random.Random(seed), 0.75, 0.0, 1.0, 0.2) for seed in range(400)]
    corner = np.array([m @ [-1, -1, 1] for m in tilts])
    reach = -corner[:, :2] / corner[:, 2:]
    assert 0.8 <= reach.min() < 0.81 and 1.19 < reach.max() <= 1.2 + 1e-6
    assert abs(np.mean(np.abs(reach - 1).max(axis=1) > 1e-6) - 0.75) < 0.06
    zooms = [augment._simple_matrix(random.Random(seed), 0.75, 0.0, 1.1, 0.0) for seed in range(400)]
    assert max(m[0, 0] for m in zooms) > 1.09
    for m in zooms:  # the target lies within the source: a crop, without border
        assert 1 <= m[0, 0] == m[1, 1] <= 1.1 and (np.abs(m[:2, 2]) <= m[0, 0] - 1 + 1e-9).all()


def test_simple_mirrors_at_the_border():
    image = np.full((SIZE, SIZE), 90, np.uint8)
    pipeline = augment.simple(SIZE, lighting=0.0)
    assert all((run(pipeline, seed, image=image)["image"] == 90).all() for seed in range(20))


def test_simple_pads_before_it_crops():
    shifts = [augment._simple_matrix(random.Random(seed), 0.75, 0.0, 1.0, 0.0, 0.05)[:2, 2] for seed in range(400)]
    assert 0.095 < np.abs(shifts).max() <= 0.1  # in half sides
    assert abs(np.mean(np.array(shifts) != 0) - 0.75) < 0.05


def test_affine_draws_the_ranges_of_imlab():
    matrices = np.array([augment._affine_matrix(random.Random(seed), 10.0, 0.1, 0.2) for seed in range(400)])
    turns = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    zooms = 1 / np.linalg.norm(matrices[:, :2, :2], axis=1)
    assert 9.8 < turns.max() <= 10 and -10 <= turns.min() < -9.8 and np.abs(matrices[:, :2, 2]).max() <= 0.2
    assert 0.8 <= zooms.min() < 0.805 and 1.195 < zooms.max() <= 1.2 and (zooms[:, 0] != zooms[:, 1]).all()
    image = np.full((SIZE, SIZE), 90, np.uint8)
    assert all((run(augment.affine(SIZE), seed, image=image)["image"] == 90).all() for seed in range(20))


def test_complex_is_simple_with_both_noises():
    image, masks = lungs()
    plain, noisy = augment.simple(SIZE), augment.complex_(SIZE, diffused=1.0, block=1.0)
    for seed in range(10):
        a, b = run(plain, seed, image=image, mask=masks), run(noisy, seed, image=image, mask=masks)
        assert np.array_equal(a["mask"], b["mask"])
        assert (b["image"] == 217).mean() >= 0.5
        rest = b["image"] != 217
        assert (b["image"][rest] >= a["image"][rest]).all()


# ---- strong --------------------------------------------------------------------------------------------------------


def test_strong_turns_rarely_far_and_keeps_the_lungs():
    matrices = [augment._strong_matrix(random.Random(seed)) for seed in range(2000)]
    angles = np.abs(np.degrees([np.arctan2(m[1, 0], m[0, 0]) for m in matrices]))
    assert 0.02 < np.mean(angles > 50) < 0.06 and 0.05 < np.mean((angles > 12) & (angles < 50)) < 0.25
    assert all(np.linalg.det(m) > 0 for m in matrices)  # mirrored by the flip alone
    image, masks = lungs()
    pipeline = augment.strong(SIZE)
    areas = [run(pipeline, seed, image=image, mask=masks)["mask"].sum() / masks.sum() for seed in range(200)]
    assert min(areas) > 0.1 and 0.75 < np.median(areas) < 1.15


def test_objects_change_a_part_of_the_image_alone():
    grey = np.full((SIZE, SIZE), 100, np.uint8)
    pipeline = compose([augment.Objects(count=(2, 4), p=1.0)])
    shares, brighter, darker = [], 0, 0
    for seed in range(200):
        out = run(pipeline, seed, image=grey, mask=grey // 100)
        assert (out["mask"] == 1).all()
        shares.append((out["image"] != 100).mean())
        brighter, darker = brighter + (out["image"] > 100).any(), darker + (out["image"] == 0).any()
    assert max(shares) < 0.35 and np.median(shares) > 0.005 and brighter > 180 and 10 < darker < 100
