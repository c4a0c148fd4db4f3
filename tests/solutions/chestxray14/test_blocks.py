import numpy as np
import pytest
import torch
from scipy.ndimage import convolve

from solutions.chestxray14.models import MultiScaleAttention, weigh_features


def test_attention_starts_nearly_open_and_the_same_everywhere():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 20, 24)
    block = MultiScaleAttention(3)
    np.testing.assert_allclose(block(images).detach(), images * torch.sigmoid(torch.tensor(2.0)), rtol=1e-6)
    assert [scale.kernel_size for scale in block.scales] == [(5, 5), (9, 9)] and block.join.in_channels == 6


def test_attention_equals_scipy():
    torch.manual_seed(0)
    image = torch.randn(1, 2, 11, 13)
    block = MultiScaleAttention(2)
    torch.nn.init.normal_(block.join.weight)

    def correlated(x, weight):  # scipy flips the kernel
        return sum(convolve(x[c], weight[c, ::-1, ::-1], mode="constant") for c in range(len(x)))

    x, maps = image[0].numpy(), []
    for scale in (None, *block.scales):
        seen = x if scale is None else np.stack([correlated(x, kernel) for kernel in scale.weight.detach().numpy()])
        maps += [seen.max(0), seen.mean(0)]
    joined = correlated(np.stack(maps), block.join.weight.detach().numpy()[0]) + 2
    np.testing.assert_allclose(block.weights(image)[0, 0].detach(), 1 / (1 + np.exp(-joined)), atol=1e-5)
    np.testing.assert_allclose(block(image)[0].detach(), x / (1 + np.exp(-joined)), atol=1e-5)


def test_every_part_of_attention_gets_gradients():
    torch.manual_seed(0)
    block, images = MultiScaleAttention(3), torch.randn(2, 3, 16, 16)
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    for _ in range(2):  # the scales' gradient waits for the last convolution's weights
        optimizer.zero_grad()
        block(images).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


def test_features_outside_of_the_mask_are_zero():
    features = torch.arange(1.0, 9).reshape(1, 2, 2, 2)
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, :2, :2] = 1  # the first cell whole
    mask[0, 0, 3, 2:] = 1  # the last by half
    assert weigh_features(features, mask).tolist() == [[[[1, 0], [0, 2]], [[5, 0], [0, 4]]]]
    # cells of another size: 5 pixels to 2 cells share the middle one
    shared = weigh_features(torch.ones(1, 1, 1, 2), torch.eye(5)[None, None, 2:3])
    assert shared[0, 0, 0].tolist() == pytest.approx([1 / 3, 1 / 3])
    # binary: from one half on a cell counts wholly, below not at all
    assert weigh_features(features, mask, binary=True).tolist() == [[[[1, 0], [0, 4]], [[5, 0], [0, 8]]]]
    mask[0, 0, 3, 3] = 0
    assert weigh_features(features, mask, binary=True)[0, 0].tolist() == [[1, 0], [0, 0]]


def test_an_empty_mask_leaves_the_features_unchanged():
    features, masks = torch.rand(3, 4, 2, 2), torch.zeros(3, 1, 8, 8)
    masks[1] = 1
    masks[2, 0, 0, 0] = 0.5
    out = weigh_features(features, masks)
    assert torch.equal(out[:2], features[:2])  # nothing and everything alike
    assert out[2, :, 0, 0].tolist() == pytest.approx((features[2, :, 0, 0] / 32).tolist()) and out[2].sum(0)[1, 1] == 0
