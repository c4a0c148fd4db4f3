"""Pass a batch through a network whole, or in parts that need less memory and give the same gradients.

The size of the parts depends on the machine, not on the recipe: a run may continue on another GPU with another size.
"""

from contextlib import suppress

import torch

from common.errors import check, log
from common.nn.norms import batch_norms
from common.processes import gather


def pieces(batch, size):
    """Return a batch in parts of at most `size` images (0: all) as (share of the images, part, whether it is the last).

    batch: images (B, …) and targets, a tensor, a list with an entry per image, or a dict of tensors. The batch's mean
    loss is the mean of the parts' losses, weighted by their shares.
    """
    images, target = batch
    count, found = len(images), []
    parts = -(-count // size) if size else 1
    for number in range(parts):
        span = slice(count * number // parts, count * (number + 1) // parts)
        cut = {name: each[span] for name, each in target.items()} if isinstance(target, dict) else target[span]
        found.append(((span.stop - span.start) / count, (images[span], cut), span.stop == count))
    return found


def compiled(module, wanted, device):
    """Return `module`, under torch.compile if `wanted` (see FitConfig.compile) on this device."""
    return torch.compile(module) if wanted is True or (wanted and device.type == "cuda") else module


def uncompiled(module, error):
    """Return the module inside a compiled one, with a warning. Raises `error` unless compiling failed."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        raise error
    log.warning(f"warning: torch.compile failed, so steps are slower: {' '.join(str(error).split())[:200]}")
    return module._orig_mod


def why_whole(model, couples):
    """Return why training batches of a model cannot be split exactly, or ""; couples: as in Network."""
    if any(norm.training for norm in batch_norms(model)):
        return "its batch norms see whole batches"
    return "its loss couples the images of a batch" if couples else ""


def part_size(wanted, size, whole, attempt, name):
    """Return how many images of a batch of `size` to pass at once, 0 for all.

    wanted: a number, or auto: the largest half, quarter … of `size` for which `attempt(part)`, a step on a GPU, does
    not run out of memory. attempt: None on a CPU. whole: from `why_whole`; InputError if a number contradicts it.
    """
    if wanted != "auto":
        remedy = "set frozen_norms if the network has it, or a smaller batch_size and accumulate"
        check(not whole or not 0 < wanted < size, f"--micro-batch {wanted}: {name}: {whole}; {remedy}")
        return wanted
    if attempt is None or whole:
        log.info(f"{name}: --micro-batch auto leaves batches whole: {whole or 'only GPUs report that they are full'}")
        return 0
    part = size
    while part > 1:
        with suppress(torch.OutOfMemoryError):
            attempt(part)
            break
        part //= 2
    part = min(gather(part))
    if part < size:
        log.info(f"{name}: batches of {size} images run out of GPU memory and are split into parts of {part}")
    return part
