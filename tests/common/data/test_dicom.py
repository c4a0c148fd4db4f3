import io
import logging
import warnings

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)
from sklearn.datasets import load_sample_images

from benchmarks.tables import real_data
from common.data import dicom, dicom_fast
from common.errors import InputError

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
DEPTHS = ((8, 8, 0), (16, 12, 0), (16, 16, 0), (16, 12, 1), (16, 16, 1), (8, 8, 1), (16, 8, 0), (8, 6, 0))


def picture(bits=12, signed=0, shape=(23, 18)):
    ramp = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) / (sum(shape) - 2)
    noise = np.random.default_rng(bits).integers(-3, 4, shape)
    values = np.clip(ramp * (2**bits - 1) + noise, 0, 2**bits - 1).astype(np.int64) - signed * 2 ** (bits - 1)
    return values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def dataset(pixels, stored=None, syntax=ExplicitVRLittleEndian, data=None, **elements):
    """A DICOM file in memory; pixels (H, W) or (H, W, 3), data the encoded stream of a compressed one."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    ds.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = pixels.itemsize * 8
    ds.BitsStored = stored or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    payload = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    ds.PixelData = encapsulate([data]) if data else payload + b"\0" * (len(payload) % 2)
    ds["PixelData"].VR = "OB" if data or ds.BitsAllocated == 8 else "OW"
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def save(ds, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True)
    return path


def recode(source, target, name):
    """Let gdcm write `source` again in the transfer syntax that it calls `name`."""
    gdcm = pytest.importorskip("gdcm")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return target


def usual_chain(path):
    """What most notebooks do, on the whole image in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(np.float64)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        values = np.amax(values) - values
    values = values - np.min(values)
    return (values / np.max(values) * 255).astype(np.uint8)


