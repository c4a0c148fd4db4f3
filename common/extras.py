"""Optional packages, the extras of pyproject.toml."""

import importlib.util

from common.errors import check

EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "rtdetr": ("transformers",),
    "efficientdet": ("effdet",),
    "openvino": ("openvino",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}


def is_installed(extra):
    """Return whether all modules of an extra are installed, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in EXTRAS[extra])


def require_extra(extra, what):
    """Raise InputError naming the install command if a module of the extra, which `what` needs, is missing."""
    check(is_installed(extra), f"{what} needs further packages: pip install -e '.[{extra}]'")
