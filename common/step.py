"""A step of a run: it runs once and again when it is stale; nothing reads its results while they are missing or stale.

All keys and staleness checks of a run are here. Verbs and reports use the same functions, so no page can show the score
of outdated predictions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from common import processes
from common.config import digest, file_hash, flatten, to_dict
from common.errors import InputError, log
from common.paths import read_json

LARGE = 10**8  # bytes; for larger files, only the size is compared
OUTDATED = "is out of date"


@dataclass(frozen=True)
class Step:
    """A step, named like the verb that runs it.

    make(job) writes `files` and returns a dict for the manifest, or None. needs: names of the steps whose results it
    reads. reads(job): JSON values of everything else it depends on (settings, hashes of other files). files: names of
    the files and folders that it writes to the run's folder, or a function of the job that returns them; the step is
    current while all are unchanged.
    """

    name: str
    make: Callable
    needs: tuple = ()
    reads: Callable = lambda job: None
    files: tuple | Callable = ()


def key_of(job, step):
    """Return the digest of all that a step depends on. Raises InputError if a step that it needs is not current."""
    needed = [require(job, job.steps[name])["key"] for name in step.needs]
    return digest(step.name, step.reads(job), needed)


def require(job, step):
    """Return the manifest's record of a step. Raises InputError naming the verb if the step is not current."""
    if problem := _find_problem(job, step, key_of(job, step)):
        problem += changed_settings(job) if problem == OUTDATED else ""
        raise InputError(f"{job.run.folder}: `{step.name}` {problem}; run the verb `{step.name}` (or `run` for all)")
    return job.run.step(step.name)


def _find_problem(job, step, key):
    """Return "" if the step was made from `key` and its files are those that it left, else what is wrong."""
    record = job.run.step(step.name)
    if record is None:
        return "has no result yet"
    if record["key"] != digest(key):
        return OUTDATED
    made = record.get("made", {})  # `submit` leaves no file if there are no test images
    changed = [name for name, stamp in _stamps(job, step).items() if made.get(name, "") != stamp]
    return f"left {changed[0]}, which is missing or damaged" if changed else ""


def changed_settings(job):
    """Return the differences from config.json's settings, such as " (--seed was 0, now 1)", or ""."""
    path = job.run.path("config.json")
    stored = read_json(path) if path.is_file() else None
    before = dict(flatten(stored)) if isinstance(stored, dict) else {}
    pairs = [(name, before.get(name, value), value) for name, value in flatten(to_dict(job.config))] if before else []
    changed = [f"--{name.replace('_', '-')} was {old}, now {new}" for name, old, new in pairs if old != new]
    return f" ({', '.join(changed)})" if changed else ""


def is_current(job, step):
    """Return whether a step has a result for the present settings, inputs and earlier steps."""
    try:
        require(job, step)
    except InputError:
        return False
    return True


def run_step(job, step):
    """Run a step unless it is current; return its record in the manifest. The main process decides and records."""
    key = key_of(job, step)
    if processes.ask_main(lambda: not _find_problem(job, step, key)):
        log.info(f"{step.name}: up to date")
    else:
        job.run.forget(step.name)  # an interrupted step must not count as finished
        facts = step.make(job) or {}
        processes.ask_main(lambda: job.run.record(step.name, key, made=_stamps(job, step), **facts))
    return job.run.step(step.name)


def _stamps(job, step):
    files = step.files(job) if callable(step.files) else step.files
    return {name: file_stamp(job.run.path(name)) for name in files}


def file_stamp(path):
    """Return a value that changes with a file (hash, or size if large) or a folder's content; None if missing."""
    if path.is_dir():
        return digest([(each.name, file_stamp(each)) for each in sorted(path.iterdir())])
    if not path.is_file():
        return None
    found = path.stat()
    return cached_hash(path) if found.st_size < LARGE else found.st_size


def cached_hash(path):
    """Return the SHA-256 of a file, cached while its size and modification time are unchanged."""
    found = path.stat()
    return _hash(path, found.st_size, found.st_mtime_ns)


@cache
def _hash(path, size, time):
    return file_hash(path)
