"""A step of a run: made once, remade when what it follows from has changed, refused to whoever reads it too early.

    Step("predict", make, needs=("prepare",), reads=lambda job: job.config.tta, files=("oof.parquet", "test.parquet"))

All keys and all staleness of a run are here; a verb and a report ask the same functions, so that no page can show the
score of other predictions.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from common.config import digest, file_hash
from common.errors import InputError

log = logging.getLogger(__name__)
LARGE = 10**8  # bytes of a file from which on its size alone is compared


@dataclass(frozen=True)
class Step:
    """One step, named like the verb that makes it.

    make(job) writes `files` and returns a dict of facts for the manifest, or None. needs: names of the steps whose
    results it reads. reads(job): JSON values that it follows from besides (settings, hashes of other files). files:
    what it leaves in the run's folder, or a function of the configuration; the step is current while all are there.
    """

    name: str
    make: Callable
    needs: tuple = ()
    reads: Callable = lambda job: None
    files: tuple | Callable = ()


def files_of(job, step):
    """Return the names of the files that a step leaves in the run's folder."""
    return step.files(job.config) if callable(step.files) else step.files


def key_of(job, step):
    """Return the digest of what a step follows from. Raises InputError where a step that it needs is not current."""
    needed = [require(job, job.steps[name])["key"] for name in step.needs]
    return digest(step.name, step.reads(job), needed)


def require(job, step):
    """Return what the manifest records of a step. Raises InputError naming the verb where the step is not current."""
    key, record = key_of(job, step), job.run.step(step.name)
    if not _is_done(job, step, key):
        state = "has no result yet"
        if record is not None:
            changed = [] if record["key"] != digest(key) else _changed(job, step, record)
            state = f"left {changed[0]}, which is missing or damaged" if changed else "is out of date"
        raise InputError(f"{job.run.folder}: `{step.name}` {state}; run the verb `{step.name}` (or `run` for all)")
    return record


def is_current(job, step):
    """Return whether the result of a step belongs to the present settings, inputs and earlier steps."""
    try:
        require(job, step)
    except InputError:
        return False
    return True


def run_step(job, step):
    """Make a step unless it is current, and return what the manifest records of it."""
    key = key_of(job, step)
    if _is_done(job, step, key):
        log.info(f"{step.name}: up to date")
    else:
        job.run.forget(step.name)  # a step that is cut short must not pass for a finished one
        facts = step.make(job) or {}
        job.run.record(step.name, key, made=_stamps(job, step), **facts)
    return job.run.step(step.name)


def _is_done(job, step, key):
    """Whether the step was made from `key` and its files are as it left them; a damaged one is made again."""
    record = job.run.step(step.name)
    return record is not None and record["key"] == digest(key) and not _changed(job, step, record)


def _changed(job, step, record):
    """Names of the step's files that are not as it left them; `submit` leaves none where there are no test images."""
    before = record.get("made", {})
    return [name for name, stamp in _stamps(job, step).items() if before.get(name, "") != stamp]


def _stamps(job, step):
    return {name: file_stamp(job.run.path(name)) for name in files_of(job, step)}


def file_stamp(path):
    """Return what tells a file from a changed one: its hash, the size of a large one; None where there is none."""
    if not path.is_file():
        return None
    found = path.stat()
    return cached_hash(path) if found.st_size < LARGE else found.st_size


def cached_hash(path):
    """Return the SHA-256 of a file; one that has not changed since is not read again."""
    found = path.stat()
    return _hash(path, found.st_size, found.st_mtime_ns)


@cache
def _hash(path, size, time):
    return file_hash(path)
