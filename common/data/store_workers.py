"""Processes that decode images into a store; separate from store.py so that they start without pandas."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np

from common import processes
from common.data.dicom import read_header, read_image_and_header
from common.data.grey import hash_pixels
from common.errors import InputError

PLACEHOLDER_GREY = 128
ALONE_SECONDS = 1.5  # about the time to start processes, which a small challenge does not need
_TEXTS = ("patient_id", "patient_age", "patient_sex", "view_position", "note")
RECORD = ("width", "height", "colour", "content", *_TEXTS)
_CHUNK = 4  # images a task: enough to hide the queue's cost, few enough for the processes to end together
_worker = {}


@dataclass(frozen=True)
class Target:
    """The array file that receives the pixels, the byte offset of its first row, and the side of an image."""

    path: str
    offset: int
    size: int


def to_square(image, size):
    """Return a grey image (H, W) stretched to (size, size): area average if it shrinks, bilinear if it grows."""
    if image.shape == (size, size):
        return image
    shrinks = image.shape[0] * image.shape[1] > size * size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def decode_all(target, todo, workers):
    """Decode (row, path) pairs into `target`; yield (row, record, problem) of each in order of completion.

    workers: processes, or None to begin in this one and start one a core once that pays. record: dict of `RECORD`, or
    None with the problem as a line of text. Raises InputError if a process dies, OSError if the disk is full.
    """
    at, began, cores = 0, time.monotonic(), processes.cores()
    if workers in (None, 1):
        with open(target.path, "r+b") as file:
            for at, item in enumerate(todo, 1):
                yield _decode_row(file, target, item)
                spent = time.monotonic() - began
                if workers is None and cores > 1 and min(spent, spent / at * (len(todo) - at) / 2) > ALONE_SECONDS:
                    break
            else:
                return
    chunks = iter([todo[i : i + _CHUNK] for i in range(at, len(todo), _CHUNK)])
    workers = workers or cores
    context = multiprocessing.get_context("forkserver")  # a fork could inherit a lock that a thread holds
    context.set_forkserver_preload(["__main__", __name__])  # imported once, not by every process
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(target,))
    try:
        # few tasks wait at a time, so that memory does not grow with the number of images
        waiting = {executor.submit(_decode_chunk, chunk) for chunk in islice(chunks, 4 * workers)}
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {executor.submit(_decode_chunk, chunk) for chunk in islice(chunks, len(ended))}
            for future in ended:
                yield from future.result()
    except BrokenProcessPool:
        raise InputError(f"{target.path}: a worker process died (out of memory?); run again to continue") from None
    finally:
        executor.shutdown(cancel_futures=True)


def write_placeholder(target, row, path):
    """Write a grey image in place of one that cannot be decoded; return its record, with ok=False."""
    try:
        header = read_header(path)
    except InputError:
        header = {"width": target.size, "height": target.size}
    with open(target.path, "r+b") as file:
        _write_row(file, target, row, np.full((target.size, target.size), PLACEHOLDER_GREY, np.uint8))
    return {name: header.get(name) for name in RECORD} | {"ok": False}


def _start_worker(target):
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent shuts the pool down
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(target=target, file=open(target.path, "r+b"))  # noqa: SIM115  stays open


def _end_with_parent():
    multiprocessing.parent_process().join()  # otherwise a worker whose parent was killed would wait for ever
    os._exit(1)


def _decode_chunk(chunk):
    return [_decode_row(_worker["file"], _worker["target"], item) for item in chunk]


def _decode_row(file, target, item):
    row, path = item
    try:
        image, header = read_image_and_header(path)
    except InputError as error:
        return row, None, str(error)
    square = to_square(image, target.size)
    _write_row(file, target, row, square)
    header["content"] = hash_pixels(square)
    return row, {name: header[name] for name in RECORD}, None


def _write_row(file, target, row, image):
    # written, not memory-mapped: on a full disk a write raises an error, a mapping kills the process
    file.seek(target.offset + row * target.size**2)
    file.write(np.ascontiguousarray(image).data)
    file.flush()
