"""The store: all images of a challenge, decoded once into a memory-mapped uint8 array with a table beside it."""

import errno
import hashlib
import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.data.store_workers import RECORD, Target, decode_all, write_placeholder
from common.errors import InputError
from common.paths import lock_folder, read_array, read_json, read_parquet, write_json

VERSION = 3
COMMIT_SECONDS = 2.0  # at most this much work is repeated after a kill
_DAMAGED = "damaged store; run prepare, or delete this folder"
_FILES = ("images.npy", "table.parquet", "store.json", "journal")


@dataclass(frozen=True)
class Store:
    """A finished store: `images` uint8 (N, size, size), memory-mapped and read-only, and `table`, one row an image.

    Table columns: image_id, row (index into images), width, height (pixels of the original), colour (float, share of
    coloured pixels, above `common.data.dicom.COLOUR_LIMIT` in colour pictures, NaN for a placeholder), content
    (`hash_pixels` of the stored image), ok (False for a placeholder), and patient_id, patient_sex, view_position (empty
    where unknown; so is content for a placeholder), patient_age (years, Int64 or NA), note (unusable elements that were
    ignored, mostly empty).
    """

    images: np.ndarray
    table: pd.DataFrame
    folder: Path

    @classmethod
    def open(cls, folder):
        """Open the finished store in `folder`. Raises InputError if there is none or it is damaged."""
        folder = Path(folder)
        if not (folder / "store.json").is_file():
            raise InputError(f"{folder}: not a finished store (no store.json; run prepare)")
        about = read_json(folder / "store.json")
        version = about.get("version") if isinstance(about, dict) else None
        if version != VERSION:
            raise InputError(f"{folder}: a store of format {version}, not {VERSION}; run prepare")
        images, table = read_array(folder / "images.npy"), read_parquet(folder / "table.parquet")
        if images.dtype != np.uint8 or list(images.shape) != about.get("shape") or len(table) != len(images):
            raise InputError(f"{folder}: {_DAMAGED} (array, table and store.json disagree)")
        return cls(images, table, folder)

    def __reduce__(self):
        return Store.open, (self.folder,)  # another process maps the file instead of receiving a copy


def prepare_store(files, folder, size, workers=None, on_bad_image="error", placeholder_ids=frozenset(), progress=True):
    """Return the Store in `folder`, after decoding images into it unless it is up to date.

    files: mapping from image id to path, in row order; read by `common.data.dicom.read_image` and stretched to
    size × size by `store_workers.to_square`. workers: processes, or None to start one a core once that pays.
    on_bad_image: "error", or "placeholder" for a grey image with ok=False in place of each undecodable one whose id is
    in `placeholder_ids`; its width and height come from the header if that is readable, else they are `size`.

    Work happens in `<folder>.partial`, renamed when complete; after an interruption at any moment the next call
    continues and ends with the same bytes. A store that is damaged, of another format or of other files (name, size or
    time changed) is replaced once the new one is complete. Raises InputError if images cannot be decoded (named
    together at the end), if the disk is full, if `folder` holds anything else, or if another process is preparing it.
    """
    folder = Path(folder).resolve()
    if not files:
        raise InputError(f"{folder}: no images to prepare")
    if not 1 <= size <= 16384 or on_bad_image not in ("error", "placeholder") or (workers is not None and workers < 1):
        raise InputError(f"{folder}: cannot prepare with size={size}, workers={workers}, on_bad_image={on_bad_image}")
    ids, paths = list(files), [Path(path) for path in files.values()]
    stamps = [time_stamp(path) for path in paths]
    allowed = frozenset(placeholder_ids) if on_bad_image == "placeholder" else frozenset()
    key = _hash_json([VERSION, size, [[i, p.name, *s] for i, p, s in zip(ids, paths, stamps, strict=True)]])
    store = _open_current(folder, key)
    if store is not None:
        _raise_problems([i for i in store.table.image_id[~store.table.ok] if i not in allowed], len(ids))
        print(f"{folder}: up to date ({len(ids)} images)")
        return store
    if folder.exists():
        _check_replaceable(folder)
        if any(folder.iterdir()):
            print(f"{folder}: damaged or stale (other files, another size, an earlier format), rebuilding")

    shape = (len(ids), size, size)
    partial = folder.with_name(folder.name + ".partial")
    with _name_full_disk(folder, len(ids) * size * size), lock_folder(partial, "preparing this store"):
        target = Target(str(partial / "images.npy"), _allocate(partial / "images.npy", shape), size)
        done = _read_journal(partial / "journal", _hash_json([VERSION, size, ids]), stamps)
        if done:
            print(f"{folder}: continuing, {len(done)} of {len(ids)} images are done")
        bad = _decode_missing(target, partial / "journal", paths, stamps, done, workers, progress)
        _raise_problems([problem for row, problem in sorted(bad.items()) if ids[row] not in allowed], len(ids))
        for row, problem in sorted(bad.items()):
            print(f"{problem}; a grey placeholder takes its place")
            done[row] = write_placeholder(target, row, paths[row])
        _finish(partial, folder, ids, [done[row] for row in range(len(ids))], key, shape)
    store = Store.open(folder)
    _print_notes(store.table)
    return store


