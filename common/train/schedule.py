"""Learning rates as pure functions of the training's progress, so resuming needs no scheduler state."""

import itertools
import math

from timm.optim import param_groups_layer_decay

from common.errors import check


def cosine(progress):
    """Return a factor that falls from 1 to 0 over progress 0 to 1 (Loshchilov and Hutter, 2016, one cycle)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def one_cycle(progress, warmup=0.3, start=1 / 25, end=1e-4):
    """Return a factor that rises from `start` to 1 until `warmup`, then falls to `end` (Smith and Topin, 2018)."""
    if progress < warmup:
        return 1 + (start - 1) * cosine(progress / warmup)
    return end + (1 - end) * cosine((progress - warmup) / (1 - warmup))


def warm_cosine(progress, warmup=0.05):
    """Return a factor that rises linearly over the share `warmup` of the steps, then falls to 0 along half a cosine."""
    if progress < warmup:
        return progress / warmup
    return cosine((progress - warmup) / (1 - warmup))


def plateau(scores, patience=3, factor=0.2):
    """Return `factor` ** n, n being how often `patience` consecutive epochs brought no new best score."""
    best, waited, value = -math.inf, 0, 1.0
    for score in scores:
        best, waited = (score, 0) if score > best else (best, waited + 1)
        if waited == patience:
            value, waited = value * factor, 0
    return value


BY_PROGRESS = {"constant": lambda progress: 1.0, "cosine": cosine, "one_cycle": one_cycle, "warm_cosine": warm_cosine}


def cycle_bounds(config):
    """Return the first epoch of each cycle of a FitConfig, then the number of epochs (Loshchilov and Hutter, 2016)."""
    first, length = config.frozen_epochs, (config.epochs - config.frozen_epochs) / config.cycles
    return [first + round(k * length) for k in range(config.cycles + 1)]


def learning_rate(config, epoch, step, steps, scores):
    """Return the learning rate of one optimizer step.

    config: a FitConfig. epoch, step: 0-based, `step` within an epoch of `steps`. scores: validation scores of the
    finished unfrozen epochs, higher being better. Schedule and decay cover the unfrozen epochs, the schedule once
    per cycle. In the frozen epochs, the rate is `frozen_lr`; with one_cycle, they form a separate cycle.
    """
    if epoch < config.frozen_epochs:
        cycle = config.schedule == "one_cycle"
        return config.frozen_lr * (one_cycle((epoch * steps + step) / (config.frozen_epochs * steps)) if cycle else 1)
    done = (epoch - config.frozen_epochs) * steps + step
    if config.schedule == "plateau":
        factor = plateau(scores, config.patience, config.factor)
    elif config.schedule == "step":
        factor = config.factor ** sum(epoch - config.frozen_epochs >= milestone for milestone in config.milestones)
    else:
        start, end = next(pair for pair in itertools.pairwise(cycle_bounds(config)) if epoch < pair[1])
        more = {"warmup": config.warmup} if config.schedule == "warm_cosine" else {}
        factor = BY_PROGRESS[config.schedule](((epoch - start) * steps + step) / ((end - start) * steps), **more)
    return config.lr * factor / (1 + config.decay * done)


def parameter_groups(model, config):
    """Return the trainable parameters for an optimizer; with `layer_decay`, in groups with an lr_scale.

    lr_scale is 1 for the backbone's last block and all later layers, and lowest for the first layer; the backbone's
    biases and norms get no weight decay (Bao et al. 2022, BEiT). InputError if timm does not number the layers.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.layer_decay == 1:
        return parameters
    net = getattr(model, "net", None)
    check(hasattr(net, "group_matcher"), "layer_decay: timm does not number the layers of this network")
    kept = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    groups = param_groups_layer_decay(net, config.weight_decay, kept, layer_decay=config.layer_decay)
    grouped = {id(p) for group in groups for p in group["params"]}
    return [*groups, {"params": [p for p in parameters if id(p) not in grouped]}]
