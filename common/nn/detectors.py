"""Torchvision's detectors with a feature pyramid on any timm network, from raw grey radiographs to boxes.

Anchor sizes and numbers of proposals are torchvision's for a side of 1024 pixels and scale with the side. So a box that
covers a tenth of the image matches an anchor of its size at any image size, such as 256 pixels.
"""

import importlib
import pickle
import re
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from common.config import check_detector
from common.errors import InputError, check
from common.nn.models import Normalised, mean_std, timm_name
from common.nn.norms import batch_norms
from common.nn.weights import copy_state, first_line, imagenet_state, read_state

NOT_FINITE = "the network produced NaN or infinity: lower the learning rate or set clip_norm"
_REFERENCE = 1024  # side in pixels for which torchvision's defaults are meant
_ASPECTS = ((0.5, 1.0, 2.0),) * 5


class Detector(Normalised):
    """A torchvision detector for square grey images of one size; classes count from 0, without background.

    forward(images, targets) in training → dict of scalar losses; forward(images) in evaluation → for each image a dict
    of boxes float32 (n, 4) x_min, y_min, x_max, y_max in the images' pixels, scores float32 (n,) in [0, 1], falling,
    and labels int64 (n,). images: (B, 1, S, S) uint8, or floats in 0 to 255, S a multiple of 32; a second channel may
    hold a mask of 0 and 255. targets: per image a dict of boxes (n, 4) with positive sides and labels int64 (n,), n may
    be 0. Anchors and outputs of heads stay float32 under autocast, since bfloat16 rounds boxes of a 1024-pixel image
    to a grid of four pixels. Raises InputError for images of another shape, and in evaluation for NaN or infinity.
    """

    def __init__(self, net, mean, std):
        super().__init__(net, mean, std, multiple=32)
        two_stage = isinstance(net, detection.FasterRCNN)
        self.background = int(two_stage)  # the only ones that count classes from 1
        net.transform = _NoTransform()
        for head in (net.rpn.head, net.roi_heads.box_predictor) if two_stage else (net.head,):
            head.register_forward_hook(_cast_outputs)
        for module in net.modules():
            if isinstance(module, AnchorGenerator):
                module.register_forward_pre_hook(_cast_anchors)

    def scaled(self, images):
        """Return normalised images (B, 3, S, S); the mask of (B, 2, S, S) replaces the third grey channel."""
        if images.ndim != 4 or images.shape[1] != 2:
            return super().scaled(images)
        grey, mask = (super(Detector, self).scaled(images[:, k : k + 1]) for k in (0, 1))
        return torch.cat([grey[:, :2], mask[:, 2:]], 1)

    def forward(self, images, targets=None):
        images = self.scaled(images)
        if self.training:
            shifted = [{"boxes": each["boxes"], "labels": each["labels"] + self.background} for each in targets]
            return self.net(images, shifted)
        return [{**found, "labels": found["labels"] - self.background} for found in self.net(images)]


def faster_rcnn(backbone, n_classes, size, weights, *, nms=0.5, per_image=100, score=0.001, channels=256, **loading):
    """Return a Faster R-CNN with a feature pyramid at strides 4 to 64 (Ren et al. 2015, Lin et al. 2017).

    backbone: a timm network with feature maps at strides 4, 8, 16 and 32. n_classes: without background. size: the
    images' side, a multiple of 32, at least 96. weights: `imagenet`, `coco` (torchvision's detector, for resnet50),
    `none`, or a file of the backbone, of a complete torchvision detector or of Detectron2's Faster R-CNN with a ResNet,
    all of which is used except the class layers; the attribute `loaded` reports it. nms: IoU threshold within a class.
    per_image, score: most boxes per image, and minimum score. channels: of the pyramid, a multiple of 32, at least 64;
    256 in those files. frozen_norms (True by default): keep statistics and parameters of the backbone's batch norms, as
    in Detectron2, since small batches give poor statistics. stride_in_1x1 (False by default): see
    `stride_first`. Raises InputError for a network without these maps or weights that do not fit.
    """
    pyramid, name = _build_pyramid(backbone, (4, 8, 16, 32), LastLevelMaxPool(), channels, size)
    net = detection.FasterRCNN(
        pyramid,
        n_classes + 1,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in _sides(size)), _ASPECTS),
        rpn_pre_nms_top_n_train=_scaled(2000, size),
        rpn_post_nms_top_n_train=_scaled(2000, size),
        rpn_pre_nms_top_n_test=_scaled(1000, size),
        rpn_post_nms_top_n_test=_scaled(1000, size),
        box_batch_size_per_image=_scaled(512, size, 64),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=_scaled(224, size, 1)),
        box_nms_thresh=nms,
        box_detections_per_img=per_image,
        box_score_thresh=score,
    )
    return load_and_freeze(Detector(net, *mean_std(name)), pyramid.body, name, weights, **loading)


