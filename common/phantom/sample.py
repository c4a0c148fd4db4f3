"""The folder of an embedded sample: written atomically, and kept while its parameters are unchanged."""

import csv
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import paths
from common.errors import InputError

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def write_sample(folder, parameters, least, write):
    """Fill a temporary folder by `write(path)`, rename it to `folder` and return that as a Path.

    parameters: all that the files depend on, stored in sample.json: `sample` (the solution), `version`, and integers
    whose minima `least` gives. A complete sample of equal parameters is kept, any other replaced. Raises InputError for
    a number out of range and for a folder that holds other files.
    """
    for name, smallest in least.items():
        if not isinstance(parameters[name], int) or parameters[name] < smallest:
            raise InputError(f"sample: {name}={parameters[name]!r} must be a whole number of at least {smallest}")
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        known = paths.read_json(folder / "sample.json") if (folder / "sample.json").is_file() else {}
        if not isinstance(known, dict) or known.get("sample") != parameters["sample"]:
            raise InputError(f"{folder}: holds something other than a sample of {parameters['sample']}; name another")
        if known == parameters:
            return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as temporary:
        new, stale = Path(temporary, "new"), Path(temporary, "stale")
        write(new)
        paths.write_json(new / "sample.json", parameters)
        if folder.exists():
            os.rename(folder, stale)
        os.rename(new, folder)
    return folder


def in_threads(function, *columns):
    """Return the results of a function of several columns, in threads: drawing and coding release the lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, *columns))


def write_rows(path, rows):
    """Write the rows of a CSV file, header included, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
