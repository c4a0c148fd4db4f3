"""Radiographs from DICOM, PNG, JPEG and raw JSRT files as 8-bit grey images."""

import os
import re
import stat
import zlib
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from struct import unpack_from

import cv2
import numpy as np
import pydicom
from pydicom import uid
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble

from common.data import guard, jpeg
from common.data.grey import colour_share, silence_pydicom, to_uint8
from common.errors import InputError, check
from common.paths import is_dicom

COLOUR_LIMIT = 0.12  # a file with a higher `colour` is a colour picture, not a radiograph

_PNG = b"\x89PNG\r\n\x1a\n"
_JSRT_SIDE, _JSRT_TOP = 2048, 4095  # pixels; highest 12-bit value
_PLAIN_META = b"\0" * 128 + b"DICM\x02\0\x10\0UI\x14\0" + b"1.2.840.10008.1.2.1\0"  # explicit little endian
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom returns all of these as RGB
_HEADER_TAGS = {"patient_id": "PatientID", "patient_age": "PatientAge", "patient_sex": "PatientSex"}
_HEADER_TAGS |= {"view_position": "ViewPosition", "modality": "Modality", "photometric": "PhotometricInterpretation"}
_YEARS_PER_UNIT = {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}


def read_image(path):
    """Return one radiograph as uint8 (H, W), C-contiguous, bright where the patient absorbs.

    The file's content determines its format:

    - DICOM: stored values → modality LUT or rescale → VOI LUT, else the first window → inverted if MONOCHROME1 →
      8 bits. An unsigned 8-bit image without any of these mappings keeps its values (MONOCHROME1: 255 - v). All others
      are stretched by trunc((v - min) / (max - min) * 255) in float64; a constant image becomes 0. Colour images are
      converted to RGB and then treated as below, without a window. Padding (PixelPaddingValue) is ignored in min and
      max. Mappings that cannot be applied or leave fewer than four grey levels are ignored, the last one first.
    - PNG and JPEG: 8-bit grey is unchanged; colour becomes 0.299 R + 0.587 G + 0.114 B, alpha is dropped; 16 bits are
      stretched as above. EXIF orientation is not applied.
    - Other files named .IMG (in any case): raw files of the JSRT database, 2048 × 2048 big-endian 16-bit values, of
      which 12 bits are used, without a header. Low values mean absorption, so 4095 - v is stretched as above.

    Raises InputError naming the file if it is missing, truncated, damaged, of another format, has several frames, no
    pixels or more than 200 million of them (environment variable CXR_MAX_PIXELS), or cannot be decoded; for raw files
    also if the length is not 8,388,608 bytes or a value is above 4095 (wrong byte order). Source: DICOM PS3.3
    C.7.6.3.1.2, C.11.1, C.11.2; http://db.jsrt.or.jp/eng.php.
    """
    return read_image_and_header(path)[0]


def read_image_and_header(path, side=0):
    """Return `read_image(path)` and `read_header(path)`, the latter with "colour" and "note".

    colour: the image's `colour_share`; above COLOUR_LIMIT it is a colour picture. note: a line of text about ignored
    unusable elements, mostly empty. side: if above 0, a grey JPEG 2000 without padding is decoded at a half, a quarter
    … of its size with both sides at least `side`, and `note` says so. Raises InputError like both functions.
    """
    with _name_errors(path):
        if not _is_dicom(path):
            pixels, values, dataset = _read_jsrt(path) if _is_jsrt(path) else _read_file(path), {}, None
        else:
            pixels, values, dataset = _read_dicom(path, side)
        bits, inverted = values.get("bits_stored"), values.get("photometric") == "MONOCHROME1"
        shape = (values["height"], values["width"]) if values else pixels.shape  # pixels may be halved
        header = _make_header(shape, values) | {"colour": colour_share(pixels, bits)}
        if pixels.ndim == 3:
            code = cv2.COLOR_RGB2GRAY if values else (cv2.COLOR_BGR2GRAY, cv2.COLOR_BGRA2GRAY)[pixels.shape[2] - 3]
            pixels, dataset = cv2.cvtColor(np.ascontiguousarray(pixels), code), None
        image, note = to_uint8(pixels, bits, inverted, dataset)
        return image, header | {"note": "; ".join(filter(None, [values.get("note"), note]))}


