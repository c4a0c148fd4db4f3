"""File helpers: atomic writes, checked reads, safe names, locks, and the places where competitions are mounted."""

import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from common.errors import InputError, check, log

KAGGLE_INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
IMAGES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
_FORMULA = tuple("=+-@\t\n＝＋－＠")
LONGEST_ID = 200  # bytes; a file name has at most 255, including its suffix
_SAFE_ID = re.compile(r"\w([\w .,()+@&=~#%'-]*[\w.,()+@&=~#%'-])?")
LEASE = "lease.json"  # held by the process that works in a folder, see common.train.queue


def make_folder(folder):
    """Create a folder, and those above it, unless it exists. Raises InputError where none can be, such as in /proc."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise InputError(f"{folder}: no folder can be created there") from None


@contextmanager
def atomic_path(path):
    """Yield a temporary path next to `path` that is renamed to `path` when the block succeeds.

    Readers see the old file or the new one, never a partial file. On an error, the temporary file is removed. Its name
    keeps the suffix, from which some writers infer the format. An OSError without a file name, such as for a full
    disk, gets the name of `path`.
    """
    path = Path(path)
    make_folder(path.parent)
    mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]  # of fixed length, since names have a limit
    temporary = path.with_name(f".cxr-{mark}-{os.getpid()}.tmp{path.suffix[:20]}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # otherwise the rename could reach the disk before the bytes
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder, inside=""):
    """Delete temporary files that killed processes left in a folder; inside "**/": at any depth.

    Folders with a lease, in which another process may be writing, are left alone.
    """
    for left_over in Path(folder).glob(f"{inside}.cxr-*.tmp*"):
        if not any((parent / LEASE).exists() for parent in left_over.parents[:2]):
            left_over.unlink()


def write_text(path, text):
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may not be UTF-8


def copy_file(source, target):
    """Copy a file's bytes to `target`, atomically."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path, value):
    """Write `value` to `path` as indented JSON, atomically. Raises ValueError for NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_table(path, table):
    """Write a DataFrame as parquet, atomically."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


def write_csv(path, table):
    """Write a DataFrame atomically as a CSV that is safe to open in a spreadsheet, see `escape_formulas`."""
    with atomic_path(path) as temporary:
        escape_formulas(table).to_csv(temporary, index=False, errors="backslashreplace")


def escape_formulas(table):
    """Return a DataFrame with an apostrophe before any text that a spreadsheet would run as a formula.

    This applies to text cells and column names that begin with = + - @, tab or line end and are not numbers. Source:
    owasp.org/www-community/attacks/CSV_Injection.
    """
    texts = table.select_dtypes(exclude=["number", "bool", "datetime"])
    return table.assign(**{name: texts[name].map(escape_formula) for name in texts}).rename(columns=escape_formula)


def escape_formula(value):
    """Return `value`, with an apostrophe before it if a spreadsheet would run it as a formula."""
    if not isinstance(value, str):
        return value
    value = value.replace("\r", "\n")  # pandas does not quote a lone \r, which would start a new row
    if not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def read_json(path):
    """Return the value of a JSON file. Raises InputError if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None


@contextmanager
def checked_read(path, kind, remedy="delete it and run again"):
    """Convert errors while reading `path` into InputErrors."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # libraries raise many kinds of errors for damaged files
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: damaged {kind} ({reason}); {remedy}") from None


def read_parquet(path):
    """Return a table that an earlier step wrote. Raises InputError if it is missing or damaged."""
    import pandas as pd  # imported late, here and below, to keep --help fast

    with checked_read(path, "table"):
        return pd.read_parquet(path)


def read_array(path):
    """Open an array that an earlier step wrote and that stays on disk: a memory-mapped .npy, or Maps of a .b2nd file.

    Raises InputError if it is missing or damaged.
    """
    import numpy as np

    if Path(path).suffix == ".b2nd":
        return Maps(path)
    with checked_read(path, "array"):
        return np.load(path, mmap_mode="r")


class Maps:
    """Compressed maps, uint8 (n, …), indexed like an array; entries are decompressed on reading, one thread at a time.

    Raises InputError naming the file if it is missing or damaged, even if that is found on reading.
    """

    def __init__(self, path):
        import blosc2

        self.path, self._lock = Path(path), Lock()
        with checked_read(path, "array"):
            self.path.stat()  # raises the right error for a missing file
            self._array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1})
            self.shape, self.ndim, self.dtype = self._array.shape, self._array.ndim, self._array.dtype
            if self.dtype != "uint8" or self._array.schunk.nbytes != math.prod(self.shape):
                raise ValueError(f"{self._array.schunk.nbytes} bytes for {self.dtype} {self.shape}")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, places):
        with self._lock, checked_read(self.path, "array"):
            return self._array[places]

    def __iter__(self):
        return (self[position] for position in range(len(self)))


def read_csv(path, columns=(), **options):
    """Return a CSV that an earlier step wrote; `options` are those of pandas.read_csv.

    Raises InputError if it is missing or damaged, or lacks one of `columns`.
    """
    import pandas as pd

    with checked_read(path, "table"):
        table = pd.read_csv(path, **options)
        for name in columns:
            if name not in table:
                raise ValueError(f"no column {name}")
        return table


