"""JPEG streams: their size, read before they are decoded, and a decoder that refuses damaged ones."""

import re
from struct import unpack_from

import cv2
import numpy as np
import simplejpeg

START = b"\xff\xd8\xff"
_J2K = b"\xff\x4f\xff\x51"  # of a JPEG 2000 codestream, which may lie in a JP2 file
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOF markers; F7 is that of JPEG-LS
DAMAGE = re.compile(r"Corrupt JPEG data: (?!bad ICC)|Premature end of JPEG|Inconsistent progression")
_HARMLESS = re.compile(r"bad ICC marker|unknown JFIF|Unknown Adobe")  # warnings about a good image


def read_shape(stream):
    """Return (height, width, components) of a JPEG, JPEG-LS or JPEG 2000 stream, without decoding it.

    Raises ValueError for a stream that is cut short or damaged before its size, and a cut JPEG 2000 stream. Source:
    ITU-T T.81 annex B, T.87 annex C, T.800 annex A.
    """
    if not stream.startswith(START):
        at = stream.find(_J2K)
        if at < 0 or at + 42 > len(stream):
            raise ValueError("not a JPEG, JPEG-LS or JPEG 2000 stream")
        if stream.rfind(b"\xff\xd9") < at:
            raise ValueError("the JPEG 2000 stream is cut short")
        right, bottom, left, top = unpack_from(">IIII", stream, at + 8)
        return bottom - top, right - left, unpack_from(">H", stream, at + 40)[0]
    at = 2
    while at + 10 <= len(stream):
        marker = stream[at + 1]
        if stream[at] != 0xFF:
            raise ValueError(f"the JPEG is damaged (no marker at byte {at:,})")
        if marker in _FRAMES:
            return unpack_from(">HHB", stream, at + 5)
        at += 1 if marker == 0xFF else 2 + unpack_from(">H", stream, at + 2)[0]  # FF is padding
    raise ValueError("the JPEG is cut short")


def decode(data):
    """Return the pixels of a JPEG or PNG image: (H, W), or (H, W, 3 or 4) in BGR order, of 8 or 16 bits.

    Raises ValueError for an image that cannot be decoded, and for a damaged JPEG.
    """
    if data.startswith(START):
        try:
            is_grey = simplejpeg.decode_jpeg_header(data)[2] == "Gray"
            pixels = simplejpeg.decode_jpeg(data, "GRAY" if is_grey else "BGR")
            return pixels[..., 0] if is_grey else pixels
        except ValueError as error:
            if "tjDecompressHeader" in str(error):
                raise ValueError("the JPEG is cut short") from None
            if not _HARMLESS.search(str(error)):
                raise
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("the image cannot be decoded")
    return pixels