def read_header(path):
    """Return an image file's header as a dict, without decoding the pixels. Raises InputError naming the file.

    Keys: width, height (pixels); patient_id, patient_sex, view_position, modality, photometric, transfer_syntax (name)
    as str, empty if unknown; patient_age in whole years or None. PNG, JPEG and raw files have only the size.
    """
    with _name_errors(path):
        if not _is_dicom(path):
            size = (_JSRT_SIDE, _JSRT_SIDE) if _is_jsrt(path) else _read_size(Path(path).read_bytes(), path)
            return _make_header(size, {})
        with silence_pydicom():
            values = _read_values(_load(path, stop_before_pixels=True), path)
        return _make_header((values["height"], values["width"]), values)


def parse_age(text):
    """Return a DICOM age ('058Y', '58', '041', '006M') in whole years, None if it is not one."""
    match = re.fullmatch(r"(\d{1,3})([YMWD]?)", text.strip().upper())
    return int(match[1]) // _YEARS_PER_UNIT[match[2]] if match else None


def _read_dicom(path, side=0):
    """Return stored values, integers (H, W) or (H, W, 3) of 8 or 16 bits, header values and the pydicom dataset."""
    with silence_pydicom():
        dataset = _load(path)
        values = _read_values(dataset, path)
        _check_dicom(dataset, path)
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
            syntax = uid.ImplicitVRLittleEndian if implicit else explicit
            dataset.file_meta.TransferSyntaxUID = syntax
            values |= {"transfer_syntax": syntax, "note": f"no transfer syntax, assumed {syntax.name}"}
    return _decode(dataset, path, side, values), values, dataset


def _load(path, **options):
    """Return pydicom's `dcmread(path, **options)`, inflating deflated files up to the limit on bytes."""
    with open(path, "rb") as file:
        read_preamble(file, force=False)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
            return pydicom.dcmread(path, **options)
        packed, inflater = file.read(), zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(packed, guard.BYTES_PER_PIXEL * guard.max_pixels())
    check(inflater.eof, f"{path}: cut short, or inflates to more bytes than an image has (see CXR_MAX_PIXELS)")
    dataset = pydicom.dcmread(BytesIO(_PLAIN_META + data), **options)
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    return dataset


def _check_dicom(dataset, path):
    """Raise InputError for an image of an unsupported kind, before it is decoded."""
    check("PixelData" in dataset, f"{path}: no pixel data (cut short, or not an image)")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise InputError(f"{path}: {dataset.NumberOfFrames} frames, only single images are read")
    guard.check_size(dataset.Rows, dataset.Columns)
    colour = dataset.SamplesPerPixel != 1
    if dataset.PhotometricInterpretation not in (_COLOURS if colour else ("MONOCHROME1", "MONOCHROME2")):
        raise InputError(f"{path}: photometric interpretation {dataset.PhotometricInterpretation} is not supported")
    if dataset.BitsAllocated > 16 or "PixelRepresentation" not in dataset:
        raise InputError(f"{path}: {dataset.BitsAllocated} bits a pixel, only integers of up to 16 bits are read")


