"""The networks: a timm backbone with CXR-IRNet's attention and weighting, SDFN's fusing layer, and their figures."""

from functools import cache

import numpy as np
import torch
from torch import nn

from common.errors import InputError
from common.metrics.classification import auroc, mean_of_defined
from common.nn import models
from common.nn.backbone import ExactLinear, build_backbone, feature_map, load_backbone
from common.nn.blocks import MultiScaleAttention, weigh_features
from common.nn.losses import bce
from solutions.chestxray14.config import LABELS

PROBS_ROWS = 8192  # rows of features that become probabilities at once


class ChestNet(models.Normalised):
    """Radiographs to 14 logits: attention, the backbone's last feature map, its weighting, mean pooling, one layer.

    Images (B, 1, H, W) uint8, or floating in 0 to 255; with `weighting` (B, 2, H, W), the second channel the lungs'
    share of each pixel, 0 to 255. Returns float32 (B, 14). `width`: K, the channels of the feature map. `loaded`: what
    became of the pretrained weights, None without. Sources: Fang et al., CXR-IRNet, 3.2 and 3.3; without both
    additions it is the network of Rajpurkar et al., CheXNet, and of SDFN's branches (B.3).
    """

    def __init__(self, net, width, mean, std, attention, weighting, dropout):
        super().__init__(net, mean, std)
        self.attention = MultiScaleAttention(len(mean)) if attention else nn.Identity()
        self.weighting, self.width, self.loaded = weighting, width, None
        self.dropout = nn.Dropout(dropout)
        self.head = ExactLinear(width, len(LABELS))

    def features(self, images):
        """Return the last feature map, weighted where the network does so, float32 (B, K, h, w).

        An empty mask counts as a full one. Raises InputError for a wrong number of channels.
        """
        if images.ndim != 4 or images.shape[1] != 1 + self.weighting:
            wanted = "a gray and a mask channel, (B, 2, H, W)" if self.weighting else "one gray channel, (B, 1, H, W)"
            raise InputError(f"images {tuple(images.shape)}: expected {wanted}")
        maps = feature_map(self.net, self.attention(self.scaled(images[:, :1]))).float()
        return weigh_features(maps, images[:, 1:].float() / 255) if self.weighting else maps

    def pooled(self, images):
        """Return the mean of the feature map over its cells, float32 (B, K): the input of the last layer."""
        return self.features(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.dropout(self.pooled(images)))

    def cam(self, images):
        """Return class activation maps, float32 (B, 14, h, w); their mean over cells plus the bias are the logits.

        Source: Zhou et al. 2016, Learning deep features for discriminative localization.
        """
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("ck,bkhw->bchw", self.head.weight.float(), features)


class FusionNet(ExactLinear):
    """SDFN's last stage (B.4): features of both frozen networks side by side, (B, K1 + K2), to 14 logits."""

    @torch.inference_mode()
    def probs(self, features):
        """Return probabilities float64 (n, 14) of `views.pooled_features` (n, V, K1 + K2), the mean over V."""
        blocks = [features[i : i + PROBS_ROWS] for i in range(0, len(features), PROBS_ROWS)]
        device = self.weight.device
        found = [self(torch.from_numpy(block).to(device)).sigmoid().double().mean(1).cpu().numpy() for block in blocks]
        return np.concatenate([np.empty((0, self.out_features)), *found])


def build_network(config, weights=None):
    """Return the ChestNet of a NetworkConfig, with pretrained weights: `weights`, by default those of the config.

    A file of weights must hold at least the whole backbone. Raises InputError for a network that timm does not have,
    or that gives no feature map at config.size, and for weights that do not fit.
    """
    weights = config.weights if weights is None else weights
    name = models.timm_name(config.backbone)
    net, width = build_backbone(name, config.size)
    model = ChestNet(net, width, *models.mean_std(name), config.attention, config.weighting, config.dropout)
    load_backbone(model, name, weights)
    return model


@cache
def feature_width(backbone, size):
    """Return the number of channels of a backbone's last feature map; the random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        return build_backbone(models.timm_name(backbone), size)[1]


def build_fusion(config, weights=None):
    """Return the FusionNet over the features of both networks of a Config."""
    return FusionNet(sum(feature_width(one.backbone, one.size) for one in (config.whole, config.lungs)), len(LABELS))


def auroc_and_loss(labels, logits):
    """Return the figures of logits, float32 (n, 14): auroc, the mean over classes with labels of both kinds; loss."""
    loss = bce(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    return {"auroc": mean_of_defined(auroc(labels, logits, undefined=np.nan)), "loss": loss}
