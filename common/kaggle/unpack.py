"""Zip archives unpacked without trusting them: no path outside the folder, no links, no bombs; breaks continue."""

import logging
import lzma
import os
import re
import shutil
import stat
import struct
import time
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from common.errors import InputError

log = logging.getLogger(__name__)
FILES = 3_000_000  # entries of an archive
BYTES = 2 * 10**12  # unpacked
RATIO = 100  # unpacked bytes per byte of archive, asked above FLOOR
FLOOR = 10**9
BLOCK = 1 << 20
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:|^/")
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError)


class Damaged(InputError):
    """The archive cannot be read to its end."""


class Unsafe(InputError):
    """The archive holds what must not be unpacked; nothing of it is."""


def unpack(archive, folder, nested=True):
    """Unpack a zip into `folder`; zips within it too, each into a folder of its name. Returns (files, bytes).

    Files appear whole or not at all. Those that are there already, with the same size and time or the same content,
    are kept; others of the same name are replaced, and counted in a line. A zip within that cannot be unpacked stays as
    it is, which is said. Raises Damaged where the archive is broken, Unsafe where it holds what it must not, or more
    than BYTES, FILES or RATIO allow; InputError where the disk is full.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as source:
            entries = [entry for entry in check(source, archive) if not entry.is_dir()]
            if archive in (folder / entry.filename for entry in entries):
                raise Unsafe(f"{archive}: holds a file of its own name; nothing is unpacked")
            _check_room(entries, archive, folder)
            _unpack_all(source, entries, archive, folder)
    except InputError:
        raise
    except _BROKEN as error:
        raise Damaged(f"{archive}: damaged archive ({' '.join(str(error).split())[:120]})") from None
    files, size = len(entries), sum(entry.file_size for entry in entries)
    unpacked = []
    for path in [folder / e.filename for e in entries if e.filename.lower().endswith(".zip")] if nested else []:
        try:
            more = unpack(path, path.with_suffix(""), nested=False)
        except (Damaged, Unsafe) as error:
            log.warning(f"{error}; it is left as it is")
            continue
        files, size = files - 1 + more[0], size + more[1] - path.stat().st_size
        unpacked.append(path)
    for path in unpacked:  # only now: until all is there, a new start must find them
        path.unlink()
    return files, size


def check(source, archive):
    """The entries of an open zip; Unsafe where one of them must not be unpacked, before any is."""
    entries = source.infolist()
    if len(entries) > FILES:
        raise Unsafe(f"{archive}: {len(entries):,} entries, more than the {FILES:,} that are unpacked")
    total, size, seen = sum(entry.file_size for entry in entries), os.path.getsize(archive), {}
    if total > BYTES or (total > FLOOR and total > RATIO * size):
        raise Unsafe(f"{archive}: {size / 1e9:.3g} GB that unpack to {total / 1e9:.3g} GB: refused as a zip bomb")
    for entry in entries:
        name, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
        parts = name.rstrip("/").split("/")
        shown = f"{archive}: {name[:80]!r}"
        if _BAD_NAME.search(entry.orig_filename) or any(p in ("", ".", "..") or len(p.encode()) > 240 for p in parts):
            raise Unsafe(f"{shown} would not stay in the folder; nothing is unpacked")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise Unsafe(f"{shown} is a link or a device, not a file; nothing is unpacked")
        if entry.flag_bits & 1:
            raise Unsafe(f"{shown} is encrypted; nothing is unpacked")
        if not entry.is_dir() and seen.setdefault("/".join(parts), entry) is not entry:
            raise Unsafe(f"{shown} is there twice; nothing is unpacked")
    for name in seen:
        clash = next((parent for parent in map(str, Path(name).parents) if parent in seen), None)
        if clash:
            raise Unsafe(f"{archive}: {clash!r} is a file and a folder; nothing is unpacked")
    return entries


def _check_room(entries, archive, folder):
    need = 0
    for entry in entries:
        path = folder / entry.filename
        need += entry.file_size if not path.is_file() or path.stat().st_size != entry.file_size else 0
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{archive}: unpacking needs {need / 1e9:.3g} GB more, {folder} has {free / 1e9:.3g} GB free; "
            "make room, the same command continues"
        )


def _unpack_all(source, entries, archive, folder):
    replaced, root, parents = [], folder.resolve(), set()
    with tqdm(
        total=sum(e.file_size for e in entries), unit="B", unit_scale=True, desc="unpack", leave=False, delay=1
    ) as bar:
        for entry in entries:
            path = folder / entry.filename
            if path.parent not in parents:
                _make_parent(path.parent, root, archive)
                parents.add(path.parent)
            if path.is_dir() and not path.is_symlink():
                raise InputError(f"{path}: is a folder, where {archive.name} has a file; move it away")
            if not _is_there(path, entry):
                if path.exists():
                    replaced.append(path)
                _write(source, entry, path, archive)
            bar.update(entry.file_size)
    if replaced:
        log.info(f"{len(replaced):,} files differed from the archive's and were replaced, such as {replaced[0]}")


def _make_parent(parent, root, archive):
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{parent}: is a file, where {archive.name} has a folder; move it away") from None
    if not parent.resolve().is_relative_to(root):
        raise InputError(f"{parent}: is a link that leads out of {root}; nothing is unpacked through it")


def _is_there(path, entry):
    """Whether the file is the archive's: size and time are, or the content."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.file_size:
        return False
    if path.stat().st_mtime == _time(entry):
        return True
    found = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return found == entry.CRC


def _write(source, entry, path, archive):
    temporary = path.with_name(f".{path.name}.part"[-250:])
    temporary.unlink(missing_ok=True)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with source.open(entry) as packed, os.fdopen(os.open(temporary, flags, 0o644), "wb") as file:
            shutil.copyfileobj(packed, file, BLOCK)  # zipfile stops at the size it was told, and compares the checksum
        os.utime(temporary, (_time(entry), _time(entry)))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror or error}; what is unpacked is kept, {archive.name} too, the same "
            "command continues"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _time(entry):
    try:
        return float(int(time.mktime((*entry.date_time, 0, 0, -1))))
    except (ValueError, OverflowError):
        return 0.0
