"""Settings for a user's own images; the labels decide which of the three networks is trained.

They follow no paper; the defaults are those that worked for the challenges, and each is an option.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from common.config import BoxConfig, FitConfig, check_run
from common.errors import InputError, check
from common.trained import Card


@dataclass(frozen=True)
class OwnFit(FitConfig):
    """Settings that classifiers and segmenters share."""

    weights: str = "imagenet"  # imagenet, none, or a file with weights of the backbone or encoder.
    augmentation: Literal["light", "none"] = "light"  # light: small movements; flips unless --flip False.


@dataclass(frozen=True)
class ClassifierConfig(OwnFit):
    """The classifier, for one column per class or for the column `label`."""

    backbone: str = "convnext_tiny.fb_in22k_ft_in1k"  # Any timm network with a last feature map.
    size: int = 384
    dropout: float = 0.2
    only_head: bool = False  # Train only the last layer, on features computed once, without augmentation.
    class_weights: bool = False  # Weight the loss by the inverse frequency of the classes (at most 20).
    balanced: bool = False  # Repeat images of rare classes, up to 10 times, to balance the classes.


@dataclass(frozen=True)
class SegmenterConfig(OwnFit):
    """The network that segments structures, with one channel each."""

    architecture: str = "unet"  # A decoder of segmentation-models-pytorch.
    encoder: str = "convnext_small.fb_in22k_ft_in1k"
    size: int = 512
    loss: Literal["bce", "dice", "bce_dice"] = "bce_dice"

    def __post_init__(self):
        super().__post_init__()
        check(self.size >= 32 and self.size % 32 == 0, f"segmenter.size {self.size}: must be a multiple of 32")


@dataclass(frozen=True)
class DetectorConfig(BoxConfig):
    """The detector."""

    architecture: Literal["faster_rcnn", "retinanet", "fcos"] = "retinanet"
    augmentation: Literal["none", "flip", "noise", "podium"] = "podium"
    """Pipeline of `common.data.box_augment`; flip and podium mirror images."""


@dataclass(frozen=True)
class DecisionConfig:
    """Values to try for each class or structure, nested over the folds."""

    pixel: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)  # Segmentation: pixel thresholds.
    min_area: tuple[float, ...] = (0.0, 0.0005, 0.002)  # Segmentation: smallest region kept, as a share of the image.


@dataclass(frozen=True)
class Config:
    """A whole run on a user's images."""

    labels: str = ""  # CSV, COCO JSON or folder of masks; empty: labels.csv, labels.json or masks/ in --data.
    task: Literal["auto", "multilabel", "multiclass", "detection", "segmentation"] = "auto"
    """auto: determined by the labels."""
    classes: tuple[str, ...] = ()  # Classes to use, in this order; empty: all classes of the labels.
    on_missing: Literal["error", "skip"] = "error"  # skip: leave out labels whose image has no file.
    on_rare: Literal["error", "drop", "keep"] = "error"
    """Classes with fewer than two images: drop them, or keep them without a score."""
    boxes: Literal["pixels", "fraction"] = "pixels"
    """Unit of the boxes: pixels of the original image, or fractions of its width and height."""
    mask_size: Literal["same", "any"] = "same"  # any: stretch masks of another size to their image.
    lungs: Literal["none", "crop", "mask"] = "none"
    """Input of the networks: the image, the box around its lungs (classification only), or its lungs on black."""
    flip: bool = True  # Whether images may be mirrored; not if a class depends on the side, like the left lung.
    classifier: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(**CLASSES))
    segmenter: SegmenterConfig = field(default_factory=lambda: SegmenterConfig(**MASKS))
    detector: DetectorConfig = field(default_factory=lambda: DetectorConfig(**BOXES))
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    n_folds: int = 5  # Overridden by a column `fold` or `split` of the labels.
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)  # Folds to hold out, each with its own network; by default all.
    tta: tuple[Literal["flip"], ...] = ()
    store_size: int = 512  # Side of the stored images, in pixels; at least the size of the network.
    seed: int = 0

    def __post_init__(self):
        check_run(self, self.network.size if self.task != "auto" else 1)
        if self.lungs == "crop" and self.task in ("detection", "segmentation"):
            raise InputError("--lungs crop applies to classification only; mask applies to all tasks")
        check(self.flip or not self.tta, "--tta flip needs images that may be mirrored; --flip says that they may not")
        if self.task == "detection" and not self.flip and self.detector.augmentation in ("flip", "podium"):
            raise InputError("--flip False needs --detector.augmentation noise or none")

    @property
    def network(self):
        """The configuration of the task's network."""
        return {"segmentation": self.segmenter, "detection": self.detector}.get(self.task, self.classifier)


LAST = {"schedule": "warm_cosine", "clip_norm": 1.0, "averaging": ("last",)}
CLASSES = LAST | {"metric": "auroc", "epochs": 15, "lr": 1e-4, "weight_decay": 5e-2, "batch_size": 32}
MASKS = LAST | {"metric": "dice", "epochs": 30, "frozen_epochs": 1, "lr": 2e-4}
BOXES = {"metric": "map", "epochs": 15, "lr": 1e-4, "batch_size": 8, "clip_norm": 1.0, "averaging": ("last",)}
BOXES |= {"size": 512, "nms": 0.5}
EMA = {"averaging": ("ema",), "compile": "auto"}
PODIUM = Config(classifier=ClassifierConfig(**CLASSES | EMA), segmenter=SegmenterConfig(**MASKS | EMA), tta=("flip",))

# Minutes on a laptop: one pass over the images, then linear layers on their features.
LITE = "tf_efficientnet_lite0"
FEATURES = CLASSES | {"backbone": LITE, "size": 224, "only_head": True, "epochs": 60, "lr": 1e-3, "weight_decay": 1e-2}
OUTLINES = MASKS | {"encoder": LITE, "size": 128, "epochs": 15, "frozen_epochs": 0, "lr": 1e-3, "batch_size": 8}
CORNERS = BOXES | {"architecture": "fcos", "backbone": LITE, "size": 224, "channels": 64}
CORNERS |= {"augmentation": "flip", "lr": 1e-3}
SMALL = Config(
    classifier=ClassifierConfig(**FEATURES),
    segmenter=SegmenterConfig(**OUTLINES),
    detector=DetectorConfig(**CORNERS),
    store_size=224,
)

# Under a minute on two CPU cores, on the embedded sample.
DEMO = replace(
    SMALL,
    classifier=replace(SMALL.classifier, only_head=False, size=128, epochs=6, batch_size=8, lr=1e-3),
    segmenter=replace(SMALL.segmenter, epochs=8),
    detector=replace(SMALL.detector, size=128, epochs=8),
    n_folds=2,
    folds=(0, 1),
    store_size=128,
)

PRESETS = {"demo": DEMO, "small": SMALL, "podium": PODIUM}
ABOUT = {
    "small": "classification: frozen features and a linear layer, minutes on a laptop; small networks for other tasks",
    "podium": "a network per fold at full size",
}
TAKES = ("id_map", "on_unlabelled")
KAGGLE = None  # no competition
CARD = Card("image-classification", "the user's own images", "their owner's terms")
