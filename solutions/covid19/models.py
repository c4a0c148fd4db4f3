"""What is built: a timm backbone, the paper's fully connected head on its pooled features, and Grad-CAM."""

from itertools import pairwise

import torch
from torch import nn

from common.nn import models
from common.nn.backbone import ExactLinear, build_backbone, feature_map, load_backbone
from common.train.checkpoint import load_weights


class CovidNet(models.Normalised):
    """Radiographs to one logit: the backbone's last feature map, mean pooling, hidden layers, dropout, one layer.

    Images (B, 1, H, W) uint8, or floating in 0 to 255; returns float32 (B, 1). `hidden`: widths of the layers with ReLU
    in front of the last one. `loaded`: what became of the pretrained weights, None without. Source: Ahmed et al., 3.4.
    """

    def __init__(self, net, width, mean, std, hidden=(), dropout=0.0):
        super().__init__(net, mean, std)
        self.width, self.loaded = width, None
        widths, layers = [width, *hidden], []
        for before, after in pairwise(widths):
            layers += [ExactLinear(before, after), nn.ReLU()]
        self.hidden, self.dropout = nn.Sequential(*layers), nn.Dropout(dropout)
        self.head = ExactLinear(widths[-1], 1)

    def features(self, images):
        """The last feature map, float32 (B, K, h, w). Raises InputError for a wrong number of channels."""
        return feature_map(self.net, self.scaled(images)).float()

    def classify(self, features):
        """The logits float32 (B, 1) of feature maps (B, K, h, w)."""
        return self.head(self.dropout(self.hidden(features.mean((2, 3)))))

    def forward(self, images):
        return self.classify(self.features(images))

    def heat(self, images, sign=1):
        """Grad-CAM of the logit on the last feature map: where the image speaks for the class; float32 (B, h, w) >= 0.

        Each channel is weighed by the mean over the cells of the logit's gradient, and of the sum over the channels the
        positive part is left: all zero where nothing speaks for the class. sign: −1 for what speaks against it. Works
        without gradients around it too, and leaves the network's own as they are. Source: Selvaraju et al. 2017,
        Grad-CAM.
        """
        with torch.no_grad():
            features = self.features(images)
        with torch.inference_mode(False), torch.enable_grad():
            maps = features.clone().requires_grad_()  # a clone, as what comes out of inference mode takes no gradient
            (gradient,) = torch.autograd.grad(sign * self.classify(maps).sum(), maps)
        return (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()


def build_network(config, weights=None):
    """The CovidNet of a NetworkConfig, with the pretrained backbone that `weights`, by default its own, names.

    A file of weights must hold at least the whole backbone. Raises InputError for a network that timm does not have,
    or that gives no feature map at config.size, and for weights that do not fit.
    """
    weights = config.weights if weights is None else weights
    name = models.timm_name(config.backbone)
    net, width = build_backbone(name, config.size)
    model = CovidNet(net, width, *models.mean_std(name), config.hidden, config.dropout)
    load_backbone(model, name, weights)
    return model


def load_network(config, path):
    """The trained CovidNet whose weights lie in `path`."""
    model = build_network(config, "none")
    load_weights(path, model)
    return model
