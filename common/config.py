"""Configuration: frozen dataclasses, their JSON and YAML forms, and digests that identify them."""

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from common.errors import InputError, check

LARGEST = 1 << 14  # largest side of stored images, in pixels; X-ray detectors have fewer
Architecture = Literal["faster_rcnn", "retinanet", "fcos", "faster_rcnn_v2", "retinanet_v2", "rtdetr", "efficientdet"]
Averaging = Literal["last", "best", "best_k", "window", "classic", "ema"]


@dataclass(frozen=True)
class FitConfig:
    """Training settings that the networks of all solutions share."""

    epochs: int = 20  # Total number of epochs, frozen ones included.
    frozen_epochs: int = 0  # Number of first epochs in which part of the network is frozen.
    frozen_lr: float = 1e-3  # Learning rate in the frozen epochs.
    lr: float = 1e-3  # Peak learning rate in the other epochs.
    schedule: Literal["constant", "cosine", "warm_cosine", "one_cycle", "step", "plateau"] = "cosine"
    """Learning-rate schedule after the frozen epochs."""
    cycles: int = 1  # Runs of the schedule from start to end (warm restarts); classic SWA then averages their ends.
    warmup: float = 0.05  # warm_cosine: share of the steps in which the rate rises.
    patience: int = 3  # plateau: epochs without improvement before the rate is reduced.
    plateau_metric: str = ""  # plateau: the metric to monitor, written as in `metric`; empty: the same.
    factor: float = 0.1  # plateau and step: the rate is multiplied by this.
    milestones: tuple[int, ...] = (30, 60, 90)
    """step: epochs (counted from the first unfrozen one) at which the rate is reduced."""
    decay: float = 0.0  # The scheduled rate is divided by 1 + decay · n after n optimizer steps.
    batch_size: int = 16  # Images per forward pass, over all processes.
    accumulate: int = 1  # Batches whose gradients are added before an optimizer step; batch norms see one of them.
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    layer_decay: float = 1.0  # Learning rate of each layer of timm's network relative to the next layer's.
    weight_decay: float = 1e-2
    momentum: float = 0.9  # sgd only.
    clip_norm: float = 0.0  # Maximum norm of the gradient; 0: no clipping.
    metric: str = "score"  # Validation metric by which epochs are compared; a leading minus: lower is better.
    validate_images: int = 0
    """Number of random held-out images for comparing epochs; 0: all. Weight averages are compared on all of them."""
    averaging: tuple[Averaging, ...] = ("last", "best")
    """Weight averages to compute at the end and to compare on the validation images."""
    keep: Literal["highest", "last", "best", "best_k", "window", "classic", "ema"] = "highest"
    """Weight average to keep: a named one, or the one with the highest validation metric."""
    keep_variants: bool = False  # Also keep the weights of the other averages, which SIIM's `ablate` compares.
    half_weights: bool = False  # Store matrices and kernels as float16, rounded before the averages are validated.
    window: int = 4  # Windowed SWA: number of consecutive epochs to average around the metric's peak.
    classic_start: float = 0.75  # Classic SWA with one cycle: average all epochs after this share of the training.
    best_k: int = 3  # best_k: number of best epochs to average.
    ema_decay: float = 0.999
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware supports it, else fp16 on GPUs and fp32 on CPUs."""
    compile: bool | Literal["auto"] = False
    """Use torch.compile, which takes minutes at the start and then speeds up every step; auto: on GPUs."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate", "window", "best_k", "lr", "frozen_lr", "cycles", "patience"):
            check((value := getattr(self, name)) == "auto" or value > 0, f"{name} must be above 0, not {value}")
        check(0 <= self.warmup < 1, f"warmup must lie in [0, 1), not {self.warmup}")
        check(0 < self.layer_decay <= 1, f"layer_decay must lie in (0, 1], not {self.layer_decay}")
        check(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        check(0 <= self.classic_start <= 1, f"classic_start must lie in [0, 1], not {self.classic_start}")
        for name in ("factor", "decay", "validate_images", "weight_decay", "momentum", "clip_norm"):
            check(getattr(self, name) >= 0, f"{name} must be at least 0, not {getattr(self, name)}")
        frozen, others = self.frozen_epochs, self.epochs - self.frozen_epochs
        check(0 <= frozen <= self.epochs, f"frozen_epochs must lie between 0 and epochs ({self.epochs}), not {frozen}")
        fits = self.cycles == 1 or (self.schedule not in ("step", "plateau") and self.cycles <= others)
        what = f"the schedule {self.schedule} with {others} epochs after the frozen ones"
        check(fits, f"cycles: {what} cannot have {self.cycles} cycles")
        check(self.averaging, "averaging must name at least one of last, best, best_k, window, classic, ema")
        kept = self.keep in ("highest", *self.averaging)
        check(kept, f"keep {self.keep!r} is not among averaging: {', '.join(self.averaging)}")

    @property
    def chooses_epoch(self):
        """Whether the weights that are kept depend on the validation metric of the epochs."""
        kept = self.averaging[0] if self.keep == "highest" and len(self.averaging) == 1 else self.keep
        return kept not in ("last", "classic", "ema")


@dataclass(frozen=True)
class BoxConfig(FitConfig):
    """Settings of a detector, see `common.detection`."""

    architecture: Architecture = "faster_rcnn"
    """The _v2 are torchvision's with a ResNet-50; rtdetr and efficientdet need the extras of these names."""
    backbone: str = "resnet101"  # Any timm network, with a feature pyramid on top.
    weights: str = "imagenet"
    """imagenet, coco (with resnet50), none, or a file of the backbone or detector (torchvision's or Detectron2's)."""
    stride_in_1x1: bool = False  # Bottlenecks stride in their first convolution, as in Detectron2's ResNets.
    size: int = 1024  # Side of the network's images.
    channels: int = 256  # Channels of the feature pyramid. COCO weights have 256.
    nms: float = 0.8  # Highest overlap of boxes of one class; above it, only the best box is kept.
    per_image: int = 100  # Most boxes per image.
    min_score: float = 0.001  # Lowest score of a box.
    mosaic: float = 0.0  # Share of the training images that are mosaics of four, made before the augmentation.
    mixup: float = 0.0  # Share of the training images that are the mean of two, with the boxes of both.

    def __post_init__(self):
        super().__post_init__()
        shares = (self.nms, self.min_score, self.mosaic, self.mixup)
        check(all(0 <= each <= 1 for each in shares), "nms, min_score, mosaic, mixup: must lie in [0, 1]")
        check(self.per_image > 0, f"per_image must be above 0, not {self.per_image}")
        check_detector(self.architecture, self.size, self.channels)


def check_detector(architecture, size, channels):
    """Raise InputError unless a detector can have images of `size` pixels and a feature pyramid of `channels`."""
    if architecture == "efficientdet":
        check(size > 0 and size % 128 == 0, f"size {size}: EfficientDet needs a multiple of 128")
        return
    # below 96 px, a level is a single pixel, for which oneDNN's bfloat16 gradient of the next strided convolution is
    # uninitialised memory (torch 2.15); below 64 channels, FCOS's group norm has one value per group
    for what, number, least in (("size", size, 96), ("channels", channels, 64)):
        if number < least or number % 32:
            raise InputError(f"{what} {number}: a detector needs a multiple of 32, at least {least}")


@dataclass(frozen=True)
class GateConfig(FitConfig):
    """Settings of a gate, which classifies whether an image has findings, see `common.detection`."""

    backbone: str = "resnet18"
    weights: str = "imagenet"
    frozen_norms: bool = False  # Keep the batch norms of pretrained weights, which a training of few steps would spoil.
    size: int = 512
    metric: str = "auroc"


def with_smaller_batches(config, **factors):
    """Return a configuration whose sections have batches divided by these factors and accumulate as many."""
    changes = {}
    for name, factor in factors.items():
        section = getattr(config, name)
        batch = {"batch_size": section.batch_size // factor, "accumulate": section.accumulate * factor}
        changes[name] = dataclasses.replace(section, **batch)
    return dataclasses.replace(config, **changes)


def check_folds(folds, n_folds):
    """Raise InputError unless `folds` are distinct, between 0 and n_folds − 1, and n_folds is at least 2.

    The single fold n_folds is also allowed: that of networks trained on all images, see common.refit.
    """
    if folds == (n_folds,) and n_folds >= 2:
        return
    if n_folds < 2 or not folds or len(set(folds)) < len(folds) or not set(folds) <= set(range(n_folds)):
        raise InputError(f"folds {folds}: must be distinct and between 0 and {n_folds - 1}, with n_folds at least 2")


def check_run(config, size):
    """Raise InputError for unusable folds, seed, store size or numbers; size: side of the largest input, pixels."""
    check_folds(config.folds, config.n_folds)
    check(0 <= config.seed < 1 << 62, f"seed must be at least 0 and below 2^62, not {config.seed}")
    for name, value in _numbers(dataclasses.asdict(config)):
        check(math.isfinite(value), f"{name} must be a finite number, not {value}")
    scales = getattr(config, "tta_scales", ())
    check(all(0 < each <= 4 for each in scales), f"tta_scales must be above 0, at most 4, not {scales}")
    check(config.store_size >= size, f"store_size {config.store_size} is under the {size} px of a network")
    check(config.store_size <= LARGEST, f"store_size {config.store_size}: at most {LARGEST} px")


def _numbers(value, name=""):
    """Yield dotted names and values of the floats in nested dicts and sequences."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part, name)
    elif isinstance(value, float):
        yield name, value


def to_dict(config):
    """Return a (nested) dataclass as JSON values; tuples become lists, paths strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def flatten(values, prefix=""):
    """Yield names and values of nested dicts, with dotted names for inner ones and lists as JSON."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple | dict):
            yield f"{prefix}{key}", json.dumps(value, default=str, ensure_ascii=False)
        else:
            yield f"{prefix}{key}", value


def from_dict(cls, values, where="config"):
    """Return the dataclass `cls` from the output of `to_dict`; InputError starting with `where` for wrong fields."""
    hints = typing.get_type_hints(cls)
    check(isinstance(values, dict), f"{where}: expected a JSON object, not {values!r}")
    unknown = set(values) - set(hints)
    if unknown:
        raise InputError(f"{where}: unknown field {min(map(str, unknown))!r}")
    restored = {name: _restore(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: the field {field.name!r} is missing")
    try:
        return cls(**restored)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _restore(hint, value, where):
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        if value is None or any(value in typing.get_args(h) for h in inner):
            return value
        return _restore(next(h for h in inner if h is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if kind is tuple and isinstance(value, list):
        return tuple(_restore(inner[0], v, where) for v in value)
    allowed = (int, float) if hint is float else (hint,)
    if value not in inner if kind is Literal else type(value) not in allowed:
        raise InputError(f"{where} cannot be {value!r}")
    return value


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-3 is a number instead of a string."""


_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))


def read_settings(path):
    """Return a file's settings as a dict. Raises InputError if it is unreadable or contains no settings."""
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not readable as YAML or JSON ({' '.join(str(error).split())[:150]})") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{path}: contains no settings, such as the line `seed: 1`")
    return found


def update(config, values, where):
    """Return a copy of a nested dataclass with the settings in the dict `values` replaced.

    Raises InputError starting with `where` for an unknown setting or an impossible value.

    >>> update(FitConfig(), {"epochs": 3}, "my.yaml").epochs
    3
    """
    return from_dict(type(config), _merge(to_dict(config), values), where)


def _merge(known, new):
    if not (isinstance(known, dict) and isinstance(new, dict)):
        return new
    return known | {name: _merge(known.get(name), value) for name, value in new.items()}


def digest(*values):
    """Return 16 hex digits that change when any of the JSON-like values (or dataclasses) changes."""
    plain = [to_dict(v) if dataclasses.is_dataclass(v) else v for v in values]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_hash(path):
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
