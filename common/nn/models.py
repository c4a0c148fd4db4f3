"""Classifiers from timm and segmenters from segmentation-models-pytorch: uint8 radiographs in, logits out."""

import difflib
import functools
import math

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from common.errors import InputError, check
from common.nn.norms import batch_norms, is_frozen
from common.nn.weights import load_pretrained

_KINDS = (smp.Unet, smp.UnetPlusPlus, smp.FPN, smp.MAnet, smp.Linknet, smp.PSPNet, smp.PAN, smp.DeepLabV3Plus)
_KINDS += (smp.UPerNet, smp.Segformer, smp.DPT)
ARCHITECTURES = {kind.__name__.lower(): kind for kind in _KINDS}
_ALIASES = {"xception": "legacy_xception", "inceptionresnetv2": "inception_resnet_v2"}
# timm's versions lack padding, so decoders cannot combine their maps; smp's have it, and the same tensor names
_PADDED = {"legacy_xception": "xception", "inception_resnet_v2": "inceptionresnetv2"}


class Normalised(nn.Module):
    """A network for raw grey images, which it normalises and repeats to its number of channels.

    images (B, 1, H, W), uint8 or floats in 0 to 255, H and W multiples of `multiple`; mean and std: one value per
    channel, 1 being the full range. Returns the network's logits in float32, or a tuple of them.
    """

    def __init__(self, net, mean, std, multiple=1):
        super().__init__()
        self.net, self.multiple = net, multiple
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
                module.__class__ = _make_float32(type(module))
        mean, std = (torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (mean, std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", mean / std, persistent=False)

    def scaled(self, images):
        """Return checked and normalised images, float32 (B, channels, H, W)."""
        if images.ndim != 4 or images.shape[1] != 1:
            raise InputError(f"images {tuple(images.shape)}: expected one gray channel, (B, 1, H, W)")
        if images.shape[2] % self.multiple or images.shape[3] % self.multiple:
            height, width = images.shape[2:]
            raise InputError(f"size {height}×{width}: this network needs multiples of {self.multiple}")
        return images.float() * self.scale - self.shift

    def forward(self, images):
        output = self.net(self.scaled(images))
        return tuple(part.float() for part in output) if isinstance(output, tuple | list) else output.float()


class _DepthwiseFloat32:
    """Mixin for depthwise convolutions, whose bf16 gradient on a CPU takes up to six times as long as in float32."""

    def forward(self, x):
        if x.device.type != "cpu" or not torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))


@functools.cache
def _make_float32(kind):
    return type(kind.__name__, (_DepthwiseFloat32, kind), {})


def classifier(backbone, n_classes, weights, dropout=0.0, frozen_norms=False, **options):
    """Return timm's network `backbone` with an `n_classes`-way layer: images (B, 1, H, W) → logits (B, n_classes).

    weights: imagenet, none, or a file that has at least everything except the last layer. frozen_norms: keep statistics
    and parameters of the batch norms of `weights`, unless none. `options` are passed to timm.
    """
    name = timm_name(backbone)
    net = timm.create_model(name, pretrained=False, num_classes=n_classes, drop_rate=dropout, **options)
    model = Normalised(net, *mean_std(name))
    model.frozen_norms = frozen_norms and weights != "none"
    _freeze(model, False, ())
    last = {id(tensor) for module in head(model) for tensor in module.state_dict(keep_vars=True).values()}
    required = [key for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in last]
    return load_pretrained(model, name, weights, required)