def check_id(image_id, where):
    """Return `image_id` if it can be a file name, else raise InputError; `where` names the file and row.

    Ids become paths, so `../../x` would be written outside its folder.
    """
    is_safe = isinstance(image_id, str) and _SAFE_ID.fullmatch(image_id) and ".." not in image_id
    if not is_safe or len(image_id.encode()) > LONGEST_ID:
        text = repr(image_id) if len(repr(image_id)) < LONGEST_ID else f"{image_id[:40]!r}…"
        allowed = f"letters, digits, blanks and .,()+@&=~#%'-_, at most {LONGEST_ID} bytes"
        raise InputError(f"{where}: {text} is not a usable id ({allowed})")
    return image_id


def lock(handle, place, doing, wait=False):
    """Take an exclusive lock on an open file of `place`; it is released when the file is closed or the process ends.

    If it is taken, wait for it, or raise InputError saying what the other process is `doing`. If the file system has no
    locks, as on some Lustre and NFS mounts, log that.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise InputError(f"{place}: another process is {doing}") from None
    except OSError as error:
        log.info(f"{place}: cannot be locked ({error.strerror}): do not start a second command in it")


@contextmanager
def lock_folder(folder, doing):
    """Create a working folder and keep an exclusive lock on it within the block.

    Raises InputError, saying what the other process is `doing`, if the folder is locked already.
    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, folder, doing)
        yield
    finally:
        os.close(handle)


# ---- images ----------------------------------------------------------------------------------------------------------


def find_images(folder, suffixes=IMAGES):
    """Return {id: path} of the images under `folder`, see `list_images` and `name_images`; ids must not clash."""
    return name_images(list_images(folder, suffixes), suffixes=suffixes)


def list_images(folder, suffixes=IMAGES, skip=lambda path: False):
    """Return the paths of the images at any depth under `folder`, as `walk_files(folder, skip)` finds them.

    An image has one of the `suffixes`; a file without a suffix, or with a number for one (1.2.840.4), is an image if
    its content is DICOM. Raises InputError if there is no such folder.
    """
    check(Path(folder).is_dir(), f"{folder}: no such folder")

    def is_image(path):
        suffix = path.suffix.lower()
        return suffix in suffixes or ((not suffix or suffix[1:].isdigit()) and path.is_file() and is_dicom(path))

    return [path for path in walk_files(folder, skip) if is_image(path)]


def name_images(paths, folder=None, suffixes=IMAGES):
    """Return {id: path} of image files; an id is the name without suffix, and with %F6 for a byte that is not UTF-8.

    Files of the same name get their paths below `folder`, without suffix, as ids. Raises InputError if ids still clash
    or, if `folder` is None, clash at all.
    """
    found, groups = {}, {}
    for path in paths:
        groups.setdefault(strip_suffix(path.name, suffixes), []).append(path)
    for name, group in groups.items():
        for path in group:
            if len(group) > 1 and folder is not None:
                below = Path(os.path.relpath(path, folder))
                name = below.with_name(strip_suffix(path.name, suffixes)).as_posix()
            name = re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", name)
            if name in found:
                raise InputError(f"{path}: a second image named {name!r}; the first is {found[name]}")
            found[name] = path
    return found


def strip_suffix(name, suffixes=IMAGES):
    """Return the last part of an image's path (separated by / or \\), without its suffix if that is in `suffixes`."""
    stem, suffix = os.path.splitext(re.split(r"[/\\]", name)[-1])
    return stem if suffix.lower() in suffixes else stem + suffix


def is_dicom(path):
    """Return whether a file begins like a DICOM file."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def list_folders(folder):
    """Return a folder and its direct subfolders by name, without hidden ones. Raises InputError if it is no folder."""
    check(Path(folder).is_dir(), f"{folder}: no such folder")
    return [Path(folder), *sorted(p for p in Path(folder).iterdir() if not _is_hidden(p.name) and p.is_dir())]


def _is_hidden(name):
    return name.startswith((".", "@eaDir"))


def walk_files(folder, skip=lambda path: False):
    """Yield the files at any depth under `folder`, those of a folder before those of its subfolders, by name.

    Links are followed, except to a parent folder. Hidden files and folders (.git, .Trash-1000, .ipynb_checkpoints),
    @eaDir, and folders for which `skip(path)` is true are left out. Raises InputError for a folder that cannot be read.
    """

    def fail(error):
        raise InputError(f"{error.filename}: {error.strerror}")

    def leads_up(path):
        return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())

    for parent, names, files in os.walk(folder, onerror=fail, followlinks=True):
        places = {name: Path(parent, name) for name in sorted(names) if not _is_hidden(name)}
        names[:] = [name for name, place in places.items() if not skip(place) and not leads_up(place)]
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def competition_file(data, slug, names, inputs=KAGGLE_INPUT):
    """Return the path of the first of `names`, files of the competition `slug`, that exists.

    data: the user's folder (--data), or None on Kaggle, where all known mount layouts under `inputs` are tried. The
    file may be one level down. Raises InputError naming what was tried.
    """
    inputs = Path(inputs)
    mounts = [inputs / "competitions" / slug, inputs / slug, *sorted(inputs.glob(f"datasets/*/{slug}"))]
    roots = [path for path in mounts if path.is_dir()] if data is None else [Path(data)]
    for name, folder in itertools.product(names, [folder for root in roots for folder in list_folders(root)]):
        if (folder / name).is_file():
            return folder / name
    wanted = " or ".join(names)
    check(data is not None, f"no {wanted} under {inputs}: name the competition's folder with --data")
    raise InputError(f"{data}: no {wanted} in it (--data must be the folder as Kaggle unpacks it)")
