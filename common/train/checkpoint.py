"""Weights as safetensors files and checkpoints without pickled code, both written atomically."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from common.errors import InputError, check
from common.paths import atomic_path


def save_weights(path, state, **about):
    """Write a state dict as safetensors with `about` (JSON values) in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        # write_bytes, since the libraries' own writers raise unclear errors on a full disk
        temporary.write_bytes(save(tensors, metadata={"about": json.dumps(about, sort_keys=True)}))


def halve(state, where):
    """Return a state dict with matrices and kernels as float16. Raises InputError for values out of its range."""
    # one-dimensional tensors are unchanged: a running variance can exceed float16
    halved = {name: t.half() if t.ndim > 1 and t.is_floating_point() else t for name, t in state.items()}
    for name, tensor in halved.items():
        check(torch.isfinite(tensor).all(), f"{where}: {name} has values outside the range of half precision")
    return halved


def load_weights(path, model=None):
    """Return (state dict on the CPU, about) of a safetensors file, loaded strictly into `model`, else InputError."""
    try:
        # not with the library, which reports a signal during reading as an error of the file
        content = Path(path).read_bytes()
        state = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header.get("__metadata__", {}).get("about", "{}"))
        if not isinstance(about, dict):
            raise ValueError("unknown metadata")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None
    if model is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{path}: weights of another network ({str(error).splitlines()[1].strip()})") from None
    return state, about


def save_resume(path, state):
    """Write a checkpoint of nested dicts and lists of tensors, numbers and strings. Raises OSError on a full disk."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # raised by torch on closing a file that it could not write
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load_resume(path):
    """Return the state in a checkpoint, None if there is none; raise InputError if it cannot be read."""
    if not Path(path).is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a resume file ({reason}); delete it to start over") from None
