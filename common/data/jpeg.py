"""JPEG streams: their structure and size, and a decoder that refuses damaged ones.

libjpeg fills what it cannot decode with grey, prints one line to the standard error output, and reports success. So
that output, which is one for all threads, is redirected while images are decoded; where it names damage, each image
that was decoded meanwhile is decoded again, alone.
"""

import os
import re
import threading
from contextlib import ExitStack, contextmanager
from struct import unpack_from
from tempfile import TemporaryFile
from types import SimpleNamespace

import cv2
import numpy as np

START = b"\xff\xd8\xff"
_J2K = b"\xff\x4f\xff\x51"  # of a JPEG 2000 codestream, which may lie in a JP2 file
_IMAGE_END, _SCAN = 0xD9, 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOF markers; F7 is that of JPEG-LS
_SCAN_END = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")  # neither a stuffed byte nor a restart marker
_DAMAGE = re.compile(rb"Corrupt JPEG data: (?!bad ICC)|Premature end of JPEG|Inconsistent progression")
_DECODERS = re.compile(
    _DAMAGE.pattern + rb"|bad ICC marker|unknown JFIF|Unknown Adobe|Invalid SOS|libpng|\[ ?(WARN|ERROR):"
)
_lock = threading.Condition()
_shared = SimpleNamespace(users=0, stack=ExitStack(), file=-1)  # the redirection while threads decode


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


def decode(data):
    """Return the pixels of a JPEG or PNG image: (H, W), or (H, W, 3 or 4) in BGR order, of 8 or 16 bits.

    Raises ValueError for an image that cannot be decoded, and for a damaged JPEG.
    """
    with _lock:
        if not _shared.users:
            _shared.file = _shared.stack.enter_context(_redirect())
        _shared.users += 1
    try:
        pixels = _decode(data)
    finally:
        with _lock:
            damage = _find_damage(_shared.file)
            _shared.users -= 1
            if not _shared.users:
                _shared.stack.close()
                _lock.notify_all()
    if damage:  # perhaps of another thread's image
        with raise_warnings():
            pixels = _decode(data)
    if pixels is None:
        raise ValueError("the image cannot be decoded")
    return pixels


def _decode(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


@contextmanager
def raise_warnings():
    """Raise ValueError if libjpeg warned of damaged data within the block, during which no other thread decodes."""
    with _lock:
        _lock.wait_for(lambda: not _shared.users)
        with _redirect() as caught:
            yield
            damage = _find_damage(caught)
    if damage:
        raise ValueError(damage)


@contextmanager
def _redirect():
    """Yield the file that receives the standard error output of this process; pass on what no decoder wrote there."""
    if hasattr(os, "memfd_create"):
        caught = os.memfd_create("stderr")
    else:  # macOS
        with TemporaryFile() as file:
            caught = os.dup(file.fileno())
    saved = os.dup(2)
    os.dup2(caught, 2)
    try:
        yield caught
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        text = os.pread(caught, 1 << 16, 0)
        os.close(caught)
        if text and not _DECODERS.search(text):
            os.write(2, text)


def _find_damage(caught):
    lines = os.pread(caught, 1 << 16, 0).splitlines()
    return next((line.decode("ascii", "replace") for line in lines if _DAMAGE.search(line)), "")
