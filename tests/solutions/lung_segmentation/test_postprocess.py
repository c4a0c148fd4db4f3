import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from common.errors import InputError
from solutions.lung_segmentation.config import GATE_AREA
from solutions.lung_segmentation.postprocess import apply_gate, clean_up, decide, lung_region, main_regions, scale_box

QUICK = settings(max_examples=60, deadline=None)
SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)
MASKS = arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 0, 1]))
SQUARE = np.ones((3, 3))


def drawn(*boxes, shape=(256, 256)):
    """Mask of boxes (x_min, y_min, x_max, y_max)."""
    mask = np.zeros(shape, np.uint8)
    for x_min, y_min, x_max, y_max in boxes:
        mask[y_min:y_max, x_min:x_max] = 1
    return mask


# At 256 pixels the margins are the paper's own: 15, and 20 at the bottom.
RIGHT, LEFT = (40, 60, 100, 200), (156, 50, 206, 190)  # 60 × 140 and 50 × 140 pixels
BOTH = (25, 35, 221, 220)


# ---- lung_region


def test_two_lungs():
    box, rule, mask = lung_region(drawn(RIGHT, LEFT))
    assert (box, rule) == (BOTH, "two")
    assert (mask.dtype, mask.tolist()) == (np.uint8, drawn(RIGHT, LEFT).tolist())
    assert all(type(edge) is int for edge in box)


@pytest.mark.parametrize("mask", [drawn(RIGHT, LEFT) * 255, drawn(RIGHT, LEFT).astype(bool), drawn(LEFT, RIGHT).T])
def test_the_kind_of_array_does_not_matter(mask):
    if not mask.flags.c_contiguous:
        mask = np.asfortranarray(mask.T)
    assert lung_region(mask).box == BOTH


def test_a_lung_that_is_missing_is_mirrored():
    box, rule, mask = lung_region(drawn(RIGHT))
    assert (box, rule) == ((25, 45, 231, 220), "mirrored")  # x from 40 to 256 - 40, and the margins
    assert mask.tolist() == drawn(RIGHT).tolist()
    assert lung_region(drawn(LEFT)).box == (50 - 15, 35, 206 + 15, 210)


def test_a_lung_under_a_third_of_the_other_is_dropped_and_one_of_a_third_is_kept():
    large, third, under = (40, 60, 100, 180), (170, 60, 190, 180), (170, 60, 190, 179)  # 7200, 2400, 2380 pixels
    assert lung_region(drawn(large, third)).rule == "two"
    assert lung_region(drawn(large, third)).box == (25, 45, 205, 200)
    box, rule, mask = lung_region(drawn(large, under))
    assert (box, rule) == ((25, 45, 231, 200), "mirrored")
    assert mask.tolist() == drawn(large).tolist()


def test_no_lung():
    assert lung_region(np.zeros((256, 256), bool)) is None
    assert lung_region(drawn((20, 100, 23, 209))) is None  # 327 pixels, where 0.5 % of the image is 327.68
    assert lung_region(drawn((20, 100, 28, 141))).rule == "mirrored"  # 328 pixels


def test_regions_far_from_the_centre_are_dropped():
    gas, air = (150, 215, 210, 250), (0, 0, 70, 40)  # 2100 and 2800 pixels, far below the centre and in a corner
    for other in (gas, air):
        box, rule, mask = lung_region(drawn(RIGHT, LEFT, other))
        assert (box, rule) == (BOTH, "removed")
        assert mask.tolist() == drawn(RIGHT, LEFT).tolist()
    border = drawn(RIGHT, LEFT)
    border[:12] = border[-12:] = 1
    assert lung_region(border).box == BOTH


def test_the_two_regions_nearest_the_centre_win_not_the_two_largest():
    air = (0, 0, 30, 256)  # larger than the left lung, 113 pixels from the centre against 53
    assert lung_region(drawn((45, 60, 105, 200), LEFT, air)).box == (30, 35, 221, 220)


