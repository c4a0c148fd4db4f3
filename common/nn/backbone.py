"""A timm network up to its last feature map, for heads of one's own, and the exact layer that such heads end with."""

import math

import timm
import torch
from torch import nn

from common.errors import InputError
from common.nn.weights import fill, imagenet_state, read_state


class ExactLinear(nn.Linear):
    """A linear layer in float32 under mixed precision too: bf16 logits would tie images that AUROC has to order."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def build_backbone(name, size):
    """A timm network without its head that gives a feature map at `size` pixels, and the channels of the map.

    Raises InputError where it gives none.
    """
    config = timm.get_pretrained_cfg(name)
    options = [{}]
    if config is not None and config.fixed_input_size:
        # the first keeps the pretrained position embeddings as they are and interpolates them
        options = [{"dynamic_img_size": True}, {"img_size": size}]
    for more in options:
        try:
            net = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **more)
            with torch.no_grad():
                width = feature_map(net.eval(), torch.zeros(1, 3, size, size)).shape[1]
            patch = getattr(getattr(net, "patch_embed", None), "patch_size", (1,))[0]
            if size % patch:  # the rest would be cut off in silence
                raise InputError(f"its patches are {patch} px")
            return net.train(), width
        except (AssertionError, AttributeError, IndexError, InputError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"backbone {name!r} gives no feature map of images of {size} px ({reason})")


def feature_map(net, images):
    """The last feature map (B, K, h, w) of a timm network built with num_classes=0 and global_pool="".

    Channels come first whatever the network's own order; tokens of square images are laid out as the patches that they
    stand for, without those in front (class, registers). Raises InputError where the network has no such map.
    """
    out = net(images)
    if out.ndim == 4 and getattr(net, "output_fmt", "NCHW") == "NHWC":
        out = out.permute(0, 3, 1, 2)
    elif out.ndim == 3 and hasattr(net, "num_prefix_tokens"):  # timm's mark of vision transformers
        out = out[:, net.num_prefix_tokens :].transpose(1, 2)
        side = math.isqrt(out.shape[2])
        out = out.unflatten(2, (side, side)) if side * side == out.shape[2] else out
    if out.ndim != 4 or (images.shape[2] == images.shape[3] and out.shape[2] != out.shape[3]):
        raise InputError(f"its output {tuple(out.shape)} is no feature map")
    return out


def start_from(model, name, weights):
    """Fill a model whose timm network `name` is its attribute `net`; the report goes to `model.loaded`.

    weights: imagenet, none (report None), or a file that holds at least the whole backbone. Raises InputError for
    weights that do not fit.
    """
    model.loaded = None
    if weights != "none":
        state, source = imagenet_state(name) if weights == "imagenet" else (read_state(weights), str(weights))
        model.loaded = fill(model, state, source, [key for key in model.state_dict() if key.startswith("net.")])
