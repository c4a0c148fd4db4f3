"""Protection against hostile images: a limit on their size, and decoding in a separate process that may crash.

gdcm throws exceptions through C code, which kills the process: a single wrong byte would end a whole run.
"""

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import tempfile

import numpy as np

from common.data.jpeg import DAMAGE, decode_halved
from common.errors import check

MAX_PIXELS = 200_000_000  # limit per image, unless the environment variable CXR_MAX_PIXELS sets another
BYTES_PER_PIXEL = 4  # file size limit, times the limit on pixels
SECONDS = 120  # for decoding one image
_idle = []  # decoder processes that wait for a file
os.register_at_fork(after_in_child=_idle.clear)  # they belong to the parent


def max_pixels():
    """Return the largest allowed number of pixels per image. Raises InputError for a bad CXR_MAX_PIXELS."""
    text = os.environ.get("CXR_MAX_PIXELS") or str(MAX_PIXELS)
    check(text.isdecimal() and int(text) >= 1, f"CXR_MAX_PIXELS={text}: not a number of pixels")
    return int(text)


def check_size(height, width):
    """Raise ValueError for an image without pixels or with more than `max_pixels`."""
    if not 0 < height * width <= max_pixels():
        raise ValueError(f"{width}x{height} pixels, the limit is {max_pixels():,} (CXR_MAX_PIXELS)")


def check_bytes(size):
    """Raise ValueError for more bytes than an image of `max_pixels` would need."""
    if size > BYTES_PER_PIXEL * max_pixels():
        raise ValueError(f"larger than {BYTES_PER_PIXEL * max_pixels():,} bytes (see CXR_MAX_PIXELS)")


def decode(path, halvings=0):
    """Return pydicom's `pixel_array` or `jpeg.decode_halved` of a compressed DICOM file, decoded in another process.

    Raises ValueError if the decoder fails, is killed by a signal, or takes more than SECONDS.
    """
    process = _idle.pop() if _idle else _start()
    if process.poll() is not None:
        process = _start()
    try:
        process.stdin.write(json.dumps([os.path.abspath(path), halvings]).encode() + b"\n")
        process.stdin.flush()
        ready = select.select([process.stdout], [], [], SECONDS)[0]
        answer = process.stdout.readline() if ready else b""
        if not ready:
            raise ValueError(f"decoding takes more than {SECONDS} s")
        about = json.loads(answer or "{}")
        pixels = np.empty(about.get("shape", 0), about.get("dtype", "u1"))
        if not answer or process.stdout.readinto(pixels.reshape(-1).view("u1")) != pixels.nbytes:
            raise ValueError(f"the decoder crashed, with status {process.wait()}")
    except BaseException:
        process.kill()
        process.communicate()
        raise
    _idle.append(process)
    if "error" in about:
        raise ValueError(about["error"])
    return pixels


def _start():
    code = f"import sys; sys.path[:] = {sys.path!r}; from common.data.guard import serve; serve()"
    # in its own session, so that Ctrl-C does not end it; the parent does, by closing its input
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], **pipes, start_new_session=True)


def serve():
    """Decode the files named on standard input, one path and number of halvings per line, until it is closed."""
    import pydicom

    out, warned = os.fdopen(os.dup(1), "wb"), tempfile.TemporaryFile()  # noqa: SIM115  stays open
    for stream in (1, 2):  # decoders print to them
        os.dup2(warned.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = (4 << 30) + 16 * max_pixels()
    with contextlib.suppress(OSError, ValueError):  # not supported by every system
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    for line in sys.stdin.buffer:
        try:
            path, halvings = json.loads(line)
            dataset = pydicom.dcmread(path)
            if "2000" in dataset.file_meta.TransferSyntaxUID.name:
                dataset.pixel_array_options(decoding_plugin="pylibjpeg")
            warned.truncate(warned.seek(0))
            pixels = np.ascontiguousarray(decode_halved(dataset, halvings) if halvings else dataset.pixel_array)
            if damage := DAMAGE.search(warned.read().decode("ascii", "replace")):
                raise ValueError(damage[0])
            about = {"shape": pixels.shape, "dtype": pixels.dtype.str}
        except Exception as error:
            pixels, about = np.empty(0, "u1"), {"error": " ".join(str(error).split()) or type(error).__name__}
        out.write(json.dumps(about).encode() + b"\n")
        out.write(pixels.reshape(-1).view("u1"))
        out.flush()
