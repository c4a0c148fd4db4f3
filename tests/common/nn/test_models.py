import copy

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError
from common.nn import models
from common.nn.models import Normalised, classifier, segmenter
from common.nn.norms import batch_norms, is_frozen, set_frozen_eval
from common.nn.precision import autocast


def gray(b=2, side=64, seed=0):
    return torch.randint(0, 256, (b, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Echo(nn.Module):
    def forward(self, x):
        return x


def test_normalisation_by_hand():
    out = Normalised(Echo(), mean=(0.5, 0.2, 0.0), std=(0.5, 0.1, 1.0))(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    expected = torch.tensor([[-1.0, 1.0], [-2.0, 8.0], [0.0, 1.0]]).reshape(1, 3, 1, 2)
    torch.testing.assert_close(out, expected)
    floats = Normalised(Echo(), (0.5,), (0.25,))(torch.tensor([[[[127.5, 255.0]]]]))
    torch.testing.assert_close(floats, torch.tensor([[[[0.0, 2.0]]]]))


def test_the_wrapper_equals_repeat_and_normalise():
    model = classifier("test_resnet", 3, "none").eval()
    config = timm.get_pretrained_cfg("test_resnet")
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (config.mean, config.std))
    image = gray()
    expected = model.net((image.float() / 255).repeat(1, 3, 1, 1).sub(mean).div(std))
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(image.float()), model(image))
    assert all(name.startswith("net.") for name in model.state_dict())


@pytest.mark.parametrize("side", [512, 1024])
def test_the_papers_networks_build_offline_and_take_their_sizes(side):
    with torch.device("meta"):  # shapes without arithmetic
        image = torch.zeros(2, 1, side, side, dtype=torch.uint8)
        xception = classifier("xception", 1, "none")
        fpn = segmenter(smp.FPN, "inceptionresnetv2", "none", empty_head=True)
        assert xception(image).shape == (2, 1)
        mask, presence = fpn(image)
        assert mask.shape == (2, 1, side, side) and presence.shape == (2, 1)
        names = [name for name in timm.create_model("inception_resnet_v2").state_dict() if "classif." not in name]
        assert set(fpn.net.encoder.state_dict()) == set(names)  # so that timm's weights fit
        assert list(xception.net.state_dict()) == list(timm.create_model("legacy_xception", num_classes=1).state_dict())
    for name in ("xception", "inceptionresnetv2"):
        assert models.mean_std(models.timm_name(name)) == ((0.5,) * 3, (0.5,) * 3)
    assert models.mean_std("resnet18") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", ["unet", "unetplusplus", "fpn", "manet", "linknet", "deeplabv3plus"])
def test_architectures_by_name(name):
    model = segmenter(name, "resnet18", "none", n_classes=3).eval()
    assert isinstance(model.net, models.ARCHITECTURES[name])
    with torch.inference_mode():
        assert model(gray()).shape == (2, 3, 64, 64)


PYRAMIDS = ("convnext_atto", "tf_efficientnetv2_b0", "pvt_v2_b0")


@pytest.mark.parametrize(
    ("name", "encoder"),
    [*((name, encoder) for name in ("upernet", "segformer") for encoder in PYRAMIDS), ("dpt", "vit_tiny_patch16_224")],
)
def test_decoders_over_encoders_train_and_take_other_sizes(name, encoder):
    model = segmenter(name, encoder, "none", empty_head=True).train()
    mask, presence = model(gray())
    assert mask.shape == (2, 1, 64, 64) and presence.shape == (2, 1)
    (mask.square().mean() + presence.square().mean()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.inference_mode():
        assert model.eval()(gray(1, 96))[0].shape == (1, 1, 96, 96)


def test_output_is_float32_under_autocast_and_gradients_reach_the_first_layer():
    model = segmenter("fpn", "test_resnet", "none", empty_head=True).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        mask, presence = model(gray())
    assert mask.dtype == presence.dtype == torch.float32
    (mask.mean() + presence.mean()).backward()
    assert next(model.parameters()).grad.abs().sum() > 0


def test_depthwise_convolutions_train_in_float32_under_bf16(monkeypatch):
    model = copy.deepcopy(classifier("tf_efficientnet_lite0", 2, "none")).eval()  # averaging copies networks
    plain = Normalised(nn.Identity(), (0.5,) * 3, (0.5,) * 3)
    plain.net = timm.create_model("tf_efficientnet_lite0", num_classes=2).eval()
    plain.load_state_dict(model.state_dict())
    seen, conv2d = [], F.conv2d

    def spy(x, weight, *rest, **named):
        if weight.shape[1] == 1:
            seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return conv2d(x, weight, *rest, **named)

    def gradient(net, dtype):
        with autocast("cpu", dtype):
            net(gray(1)).sum().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    exact = gradient(plain, torch.float32)
    monkeypatch.setattr(F, "conv2d", spy)
    assert torch.cosine_similarity(gradient(model, torch.bfloat16), exact, dim=0) > 0.95
    assert seen == [(torch.float32, False)] * 16
    seen.clear()
    with torch.no_grad(), autocast("cpu", torch.bfloat16):
        assert torch.equal(model(gray()), plain(gray()))  # inference is left as it is
    assert len(seen) == 32 and all(enabled for _, enabled in seen)


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: classifier("rsenet18", 1, "none"), "timm has no network 'rsenet18'; similar names: .*resnet18"),
        (lambda: classifier("resnet18.nope", 1, "none"), "timm has no network 'resnet18.nope'"),
        (lambda: segmenter("unit", "resnet18", "none"), "'unit': choose one of unet, unetplusplus, fpn"),
        (
            lambda: segmenter("fpn", "vit_tiny_patch16_224", "none"),
            "'vit_tiny_patch16_224' has .*: only the decoder dpt",
        ),
        (
            lambda: segmenter("upernet", "swin_tiny_patch4_window7_224", "none"),
            "has a fixed size .*: only the decoder dpt",
        ),
        (
            lambda: segmenter("dpt", "convnext_atto", "none"),
            "does not work in DPT .it needs a vision transformer, such",
        ),
        (lambda: segmenter("segformer", "mit_b2", "none"), "mit_b2: .* not be used commercially; timm.s pvt_v2_b2"),
        (lambda: segmenter("dpt", "vit_small_patch14_dinov2", "none")(gray(1, 448 + 32)), "needs multiples of 224"),
        (lambda: classifier("resnet18", 1, "missing.pth"), "missing.pth: no such file"),
        (lambda: segmenter("fpn", "resnet18", "none")(gray(1, 72)), "72×72: this network needs multiples of 32"),
        (lambda: classifier("test_resnet", 1, "none")(torch.zeros(1, 3, 64, 64)), "expected one gray channel"),
    ],
)
def test_bad_names_weights_and_images_are_refused(build, line):
    with pytest.raises(InputError, match=line) as error:
        build()
    assert "\n" not in str(error.value)


