import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from benchmarks.tables import label_table
from common.errors import InputError
from common.post import rle
from common.post.rle import ABSOLUTE, RELATIVE

MASKS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20), elements=st.integers(0, 2))
DENSE = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20))
QUICK = settings(max_examples=60, deadline=None)


def pixels_of(mask):
    """Flat column-major positions of the foreground, pixel by pixel."""
    height, width = mask.shape
    return [x * height + y for x in range(width) for y in range(height) if mask[y, x]]


def naive_string(mask, relative):
    """A run-length string made with a pixel loop that closes the last run."""
    pixels, runs = pixels_of(mask), []
    for p in pixels:
        if runs and runs[-1][1] == p:
            runs[-1][1] = p + 1
        else:
            runs.append([p, p + 1])
    ends = [0] + [end for _, end in runs]
    return " ".join(
        f"{start - before if relative else start + 1} {end - start}"
        for (start, end), before in zip(runs, ends, strict=False)
    )


def test_worked_example_in_both_forms():
    # columns: (0 1 1), (1 0 0), (0 0 1): runs [1, 4) and [8, 9)
    mask = np.array([[0, 1, 0], [1, 0, 0], [1, 0, 1]], np.uint8)
    assert rle.runs_of(mask).tolist() == [[1, 4], [8, 9]]
    assert rle.encode(mask) == "1 3 4 1"
    assert rle.encode(mask, ABSOLUTE) == "2 3 9 1"
    for order in "FC":
        np.testing.assert_array_equal(rle.decode("1 3 4 1", (3, 3), order=order), mask)
        np.testing.assert_array_equal(rle.decode("2 3 9 1", (3, 3), ABSOLUTE, order), mask)


def test_height_and_width_are_not_confused():
    mask = np.zeros((2, 3), bool)
    mask[1, 2] = mask[0, 1] = True
    assert rle.encode(mask) == "2 1 2 1"
    np.testing.assert_array_equal(rle.decode("2 1 2 1", (2, 3)), mask)


def test_a_mask_that_fills_the_last_column_is_kept():
    mask = np.zeros((1024, 1024), np.uint8)
    mask[:, -1] = 255
    for layout in (mask, np.asfortranarray(mask)):
        assert rle.encode(layout) == f"{1023 * 1024} 1024"
        assert rle.encode(layout, ABSOLUTE) == f"{1023 * 1024 + 1} 1024"
    for order in "FC":
        np.testing.assert_array_equal(rle.decode(f"{1023 * 1024} 1024", order=order), mask > 0)


def test_last_pixel_alone_full_mask_and_empty_mask():
    mask = np.zeros((5, 7), bool)
    assert rle.encode(mask) == "-1"
    assert rle.encode(mask, ABSOLUTE, empty="") == ""
    mask[-1, -1] = True
    assert rle.encode(mask) == "34 1"
    assert rle.encode(np.ones((5, 7), bool)) == "0 35"
    for order in "FC":
        assert rle.decode("0 35", (5, 7), order=order).all()
        assert not rle.decode(" -1 ", (5, 7), order=order).any()
        assert rle.decode("34 1", (5, 7), order=order).sum() == rle.decode("34 1", (5, 7), order=order)[4, 6] == 1


def test_layout_and_dtype_of_the_decoded_mask():
    column_major, row_major = rle.decode("1 3", (4, 6)), rle.decode("1 3", (4, 6), order="C")
    assert column_major.dtype == row_major.dtype == np.uint8
    assert column_major.flags.f_contiguous and row_major.flags.c_contiguous
    assert column_major.shape == row_major.shape == (4, 6)


@QUICK
@given(st.one_of(MASKS, DENSE), st.sampled_from([RELATIVE, ABSOLUTE]))
def test_encoding_equals_a_pixel_loop_in_every_memory_layout(mask, form):
    expected = naive_string(mask, form == RELATIVE)
    spread = np.zeros((mask.shape[0] * 2, mask.shape[1] * 3), mask.dtype)
    spread[::2, ::3] = mask
    for layout in (mask, np.asfortranarray(mask), spread[::2, ::3]):
        assert rle.encode(layout, form, empty="") == expected


@QUICK
@given(st.one_of(MASKS, DENSE), st.sampled_from([RELATIVE, ABSOLUTE]), st.sampled_from("FC"))
def test_round_trip(mask, form, order):
    np.testing.assert_array_equal(rle.decode(rle.encode(mask, form), mask.shape, form, order), mask > 0)


@pytest.mark.parametrize("width", [255, 256, 257, 300])
def test_large_masks_with_odd_strides(width):
    # longer than one compared block, so that its borders are crossed
    mask = np.random.default_rng(width).random((301, width)) < 0.02
    for layout in (mask, np.asfortranarray(mask)):
        assert rle.encode(layout) == naive_string(mask, True)
    stripes = np.tile([[False], [True]], (4, width))  # every pixel of a block differs from the one above
    assert rle.encode(stripes) == naive_string(stripes, True)
    for order in "FC":
        np.testing.assert_array_equal(rle.decode(rle.encode(mask), mask.shape, order=order), mask)


@QUICK
@given(DENSE, st.data())
def test_set_operations_equal_those_on_pixels(a, data):
    b = data.draw(arrays(np.bool_, a.shape))
    runs_a, runs_b = rle.runs_of(a), rle.runs_of(b)
    assert rle.union([runs_a, runs_b]).tolist() == rle.runs_of(a | b).tolist()
    assert rle.area(runs_a) == a.sum()
    assert rle.overlap(runs_a, runs_b) == (a & b).sum()