def retinanet(backbone, n_classes, size, weights, **options):
    """Return a RetinaNet with a feature pyramid at strides 8 to 128 (Lin et al. 2017).

    Arguments as in `faster_rcnn`; the backbone needs maps at strides 8, 16 and 32.
    """
    sides = tuple((s, s * 2 ** (1 / 3), s * 2 ** (2 / 3)) for s in _sides(size))
    anchors = {"anchor_generator": AnchorGenerator(sides, _ASPECTS)}
    return _dense(partial(detection.RetinaNet, **anchors), backbone, n_classes, size, weights, **options)


def fcos(backbone, n_classes, size, weights, **options):
    """Return an FCOS, which has no anchors, with a feature pyramid at strides 8 to 128 (Tian et al. 2019).

    Arguments as in `retinanet`. At any image size, a level is for boxes of four to eight times its stride.
    """
    return _dense(detection.FCOS, backbone, n_classes, size, weights, **options)


def _dense(kind, backbone, n_classes, size, weights, *, nms=0.5, per_image=100, score=0.001, channels=256, **loading):
    pyramid, name = _build_pyramid(backbone, (8, 16, 32), LastLevelP6P7(channels, channels), channels, size)
    limits = {"nms_thresh": nms, "detections_per_img": per_image, "score_thresh": score}
    net = kind(pyramid, n_classes, topk_candidates=_scaled(1000, size), **limits)
    return load_and_freeze(Detector(net, *mean_std(name)), pyramid.body, name, weights, **loading)


def _sides(size):
    return tuple(size * side / _REFERENCE for side in (32, 64, 128, 256, 512))


def _scaled(number, size, least=200):
    return max(least, round(number * size / _REFERENCE))


class _NoTransform(nn.Module):
    """Replacement for torchvision's transform, which would resize, normalise and batch the images."""

    def forward(self, images, targets=None):
        return ImageList(images, [tuple(images.shape[-2:])] * len(images)), targets

    def postprocess(self, found, sizes, originals):
        return found


class _Pyramid(nn.Module):
    """A timm network and its feature pyramid, with torchvision's module names so that its files fit."""

    def __init__(self, body, widths, more, channels):
        super().__init__()
        self.body, self.widths, self.out_channels = body, widths, channels
        self.fpn = FeaturePyramidNetwork(widths, channels, more)

    def forward(self, images):
        # some of timm's transformers put the channels last
        maps = zip(self.body(images), self.widths, strict=True)
        maps = [each if each.shape[1] == width else each.permute(0, 3, 1, 2) for each, width in maps]
        return self.fpn({str(level): each for level, each in enumerate(maps)})


def _build_pyramid(backbone, strides, more, channels, size):
    name = timm_name(backbone)
    about = timm.get_pretrained_cfg(name)
    options = {"features_only": True} | ({"img_size": size} if about and about.fixed_input_size else {})
    check_detector("", size, channels)
    try:
        with torch.device("meta"):
            levels = timm.create_model(name, **options).feature_info.reduction()
        last = {stride: level for level, stride in enumerate(levels)}
        if not set(strides) <= set(last):
            raise InputError(f"backbone {backbone!r}: has feature maps at strides {levels}, {list(strides)} are needed")
        body = timm.create_model(name, out_indices=tuple(last[stride] for stride in strides), **options)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise InputError(f"backbone {backbone!r} gives no feature maps ({first_line(error)})") from error
    return _Pyramid(body, body.feature_info.channels(), more, channels), name


