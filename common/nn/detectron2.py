"""Weights of Detectron2's model zoo, such as faster_rcnn_R_101_FPN_3x, for torchvision's Faster R-CNN.

Its ResNets take BGR images of 0 to 255 less the mean, and stride in the first convolution of a bottleneck instead of
the second. Source: Wu et al., https://github.com/facebookresearch/detectron2.
"""

import importlib
import pickle
import re

import torch

from common.errors import InputError
from common.nn.weights import read_state

_ARRAYS = {"_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype"}  # all that NumPy's arrays are pickled as
_NAMES = (
    (r"^backbone\.bottom_up\.stem\.conv1\.norm", "backbone.body.bn1"),
    (r"^backbone\.bottom_up\.stem", "backbone.body"),
    (r"^backbone\.bottom_up\.res(\d)", lambda found: f"backbone.body.layer{int(found[1]) - 1}"),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.fpn_lateral(\d)\.", lambda found: f".fpn.inner_blocks.{int(found[1]) - 2}.0."),
    (r"\.fpn_output(\d)\.", lambda found: f".fpn.layer_blocks.{int(found[1]) - 2}.0."),
    (r"^proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"^roi_heads\.box_head\.fc([12])\.", lambda found: f"roi_heads.box_head.fc{int(found[1]) + 5}."),
)


class _ArraysOnly(pickle.Unpickler):
    """Unpickle containers of NumPy arrays, and nothing that could run code."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in _ARRAYS:
            return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)
        if (module, name) == ("_codecs", "encode"):  # bytes in old protocols
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"contains {module}.{name}")


def read_detector(path):
    """Return (tensors by name, whether they are Detectron2's) of a file; .pkl is the format of Detectron2's zoo."""
    if not str(path).endswith(".pkl"):
        state = read_state(path)
    else:
        try:
            with open(path, "rb") as file:
                content = _ArraysOnly(file, encoding="latin1").load()["model"]
            state = {name: torch.as_tensor(value) for name, value in content.items()}
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except Exception as error:  # pickle raises many kinds for damaged files
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{path}: not a file of Detectron2's model zoo ({reason})") from None
    return state, any(name.startswith("backbone.bottom_up.") for name in state)


def to_torchvision(state, std):
    """Return Detectron2's tensors under torchvision's names, for RGB images normalised by ImageNet's mean and `std`."""
    converted = {}
    for name, value in state.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    stem = "backbone.body.conv1.weight"
    converted[stem] = converted[stem].flip(1) * 255 * torch.as_tensor(std).reshape(1, 3, 1, 1)
    return converted


def stride_first(body):
    """Move the strides of a ResNet's bottlenecks from the second convolution to the first, as in these files."""
    blocks = [block for block in body.modules() if hasattr(block, "conv3")]
    if not blocks:
        raise InputError("stride_in_1x1: belongs to a ResNet of bottlenecks, such as resnet101")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