def test_union_of_none_is_empty_and_touching_runs_merge():
    assert rle.union([]).shape == (0, 2)
    assert rle.union([np.array([[5, 9]]), np.array([[1, 5]])]).tolist() == [[1, 9]]
    assert rle.union([np.array([[1, 9]]), np.array([[2, 3], [9, 10]])]).tolist() == [[1, 10]]


def test_touching_runs_in_a_string_become_one():
    assert rle.parse("0 2 0 3 1 1", (4, 4)).tolist() == [[0, 5], [6, 7]]
    assert rle.parse("1 2 3 3", (4, 4), ABSOLUTE).tolist() == [[0, 5]]


def test_blanks_around_and_between_numbers_do_not_matter():
    for blank in " \t\n\v\f\r":
        assert rle.parse(f"  1  3{blank}4 1\n", (3, 3)).tolist() == [[1, 4], [8, 9]]


def test_the_longest_numbers_fit():
    run = np.array([[10**18, 2 * 10**18]])
    assert rle.to_string(run) == "1000000000000000000 1000000000000000000"
    assert rle.to_string(run, ABSOLUTE) == "1000000000000000001 1000000000000000000"


@pytest.mark.parametrize(
    ("text", "form", "part"),
    [
        ("1 3 4", RELATIVE, "odd count"),
        ("1", ABSOLUTE, "odd count"),
        ("1 x", RELATIVE, "'x' is not a whole number"),
        ("1 2.0", RELATIVE, "'2.0' is not a whole number"),
        ("1 2 1 2 3.0 5", RELATIVE, "(number 5 of the run-length string)"),
        *((f"1{character}2", RELATIVE, "is not a whole number") for character in "/:\x08\x0e\x1f!"),
        ("1 -2", RELATIVE, "'-2' is not a whole number"),
        ("-1 2", RELATIVE, "'-1' is not a whole number"),
        ("1 ２", RELATIVE, "'２' is not a whole number"),
        ("1 0", RELATIVE, "length 0"),
        ("0 10", RELATIVE, "past the last pixel of 3 x 3"),
        ("8 1 0 1", RELATIVE, "past the last pixel"),
        ("9 1", RELATIVE, "past the last pixel"),
        ("10 1", ABSOLUTE, "past the last pixel"),
        ("99999999999999999999999999 1", RELATIVE, "past the last pixel"),
        ("1 99999999999999999999999999", RELATIVE, "past the last pixel"),
        ("0 1", ABSOLUTE, "starts count from 1"),
        ("1 3 3 1", ABSOLUTE, "the start 3 lies before"),
        ("5 1 1 1", ABSOLUTE, "the start 1 lies before"),
        ("", RELATIVE, "blank"),
        ("  ", RELATIVE, "blank"),
    ],
)
def test_bad_strings_are_refused_with_their_place(text, form, part):
    with pytest.raises(InputError) as error:
        rle.parse(text, (3, 3), form, where="train-rle.csv, row 7")
    message = str(error.value)
    assert message.startswith("train-rle.csv, row 7: ") and part in message and "\n" not in message


def test_blank_is_empty_in_the_absolute_form():
    assert len(rle.parse("", (3, 3), ABSOLUTE)) == 0


def test_the_last_pixel_is_within_bounds():
    assert rle.parse("8 1", (3, 3)).tolist() == [[8, 9]]
    assert rle.parse("9 1", (3, 3), ABSOLUTE).tolist() == [[8, 9]]


@pytest.mark.parametrize("mask", [np.zeros((3, 3), np.float32), np.zeros((3, 3), np.int64), np.zeros(9, np.uint8)])
def test_other_arrays_are_no_masks(mask):
    with pytest.raises(InputError, match="bool or uint8"):
        rle.encode(mask)


def test_other_arguments_are_refused():
    with pytest.raises(InputError, match="runs up to 5 do not fit 2 x 2"):
        rle.paint(np.array([[0, 5]]), (2, 2))
    with pytest.raises(InputError, match="int64"):
        rle.area(np.zeros((1, 2)))


@pytest.mark.parametrize("runs", [[[5, 9], [1, 2]], [[1, 4], [3, 9]], [[-1, 2]], [[3, 3]], [[4, 2]], [[2**62, 1]]])
def test_runs_out_of_order_are_refused_before_compiled_code_follows_them(runs):
    runs = np.array(runs, np.int64)
    for function in (rle.to_string, rle.paint, rle.area, lambda runs: rle.union([runs])):
        with pytest.raises(InputError, match="sorted"):
            function(runs)


def test_real_masks_round_trip_exactly():
    path = label_table("siim-pneumothorax-train-rle.csv.gz")
    if path is None:
        pytest.skip("torchxrayvision, which carries the real run-length table, is not installed")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    strings = [text.strip() for text in table[" EncodedPixels"] if text.strip() != "-1"]
    assert (len(table), len(strings)) == (12954, 3576)
    for text in strings:
        runs = rle.parse(text)
        assert rle.to_string(runs) == text
        np.testing.assert_array_equal(rle.parse(rle.to_string(runs, ABSOLUTE), form=ABSOLUTE), runs)
    for text in strings[::60]:
        for order in "FC":
            assert rle.encode(rle.decode(text, order=order)) == text


def test_masks_are_of_1024_pixels_unless_a_shape_is_given():
    last = 1024 * 1024 - 1
    mask = rle.decode(f"{last} 1")
    assert mask.shape == (1024, 1024) and mask[-1, -1] == 1 and mask.sum() == 1
    assert rle.parse(f"{last} 1").tolist() == [[last, last + 1]] and rle.paint(rle.parse(f"{last} 1")).shape == (
        1024,
        1024,
    )
    with pytest.raises(InputError, match=r"\(number 2 of the run-length string\)"):
        rle.parse(f"{last} 2")