def test_the_centre_of_a_wide_image():
    lungs, gas = ((170, 40, 230, 160), (290, 40, 350, 160)), (100, 40, 160, 160)  # the centre is at 256, 100
    assert lung_region(drawn(*lungs, gas, shape=(200, 512))).box == (170 - 30, 40 - 12, 350 + 30, 160 + 16)


def test_parts_that_meet_at_a_corner_are_one_region():
    mask = drawn((40, 60, 70, 120), (70, 120, 100, 180), LEFT)
    assert lung_region(mask).mask.tolist() == mask.tolist()
    assert lung_region(mask).box == (25, 35, 221, 210)


def test_specks_beside_the_centre_do_not_displace_a_lung():
    specks = (120, 120, 140, 140), (130, 80, 140, 100), (100, 100, 101, 101)  # 400, 200 and 1 pixels
    assert lung_region(drawn(RIGHT, LEFT, *specks))[:2] == (BOTH, "two")  # specks are no false positives


def test_the_floor_under_regions_is_a_tenth_of_the_largest():
    bars = drawn((40, 20, 100, 220), (120, 100, 140, 159), (160, 20, 210, 220))  # 12000, 1180, 10000 pixels
    assert lung_region(bars).rule == "two"
    bars[159:161, 120:140] = 1  # 1220 pixels: nearest the centre, dropped as the smaller of the pair
    assert lung_region(bars).rule == "mirrored"


def test_lungs_grown_together_are_one_region_and_boxed_as_it_is():
    bridge = (100, 120, 156, 130)
    box, rule, mask = lung_region(drawn(RIGHT, LEFT, bridge))
    assert (box, rule) == (BOTH, "one")
    assert mask.tolist() == drawn(RIGHT, LEFT, bridge).tolist()


def test_a_third_on_each_side_of_the_centre_line_makes_two_lungs_in_one():
    assert lung_region(drawn((98, 60, 138, 200))).rule == "one"  # 30 and 10 columns
    assert lung_region(drawn((97, 60, 138, 200))).rule == "mirrored"  # 31 and 10
    assert lung_region(drawn((98, 60, 139, 200), shape=(256, 257))).rule == "one"  # the middle column counts for none


def test_parts_of_one_lung_are_mirrored():
    upper, lower = (40, 60, 100, 120), (40, 130, 100, 200)
    box, rule, mask = lung_region(drawn(upper, lower))
    assert (box, rule) == ((25, 45, 231, 220), "one_side")
    assert mask.tolist() == drawn(upper, lower).tolist()
    beside = drawn((20, 60, 60, 120), (75, 60, 115, 120))  # both lungs of an image cropped or shifted
    assert (lung_region(beside).box, lung_region(beside).rule) == ((5, 45, 130, 140), "two")


def test_an_image_rotated_by_a_quarter():
    # Clockwise: x' = 256 - y, y' = x.
    box, rule, mask = lung_region(np.rot90(drawn(RIGHT, LEFT), -1))
    assert (box, rule) == ((56 - 15, 40 - 15, 206 + 15, 206 + 20), "two")
    assert mask.tolist() == np.rot90(drawn(RIGHT, LEFT), -1).tolist()
    assert lung_region(drawn(RIGHT, LEFT)[::-1]).box == (25, 56 - 15, 221, 206 + 20)


def test_a_cropped_image_keeps_the_box_inside():
    mask = drawn(RIGHT, LEFT)[70:180, 50:200]  # 110 rows, 150 columns; both lungs touch three sides
    box, rule, _ = lung_region(mask)
    assert (box, rule) == ((0, 0, 150, 110), "two")
    mask = drawn(RIGHT, LEFT)[:, 40:]  # the right lung touches the edge; 216 columns, a margin of 12.66
    assert lung_region(mask).box == (0, 35, 166 + 13, 220)


def test_a_lung_at_the_edge_is_mirrored_to_the_other_edge():
    assert lung_region(drawn((0, 60, 60, 200))).box == (0, 45, 256, 220)