def _print_notes(table):
    """Print which unusable elements were ignored, with the number of images and the first of them."""
    for note, ids in islice(table[table["note"] != ""].groupby("note")["image_id"], 5):
        print(f"{len(ids)} images, {ids.iloc[0]} for one: {note}")


def _open_current(folder, key):
    """Return the Store in `folder` if it is whole and has this key, else None."""
    try:
        store, about = Store.open(folder), read_json(folder / "store.json")
        return store if about.get("key") == key else None
    except InputError:
        return None


def _decode_missing(target, journal, paths, stamps, done, workers, progress):
    """Decode every row that is not in `done`, record it there and in the journal; return {bad row: problem}."""
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
    """Return {row: record} of the rows that an earlier run finished from unchanged files; reset an unusable journal."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the rest was cut off by a kill
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
    """Create the array file and reserve its disk space unless an earlier run did; return the pixels' offset."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    offset = len(header.getvalue())
    total = offset + int(np.prod(shape, dtype=np.int64))
    if path.exists() and path.stat().st_size == total:
        return offset
    path.unlink(missing_ok=True)
    path.with_name("journal").unlink(missing_ok=True)
    if total > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, "disk full")
    with open(path, "wb") as file:
        file.write(header.getvalue())
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), 0, total)
        except (AttributeError, OSError) as error:  # macOS has no such function
            if getattr(error, "errno", errno.EINVAL) not in (errno.EINVAL, errno.EOPNOTSUPP):
                path.unlink()
                raise
            os.truncate(file.fileno(), total)  # no reservations here: a later write will find the disk full
    return offset


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
    (folder / "journal").unlink()  # last, so that after a kill the next run finds every row done


def time_stamp(path):
    """Return size and modification time of a file, to detect changes without reading it."""
    try:
        found = os.stat(path)
    except OSError:
        return [-1, -1]  # reading it will raise the error that names it
    return [found.st_size, found.st_mtime_ns]


def _hash_json(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_replaceable(folder):
    """Raise InputError if `folder` is a file or holds anything but a store, because a rebuild deletes it."""
    foreign = [path.name for path in folder.iterdir() if path.name not in _FILES] if folder.is_dir() else ["a file"]
    if foreign:
        raise InputError(f"{folder}: not a store, it holds {foreign[0]!r}; name another folder")


def _raise_problems(problems, total):
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{len(problems)} of {total} images cannot be used: {'; '.join(problems[:5])}{more}")


@contextmanager
def _name_full_disk(folder, needed):
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(f"{folder}: the disk is full, the store needs {needed:,} bytes") from error
