"""Files: whole or not at all, found wherever a challenge is mounted, and never outside their folder."""

import fcntl
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import InputError

KAGGLE_INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
IMAGES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
TEMPORARY = ".*.tmp*"  # glob of the names under which `atomic_path` writes
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path` that takes its name when the block ends well.

    A reader sees the old file or the new one, never half of it. On an error the temporary file is removed.
    The temporary name keeps the suffix, because some writers choose the format by it. An OSError that names no file,
    such as that of a full disk, gets the name of `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the rename must not reach the disk before the bytes do
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write `value` to `path` as indented JSON, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path):
    """Read a JSON file. Raises InputError naming the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error})") from None


def read_parquet(path):
    """Read a table that an earlier step wrote. Raises InputError naming the file when it is missing or damaged."""
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # what pyarrow raises derives from one of them
        raise InputError(f"{path}: damaged table ({_line(error)}); delete it and run again") from None


def read_array(path):
    """Map a .npy array that an earlier step wrote. Raises InputError naming the file when missing or damaged."""
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged array ({_line(error)}); delete it and run again") from None


def read_csv(path, columns=(), **options):
    """Read a CSV that an earlier step wrote. Raises InputError naming the file: missing, damaged, without `columns`.

    options: those of pandas.read_csv.
    """
    try:
        table = pd.read_csv(path, **options)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # what pandas raises derives from the latter
        raise InputError(f"{path}: damaged table ({_line(error)}); delete it and run again") from None
    for name in columns:
        if name not in table:
            raise InputError(f"{path}: damaged table (no column {name}); delete it and run again")
    return table


def _line(error):
    return " ".join(str(error).split())[:200]


def check_id(image_id, where):
    """Return `image_id` if it can be a file name, else raise InputError; `where` names the file and row.

    Ids become paths, so one such as `../../x` would write outside the folder it belongs to.
    """
    if not isinstance(image_id, str) or not _SAFE_ID.fullmatch(image_id) or ".." in image_id:
        raise InputError(f"{where}: {image_id!r} is not a usable id (letters, digits, '.', '_' and '-' only)")
    return image_id


@contextmanager
def held(partial, doing):
    """Create a working folder and hold it: two runs at once would mix their work. A killed holder lets go.

    Raises InputError, saying what another process is `doing`, where the folder is held already.
    """
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"{partial}: another process is {doing}") from None
    try:
        yield
    finally:
        os.close(handle)


def find_images(folder, suffixes=IMAGES):
    """Map the stem of each image under `folder` to its path, whatever the extension and depth.

    Two files with one stem raise InputError, since no rule can say which is meant; hidden files are passed over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = {}
    for parent, names, files in os.walk(folder, onerror=_raise, followlinks=True):
        names.sort()
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in suffixes or name.startswith("."):
                continue
            path = Path(parent) / name
            if stem in found:
                raise InputError(f"{path}: a second image named {stem!r}; the first is {found[stem]}")
            found[stem] = path
    return found


def _raise(error):
    raise error


def competition_folder(data, slug, marker, inputs=KAGGLE_INPUT):
    """Return the folder that holds `marker`, a file name of the competition `slug`.

    `data` is the folder that the user named, or None on Kaggle, where the known mount layouts under `inputs` are
    tried. A folder that holds the marker one level down is accepted. Raises InputError naming what was tried.
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
