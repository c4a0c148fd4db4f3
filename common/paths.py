"""File helpers: atomic writes, checked reads, safe names, locks, and the places where competitions are mounted."""

import fcntl
import hashlib
import json
import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError

log = logging.getLogger(__name__)
KAGGLE_INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
IMAGES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
_FORMULA = tuple("=+-@\t\n＝＋－＠")
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path` that is renamed to it when the block succeeds.

    A reader sees the old file or the new one, never half of it. On an error the temporary file is removed. Its name
    keeps the suffix, from which some writers infer the format. An OSError without a file name, as from a full disk,
    gets the name of `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]  # fixed length: names have a limit
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
    """Delete temporary files that killed processes left in a folder; inside "**/": at any depth."""
    for left_over in Path(folder).glob(f"{inside}.cxr-*.tmp*"):
        left_over.unlink()


def write_text(path, text):
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
        escape_formulas(table).to_csv(temporary, index=False)


def escape_formulas(table):
    """Return a DataFrame whose text no spreadsheet runs as a formula: an apostrophe is put before it.

    Applies to text cells and column names that begin with = + - @, tab or line end and are not numbers. Source:
    owasp.org/www-community/attacks/CSV_Injection.
    """
    texts = table.select_dtypes(exclude=["number", "bool", "datetime"])
    return table.assign(**{name: texts[name].map(escape_formula) for name in texts}).rename(columns=escape_formula)


def escape_formula(value):
    """Return `value`, with an apostrophe before it if a spreadsheet would run it as a formula."""
    if not isinstance(value, str):
        return value
    value = value.replace("\r", "\n")  # pandas does not quote a lone \r, which would then start a row
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
    import pandas as pd  # imported late here and below to keep --help fast

    with checked_read(path, "table"):
        return pd.read_parquet(path)


def read_array(path):
    """Memory-map a .npy array that an earlier step wrote. Raises InputError if it is missing or damaged."""
    import numpy as np

    with checked_read(path, "array"):
        return np.load(path, mmap_mode="r")


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
    """Return `image_id` if it can be a file name; otherwise raise InputError, where `where` names the file and row.

    Ids become paths, so that `../../x` would be written outside its folder.
    """
    if not isinstance(image_id, str) or not _SAFE_ID.fullmatch(image_id) or ".." in image_id:
        raise InputError(f"{where}: {image_id!r} is not a usable id (letters, digits, '.', '_' and '-' only)")
    return image_id


def lock(handle, folder, doing):
    """Take an exclusive lock on an open file of `folder`; it is released when the process ends.

    Raises InputError, saying what the other process is `doing`, if it is taken; logs a file system without locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is {doing}") from None
    except OSError as error:
        log.info(f"{folder}: cannot be locked ({error.strerror}): do not start a second command in it")


@contextmanager
def lock_folder(folder, doing):
    """Create a working folder and hold an exclusive lock on it within the block.

    Raises InputError, saying what the other process is `doing`, if the folder is locked already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, folder, doing)
        yield
    finally:
        os.close(handle)


def find_images(folder, suffixes=IMAGES):
    """Return {stem: path} of the images at any depth under `folder`, as `walk_files` finds them.

    Raises InputError if there is no such folder, or if two files share a stem.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = {}
    for path in walk_files(folder):
        stem = path.stem
        if path.suffix.lower() in suffixes:
            if stem in found:
                raise InputError(f"{path}: a second image named {stem!r}; the first is {found[stem]}")
            found[stem] = path
    return found


def walk_files(folder, skip=lambda path: False):
    """Yield the files at any depth under `folder`, those of a folder before those of its subfolders, each by name.

    Links are followed. Hidden files and folders (.git, .Trash-1000, .ipynb_checkpoints), @eaDir, and folders for which
    `skip(path)` is true are left out. Raises InputError for a folder that cannot be read.
    """

    def fail(error):
        raise InputError(f"{error.filename}: {error.strerror}")

    for parent, names, files in os.walk(folder, onerror=fail, followlinks=True):
        names[:] = sorted(n for n in names if not n.startswith((".", "@eaDir")) and not skip(Path(parent, n)))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def competition_folder(data, slug, marker, inputs=KAGGLE_INPUT):
    """Return the folder that holds `marker`, a file name of the competition `slug`.

    data: the folder that the user named (--data), or None on Kaggle, where every known mount layout under `inputs` is
    tried. The marker may lie one level down. Raises InputError naming what was tried.
    """
    if data is not None:
        roots = [Path(data)]
        if not roots[0].is_dir():
            raise InputError(f"{data}: no such folder (--data)")
    else:
        inputs = Path(inputs)
        roots = [inputs / "competitions" / slug, inputs / slug, *sorted(inputs.glob(f"datasets/*/{slug}"))]
    for root in roots:
        for candidate in [root, *(sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else [])]:
            if (candidate / marker).is_file():
                return candidate
    if data is None:
        raise InputError(f"no {marker} under {inputs}: name the competition's folder with --data")
    raise InputError(f"{data}: no {marker} in it (--data must be the folder as Kaggle unpacks it)")
