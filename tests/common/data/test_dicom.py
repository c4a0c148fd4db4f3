"""Reading radiographs: the same as pydicom and the usual chain of mappings give."""

import logging
import struct
import warnings

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from benchmarks.tables import real_data
from common.data import dicom, jpeg
from common.data.grey import FEW_LEVELS, to_uint8
from tests.dicoms import GDCM, dataset, picture, read_pixels, recode, save

PLAIN = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian)
DEPTHS = ((8, 8, 0), (16, 12, 0), (16, 16, 0), (16, 12, 1), (16, 16, 1), (8, 8, 1), (16, 8, 0), (8, 6, 0))
INVERSE = {"PhotometricInterpretation": "MONOCHROME1"}


def usual_chain(path):
    """Return what most notebooks compute, on the whole image in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        return stretch(apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds), ds)


def stretch(values, ds):
    values = values.astype(np.float64)
    values = np.amax(values) - values if ds.PhotometricInterpretation == "MONOCHROME1" else values
    values = values - np.min(values)
    return (values / np.max(values) * 255).astype(np.uint8) if values.any() else np.zeros(values.shape, np.uint8)


def read_as_pydicom(path):
    """Return the image after checking that the stored values are pydicom's, dtype included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pydicom.dcmread(path).pixel_array
    pixels, image = read_pixels(path), dicom.read_image(path)
    assert pixels.dtype == expected.dtype
    np.testing.assert_array_equal(pixels, expected)
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
    return image


