"""Attention over pixels and weighting of feature maps by masks."""

import torch
import torch.nn.functional as F
from torch import nn


class MultiScaleAttention(nn.Module):
    """Weight each pixel of an image by an attention map from several scales: (B, C, H, W) → the same shape.

    Source: Fang et al., CXR-IRNet, 3.2 and 4 (kernels 5 and 9). Left open there: the convolutions' channels (the
    image's), padding (zeros), `last` (3, as in their code) and the start: weights 0 and bias 2 in the last one, so that
    every pixel has the weight 0.88 and images stay close to what the backbone was pretrained on.
    """

    def __init__(self, channels=3, kernels=(5, 9), last=3):
        super().__init__()
        self.scales = nn.ModuleList(nn.Conv2d(channels, channels, k, padding=k // 2, bias=False) for k in kernels)
        self.join = nn.Conv2d(2 + 2 * len(kernels), 1, last, padding=last // 2)
        nn.init.zeros_(self.join.weight)
        nn.init.constant_(self.join.bias, 2.0)

    def weights(self, images):
        """Return the attention map (B, 1, H, W), in 0 to 1, from each scale's maximum and mean over channels."""
        scales = [images, *(scale(images) for scale in self.scales)]
        maps = [reduced for x in scales for reduced in (x.amax(1, keepdim=True), x.mean(1, keepdim=True))]
        return torch.sigmoid(self.join(torch.cat(maps, 1)))

    def forward(self, images):
        return images * self.weights(images)


def pool_masks(masks, shape, binary=False):
    """Return masks (B, 1, H, W) average-pooled to `shape`, ones for an empty mask; binary: 1 from one half on."""
    pooled = F.adaptive_avg_pool2d(masks, shape)
    pooled = (pooled >= 0.5).to(masks.dtype) if binary else pooled
    return torch.where(pooled.amax((1, 2, 3), keepdim=True) == 0, 1.0, pooled)


def weigh_features(features, masks, binary=False):
    """Return features (B, K, h, w) multiplied by masks (B, 1, H, W), pooled as by `pool_masks`.

    Source: Fang et al., CXR-IRNet, 3.3: "pixels are either 1 … or 0"; their code pools first and then binarises at 0.5.
    """
    return features * pool_masks(masks.to(features.dtype), features.shape[-2:], binary)
