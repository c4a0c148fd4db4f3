"""Real data for tests and benchmarks: label tables in torchxrayvision's wheel, radiographs under CXR_REAL_DATA."""

import importlib.util
import os
from pathlib import Path


def label_table(name):
    """Return the path of a label table in the installed torchxrayvision package, or None without the package.

    The package is not imported.
    """
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None:
        return None
    path = Path(spec.submodule_search_locations[0]) / "data" / name
    return path if path.is_file() else None


def real_data(name):
    """Return the folder of one challenge's real radiographs, `$CXR_REAL_DATA/<name>`, or None if it is missing."""
    root = os.environ.get("CXR_REAL_DATA")
    path = Path(root) / name if root else None
    return path if path is not None and path.is_dir() else None
