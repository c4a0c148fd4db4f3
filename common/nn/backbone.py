"""timm networks up to their last feature map, and a float32 linear layer for heads."""

import math

import timm
import torch
from torch import nn

from common.errors import InputError, check


class ExactLinear(nn.Linear):
    """A linear layer that stays in float32 under autocast, since ties among bf16 logits would change the AUROC."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def build_backbone(name, size, drop_path=0.0):
    """Return timm's headless network `name` for images of `size` pixels, and its number of channels; else InputError.

    drop_path: stochastic depth (Huang et al. 2016), for networks that have it.
    """
    config, depth = timm.get_pretrained_cfg(name), {"drop_path_rate": drop_path} if drop_path else {}
    options = [{}]
    if config is not None and config.fixed_input_size:
        # the first option interpolates the pretrained position embeddings
        options = [{"dynamic_img_size": True}, {"img_size": size}]
    for more in options:
        try:
            net = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **more, **depth)
            with torch.no_grad():
                width = feature_map(net.eval(), torch.zeros(1, 3, size, size)).shape[1]
            patch = getattr(getattr(net, "patch_embed", None), "patch_size", (1,))[0]
            check(size % patch == 0, f"its patches are {patch} px")
            return net.train(), width
        except (AssertionError, AttributeError, IndexError, InputError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"backbone {name!r} gives no feature map of images of {size} px ({reason})")


def feature_map(net, images):
    """Return the last feature map (B, K, h, w) of a network of `build_backbone`; InputError if it has none."""
    out = net(images)
    if out.ndim == 4 and getattr(net, "output_fmt", "NCHW") == "NHWC":
        out = out.permute(0, 3, 1, 2)
    elif out.ndim == 3 and hasattr(net, "num_prefix_tokens"):  # a vision transformer: class tokens, then patches
        out = out[:, net.num_prefix_tokens :].transpose(1, 2)
        side = math.isqrt(out.shape[2])
        out = out.unflatten(2, (side, side)) if side * side == out.shape[2] else out
    if out.ndim != 4 or (images.shape[2] == images.shape[3] and out.shape[2] != out.shape[3]):
        raise InputError(f"its output {tuple(out.shape)} is not a feature map")
    return out
