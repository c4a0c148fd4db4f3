"""Detectors of other libraries behind the interface of ours: losses of a batch, boxes of a batch, weights."""

from unittest.mock import Mock

import pytest
import torch

from common.errors import InputError
from common.nn.more_detectors import efficientdet, faster_rcnn_v2, retinanet_v2, rtdetr
from common.nn.precision import autocast
from tests.common.nn.test_detectors import images, target

KINDS = {rtdetr: ("test_resnet", 64), efficientdet: ("test_resnet", 64)}
KINDS |= {kind: ("resnet50", 256) for kind in (faster_rcnn_v2, retinanet_v2)}


def small(kind, **options):
    torch.manual_seed(0)
    backbone, channels = KINDS[kind]
    return kind(backbone, 3, 128, "none", channels=channels, score=0.0, per_image=7, **options)


@pytest.mark.parametrize(
    "kind",
    [rtdetr, efficientdet, *(pytest.param(kind, marks=pytest.mark.long) for kind in (retinanet_v2, faster_rcnn_v2))],
)
def test_losses_and_boxes(kind):
    model, several = small(kind), [target((5, 5, 30, 40, 2), (60, 50, 120, 100, 0)), target()]
    with autocast("cpu", torch.bfloat16):
        losses = model(images(side=128), several)
        assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
        sum(losses.values()).backward()
        found = model.eval()(images(3, 128))
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)
    for each in found:
        boxes, scores, labels = each["boxes"], each["scores"], each["labels"]
        assert boxes.dtype == scores.dtype == torch.float32 and labels.dtype == torch.int64
        assert 0 < len(boxes) <= 7 and boxes.shape == (len(scores), 4) and labels.shape == scores.shape
        assert boxes.min() >= 0 and boxes.max() <= 128 and (scores.diff() <= 0).all()
        assert labels.min() >= 0 and labels.max() <= 2
    sum(model.train()(images(side=128), [target(), target()]).values()).backward()  # images without a box train too


def train(model, batch, truth, steps, lr):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum(model(batch, truth).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.long
def test_two_boxes_are_learnt():
    batch, truth = images(2, 128), [target((20, 30, 80, 90, 1)), target((40, 20, 100, 70, 2))]
    for k, each in enumerate(truth):
        x0, y0, x1, y1 = each["boxes"][0].int().tolist()
        batch[k], batch[k, :, y0:y1, x0:x1] = 30, 120 + 80 * k
    model = small(efficientdet)
    train(model, batch, truth, 80, 5e-3)
    for each, true in zip(model.eval()(batch), truth, strict=True):
        assert each["labels"][0] == true["labels"][0] and each["scores"][0] > 0.5
        assert (each["boxes"][0] - true["boxes"][0]).abs().max() < 15
    losses = train(small(rtdetr), batch, truth, 40, 1e-3)  # a transformer needs more steps than a test has
    assert losses[-1] < 0.5 * losses[0]


def test_weights_of_the_backbone_are_loaded_and_its_norms_frozen(tmp_path, monkeypatch):
    state = small(efficientdet).net.backbone.state_dict()
    torch.save(state, tmp_path / "body.pth")
    for kind in (efficientdet, rtdetr):
        model = kind("test_resnet", 3, 128, str(tmp_path / "body.pth"), channels=64)
        loaded = model.state_dict()
        assert sum(any(torch.equal(each, other) for other in loaded.values()) for each in state.values()) == len(state)
    with pytest.raises(InputError, match="multiple of 128"):
        efficientdet("test_resnet", 3, 96, "none", channels=64)
    with monkeypatch.context() as patch:
        patch.setattr("effdet.EfficientDet", Mock(side_effect=AssertionError()))
        with pytest.raises(InputError, match="'test_resnet' gives no feature maps"):  # also without a text
            efficientdet("test_resnet", 3, 128, "none", channels=64)
    with pytest.raises(InputError, match="there are none for this detector"):
        rtdetr("resnet50", 3, 128, "coco", channels=64)
    with pytest.raises(InputError, match="resnet50 and 256 channels"):
        retinanet_v2("resnet18", 3, 128, "none")
