import random

import numpy as np
import pytest

from common.data import box_augment as augment
from common.data.box_augment import A, ShortSide, brightness, compose, contrast, crop
from solutions.vinbigdata.config import AUGMENTATIONS

SIDE = 200


def drawn(boxes, side=SIDE):
    """Black, with a white rectangle for each box."""
    image = np.zeros((side, side), np.uint8)
    for x_min, y_min, x_max, y_max in boxes:
        image[y_min:y_max, x_min:x_max] = 255
    return image


def run(pipeline, image, boxes, labels, seed=0):
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    out = pipeline(image=image, bboxes=boxes, labels=np.array(labels, np.int64))
    return out["image"], np.asarray(out["bboxes"], float).reshape(-1, 4), np.asarray(out["labels"], int).tolist()


def around(image):
    ys, xs = np.nonzero(image > 127)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


GEOMETRY = {
    "flip": [A.HorizontalFlip(p=1.0)],
    "crop": [crop(0.2, 1.0)],
    "rotation": [A.Affine(rotate=(-10.0, 10.0), p=1.0)],
    "rotation on a larger canvas": [A.SafeRotate((-10, 10), p=1.0)],
    "shorter side": [A.HorizontalFlip(p=1.0), ShortSide(p=1.0)],
    "affine": [A.Affine(scale=(0.9, 1.1), translate_percent=(-0.06, 0.06), rotate=(-10, 10), keep_ratio=True, p=1.0)],
    "crop of rotated": [A.Affine(rotate=(-10.0, 10.0), p=1.0), crop(0.2, 1.0), A.HorizontalFlip(p=1.0)],
}


@pytest.mark.parametrize("steps", GEOMETRY.values(), ids=GEOMETRY)
def test_the_box_goes_where_the_finding_goes(steps):
    box, moved = [60, 70, 130, 110], 0
    for seed in range(8):
        image, boxes, labels = run(compose(steps), drawn([box]), [box], [3], seed)
        assert image.shape == (SIDE, SIDE) and image.dtype == np.uint8 and labels == [3]
        loose = 2.0 if len(steps) == 1 else 6.0  # the box around a turned box is larger than what was turned
        np.testing.assert_allclose(boxes[0], around(image), atol=loose)
        moved += not np.allclose(boxes[0], box)
    assert moved == 8


def test_crop_keeps_at_least_its_share_of_each_side():
    ramp, spans = np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1)), []
    for seed in range(60):
        row = run(compose([crop(0.2, 1.0)]), ramp, [], [], seed)[0][SIDE // 2].astype(int)
        spans.append(row[-1] - row[0] + 1)
    assert 158 <= min(spans) < 170 and 190 < max(spans) <= 200


def test_brightness_and_contrast_by_hand():
    image = np.array([[0, 100, 200, 100]], np.uint8)  # mean 100
    black, mean = (
        [run(compose([step(1.0), A.NoOp()]), image, [], [], k)[0][0].tolist() for k in range(99)]
        for step in (brightness, contrast)
    )
    assert {row[0] for row in black} == {0} and {row[1] for row in mean} <= {99, 100}
    assert 70 <= min(row[1] for row in black) < 75 and 125 < max(row[1] for row in black) <= 130
    assert min(row[0] for row in mean) == 0 and 25 < max(row[0] for row in mean) <= 30
    assert all(abs(row[2] - min(2 * row[1], 255)) <= 2 for row in black)


def test_a_box_of_which_little_is_left_goes_and_the_rest_is_cut():
    half = A.Crop(100, 0, 200, 200, p=1.0)
    boxes = [[80, 20, 130, 60], [20, 20, 115, 60], [10, 10, 50, 50], [120, 100, 150, 140]]  # 60 %, 16 %, 0, all of it
    _, left, labels = run(compose([half]), drawn(boxes), boxes, [1, 2, 3, 4])
    assert labels == [1, 4]
    np.testing.assert_allclose(left, [[0, 20, 30, 60], [20, 100, 50, 140]], atol=1e-4)


@pytest.mark.parametrize("mapper", [False, True])
@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_recipes_repeat_by_seed_keep_sizes_and_take_no_boxes(name, mapper):
    pipeline, results = augment.pipeline(name, SIDE, mapper), []
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE), dtype=np.uint8)
    boxes, labels = [[20, 30, 90, 120], [100, 40, 199, 180]], [0, 13]
    for seed in (*range(20), *range(20)):
        out = run(pipeline, image, boxes, labels, seed)
        assert out[0].shape == image.shape and out[0].dtype == np.uint8 and set(out[2]) <= {0, 13}
        assert (out[1][:, 2:] - out[1][:, :2] >= 1).all() and out[1].min() >= 0 and out[1].max() <= SIDE
        results.append((out[0].tobytes(), out[1].tobytes()))
    assert results[:20] == results[20:] and len(set(results)) >= 2
    empty, none, no_labels = run(pipeline, image, [], [])
    assert empty.shape == image.shape and none.shape == (0, 4) and no_labels == []


