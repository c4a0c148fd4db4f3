"""The U-Nets of fastai and of imlab-uiip: sizes counted by hand, the input's way around the network, equalisation."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import InputError
from solutions.lung_segmentation.config import PAPER, SDFN, NetworkConfig
from solutions.lung_segmentation.models import DynamicUnet, Equalised, ImlabUnet, build_network
from solutions.lung_segmentation.segmenter import load_segmenter, save_segmenter


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_imlab_has_the_parameters_of_its_keras_model():
    model = build_network(SDFN.network, 1).eval()
    # 3 × 3 convolutions with biases: a·b·9 + b each
    pairs = [(1, 32), (32, 32), (32, 64), (64, 64), (64, 64), (64, 64), (64, 128), (128, 128), (128, 256)]
    pairs += [(256, 256), (256, 256), (384, 256), (256, 256), (256, 256), (320, 256)]
    pairs += [(256, 128), (128, 128), (192, 128), (128, 64), (64, 64), (96, 64), (64, 1)]
    assert parameters(model) == sum(9 * a * b + b for a, b in pairs) == 5_468_897
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in model.modules())
    assert model(torch.zeros(2, 1, 32, 48, dtype=torch.uint8)).shape == (2, 1, 32, 48)
    with pytest.raises(InputError, match="multiples of 16"):
        model(torch.zeros(1, 1, 40, 40))


def test_dynamic_unet_over_resnet34():
    model = build_network(PAPER.network, 1, "none").eval()
    encoder = parameters(model.net.encoder)
    assert encoder == 21_284_672  # torchvision's ResNet-34 without its last layer
    up = [(512, 256, 512), (512, 128, 384), (384, 64, 256), (256, 64, 96)]  # deeper, skip, result
    expected = 2 * 512 + (512 * 1024 * 9 + 1024) + (1024 * 512 * 9 + 512)
    for deep, skip, out in up:
        joined = deep // 2 + skip
        expected += deep * 2 * deep + 2 * deep + 2 * skip + (joined * out * 9 + out) + (out * out * 9 + out)
    expected += (96 * 4 * 96 + 4 * 96) + 2 * (99 * 99 * 9 + 99) + 99 + 1
    assert parameters(model) - encoder == expected
    assert encoder + expected + 6 * 100 == 41_221_668  # fastai's summary of unet_learner with resnet34, 7 classes
    assert model(torch.zeros(1, 1, 64, 96, dtype=torch.uint8)).shape == (1, 1, 64, 96)


def test_dynamic_unet_joins_the_input_before_its_last_layers():
    model = DynamicUnet("tu-resnet18", None, 1).eval()
    widths, outputs = model.encoder.out_channels, []
    for pixel in (0.0, 1.0):
        maps = [torch.zeros(1, width, 64 >> level, 64 >> level) for level, width in enumerate(widths)]
        maps[0][..., 20, 20] = pixel
        model.encoder.forward = lambda x, maps=maps: maps
        outputs.append(model(None)[0, 0])
    changed = (outputs[0] != outputs[1]).nonzero()
    assert (changed.min(), changed.max()) == (18, 22)  # two 3 × 3 convolutions around the pixel


def test_pixel_shuffle_begins_as_repeated_pixels():
    up = DynamicUnet("tu-resnet18", None, 1).up[0](torch.rand(1, 512, 8, 8))
    blocks = up.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    assert up.shape == (1, 256, 16, 16) and torch.equal(blocks.amin(-1), blocks.amax(-1)) and up.std() > 0


def test_equalised_as_scikit_image_does():
    image = (255 * np.random.default_rng(0).random((40, 50)) ** 3).astype(np.uint8)
    model = Equalised(torch.nn.Identity(), (0.5,), (0.25,))
    found = model(torch.from_numpy(image)[None, None])[0, 0].numpy()
    shares = np.array([(image <= level).mean() for level in range(256)])  # the cumulative histogram
    assert np.abs(found - (shares[image] - 0.5) / 0.25).max() < 1e-5
    darker = model(torch.from_numpy(image / 2)[None, None])[0, 0].numpy()
    assert np.abs(darker - found).max() < 0.3


@pytest.mark.parametrize(
    "numbers",
    [
        {"architecture": "imlab", "encoder": "", "weights": "none", "decoder": (8, 16)},
        {"architecture": "imlab", "encoder": "", "weights": "imagenet", "decoder": (8, 16, 8)},
        {"architecture": "imlab", "weights": "none", "decoder": (8, 16, 8)},
        {"architecture": "dynamicunet", "weights": "none", "decoder": (8, 16)},
    ],
)
def test_networks_that_do_not_fit_are_refused(numbers):
    with pytest.raises(InputError, match="network"):
        build_network(NetworkConfig(**numbers), 1)


def test_imlab_goes_through_a_segmenter_file(tmp_path):
    network = replace(SDFN.network, decoder=(4, 8, 4), size=32)
    model = build_network(network, 1).eval()
    path = tmp_path / "lungs.safetensors"
    save_segmenter(path, model, {"network": network, "structures": "lungs", "pixel": 0.5, "regions": 0})
    image = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    probs = next(load_segmenter(path, "cpu", precision="fp32").probs([image]))
    wanted = torch.sigmoid(model(torch.from_numpy(image)[None, None]))[0].detach().numpy()
    assert np.abs(probs / 255 - wanted).max() < 0.01


def test_a_small_imlab_learns_where_it_is_bright():
    torch.manual_seed(0)
    model = ImlabUnet(1, (8, 16, 8))
    images = torch.rand(4, 1, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), (images > 0.5).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
