"""Damaged and unusable images: one clear error that names the file."""

import io
import os

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEGBaseline8Bit

from common.data import dicom
from common.data.grey import silence_pydicom
from common.errors import InputError
from tests.dicoms import GDCM, dataset, picture, read_pixels, recode, save


def broken_files(folder):
    """Yield (path, text of the error) of files that must be refused."""
    pixels = picture(12)
    stream = cv2.imencode(".jpg", picture(8))[1].tobytes()
    no_pixels, short, double = (dataset(pixels, 12) for _ in range(3))
    del no_pixels.PixelData
    short.PixelData = short.PixelData[:-2]
    double.PixelData += double.PixelData
    films = dataset(np.concatenate([pixels, pixels]), 12, NumberOfFrames=2, Rows=pixels.shape[0])
    for name, ds, text in (
        ("no_pixels", no_pixels, "no pixel data"),
        ("short", short, "less than expected"),
        ("double", double, "more than one image"),
        ("films", films, "2 frames"),
        (
            "wrong_size",
            dataset(picture(8), 8, JPEGBaseline8Bit, stream, Rows=99),
            "has 23x18x1 values, the header names 99x18x1",
        ),
        ("palette", dataset(picture(8), PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR"),
        ("wide", dataset(pixels.astype(np.uint32), 32), "up to 16 bits"),
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
        ("cut_jpeg", stream[:-30], "Premature end of JPEG file"),
        ("short.IMG", bytes(2 * 2048 * 2047), "8,384,512 bytes, a raw .IMG file of the JSRT database has 8,388,608"),
        ("empty.img", b"", "0 bytes, a raw .IMG file"),
        ("little_endian.IMG", np.full(2048**2, 4000, "<u2").tobytes(), "values up to 40975"),
    ):
        (folder / name).write_bytes(data)
        yield folder / name, text
    yield folder / "missing", "no such file"
    yield folder, "not a regular file"
    os.mkfifo(folder / "pipe.png")
    yield folder / "pipe.png", "not a regular file"


def test_unusable_files_are_named(tmp_path, capfd):
    for path, text in broken_files(tmp_path):
        with pytest.raises(InputError) as caught:
            dicom.read_image(path)
        assert str(path) in str(caught.value) and text in str(caught.value) and "\n" not in str(caught.value)
    for name, text in (("missing", "no such file"), ("missing.IMG", "no such file"), ("short.IMG", "8,384,512 bytes")):
        with pytest.raises(InputError, match=text):
            dicom.read_header(tmp_path / name)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["raw", "jpeg", *GDCM])
def test_a_file_cut_anywhere_is_refused(kind, tmp_path):
    pixels = picture(8, shape=(40, 37))
    stream = cv2.imencode(".jpg", pixels)[1].tobytes()
    ds = dataset(pixels, 8, JPEGBaseline8Bit, stream) if kind == "jpeg" else dataset(pixels)
    path = save(ds, tmp_path / "whole.dcm")
    if kind in GDCM:
        path = recode(path, tmp_path / "packed.dcm", kind)
    data = path.read_bytes()
    dicom.read_image(path)
    for end in [*range(0, len(data) - 24, 61), len(data) - 24]:
        (tmp_path / "cut.dcm").write_bytes(data[:end])
        with pytest.raises(InputError, match=r"cut\.dcm"):
            dicom.read_image(tmp_path / "cut.dcm")


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_damaged_headers_never_escape_as_another_error(data, tmp_path_factory):
    """Bytes changed in the header give the same as pydicom or an InputError, from the fast reader too."""
    buffer = io.BytesIO()
    ds = dataset(picture(12), 12, PatientAge="041Y", WindowCenter=99, WindowWidth=100)
    ds.save_as(buffer, enforce_file_format=True)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(132, len(raw) - 830))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.dcm"
    path.write_bytes(raw)
    try:
        pixels = read_pixels(path)
        dicom.read_image(path)
        dicom.read_header(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    with silence_pydicom():
        ds = pydicom.dcmread(path)
        if "TransferSyntaxUID" in ds.file_meta:  # else pydicom gives up
            np.testing.assert_array_equal(pixels, ds.pixel_array)