def test_margins_are_fractions_of_the_side():
    scale = 3000 / 256
    large = cv2.resize(drawn(RIGHT, LEFT), (3000, 3000), interpolation=cv2.INTER_NEAREST)
    # One pixel for the edge that was enlarged, half of one for the margin.
    assert np.abs(np.array(lung_region(large).box) - np.array(BOTH) * scale).max() < 1.5
    assert lung_region(drawn((1000, 1000, 1400, 2000), (1600, 1000, 2000, 2000), shape=(3000, 3000))).box == (
        1000 - round(15 * scale),
        1000 - round(15 * scale),
        2000 + round(15 * scale),
        2000 + round(20 * scale),
    )


def test_margins_follow_width_and_height_apart():
    mask = drawn((100, 30, 200, 80), (300, 30, 400, 80), shape=(128, 512))
    assert lung_region(mask).box == (100 - 30, 30 - 8, 400 + 30, 80 + 10)  # 7.5 rows round to 8


@QUICK
@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 39)] * 4), min_size=0, max_size=5),
    shape=st.tuples(st.integers(30, 40), st.integers(30, 40)),
)
def test_the_box_lies_inside_and_holds_what_is_kept(boxes, shape):
    mask = drawn(*((min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes), shape=shape)
    region = lung_region(mask)
    if region is None:
        areas = np.bincount(ndimage.label(mask, SQUARE)[0].ravel())[1:]
        assert all(areas < 0.005 * mask.size)
        return
    x_min, y_min, x_max, y_max = region.box
    assert 0 <= x_min < x_max <= shape[1]
    assert 0 <= y_min < y_max <= shape[0]
    assert region.mask.any()
    assert (region.mask <= mask).all()
    assert region.mask[y_min:y_max, x_min:x_max].sum() == region.mask.sum()
    assert ndimage.label(region.mask, SQUARE)[1] <= 2
    flipped = lung_region(np.ascontiguousarray(mask[:, ::-1]))
    if ndimage.label(mask, SQUARE)[1] <= 2:  # with more, equal distances are settled by the reading order
        assert flipped.box == (shape[1] - x_max, y_min, shape[1] - x_min, y_max)
    if region.rule in ("mirrored", "one_side"):
        assert x_min == shape[1] - x_max


# ---- clean_up


def test_one_pixel_grows_by_eight_and_the_closing_leaves_a_square():
    mask = drawn((100, 200, 101, 201), shape=(512, 512))
    assert clean_up(mask).tolist() == drawn((92, 192, 109, 209), shape=(512, 512)).tolist()


def test_gaps_up_to_four_pixels_are_closed():
    boxes = (100, 100, 200, 300), (204, 100, 300, 300)
    mask = drawn(*boxes, shape=(512, 512))
    assert clean_up(mask, 0).tolist() == drawn((100, 100, 300, 300), shape=(512, 512)).tolist()
    assert clean_up(mask, 0, 1).tolist() == mask.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_steps_are_those_of_opencv_at_512(seed):
    mask = (np.random.default_rng(seed).random((512, 512)) < 0.0005).astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    expected = cv2.morphologyEx(cv2.dilate(mask, kernel, iterations=8), cv2.MORPH_CLOSE, kernel, iterations=2)
    assert (clean_up(mask) == expected).all()
    mask = (np.random.default_rng(seed).random((512, 512)) < 0.05).astype(np.uint8)
    assert (clean_up(mask, 0, 2) == cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel, iterations=2)).all()


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((256, 256), 4, 4), ((1024, 512), 16, 8), ((3000, 2000), 47, 31), ((40, 96), 1, 2), ((31, 31), 0, 0)],
)
def test_steps_grow_with_the_image(shape, rows, columns):
    y, x = shape[0] // 2, shape[1] // 2
    mask = drawn((x, y, x + 1, y + 1), shape=shape)
    grown = np.argwhere(clean_up(mask, 8, 0))
    assert grown.min(0).tolist() == [y - rows, x - columns]
    assert grown.max(0).tolist() == [y + rows, x + columns]


