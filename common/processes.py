"""Cores of this machine, rank and number of the processes under torchrun; see common.train.distributed.

Torch is not imported here.
"""

import os
import sys


def cores():
    """Return the number of cores that this process may use; macOS only tells how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_group():
    """Return torch.distributed if this process has joined a group, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def rank():
    """Return the index of this process, 0 when it is the only one."""
    return group.get_rank() if (group := process_group()) else 0


def world():
    """Return the number of processes that train together."""
    return group.get_world_size() if (group := process_group()) else 1


def is_main():
    """Return True in the one process that writes files and prints."""
    return rank() == 0


def agree(flag):
    """Return True in every process if `flag` is true in any of them, so that all stop at the same step."""
    group = process_group()
    if group is None:
        return flag
    flags = [None] * world()
    group.all_gather_object(flags, bool(flag))
    return any(flags)
