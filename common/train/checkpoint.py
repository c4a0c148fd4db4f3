"""Weights as safetensors, resume files without pickled code, both written whole or not at all."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import InputError
from common.paths import atomic_path


def save_weights(path, state, **about):
    """Write a state dict as safetensors with `about` (JSON values) in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"about": json.dumps(about, sort_keys=True)})


def load_weights(path, model=None):
    """Read a safetensors file; returns (state dict on the CPU, about).

    With `model`, the weights are loaded into it, strictly. Raises InputError naming the file when it is missing,
    damaged, or of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; train first") from None
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    if model is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{path}: weights of another network ({str(error).splitlines()[1].strip()})") from None
    return state, about


def save_resume(path, state):
    """Write a resume file: nested dicts and lists of tensors, numbers and strings."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_resume(path):
    """Read a resume file, or return None where there is none. Raises InputError when it cannot be read."""
    if not Path(path).is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: not a resume file ({str(error).splitlines()[0]}); delete it to start anew") from None
