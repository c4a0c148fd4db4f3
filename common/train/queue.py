"""The queue of a run's trainings: every process under torchrun, on any machine, takes the next one.

A process claims a training by a file in its folder, the lease, which it touches every few seconds. The lease of a dead
process expires, and another process takes over from the last checkpoint. No scheduler: the run's folder is the queue.
"""

import json
import os
import socket
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch.distributed as dist

from common import processes
from common.budget import Stopped
from common.errors import log
from common.paths import LEASE, remove_leftovers
from common.train.distributed import WAIT

BEAT_SECONDS = 10
EXPIRES_SECONDS = 180  # without a touch; network file systems show a change within a minute
POLL_SECONDS = 2


def work_through(trainings, run, budget, train, devices_per_training=None):
    """Call `train(network)` for unfinished Networks; return when this or other processes have finished all.

    trainings: ordered so that each comes after its sources. budget: a Budget; Stopped is raised when it is spent while
    other processes work on the remaining trainings. devices_per_training: processes that train one network together; by
    default, as many as there are per training that can begin, at least one. Collective.
    """
    ready = [network for network in trainings if _can_begin(network, run)]
    batches = [network.config.batch_size for network in trainings if not network.is_finished(run)]
    together = processes.ask_main(lambda: team_size(len(ready), batches, processes.world(), devices_per_training))
    try:
        with processes.working_as(_join_team(together)):
            while True:
                number = processes.ask_main(lambda: _claim_next(trainings, run, budget))
                if number is None:
                    return
                if isinstance(number, str):
                    raise Stopped(number)
                lease = trainings[number].folder(run) / LEASE
                with _beating(lease, budget) if processes.is_main() else nullcontext():
                    train(trainings[number])
    finally:  # a signal may have arrived between a claim and its block
        for network in trainings:
            path = network.folder(run) / LEASE
            with suppress(FileNotFoundError, ValueError):
                if json.loads(path.read_text()) == _owner() or (network.is_finished(run) and _is_expired(path)):
                    release(path)  # also the lease of a process killed after the end of its training


def team_size(n_ready, batch_sizes, n_processes, wanted=None):
    """Return how many processes train a network together: a divisor of the batch sizes of all trainings to come.

    n_ready: how many of these can begin now.
    """
    if not n_ready:
        return 1
    most = min(n_processes, wanted or max(1, n_processes // n_ready))
    size = max(n for n in range(1, most + 1) if not any(batch % n for batch in batch_sizes))
    if size < most:
        log.info(f"{size} instead of {most} processes train a network together, so that they divide its batch")
    return size


def _join_team(size):
    """Return this process's group of consecutive ranks; ALONE for one process."""
    own = processes.ALONE
    for first in range(0, processes.world(), size) if size > 1 else ():
        ranks = list(range(first, min(first + size, processes.world())))
        group = dist.new_group(ranks, timeout=WAIT)  # every process must take part in creating every group
        if processes.rank() in ranks and len(ranks) == size:
            own = group
    return own


def _can_begin(network, run):
    sources = [*network.needs, *([network.starts_from] if network.starts_from else [])]
    return not network.is_finished(run) and all(source.is_finished(run) for source in sources)


def _claim_next(trainings, run, budget):
    """Wait for a training that can begin and claim it; return its number, or None if all are finished.

    Returns the reason, a str, if the budget is spent.
    """
    waits = False
    while True:
        if all(network.is_finished(run) for network in trainings):
            return None
        for number, network in enumerate(trainings):
            if _can_begin(network, run) and claim(network.folder(run) / LEASE):
                if not network.is_finished(run):  # its owner may have just finished
                    return number
                release(network.folder(run) / LEASE)
        if budget.is_over():
            return budget.reason
        if not waits:
            log.info("other processes are running all trainings that can begin; waiting for them")
            waits = True
        time.sleep(POLL_SECONDS)


# ---- leases --------------------------------------------------------------------------------------------------------


def claim(path):
    """Create the lease `path` and return True; False if another process holds it and is alive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _create(path):
        return True
    takeover = path.with_suffix(".takeover")  # only one of the processes that find it expired takes it
    if not _is_expired(path) or not _create(takeover):
        if _is_expired(takeover):
            release(takeover)
        return False
    try:
        if not _is_expired(path):
            return False
        log.info(f"{path.parent}: its process is gone; continuing from its last checkpoint")
        release(path)
        remove_leftovers(path.parent, "**/")
        return _create(path)
    finally:
        release(takeover)


def release(path):
    """Release a lease."""
    path.unlink(missing_ok=True)


def _create(path):
    try:
        with open(path, "x") as file:
            json.dump(_owner(), file)
    except FileExistsError:
        return False
    return True


def _owner(process=None):
    """Return an identifier of this process (or another of this machine), unique among all that share the files."""
    process = os.getpid() if process is None else process
    machine = [socket.gethostname()]
    with suppress(OSError):  # containers may share a host name and have their own process numbers
        machine += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return {"machine": machine, "process": process, "began": _begun(process)}


def _begun(process):
    """Return when a process of this machine began, in clock ticks as text; None if it is none, or without /proc."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]


def _is_expired(path):
    """Return whether a lease's owner is gone: dead on this machine, or silent for too long on another."""
    here, clock = _owner(), path.with_name(f".{socket.gethostname()}-{os.getpid()}.clock")
    clock.touch()  # gives the file system's time, which may be another machine's
    try:
        silent = clock.stat().st_mtime - path.stat().st_mtime
        owner = json.loads(path.read_text())
    except FileNotFoundError:
        return False
    except ValueError:  # still being written
        owner = {}
    finally:
        clock.unlink(missing_ok=True)
    if owner == here:  # an earlier process with the same number
        return True
    if isinstance(owner, dict) and owner.get("machine") == here["machine"]:
        try:
            os.kill(owner["process"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # a process of another user
            pass
        if "began" in owner and (begun := _begun(owner["process"])) is not None:
            return begun != owner["began"]  # the same process lives, even if it is paused
    return silent > EXPIRES_SECONDS


@contextmanager
def _beating(path, budget):
    """Touch the lease until the block ends, then release it; if another process has taken it over, end the budget."""
    done = threading.Event()

    def beat():
        while not done.wait(BEAT_SECONDS):
            with suppress(OSError, ValueError):
                if json.loads(path.read_text()) != _owner():
                    budget.reason = "another process has taken this training over"
                    return
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError, ValueError):
            if json.loads(path.read_text()) == _owner():
                release(path)
