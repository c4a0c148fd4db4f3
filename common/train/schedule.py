"""Learning rates as pure functions of how far the training is, so that a resumed run needs no scheduler state."""

import math


def constant(progress):
    """Factor 1 throughout. `progress` runs from 0 to 1 over the steps of the phase, here and below."""
    return 1.0


def cosine(progress):
    """From 1 to 0 along half a cosine (Loshchilov and Hutter, 2016, one cycle)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def one_cycle(progress, warmup=0.3, start=1 / 25, end=1e-4):
    """Rise from `start` to 1 over the first `warmup` of the steps, then fall to `end`, both along cosines.

    Source: Smith and Topin, 2018, in the two-phase form with cosine flanks.
    """
    if progress < warmup:
        return 1 + (start - 1) * cosine(progress / warmup)
    return end + (1 - end) * cosine((progress - warmup) / (1 - warmup))


def warm_cosine(progress, warmup=0.05):
    """Linear rise over the first `warmup` of the steps, then half a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return cosine((progress - warmup) / (1 - warmup))


def step_decay(epoch, milestones, factor=0.1):
    """`factor` to the power of the milestones (0-based epochs) that `epoch` has reached."""
    return factor ** sum(epoch >= milestone for milestone in milestones)


def plateau(scores, patience=3, factor=0.2):
    """Factor after the finished epochs with these `scores`, higher being better.

    After `patience` epochs in a row without a new best the factor is multiplied by `factor`, and the count starts
    anew. Computed from the whole history, so it is the same after a resume.
    """
    best, waited, value = -math.inf, 0, 1.0
    for score in scores:
        if score > best:
            best, waited = score, 0
        else:
            waited += 1
            if waited >= patience:
                value, waited = value * factor, 0
    return value


BY_PROGRESS = {"constant": constant, "cosine": cosine, "one_cycle": one_cycle, "warm_cosine": warm_cosine}


def learning_rate(config, epoch, step, steps, scores):
    """Learning rate of one optimizer step.

    `config` is a FitConfig; `epoch` and `step` are 0-based, `step` within the epoch of `steps`; `scores` are the
    validation scores of the unfrozen epochs finished so far, higher being better. The schedule runs over the
    epochs in which nothing is frozen, and so does the decay; before them the rate is `frozen_lr`.
    """
    if epoch < config.frozen_epochs:
        return config.frozen_lr
    epoch -= config.frozen_epochs
    done = epoch * steps + step
    if config.schedule == "plateau":
        factor = plateau(scores, config.patience, config.factor)
    elif config.schedule == "step":
        factor = step_decay(epoch, config.milestones, config.factor)
    else:
        factor = BY_PROGRESS[config.schedule](done / ((config.epochs - config.frozen_epochs) * steps))
    return config.lr * factor / (1 + config.decay * done)