def frozen(model):
    return [not p.requires_grad for p in model.parameters()]


def test_the_first_half_of_the_layers_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)
    )
    models.freeze_first_half(model)  # five layers with parameters: two and three
    assert frozen(model) == [True] * 4 + [False] * 6


def test_the_first_half_of_fpn_lies_in_the_encoder():
    model = segmenter("fpn", "resnet18", "none")
    models.freeze_first_half(model)
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert names[0] == "net.encoder.model.conv1.weight" and all(name.startswith("net.encoder.") for name in names)
    assert 0.4 < len(names) / len(list(model.parameters())) < 0.6


def test_freezing_all_but_the_head_and_the_encoder():
    model = classifier("test_resnet", 2, "none")
    models.freeze_all_but_head(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["net.fc.weight", "net.fc.bias"]
    model = segmenter("unet", "test_resnet", "none", empty_head=True)
    models.freeze_all_but_head(model)
    trains = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"segmentation_head", "classification_head"}
    models.freeze_encoder(model)  # thaws the decoder again; the encoder's norms keep training
    still = {id(p) for norm in batch_norms(model.net.encoder) for p in norm.parameters()}
    assert still
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith("net.encoder.") or id(p) in still)
    model.train()
    set_frozen_eval(model)
    assert all(norm.training for norm in batch_norms(model))


def test_frozen_batch_norms_keep_their_statistics_until_they_thaw():
    model = segmenter("fpn", "resnet18", "none")
    models.freeze_first_half(model)
    model.train()
    set_frozen_eval(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    still = [m for m in norms if not m.weight.requires_grad]
    before = [m.running_mean.clone() for m in norms]
    model(gray())
    same = [torch.equal(m.running_mean, old) for m, old in zip(norms, before, strict=True)]
    assert same == [not m.weight.requires_grad for m in norms] and 0 < len(still) < len(norms)
    model.requires_grad_(True)
    model.train()
    set_frozen_eval(model)
    assert all(m.training for m in norms)


def test_frozen_norms_stay_frozen_when_the_rest_thaws(tmp_path):
    torch.save(classifier("resnet18", 1, "none").net.state_dict(), tmp_path / "resnet18.pt")
    model = classifier("resnet18", 1, str(tmp_path / "resnet18.pt"), frozen_norms=True)
    for thawed in (False, True, True):
        models.freeze_all_but_head(model, not thawed)
        model.train()
        set_frozen_eval(model)
        assert all(is_frozen(norm) and not norm.training for norm in batch_norms(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(list(model.parameters())) - 2 * len(batch_norms(model))
    assert not any(is_frozen(norm) for norm in batch_norms(classifier("resnet18", 1, "none", frozen_norms=True)))
