import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from common.errors import InputError
from common.post.regions import label, quantise, region_overlaps, remove_small, resize_mask_probs

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)
MAPS = arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 0, 1, 100, 255]))
STRUCTURES = {4: None, 8: np.ones((3, 3))}
QUICK = settings(max_examples=80, deadline=None)

# Three regions by edges (3, 1 and 2 pixels), two when corners count (the first two meet at one).
EXAMPLE = np.array([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0, 1, 0, 0, 1]], np.uint8)


def noise(seed, shape=(150, 400), density=0.5):
    return np.random.default_rng(seed).random(shape) < density


def test_worked_example():
    labels, count = label(EXAMPLE, 4)
    assert (count, labels.dtype) == (3, np.int32)
    assert labels.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 2], [0, 3, 0, 0, 2]]
    labels, count = label(EXAMPLE)
    assert count == 2
    assert labels.tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 2], [0, 1, 0, 0, 2]]


def test_a_region_of_exactly_min_area_stays():
    assert remove_small(EXAMPLE, 2, 4).tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert remove_small(EXAMPLE, 3, 4).tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert remove_small(EXAMPLE, 4, 4).sum() == 0
    assert remove_small(EXAMPLE, 4, 8).sum() == 4
    assert remove_small(EXAMPLE, 0).tolist() == EXAMPLE.tolist()


def test_overlaps_of_the_worked_example():
    truth = np.array([[0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 9, 0, 0, 1]], np.uint8)
    areas, overlaps = region_overlaps(EXAMPLE, truth, 4)
    assert (areas.tolist(), overlaps.tolist()) == ([3, 2, 1], [1, 2, 1])
    areas, overlaps = region_overlaps(EXAMPLE)
    assert (areas.tolist(), overlaps.tolist()) == ([4, 2], [0, 0])
    assert areas.dtype == overlaps.dtype == np.int64


def test_empty_and_full_masks():
    areas, overlaps = region_overlaps(np.zeros((6, 9), bool), np.ones((6, 9), bool))
    assert len(areas) == len(overlaps) == label(np.zeros((6, 9), bool))[1] == 0
    areas, overlaps = region_overlaps(np.ones((6, 300), bool), np.ones((6, 300), bool))
    assert areas.tolist() == overlaps.tolist() == [1800]
    assert remove_small(np.ones((6, 300), np.uint8) * 7, 1800).sum() == 1800


@pytest.mark.parametrize("connectivity", [4, 8])
@QUICK
@given(mask=MAPS, at=st.sampled_from([1, 2, 100, 101, 255]))
def test_labels_and_areas_equal_scipy(connectivity, mask, at):
    expected, count = ndimage.label(mask >= at, STRUCTURES[connectivity])
    labels, found = label(mask, connectivity, at)
    assert found == count
    np.testing.assert_array_equal(labels, expected)
    truth = np.roll(mask, 1, axis=1) > 1
    areas, overlaps = region_overlaps(mask, truth, connectivity, at)
    assert areas.tolist() == np.bincount(expected.ravel(), minlength=count + 1)[1:].tolist()
    assert overlaps.tolist() == np.bincount(expected[truth], minlength=count + 1)[1:].tolist()
    kept = np.isin(expected, 1 + np.flatnonzero(areas >= 4))
    for layout in (mask, np.asfortranarray(mask)):
        cleaned = remove_small(layout, 4, connectivity, at)
        assert cleaned.dtype == np.uint8
        np.testing.assert_array_equal(cleaned, kept)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("density", [0.02, 0.41, 0.59, 0.98])
def test_tangled_regions_equal_scipy_and_opencv(connectivity, density):
    # near these densities regions wind across the whole array, so that late merges matter
    mask = noise(int(density * 100), density=density)
    expected, count = ndimage.label(mask, STRUCTURES[connectivity])
    labels, found = label(mask, connectivity)
    assert found == count
    np.testing.assert_array_equal(labels, expected)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=connectivity)
    areas, _ = region_overlaps(mask, None, connectivity)
    assert sorted(areas) == sorted(stats[1:, cv2.CC_STAT_AREA])


def test_a_comb_is_joined_by_its_last_row():
    comb = np.zeros((40, 401), np.uint8)
    comb[:, ::2] = 1
    assert label(comb)[1] == 201
    comb[-1] = 1
    assert label(comb, 4)[1] == 1
    assert region_overlaps(comb, comb)[1].tolist() == [int(comb.sum())]


def test_layout_does_not_matter():
    mask = noise(1)
    spread = np.zeros((300, 800), bool)
    spread[::2, ::2] = mask
    for layout in (np.asfortranarray(mask), spread[::2, ::2]):
        np.testing.assert_array_equal(remove_small(layout, 30), remove_small(mask, 30))
        np.testing.assert_array_equal(label(layout)[0], label(mask)[0])
        np.testing.assert_array_equal(region_overlaps(layout, layout), region_overlaps(mask, mask))
    assert remove_small(np.asfortranarray(mask), 30).flags.f_contiguous


def test_quantised_thresholds_agree_with_the_probabilities_they_stand_for():
    assert [quantise(t) for t in (0, 0.3, 0.5, 0.75, 1)] == [0, 77, 128, 192, 255]
    for q in range(256):
        assert quantise(q / 255) == q
    for t in np.linspace(0, 1, 997):
        assert all((q / 255 >= t - 1e-11) == (q >= quantise(t)) for q in range(256))


def test_resizing_comes_before_thresholding():
    # Two columns, 0 and 200, widened to four: OpenCV's pixel centres fall at -0.25, 0.25, 0.75, 1.25.
    wide = resize_mask_probs(np.array([[0, 200]], np.uint8), (1, 4))
    assert (wide.dtype, wide.tolist()) == (np.uint8, [[0, 50, 150, 200]])
    assert (wide >= quantise(0.19)).tolist() == [[False, True, True, True]]  # cut first, it would be 0 0 1 1
    assert resize_mask_probs(np.zeros((5, 7), np.uint8), (10, 21)).shape == (10, 21)
    assert resize_mask_probs(np.zeros((5, 7), np.uint8)).shape == (1024, 1024)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: remove_small(EXAMPLE.astype(float), 3), "bool or uint8"),
        (lambda: remove_small(EXAMPLE[0], 3), "2 dimensions"),
        (lambda: label(EXAMPLE, 6), "connectivity"),
        (lambda: label(EXAMPLE, threshold=0), "from 1 to 255"),
        (lambda: label(EXAMPLE, threshold=0.5), "from 1 to 255"),
        (lambda: label(EXAMPLE, threshold=256), "from 1 to 255"),
        (lambda: region_overlaps(EXAMPLE, np.zeros((3, 4), bool)), r"\(3, 4\)"),
        (lambda: quantise(1.01), r"\[0, 1\]"),
        (lambda: quantise(-0.01), r"\[0, 1\]"),
        (lambda: quantise(float("nan")), r"\[0, 1\]"),
        (lambda: resize_mask_probs(np.zeros((2, 2), bool)), "uint8"),
        (lambda: resize_mask_probs(np.zeros((2, 2, 3), np.uint8)), "uint8"),
    ],
)
def test_bad_arguments_are_refused(call, part):
    with pytest.raises(InputError, match=part):
        call()
