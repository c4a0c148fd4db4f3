"""Radiographs from DICOM, PNG, JPEG and raw JSRT files as 8-bit grey images."""

import hashlib
import logging
import os
import re
import threading
import warnings
import zlib
from contextlib import contextmanager
from io import BytesIO
from struct import unpack_from

import cv2
import numpy as np
import pydicom
from numba import njit
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from common.data import dicom_fast, guard, jpeg
from common.errors import InputError

COLOUR_LIMIT = 0.12  # a file whose `colour` is above is a colour picture, not a radiograph

_PNG = b"\x89PNG\r\n\x1a\n"
_JSRT_SIDE, _JSRT_TOP = 2048, 4095  # pixels; the highest of 12 bits
_COLOUR_GRID = 128  # sampled pixels a side
_COLOUR_STEP = 12  # of 255: JPEG distorts the colours of a tint by less
_PLAIN_META = b"\0" * 128 + b"DICM\x02\0\x10\0UI\x14\0" + b"1.2.840.10008.1.2.1\0"  # explicit little endian
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom returns all of these as RGB
_HEADER_TAGS = {
    "patient_id": "PatientID",
    "patient_age": "PatientAge",
    "patient_sex": "PatientSex",
    "view_position": "ViewPosition",
    "modality": "Modality",
    "photometric": "PhotometricInterpretation",
}
_YEARS_PER_UNIT = {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}
_quiet_lock = threading.RLock()


def read_image(path):
    """Return one radiograph as uint8 (H, W), C-contiguous, bright where the patient absorbs.

    The content decides on the format:

    - DICOM: stored values → modality LUT or rescale → VOI LUT, else the first window → inverted if MONOCHROME1 →
      8 bits. An unsigned 8-bit image without any of these mappings keeps its values (MONOCHROME1: 255 - v). All others
      are stretched by trunc((v - min) / (max - min) * 255) in float64; a constant image becomes 0. Colour images are
      converted to RGB and then treated as below, without a window.
    - PNG and JPEG: 8-bit grey is unchanged; colour becomes 0.299 R + 0.587 G + 0.114 B, alpha is dropped; 16 bits are
      stretched as above. EXIF orientation is not applied.
    - Other files named .IMG (in any case): raw files of the JSRT database, 2048 × 2048 big-endian 16-bit values, of
      which 12 bits are used, without a header. Low values absorb, so 4095 - v is stretched as above.

    Raises InputError naming the file if it is missing, cut short, damaged, of another format, has several frames, no
    pixels or more than 200 million of them (environment variable CXR_MAX_PIXELS), or cannot be decoded; a raw file also
    if its length is not 8,388,608 bytes or a value is above 4095 (the other byte order). Source: DICOM PS3.3
    C.7.6.3.1.2, C.11.1, C.11.2; http://db.jsrt.or.jp/eng.php.
    """
    return read_image_and_header(path)[0]


def read_image_and_header(path):
    """Return `read_image(path)` and `read_header(path)`, the latter with "colour", the image's `colour_share`.

    A colour above COLOUR_LIMIT means a colour picture. Raises InputError as the two do.
    """
    with _name_errors(path):
        if not _is_dicom(path):
            image = _read_jsrt(path) if _is_jsrt(path) else _read_file(path)
            return to_uint8(_to_grey(image)), _make_header(image.shape, {}) | {"colour": colour_share(image)}
        pixels, values, dataset = _read_dicom(path)
        header = _make_header(pixels.shape, values) | {"colour": colour_share(pixels, values["bits_stored"])}
        if pixels.ndim == 3:
            return to_uint8(_to_grey(pixels[..., ::-1]), values["bits_stored"]), header
        return to_uint8(pixels, values["bits_stored"], values["photometric"] == "MONOCHROME1", dataset), header


def read_pixels(path):
    """Return a DICOM file's stored values, identical to pydicom's `pixel_array`: (H, W) or (H, W, 3).

    Unsigned or signed, of 8 or 16 bits; read-only where the file is mapped. Raises InputError as `read_image` does.
    """
    with _name_errors(path):
        if not _is_dicom(path):
            raise InputError(f"{path}: not a DICOM file")
        return _read_dicom(path)[0]


