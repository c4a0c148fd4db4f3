"""Grey levels: what is said and done where a mapping or a few extreme values leave hardly any."""

import numpy as np
import pytest

from common.data.dicom import read_image, read_image_and_header
from common.data.grey import to_uint8
from common.errors import InputError
from tests.dicoms import dataset, picture, save


def test_bits_above_the_used_ones_are_dropped_only_where_they_leave_no_grey():
    pixels = picture(8).astype(np.uint16)
    pixels[0, 0], pixels[-1, -1] = 0, 255
    flagged = pixels.copy()
    flagged[3, 4] |= 0xF000  # an overlay in the high bits
    image, note = to_uint8(flagged, 8)
    np.testing.assert_array_equal(image, pixels)
    assert note == "unusable elements were ignored (bits above the 8 used: leaves 3 grey levels)"
    wide = picture(12)  # here the header is wrong
    np.testing.assert_array_equal(to_uint8(wide, 8)[0], to_uint8(wide, 12)[0])
    assert to_uint8(wide, 8)[1] == ""


@pytest.mark.parametrize("kind", ["u2", "i2"])
def test_a_file_in_which_one_value_hides_all_others_is_named(kind, tmp_path):
    pixels = picture(6).astype(kind)
    pixels[0, 0] = 32767
    with pytest.raises(InputError, match=r"a\.dcm: cannot be read \(a few extreme values leave hardly any grey"):
        read_image(save(dataset(pixels), tmp_path / "a.dcm"))
    pixels[0, 0] = 600
    assert len(np.unique(read_image(save(dataset(pixels), tmp_path / "b.dcm")))) > 4


def test_the_next_best_mapping_is_used_and_said(tmp_path):
    pixels = picture(12)
    rescaled = read_image(save(dataset(pixels, 12, RescaleSlope=-2, RescaleIntercept=1), tmp_path / "a.dcm"))
    image, header = read_image_and_header(
        save(
            dataset(pixels, 12, RescaleSlope=-2, RescaleIntercept=1, WindowCenter=9e5, WindowWidth=2),
            tmp_path / "b.dcm",
        )
    )
    np.testing.assert_array_equal(image, rescaled)
    assert image[0, 0] > image[-1, -1]  # the slope still applies
    assert header["note"] == "unusable elements were ignored (window: leaves 1 grey levels)"


def test_two_levels_are_no_fault():
    assert to_uint8(np.array([[0, 4000], [4000, 0]], np.uint16), 12)[1] == ""
