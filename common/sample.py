"""Writing an embedded sample: whole or not at all, kept while its parameters are the same."""

import os
import tempfile
from pathlib import Path

from common import paths
from common.errors import InputError


def make(folder, parameters, least, write):
    """Let `write(fresh)` fill a fresh folder that becomes `folder`, and return it as a Path.

    parameters: what the bytes depend on, kept in sample.json: `sample`, the name of the solution, `version`, and the
    whole numbers whose smallest values `least` gives. A complete sample of equal parameters is kept, one of others is
    replaced when the new one is complete. Raises InputError for a number out of range and for a folder that holds
    something other than a sample of this solution.
    """
    for name, smallest in least.items():
        if not isinstance(parameters[name], int) or parameters[name] < smallest:
            raise InputError(f"sample: {name}={parameters[name]!r} must be a whole number of at least {smallest}")
    folder = Path(folder)
    if folder.exists() and _parameters_of(folder, parameters["sample"]) == parameters:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as temporary:
        fresh, stale = Path(temporary, "fresh"), Path(temporary, "stale")
        write(fresh)
        paths.write_json(fresh / "sample.json", parameters)
        if folder.exists():
            os.rename(folder, stale)
        os.rename(fresh, folder)
    return folder


def _parameters_of(folder, name):
    """Parameters of the sample in `folder`; None for an empty folder, which may be replaced."""
    if folder.is_dir() and not any(folder.iterdir()):
        return None
    known = paths.read_json(folder / "sample.json") if (folder / "sample.json").is_file() else {}
    if not isinstance(known, dict) or known.get("sample") != name:
        raise InputError(f"{folder}: holds something other than a sample of {name}; name another folder")
    return known
