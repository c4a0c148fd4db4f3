"""Weight averages over epochs and steps: windowed SWA, classic SWA, EMA, best-k."""

import numpy as np
import torch

from common.nn.norms import batch_norms, is_frozen
from common.train.schedule import cycle_bounds


def average(states):
    """Return the mean of state dicts, computed in float64, in their dtypes; integer buffers are the last state's."""
    states = iter(states)
    last = next(states)
    count, total = 1, {k: v.double() for k, v in last.items() if v.is_floating_point()}
    for last in states:
        count += 1
        for k in total:
            total[k] += last[k].double()
    return {k: (total[k] / count).to(v.dtype) if k in total else v.clone() for k, v in last.items()}


def best_epochs(scores, k):
    """Return the sorted positions of the `k` highest scores; earlier ones win ties."""
    return sorted(np.argsort(-np.asarray(scores), kind="stable")[:k].tolist())


def epochs_of(variant, scores, config):
    """Return the positions in `scores` (one per epoch, higher is better) of the epochs that a variant averages."""
    n = len(scores)
    if variant == "last":
        return [n - 1]
    if variant in ("best", "best_k"):
        return best_epochs(scores, config.best_k if variant == "best_k" else 1)
    if variant == "window":
        # the first if equal; Țimbuș et al. 2021 chose their window, epochs 13 to 16 of 37, from a curve
        size = min(config.window, n)
        first = int(np.argmax(np.round(np.convolve(scores, np.full(size, 1 / size), "valid"), 12)))
        return list(range(first, first + size))
    return classic_epochs(config)


def classic_epochs(config):
    """Return the epochs of classic SWA (Izmailov et al. 2018): ends of cycles, or all from `classic_start` on."""
    if config.cycles > 1:
        return [end - 1 for end in cycle_bounds(config)[1:]]
    return list(range(min(int(config.classic_start * config.epochs), config.epochs - 1), config.epochs))


def epochs_to_keep(scores, config):
    """Return the epochs whose weights may still be needed, including the last ones, where a window may start."""
    n = len(scores)
    keep = {n - 1}
    for variant in config.averaging:
        if variant == "classic":
            keep |= {epoch for epoch in classic_epochs(config) if epoch < n}
        elif variant != "ema":
            keep |= set(epochs_of(variant, scores, config))
        if variant == "window":
            keep |= set(range(max(0, n - config.window), n))
    return keep


class Ema:
    """Exponential moving average of a model's weights with decay min(decay, (1 + t) / (10 + t)) after step t."""

    def __init__(self, model, decay):
        self.decay, self.updates, self._tensors = decay, 0, None
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        """Move the average towards the model's weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self._tensors is None:  # listed once, since collecting a state dict takes longer than the update
            pairs = [(self.state[k], v) for k, v in model.state_dict().items()]
            self._tensors = [[p for p in pairs if p[0].is_floating_point() == floats] for floats in (True, False)]
        floats, others = self._tensors
        torch._foreach_lerp_([a for a, _ in floats], [v for _, v in floats], 1 - decay)
        for a, v in others:
            a.copy_(v)


@torch.no_grad()
def reestimate_batch_norm(model, batches, forward):
    """Recompute the statistics of batch norms that are not frozen as the mean over forward(model, batch)."""
    norms = [norm for norm in batch_norms(model) if not is_frozen(norm)]
    if not norms:
        return
    was_training, momenta = model.training, [m.momentum for m in norms]
    model.eval()  # dropout stays off
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        forward(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)
