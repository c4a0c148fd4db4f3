"""A classifier of radiographs over any timm backbone, with class activation maps and Grad-CAM."""

from itertools import pairwise

import torch
from torch import nn

from common.nn import models
from common.nn.backbone import ExactLinear, build_backbone, feature_map
from common.nn.weights import load_pretrained


class Classifier(models.Normalised):
    """Radiographs → float32 logits (B, C): backbone, mean pooling of its last feature map, hidden layers, last layer.

    The input is images (B, 1, H, W), uint8 or floats in 0 to 255, or pooled features (B, K). hidden: widths of layers
    with ReLU before the dropout and the last layer. loaded: report on the pretrained weights or None.
    """

    def __init__(self, net, width, mean, std, n_classes=1, hidden=(), dropout=0.0):
        super().__init__(net, mean, std)
        self.width, self.loaded, widths = width, None, [width, *hidden]
        layers = [layer for pair in pairwise(widths) for layer in (ExactLinear(*pair), nn.ReLU())]
        self.hidden, self.dropout = nn.Sequential(*layers), nn.Dropout(dropout)
        self.head = ExactLinear(widths[-1], n_classes)

    def features(self, images):
        """Return the last feature map, float32 (B, K, h, w). Raises InputError for a wrong number of channels."""
        return feature_map(self.net, self.scaled(images)).float()

    def pooled(self, images):
        """Return the mean of the feature map over its cells, float32 (B, K)."""
        return self.features(images).mean((2, 3))

    def forward(self, images):
        return self.head(self.dropout(self.hidden(images if images.ndim == 2 else self.pooled(images))))

    def maps(self, features):
        """Return class activation maps, float32 (B, C, h, w), of feature maps; needs a network without hidden layers.

        Their mean over cells plus the bias are the logits (Zhou et al. 2016).
        """
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("ck,bkhw->bchw", self.head.weight.float(), features)

    def cam(self, images):
        """Return the class activation maps of images, see `maps`."""
        return self.maps(self.features(images))

    def heat(self, images, sign=1):
        """Return Grad-CAM of a single logit (sign −1: of its negative), float32 (B, h, w) >= 0 (Selvaraju et al. 2017).

        This works in no_grad and inference mode, too, and leaves no gradients behind.
        """
        with torch.no_grad():
            features = self.features(images)
        with torch.inference_mode(False), torch.enable_grad():
            maps = features.clone().requires_grad_()  # a clone, since inference tensors cannot have gradients
            (gradient,) = torch.autograd.grad(self(maps.mean((2, 3))).sum(), maps)
        return (sign * (gradient.mean((2, 3), keepdim=True) * features).sum(1)).relu()


def build_classifier(config, n_classes=1, weights=None, kind=Classifier, drop_path=0.0, **options):
    """Return a classifier with a configuration's backbone, size, dropout and weights (or other `weights`).

    drop_path: as in `build_backbone`. options: of `kind`. InputError for an unknown backbone or unfit weights.
    """
    name = models.timm_name(config.backbone)
    net, width = build_backbone(name, config.size, drop_path)
    model = kind(net, width, *models.mean_std(name), n_classes, dropout=config.dropout, **options)
    required = [key for key in model.state_dict() if key.startswith("net.")]
    return load_pretrained(model, name, config.weights if weights is None else weights, required)
