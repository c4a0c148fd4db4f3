"""The store: all images of a challenge, decoded once into a memory-mapped uint8 array with a table."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from common import processes
from common.config import LARGEST
from common.data.dicom import read_header, read_image_and_header
from common.data.grey import hash_pixels
from common.errors import InputError, check
from common.paths import lock_folder, read_array, read_json, read_parquet, write_json

VERSION = 3
HEADER = 128  # bytes before the pixels of a .npy file
COMMIT_SECONDS = 2.0  # work that is repeated after a kill, at most
PLACEHOLDER_GREY = 128
FEW = 64  # images that one process decodes in the time needed to start others
_TEXTS = ("patient_id", "patient_age", "patient_sex", "view_position", "note")
RECORD = ("width", "height", "colour", "content", *_TEXTS)
_CHUNK = 4  # images per task: enough to hide the queue's overhead, few enough for processes to end together
_worker = {}
_TO_RETRY = "delete {} to try to read them again"
_DAMAGED = "damaged store; run prepare, or delete this folder"
_FILES = ("images.npy", "table.parquet", "store.json", "journal")


@dataclass(frozen=True)
class Store:
    """A finished store: `images` uint8 (N, size, size), memory-mapped and read-only, and `table`, a row per image.

    Table columns: image_id, row (index into images), width, height (pixels of the original), colour (float, share of
    coloured pixels, above `common.data.dicom.COLOUR_LIMIT` for colour pictures, NaN for a placeholder), content
    (`hash_pixels` of the stored image), ok (False for a placeholder), and patient_id, patient_sex, view_position (empty
    if unknown, as is content of a placeholder), patient_age (years, Int64 or NA), note (ignored unusable elements).
    """

    images: np.ndarray
    table: pd.DataFrame
    folder: Path

    @classmethod
    def open(cls, folder):
        """Open the finished store in `folder`. Raises InputError if there is none or it is damaged."""
        folder = Path(folder)
        check((folder / "store.json").is_file(), f"{folder}: not a finished store (no store.json; run prepare)")
        about = read_json(folder / "store.json")
        version = about.get("version") if isinstance(about, dict) else None
        check(version == VERSION, f"{folder}: a store of format {version}, not {VERSION}; run prepare")
        images, table = read_array(folder / "images.npy"), read_parquet(folder / "table.parquet")
        if images.dtype != np.uint8 or list(images.shape) != about.get("shape") or len(table) != len(images):
            raise InputError(f"{folder}: {_DAMAGED} (array, table and store.json disagree)")
        return cls(images, table, folder)

    def __reduce__(self):
        return Store.open, (self.folder,)  # other processes map the file instead of receiving a copy


def prepare_store(
    files, folder, size, workers=None, on_bad_image="error", placeholder_ids=frozenset(), progress=True, halve=False
):
    """Return the Store in `folder`, after decoding images into it unless it is up to date.

    files: mapping from image id to path, in row order; read by `common.data.dicom.read_image` and stretched to
    size × size by `to_square`. workers: processes, None for one per core.
    on_bad_image: "error", or "placeholder" to replace each undecodable image whose id is in `placeholder_ids` by a grey
    image with ok=False; its width and height come from the header or, if that is unreadable, are `size`.
    halve: decode large JPEG 2000 images at a lower resolution, see `read_image_and_header`.

    The store is written to `<folder>.partial`, which is renamed when complete. After an interruption at any moment, the
    next call continues and ends with the same bytes. A store that is damaged or made from other files (name, size or
    time changed) is replaced once the new one is complete. Raises InputError for undecodable images (listed together at
    the end), a size above LARGEST, a full disk, foreign files in `folder`, and a store that another process prepares.
    """
    folder = Path(folder).resolve()
    check(files, f"{folder}: no images to prepare")
    check(0 < size <= LARGEST, f"{folder}: images of {size} px; the store holds 1 to {LARGEST} px")
    ids, paths = list(files), [Path(path) for path in files.values()]
    stamps = [time_stamp(path) for path in paths]
    allowed = frozenset(placeholder_ids) if on_bad_image == "placeholder" else frozenset()
    kind = [VERSION, size, *["halved"] * halve]
    key = _hash_json([*kind, [[i, p.name, *s] for i, p, s in zip(ids, paths, stamps, strict=True)]])
    store = None
    with suppress(InputError):
        store, about = Store.open(folder), read_json(folder / "store.json")
    if store is not None and about.get("key") == key:
        bad = store.table.image_id[~store.table.ok].tolist()
        _raise_problems([str(files[i]) for i in bad if i not in allowed], len(ids), f"; {_TO_RETRY.format(folder)}")
        print(f"{folder}: up to date ({len(ids)} images)")
        if bad:
            print(f"{len(bad)} of them are grey placeholders, such as {bad[0]}; {_TO_RETRY.format(folder)}")
        return store
    if folder.exists():
        _check_replaceable(folder)
        if any(folder.iterdir()):
            print(f"{folder}: damaged or stale (other files, another size, or an earlier format), rebuilding")

    shape = (len(ids), size, size)
    partial = folder.with_name(folder.name + ".partial")
    with _name_full_disk(folder, len(ids) * size * size), lock_folder(partial, "preparing this store"):
        _allocate(partial / "images.npy", shape)
        target = Target(str(partial / "images.npy"), size, halve)
        done = _read_journal(partial / "journal", _hash_json([*kind, ids]), stamps)
        if done:
            print(f"{folder}: continuing, {len(done)} of {len(ids)} images are done")
        bad = _decode_missing(target, partial / "journal", paths, stamps, done, workers, progress)
        _raise_problems([problem for row, problem in sorted(bad.items()) if ids[row] not in allowed], len(ids))
        for row, problem in sorted(bad.items()):
            print(f"{problem}; a grey placeholder takes its place")
            done[row] = write_placeholder(target, row, paths[row])
        _finish(partial, folder, ids, [done[row] for row in range(len(ids))], key, shape)
    store = Store.open(folder)
    for note, ids in islice(store.table[store.table["note"] != ""].groupby("note")["image_id"], 5):
        print(f"{len(ids)} images, {ids.iloc[0]} for one: {note}")
    if halve:
        n = store.table["note"].str.startswith("JPEG 2000").sum()
        print(f"{n} of {len(store.table)} images were decoded at a lower resolution, the others at full size")
    return store


def _decode_missing(target, journal, paths, stamps, done, workers, progress):
    """Decode each row not in `done`, record it there and in the journal; return {bad row: problem}."""
    todo = [(row, str(path)) for row, path in enumerate(paths) if row not in done]
    bad, pending, committed = {}, [], time.monotonic()
    bar = tqdm(total=len(paths), initial=len(done), disable=not progress, unit="image", desc="prepare")
    with bar, open(journal, "a", encoding="utf-8") as lines, open(target.path, "rb") as images:
        try:
            for row, record, problem in decode_all(target, todo, workers):
                bar.update()
                if problem:
                    bad[row] = problem
                    continue
                done[row] = record
                pending.append([row, stamps[row], record])
                if time.monotonic() - committed > COMMIT_SECONDS:
                    _commit(images, lines, pending)
                    pending, committed = [], time.monotonic()
        finally:
            _commit(images, lines, pending)
    return bad


def _commit(images, journal, pending):
    """Flush the pixels to the disk, then record their rows as done."""
    os.fsync(images.fileno())
    journal.writelines(json.dumps(entry) + "\n" for entry in pending)
    journal.flush()
    os.fsync(journal.fileno())


def _read_journal(path, layout, stamps):
    """Return {row: record} of rows that an earlier run finished from unchanged files; reset an unusable journal."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a kill may have truncated the last line
    done, valid_bytes = {}, 0
    if lines and lines[0] == layout.encode():
        valid_bytes = len(lines[0]) + 1
        for line in lines[1:]:
            try:
                row, stamp, record = json.loads(line)
            except ValueError:
                break
            valid_bytes += len(line) + 1
            if list(stamps[row]) == stamp:
                done[row] = record
            else:
                done.pop(row, None)
    if valid_bytes:
        os.truncate(path, valid_bytes)
    else:
        path.write_text(layout + "\n", encoding="utf-8")
    return done


