"""Resumable unpacking of untrusted zip archives: no paths outside the folder, no links, no zip bombs."""

import os
import re
import shutil
import stat
import struct
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from common.errors import InputError, log
from common.paths import make_folder

STAGING = ".kaggle-unpack"  # name in the folder; files are written there and moved when complete
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # with others, zipfile unpacks gigabytes at once
MAX_FILES = 3_000_000  # entries; all limits include inner zips
MAX_DEPTH = 30  # folders within folders
MAX_BYTES = 2 * 10**12  # unpacked
MAX_RATIO = 100  # unpacked bytes per byte of archive, for archives that unpack to more than RATIO_FROM
RATIO_FROM = 10**9
BLOCK = 1 << 20
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\\]|^[A-Za-z]:|^/")
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OverflowError, RuntimeError, ValueError)


class DamagedArchive(InputError):
    """The archive cannot be read to its end."""


class UnsafeArchive(InputError):
    """The archive holds an unsafe entry; nothing is unpacked."""


@dataclass
class _Unpacked:
    """Totals and names (relative to the root) of what an archive and its inner zips unpack to."""

    root: Path  # resolved
    packed: int  # bytes of the outer archive
    entries: int = 0
    bytes: int = 0
    files: set = field(default_factory=set)
    folders: set = field(default_factory=set)


def unpack(archive, folder):
    """Unpack a zip into `folder`, and zips inside it into folders of their own names; return (files, bytes).

    Existing equal files are kept. Raises DamagedArchive, UnsafeArchive and InputError; an unusable inner zip is kept.
    """
    archive, folder = Path(archive), Path(folder)
    make_folder(folder)
    done = _Unpacked(folder.resolve(), os.path.getsize(archive))
    done.files.add(os.path.relpath(archive.resolve(), done.root))
    shutil.rmtree(done.root / STAGING, ignore_errors=True)  # left by a killed call
    try:
        entries = _unpack_one(archive, "", done)
        files, size, unpacked = len(entries), done.bytes, []
        for name in [e.filename for e in entries if e.filename.lower().endswith(".zip")]:
            path, before = done.root / name, done.bytes
            try:
                inner = _unpack_one(path, f"{name[:-4]}/", done)
            except (DamagedArchive, UnsafeArchive) as error:
                log.warning(f"{error}; it is left as it is")
                continue
            files, size = files + len(inner) - 1, size + done.bytes - before - path.stat().st_size
            unpacked.append(path)
    finally:
        shutil.rmtree(done.root / STAGING, ignore_errors=True)
    for path in unpacked:  # removed last, because a restart needs them until everything is unpacked
        path.unlink()
    return files, size


def _unpack_one(archive, prefix, done):
    """Unpack one zip into the folder `prefix` (such as `images/`) of the root; return its files' entries."""
    try:
        with zipfile.ZipFile(archive) as source:
            entries = _check_entries(source, archive, prefix, done)
            _extract_all(source, entries, archive, prefix, done.root)
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise DamagedArchive(f"{archive}: damaged archive ({' '.join(str(error).split())[:120]})") from None
    return entries


def _check_entries(source, archive, prefix, done):
    """Return the file entries of an open zip and add them to `done`; raise UnsafeArchive before unpacking any."""
    entries = source.infolist()
    number, total = done.entries + len(entries), done.bytes + sum(entry.file_size for entry in entries)
    if number > MAX_FILES:
        raise UnsafeArchive(f"{archive}: {number:,} entries, more than the limit of {MAX_FILES:,}")
    if total > MAX_BYTES or (total > RATIO_FROM and total > MAX_RATIO * done.packed):
        sizes = f"{done.packed / 1e9:.3g} GB that unpack to {total / 1e9:.3g} GB"
        raise UnsafeArchive(f"{archive}: {sizes}: a zip bomb? Nothing is unpacked")
    files, names, folders = [entry for entry in entries if not entry.filename.endswith("/")], set(), set()
    for entry in entries:
        name, kind = prefix + entry.filename.removesuffix("/"), stat.S_IFMT(entry.external_attr >> 16)
        parts, is_folder = name.split("/"), entry.filename.endswith("/")
        odd = any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        problems = {
            "would not stay in the folder": odd or len(parts) > MAX_DEPTH or _BAD_NAME.search(entry.orig_filename),
            "is a link or a device, not a file": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
            "is encrypted": entry.flag_bits & 1,
            f"is compressed by method {entry.compress_type}": entry.compress_type not in METHODS,
            "occurs twice or is the archive itself": not is_folder and (name in names or name in done.files),
        }
        for problem in (text for text, holds in problems.items() if holds):
            raise UnsafeArchive(f"{archive}: {name[:80]!r} {problem}; nothing is unpacked")
        if not is_folder:
            names.add(name)
    for folder in {STAGING, *(name.rpartition("/")[0] for name in names)}:
        if not Path(os.path.realpath(done.root / folder)).is_relative_to(done.root):
            raise InputError(f"{done.root / folder}: a link that leads out of {done.root}; nothing is unpacked")
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    if clashes := (names & (folders | done.folders)) | (folders & done.files):
        raise UnsafeArchive(f"{archive}: {min(clashes)!r} is a file and a folder; nothing is unpacked")
    done.entries, done.bytes = number, total
    done.files |= names
    done.folders |= folders
    return files


def _extract_all(source, entries, archive, prefix, root):
    """Unpack missing and changed files, after checking that the disk has room."""
    todo = [entry for entry in entries if not _is_there(root / prefix / entry.filename, entry)]
    need, free = sum(entry.file_size for entry in todo), shutil.disk_usage(root).free
    if need > free:
        sizes = f"needs {need / 1e9:.3g} GB, {root} has {free / 1e9:.3g} GB free"
        raise InputError(f"{archive}: {sizes}; make room, the same command continues")
    replaced = []
    with tqdm(total=need, unit="B", unit_scale=True, desc="unpack", leave=False, delay=1) as bar:
        for entry in todo:
            path = root / prefix / entry.filename
            if path.exists():
                replaced.append(path)
            _extract(source, entry, path, root / STAGING / prefix)
            bar.update(entry.file_size)
    if replaced:
        log.info(f"{len(replaced):,} files differed from the archive's and were replaced, such as {replaced[0]}")


def _is_there(path, entry):
    """Return whether a file equals the archive's entry: same size, and same time or content."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.file_size:
        return False
    if path.stat().st_mtime == _time(entry):
        return True
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum == entry.CRC


def _extract(source, entry, path, staging):
    try:
        part = source.extract(entry, staging)  # safe: stays inside, limited to the declared size, checksum verified
        os.utime(part, (_time(entry), _time(entry)))
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)
    except OSError as error:
        kept = "files unpacked so far are kept, the same command continues"
        raise InputError(f"{path}: {error.strerror or error}; {kept}") from None


def _time(entry):
    try:
        return float(int(time.mktime((*entry.date_time, 0, 0, -1))))
    except (ValueError, OverflowError):
        return 0.0