def kinds(*args):
    return [type(step).__name__ for step in augment.pipeline(*args).transforms[:-1]]


def test_what_the_papers_variants_contain():
    built_in = ["ColorJitter", "ColorJitter", "SafeRotate", "CropAndPad", "HorizontalFlip", "GaussianBlur"]
    unturned = [name for name in built_in if name != "SafeRotate"]
    assert kinds("built_in", 1024) == built_in and kinds("built_in_no_rotation", 1024) == unturned
    assert kinds("both", 1024) == [*built_in, "DiffusedNoise"]
    assert kinds("both_no_rotation", 1024) == [*unturned, "DiffusedNoise"]
    assert kinds("noise", 1024) == ["DiffusedNoise"] and augment.pipeline("none", 1024) is None
    toned, lit, turned, cropped, _, blurred, _ = augment.pipeline("built_in", 1024).transforms
    assert [step.p for step in augment.pipeline("built_in", 1024).transforms[:-1]] == [0.2, 0.2, 0.2, 0.2, 0.5, 0.2]
    assert toned.contrast == lit.brightness == (0.7, 1.3) and cropped.percent == (-0.1, 0.0)
    assert turned.limit == (-10, 10)
    assert blurred.blur_limit == (5, 5) and blurred.sigma_limit == pytest.approx((1.1, 1.1))
    assert augment.pipeline("built_in", 512).transforms[5].sigma_limit == pytest.approx((0.55, 0.55))


def test_the_default_mapper_is_the_baseline():
    assert kinds("none", 1024, True) == ["HorizontalFlip", "ShortSide"]
    assert kinds("noise", 1024, True) == ["DiffusedNoise", "HorizontalFlip", "ShortSide"]
    step = ShortSide()
    step.set_random_state(np.random.default_rng(0), random.Random(0))
    drawn_factors = {step.get_params()["factor"] for _ in range(200)}
    assert sorted(drawn_factors) == [side / 800 for side in (640, 672, 704, 736, 768, 800)]


def test_a_shorter_side_of_640_by_hand():
    image, boxes = drawn([[100, 50, 200, 150]]), np.array([[0.5, 0.25, 1.0, 0.75, 7.0]])
    out = ShortSide().apply(image, 0.8)
    assert (out[160:] == 114).all() and (out[:, 160:] == 114).all()  # the mean, right and below
    assert around(out[:160, :160]) == [80, 40, 160, 120]
    np.testing.assert_allclose(ShortSide().apply_to_bboxes(boxes, 0.8, shape=image.shape), [[0.4, 0.2, 0.8, 0.6, 7.0]])
    assert ShortSide().apply_to_mask(image, factor=0.8)[180].max() == 0
    assert np.array_equal(ShortSide().apply(image, 1.0), image)


def test_rotation_loses_no_corner():
    image = drawn([[0, 0, 8, 8], [192, 192, 200, 200], [0, 192, 8, 200], [192, 0, 200, 8]])
    for seed in range(5):
        out, boxes, _ = run(compose([A.SafeRotate((-10, 10), p=1.0)]), image, [[0, 0, 200, 200]], [1], seed)
        corners = [out[:100, :100], out[:100, 100:], out[100:, :100], out[100:, 100:]]
        assert all((corner > 127).sum() > 20 for corner in corners)
        np.testing.assert_allclose(boxes[0], around(out), atol=3)
