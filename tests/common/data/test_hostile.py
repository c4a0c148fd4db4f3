"""Images that would end the process, fill the memory, or be read as other pixels."""

import subprocess
import sys
import zlib
from struct import pack

import cv2
import numpy as np
import pytest
from pydicom import uid

from common.data import dicom, guard, jpeg
from common.data.grey import hash_pixels
from common.errors import InputError
from tests.dicoms import GDCM, dataset, deadly, picture, read_pixels, recode, save
from tests.fuzzing import COUNT, survive

DAMAGED = r"Corrupt JPEG data|Premature end of JPEG|the JPEG is (damaged|cut short)"


def encode(pixels):
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def test_a_crash_costs_one_file(tmp_path):
    path = deadly(tmp_path / "a.dcm")
    good = recode(save(dataset(picture(12), 12), tmp_path / "raw.dcm"), tmp_path / "good.dcm", "JPEGLSLossless")
    for _ in range(2):
        with pytest.raises(InputError, match=r"a\.dcm: cannot be read \(the decoder crashed, with status -6\)"):
            dicom.read_image(path)
        np.testing.assert_array_equal(read_pixels(good), picture(12))
    assert len(guard._idle) == 1  # one process decodes all files of a thread
    guard._idle[0].kill()
    guard._idle[0].wait()
    np.testing.assert_array_equal(read_pixels(good), picture(12))  # another is started