def read_header(path):
    """Return a dict of an image file's header, without decoding the pixels.

    Keys: width, height (pixels); patient_id, patient_sex, view_position, modality, photometric, transfer_syntax (name)
    as str, empty where unknown; patient_age in whole years or None. PNG, JPEG and raw files have only the size. Raises
    InputError naming the file.
    """
    with _name_errors(path):
        if not _is_dicom(path):
            if _is_jsrt(path):
                return _make_header((_JSRT_SIDE, _JSRT_SIDE), {})
            return _make_header(_read_size(_read_bytes(path), path, whole=False), {})
        with open(path, "rb") as file:
            found = dicom_fast.parse_header(file.read(1 << 16))
        if found is not None and found[0].get("width") and found[0].get("height"):
            return _make_header((found[0]["height"], found[0]["width"]), found[0])
        with _quiet():
            values = _read_values(_load(path, stop_before_pixels=True), path)
        return _make_header((values["height"], values["width"]), values)


def colour_share(image, bits_stored=None):
    """Return the share (0 to 1) of pixels with a colour that no tint explains.

    image: (H, W), whose share is 0, or (H, W, 3 or 4), unsigned 8 or 16 bits, RGB or BGR; alpha is ignored.
    bits_stored: number of bits used, None for all. A tint gives every lightness one colour. A pixel therefore counts if
    its R - G or B - G differs by more than 12 of 255 from the median over the pixels of about its lightness. At most
    128 × 128 evenly spaced pixels are sampled.
    """
    if image.ndim == 2:
        return 0.0
    step = -(-max(image.shape[:2]) // _COLOUR_GRID)
    sample = image[::step, ::step, :3].reshape(-1, 3).T.astype(np.int32)
    first, green, last = (sample >> max((bits_stored or image.itemsize * 8) - 8, 0)).clip(0, 255)
    lightness = (first + green + last) >> 3  # 96 levels; within one, even a tint of one channel varies by at most 8
    counts = np.bincount(lightness, minlength=96)
    middle = counts.cumsum() - counts // 2 - 1  # position of each level's median among the sorted pixels
    coloured = np.zeros(len(lightness), bool)
    for channel in (first, last):
        difference = channel - green + 256
        pixels = np.sort((lightness << 9 | difference).astype(np.uint16))
        median = pixels[middle].astype(np.int32) & 511
        coloured |= np.abs(difference - median[lightness]) > _COLOUR_STEP
    return float(coloured.mean())


def hash_pixels(image):
    """Return a 64-bit hash of the size and pixels of a grey image, uint8 (H, W), as 16 hexadecimal digits.

    It notices replaced images, ten times as fast as SHA-256; it is no protection from forged ones.
    """
    pixels = np.ascontiguousarray(image).reshape(-1)
    words, rest = np.split(pixels, [image.size // 32 * 32])
    lanes = _mix(words.view(np.uint64).reshape(-1, 4))
    return hashlib.sha256(lanes.tobytes() + rest.tobytes() + repr(image.shape).encode()).hexdigest()[:16]


@njit(cache=True, nogil=True)
def _mix(words):
    factor, shift = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)  # odd, so that every step can be inverted
    a = b = c = d = np.uint64(1)
    for i in range(len(words)):  # four chains, since each step waits for the one before
        a, b = (a ^ words[i, 0]) * factor, (b ^ words[i, 1]) * factor
        c, d = (c ^ words[i, 2]) * factor, (d ^ words[i, 3]) * factor
        a, b, c, d = a ^ a >> shift, b ^ b >> shift, c ^ c >> shift, d ^ d >> shift
    return np.array([a, b, c, d])


def parse_age(text):
    """Return a DICOM age ('058Y', '58', '041', '006M') in whole years, None if it is not one."""
    match = re.fullmatch(r"(\d{1,3})([YMWD]?)", text.strip().upper())
    return int(match[1]) // _YEARS_PER_UNIT[match[2]] if match else None


def to_uint8(pixels, bits_stored=None, inverted=False, dataset=None):
    """Map stored values to 8 bits by the convention of `read_image`.

    pixels: (H, W) integers of 8 or 16 bits. bits_stored: number of bits used, None for all. inverted: True for
    MONOCHROME1. dataset: the pydicom Dataset with the window, rescale or tables, or None. Returns uint8 (H, W).
    """
    pixels = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))
    with _quiet():
        mapped = dataset is not None and _needs_mapping(dataset)
    if not mapped:
        dataset = None
        eight_bit = (bits_stored or pixels.itemsize * 8) == 8 and pixels.dtype.kind == "u"
        if eight_bit and (pixels.itemsize == 1 or pixels.max() <= 255):
            return 255 - pixels.astype(np.uint8) if inverted else np.require(pixels, np.uint8, ["C", "W"])
    low, high = int(pixels.min()), int(pixels.max())
    # the result depends only on the stored value, so the float64 chain runs once a value instead of once a pixel
    stored = np.arange(low, high + 1).astype(pixels.dtype)
    with _quiet():
        mapped = stored if dataset is None else apply_voi_lut(apply_modality_lut(stored, dataset), dataset)
    mapped = mapped.astype(np.float64)
    steps = np.diff(mapped)
    # the extremes of a non-monotonic table may belong to values that do not occur
    ends = mapped[[0, -1]] if (steps >= 0).all() or (steps <= 0).all() else mapped[np.unique(pixels).astype(int) - low]
    if inverted:
        mapped, ends = ends.max() - mapped, ends.max() - ends
    mapped = mapped - ends.min()
    span = ends.max() - ends.min()
    table = np.trunc(np.clip(mapped / span, 0, 1) * 255).astype(np.uint8) if span > 0 else np.zeros(len(mapped), "u1")
    return _look_up(table, low, pixels.reshape(-1)).reshape(pixels.shape)