def segmenter(architecture, encoder, weights, n_classes=1, empty_head=False, dropout=0, frozen_norms=False, **options):
    """Return a network from images (B, 1, H, W), sides multiples of 32, to mask logits (B, n_classes, H, W).

    architecture: a class of segmentation_models_pytorch, or its name in ARCHITECTURES. encoder: any timm network with
    maps of several sizes; for DPT a vision transformer, whose patch size must divide the sides.
    empty_head: return (mask logits, presence logit (B, 1)), the latter from the encoder's pooled last features after
    `dropout`. frozen_norms: keep statistics and parameters of all batch norms, for initial weights from another
    training. weights and errors: as in `classifier`; a file must contain at least the whole encoder.
    """
    if isinstance(architecture, str) and architecture not in ARCHITECTURES:
        raise InputError(f"architecture {architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES.get(architecture, architecture)
    name = timm_name(encoder)
    if empty_head:
        options["aux_params"] = {"classes": 1, "dropout": dropout}
    fixed, multiple = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False), 32
    if architecture is smp.DPT:
        options["dynamic_img_size"] = True  # allows other sizes than the transformer's own
    elif fixed:
        raise InputError(f"encoder {encoder!r} has a fixed size or maps of one size: only the decoder dpt takes it")
    try:
        net = architecture(_PADDED.get(name, f"tu-{name}"), encoder_weights=None, classes=n_classes, **options)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if architecture is smp.DPT and "dynamic_img_size" in reason:
            reason = "it needs a vision transformer, such as vit_base_patch16_224"
        raise InputError(f"encoder {encoder!r} does not work in {architecture.__name__} ({reason})") from error
    if architecture is smp.DPT:
        multiple = math.lcm(multiple, *getattr(getattr(net.encoder.model, "patch_embed", None), "patch_size", ()))
        for unused in ("norm", "fc_norm", "head"):  # they never get a gradient, but DDP would wait for it
            setattr(net.encoder.model, unused, nn.Identity())
    model = Normalised(net, *mean_std(name), multiple)
    model.frozen_norms = frozen_norms
    _freeze(model, False, ())
    return load_pretrained(model, name, weights, [key for key in model.state_dict() if key.startswith("net.encoder.")])


def checkpoint_backbone(model):
    """Make a model's timm backbone recompute its activations in the backward pass instead of keeping them.

    Raises InputError if it cannot, or if it has trainable batch norms, whose statistics would move twice per step.
    """
    networks = [part for part in model.modules() if hasattr(part, "set_grad_checkpointing")]
    blocks = [part for part in model.modules() if hasattr(part, "grad_checkpointing") and part not in networks]
    try:
        for part in networks if not blocks else ():
            part.set_grad_checkpointing()
    except AssertionError:
        networks = []
    check(networks, "--grad-checkpointing: this network has no timm backbone that can recompute its activations")
    norms = [norm for part in networks for norm in batch_norms(part) if not is_frozen(norm)]
    check(not norms, "--grad-checkpointing: needs a backbone whose batch norms are frozen (frozen_norms) or absent")
    for part in blocks:  # a network's stages, which run their blocks one by one
        part.grad_checkpointing = True


def head(model):
    """Return the modules after the last feature map, which are newly initialised for a task."""
    net = getattr(model, "net", model)
    if isinstance(net, smp.base.SegmentationModel):
        return [part for part in (net.segmentation_head, net.classification_head) if part is not None]
    return [net.get_classifier()]


def freeze_first_half(model, frozen=True):
    """Freeze the first half of the layers (modules with their own parameters), or unfreeze all if not `frozen`."""
    layers = [own for module in model.modules() if (own := list(module.parameters(recurse=False)))]
    _freeze(model, frozen, (p for own in layers[: len(layers) // 2] for p in own))


def freeze_encoder(model, frozen=True):
    """Freeze the encoder of a segmenter except its batch norms, as fastai does, or unfreeze all if not `frozen`."""
    check(not frozen or hasattr(model.net, "encoder"), "frozen_epochs: this network has no encoder to freeze")
    norms = {id(p) for norm in batch_norms(model) for p in norm.parameters()}
    encoder = model.net.encoder.parameters() if frozen else ()
    _freeze(model, frozen, (p for p in encoder if id(p) not in norms))


def freeze_all_but_head(model, frozen=True):
    """Freeze all but the last layer (a classifier's linear layer, a segmenter's heads), or unfreeze if not `frozen`."""
    kept = {id(p) for part in head(model) for p in part.parameters()}
    _freeze(model, frozen, (p for p in model.parameters() if id(p) not in kept))


def _freeze(model, frozen, parameters):
    model.requires_grad_(True)
    for parameter in parameters if frozen else ():
        parameter.requires_grad_(False)
    for norm in batch_norms(model) if getattr(model, "frozen_norms", False) else ():
        norm.requires_grad_(False)


def timm_name(name):
    """Return timm's name for a network name, its own or another library's; raises InputError for unknown ones."""
    name = _ALIASES.get(name, name)
    if name.startswith("mit_b"):
        raise InputError(f"{name}: its code may not be used commercially; timm's pvt_v2_{name[4:]} is of the same kind")
    if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained(name.split(".")[0])):
        near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], 3)
        raise InputError(f"timm has no network {name!r}; similar names: {', '.join(near) or 'none'}")
    return name


def mean_std(name):
    """Return the mean and standard deviation per channel that timm uses to normalise images for `name`."""
    config = timm.get_pretrained_cfg(name)
    return (config.mean, config.std) if config else (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
