import pytest
import timm
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

from common.errors import InputError
from common.nn.detectors import faster_rcnn, fcos, retinanet
from common.nn.norms import set_frozen_eval
from common.nn.precision import autocast
from common.train.averaging import reestimate_batch_norm

KINDS = (faster_rcnn, retinanet, fcos)


def images(b=2, side=96, seed=0):
    return torch.randint(0, 256, (b, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def target(*rows):
    boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor([row[4] for row in rows], dtype=torch.int64)}


def small(kind, n_classes=3, weights="none", **options):
    torch.manual_seed(0)
    return kind("test_resnet", n_classes, 96, weights, channels=64, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs(kind):
    model = small(kind, per_image=7, score=0.0)
    before = target((5, 5, 30, 40, 2))
    losses = model(images(), [before, target()])
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
    assert before["labels"].tolist() == [2]  # the caller's target stays as it was
    sum(losses.values()).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused  # each would stop a training over several processes
    for found in model.eval()(images(3)):
        boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
        assert boxes.dtype == scores.dtype == torch.float32 and labels.dtype == torch.int64
        assert 0 < len(boxes) <= 7 and boxes.shape == (len(scores), 4) and labels.shape == scores.shape
        assert boxes.min() >= 0 and boxes.max() <= 96 and (scores.diff() <= 0).all()
        assert labels.min() >= 0 and labels.max() <= 2
    torch.testing.assert_close(model(images().float())[0], model(images())[0])
    model.zero_grad()
    sum(model.train()(images(), [target(), target()]).values()).backward()  # images without a box train too
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_moves_no_anchor_and_hardly_a_loss(kind):
    model, seen = small(kind), []
    for module in model.modules():
        if isinstance(module, AnchorGenerator):
            module.register_forward_hook(lambda *args: seen.append(args[2][0]))
    targets, totals = [target((3, 5, 42, 37, 0)), target((20, 20, 50, 60, 2))], []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        with autocast("cpu", dtype):
            losses = model(images(), targets)
            totals.append(sum(losses.values()).item())
        assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert totals[1] == pytest.approx(totals[0], rel=0.03)
    assert seen[0].dtype == seen[1].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])
    with torch.inference_mode(), autocast("cpu", torch.bfloat16):
        for found in model.eval()(images(4)):
            assert found["boxes"].dtype == torch.float32
            assert (found["boxes"] != found["boxes"].bfloat16().float()).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tenth_of_the_image_meets_the_same_anchors_at_any_size(kind):
    sides = []
    for size in (128, 256):
        model = kind("test_resnet", 3, size, "none", channels=64)
        generator = next(module for module in model.modules() if isinstance(module, AnchorGenerator))
        sides.append([[float(s) / size for s in level] for level in generator.sizes])
    if kind is fcos:
        assert sides[1] == [[s / 256] for s in (8, 16, 32, 64, 128)]
    else:
        assert sides[0] == sides[1] and sides[0][0][0] == 32 / 1024


@pytest.fixture(scope="module")
def torchvisions():
    """Torchvision's own network with random weights, its numbers those of ours at 96 pixels."""
    torch.manual_seed(3)
    return fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=15,
        min_size=96,
        max_size=96,
        box_score_thresh=0.0,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=200,
        rpn_anchor_generator=AnchorGenerator(((3,), (6,), (12,), (24,), (48,)), ((0.5, 1.0, 2.0),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=21),  # 224 of 1024 pixels
    ).eval()


@pytest.mark.parametrize(("size", "scale"), [(1024, 224), (256, 56), (96, 21)])
def test_a_box_is_pooled_from_the_same_level_at_any_size(size, scale):
    model = faster_rcnn("test_resnet", 3, size, "none", channels=64)
    assert model.net.roi_heads.box_roi_pool.canonical_scale == scale


def test_torchvisions_detector_with_the_same_weights_finds_the_same(torchvisions, tmp_path):
    torch.save(torchvisions.state_dict(), tmp_path / "w.pth")
    ours = faster_rcnn("resnet50", 14, 96, tmp_path / "w.pth", score=0.0).eval()
    assert ours.loaded.new == () and ours.loaded.unused == ()
    batch = images(2)
    with torch.inference_mode():
        expected, found = torchvisions(list((batch / 255).repeat(1, 3, 1, 1))), ours(batch)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other["boxes"], one["boxes"], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(other["scores"], one["scores"], rtol=1e-3, atol=1e-5)
        assert torch.equal(other["labels"], one["labels"] - 1)


