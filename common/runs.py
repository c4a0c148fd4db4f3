"""The folder of a run: what was asked, with which versions, what is finished, and a log that outlives the terminal."""

import contextlib
import fcntl
import importlib.metadata
import logging
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from common.config import digest, file_hash, to_dict
from common.errors import InputError
from common.paths import TEMPORARY, read_json, write_json
from common.train import distributed

log = logging.getLogger(__name__)
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "segmentation-models-pytorch",
    "albumentations",
    "numpy",
    "pandas",
    "scikit-learn",
    "pydicom",
    "opencv-python-headless",
    "numba",
)


class Run:
    """One run folder. `manifest` records the versions and, for each finished step, the key of what it was made from.

    Opening a folder takes its lock: a second process that wants it is told so (InputError) instead of mixing files.
    Under torchrun only the first process locks and writes.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{folder}: not a folder (--out)")
        self._is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = None
        if distributed.is_main():
            self._lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - held until the process ends
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{folder}: another process is working in this run") from None
            for left_over in self.folder.rglob(TEMPORARY):  # of a process that was killed while it wrote
                left_over.unlink()

    def close(self):
        """Let go of the folder's lock; a new folder in which nothing was made is removed."""
        if self._lock is None:
            return
        if self._is_new and {path.name for path in self.folder.iterdir()} <= {".lock", "log.txt"}:
            shutil.rmtree(self.folder)
        self._lock.close()

    def path(self, *parts):
        """Path inside the run folder."""
        return self.folder.joinpath(*parts)

    @property
    def manifest(self):
        """What manifest.json says, {} before the first step."""
        path = self.path("manifest.json")
        found = read_json(path) if path.is_file() else {}
        if not isinstance(found, dict) or not isinstance(found.get("steps", {}), dict):
            raise InputError(f"{path}: not the manifest of a run")
        return found

    def write_config(self, solution, preset, config):
        """Write config.json, from which a command without a preset takes its settings."""
        if distributed.is_main():
            write_json(self.path("config.json"), {"solution": solution, "preset": preset, **to_dict(config)})

    def describe(self, seed, inputs):
        """Write the versions, git revision, command, seed and the hashes of `inputs` into manifest.json."""
        if not distributed.is_main():
            return
        manifest = self.manifest
        manifest.update(
            command=" ".join(sys.argv[1:]),
            seed=seed,
            git=git_revision(),
            python=platform.python_version(),
            packages=package_versions(),
            inputs={str(path): file_hash(path) for path in inputs},
        )
        manifest.setdefault("steps", {})
        write_json(self.path("manifest.json"), manifest)

    def step(self, name):
        """What `record` noted about a finished step, or None."""
        return self.manifest.get("steps", {}).get(name)

    def is_done(self, step, key, outputs=()):
        """True when `step` was finished from the same `key` and all its `outputs` are still there."""
        record = self.step(step)
        return record is not None and record["key"] == digest(key) and all(self.path(o).exists() for o in outputs)

    def record(self, step, key, **about):
        """Note that `step` is finished; `about` holds the figures that matter."""
        if not distributed.is_main():
            return
        manifest = self.manifest
        manifest.setdefault("steps", {}).pop(step, None)  # the newest comes last
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        manifest["steps"][step] = {"key": digest(key), "finished": stamp, **about}
        write_json(self.path("manifest.json"), manifest)

    def forget(self, step):
        """Take back that `step` is finished, before its outputs are written anew."""
        manifest = self.manifest
        if distributed.is_main() and manifest.get("steps", {}).pop(step, None):
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
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip()


class _File(logging.FileHandler):
    """A log that lets the work go on, and end in its own error, where the disk is full."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Console(logging.Handler):
    """Prints above the progress bars instead of through them; errors are left to standard error."""

    def emit(self, record):
        if record.levelno >= logging.ERROR:
            return
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def start_log(file=None):
    """Send our log lines to the terminal and, with `file`, to that file too (appended, with times).

    Only the first process of several speaks.
    """
    ours = [logging.getLogger(name) for name in ("common", "solutions")]
    handlers = [logging.NullHandler()]
    if distributed.is_main():
        console = _Console()
        console.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(console)
        if file is not None:
            to_file = _File(file, encoding="utf-8")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            handlers.append(to_file)
    for logger in ours:
        for old in logger.handlers:
            with contextlib.suppress(OSError):  # a full disk, again
                old.close()
        logger.handlers = list(handlers)
        logger.setLevel(logging.INFO)
        logger.propagate = False