@njit(cache=True, nogil=True)
def _look_up(table, low, pixels):
    out = np.empty(pixels.size, np.uint8)
    for i in range(pixels.size):
        out[i] = table[np.int64(pixels[i]) - low]
    return out


def _needs_mapping(dataset):
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        rescaled = False
        for keyword in ("RescaleSlope", "RescaleIntercept"):
            dataset.pop(keyword, None)  # pydicom would multiply by the None of an empty element
    else:
        rescaled = (slope, intercept) != (1, 0)
    windowed = dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None
    return rescaled or windowed or bool(dataset.get("ModalityLUTSequence") or dataset.get("VOILUTSequence"))


def _read_dicom(path):
    """Return stored values, header values, and the pydicom dataset if a mapping needs it, else None."""
    found = dicom_fast.read_plain(path)
    if found is not None and not found[1]["mapped"]:
        return *found, None
    with _quiet():
        dataset = _load(path, stop_before_pixels=found is not None)
        values = _read_values(dataset, path)
        if found is None:
            _check_dicom(dataset, path)
    return _decode(dataset, path) if found is None else found[0], values, dataset


def _load(path, **options):
    """Return pydicom's `dcmread(path, **options)`; a deflated file is inflated within the limit on bytes."""
    with open(path, "rb") as file:
        read_preamble(file, force=False)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return pydicom.dcmread(path, **options)
        packed, inflater = file.read(), zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(packed, guard.BYTES_PER_PIXEL * guard.max_pixels())
    if not inflater.eof:
        raise InputError(f"{path}: cut short, or inflates to more bytes than an image has (see CXR_MAX_PIXELS)")
    dataset = pydicom.dcmread(BytesIO(_PLAIN_META + data), **options)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return dataset


def _check_dicom(dataset, path):
    """Raise InputError for an image that is not read, before it is decoded."""
    if "PixelData" not in dataset:
        raise InputError(f"{path}: no pixel data (cut short, or not an image)")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise InputError(f"{path}: {dataset.NumberOfFrames} frames, only single images are read")
    guard.check_size(dataset.Rows, dataset.Columns)
    colour = dataset.SamplesPerPixel != 1
    if dataset.PhotometricInterpretation not in (_COLOURS if colour else ("MONOCHROME1", "MONOCHROME2")):
        raise InputError(f"{path}: photometric interpretation {dataset.PhotometricInterpretation} is not supported")
    if dataset.BitsAllocated > 16 or "PixelRepresentation" not in dataset:
        raise InputError(f"{path}: {dataset.BitsAllocated} bits a pixel, only integers of up to 16 bits are read")


def _decode(dataset, path):
    rows, columns, samples = dataset.Rows, dataset.Columns, dataset.SamplesPerPixel
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax == RLELossless:
        with _quiet():
            pixels = dataset.pixel_array
    else:
        stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
        shape = jpeg.read_shape(stream)
        if shape != (rows, columns, samples):
            found, expected = "x".join(map(str, shape)), f"{rows}x{columns}x{samples}"
            raise InputError(f"{path}: the compressed image has {found} values, the header names {expected}")
        layout = dataset.BitsAllocated, dataset.BitsStored, dataset.PixelRepresentation, samples
        is_plain = syntax == JPEGBaseline8Bit and layout == (8, 8, 0, 1)
        pixels = jpeg.decode(stream) if is_plain else guard.decode(path)
    if pixels.shape[:2] != (rows, columns) or pixels.ndim != 2 + (samples != 1):
        raise InputError(f"{path}: the pixel data hold more than one image of {columns}x{rows}")
    return pixels