def test_closing_takes_nothing_from_a_mask_at_the_border():
    mask = drawn((0, 0, 30, 512), shape=(512, 512))
    assert clean_up(mask, 0).tolist() == mask.tolist()
    assert clean_up(np.ones((100, 90), bool)).all()
    assert not clean_up(np.zeros((100, 90), bool)).any()


@QUICK
@given(MASKS)
def test_clean_up_covers_the_mask(mask):
    before = mask.copy()
    assert (clean_up(mask, 40, 40) >= mask).all()
    assert (mask == before).all()


# ---- main_regions, decide


def test_the_largest_regions_stay_and_their_holes_are_filled():
    ring = drawn((10, 10, 30, 30))
    ring[15:20, 15:20] = 0
    ring[17, 17] = 1  # an island in the hole goes with it
    mask = ring + drawn((50, 10, 80, 30), (100, 10, 110, 20))
    assert main_regions(mask, 2).tolist() == drawn((10, 10, 30, 30), (50, 10, 80, 30)).tolist()
    assert main_regions(mask, 1).tolist() == drawn((50, 10, 80, 30)).tolist()
    assert main_regions(mask, 0).tolist() == mask.tolist()
    assert main_regions(mask, 9).tolist() == drawn((10, 10, 30, 30), (50, 10, 80, 30), (100, 10, 110, 20)).tolist()


def test_a_bay_open_to_the_border_is_no_hole():
    mask = drawn((0, 10, 20, 40))
    mask[20:30, 0:10] = 0
    assert main_regions(mask, 1).tolist() == mask.tolist()


def test_among_equal_regions_the_uppermost_then_leftmost_stays():
    mask = drawn((100, 10, 110, 20), (10, 10, 20, 20), (50, 8, 60, 18))
    assert main_regions(mask, 1).tolist() == drawn((50, 8, 60, 18)).tolist()
    assert main_regions(mask, 2).tolist() == drawn((50, 8, 60, 18), (10, 10, 20, 20)).tolist()


@QUICK
@given(MASKS, st.integers(1, 3))
def test_main_regions_against_scipy(mask, count):
    labels, n = ndimage.label(mask, SQUARE)
    areas = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    largest = np.argsort(-areas, kind="stable")[:count] + 1
    assert (main_regions(mask, count) == ndimage.binary_fill_holes(np.isin(labels, largest))).all()


def test_decide_resizes_before_it_cuts():
    probs = np.array([[0, 100], [0, 100]], np.uint8)
    # Bilinear with pixel centres: columns 0, 25, 75, 100.
    assert decide(probs, (2, 4), 75 / 255, 0).tolist() == [[0, 0, 1, 1]] * 2
    assert decide(probs, (2, 4), 76 / 255, 0).tolist() == [[0, 0, 0, 1]] * 2
    assert decide(probs, np.array([2, 4]), 0.09, 0).tolist() == [[0, 1, 1, 1]] * 2  # 0.09 · 255 = 22.95


def test_decide_keeps_the_largest_regions_of_the_image():
    probs = drawn(RIGHT, LEFT, (120, 20, 136, 30)) * np.uint8(128)
    mask = decide(probs, (512, 512), 0.5, 2)
    assert mask.dtype == np.uint8
    # 0.5 is 128 of 255: the outermost pixels of the enlarged boxes, three quarters of that, fall away.
    assert mask.tolist() == drawn((81, 121, 199, 399), (313, 101, 411, 379), shape=(512, 512)).tolist()
    assert ndimage.label(decide(probs, (512, 512), 0.5, 0))[1] == 3
    assert not decide(probs, (512, 512), 0.51, 2).any()


# ---- apply_gate


def test_the_gate_is_50000_pixels_of_512():
    at = drawn((6, 6, 256, 206), shape=(512, 512))  # 50,000 pixels
    assert apply_gate(at) == (True, "", GATE_AREA) == (True, "", 50_000 / 262_144)
    at[6, 6] = 0
    ok, reason, area = apply_gate(at)
    assert (ok, area) == (False, 49_999 / 262_144)
    assert reason == "only one lung, covering 19 % of the image, the gate requires 19.1 %"


