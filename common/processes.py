"""Cores of this machine, and teams of processes under torchrun; torch is not imported at the top level.

Outside trainings, the team is all processes, which share the images to predict; within a training, it is the processes
that train the network together, usually a single one (see common.train.queue).
"""

import os
import sys
from contextlib import contextmanager

ALONE = "alone"  # a team of one process
_team = None  # ALONE, the team's torch group, or None for all processes


def cores():
    """Return the number of cores that this process may use; on macOS, all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory():
    """Return the bytes of main memory that are still available; on macOS, the total."""
    if os.path.isfile("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * int(dict(line.split(":") for line in file)["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_group():
    """Return torch.distributed if this process belongs to a group and does not work alone, else None."""
    dist = sys.modules.get("torch.distributed")
    joined = dist is not None and dist.is_available() and dist.is_initialized()
    return dist if joined and _team is not ALONE else None


@contextmanager
def working_as(team):
    """Within the block, work only with the processes of this torch group, or ALONE."""
    global _team
    before, _team = _team, team
    try:
        yield
    finally:
        _team = before


def team():
    """Return the torch group of the processes that work together, None for all."""
    return None if _team is ALONE else _team


def rank():
    """Return the index of this process among those that work together."""
    return group.get_rank(_team) if (group := process_group()) else 0


def world():
    """Return the number of processes that work together."""
    return group.get_world_size(_team) if (group := process_group()) else 1


def is_main():
    """Return whether this is the process that writes files and prints."""
    if process_group() is None and _team is None and count() > 1:  # the group is not joined yet, or left
        return os.environ.get("RANK") == "0"
    return rank() == 0


def leave():
    """Leave torchrun's group, if this process has joined it."""
    if (group := process_group()) is not None:
        group.destroy_process_group()


def count():
    """Return the number of processes that torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def count_here():
    """Return the number of processes that torchrun has started on this machine, 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def gather(value, to_all=True):
    """Return the values (any objects) of all processes of the team, in each process or only in the main one."""
    group = process_group()
    if group is None:
        return [value]
    values = [None] * world()
    if to_all:
        group.all_gather_object(values, value, group=_team)
    else:
        group.gather_object(value, values if is_main() else None, group=_team)
    return values


def ask_main(make):
    """Call `make()` in the main process only and return its result in every process; see `everywhere`."""
    if is_main():
        made = make()
        gather((None, made))
        return made
    while (asked := gather(None)[0])[0] is not None:
        asked[0]()
    return asked[1]


def everywhere(task):
    """Call `task()` in all processes; called by `make` in the main process, for which the others wait in `ask_main`."""
    gather((task, None))
    task()
    gather((bool, None))  # all are done; bool() does nothing


def agree(flag):
    """Return, in every process, whether `flag` is true in any of them, so that all stop at the same step."""
    return any(gather(bool(flag)))
