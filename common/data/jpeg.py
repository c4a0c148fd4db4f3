"""JPEG streams: their structure and size, and a decoder that refuses damaged ones.

libjpeg fills what it cannot decode with grey, prints one line to the standard error output, and reports success.
"""

import os
import re
import threading
from contextlib import contextmanager
from struct import unpack_from

import cv2
import numpy as np

START = b"\xff\xd8\xff"
_J2K = b"\xff\x4f\xff\x51"  # of a JPEG 2000 codestream, which may lie in a JP2 file
_IMAGE_END, _SCAN = 0xD9, 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOF markers; F7 is that of JPEG-LS
_SCAN_END = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")  # neither a stuffed byte nor a restart marker
_DAMAGE = re.compile(r"Corrupt JPEG data: (?!bad ICC)|Premature end of JPEG|Inconsistent progression")
_HARMLESS = re.compile(r"bad ICC marker|unknown JFIF revision|Unknown Adobe color|Invalid SOS parameters")
_lock = threading.Lock()


def read_shape(stream, whole=True):
    """Return (height, width, components) of a JPEG, JPEG-LS or JPEG 2000 stream, without decoding it.

    whole: also require every segment up to the end marker; what follows it is ignored. Raises ValueError for a stream
    that is cut short or damaged. Source: ITU-T T.81 annex B, T.87 annex C, T.800 annex A.
    """
    if not stream.startswith(START):
        return _read_shape_2000(stream)
    at, shape, has_scan = 2, None, False
    while at + 4 <= len(stream):
        if stream[at] != 0xFF:
            raise ValueError(f"the JPEG is damaged (no marker at byte {at:,})")
        marker = stream[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        (length,) = unpack_from(">H", stream, at + 2)
        if marker in _FRAMES and at + 10 <= len(stream):
            shape = unpack_from(">HHB", stream, at + 5)
            if not whole:
                return shape
        at += 2 + length
        if marker == _SCAN:
            found = _SCAN_END.search(stream, at)
            if found is None:
                break
            at, has_scan = found.start(), True
            if stream[at + 1] == _IMAGE_END and shape:
                return shape
        elif marker == _IMAGE_END:
            if has_scan and shape:
                return shape
            raise ValueError("the JPEG is damaged (no image before its end)")
    raise ValueError("the JPEG is cut short")


def _read_shape_2000(stream):
    at = stream.find(_J2K)
    if at < 0 or at + 42 > len(stream):
        raise ValueError("not a JPEG, JPEG-LS or JPEG 2000 stream")
    if stream.rfind(b"\xff\xd9") < at:
        raise ValueError("the JPEG 2000 stream is cut short")
    right, bottom, left, top = unpack_from(">IIII", stream, at + 8)
    return bottom - top, right - left, unpack_from(">H", stream, at + 40)[0]


def decode(stream):
    """Return the pixels of a JPEG stream, uint8 (H, W), or (H, W, 3) in BGR. Raises ValueError if it is damaged."""
    with raise_warnings():
        pixels = cv2.imdecode(np.frombuffer(stream, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("the JPEG cannot be decoded")
    return pixels


@contextmanager
def raise_warnings():
    """Raise ValueError if libjpeg printed a warning about damaged data within the block.

    The standard error output of the whole process is redirected for the moment, so that one thread at a time decodes;
    what other threads print is passed on.
    """
    with _lock:
        caught, saved = os.memfd_create("stderr"), os.dup(2)
        os.dup2(caught, 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            text = os.pread(caught, 1 << 16, 0)
            os.close(saved)
            os.close(caught)
            lines = text.decode(errors="replace")
            damage = [line for line in lines.splitlines() if _DAMAGE.search(line)]
            if text and not damage and not _HARMLESS.search(lines):
                os.write(2, text)
    if damage:
        raise ValueError(damage[0])
