"""The folder of a run: its configuration, versions, finished steps and log."""

import contextlib
import errno
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

from tqdm import tqdm

from common.config import digest, file_hash, to_dict
from common.errors import InputError, check, log
from common.paths import lock, make_folder, read_json, remove_leftovers, write_json
from common.processes import is_main

COLOURS = {"red": 31, "green": 32, "yellow": 33}
FINISHED = {"colour": "green"}  # `extra` of log lines at the end of a command
MARKS = (".lock", "config.json", "manifest.json")  # any of these identifies a folder as a run
PACKAGES = (  # recorded in manifest.json
    *("torch", "torchvision", "timm", "segmentation-models-pytorch", "albumentations", "numpy", "pandas"),
    *("scikit-learn", "pydicom", "opencv-python-headless", "numba"),
)


class Run:
    """A run folder. `manifest` records versions and, for each finished step, the key of its inputs and settings.

    Opening a folder locks it. If another process has it open, this raises InputError, or with `may_join` sets `joined`,
    and this process only helps with the trainings. Under torchrun, only the first process locks and writes.
    """

    def __init__(self, folder, may_join=False):
        self.folder = Path(folder)
        check(not self.folder.exists() or self.folder.is_dir(), f"{folder}: not a folder (--out)")
        self._new = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
        if not self._new and any(self.folder.iterdir()) and not any((self.folder / name).exists() for name in MARKS):
            raise InputError(f"--out {folder}: holds other files and no run; name an empty or a new folder")
        make_folder(self.folder)
        self._lock, self.joined = None, False
        if is_main():
            self._lock = self._open_lock()
            held = weakref.ref(self._lock)  # loader processes of a killed run would keep it
            os.register_at_fork(after_in_child=lambda: (file := held()) and file.close())
            try:
                lock(self._lock, folder, "working in this run")
                remove_leftovers(self.folder, "**/")
            except InputError:
                if not may_join:
                    raise
                self.joined = True
                log.info(f"{folder}: another process is working in this run; joining its trainings")

    def _open_lock(self):
        path = self.folder / ".lock"
        try:
            return open(path, "w")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return open(os.devnull)

    def close(self):
        """Release the lock; remove the folder and its parents if they are new and contain nothing but the log."""
        if self._lock is None:
            return
        if self._new and not self.joined and {path.name for path in self.folder.iterdir()} <= {".lock", "log.txt"}:
            shutil.rmtree(self.folder)
            with contextlib.suppress(OSError):  # not empty
                for parent in self._new[1:]:
                    parent.rmdir()
        self._lock.close()

    def path(self, *parts):
        """Return a path inside the run folder."""
        return self.folder.joinpath(*parts)

    def maps(self, name, new=False):
        """Return the path of a prediction's maps; earlier versions wrote .npy files, which `new` maps replace."""
        old = self.path(f"{name}_probs.npy")
        if new:
            old.unlink(missing_ok=True)
        return old if old.is_file() else old.with_suffix(".b2nd")

    @property
    def manifest(self):
        """Return the content of manifest.json, {} before the first step."""
        path = self.path("manifest.json")
        found = read_json(path) if path.is_file() else {}
        steps = found.get("steps", {}) if isinstance(found, dict) else None
        records = steps.values() if isinstance(steps, dict) else [None]
        if not all(isinstance(record, dict) and isinstance(record.get("key"), str) for record in records):
            raise InputError(f"{path}: not the manifest of a run; delete it and run again")
        return found

    def write_config(self, solution, preset, config):
        """Write config.json, from which commands without a preset read the settings."""
        if is_main() and not self.joined:
            write_json(self.path("config.json"), {"solution": solution, "preset": preset, **to_dict(config)})

    def describe(self, seed, inputs):
        """Write versions, git revision, command, seed and the hashes of the files `inputs` to manifest.json."""
        if not is_main():
            return
        manifest, torch = self.manifest, sys.modules.get("torch")
        manifest |= {"command": " ".join(sys.argv[1:]), "seed": seed, "git": git_revision()}
        manifest |= {"python": platform.python_version(), "packages": package_versions()}
        manifest["threads"] = torch.get_num_threads() if torch else None
        manifest["inputs"] = {str(path): file_hash(path) for path in inputs}
        manifest.setdefault("steps", {})
        write_json(self.path("manifest.json"), manifest)

    def step(self, name):
        """Return the record of a finished step, or None."""
        return self.manifest.get("steps", {}).get(name)

    def record(self, step, key, **about):
        """Record in manifest.json that `step` is finished; `about`: its key figures."""
        if not is_main():
            return
        manifest = self.manifest
        manifest.setdefault("steps", {}).pop(step, None)  # the newest step comes last
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        manifest["steps"][step] = {"key": digest(key), "finished": stamp, **about}
        write_json(self.path("manifest.json"), manifest)

    def forget(self, step):
        """Remove the record of `step`, before its outputs are rewritten."""
        manifest = self.manifest
        if is_main() and manifest.get("steps", {}).pop(step, None):
            write_json(self.path("manifest.json"), manifest)


def package_versions():
    """Return the versions of the installed packages that affect results."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_revision():
    """Return the commit of this code, with `+` appended if files have changed; "" outside a checkout."""
    here, command = Path(__file__).resolve().parent, "git describe --always --dirty=+ --abbrev=12 --exclude=*"
    try:
        done = subprocess.run(command.split(), cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


class _LogFile(logging.FileHandler):
    """A log file that ignores a full disk, which the step that writes results will report."""

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def coloured(text, colour, stream):
    """Return the text in a colour of COLOURS if the stream is a terminal and NO_COLOR is not set."""
    shown = colour and stream.isatty() and not os.environ.get("NO_COLOR")
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if shown else text


class _Console(logging.Handler):
    """Print above the progress bars instead of into them; common.cli prints errors."""

    def emit(self, record):
        if record.levelno < logging.ERROR:
            colour = "yellow" if record.levelno == logging.WARNING else getattr(record, "colour", None)
            tqdm.write(coloured(self.format(record), colour, sys.stdout), file=sys.stdout)
            sys.stdout.flush()


def start_log(file=None):
    """Send this project's log to the terminal and, if given, to `file`, in the first process only."""
    handlers = [logging.NullHandler()]
    if is_main():
        console = _Console()
        console.setFormatter(logging.Formatter("%(message)s"))
        handlers.append(console)
        if file is not None:
            to_file = _LogFile(file, encoding="utf-8", errors="backslashreplace")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            handlers.append(to_file)
    for old in log.handlers:
        with contextlib.suppress(OSError):  # a full disk
            old.close()
    log.handlers, log.propagate = handlers, False
    log.setLevel(logging.INFO)
