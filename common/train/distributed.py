"""Helpers for several processes under `torchrun`; with one process they do nothing."""

import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from common.processes import agree, is_main, rank, world  # noqa: F401  part of this module's interface


def start(device="auto"):
    """Join torchrun's process group, if any, and return this process's torch.device: auto, cpu, cuda or cuda:1."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # the other processes wait while the first one prepares the data, which can take more than an hour
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return device


def stop():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait until every process has reached this call."""
    if dist.is_initialized():
        dist.barrier()


def share_rows(n):
    """Return the positions in 0 … n-1 that this process handles: every world-th, starting at its rank."""
    return np.arange(rank(), n, world())


def gather_rows(values, n):
    """Return, in every process, the array (n, ...) of all processes' `values` (len(share_rows(n)), ...) in order."""
    values = np.asarray(values)
    if not dist.is_initialized():
        return values
    parts = [None] * world()
    dist.all_gather_object(parts, values)
    whole = np.empty((n, *values.shape[1:]), values.dtype)
    for first, part in enumerate(parts):
        whole[first :: world()] = part
    return whole


class _SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes on CPUs, which torch's SyncBatchNorm does not support."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        values = x.float()
        count = values.numel() / values.shape[1] * world()
        sums = all_reduce(torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))]))
        mean, square = sums[0] / count, sums[1] / count
        var = (square - mean.square()).clamp_min(0)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.detach(), momentum)
                self.running_var.lerp_(var.detach() * count / (count - 1), momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def synchronise_batch_norm(model, device):
    """Return `model` with batch statistics over all processes; unchanged with one process."""
    if world() == 1 or any(isinstance(m, nn.SyncBatchNorm | _SyncBatchNorm) for m in model.modules()):
        return model  # already converted: a second conversion by timm would drop activations
    import timm.layers  # imported here because it takes seconds and most commands do not need it

    if device.type == "cuda":
        return timm.layers.convert_sync_batchnorm(model)  # torch's conversion would drop timm's fused activations
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                child.__class__ = _SyncBatchNorm
            elif isinstance(child, timm.layers.BatchNormAct2d):
                setattr(module, name, _SyncThenAct(child))
    return model


class _SyncThenAct(_SyncBatchNorm):
    """timm's batch norm with dropout and activation, synchronised; parameter names are unchanged."""

    def __init__(self, source):
        nn.Module.__init__(self)
        self.__dict__.update(source.__dict__)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))
