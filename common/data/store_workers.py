"""The processes that decode originals into a store; kept apart from it so that they start without pandas."""

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

from common.data.dicom import read_header, read_image_and_header
from common.errors import InputError

PLACEHOLDER_GREY = 128
ALONE_SECONDS = 1.5  # about what starting processes costs: a small challenge is done before they would be
RECORD = ("width", "height", "colour", "patient_id", "patient_age", "patient_sex", "view_position")
_CHUNK = 4  # images a task: enough to hide the queue, few enough for the processes to end together
_worker = {}


@dataclass(frozen=True)
class Target:
    """Where the pixels go: the array file, the offset of its first row in bytes, and the side of an image."""

    path: str
    offset: int
    size: int


def to_square(image, size):
    """Stretch a grey image (H, W) to (size, size): averaged over areas when it shrinks, linear when it grows."""
    if image.shape == (size, size):
        return image
    shrinks = image.shape[0] * image.shape[1] > size * size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def decode_all(target, todo, workers):
    """Decode (row, path) pairs into `target`; yield (row, record, problem) of each in the order in which they end.

    workers: processes, or None to begin alone and start one a core once that pays. record: dict of `RECORD`, or None
    with the problem as a line of text. Raises InputError if a process dies, OSError if the disk is full.
    """
    at, began, cores = 0, time.monotonic(), len(os.sched_getaffinity(0))
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
    context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit a thread's lock
    context.set_forkserver_preload(["__main__", __name__])  # imported once instead of once a process
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(target,))
    try:
        # Few tasks wait at any time, so memory does not grow with the number of images.
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
    """Write a grey image in place of one that cannot be decoded; returns its record, with ok=False."""
    try:
        header = read_header(path)
    except InputError:
        header = {"width": target.size, "height": target.size}
    with open(target.path, "r+b") as file:
        _write_row(file, target, row, np.full((target.size, target.size), PLACEHOLDER_GREY, np.uint8))
    return {name: header.get(name) for name in RECORD} | {"ok": False}


def _start_worker(target):
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool in order
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(target=target, file=open(target.path, "r+b"))  # noqa: SIM115  open as long as the process


def _end_with_parent():
    multiprocessing.parent_process().join()  # a worker whose parent was killed would wait for tasks for ever
    os._exit(1)


def _decode_chunk(chunk):
    return [_decode_row(_worker["file"], _worker["target"], item) for item in chunk]


def _decode_row(file, target, item):
    row, path = item
    try:
        image, header = read_image_and_header(path)
    except InputError as error:
        return row, None, str(error)
    _write_row(file, target, row, to_square(image, target.size))
    return row, {name: header[name] for name in RECORD}, None


def _write_row(file, target, row, image):
    # Written, not mapped: on a full disk a write raises an error where a mapping kills the process.
    file.seek(target.offset + row * target.size**2)
    file.write(np.ascontiguousarray(image).data)
    file.flush()
