"""Further families of detectors, from optional packages, behind the interface of `common.nn.detectors.Detector`.

They always run in float32, since their matching of boxes fails at lower precision.
"""

import timm
import torch
from torchvision.models import detection
from torchvision.ops import box_convert, clip_boxes_to_image

from common.config import check_detector
from common.errors import InputError, check
from common.extras import require_extra
from common.nn.detectors import NOT_FINITE, Detector, load_and_freeze
from common.nn.models import Normalised, mean_std, timm_name
from common.nn.weights import first_line


class _Adapted(Detector):
    """A detector of another library, `net`, adapted by `_losses(images, targets)` and `_find(images)`."""

    def __init__(self, net, mean, std, per_image, score):
        Normalised.__init__(self, net, mean, std, multiple=32)
        self.per_image, self.score = per_image, score

    def forward(self, images, targets=None):
        images = self.scaled(images)
        with torch.autocast(images.device.type, enabled=False):
            if self.training:
                return self._losses(images, targets)
            found = []
            for boxes, scores, labels in self._find(images):
                check(torch.isfinite(boxes).all() and torch.isfinite(scores).all(), NOT_FINITE)
                best = scores.argsort(descending=True)[: self.per_image]
                best = best[scores[best] >= self.score]
                boxes = clip_boxes_to_image(boxes[best], images.shape[-2:])
                found.append({"boxes": boxes, "scores": scores[best], "labels": labels[best]})
            return found


class _Detr(_Adapted):
    def _losses(self, images, targets):
        side = images.shape[-1]
        boxes = [box_convert(each["boxes"].float() / side, "xyxy", "cxcywh") for each in targets]
        labels = [{"class_labels": t["labels"], "boxes": b} for t, b in zip(targets, boxes, strict=True)]
        return {"loss": self.net(pixel_values=images, labels=labels).loss}

    def _find(self, images):
        output = self.net(pixel_values=images)
        boxes = box_convert(output.pred_boxes, "cxcywh", "xyxy") * images.shape[-1]
        for each, logits in zip(boxes, output.logits, strict=True):
            query, label = torch.meshgrid(*(torch.arange(n, device=logits.device) for n in logits.shape), indexing="ij")
            yield each[query.flatten()], logits.sigmoid().flatten(), label.flatten()


class _EfficientDet(_Adapted):
    def _losses(self, images, targets):
        most = max(1, *(len(each["boxes"]) for each in targets))
        boxes, labels = images.new_full((len(targets), most, 4), -1), images.new_full((len(targets), most), -1)
        for k, each in enumerate(targets):
            n = len(each["boxes"])
            boxes[k, :n], labels[k, :n] = each["boxes"].float()[:, [1, 0, 3, 2]], each["labels"].float() + 1
        return {"loss": self.benches[0].to(images.device)(images, {"bbox": boxes, "cls": labels})["loss"]}

    def _find(self, images):
        for each in self.benches[1].to(images.device)(images):
            yield each[:, :4], each[:, 4], each[:, 5].long() - 1


def rtdetr(backbone, n_classes, size, weights, *, nms=0.5, per_image=100, score=0.001, channels=256, **loading):
    """Return an RT-DETR (Zhao et al. 2023) of `transformers` on a timm network, which needs no suppression.

    Arguments as in `common.nn.detectors.faster_rcnn`; channels: of its encoder and decoder.
    """
    require_extra("rtdetr", "architecture rtdetr")
    from transformers import RTDetrConfig, RTDetrForObjectDetection, TimmBackboneConfig

    name = timm_name(backbone)
    with torch.device("meta"):
        features = timm.create_model(name, features_only=True).feature_info
    levels = [features.reduction().index(stride) for stride in (8, 16, 32) if stride in features.reduction()]
    check(len(levels) == 3, f"backbone {backbone!r}: has feature maps at strides {features.reduction()}, not 8, 16, 32")
    about = TimmBackboneConfig(backbone=name, out_indices=levels, use_pretrained_backbone=False)
    sizes = {"encoder_hidden_dim": channels, "d_model": channels, "encoder_ffn_dim": 4 * channels}
    sizes |= {"decoder_ffn_dim": 4 * channels, "decoder_in_channels": [channels] * 3}
    widths = [features.channels()[level] for level in levels]
    config = {"encoder_in_channels": widths, "num_labels": n_classes, "freeze_backbone_batch_norms": False}
    net = RTDetrForObjectDetection(RTDetrConfig(backbone_config=about, **config, **sizes))
    body = net.model.backbone.model._backbone
    return load_and_freeze(_Detr(net, *mean_std(name), per_image, score), body, name, weights, **loading)


def efficientdet(backbone, n_classes, size, weights, *, nms=0.5, per_image=100, score=0.001, channels=256, **loading):
    """Return an EfficientDet (Tan et al. 2020) of `effdet` on a timm network; arguments as in `faster_rcnn`.

    size: a multiple of 128; nms: always 0.5, the library's. channels: of the pyramid and the heads.
    """
    require_extra("efficientdet", "architecture efficientdet")
    from effdet import DetBenchPredict, DetBenchTrain, EfficientDet, get_efficientdet_config

    check_detector("efficientdet", size, channels)
    name, about = timm_name(backbone), get_efficientdet_config("tf_efficientdet_d0")
    about.update({"backbone_name": name, "num_classes": n_classes, "image_size": (size, size), "backbone_args": {}})
    about.update({"fpn_channels": channels, "max_det_per_image": per_image})
    about.norm_kwargs.momentum = 0.1  # the library's 0.01 is meant for hundreds of thousands of steps
    try:
        net = EfficientDet(about, pretrained_backbone=False)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise InputError(f"backbone {backbone!r} gives no feature maps ({first_line(error)})") from error
    net.reset_head(num_classes=n_classes)
    model = _EfficientDet(net, *mean_std(name), per_image, score)
    model.benches = [DetBenchTrain(net), DetBenchPredict(net)]  # in a list, or the weights would be saved three times
    return load_and_freeze(model, net.backbone, name, weights, **loading)


def faster_rcnn_v2(backbone, n_classes, size, weights, *, nms=0.5, per_image=100, score=0.001, channels=256, **loading):
    """Return torchvision's improved Faster R-CNN on ResNet-50 (Li et al. 2021), whose COCO weights `coco` loads."""
    limits = {"box_nms_thresh": nms, "box_detections_per_img": per_image, "box_score_thresh": score}
    net = detection.fasterrcnn_resnet50_fpn_v2(weights_backbone=None, num_classes=n_classes + 1, **limits)
    return _load_v2(net, backbone, channels, weights, **loading)


def retinanet_v2(backbone, n_classes, size, weights, *, nms=0.5, per_image=100, score=0.001, channels=256, **loading):
    """Return torchvision's improved RetinaNet on ResNet-50 (Zhang et al. 2020), whose COCO weights `coco` loads."""
    limits = {"nms_thresh": nms, "detections_per_img": per_image, "score_thresh": score}
    net = detection.retinanet_resnet50_fpn_v2(weights_backbone=None, num_classes=n_classes, **limits)
    return _load_v2(net, backbone, channels, weights, **loading)


def _load_v2(net, backbone, channels, weights, **loading):
    fits = timm_name(backbone).split(".")[0] == "resnet50" and channels == 256
    check(fits, "this detector has the backbone resnet50 and 256 channels")
    model = Detector(net, *mean_std(backbone))
    return load_and_freeze(model, net.backbone.body, backbone, weights, version="_V2", **loading)
