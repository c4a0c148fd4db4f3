"""The folder of a run: what was asked, with which versions, what is finished, and a log that outlives the terminal."""

import contextlib
import fcntl
import importlib.metadata
import logging
import platform
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from common.config import digest, file_hash, to_dict
from common.errors import InputError
from common.paths import read_json, write_json
from common.train import distributed

log = logging.getLogger(__name__)
PACKAGES = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "albumentations", "numpy", "pandas",
            "scikit-learn", "pydicom", "opencv-python-headless", "numba")  # fmt: skip


class Run:
    """One run folder. `manifest` records the versions and, for each finished step, the key of what it was made from.

    Opening a folder takes its lock: a second process that wants it is told so (InputError) instead of mixing files.
    Under torchrun only the first process locks and writes.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{folder}: not a folder (--out)")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = None
        if distributed.is_main():
            self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - held until the process ends
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{folder}: another process is working in this run") from None

    def close(self):
        """Let go of the folder's lock."""
        if self._lock is not None:
            self._lock.close()

    def path(self, *parts):
        """Path inside the run folder."""
        return self.folder.joinpath(*parts)

    @property
    def manifest(self):
        """What manifest.json says, {} before the first step."""
        path = self.path("manifest.json")
        return read_json(path) if path.is_file() else {}

    def describe(self, solution, preset, config, seed, inputs):
        """Write config.json, and in manifest.json the versions, git revision, seed and the hashes of `inputs`."""
        if not distributed.is_main():
            return
        write_json(self.path("config.json"), {"solution": solution, "preset": preset, **to_dict(config)})
        manifest = self.manifest
        manifest.update(
            solution=solution,
            command=" ".join(sys.argv[1:]),
            seed=seed,
            git=git_revision(),
            python=platform.python_version(),
            packages=package_versions(),
            inputs={str(path): file_hash(path) for path in inputs},
        )
        manifest.setdefault("steps", {})
        write_json(self.path("manifest.json"), manifest)

    def is_done(self, step, key, outputs=()):
        """True when `step` was finished from the same `key` and all its `outputs` are still there."""
        record = self.manifest.get("steps", {}).get(step)
        return record is not None and record["key"] == digest(key) and all(self.path(o).exists() for o in outputs)

    def record(self, step, key, **about):
        """Note that `step` is finished; `about` holds the figures that matter."""
        if not distributed.is_main():
            return
        manifest = self.manifest
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        manifest.setdefault("steps", {})[step] = {"key": digest(key), "finished": stamp, **about}
        write_json(self.path("manifest.json"), manifest)


def package_versions():
    """Versions of the packages on which a result depends; a missing one is left out."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_revision():
    """Commit of the code that runs, with `+` behind it when files are changed; "" outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip()


class _Console(logging.Handler):
    """Prints above the progress bars instead of through them."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def start_log(file=None):
    """Send our log lines to the terminal and, with `file`, to that file too (appended, with times).

    Only the first process of several speaks.
    """
    ours = [logging.getLogger(name) for name in ("common", "solutions")]
    handlers = []
    if distributed.is_main():
        console = _Console()
        console.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(console)
        if file is not None:
            to_file = logging.FileHandler(file, encoding="utf-8")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            handlers.append(to_file)
    for logger in ours:
        for old in logger.handlers:
            old.close()
        logger.handlers = list(handlers)
        logger.setLevel(logging.INFO)
        logger.propagate = False
