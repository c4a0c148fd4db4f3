"""Which epochs' weights are averaged, and how: windowed SWA, classic SWA, EMA, best-k."""

import numpy as np
import torch


def average(states):
    """Mean of state dicts, in float64, one pass; whole-number buffers are taken from the last one.

    `states` is any iterable of dicts with the same keys, so files can be read one at a time.
    """
    total, count, last = None, 0, None
    for last in states:
        count += 1
        if total is None:
            total = {k: v.double() for k, v in last.items() if v.is_floating_point()}
        else:
            for k in total:
                total[k] += last[k].double()
    if total is None:
        raise ValueError("nothing to average")
    return {k: (total[k] / count).to(v.dtype) if k in total else v.clone() for k, v in last.items()}


def best_window(scores, size):
    """First position of the `size` consecutive scores with the highest mean, and how many there are.

    The peak window of Țimbuș et al. 2021 (epochs 13 to 16 of 37), found instead of read off a curve. The first of
    equals wins. With fewer scores than `size`, all of them.
    """
    size = min(size, len(scores))
    means = np.convolve(scores, np.full(size, 1 / size), "valid")
    return int(np.argmax(np.round(means, 12))), size


def best_epochs(scores, k):
    """Positions of the `k` highest scores, earlier first among equals, in order of position."""
    return sorted(np.argsort(-np.asarray(scores), kind="stable")[:k].tolist())


def epochs_of(variant, scores, config):
    """Positions in `scores` (one score an epoch, higher is better) whose weights the variant averages."""
    n = len(scores)
    if variant == "last":
        return [n - 1]
    if variant == "best":
        return best_epochs(scores, 1)
    if variant == "best_k":
        return best_epochs(scores, config.best_k)
    if variant == "window":
        first, size = best_window(scores, config.window)
        return list(range(first, first + size))
    if variant == "classic":
        return list(range(min(int(config.classic_start * n), n - 1), n))
    raise ValueError(f"{variant}: not made of whole epochs")


def epochs_to_keep(scores, config):
    """Positions whose weights may still be needed, given the scores so far; all others can be deleted.

    A window that is not complete yet can only start in the last `window - 1` epochs. The classic average always
    reaches to the end, so its epochs are kept from the planned start on.
    """
    n = len(scores)
    keep = {n - 1}
    for variant in config.averaging:
        if variant == "window":
            keep |= set(epochs_of("window", scores, config)) | set(range(max(0, n - config.window), n))
        elif variant == "classic":
            keep |= {e for e in range(n) if e >= int(config.classic_start * config.epochs)}
        elif variant in ("best", "best_k"):
            keep |= set(epochs_of(variant, scores, config))
    return keep


class Ema:
    """Exponential moving average of a model's weights, updated after every optimizer step.

    decay_t = min(decay, (1 + t) / (10 + t)), so that the start does not hold the average back.
    """

    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        """Move the average towards the model's weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(self.state[k], v) for k, v in model.state_dict().items()]
        floats = [(a, v) for a, v in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [v for _, v in floats], 1 - decay)
        for a, v in pairs:
            if not a.is_floating_point():
                a.copy_(v)


@torch.no_grad()
def reestimate_batch_norm(model, batches, forward):
    """Recompute the running statistics of batch norms as the plain mean over `batches`.

    Averaged weights need it: their activations are those of none of the averaged networks. `forward(model, batch)`
    runs the network once. Modes and momenta are as before afterwards. Norms whose parameters are all frozen keep their
    statistics, as they do in training. Does nothing without batch norms.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and not _frozen(m)]
    if not norms:
        return
    was_training, momenta = model.training, [m.momentum for m in norms]
    model.eval()  # dropout stays off; only the norms count
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        forward(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)


def _frozen(norm):
    own = list(norm.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)