def _read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def _read_file(path):
    data = _read_bytes(path)
    _read_size(data, path)
    if data.startswith(jpeg.START):
        return jpeg.decode(data)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise InputError(f"{path}: cannot be decoded")
    return image


def _read_size(data, path, whole=True):
    """Return (height, width) of a PNG or JPEG file. whole: also check its structure up to its end."""
    if data.startswith(_PNG) and len(data) >= 33:
        size = unpack_from(">II", data, 16)[::-1]
        if whole:
            _check_png(data, path)
    elif data.startswith(jpeg.START):
        size = jpeg.read_shape(data, whole)[:2]
    else:
        raise InputError(f"{path}: " + ("empty file" if not data else "not a DICOM, PNG or JPEG file"))
    guard.check_size(*size)
    return size


def _is_jsrt(path):
    """Return whether a file other than DICOM is a raw JSRT file by name and content; raise if its length is wrong."""
    if not str(path).lower().endswith(".img"):
        return False
    with open(path, "rb") as file:
        if file.read(8).startswith((_PNG, jpeg.START)):
            return False
    size, expected = os.path.getsize(path), 2 * _JSRT_SIDE**2
    if size != expected:
        raise InputError(f"{path}: {size:,} bytes, a raw .IMG file of the JSRT database has {expected:,}")
    return True


def _read_jsrt(path):
    values = np.fromfile(path, ">u2").reshape(_JSRT_SIDE, _JSRT_SIDE)
    if values.max() > _JSRT_TOP:
        raise InputError(f"{path}: values up to {values.max()}, a raw .IMG file has 12 bits, big-endian")
    return _JSRT_TOP - values


def _check_png(data, path):
    """Raise InputError unless every critical chunk is intact, because decoders accept damaged files."""
    at, view = len(_PNG), memoryview(data)
    while at + 12 <= len(data):
        length, kind = unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        if kind[0] < ord("a") and zlib.crc32(view[at + 4 : end]) != unpack_from(">I", data, end)[0]:
            raise InputError(f"{path}: the PNG is damaged (checksum of a {kind.decode('latin-1')} chunk)")
        if kind == b"IEND":
            return
        at = end + 4
    raise InputError(f"{path}: the PNG is cut short")


def _to_grey(image):
    """Return a grey, BGR or BGRA image as grey."""
    if image.ndim == 2:
        return image
    code = cv2.COLOR_BGRA2GRAY if image.shape[2] == 4 else cv2.COLOR_BGR2GRAY
    return cv2.cvtColor(np.ascontiguousarray(image), code)


def _is_dicom(path):
    guard.check_bytes(os.path.getsize(path))
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_values(dataset, path):
    """Return the values of `dicom_fast.parse_header` from a pydicom dataset."""
    if not dataset.get("Rows") or not dataset.get("Columns"):
        raise InputError(f"{path}: no image size in the header (cut short, or not an image)")
    values = {name: str(dataset.get(keyword) or "").strip(" \0") for name, keyword in _HEADER_TAGS.items()}
    values["transfer_syntax"] = dataset.file_meta.get("TransferSyntaxUID", "")
    return values | {"height": dataset.Rows, "width": dataset.Columns, "bits_stored": dataset.get("BitsStored")}


def _make_header(shape, values):
    header = {"width": shape[1], "height": shape[0]}
    header |= {name: values.get(name, "") for name in _HEADER_TAGS}
    header["patient_age"] = parse_age(header["patient_age"])
    header["transfer_syntax"] = UID(values.get("transfer_syntax", "")).name
    return header


@contextmanager
def _quiet():
    """Silence pydicom, which prints lines for each of the many small rules that real files break.

    Its settings are restored at the end; the lock keeps threads from restoring each other's.
    """
    logger = logging.getLogger("pydicom")
    with _quiet_lock, warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _name_errors(path):
    """Turn any exception of a decoder into a one-line InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason})") from error
