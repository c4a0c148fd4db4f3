"""The verbs that need no run of their own."""

from solutions.siim_pneumothorax.infer import TOOLS

__all__ = ["TOOLS"]
