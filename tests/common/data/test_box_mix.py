"""Mosaic and mixup: boxes stay on what they mark, by drawn rectangles."""

import numpy as np
import pytest

from common.data.box_mix import mix, mixup, mosaic

SIDE = 96


def part(number, box, channels=1):
    """A dark image with a bright rectangle of its own grey level."""
    image = np.full((channels, SIDE, SIDE), 10, np.uint8)
    if box:
        image[:, box[1] : box[3], box[0] : box[2]] = 100 + 30 * number
    return image, np.array([box] if box else [], np.float32).reshape(-1, 4), np.full(int(bool(box)), number)


PARTS = [part(0, (12, 24, 48, 60)), part(1, (0, 0, 24, 96)), part(2, None), part(3, (48, 48, 96, 84))]


def test_a_mosaic_shrinks_each_part_into_its_quarter():
    image, boxes, labels = mosaic(PARTS, 48, 32)
    # left half of the width, upper third of the height; then right; then the two lower thirds
    assert boxes.tolist() == [[6, 8, 24, 20], [48, 0, 60, 32], [72, 64, 96, 88]]
    assert labels.tolist() == [0, 1, 3] and image.shape == (1, SIDE, SIDE) and boxes.dtype == np.float32
    for box, level in zip(boxes.astype(int), (100, 130, 190), strict=True):
        ys, xs = np.nonzero(abs(image[0].astype(int) - level) < 15)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box.tolist()


def test_a_mosaic_of_one_image_four_times_and_of_two_channels():
    both = [part(0, (0, 0, SIDE, SIDE), 2)] * 4
    image, boxes, _ = mosaic(both, 40, 70)
    assert image.shape == (2, SIDE, SIDE) and (image == 100).all()
    assert boxes.tolist() == [[0, 0, 40, 70], [40, 0, SIDE, 70], [0, 70, 40, SIDE], [40, 70, SIDE, SIDE]]


def test_mixup_has_the_boxes_of_both():
    image, boxes, labels = mixup(PARTS[0], PARTS[3], 0.25)
    assert boxes.tolist() == [[12, 24, 48, 60], [48, 48, 96, 84]] and labels.tolist() == [0, 3]
    assert image[0, 30, 20] == round(0.25 * 100 + 0.75 * 10) and image[0, 60, 90] == round(0.25 * 10 + 0.75 * 190)
    assert mixup(PARTS[2], PARTS[0], 1.0)[0].tolist() == PARTS[2][0].tolist()


@pytest.mark.parametrize(("chances", "counts"), [((0, 0), {1}), ((1, 0), {4}), ((0, 1), {2}), ((1, 1), {5})])
def test_what_is_drawn(chances, counts):
    read = lambda k: part(0, (8, 8, 64, 64))  # noqa: E731
    found = [mix(read, 0, 9, chances, np.random.default_rng(seed)) for seed in range(20)]
    assert {len(boxes) for _, boxes, _ in found} == counts
    for image, boxes, _ in found:
        assert image.dtype == np.uint8 and boxes.min() >= 0 and boxes.max() <= SIDE
        assert (boxes[:, 2:] - boxes[:, :2] >= 0.29 * 56).all()
    again = mix(read, 0, 9, chances, np.random.default_rng(0))
    assert np.array_equal(again[0], found[0][0]) and np.array_equal(again[1], found[0][1])


def test_shares_of_mosaics():
    read = lambda k: part(0, (8, 8, 64, 64))  # noqa: E731
    made = [len(mix(read, 0, 9, (0.3, 0), np.random.default_rng(seed))[1]) == 4 for seed in range(300)]
    assert 0.2 < np.mean(made) < 0.4
