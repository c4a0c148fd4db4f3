"""Learning-rate range test: raise the rate until the loss diverges; suggest the rate of steepest descent."""

import itertools
import math

import numpy as np
import torch
from tqdm import tqdm

from common.errors import InputError, check
from common.nn.norms import set_frozen_eval
from common.nn.precision import autocast, precision


def find_learning_rate(model, step, batches, *, low=1e-7, high=1.0, steps=100, weight_decay=0.0, wanted="auto"):
    """Return (rates, smoothed losses, suggested rate) of `steps` Adam steps with rates rising from `low` to `high`.

    step(model, batch) -> loss; batches: an iterable, repeated as needed; wanted: precision, as in a FitConfig. Losses
    are smoothed by 0.98; the test stops at four times the lowest. Weights and mode are restored. Raises
    InputError if the loss never falls. Source: Smith, 2017.
    """
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    was_training = model.training
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=low, weight_decay=weight_decay)
    device = next(model.parameters()).device
    dtype = precision(device, wanted)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    model.train()
    set_frozen_eval(model)
    rates, losses, mean = [], [], 0.0
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    for number, batch in zip(tqdm(range(steps), desc="learning-rate finder", leave=False), endless, strict=False):
        rate = low * (high / low) ** (number / max(steps - 1, 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            loss = step(model, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        mean = 0.98 * mean + 0.02 * loss.item()
        smooth = mean / (1 - 0.98 ** (number + 1))
        if not math.isfinite(smooth) or (losses and smooth > 4 * min(losses)):
            break
        rates.append(rate)
        losses.append(smooth)
    model.load_state_dict(before)
    model.train(was_training)
    return np.array(rates), np.array(losses), suggest(rates, losses)


def suggest(rates, losses):
    """Return the rate at which the loss falls fastest per decade, ignoring the ends, where smoothing misleads."""
    if len(rates) < 10:
        raise InputError(f"learning-rate finder: the loss diverged after {len(rates)} steps; start from a lower rate")
    slope = np.gradient(np.asarray(losses), np.log10(rates))
    inner = slice(len(rates) // 10, len(rates) - 2)
    check(slope[inner].min() < 0, "learning-rate finder: the loss never fell; try more steps or a higher top rate")
    return float(rates[inner][np.argmin(slope[inner])])
