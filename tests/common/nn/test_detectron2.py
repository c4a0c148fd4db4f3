"""Detectron2's names, strides and inputs, on files of the right names and shapes made here."""

import pickle

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.nn.detectors import faster_rcnn, read_detector, to_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB
ZOO_MEAN = (103.53, 116.28, 123.675)  # BGR, in grey levels: MODEL.PIXEL_MEAN; PIXEL_STD is 1
BLOCKS = {"resnet26": (2, 2, 2, 2), "resnet101": (3, 4, 23, 3)}


def zoo_shapes(blocks, channels=256, classes=80):
    """Names and shapes of a Faster R-CNN with a ResNet and a feature pyramid in Detectron2's model zoo."""
    shapes = {}

    def convolution(name, out, inside, side, norm=True):
        shapes[f"{name}.weight"] = (out, inside, side, side)
        for part in ("weight", "bias", "running_mean", "running_var") if norm else ():
            shapes[f"{name}.norm.{part}"] = (out,)
        if not norm:
            shapes[f"{name}.bias"] = (out,)

    convolution("backbone.bottom_up.stem.conv1", 64, 3, 7)
    inside = 64
    for stage, count in enumerate(blocks, 2):
        width = 64 * 2 ** (stage - 2)
        for block in range(count):
            name = f"backbone.bottom_up.res{stage}.{block}"
            if block == 0:
                convolution(f"{name}.shortcut", 4 * width, inside, 1)
            convolution(f"{name}.conv1", width, inside, 1)
            convolution(f"{name}.conv2", width, width, 3)
            convolution(f"{name}.conv3", 4 * width, width, 1)
            inside = 4 * width
        convolution(f"backbone.fpn_lateral{stage}", channels, inside, 1, norm=False)
        convolution(f"backbone.fpn_output{stage}", channels, channels, 3, norm=False)
    convolution("proposal_generator.rpn_head.conv", channels, channels, 3, norm=False)
    convolution("proposal_generator.rpn_head.objectness_logits", 3, channels, 1, norm=False)
    convolution("proposal_generator.rpn_head.anchor_deltas", 12, channels, 1, norm=False)
    for name, out, inside in (
        ("box_head.fc1", 1024, channels * 49),
        ("box_head.fc2", 1024, 1024),
        ("box_predictor.cls_score", classes + 1, 1024),
        ("box_predictor.bbox_pred", 4 * classes, 1024),
    ):
        shapes |= {f"roi_heads.{name}.weight": (out, inside), f"roi_heads.{name}.bias": (out,)}
    return shapes


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A file with a small ResNet of bottlenecks, and its tensors."""
    path, rng = tmp_path_factory.mktemp("zoo") / "model_final.pkl", np.random.default_rng(0)
    shapes = zoo_shapes(BLOCKS["resnet26"], channels=64)
    state = {name: rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in shapes.items()}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    return path, {name: torch.tensor(value) for name, value in state.items()}


def test_every_tensor_of_r101_has_its_place():
    given = {name: torch.zeros(()).expand(shape) for name, shape in zoo_shapes(BLOCKS["resnet101"]).items()}
    converted = to_torchvision(given, STD)
    with torch.device("meta"):
        own = faster_rcnn("resnet101", 80, 1024, "none").net.state_dict()
    own = {name: value.shape for name, value in own.items() if not name.endswith("num_batches_tracked")}
    assert set(converted) == set(own)
    boxes = {"roi_heads.box_predictor.bbox_pred.weight", "roi_heads.box_predictor.bbox_pred.bias"}  # with background
    assert {name for name in own if converted[name].shape != own[name]} == boxes


@pytest.mark.parametrize("protocol", [2, 3, 4, pickle.HIGHEST_PROTOCOL])
def test_pickles_of_any_age_are_read(tmp_path, protocol):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"backbone.bottom_up.x": value}}, protocol))
    state, of_detectron2 = read_detector(tmp_path / "w.pkl")
    assert of_detectron2 and torch.equal(state["backbone.bottom_up.x"], torch.from_numpy(value))


def test_a_file_fills_everything_but_the_class_layers(zoo):
    path, state = zoo
    model = faster_rcnn("resnet26", 14, 96, path, channels=64, stride_in_1x1=True)
    assert len(model.loaded.new) == len(model.loaded.unused) == 4
    assert all("box_predictor" in name for name in (*model.loaded.new, *model.loaded.unused))
    own = model.net.state_dict()
    for other, name in (
        ("backbone.bottom_up.stem.conv1.norm.running_var", "backbone.body.bn1.running_var"),
        ("backbone.bottom_up.res4.1.conv2.weight", "backbone.body.layer3.1.conv2.weight"),
        ("backbone.bottom_up.res5.0.conv3.norm.bias", "backbone.body.layer4.0.bn3.bias"),
        ("backbone.bottom_up.res2.0.shortcut.weight", "backbone.body.layer1.0.downsample.0.weight"),
        ("backbone.bottom_up.res3.0.shortcut.norm.running_mean", "backbone.body.layer2.0.downsample.1.running_mean"),
        ("backbone.fpn_lateral5.weight", "backbone.fpn.inner_blocks.3.0.weight"),
        ("backbone.fpn_output2.bias", "backbone.fpn.layer_blocks.0.0.bias"),
        ("proposal_generator.rpn_head.anchor_deltas.weight", "rpn.head.bbox_pred.weight"),
        ("roi_heads.box_head.fc2.bias", "roi_heads.box_head.fc7.bias"),
    ):
        assert torch.equal(own[name], state[other]), name
    body = model.net.backbone.body
    strides = [(block[0].conv1.stride, block[0].conv2.stride) for block in (body.layer1, body.layer2, body.layer4)]
    assert strides == [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((2, 2), (1, 1))]


def test_the_stem_sees_what_detectron2_shows_it(zoo):
    path, state = zoo
    model = faster_rcnn("resnet26", 14, 96, path, channels=64, stride_in_1x1=True)
    assert model.scale.flatten().tolist() == pytest.approx([1 / (255 * value) for value in STD])
    images = torch.randint(0, 256, (1, 1, 96, 96), dtype=torch.uint8)
    theirs = images.float() - torch.tensor(ZOO_MEAN).reshape(1, 3, 1, 1)
    weight = state["backbone.bottom_up.stem.conv1.weight"]
    expected = torch.nn.functional.conv2d(theirs, weight, stride=2, padding=3)
    torch.testing.assert_close(model.net.backbone.body.conv1(model.scaled(images)), expected, rtol=1e-3, atol=1e-2)


class Attack:
    def __reduce__(self):
        return print, ("run",)


def test_what_is_refused_in_one_line(zoo, tmp_path, capsys):
    with pytest.raises(InputError, match="a ResNet of Detectron2, which needs --detector"):
        faster_rcnn("resnet26", 14, 96, zoo[0], channels=64)
    path = tmp_path / "w.pkl"
    with pytest.raises(InputError, match="stride_in_1x1: belongs to a ResNet of bottlenecks"):
        faster_rcnn("resnet18", 14, 96, "none", channels=64, stride_in_1x1=True)
    for content in (pickle.dumps({"model": {"a": Attack()}}), pickle.dumps([1]), b"", b"\x80\x04garbage"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"w\.pkl: not a file of Detectron2's model zoo") as caught:
            read_detector(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps({"model": {"backbone.bottom_up.stem.conv.weight": np.zeros((2, 3, 3, 3))}}))
    with pytest.raises(InputError, match=r"w\.pkl: a network of Detectron2 other than its ResNets"):
        faster_rcnn("resnet26", 14, 96, path, channels=64, stride_in_1x1=True)
    assert capsys.readouterr().out == ""


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(InputError, match=r"none\.pkl: no such file$"):
        read_detector(tmp_path / "none.pkl")
