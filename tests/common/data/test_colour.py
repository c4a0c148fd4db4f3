"""Colour: conversion to grey, and the share of pixels that a tint does not explain."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import JPEGBaseline8Bit
from sklearn.datasets import load_sample_images

from benchmarks.tables import real_data
from common.data.dicom import COLOUR_LIMIT, read_image, read_image_and_header
from common.data.grey import colour_share
from tests.dicoms import dataset, picture, save


def test_colour_becomes_grey(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (10, 12, 3)).astype(np.uint8)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    np.testing.assert_array_equal(read_image(save(dataset(rgb), tmp_path / "rgb.dcm")), grey)
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 100
    assert (read_image(save(dataset(red), tmp_path / "red.dcm")) == 30).all()  # 0.299 × 100
    ybr = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    path = save(dataset(ybr, PhotometricInterpretation="YBR_FULL"), tmp_path / "ybr.dcm")
    assert np.abs(read_image(path).astype(int) - grey).max() <= 2
    smooth = np.dstack([picture(8, shape=(32, 32))] * 3)
    stream = cv2.imencode(".jpg", smooth)[1].tobytes()
    ds = dataset(smooth, 8, JPEGBaseline8Bit, stream, PhotometricInterpretation="YBR_FULL_422")
    assert np.abs(read_image(save(ds, tmp_path / "jpeg.dcm")).astype(int) - smooth[..., 0]).max() <= 8


def test_colour_share_by_hand():
    image = np.full((10, 10, 3), 100, np.uint8)
    assert colour_share(image[..., 0]) == colour_share(image) == 0
    image[:2, :5] = 80, 110, 110  # as light as the rest, and R - G or B - G is 30 off its median
    assert colour_share(image) == colour_share(image[..., ::-1]) == 0.1
    assert colour_share(np.dstack([image, np.full((10, 10), 9, np.uint8)])) == 0.1
    wider = image.astype(np.uint16)
    assert colour_share(wider << 8) == colour_share(wider << 4, 12) == 0.1
    for off, share in ((12, 0.0), (13, 0.1)):
        image[:2, :5] = 100 + off, 100, 100 - off
        assert colour_share(image) == share
    image[:2, :5] = 90, 0, 0  # another lightness: then it is that lightness's tint
    assert colour_share(image) == colour_share(np.zeros((1, 700, 3), np.uint8)) == 0
    wide = np.full((300, 1024, 3), 50, np.uint8)
    wide[:, :256] = 60, 90, 0
    assert colour_share(wide) == 0.25


@settings(max_examples=40, deadline=None)
@given(gains=st.tuples(*[st.floats(0, 1.5)] * 3), offsets=st.tuples(*[st.floats(0, 60)] * 3), power=st.floats(0.5, 2))
def test_tints_are_no_colour(gains, offsets, power):
    grey = picture(8, shape=(150, 130)) / 255.0
    tinted = np.dstack([grey * gain * 255 + offset for gain, offset in zip(gains, offsets, strict=True)]).clip(0, 255)
    assert colour_share(tinted.astype(np.uint8)) == 0
    curved = np.dstack([grey, grey ** ((1 + power) / 2), grey**power]) * 255
    assert colour_share(curved.astype(np.uint8)) < COLOUR_LIMIT / 10


def through_jpeg(image, quality):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_UNCHANGED)


def test_photographs_are_recognised(tmp_path):
    for photograph in load_sample_images().images:
        save(dataset(photograph), tmp_path / "photo.dcm")
        cv2.imwrite(str(tmp_path / "photo.png"), photograph[..., ::-1].astype(np.uint16) << 8)
        cv2.imwrite(str(tmp_path / "photo.jpg"), photograph[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 50])
        shares = [read_image_and_header(tmp_path / f"photo.{kind}")[1]["colour"] for kind in ("dcm", "png", "jpg")]
        assert min(shares) > 2 * COLOUR_LIMIT and max(shares) - min(shares) < 0.05
        grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
        cv2.imwrite(str(tmp_path / "grey.jpg"), cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR))
        assert read_image_and_header(tmp_path / "grey.jpg")[1]["colour"] == 0


@pytest.mark.parametrize(("name", "folder"), [("covid19", "images"), ("chestxray14", "images_001/images")])
def test_real_radiographs_are_no_colour_pictures_however_they_were_saved(name, folder):
    root = real_data(name)
    if root is None:
        pytest.skip(f"no real {name} radiographs (CXR_REAL_DATA)")
    for path in sorted((root / folder).iterdir())[::25]:
        grey, header = read_image_and_header(path)
        assert header["colour"] <= COLOUR_LIMIT
        rgb = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
        sepia = (rgb * np.array([0.937, 1.2, 1.351])).clip(0, 255).astype(np.uint8)
        blue = (rgb * np.array([1.1, 0.9, 0.75]) + [30, 0, 0]).clip(0, 255).astype(np.uint8)
        assert colour_share(through_jpeg(rgb, 60)) == 0
        height, width = grey.shape
        thick = max(1, width // 200)
        for tinted in (rgb, sepia, blue):
            assert all(colour_share(through_jpeg(tinted, quality)) < COLOUR_LIMIT / 2 for quality in (90, 60, 30))
            cv2.arrowedLine(tinted, (width // 4, height // 4), (width // 2, height // 2), (0, 0, 255), thick)
            cv2.circle(tinted, (width // 2, 2 * height // 3), width // 10, (0, 255, 0), thick)
            cv2.putText(tinted, "L  AP 12:30", (width // 10, height // 8), 0, width / 600, (0, 255, 255), thick)
            assert colour_share(through_jpeg(tinted, 60)) < COLOUR_LIMIT
