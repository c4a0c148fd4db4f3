"""Real data for tests and benchmarks: label tables in torchxrayvision's wheel, radiographs under CXR_REAL_DATA."""

import importlib.util
import os
from pathlib import Path


def label_table(name):
    """Path of one of the label tables inside the installed torchxrayvision package, or None without the package.

    The package is found but not imported. Tables used here: `siim-pneumothorax-train-rle.csv.gz` and others.
    """
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None:
        return None
    path = Path(spec.submodule_search_locations[0]) / "data" / name
    return path if path.is_file() else None


def real_data(name):
    """Folder of one challenge's real radiographs, `$CXR_REAL_DATA/<name>`, or None where there is none."""
    root = os.environ.get("CXR_REAL_DATA")
    path = Path(root) / name if root else None
    return path if path is not None and path.is_dir() else None