def test_a_decoder_that_dies_within_the_pixels_gives_no_image(monkeypatch):
    code = """print('{"shape": [2, 2], "dtype": "|u1"}\\nab', end="")"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    monkeypatch.setattr(guard, "_idle", [])
    monkeypatch.setattr(guard, "_start", lambda: subprocess.Popen([sys.executable, "-c", f"input(); {code}"], **pipes))
    with pytest.raises(ValueError, match="the decoder crashed, with status 0"):
        guard.decode("a.dcm")
    assert not guard._idle


def test_a_decoder_that_hangs_is_ended(tmp_path, monkeypatch):
    good = recode(save(dataset(picture(12), 12), tmp_path / "raw.dcm"), tmp_path / "good.dcm", "JPEGLSLossless")
    monkeypatch.setattr(guard, "SECONDS", 0)
    monkeypatch.setattr(guard, "_idle", [])
    with pytest.raises(InputError, match="takes more than 0 s"):
        read_pixels(good)
    assert not guard._idle


def files_of_110_pixels(folder):
    pixels = picture(8, shape=(10, 11))
    for suffix in (".png", ".jpg"):
        cv2.imwrite(str(folder / f"a{suffix}"), pixels)
        yield folder / f"a{suffix}"
    for syntax in (uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian):
        yield save(dataset(pixels, syntax=syntax), folder / f"{syntax.name}.dcm")
    yield save(dataset(pixels, 8, uid.JPEGBaseline8Bit, encode(pixels)), folder / "jpeg.dcm")
    for name in GDCM:
        yield recode(folder / "Explicit VR Little Endian.dcm", folder / f"{name}.dcm", name)


@pytest.mark.long
def test_damaged_files_by_the_thousand(tmp_path):
    done = survive([dicom.read_image_and_header], list(files_of_110_pixels(tmp_path)))
    assert COUNT // 10 < done < COUNT * 9 // 10


def test_every_format_is_measured_before_it_is_decoded(tmp_path, monkeypatch):
    for path in files_of_110_pixels(tmp_path):
        monkeypatch.setenv("CXR_MAX_PIXELS", "110")
        monkeypatch.setattr(guard, "BYTES_PER_PIXEL", 100)  # headers are not small beside 110 pixels
        assert dicom.read_image(path).shape == (10, 11)
        monkeypatch.setenv("CXR_MAX_PIXELS", "109")
        with monkeypatch.context() as patch, pytest.raises(InputError, match="11x10 pixels, the limit is 109"):
            patch.setattr(jpeg, "decode", None)
            patch.setattr(guard, "decode", None)
            patch.setattr("pydicom.Dataset.pixel_array", None)
            dicom.read_image(path)
        monkeypatch.setattr(guard, "BYTES_PER_PIXEL", 0.5)
        with pytest.raises(InputError, match="larger than"):
            dicom.read_header(path)
    monkeypatch.setenv("CXR_MAX_PIXELS", "many")
    with pytest.raises(InputError, match="CXR_MAX_PIXELS=many: not a number"):
        dicom.read_image(path)


def test_bombs(tmp_path, monkeypatch):
    stream, side = encode(picture(8)), pack(">HH", 30000, 30000)
    frame = stream.index(b"\xff\xc0") + 5
    jpeg_bomb = stream[:frame] + side + stream[frame + 4 :]
    png = cv2.imencode(".png", picture(8))[1].tobytes()
    header = b"IHDR" + pack(">II", 30000, 30000) + png[24:29]
    png_bomb = png[:12] + header + pack(">I", zlib.crc32(header)) + png[33:]
    for data in (jpeg_bomb, png_bomb):
        (tmp_path / "a").write_bytes(data)
        for read in (dicom.read_image, dicom.read_header):
            with pytest.raises(InputError, match="30000x30000 pixels, the limit is 200,000,000"):
                read(tmp_path / "a")
    path = save(dataset(picture(8), 8, uid.JPEGBaseline8Bit, jpeg_bomb), tmp_path / "a.dcm")
    with pytest.raises(InputError, match="has 30000x30000x1 values, the header names 23x18x1"):
        dicom.read_image(path)
    ds = dataset(picture(8), syntax=uid.DeflatedExplicitVRLittleEndian)
    ds.add_new(0x00091001, "OB", bytes(1 << 26))
    path = save(ds, tmp_path / "deflated.dcm")
    assert dicom.read_header(path)["height"] == 23
    monkeypatch.setenv("CXR_MAX_PIXELS", "1000000")
    with pytest.raises(InputError, match="inflates to more"):
        dicom.read_header(path)


def damaged_jpegs():
    data = encode(cv2.resize(picture(8), (300, 300), interpolation=cv2.INTER_CUBIC))
    start, end = len(data) * 4 // 10, len(data) * 7 // 10
    yield "hole", data[:start] + bytes(end - start) + data[end:]
    yield "piece missing", data[:start] + data[end:]
    yield "cut", data[:end]
    yield "no scan", data[: data.index(b"\xff\xda")] + b"\xff\xd9"
    yield "no marker", data[:20] + b"\0" + data[20:]


@pytest.mark.parametrize(("name", "data"), list(damaged_jpegs()))
def test_damaged_jpegs_are_refused(name, data, tmp_path, capfd):
    (tmp_path / "a.jpg").write_bytes(data)
    pixels = np.zeros((300, 300), np.uint8)
    fast = save(dataset(pixels, 8, uid.JPEGBaseline8Bit, data), tmp_path / "a.dcm")
    slow = save(dataset(pixels, 8, uid.JPEGBaseline8Bit, data, PatientID="Müller"), tmp_path / "b.dcm")
    for path in (tmp_path / "a.jpg", fast, slow):
        with pytest.raises(InputError, match=DAMAGED):
            dicom.read_image(path)
    assert capfd.readouterr() == ("", "")


def add_segment(data, marker, content):
    return data[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


ODDITIES = {  # libjpeg warns of them, and then no more of anything
    "JFIF version": lambda data: data[:11] + b"\2" + data[12:],
    "colour profile": lambda data: add_segment(data, 0xE2, b"ICC_PROFILE\0\5\2" + bytes(20)),
    "Adobe transform": lambda data: add_segment(data[:2] + data[20:], 0xEE, b"Adobe\0\x64\0\0\0\0\7"),
    "Adobe transform of four colours": lambda data: add_segment(data[:2] + data[20:], 0xEE, b"Adobe\0\x64\0\0\0\0\2"),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_a_harmless_warning_does_not_hide_damage(oddity, tmp_path):
    grey = cv2.resize(picture(8), (300, 300), interpolation=cv2.INTER_CUBIC)
    for pixels in (grey, cv2.applyColorMap(grey, cv2.COLORMAP_JET)):
        data = encode(pixels)
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        odd = ODDITIES[oddity](data)
        assert odd != data
        np.testing.assert_array_equal(jpeg.decode(odd), expected)
        at = len(odd) // 2
        with pytest.raises(ValueError, match=DAMAGED):
            jpeg.decode(odd[:at] + b"\x12\x34\x56\x78" + odd[at + 200 :])


def test_what_follows_a_jpegs_end_is_ignored(tmp_path):
    data = encode(picture(8))
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    for trailer in (b"", bytes(5000), b"MotionPhoto\xff\xda\xff\xd9\xff\xda", data, data[:99]):
        (tmp_path / "a.jpg").write_bytes(data + trailer)
        np.testing.assert_array_equal(dicom.read_image(tmp_path / "a.jpg"), expected)
    revision = bytearray(data)
    revision[11] = 9  # libjpeg warns of an unknown JFIF revision
    np.testing.assert_array_equal(jpeg.decode(bytes(revision)), expected)
    progressive = cv2.imencode(".jpg", picture(8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 1])
    assert jpeg.read_shape(progressive[1].tobytes()) == (23, 18, 1)


def test_hash_of_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (9, 15), np.uint8)
    seen = {hash_pixels(image), hash_pixels(image.reshape(15, 9)), hash_pixels(image[:, ::-1])}
    for at in range(image.size):
        changed = image.copy()
        changed.reshape(-1)[at] ^= 128
        seen.add(hash_pixels(changed))
    assert len(seen) == image.size + 3 and all(len(digest) == 16 for digest in seen)
    assert hash_pixels(np.asfortranarray(image)) == hash_pixels(image)
