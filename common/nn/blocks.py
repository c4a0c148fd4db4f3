"""Parts of networks that more than one solution may use."""

import torch
import torch.nn.functional as F
from torch import nn


class MultiScaleAttention(nn.Module):
    """Weight each pixel of an image by a map made of the image at several scales: (B, C, H, W) → the same shape.

    The image and a convolution of it for each of `kernels` give their maximum and mean over channels; a convolution
    with kernel `last` makes one map of these, and its sigmoid multiplies the image. Source: Fang et al., CXR-IRNet,
    3.2 and 4 (kernels 5 and 9). The paper leaves open the channels of the convolutions (here as many as the image's),
    their padding (zeros, so that the size stays), `last` (3, as in the code that its authors published) and the start:
    here the last convolution starts with weights 0 and bias 2, so that every pixel starts with the weight 0.88 and a
    pretrained backbone sees what it knows.
    """

    def __init__(self, channels=3, kernels=(5, 9), last=3):
        super().__init__()
        self.scales = nn.ModuleList(nn.Conv2d(channels, channels, k, padding=k // 2, bias=False) for k in kernels)
        self.join = nn.Conv2d(2 + 2 * len(kernels), 1, last, padding=last // 2)
        nn.init.zeros_(self.join.weight)
        nn.init.constant_(self.join.bias, 2.0)

    def weights(self, images):
        """The map alone, (B, 1, H, W) in 0 to 1."""
        seen = [images, *(scale(images) for scale in self.scales)]
        maps = [reduced for x in seen for reduced in (x.amax(1, keepdim=True), x.mean(1, keepdim=True))]
        return torch.sigmoid(self.join(torch.cat(maps, 1)))

    def forward(self, images):
        return images * self.weights(images)


def weigh_features(features, masks):
    """Multiply features (B, K, h, w) by masks (B, 1, H, W) of 0 to 1, which adaptive average pooling brings to h × w.

    Where a mask is 0 everywhere the features stay as they are: they would say nothing of the image otherwise. Source:
    Fang et al., CXR-IRNet, 3.3.
    """
    weights = F.adaptive_avg_pool2d(masks.to(features.dtype), features.shape[-2:])
    empty = weights.amax((1, 2, 3), keepdim=True) == 0
    return features * torch.where(empty, 1.0, weights)