@pytest.mark.parametrize("syntax", [*PLAIN, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize(("allocated", "stored", "signed"), DEPTHS)
def test_uncompressed_files_read_as_pydicom_reads_them(syntax, allocated, stored, signed, tmp_path):
    pixels, n = picture(stored, signed).astype(f"{'i' if signed else 'u'}{allocated // 8}"), 2**stored
    for number, elements in enumerate(
        (
            {"PatientID": "P 1", "PatientAge": "058Y", "PatientSex": "F", "ViewPosition": "PA", "Modality": "CR"},
            INVERSE,
            {"WindowCenter": n // 3, "WindowWidth": n // 2},
            {"WindowCenter": [-n // 3, 9], "WindowWidth": [n, 9], "RescaleSlope": "-1.5", "RescaleIntercept": "7"},
            {"WindowCenter": n // 5, "WindowWidth": n // 4, "VOILUTFunction": "SIGMOID", "RescaleSlope": 1},
            {"RescaleSlope": 1, "RescaleIntercept": 0} | INVERSE,
        )
    ):
        path = save(dataset(pixels, stored, syntax, **elements), tmp_path / f"{number}.dcm")
        image = read_as_pydicom(path)
        if stored == 8 and not signed and "WindowCenter" not in elements:
            kept = pixels.astype(np.uint8)
            np.testing.assert_array_equal(image, 255 - kept if number in (1, 5) else kept)
        else:
            np.testing.assert_array_equal(image, usual_chain(path))


@pytest.mark.parametrize("name", GDCM)
@pytest.mark.parametrize(("allocated", "stored", "signed"), [(8, 8, 0), (16, 12, 0), (16, 16, 0), (16, 16, 1)])
def test_lossless_compression_gives_back_the_pixels(name, allocated, stored, signed, tmp_path):
    if name == "JPEGLSLossless" and signed:
        pytest.skip("gdcm does not write signed JPEG-LS")
    pixels = picture(stored, signed, (40, 37))
    source = save(dataset(pixels, stored), tmp_path / "raw.dcm")
    path = recode(source, tmp_path / "packed.dcm", name)
    np.testing.assert_array_equal(read_pixels(path), pixels)
    np.testing.assert_array_equal(read_as_pydicom(path), dicom.read_image(source))


@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.RLELossless])
def test_openjpeg_and_rle_as_pydicom_writes_them(syntax, tmp_path):
    pixels = picture(12, shape=(90, 80))
    ds = dataset(pixels, 12)
    ds.compress(syntax)
    path = save(ds, tmp_path / "packed.dcm")
    np.testing.assert_array_equal(read_pixels(path), pixels)
    read_as_pydicom(path)


@pytest.mark.parametrize(("allocated", "stored", "signed"), DEPTHS)
def test_a_jpeg_2000_is_halved_while_both_sides_stay_large_enough(allocated, stored, signed, tmp_path):
    pixels = picture(stored, signed, (183, 160)).astype(f"{'i' if signed else 'u'}{allocated // 8}")
    ds = dataset(pixels, stored, WindowCenter=2**stored // 3, WindowWidth=2**stored // 2)
    ds.compress(uid.JPEG2000Lossless)
    path, stream = save(ds, tmp_path / "packed.dcm"), get_frame(ds.PixelData, 0, number_of_frames=1)
    exact = jpeg.decode_halved(ds, 0)  # as openjpeg decodes it for pydicom
    assert exact.dtype == pixels.dtype
    np.testing.assert_array_equal(exact, pixels)
    for side, shape in ((81, (183, 160)), (80, (92, 80)), (41, (92, 80)), (40, (46, 40)), (1, (6, 5))):
        found, values, _ = dicom._read_dicom(path, side)
        assert found.shape == shape and found.dtype == pixels.dtype
        assert ("note" in values) == (side < 81)
    image, header = dicom.read_image_and_header(path, 40)
    assert (header["width"], header["height"], header["note"]) == (160, 183, "JPEG 2000 decoded at 1/4 of its size")
    assert jpeg.count_halvings(stream, stored, signed, 40) == 2
    sizes = struct.pack(">II", 160, 181)  # a quarter of 181 rows are 46, which Pillow takes for 45
    assert jpeg.count_halvings(stream[:8] + sizes + stream[16:], stored, signed, 40) == 1
    means = cv2.resize(dicom.read_image(path), (40, 46), interpolation=cv2.INTER_AREA)
    assert np.abs(image.astype(int) - means).mean() < 6


def test_a_jpeg_2000_with_colours_padding_or_another_depth_than_its_header_is_decoded_whole(tmp_path):
    pixels = picture(12, 0, (181, 160))
    colours = np.stack([picture(8, 0, (181, 160))] * 3, 2)
    padded, deeper = dataset(pixels, 12, PixelPaddingValue=0), dataset(pixels, 12)
    files = {"colour": dataset(colours), "padded": padded, "deeper": deeper}
    for name, ds in files.items():
        ds.compress(uid.JPEG2000Lossless)
        if name == "deeper":
            ds.BitsStored, ds.HighBit = 13, 12
        path = save(ds, tmp_path / f"{name}.dcm")
        image, header = dicom.read_image_and_header(path, 20)
        assert "JPEG 2000" not in header["note"]
        np.testing.assert_array_equal(image, dicom.read_image(path))


def test_baseline_jpeg_keeps_the_decoded_values(tmp_path):
    pixels = picture(8, shape=(64, 48))
    stream = cv2.imencode(".jpg", pixels)[1].tobytes()

    def read(fragments=1, **elements):
        ds = dataset(pixels, 8, uid.JPEGBaseline8Bit, stream, **elements)
        ds.PixelData = encapsulate([stream], fragments_per_frame=fragments)
        path = save(ds, tmp_path / "a.dcm")
        return path, read_as_pydicom(path)

    path, image = read()
    np.testing.assert_array_equal(image, pydicom.dcmread(path).pixel_array)
    np.testing.assert_array_equal(read(**INVERSE)[1], 255 - image)
    np.testing.assert_array_equal(read(fragments=2)[1], image)
    path, windowed = read(WindowCenter=100, WindowWidth=80)
    np.testing.assert_array_equal(windowed, usual_chain(path))


def test_window_by_hand(tmp_path):
    """PS3.3 C.11.2.1.2.1, centre 5 and width 5: x ≤ 2.5 is 0, x > 6.5 full, between ((x - 4.5) / 4 + 0.5)."""
    pixels = np.array([[0, 2, 3], [5, 6, 7]], np.uint16)
    path = save(dataset(pixels, 12, WindowCenter=5, WindowWidth=5), tmp_path / "a.dcm")
    expected = np.array([[0, 0, 0.125 * 255], [0.625 * 255, 0.875 * 255, 255]]).astype(np.uint8)
    np.testing.assert_array_equal(dicom.read_image(path), expected)
    path = save(dataset(pixels, 12, **INVERSE), tmp_path / "b.dcm")
    np.testing.assert_array_equal(dicom.read_image(path), [[255, 182, 145], [72, 36, 0]])  # trunc((7 - x) / 7 * 255)
    path = save(dataset(np.full((3, 4), 9, np.uint16)), tmp_path / "constant.dcm")
    assert not dicom.read_image(path).any()


def test_padding_takes_no_part_in_minimum_and_maximum(tmp_path):
    pixels = np.array([[1000, 1100, 1200, 1400]], np.int16)
    padded = np.array([[1000, 1100, 1200, 1400, -32768]], np.int16)
    path = save(dataset(padded, PixelPaddingValue=-32768), tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_as_pydicom(path), [[0, 63, 127, 255, 0]])
    path = save(dataset(padded, PixelPaddingValue=-32768, **INVERSE), tmp_path / "b.dcm")
    np.testing.assert_array_equal(dicom.read_image(path), [[255, 191, 127, 0, 255]])
    above = dataset(np.where(padded < 0, 2000, padded), PixelPaddingValue=1401, PixelPaddingRangeLimit=3000, **INVERSE)
    np.testing.assert_array_equal(dicom.read_image(save(above, tmp_path / "c.dcm")), [[255, 191, 127, 0, 0]])
    for value in (-5, 1200):  # of no pixel, or in the middle of the range
        path = save(dataset(pixels, PixelPaddingValue=value, RescaleSlope=2, RescaleIntercept=1), tmp_path / "d.dcm")
        np.testing.assert_array_equal(dicom.read_image(path), [[0, 63, 127, 255]])


@pytest.mark.parametrize(
    ("elements", "note"),
    [
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "rescaling: leaves 1 grey levels"),
        ({"WindowCenter": -600, "WindowWidth": 400}, "window: leaves 1 grey levels"),
        ({"WindowCenter": 5, "WindowWidth": 0}, "window: The (0028,1051) Window Width must be greater than or equal"),
        ({"WindowCenter": "0.456", "WindowWidth": "0.913", "RescaleSlope": "0.0002", "RescaleIntercept": 0}, "window:"),
        ({"VOILUTFunction": "LINEA", "WindowCenter": 2047.5, "WindowWidth": 4096}, "VOILUTFunction: 'LINEA'"),
        ({"VOILUTFunction": "", "WindowCenter": 2047.5, "WindowWidth": 4096}, ""),
        ({"WindowCenter": "7777", "WindowWidth": "9"}, "window: "),
    ],
)
def test_unusable_mappings_are_ignored_and_said(elements, note, tmp_path):
    pixels = picture(12)
    pixels[0, :2] = 0, 4095
    path = save(dataset(pixels, 12), tmp_path / "plain.dcm")
    expected = dicom.read_image(path)
    data = save(dataset(pixels, 12, **elements), tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(data.replace(b"7777", b"7x77"))  # pydicom writes no such number
    image, header = dicom.read_image_and_header(tmp_path / "a.dcm")
    np.testing.assert_allclose(image, expected, atol=1)
    assert note in header["note"] and header["note"].startswith("unusable elements were ignored (" if note else "")


@pytest.mark.parametrize("syntax", [*PLAIN, uid.ExplicitVRBigEndian])
def test_a_missing_transfer_syntax_is_assumed(syntax, tmp_path):
    path = save(dataset(picture(12), 12, syntax), tmp_path / "a.dcm")
    data, element = path.read_bytes(), b"\x02\0\x10\0UI"
    at = data.index(element)
    (tmp_path / "a.dcm").write_bytes(data[:at] + data[at + 8 + data[at + 6] :])
    np.testing.assert_array_equal(read_pixels(path), picture(12))
    header = dicom.read_image_and_header(path)[1]
    assert header["note"] == f"no transfer syntax, assumed {syntax.name}" and header["transfer_syntax"] == syntax.name


def lookup(values, first, bits=16):
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item.add_new("LUTData", "US", [int(value) for value in values])
    return Sequence([item])


def test_non_monotonic_tables_follow_the_usual_chain(tmp_path):
    there_and_back = np.concatenate([np.arange(0, 4000, 40), np.arange(3000, 0, -30)])
    for elements in (
        {"VOILUTSequence": lookup(there_and_back, 20)},
        {"ModalityLUTSequence": lookup(there_and_back, 0)} | INVERSE,
        {"VOILUTSequence": lookup(there_and_back, 20), "WindowCenter": 3, "WindowWidth": 9},
    ):
        path = save(dataset(picture(8).astype(np.uint16), 12, **elements), tmp_path / "a.dcm")
        np.testing.assert_array_equal(read_as_pydicom(path), usual_chain(path))
    even = np.array([[0, 2], [4, 2]], np.uint16)  # the peak at 1 does not occur, so it must not set the scale
    path = save(dataset(even, 12, VOILUTSequence=lookup([10, 4095, 20, 3000, 30], 0)), tmp_path / "gap.dcm")
    np.testing.assert_array_equal(dicom.read_image(path), [[0, 127], [255, 127]])


@settings(max_examples=30, deadline=None)
@given(
    st.booleans(),
    st.integers(0, 99),
    st.fixed_dictionaries(
        {
            "RescaleSlope": st.sampled_from([1.0, -1.0, 0.37, 2.5]),
            "RescaleIntercept": st.integers(-2000, 2000),
            "WindowCenter": st.integers(-3000, 5000),
            "WindowWidth": st.integers(2, 6000),
            "VOILUTFunction": st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
            "PhotometricInterpretation": st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
        }
    ),
)
def test_one_value_at_a_time_equals_the_whole_image(signed, seed, elements):
    low = -2048 if signed else 0
    pixels = np.random.default_rng(seed).integers(low, low + 4096, (9, 11)).astype("i2" if signed else "u2")
    ds = dataset(pixels, 12, **elements)
    with np.errstate(over="ignore"):
        expected = stretch(apply_voi_lut(apply_modality_lut(pixels, ds), ds), ds)
    assume(len(np.unique(expected)) >= FEW_LEVELS)
    inverted = ds.PhotometricInterpretation == "MONOCHROME1"
    np.testing.assert_array_equal(to_uint8(pixels, 12, inverted, ds)[0], expected)


def test_png_and_jpeg_by_content(tmp_path):
    grey8, grey16 = picture(8), picture(16)
    bgr = np.random.default_rng(1).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    stretched = ((grey16 - np.float64(grey16.min())) / (int(grey16.max()) - int(grey16.min())) * 255).astype(np.uint8)
    for image, suffix, expected in (
        (grey8, ".png", grey8),
        (grey16, ".png", stretched),
        (bgr, ".png", cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)),
        (np.dstack([bgr, np.full(bgr.shape[:2], 7, np.uint8)]), ".png", cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)),
        (grey8, ".jpg", cv2.imdecode(cv2.imencode(".jpg", grey8)[1], cv2.IMREAD_UNCHANGED)),
    ):
        path = tmp_path / "image.dcm"  # the extension must not matter
        path.write_bytes(cv2.imencode(suffix, image)[1].tobytes())
        np.testing.assert_array_equal(dicom.read_image(path), expected)
        header = dicom.read_header(path)
        assert (header["width"], header["height"]) == (image.shape[1], image.shape[0])
        assert header["patient_age"] is None and header["patient_id"] == header["transfer_syntax"] == ""


def test_raw_jsrt_files(tmp_path):
    """Big-endian 12 bits where low values absorb: read as the same values in a MONOCHROME1 DICOM file."""
    values = picture(12, shape=(2048, 2048))
    values[0, :3] = 0, 1023, 4095
    expected = dicom.read_image(save(dataset(values, 12, **INVERSE), tmp_path / "a.dcm"))
    for path in (tmp_path / "JPCLN001.IMG", tmp_path / "JPCNN001.img", tmp_path / "c.Img"):
        values.astype(">u2").tofile(path)
        image, header = dicom.read_image_and_header(path)
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        np.testing.assert_array_equal(image, expected)
        assert list(image[0, :3]) == [255, 191, 0]  # (4095 - 1023) / 4095 × 255 = 191.3
        assert header == dicom.read_header(path) | {"colour": 0.0, "note": ""}
        assert (header["width"], header["height"], header["patient_id"]) == (2048, 2048, "")
    (tmp_path / "faint.IMG").write_bytes(np.tile(np.array([900, 1000, 1100, 1300], ">u2"), 2**20).tobytes())
    assert list(dicom.read_image(tmp_path / "faint.IMG")[5, :4]) == [255, 191, 127, 0]  # stretched: 300 / 400 × 255
    grey = picture(8)
    (tmp_path / "png.IMG").write_bytes(cv2.imencode(".png", grey)[1].tobytes())
    for path in (tmp_path / "png.IMG", save(dataset(grey), tmp_path / "dicom.IMG")):
        np.testing.assert_array_equal(dicom.read_image(path), grey)
        assert dicom.read_header(path)["width"] == grey.shape[1]


@pytest.mark.parametrize(("kind", "low"), [("u2", 0), ("i2", -2048)])
def test_unused_high_bits_are_dropped(kind, low, tmp_path):
    clean = picture(12, int(low < 0))
    dirty = ((clean.astype(np.int32) & 0xFFF) | 0x5000).astype(np.uint16).view(kind)
    path = save(dataset(dirty, 12), tmp_path / "a.dcm")
    read_as_pydicom(path)
    np.testing.assert_array_equal(read_pixels(path), clean)


def test_names_in_other_character_sets(tmp_path):
    ds = dataset(picture(12), 12, SpecificCharacterSet="ISO_IR 192", PatientID="Müller")
    assert dicom.read_header(save(ds, tmp_path / "a.dcm"))["patient_id"] == "Müller"


@pytest.mark.parametrize(
    ("text", "years"),
    [("058Y", 58), ("58", 58), ("041", 41), ("7Y", 7), ("006M", 0), ("030M", 2), ("104W", 2), ("", None), ("x", None)],
)
def test_ages(text, years, tmp_path):
    assert dicom.parse_age(text) == years
    path = save(dataset(picture(12), 12, PatientSex="M", PatientAge=text), tmp_path / "a.dcm")
    assert dicom.read_header(path)["patient_age"] == years


def test_header_names(tmp_path):
    path = save(dataset(picture(12), 12, Modality="DX", ViewPosition="AP"), tmp_path / "a.dcm")
    header = {"width": 18, "height": 23, "patient_id": "", "patient_age": None, "patient_sex": ""}
    header |= {"view_position": "AP", "modality": "DX", "photometric": "MONOCHROME2"}
    header |= {"transfer_syntax": "Explicit VR Little Endian"}
    assert dicom.read_header(path) == header
    assert dicom.read_image_and_header(path)[1] == header | {"colour": 0.0, "note": ""}


def test_reading_is_quiet_and_leaves_pydicom_as_it_was(tmp_path, caplog, capfd):
    odd = {"StudyDate": "yesterday", "PatientID": "a" * 99, "WindowWidth": "900." + "0" * 20, "WindowCenter": "500"}
    ds = dataset(picture(12), 12, uid.ExplicitVRBigEndian, PatientAge="41", **odd)
    path = save(ds, tmp_path / "a.dcm")
    caplog.clear()
    logger = logging.getLogger("pydicom")
    before = (pydicom.config.settings.reading_validation_mode, logger.level)
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        dicom.read_image(path)
        assert dicom.read_header(path)["patient_age"] == 41
    assert not caplog.records and capfd.readouterr() == ("", "")
    assert (pydicom.config.settings.reading_validation_mode, logger.level) == before


@pytest.mark.parametrize(
    ("name", "pattern"), [("siim_pneumothorax", "dicom-*/*/*/*.dcm"), ("vinbigdata", "t*/*.dicom")]
)
def test_real_radiographs_read_as_pydicom_reads_them(name, pattern):
    root = real_data(name)
    if root is None:
        pytest.skip(f"no real {name} radiographs (CXR_REAL_DATA)")
    headers = {path: dicom.read_header(path) for path in sorted(root.glob(pattern))}
    raw = [path for path, header in headers.items() if "JPEG" not in header["transfer_syntax"]]
    for path in raw + list(headers)[::12]:
        image = read_as_pydicom(path)
        if path in raw:
            np.testing.assert_array_equal(image, usual_chain(path))
        elif name == "siim_pneumothorax":
            np.testing.assert_array_equal(image, read_pixels(path))
