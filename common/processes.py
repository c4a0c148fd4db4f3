"""Cores of this machine, and the processes under torchrun that work on something together; torch is not imported here.

Outside trainings these are all processes, which share the images to predict; within one, those that train it together,
usually a single one (see common.train.queue).
"""

import os
import sys
from contextlib import contextmanager

ALONE = "alone"  # a team of one process
_team = None  # ALONE, torch's group of the team, or None for all processes


def cores():
    """Return the number of cores that this process may use; macOS only tells how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory():
    """Return the bytes of main memory that programs can still take; on macOS, all there are."""
    if os.path.isfile("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * int(dict(line.split(":") for line in file)["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_group():
    """Return torch.distributed if this process has joined a group and does not work alone, else None."""
    dist = sys.modules.get("torch.distributed")
    joined = dist is not None and dist.is_available() and dist.is_initialized()
    return dist if joined and _team is not ALONE else None


@contextmanager
def working_as(team):
    """Within the block, work with the processes of this group of torch's only, or ALONE."""
    global _team
    before, _team = _team, team
    try:
        yield
    finally:
        _team = before


def team():
    """Return torch's group of the processes that work together, None for all."""
    return None if _team is ALONE else _team


def rank():
    """Return the index of this process among those that work together."""
    return group.get_rank(_team) if (group := process_group()) else 0


def world():
    """Return the number of processes that work together."""
    return group.get_world_size(_team) if (group := process_group()) else 1


def is_main():
    """Return True in the one process that writes files and prints."""
    if process_group() is None and _team is None and count() > 1:  # not joined yet, or left
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
    """Return the values (any objects) of all processes that work together, in each of them or only in the main one."""
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
    """Return in every process what `make()` returns in the main one, the only one that calls it; see `everywhere`."""
    if is_main():
        made = make()
        gather((None, made))
        return made
    while (asked := gather(None)[0])[0] is not None:
        asked[0]()
    return asked[1]


def everywhere(task):
    """Call `task()` in all processes, which wait for the main one in `ask_main(make)`; `make` calls this."""
    gather((task, None))
    task()
    gather((bool, None))  # all have done it; bool() does nothing


def agree(flag):
    """Return True in every process if `flag` is true in any of them, so that all stop at the same step."""
    return any(gather(bool(flag)))