def test_coco_weights_leave_the_class_layers_new(torchvisions, tmp_path):
    coco = {name: value for name, value in torchvisions.state_dict().items() if "box_predictor" not in name}
    heads = {"cls_score": 91, "bbox_pred": 91 * 4}
    more = {f"roi_heads.box_predictor.{name}.weight": torch.ones(rows, 1024) for name, rows in heads.items()}
    torch.save(coco | more, tmp_path / "coco.pth")
    model = faster_rcnn("resnet50", 14, 96, tmp_path / "coco.pth")
    assert {name.split(".")[-2] for name in model.loaded.new} == set(heads) and len(model.loaded.new) == 4
    state = model.net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in coco.items())


def test_torchvisions_own_coco_weights(torchvisions, monkeypatch):
    asked = []

    def load(url, **options):
        asked.append(url.rsplit("/", 1)[1])
        if "retinanet" in url:
            raise OSError("no route to host")
        return torchvisions.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    model = faster_rcnn("resnet50", 14, 96, "coco")
    assert model.loaded.new == () and asked == ["fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"]
    with pytest.raises(InputError, match=r"weights coco: https://.* could not be loaded \(no route to host\)"):
        retinanet("resnet50", 14, 96, "coco")
    with pytest.raises(InputError, match="weights coco: torchvision has them for resnet50, not resnet18"):
        fcos("resnet18", 14, 96, "coco")


def test_weights_of_a_backbone_alone(tmp_path):
    torch.manual_seed(5)
    classifier = timm.create_model("test_resnet").state_dict()
    torch.save(classifier, tmp_path / "body.pth")
    body = small(fcos, weights=tmp_path / "body.pth").net.backbone.body.state_dict()
    assert all(torch.equal(value, classifier[name]) for name, value in body.items())
    with pytest.raises(InputError, match=r"body\.pth: weights of another network"):
        fcos("resnet18", 14, 96, tmp_path / "body.pth")


def test_frozen_norms_keep_statistics_and_parameters():
    for frozen in (True, False):
        model = small(fcos, frozen_norms=frozen).train()
        set_frozen_eval(model)
        before = {name: value.clone() for name, value in model.net.backbone.body.named_buffers()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
        sum(model(images(), [target((5, 5, 30, 40, 1)), target()]).values()).backward()
        optimizer.step()
        reestimate_batch_norm(model, [images()], lambda net, batch: net(batch))
        same = [torch.equal(value, before[name]) for name, value in model.net.backbone.body.named_buffers()]
        assert all(same) if frozen else not any(same)
        norm = next(m for m in model.net.backbone.body.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert (norm.weight.grad is None) is frozen


@pytest.mark.parametrize(
    "kind", [fcos, *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS if kind != fcos)]
)
def test_detectors_learn_boxes_and_classes(kind):
    batch, true = images(2, 96, 1) // 4, target((8, 8, 32, 40, 0), (24, 44, 60, 60, 1))
    batch[0, 0, 8:40, 8:32] += 160
    batch[0, 0, 44:60, 24:60] += 60
    model = small(kind, n_classes=2, frozen_norms=False, score=0.3, nms=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range({faster_rcnn: 30, retinanet: 60, fcos: 40}[kind]):
        optimizer.zero_grad()
        sum(model(batch, [true, target()]).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
    reestimate_batch_norm(model, [batch], lambda net, x: net(x))
    one, nothing = model.eval()(batch)
    assert set(one["labels"].tolist()) == {0, 1} and not len(nothing["boxes"])
    best = torch.stack([one["boxes"][one["labels"] == label][0] for label in (0, 1)])
    assert (box_iou(best, true["boxes"]).diag() > 0.5).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: faster_rcnn("vit_tiny_patch16_224", 14, 224, "none"), r"vit_tiny_patch16_224.*strides"),
        (lambda: fcos("resnet1000", 14, 224, "none"), r"resnet1000.*similar"),
        (lambda: retinanet("test_resnet", 14, 100, "none"), "size 100"),
        (lambda: retinanet("test_resnet", 14, 96, "none", channels=32), "channels 32"),
        (lambda: small(fcos).eval()(torch.zeros(1, 3, 96, 96)), "one gray channel"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_outputs_that_are_not_finite_are_refused():
    model = small(retinanet).eval()
    torch.nn.init.constant_(model.net.head.classification_head.cls_logits.bias, float("nan"))
    with pytest.raises(InputError, match="produced NaN or infinity"):
        model(images())


def test_bfloat16_gradients_are_numbers_at_the_least_size():
    model, true = small(fcos), target((5, 5, 70, 80, 1))
    for _ in range(6):
        torch.full((40_000,), float("nan"))  # memory that an operation would read before it has written it
        with autocast("cpu", torch.bfloat16):
            loss = sum(model(images(), [true, true]).values())
        model.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_transformer_with_channels_last_works():
    model = fcos("swin_tiny_patch4_window7_224", 3, 96, "none", channels=64)
    assert torch.isfinite(sum(model(images(1), [target((5, 5, 30, 40, 1))]).values()))