def check_against_pydicom(path, monkeypatch):
    """The short way and pydicom's agree in pixels, dtype, image and header; returns the image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pydicom.dcmread(path).pixel_array
    ways = []
    for short in (True, False):
        with monkeypatch.context() as patch:
            if not short:
                patch.setattr(dicom_fast, "read", lambda path: None)
                patch.setattr(dicom_fast, "parse_header", lambda head: None)
            pixels = dicom.read_pixels(path)
            assert pixels.dtype == expected.dtype
            np.testing.assert_array_equal(pixels, expected)
            ways.append((dicom.read_image(path), dicom.read_header(path)))
    np.testing.assert_array_equal(ways[0][0], ways[1][0])
    assert ways[0][1] == ways[1][1]
    assert ways[0][0].dtype == np.uint8 and ways[0][0].flags.c_contiguous and ways[0][0].flags.writeable
    return ways[0][0]


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize(("allocated", "stored", "signed"), DEPTHS)
def test_uncompressed_files_read_as_pydicom_reads_them(syntax, allocated, stored, signed, tmp_path, monkeypatch):
    pixels = picture(stored, signed).astype(f"{'i' if signed else 'u'}{allocated // 8}")
    for number, elements in enumerate(
        (
            {"PatientID": "P 1", "PatientAge": "058Y", "PatientSex": "F", "ViewPosition": "PA", "Modality": "CR"},
            {"PhotometricInterpretation": "MONOCHROME1"},
            {"WindowCenter": 2**stored // 3, "WindowWidth": 2**stored // 2},
            {"WindowCenter": [40, 9], "WindowWidth": [99, 9], "RescaleSlope": "-1.5", "RescaleIntercept": "7"},
            {"WindowCenter": 50, "WindowWidth": 60, "VOILUTFunction": "SIGMOID", "RescaleSlope": 1},
            {"RescaleSlope": 1, "RescaleIntercept": 0, "PhotometricInterpretation": "MONOCHROME1"},
        )
    ):
        path = save(dataset(pixels, stored, syntax, **elements), tmp_path / f"{number}.dcm")
        image = check_against_pydicom(path, monkeypatch)
        short = syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian)
        assert (dicom_fast.read(path) is not None) == short
        if stored == 8 and not signed and "WindowCenter" not in elements:
            kept = pixels.astype(np.uint8)
            np.testing.assert_array_equal(image, 255 - kept if number in (1, 5) else kept)
        else:
            np.testing.assert_array_equal(image, usual_chain(path))


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"])
@pytest.mark.parametrize(("allocated", "stored", "signed"), [(8, 8, 0), (16, 12, 0), (16, 16, 0), (16, 16, 1)])
def test_lossless_compression_gives_back_the_pixels(name, allocated, stored, signed, tmp_path, monkeypatch):
    if name == "JPEGLSLossless" and signed:
        pytest.skip("gdcm does not write signed JPEG-LS")
    pixels = picture(stored, signed, (40, 37))
    source = save(dataset(pixels, stored), tmp_path / "raw.dcm")
    path = recode(source, tmp_path / "packed.dcm", name)
    np.testing.assert_array_equal(dicom.read_pixels(path), pixels)
    image = check_against_pydicom(path, monkeypatch)
    np.testing.assert_array_equal(image, dicom.read_image(source))


def test_openjpeg_and_rle_as_pydicom_writes_them(tmp_path, monkeypatch):
    for syntax in (JPEG2000Lossless, RLELossless):
        pixels = picture(12, shape=(90, 80))
        ds = dataset(pixels, 12)
        ds.compress(syntax)
        path = save(ds, tmp_path / "packed.dcm")
        assert dicom_fast.read(path) is None
        np.testing.assert_array_equal(dicom.read_pixels(path), pixels)
        check_against_pydicom(path, monkeypatch)


def test_baseline_jpeg_keeps_the_decoded_values(tmp_path, monkeypatch):
    pixels = picture(8, shape=(64, 48))
    stream = cv2.imencode(".jpg", pixels)[1].tobytes()
    plain = save(dataset(pixels, 8, JPEGBaseline8Bit, stream), tmp_path / "a.dcm")
    assert dicom_fast.read(plain) is not None
    image = check_against_pydicom(plain, monkeypatch)
    np.testing.assert_array_equal(image, pydicom.dcmread(plain).pixel_array)
    inverse = dataset(pixels, 8, JPEGBaseline8Bit, stream, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(check_against_pydicom(save(inverse, tmp_path / "b.dcm"), monkeypatch), 255 - image)
    windowed = dataset(pixels, 8, JPEGBaseline8Bit, stream, WindowCenter=100, WindowWidth=80)
    path = save(windowed, tmp_path / "c.dcm")
    np.testing.assert_array_equal(check_against_pydicom(path, monkeypatch), usual_chain(path))
    halves = dataset(pixels, 8, JPEGBaseline8Bit, stream)
    halves.PixelData = encapsulate([stream], fragments_per_frame=2)
    path = save(halves, tmp_path / "d.dcm")
    assert dicom_fast.read(path) is None
    np.testing.assert_array_equal(check_against_pydicom(path, monkeypatch), image)


def test_window_by_hand(tmp_path):
    """PS3.3 C.11.2.1.2.1, centre 5 and width 5: x ≤ 2.5 is 0, x > 6.5 full, between ((x - 4.5) / 4 + 0.5)."""
    pixels = np.array([[0, 2, 3], [5, 6, 7]], np.uint16)
    path = save(dataset(pixels, 12, WindowCenter=5, WindowWidth=5), tmp_path / "a.dcm")
    expected = np.array([[0, 0, 0.125 * 255], [0.625 * 255, 0.875 * 255, 255]]).astype(np.uint8)
    np.testing.assert_array_equal(dicom.read_image(path), expected)
    path = save(dataset(pixels, 12, PhotometricInterpretation="MONOCHROME1"), tmp_path / "b.dcm")
    np.testing.assert_array_equal(dicom.read_image(path), [[255, 182, 145], [72, 36, 0]])  # trunc((7 - x) / 7 * 255)
    path = save(dataset(np.full((3, 4), 9, np.uint16)), tmp_path / "constant.dcm")
    assert not dicom.read_image(path).any()


def lookup(values, first, bits=16):
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item.add_new("LUTData", "US", [int(value) for value in values])
    return Sequence([item])


def test_tables_that_turn_back_follow_the_usual_chain(tmp_path, monkeypatch):
    pixels = picture(8).astype(np.uint16)
    there_and_back = np.concatenate([np.arange(0, 4000, 40), np.arange(3000, 0, -30)])
    for number, elements in enumerate(
        (
            {"VOILUTSequence": lookup(there_and_back, 20)},
            {"ModalityLUTSequence": lookup(there_and_back, 0), "PhotometricInterpretation": "MONOCHROME1"},
            {"VOILUTSequence": lookup(there_and_back, 20), "WindowCenter": 3, "WindowWidth": 9},
        )
    ):
        path = save(dataset(pixels, 12, **elements), tmp_path / f"{number}.dcm")
        np.testing.assert_array_equal(check_against_pydicom(path, monkeypatch), usual_chain(path))
    even = np.array([[0, 2], [4, 2]], np.uint16)  # the peak at 1 does not occur, so it must not set the scale
    path = save(dataset(even, 12, VOILUTSequence=lookup([10, 4095, 20, 3000, 30], 0)), tmp_path / "gap.dcm")
    np.testing.assert_array_equal(dicom.read_image(path), [[0, 127], [255, 127]])


@settings(max_examples=30, deadline=None)
@given(
    signed=st.booleans(),
    inverted=st.booleans(),
    slope=st.sampled_from([1.0, -1.0, 0.37, 2.5]),
    intercept=st.integers(-2000, 2000),
    center=st.integers(-3000, 5000),
    width=st.integers(2, 6000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    seed=st.integers(0, 99),
)
def test_one_value_at_a_time_equals_the_whole_image(signed, inverted, slope, intercept, center, width, function, seed):
    low = -2048 if signed else 0
    pixels = np.random.default_rng(seed).integers(low, low + 4096, (9, 11)).astype("i2" if signed else "u2")
    ds = dataset(
        pixels,
        12,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        WindowCenter=center,
        WindowWidth=width,
        VOILUTFunction=function,
        PhotometricInterpretation="MONOCHROME1" if inverted else "MONOCHROME2",
    )
    with np.errstate(over="ignore"):
        values = apply_voi_lut(apply_modality_lut(pixels, ds), ds)
    values = np.amax(values) - values if inverted else values
    values = values - np.min(values)
    expected = (values / np.max(values) * 255).astype(np.uint8) if values.any() else np.zeros(pixels.shape, np.uint8)
    np.testing.assert_array_equal(dicom.to_uint8(pixels, 12, inverted, ds), expected)


def test_colour_becomes_grey(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (10, 12, 3)).astype(np.uint8)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    np.testing.assert_array_equal(dicom.read_image(save(dataset(rgb), tmp_path / "rgb.dcm")), grey)
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 100
    assert (dicom.read_image(save(dataset(red), tmp_path / "red.dcm")) == 30).all()  # 0.299 × 100
    ybr = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    path = save(dataset(ybr, PhotometricInterpretation="YBR_FULL"), tmp_path / "ybr.dcm")
    assert np.abs(dicom.read_image(path).astype(int) - grey).max() <= 2
    smooth = np.dstack([picture(8, shape=(32, 32))] * 3)
    stream = cv2.imencode(".jpg", smooth)[1].tobytes()
    path = save(
        dataset(smooth, 8, JPEGBaseline8Bit, stream, PhotometricInterpretation="YBR_FULL_422"), tmp_path / "jpeg.dcm"
    )
    assert np.abs(dicom.read_image(path).astype(int) - smooth[..., 0]).max() <= 8


def test_png_and_jpeg_by_content(tmp_path):
    grey8, grey16 = picture(8), picture(16)
    bgr = np.random.default_rng(1).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    bgra = np.dstack([bgr, np.full(bgr.shape[:2], 7, np.uint8)])
    stretched = ((grey16 - np.float64(grey16.min())) / (int(grey16.max()) - int(grey16.min())) * 255).astype(np.uint8)
    for image, suffix, expected in (
        (grey8, ".png", grey8),
        (grey16, ".png", stretched),
        (bgr, ".png", cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)),
        (bgra, ".png", cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)),
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
    expected = dicom.read_image(save(dataset(values, 12, PhotometricInterpretation="MONOCHROME1"), tmp_path / "a.dcm"))
    for name in ("JPCLN001.IMG", "JPCNN001.img", "c.Img"):
        values.astype(">u2").tofile(tmp_path / name)
        image, header = dicom.read_image_and_header(tmp_path / name)
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        np.testing.assert_array_equal(image, expected)
        assert list(image[0, :3]) == [255, 191, 0]  # (4095 - 1023) / 4095 × 255 = 191.3
        assert header == dicom.read_header(tmp_path / name) | {"colour": 0.0}
        assert (header["width"], header["height"], header["patient_id"]) == (2048, 2048, "")
    (tmp_path / "faint.IMG").write_bytes(np.tile(np.array([900, 1000, 1100, 1300], ">u2"), 2**20).tobytes())
    assert list(dicom.read_image(tmp_path / "faint.IMG")[5, :4]) == [255, 191, 127, 0]  # stretched: 300 / 400 × 255
    grey = picture(8)
    for name, data in (("png.IMG", cv2.imencode(".png", grey)[1].tobytes()), ("dicom.IMG", None)):
        if data is None:
            save(dataset(grey), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(dicom.read_image(tmp_path / name), grey)
        assert dicom.read_header(tmp_path / name)["width"] == grey.shape[1]


def test_colour_share_by_hand():
    image = np.full((10, 10, 3), 100, np.uint8)
    assert dicom.colour_share(image[..., 0]) == dicom.colour_share(image) == 0
    image[:2, :5] = 80, 110, 110  # as light as the rest, and R - G or B - G is 30 off its median
    assert dicom.colour_share(image) == dicom.colour_share(image[..., ::-1]) == 0.1
    assert dicom.colour_share(np.dstack([image, np.full((10, 10), 9, np.uint8)])) == 0.1
    assert (
        dicom.colour_share(image.astype(np.uint16) << 8) == dicom.colour_share(image.astype(np.uint16) << 4, 12) == 0.1
    )
    for off, share in ((12, 0.0), (13, 0.1)):
        image[:2, :5] = 100 + off, 100, 100 - off
        assert dicom.colour_share(image) == share
    image[:2, :5] = 90, 0, 0  # another lightness: then it is that lightness's tint
    assert dicom.colour_share(image) == 0
    assert dicom.colour_share(np.zeros((1, 700, 3), np.uint8)) == 0
    wide = np.full((300, 1024, 3), 50, np.uint8)
    wide[:, :256] = 60, 90, 0
    assert dicom.colour_share(wide) == 0.25


@settings(max_examples=40, deadline=None)
@given(gains=st.tuples(*[st.floats(0, 1.5)] * 3), offsets=st.tuples(*[st.floats(0, 60)] * 3), power=st.floats(0.5, 2))
def test_tints_are_no_colour(gains, offsets, power):
    grey = picture(8, shape=(150, 130)) / 255.0
    tinted = np.dstack([grey * gain * 255 + offset for gain, offset in zip(gains, offsets, strict=True)]).clip(0, 255)
    assert dicom.colour_share(tinted.astype(np.uint8)) == 0
    curved = np.dstack([grey, grey ** ((1 + power) / 2), grey**power]) * 255
    assert dicom.colour_share(curved.astype(np.uint8)) < dicom.COLOUR_LIMIT / 10


def saved_as_jpeg(image, quality):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_UNCHANGED)


def test_photographs_are_told(tmp_path):
    for number, photograph in enumerate(load_sample_images().images):
        save(dataset(photograph), tmp_path / "photo.dcm")
        cv2.imwrite(str(tmp_path / "photo.png"), photograph[..., ::-1].astype(np.uint16) << 8)
        cv2.imwrite(str(tmp_path / "photo.jpg"), photograph[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 50])
        shares = [
            dicom.read_image_and_header(tmp_path / f"photo.{kind}")[1]["colour"] for kind in ("dcm", "png", "jpg")
        ]
        assert min(shares) > 2 * dicom.COLOUR_LIMIT and max(shares) - min(shares) < 0.05, number
        grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
        cv2.imwrite(str(tmp_path / "grey.jpg"), cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR))
        assert dicom.read_image_and_header(tmp_path / "grey.jpg")[1]["colour"] == 0


@pytest.mark.parametrize(("name", "folder"), [("covid19", "images"), ("chestxray14", "images_001/images")])
def test_real_radiographs_are_no_colour_pictures_however_they_were_saved(name, folder):
    root = real_data(name)
    if root is None:
        pytest.skip(f"no real {name} radiographs (CXR_REAL_DATA)")
    for path in sorted((root / folder).iterdir())[::25]:
        grey, header = dicom.read_image_and_header(path)
        assert header["colour"] <= dicom.COLOUR_LIMIT
        rgb = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
        sepia = (rgb * np.array([0.937, 1.2, 1.351])).clip(0, 255).astype(np.uint8)
        blue = (rgb * np.array([1.1, 0.9, 0.75]) + [30, 0, 0]).clip(0, 255).astype(np.uint8)
        assert dicom.colour_share(saved_as_jpeg(rgb, 60)) == 0
        for tinted in (rgb, sepia, blue):
            for quality in (90, 60, 30):
                assert dicom.colour_share(saved_as_jpeg(tinted, quality)) < dicom.COLOUR_LIMIT / 2
            height, width = grey.shape
            marked, thick = tinted.copy(), max(1, width // 200)
            cv2.arrowedLine(marked, (width // 4, height // 4), (width // 2, height // 2), (0, 0, 255), thick)
            cv2.circle(marked, (width // 2, 2 * height // 3), width // 10, (0, 255, 0), thick)
            cv2.putText(marked, "L  AP 12:30", (width // 10, height // 8), 0, width / 600, (0, 255, 255), thick)
            assert dicom.colour_share(saved_as_jpeg(marked, 60)) < dicom.COLOUR_LIMIT


def test_high_bits_that_are_not_used_are_dropped(tmp_path, monkeypatch):
    for kind, low in (("u2", 0), ("i2", -2048)):
        clean = picture(12, int(low < 0))
        dirty = ((clean.astype(np.int32) & 0xFFF) | 0x5000).astype(np.uint16).view(kind)
        path = save(dataset(dirty, 12), tmp_path / f"{kind}.dcm")
        assert dicom_fast.read(path) is not None
        check_against_pydicom(path, monkeypatch)
        np.testing.assert_array_equal(dicom.read_pixels(path), clean)


def test_unusual_headers_are_left_to_pydicom(tmp_path, monkeypatch):
    inner = Dataset()
    inner.CodeValue = "x"
    pixels = picture(12)
    with_sequence = dataset(pixels, 12, ProcedureCodeSequence=Sequence([inner]))
    assert dicom_fast.read(save(with_sequence, tmp_path / "defined.dcm")) is not None
    with_sequence["ProcedureCodeSequence"].is_undefined_length = True
    unusual = {"undefined": with_sequence}
    unusual["name"] = dataset(pixels, 12, SpecificCharacterSet="ISO_IR 192", PatientID="Müller")
    unusual["several"] = dataset(pixels, 12, PatientID="a\\b")
    unusual["padded"] = dataset(pixels, 12)
    unusual["padded"].PixelData += b"\0" * 6
    unusual["high bit"] = dataset(pixels, 12, HighBit=15)
    for name, ds in unusual.items():
        path = save(ds, tmp_path / f"{name}.dcm")
        assert dicom_fast.read(path) is None, name
        check_against_pydicom(path, monkeypatch)
    assert dicom.read_header(tmp_path / "name.dcm")["patient_id"] == "Müller"


@pytest.mark.parametrize(
    ("text", "years"),
    [("058Y", 58), ("58", 58), ("041", 41), ("7Y", 7), ("006M", 0), ("030M", 2), ("104W", 2), ("", None), ("x", None)],
)
def test_ages(text, years, tmp_path):
    assert dicom.parse_age(text) == years
    ds = dataset(picture(12), 12)
    ds.add_new("PatientSex", "CS", "M")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.PatientAge = text
    assert dicom.read_header(save(ds, tmp_path / "a.dcm"))["patient_age"] == years


def test_header_names(tmp_path):
    path = save(dataset(picture(12), 12, Modality="DX", ViewPosition="AP"), tmp_path / "a.dcm")
    header = dicom.read_header(path)
    assert header == {
        "width": 18,
        "height": 23,
        "patient_id": "",
        "patient_age": None,
        "patient_sex": "",
        "view_position": "AP",
        "modality": "DX",
        "photometric": "MONOCHROME2",
        "transfer_syntax": "Explicit VR Little Endian",
    }
    assert dicom.read_image_and_header(path)[1] == header | {"colour": 0.0}


def test_reading_is_quiet_and_leaves_pydicom_as_it_was(tmp_path, caplog, capfd):
    ds = dataset(picture(12), 12, ExplicitVRBigEndian)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.PatientAge, ds.StudyDate, ds.PatientID = "41", "yesterday", "a" * 99
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


def broken_files(folder):
    """(path, text of the error) of files that must be refused."""
    pixels = picture(12)
    stream = cv2.imencode(".jpg", picture(8))[1].tobytes()
    no_pixels, palette = dataset(pixels, 12), dataset(picture(8), PhotometricInterpretation="PALETTE COLOR")
    del no_pixels.PixelData
    short, double = dataset(pixels, 12), dataset(pixels, 12)
    short.PixelData = short.PixelData[:-2]
    double.PixelData += double.PixelData
    films = dataset(np.concatenate([pixels, pixels]), 12, NumberOfFrames=2, Rows=pixels.shape[0])
    wrong_size = dataset(picture(8), 8, JPEGBaseline8Bit, stream, Rows=99)
    wide = dataset(pixels.astype(np.uint32), 32)
    for name, ds, text in (
        ("no_pixels", no_pixels, "no pixel data"),
        ("short", short, "less than expected"),
        ("double", double, "more than one image"),
        ("films", films, "2 frames"),
        ("wrong_size", wrong_size, "cannot be read"),
        ("palette", palette, "PALETTE COLOR"),
        ("wide", wide, "up to 16 bits"),
        ("narrow_window", dataset(pixels, 12, WindowCenter=5, WindowWidth=0), "Window Width"),
        ("cut_stream", dataset(picture(8), 8, JPEGBaseline8Bit, stream[:200]), "cut short"),
    ):
        yield save(ds, folder / f"{name}.dcm"), text
    png = cv2.imencode(".png", picture(8))[1].tobytes()
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 4
    for name, data, text in (
        ("empty", b"", "empty file"),
        ("text", b"image_id,label\n" * 40, "not a DICOM, PNG or JPEG"),
        ("cut_png", png[:-20], "cut short"),
        ("damaged_png", bytes(flipped), "checksum"),
        ("cut_jpeg", stream[:-30], "cut short"),
        ("short.IMG", bytes(2 * 2048 * 2047), "8,384,512 bytes, a raw .IMG file of the JSRT database has 8,388,608"),
        ("empty.img", b"", "0 bytes, a raw .IMG file"),
        ("little_endian.IMG", np.full(2048**2, 4000, "<u2").tobytes(), "values up to 40975"),
    ):
        (folder / name).write_bytes(data)
        yield folder / name, text
    yield folder / "missing", "no such file"
    yield folder, "Is a directory"


def test_what_cannot_be_used_is_named(tmp_path, capfd):
    for path, text in broken_files(tmp_path):
        with pytest.raises(InputError) as caught:
            dicom.read_image(path)
        assert str(path) in str(caught.value) and text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not a DICOM"):
        dicom.read_pixels(tmp_path / "text")
    for name, text in (("missing", "no such file"), ("missing.IMG", "no such file"), ("short.IMG", "8,384,512 bytes")):
        with pytest.raises(InputError, match=text):
            dicom.read_header(tmp_path / name)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "kind", ["raw", "jpeg", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"]
)
def test_a_file_cut_anywhere_is_refused(kind, tmp_path):
    pixels = picture(8, shape=(40, 37))
    stream = cv2.imencode(".jpg", pixels)[1].tobytes()
    ds = dataset(pixels, 8, JPEGBaseline8Bit, stream) if kind == "jpeg" else dataset(pixels)
    whole = save(ds, tmp_path / "whole.dcm")
    if kind not in ("raw", "jpeg"):
        whole = recode(whole, tmp_path / "packed.dcm", kind)
    data = whole.read_bytes()
    dicom.read_image(whole)
    for end in [*range(0, len(data) - 24, 61), len(data) - 24]:
        cut = tmp_path / "cut.dcm"
        cut.write_bytes(data[:end])
        with pytest.raises(InputError, match=r"cut\.dcm"):
            dicom.read_image(cut)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_damaged_headers_never_escape_as_another_error(data, tmp_path_factory):
    """Bytes changed in the header give the same as pydicom or an InputError, from the short way too."""
    buffer = io.BytesIO()
    dataset(picture(12), 12, PatientAge="041Y", WindowCenter=99, WindowWidth=100).save_as(
        buffer, enforce_file_format=True
    )
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(132, len(raw) - 830))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.dcm"
    path.write_bytes(raw)
    try:
        pixels = dicom.read_pixels(path)
        dicom.read_image(path)
        dicom.read_header(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    with dicom._quiet():
        np.testing.assert_array_equal(pixels, pydicom.dcmread(path).pixel_array)


@pytest.mark.parametrize(
    ("name", "pattern"), [("siim_pneumothorax", "dicom-*/*/*/*.dcm"), ("vinbigdata", "t*/*.dicom")]
)
def test_real_radiographs_read_as_pydicom_reads_them(name, pattern, monkeypatch):
    root = real_data(name)
    if root is None:
        pytest.skip(f"no real {name} radiographs (CXR_REAL_DATA)")
    headers = {path: dicom.read_header(path) for path in sorted(root.glob(pattern))}
    raw = [path for path, header in headers.items() if "JPEG" not in header["transfer_syntax"]]
    for path in raw + list(headers)[::12]:
        assert dicom_fast.read(path) is not None
        image = check_against_pydicom(path, monkeypatch)
        if path in raw:
            np.testing.assert_array_equal(image, usual_chain(path))
        elif name == "siim_pneumothorax":
            np.testing.assert_array_equal(image, dicom.read_pixels(path))
