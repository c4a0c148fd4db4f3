"""Helpers for several processes under `torchrun`; with one process they do nothing."""

import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from common.processes import agree, gather, is_main, leave, rank, team, world  # noqa: F401  used through this module

WAIT = timedelta(days=30)  # of processes for one another, and of teams that have no training


def start(device="auto"):
    """Join torchrun's process group, if any, and return this process's torch.device: auto, cpu, cuda or cuda:1."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all images of a network have the same size
        torch.set_float32_matmul_precision("high")  # TF32 for networks in float32
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # processes wait as long as one of them prepares the data or trains the last network
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=WAIT)
    return device


def share_buffers(model):
    """Give the buffers of the team's first process, such as statistics of batch norms, to all."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, group=team(), group_src=0)


def barrier():
    """Wait until every process of the team has reached this call."""
    gather(None)


def share(n, block=1):
    """Return the slice of 0 … n-1 that this process handles: a contiguous part of whole blocks, in order of rank."""
    blocks = -(-n // max(block, 1))
    first, last = (blocks * (rank() + part) // world() * max(block, 1) for part in (0, 1))
    return slice(min(first, n), min(last, n))


def join(part):
    """Concatenate the parts of all processes (see `share`) and return the array in every process."""
    parts = [each for each in gather(np.asarray(part)) if len(each)] or [part]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)  # concatenate would copy a single one


def wrap(model, device):
    """Return the module to train: `model` itself, or with several processes its DistributedDataParallel.

    Batch norms see only the images of their own process; the statistics of the first process are kept.
    """
    if world() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, process_group=team())
