"""Fast reader of the commonest DICOM files: the same pixels as pydicom's, or None for files left to pydicom.

It reads a file only if every element before the pixels is plain (little endian, tags in order, no sequence of
undefined length), the image is a single grey frame, and the pixels are uncompressed or one baseline JPEG stream.
"""

import mmap
import os
from struct import error as StructError
from struct import unpack_from

import numpy as np

from common.data import guard, jpeg

_IMPLICIT, _EXPLICIT, _JPEG_BASELINE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50"
_HEAD_BYTES = 1 << 18  # longer than almost any header; most JPEG files are read in this one call
_UNDEFINED = 0xFFFFFFFF
_PIXEL_DATA = 0x7FE00010
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_WANTED = {
    0x00020010: ("transfer_syntax", b"UI"),
    0x00080060: ("modality", b"CS"),
    0x00100020: ("patient_id", b"LO"),
    0x00100040: ("patient_sex", b"CS"),
    0x00101010: ("patient_age", b"AS"),
    0x00185101: ("view_position", b"CS"),
    0x00280002: ("samples", b"US"),
    0x00280004: ("photometric", b"CS"),
    0x00280008: ("frames", b"IS"),
    0x00280010: ("height", b"US"),
    0x00280011: ("width", b"US"),
    0x00280100: ("bits_allocated", b"US"),
    0x00280101: ("bits_stored", b"US"),
    0x00280102: ("high_bit", b"US"),
    0x00280103: ("signed", b"US"),
}
# padding, window, rescale and their tables: only their presence matters here, `grey` applies them
_MAPPINGS = frozenset((0x00280120, 0x00280121, 0x00281050, 0x00281051, 0x00281052, 0x00281053, 0x00283000, 0x00283010))


def parse_header(head):
    """Return (wanted elements, offset of the pixel data, its length), or None if the header is unusual.

    head: the first bytes of a file. The elements are a dict with texts as str without padding; `mapped` is whether a
    window, rescale or table is present. Source: DICOM PS3.5 section 7 (element encoding), PS3.10 section 7 (file meta
    information).
    """
    try:
        return _parse(head) if head[128:132] == b"DICM" else None
    except StructError:  # the head ends before the pixels begin
        return None


def _parse(head):
    values, at, previous, implicit = {"mapped": False}, 132, 0, False
    while True:
        group, element, vr = unpack_from("<HH2s", head, at)
        tag = group << 16 | element
        if tag <= previous or (not previous and tag != 0x00020000):
            return None
        if previous >> 16 == 2 and group != 2:
            syntax = values.get("transfer_syntax")
            if syntax not in (_IMPLICIT, _EXPLICIT, _JPEG_BASELINE):
                return None
            implicit = syntax == _IMPLICIT
        if implicit:
            (length,) = unpack_from("<I", head, at + 4)
            at += 8
        elif vr in _SHORT_VRS:
            (length,) = unpack_from("<H", head, at + 6)
            at += 8
        elif vr in _LONG_VRS:
            (length,) = unpack_from("<I", head, at + 8)
            at += 12
        else:
            return None
        if tag == _PIXEL_DATA:
            return values, at, length
        if group >= 0x7FE0 or length == _UNDEFINED:
            return None
        if tag in _MAPPINGS:
            values["mapped"] = True
        elif tag in _WANTED:
            name, expected = _WANTED[tag]
            if not implicit and vr != expected:
                return None
            if expected == b"US":
                if length != 2:
                    return None
                (values[name],) = unpack_from("<H", head, at)
            else:
                text = head[at : at + length].decode("latin-1").strip(" \0")
                # other characters depend on the character set, and a backslash separates several values
                if not (text.isascii() and text.isprintable()) or "\\" in text or "~" in text:
                    return None
                values[name] = text
        previous = tag
        at += length


def _is_plain(values):
    stored = values.get("bits_stored", 0)
    return (
        values.get("samples") == 1
        and values.get("photometric") in ("MONOCHROME1", "MONOCHROME2")
        and values.get("frames", "1") == "1"
        and values.get("bits_allocated") in (8, 16)
        and 1 <= stored <= values["bits_allocated"]
        and values.get("high_bit") == stored - 1
        and values.get("signed") in (0, 1)
        and values.get("height", 0) > 0
        and values.get("width", 0) > 0
    )


def read_plain(path):
    """Return (pixels, elements of `parse_header`) of a plain DICOM file, else None.

    pixels: (H, W) uint8, int8, uint16 or int16, the stored values as in pydicom's `pixel_array`; read-only where they
    are memory-mapped. Raises OSError if the file cannot be read, ValueError for a damaged JPEG or an image over the
    limits of `guard`.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
        found = parse_header(head)
        if found is None or not _is_plain(found[0]):
            return None
        values, at, length = found
        guard.check_size(values["height"], values["width"])
        if values["transfer_syntax"] == _JPEG_BASELINE:
            pixels = _decode_jpeg(head + file.read(), at, values) if length == _UNDEFINED else None
        else:
            pixels = _read_raw(file, at, length, values)
    return None if pixels is None else (pixels, values)


def _read_raw(file, at, length, values):
    shape, allocated, stored = (values["height"], values["width"]), values["bits_allocated"], values["bits_stored"]
    count = shape[0] * shape[1]
    expected = count * allocated // 8
    if length not in (expected, expected + expected % 2) or os.fstat(file.fileno()).st_size < at + length:
        return None
    kind = "i" if values["signed"] else "u"
    # memory-mapped, so that the pass that scales the pixels needs no copy
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    data = mmap.mmap(file.fileno(), at + length, flags=flags, prot=mmap.PROT_READ)
    pixels = np.frombuffer(data, f"<{kind}{allocated // 8}", count, at).reshape(shape)
    if stored < allocated:
        low, high = (-(1 << stored - 1), (1 << stored - 1) - 1) if values["signed"] else (0, (1 << stored) - 1)
        if pixels.min() < low or pixels.max() > high:  # clear unused high bits, keep the sign
            pixels = pixels << (allocated - stored) >> (allocated - stored)
    return pixels


def _decode_jpeg(data, at, values):
    if values["bits_allocated"] != 8 or values["bits_stored"] != 8 or values["signed"]:
        return None
    try:
        item, table_length = unpack_from("<II", data, at)
        start = at + 8 + table_length
        item2, length = unpack_from("<II", data, start)
        (end,) = unpack_from("<I", data, start + 8 + length)
    except StructError:
        return None
    if (item, item2, end) != (0xE000FFFE, 0xE000FFFE, 0xE0DDFFFE):  # offset table, one fragment, end of sequence
        return None
    stream = data[start + 8 : start + 8 + length]
    if jpeg.read_shape(stream) != (values["height"], values["width"], 1):
        return None
    return jpeg.decode(stream)