def test_reasons():
    assert apply_gate(np.zeros((50, 50), bool)) == (False, "no lung found", 0.0)
    assert apply_gate(drawn((9, 9, 12, 12)), gate=0).reason == "no lung found"
    assert apply_gate(drawn(RIGHT)).reason == "only one lung, covering 12.8 % of the image, the gate requires 19.1 %"
    lungs = drawn((60, 60, 100, 116), (150, 60, 190, 116))  # 4480 of 65,536 pixels
    assert apply_gate(lungs).reason == "lungs cover 6.8 % of the image, the gate requires 19.1 %"
    assert apply_gate(lungs, 0.06).ok
    assert not apply_gate(lungs, gate=0.07).ok
    assert apply_gate(drawn(RIGHT, LEFT)).ok


def test_the_gate_does_not_depend_on_size():
    mask = drawn(RIGHT, LEFT)
    assert apply_gate(mask).area == apply_gate(cv2.resize(mask, (768, 512), interpolation=cv2.INTER_NEAREST)).area


# ---- scale_box


def test_scaling_a_box_covers_it():
    assert scale_box((1, 2, 3, 4), (10, 10), (20, 30)) == (3, 4, 9, 8)
    assert scale_box((1, 1, 2, 2), (3, 3), (10, 10)) == (3, 3, 7, 7)  # 3.33 to 6.67
    assert scale_box((0, 0, 256, 256), (256, 256), (3001, 2999)) == (0, 0, 2999, 3001)
    assert scale_box(np.array([4, 4, 5, 5]), (8, 8), (2, 2)) == (1, 1, 2, 2)
    assert all(type(edge) is int for edge in scale_box(np.array([4, 4, 5, 5]), (8, 8), (2, 2)))


@QUICK
@given(st.data())
def test_a_scaled_box_covers_the_box_and_lies_inside(data):
    side = st.integers(1, 5000)
    (h, w), (to_h, to_w) = data.draw(st.tuples(side, side)), data.draw(st.tuples(side, side))
    x_min, y_min = data.draw(st.integers(0, w - 1)), data.draw(st.integers(0, h - 1))
    box = x_min, y_min, data.draw(st.integers(x_min + 1, w)), data.draw(st.integers(y_min + 1, h))
    scaled = scale_box(box, (h, w), (to_h, to_w))
    for low, high, s_low, s_high, size, to in zip(
        box[:2], box[2:], scaled[:2], scaled[2:], (w, h), (to_w, to_h), strict=True
    ):
        assert 0 <= s_low < s_high <= to
        assert s_low * size <= low * to < (s_low + 1) * size  # the last whole pixel at or before it
        assert (s_high - 1) * size < high * to <= s_high * size
    assert scale_box(box, (h, w), (h, w)) == box


def test_a_box_of_an_original_larger_than_the_mask():
    # 25 · 1200 / 256 = 117.2; 35 · 1000 / 256 = 136.7; 221 · 1200 / 256 = 1035.9; 220 · 1000 / 256 = 859.4
    assert scale_box(lung_region(drawn(RIGHT, LEFT)).box, (256, 256), (1000, 1200)) == (117, 136, 1036, 860)


# ---- bad input


@pytest.mark.parametrize("function", [clean_up, apply_gate, lung_region, lambda mask: main_regions(mask, 2)])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((4, 4)), "bool or uint8"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4, 1), np.uint8), r"\(4, 4, 1\)"),
        (np.zeros((0, 4), np.uint8), r"\(0, 4\)"),
        (None, "object"),
        (np.array([[0, 1, 255]], np.uint8), "decide"),
        (np.array([[0, 40, 200]], np.uint8), "probabilities"),
    ],
)
def test_what_is_not_a_mask_is_refused(function, mask, message):
    with pytest.raises(InputError, match=message) as caught:
        function(mask)
    assert "\n" not in str(caught.value)
