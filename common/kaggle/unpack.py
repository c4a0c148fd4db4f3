"""Zip archives unpacked without trusting them: no path outside the folder, no links, no bombs; resumable."""

import contextlib
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
MAX_FILES = 3_000_000  # entries of an archive
MAX_BYTES = 2 * 10**12  # unpacked
MAX_RATIO = 100  # unpacked bytes per byte of archive, for archives that unpack to more than RATIO_FROM
RATIO_FROM = 10**9
BLOCK = 1 << 20
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:|^/")
_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError)


class DamagedArchive(InputError):
    """The archive cannot be read to its end."""


class UnsafeArchive(InputError):
    """The archive holds something that must not be unpacked; nothing is unpacked."""


def unpack(archive, folder, nested=True):
    """Unpack a zip into `folder`, and zips inside it into folders of their own names; return (files, bytes).

    Files are written atomically. Existing files with the same size and time, or the same content, are kept; others are
    replaced, and their number is logged. An inner zip that cannot be unpacked stays as it is, with a warning. Raises
    DamagedArchive; UnsafeArchive, also above MAX_BYTES, MAX_FILES or MAX_RATIO; InputError where the disk is full.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as source:
            entries = _check_entries(source, archive)
            if archive in (folder / entry.filename for entry in entries):
                raise UnsafeArchive(f"{archive}: holds a file of its own name; nothing is unpacked")
            _unpack_all(source, entries, archive, folder)
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise DamagedArchive(f"{archive}: damaged archive ({' '.join(str(error).split())[:120]})") from None
    files, size, unpacked = len(entries), sum(entry.file_size for entry in entries), []
    for path in [folder / e.filename for e in entries if e.filename.lower().endswith(".zip")] if nested else []:
        try:
            more = unpack(path, path.with_suffix(""), nested=False)
        except (DamagedArchive, UnsafeArchive) as error:
            log.warning(f"{error}; it is left as it is")
            continue
        files, size = files - 1 + more[0], size + more[1] - path.stat().st_size
        unpacked.append(path)
    for path in unpacked:  # last: until everything is unpacked, a restart must find them
        path.unlink()
    return files, size


def _check_entries(source, archive):
    """Return the files of an open zip; raise UnsafeArchive before anything is unpacked."""
    entries, size, seen = source.infolist(), os.path.getsize(archive), set()
    total = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_FILES:
        raise UnsafeArchive(f"{archive}: {len(entries):,} entries, more than the limit of {MAX_FILES:,}")
    if total > MAX_BYTES or (total > RATIO_FROM and total > MAX_RATIO * size):
        raise UnsafeArchive(f"{archive}: {size / 1e9:.3g} GB that unpack to {total / 1e9:.3g} GB: a zip bomb?")
    files = [entry for entry in entries if not entry.is_dir()]
    for entry in entries:
        name, kind = entry.filename.rstrip("/"), stat.S_IFMT(entry.external_attr >> 16)
        parts, problem = name.split("/"), None
        if _BAD_NAME.search(entry.orig_filename) or any(p in ("", ".", "..") or len(p.encode()) > 240 for p in parts):
            problem = "would not stay in the folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device, not a file"
        elif entry.flag_bits & 1:
            problem = "is encrypted"
        elif not entry.is_dir() and name in seen:
            problem = "occurs twice"
        if problem:
            raise UnsafeArchive(f"{archive}: {name[:80]!r} {problem}; nothing is unpacked")
        if not entry.is_dir():
            seen.add(name)
    clash = next((parent for name in seen for parent in map(str, Path(name).parents) if parent in seen), None)
    if clash:
        raise UnsafeArchive(f"{archive}: {clash!r} is a file and a folder; nothing is unpacked")
    return files


def _unpack_all(source, entries, archive, folder):
    """Unpack what is not there yet, after a check that the disk has room."""
    todo = [entry for entry in entries if not _is_there(folder / entry.filename, entry)]
    need, free = sum(entry.file_size for entry in todo), shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{archive}: needs {need / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB free; make room, "
            "the same command continues"
        )
    replaced, root = [], folder.resolve()
    with tqdm(total=need, unit="B", unit_scale=True, desc="unpack", leave=False, delay=1) as bar:
        for entry in todo:
            path = folder / entry.filename
            if path.exists():
                replaced.append(path)
            _write(source, entry, path, root)
            bar.update(entry.file_size)
    if replaced:
        log.info(f"{len(replaced):,} files differed from the archive's and were replaced, such as {replaced[0]}")


def _is_there(path, entry):
    """Return whether the file is the archive's: the same size, and the same time or content."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.file_size:
        return False
    if path.stat().st_mtime == _time(entry):
        return True
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum == entry.CRC


def _write(source, entry, path, root):
    temporary, modified = path.with_name(f".{path.name}.part"[-250:]), _time(entry)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(root):
            raise InputError(f"{path.parent}: is a link that leads out of {root}; nothing is unpacked through it")
        temporary.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with source.open(entry) as packed, os.fdopen(os.open(temporary, flags, 0o644), "wb") as file:
            shutil.copyfileobj(packed, file, BLOCK)  # zipfile stops at the declared size and compares the checksum
        os.utime(temporary, (modified, modified))
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: {reason}; what is unpacked is kept, the same command continues") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _time(entry):
    try:
        return float(int(time.mktime((*entry.date_time, 0, 0, -1))))
    except (ValueError, OverflowError):
        return 0.0
