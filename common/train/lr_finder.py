"""The learning-rate range test: raise the rate until the loss breaks, suggest the one where it fell fastest."""

import math

import numpy as np
import torch
from tqdm import tqdm

from common.errors import InputError


def find_learning_rate(model, step, batches, *, low=1e-7, high=1.0, steps=100, weight_decay=0.0):
    """Train over `steps` batches by Adam with rates rising from `low` to `high`; the model is left as it was.

    `step(model, batch) -> loss` as for `fit`; `batches` is any iterable, begun anew when it ends. Returns
    (rates, smoothed losses, suggestion), the first two float64 arrays of equal length. The suggestion is the rate
    of the steepest fall of the smoothed loss over log rate. Raises InputError when the loss never falls.
    Source: Smith, 2017; stops at four times the best loss, smoothing 0.98 of the per-step loss.
    """
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    was_training = model.training
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=low, weight_decay=weight_decay)
    model.train()
    if hasattr(model, "set_frozen_eval"):
        model.set_frozen_eval()
    rates, losses, mean = [], [], 0.0
    iterator = iter(batches)
    for number in tqdm(range(steps), desc="learning-rate finder", leave=False):
        try:
            batch = next(iterator)
        except StopIteration:
            iterator = iter(batches)
            batch = next(iterator)
        rate = low * (high / low) ** (number / max(steps - 1, 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = step(model, batch)
        loss.backward()
        optimizer.step()
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
    """The rate at which the loss falls fastest per decade; the ends, where smoothing misleads, do not count."""
    if len(rates) < 10:
        raise InputError(f"learning-rate finder: the loss broke after {len(rates)} steps; start from a lower rate")
    slope = np.gradient(np.asarray(losses), np.log10(rates))
    inner = slice(len(rates) // 10, len(rates) - 2)
    if not slope[inner].min() < 0:
        raise InputError("learning-rate finder: the loss never fell; try more steps or a higher top rate")
    return float(rates[inner][np.argmin(slope[inner])])