def _allocate(path, shape):
    """Create the array file unless an earlier run did."""
    size = int(np.prod(shape, dtype=np.int64))
    if not path.exists() or path.stat().st_size != HEADER + size:
        path.with_name("journal").unlink(missing_ok=True)
        if size > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, "disk full")
        np.lib.format.open_memmap(path, "w+", np.uint8, shape)


def _finish(partial, folder, ids, records, key, shape):
    table = pd.DataFrame([{"ok": True} | record for record in records])
    table = table.assign(image_id=ids, row=range(len(ids)))[["image_id", "row", *RECORD[:4], "ok", *RECORD[4:]]]
    table = table.astype({"patient_age": "Int64", "colour": float})
    texts = [name for name in RECORD[3:] if name != "patient_age"]
    table[texts] = table[texts].fillna("")
    table.to_parquet(partial / "table.parquet", index=False)
    write_json(partial / "store.json", {"version": VERSION, "key": key, "shape": list(shape)})
    for name in _FILES[:2]:
        with open(partial / name, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(partial, folder)
    (folder / "journal").unlink()  # last, so that after a kill, the next run finds all rows done


def time_stamp(path):
    """Return size and modification time of a file, to detect changes without reading it."""
    try:
        found = os.stat(path)
    except OSError:
        return [-1, -1]  # reading the file will raise an error that names it
    return [found.st_size, found.st_mtime_ns]


def _hash_json(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_replaceable(folder):
    """Raise InputError if `folder` is a file or contains anything but a store, since a rebuild deletes it."""
    foreign = [path.name for path in folder.iterdir() if path.name not in _FILES] if folder.is_dir() else ["a file"]
    if foreign:
        raise InputError(f"{folder}: not a store, it holds {foreign[0]!r}; name another folder")


def _raise_problems(problems, total, hint=""):
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{len(problems)} of {total} images cannot be used: {'; '.join(problems[:5])}{more}{hint}")


@contextmanager
def _name_full_disk(folder, needed):
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(f"{folder}: the disk is full, the store needs {needed:,} bytes") from error


# ---- processes that decode images into a store ---------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """The array file for the pixels, the images' side, and `halve`."""

    path: str
    size: int
    halve: bool = False


def to_square(image, size):
    """Return a grey image (H, W) stretched to (size, size): by area averaging to shrink, bilinearly to enlarge."""
    if image.shape == (size, size):
        return image
    shrinks = image.shape[0] * image.shape[1] > size * size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def decode_all(target, todo, workers):
    """Decode (row, path) pairs into `target`; yield (row, record, problem) of each in order.

    workers: processes; None: one per core, but a single one for a few images. record: dict of `RECORD`, or None, with
    the problem as a line of text. Raises InputError if a process dies, OSError if the disk is full.
    """
    workers = workers or (1 if len(todo) < FEW else processes.cores())
    if workers == 1:
        with open(target.path, "r+b") as file:
            for item in todo:
                yield _decode_row(file, target, item)
        return
    context = multiprocessing.get_context("forkserver")  # a fork could inherit a lock held by a thread
    context.set_forkserver_preload(["__main__", __name__])  # imported once, not in every process
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(target,))
    try:
        yield from executor.map(_decode_in_worker, todo, chunksize=_CHUNK)
    except BrokenProcessPool:
        raise InputError(f"{target.path}: a worker process died (out of memory?); run again to continue") from None
    finally:
        executor.shutdown(cancel_futures=True)


def write_placeholder(target, row, path):
    """Write a grey image in place of an undecodable one; return its record, with ok=False."""
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
    multiprocessing.parent_process().join()  # without this, a worker whose parent was killed would wait forever
    os._exit(1)


def _decode_in_worker(item):
    return _decode_row(_worker["file"], _worker["target"], item)


def _decode_row(file, target, item):
    row, path = item
    try:
        image, header = read_image_and_header(path, target.size * target.halve)
    except InputError as error:
        return row, None, str(error)
    square = to_square(image, target.size)
    _write_row(file, target, row, square)
    header["content"] = hash_pixels(square)
    return row, {name: header[name] for name in RECORD}, None


def _write_row(file, target, row, image):
    # written, not memory-mapped: on a full disk, a write raises an error, but a mapping kills the process
    file.seek(HEADER + row * target.size**2)
    file.write(np.ascontiguousarray(image).data)
    file.flush()
