"""JPEG streams: reading their size without decoding, and a decoder that refuses damaged ones."""

import math
import re
from io import BytesIO
from struct import unpack_from

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from pydicom.encaps import get_frame

START = b"\xff\xd8\xff"
_J2K = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 codestream, which may be inside a JP2 file
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOF markers; F7 is JPEG-LS
DAMAGE = re.compile(r"Corrupt JPEG data: (?!bad ICC)|Premature end of JPEG|Inconsistent progression")
_HARMLESS = re.compile(r"bad ICC marker|unknown JFIF|Unknown Adobe")  # warnings about intact images


def read_shape(stream):
    """Return (height, width, components) of a JPEG, JPEG-LS or JPEG 2000 stream, without decoding it.

    Raises ValueError for a stream that ends or is damaged before its size, and for a cut JPEG 2000 stream. Source:
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
    if not data.startswith(START):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None:
            raise ValueError("the image cannot be decoded")
        return pixels
    try:
        return _decode_jpeg(data)
    except ValueError as error:
        if "tjDecompressHeader" in str(error):
            raise ValueError("the JPEG is cut short") from None
        if not _HARMLESS.search(str(error)):
            raise
    return _decode_jpeg(_without_oddities(data))  # libjpeg reports one warning only, which may have hidden damage


def _decode_jpeg(data):
    is_grey = simplejpeg.decode_jpeg_header(data)[2] == "Gray"
    pixels = simplejpeg.decode_jpeg(data, "GRAY" if is_grey else "BGR")
    return pixels[..., 0] if is_grey else pixels


def _without_oddities(data):
    """Return a JPEG with the same pixels but nothing in its header that causes a warning of _HARMLESS."""
    transform = 1 if read_shape(data)[2] == 3 else 2  # what libjpeg assumes for an unknown one
    parts, at = [data[:2]], 2
    while data[at + 1] not in _FRAMES:
        end = at + (1 if data[at + 1] == 0xFF else 2 + unpack_from(">H", data, at + 2)[0])
        segment = bytearray(data[at:end])
        if segment[1:2] == b"\xe0" and segment[4:9] == b"JFIF\0":
            segment[9:10] = b"\1"  # its version
        elif segment[1:2] == b"\xee" and segment[4:9] == b"Adobe" and segment[15:16] != b"\0":
            segment[15] = transform
        if segment[1:2] != b"\xe2":  # a colour profile
            parts.append(bytes(segment))
        at = end
    return b"".join(parts) + data[at:]


def count_halvings(stream, bits, signed, side):
    """Return how often a JPEG 2000 codestream can be halved with both sides at least `side`; 0: decode at full size.

    Only grey streams with these `bits` and sign, whose header and stream agree, are halved. Source: T.800 annex A.
    """
    component = (1).to_bytes(2, "big") + bytes([bits - 1 | signed << 7])
    if not stream.startswith(_J2K) or stream[40:43] != component or any(stream[16:24]):
        return 0
    coding = stream.find(b"\xff\x52", 4 + unpack_from(">H", stream, 4)[0])  # the marker after the size's
    levels = stream[coding + 9] if 0 < coding < len(stream) - 9 else 0
    sides = read_shape(stream)[:2]
    most = min(levels, max(0, int(math.log2(min(sides) / side))))
    # Pillow rounds sides to the nearest integer, and fails if that is not rounding up
    return max(k for k in range(most + 1) if all(-(-n >> k) == n + (1 << k >> 1) >> k for n in sides))


def decode_halved(dataset, halvings):
    """Return a DICOM dataset's stored values, (⌈H / 2^halvings⌉, …), from the lower wavelet levels."""
    stream, signed = get_frame(dataset.PixelData, 0, number_of_frames=1), dataset.PixelRepresentation
    Image.MAX_IMAGE_PIXELS = None  # `guard.check_size` enforces the limit
    with Image.open(BytesIO(stream)) as image:
        image.reduce = halvings
        pixels = np.asarray(image)
    # Pillow shifts values to the highest bits, and signed values to 0 or above
    values = (pixels >> 8 * pixels.itemsize - dataset.BitsStored).astype(np.int32) - (signed << dataset.BitsStored - 1)
    return values.astype(f"{'ui'[signed]}{dataset.BitsAllocated // 8}")
