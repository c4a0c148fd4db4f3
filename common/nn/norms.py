"""Batch norms of a network, in particular frozen ones."""

from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model):
    """Return the batch norms of a network, in order."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def is_frozen(norm):
    """Return whether a norm has parameters and all of them are frozen."""
    own = list(norm.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)


def set_frozen_eval(model):
    """Make frozen batch norms use and keep their running statistics; call this after `model.train()`."""
    for norm in filter(is_frozen, batch_norms(model)):
        norm.eval()