def _decode(dataset, path, side, values):
    """Return the stored values; add a note to `values` if they are decoded at a lower resolution."""
    halvings, rows, columns, samples = 0, dataset.Rows, dataset.Columns, dataset.SamplesPerPixel
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax == uid.RLELossless:
        with silence_pydicom():
            pixels = dataset.pixel_array
    else:
        stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
        shape = jpeg.read_shape(stream)
        if shape != (rows, columns, samples):
            found, expected = "x".join(map(str, shape)), f"{rows}x{columns}x{samples}"
            raise InputError(f"{path}: the compressed image has {found} values, the header names {expected}")
        layout = dataset.BitsAllocated, dataset.BitsStored, dataset.PixelRepresentation, samples
        is_plain = syntax == uid.JPEGBaseline8Bit and layout == (8, 8, 0, 1)
        if side and "PixelPaddingValue" not in dataset:  # padding would be averaged with its neighbours
            halvings = jpeg.count_halvings(stream, *layout[1:3], side)
            values |= {"note": f"JPEG 2000 decoded at 1/{2**halvings} of its size"} if halvings else {}
        pixels = jpeg.decode(stream) if is_plain else guard.decode(path, halvings)
    if pixels.shape[:2] != (-(-rows >> halvings), -(-columns >> halvings)) or pixels.ndim != 2 + (samples != 1):
        raise InputError(f"{path}: the pixel data hold more than one image of {columns}x{rows}")
    return pixels


def _read_file(path):
    data = Path(path).read_bytes()
    _read_size(data, path)
    if data.startswith(_PNG):
        _check_png(data, path)
    return jpeg.decode(data)


def _read_size(data, path):
    """Return (height, width) of a PNG or JPEG file."""
    if data.startswith(_PNG) and len(data) >= 33:
        size = unpack_from(">II", data, 16)[::-1]
    elif data.startswith(jpeg.START):
        size = jpeg.read_shape(data)[:2]
    else:
        raise InputError(f"{path}: " + ("empty file" if not data else "not a DICOM, PNG or JPEG file"))
    guard.check_size(*size)
    return size


def _is_jsrt(path):
    """Return whether a non-DICOM file is a raw JSRT file by name and content; raise if its length is wrong."""
    if not str(path).lower().endswith(".img"):
        return False
    with open(path, "rb") as file:
        if file.read(8).startswith((_PNG, jpeg.START)):
            return False
    size, expected = os.path.getsize(path), 2 * _JSRT_SIDE**2
    check(size == expected, f"{path}: {size:,} bytes, a raw .IMG file of the JSRT database has {expected:,}")
    return True


def _read_jsrt(path):
    values = np.fromfile(path, ">u2").reshape(_JSRT_SIDE, _JSRT_SIDE)
    check(values.max() <= _JSRT_TOP, f"{path}: values up to {values.max()}, a raw .IMG file has 12 bits, big-endian")
    return _JSRT_TOP - values


def _check_png(data, path):
    """Raise InputError unless every critical chunk is intact; decoders accept damaged files."""
    at, view = len(_PNG), memoryview(data)
    while at + 12 <= len(data):
        length, kind = unpack_from(">I4s", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        if kind[0] < ord("a") and zlib.crc32(view[at + 4 : end]) != unpack_from(">I", data, end)[0]:
            raise InputError(f"{path}: the PNG is damaged (checksum of a chunk {kind!r})")
        if kind == b"IEND":
            return
        at = end + 4
    raise InputError(f"{path}: the PNG is cut short")


def _is_dicom(path):
    status = os.stat(path)
    check(stat.S_ISREG(status.st_mode), f"{path}: not a regular file")  # opening a named pipe would block
    guard.check_bytes(status.st_size)
    return is_dicom(path)


def _read_values(dataset, path):
    """Return the header values of a pydicom dataset by name, and its height, width and bits_stored."""
    if not dataset.get("Rows") or not dataset.get("Columns"):
        raise InputError(f"{path}: no image size in the header (cut short, or not an image)")
    values = {name: str(dataset.get(keyword) or "").strip(" \0") for name, keyword in _HEADER_TAGS.items()}
    values["transfer_syntax"] = dataset.file_meta.get("TransferSyntaxUID", "")
    return values | {"height": dataset.Rows, "width": dataset.Columns, "bits_stored": dataset.get("BitsStored")}


def _make_header(shape, values):
    header = {"width": shape[1], "height": shape[0], **{name: values.get(name, "") for name in _HEADER_TAGS}}
    header["patient_age"] = parse_age(header["patient_age"])
    header["transfer_syntax"] = uid.UID(values.get("transfer_syntax", "")).name
    return header


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
