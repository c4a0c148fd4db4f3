"""What is built: the detector, and the classifier of healthy and abnormal images."""

from common.nn import detectors, models
from common.train.checkpoint import load_weights
from solutions.vinbigdata.config import NO_FINDING


def build_detector(config, weights=None):
    """The detector of a DetectorConfig, a `common.nn.detectors.Detector` of the 14 findings.

    The backbone's batch norms are frozen where it starts from pretrained weights: the paper's library does so, and a
    batch of four gives no statistics. All else trains. Raises InputError for names and weights that do not fit.
    """
    build = {"faster_rcnn": detectors.faster_rcnn, "retinanet": detectors.retinanet, "fcos": detectors.fcos}
    return build[config.architecture](
        config.backbone,
        NO_FINDING,
        config.size,
        config.weights if weights is None else weights,
        nms=config.nms,
        per_image=config.per_image,
        channels=config.channels,
        frozen_norms=config.weights != "none",
    )


def load_detector(config, path):
    """The trained detector whose weights lie in `path`."""
    model = build_detector(config, "none")
    load_weights(path, model)
    return model


def build_healthy(config, weights=None):
    """The 2CC of a HealthyConfig: radiographs (B, 1, H, W) to one logit each, above 0 for healthy."""
    return models.classifier(config.backbone, 1, config.weights if weights is None else weights)


def load_healthy(config, path):
    """The trained 2CC whose weights lie in `path`."""
    model = build_healthy(config, "none")
    load_weights(path, model)
    return model