def load_and_freeze(model, body, name, weights, frozen_norms=True, stride_in_1x1=False, version=""):
    """Return a Detector with `weights` for its backbone `body`, or for all but the class layers, see `faster_rcnn`."""
    model.loaded = None
    if stride_in_1x1:
        stride_first(body)
    if weights != "none":
        kind = f"{type(model.net).__name__}_ResNet50_FPN{version}_Weights"
        state, source = _initial_state(kind, name, weights, stride_in_1x1)
        whole = any(".fpn." in key for key in state)
        target = model.net if whole else body
        needed = [key for key in target.state_dict() if not whole or key.startswith("backbone.body.")]
        model.loaded = copy_state(target, state, source, needed)
    if frozen_norms:
        for norm in batch_norms(body):
            norm.requires_grad_(False)
    return model


def _initial_state(kind, name, weights, stride_in_1x1):
    """Return (tensors under torchvision's names, their source) for a torchvision detector on timm's network `name`."""
    if weights == "imagenet":
        return imagenet_state(name)
    if weights == "coco":
        if name.split(".")[0] != "resnet50":
            raise InputError(f"weights coco: torchvision has them for resnet50, not {name}; give a file")
        known = getattr(detection, kind, None)
        check(known, "weights coco: there are none for this detector; give a file, or imagenet")
        known = known.COCO_V1
        try:
            return known.get_state_dict(progress=False), f"torchvision's {known}"
        except (OSError, RuntimeError) as error:  # no network; a damaged file
            raise InputError(f"weights coco: {known.url} could not be loaded ({error})") from None
    state, of_detectron2 = read_detector(weights)
    if of_detectron2 and not stride_in_1x1:
        raise InputError(f"{weights}: a ResNet of Detectron2, which needs --detector.stride-in-1x1 True")
    is_resnet = not of_detectron2 or "backbone.bottom_up.stem.conv1.weight" in state
    check(is_resnet, f"{weights}: a network of Detectron2 other than its ResNets")
    return (to_torchvision(state, mean_std(name)[1]) if of_detectron2 else state), str(weights)


def _cast_outputs(head, inputs, output):
    """Forward hook: cast a head's outputs, nested in dicts and sequences; in evaluation, check that they are finite."""

    def cast(values):
        check(head.training or torch.isfinite(values).all(), NOT_FINITE)  # torchvision would silently drop such boxes
        return values.float()

    return tree_map_only(torch.Tensor, cast, output)


def _cast_anchors(generator, inputs):
    """Forward pre-hook: replace the maps by float32 maps of the same sizes, which are all the generator uses."""
    images, maps = inputs
    return images, [each.new_empty((0, 1, *each.shape[-2:]), dtype=torch.float32) for each in maps]


# ---- weights of Detectron2's model zoo, such as faster_rcnn_R_101_FPN_3x -------------------------------------------

# Its ResNets take BGR images, 0 to 255 minus the mean, and have a bottleneck's stride in the first convolution, not
# the second. Source: Wu et al., https://github.com/facebookresearch/detectron2.
_ARRAYS = {"_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype"}  # all names that pickled NumPy arrays need
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
    """Unpickle containers of NumPy arrays and refuse everything that could run code."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in _ARRAYS:
            return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)
        if (module, name) == ("_codecs", "encode"):  # bytes in old protocols
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"contains {module}.{name}")


def read_detector(path):
    """Return (tensors by name, whether they are Detectron2's) from a file; .pkl is Detectron2's format."""
    if not str(path).endswith(".pkl"):
        state = read_state(path)
    else:
        check(Path(path).is_file(), f"{path}: no such file")
        try:
            with open(path, "rb") as file:
                content = _ArraysOnly(file, encoding="latin1").load()["model"]
            state = {name: torch.as_tensor(value) for name, value in content.items()}
        except Exception as error:  # pickle raises many kinds of errors for damaged files
            raise InputError(f"{path}: not a file of Detectron2's model zoo ({first_line(error)})") from None
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
    check(blocks, "stride_in_1x1: belongs to a ResNet of bottlenecks, such as resnet101")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
