"""Settings of the lung segmentation recipes with their sources; parameters of the augmentations are in augment.py.

Papers: Berger et al., Fine-grained localization, classification and segmentation of lungs with various diseases,
section 3.3; Fang et al., Weighing features of lung and heart regions (CXR-IRNet); Ahmed et al., Automated COVID-19
detection from chest X-ray images, an HRNet approach; Liu et al., SDFN, segmentation-based deep fusion network.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from common.config import FitConfig, check_run
from common.errors import InputError, check
from common.kaggle import Source
from common.trained import Card

STRUCTURES = {"lungs": ("lungs",), "left_right": ("left", "right"), "lungs_heart": ("left", "right", "heart")}

# Ahmed et al., section 3.2, at 512 × 512 pixels: clean-up of a predicted mask before the lungs are cut out.
REFERENCE_SIDE = 512
DILATIONS = 8
CLOSINGS = 2
GATE_AREA = 50_000 / REFERENCE_SIDE**2  # share of the image; images with less lung are rejected
# Liu et al., section 2.2: the lung region generator. The paper gives margins in pixels; its segmenter works at 256.
REGION_SIDE = 256
MARGIN = 15 / REGION_SIDE  # share of the image's side: left, right and top
MARGIN_BOTTOM = 20 / REGION_SIDE
ONE_LUNG_RATIO = 1 / 3  # a second region smaller than this share of the first is not a lung


@dataclass(frozen=True)
class NetworkConfig(FitConfig):
    """The network that segments the lungs."""

    architecture: str = "unet"
    """dynamicunet: fastai's; plain, plain_no_norm (Ahmed et al.), imlab (Liu et al.): without an encoder; or one of
    segmentation-models-pytorch."""
    encoder: str = "resnet34"  # Any timm network; empty for plain and imlab. Berger et al.: ResNet-34.
    decoder: tuple[int, ...] = ()
    """Channels of the decoder's stages, of plain's levels, or of imlab's down and up path; empty: the defaults."""
    weights: str = "imagenet"  # imagenet, none, or the path of a weights file.
    size: int = 320  # Side of the network's input. Berger et al.: a tenth of the original, 300 to 489 pixels.
    augmentation: Literal["none", "simple", "complex", "unet", "affine", "strong"] = "simple"
    """simple, complex: Berger et al.; unet: Ahmed et al.; affine: Liu et al.; strong: for images of other hospitals."""
    loss: Literal["bce", "dice", "squared_dice", "bce_dice"] = "bce"
    lr: float | Literal["auto"] = 1e-4
    """auto: the range test's suggestion, which replaces frozen_lr too; after frozen epochs, a tenth of it."""

    def __post_init__(self):
        super().__post_init__()
        check(self.size >= 32 and self.size % 32 == 0, f"network.size {self.size}: must be a multiple of 32")
        check(min(self.decoder, default=1) > 0, f"network.decoder {self.decoder}: give channels for every stage")


@dataclass(frozen=True)
class DecisionConfig:
    """The rule from probabilities to a mask; all combinations of values are tried on out-of-fold predictions."""

    pixel: tuple[float, ...] = (0.5,)  # Pixel thresholds.
    regions: tuple[int, ...] = (0,)  # Number of largest regions to keep, with holes filled; 0: keep the mask as it is.

    def __post_init__(self):
        usable = self.pixel and all(0 < pixel <= 1 for pixel in self.pixel)
        check(usable, f"decision.pixel {self.pixel}: give probabilities above 0, up to 1")
        check(self.regions and min(self.regions) >= 0, f"decision.regions {self.regions}: give numbers from 0")


@dataclass(frozen=True)
class Config:
    """A whole run of the lung segmentation solution."""

    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(**BERGER))
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    structures: Literal["lungs", "left_right", "lungs_heart"] = "lungs"
    """Structures to segment. Images without masks of the lungs are left out; a missing heart is ignored in the loss."""
    datasets: tuple[Literal["Montgomery", "Shenzhen", "JSRT", "folder"], ...] = ()  # Empty: all in the folder.
    n_folds: int = 10
    folds: tuple[int, ...] = (0,)  # Folds to hold out and score. The first of 10: Berger et al.'s split of 80/10/10.
    validation: float = 0.1  # Share of all labelled images for choosing epochs, taken from the other folds.
    tta: tuple[Literal["flip", "scale"], ...] = ()  # Test-time augmentation.
    finder: bool = False  # Run a learning-rate range test before training, for the report.
    store_size: int = 512  # Side of the stored images and masks, in pixels; at least network.size.
    seed: int = 0

    def __post_init__(self):
        check_run(self, self.network.size)
        if self.network.frozen_epochs and not self.network.encoder:
            raise InputError(f"network.frozen_epochs: {self.network.architecture} has no encoder to freeze; give 0")
        usable = 0 < self.validation < 1 - 1 / self.n_folds
        check(usable, f"validation {self.validation}: must be above 0 and leave images to train on")


# Berger et al., section 3.3: batch 4; weight decay 0.01 (decoupled, as in fastai's Adam); 5 epochs of the last layers
# at 1e-3, then 5 epochs of all layers at a lower rate (not given). Loss not given: fastai's default.
BERGER = {"epochs": 10, "frozen_epochs": 5, "frozen_lr": 1e-3, "batch_size": 4, "optimizer": "adamw"}
BERGER |= {"weight_decay": 1e-2, "schedule": "constant", "metric": "dice", "averaging": ("last",)}
# Both phases of fastai's fine-tuning are learning-rate cycles.
_FASTAI = {"architecture": "dynamicunet", "schedule": "one_cycle"}
PAPER = Config(network=NetworkConfig(**BERGER | _FASTAI), finder=True)

# Liu et al., section 2.2: 256 px, affine augmentation, Adam 1e-3, batch 8, up to 100 epochs, cross-entropy, five folds;
# the network of imlab-uiip/lung-segmentation-2d.
IMLAB = {"architecture": "imlab", "decoder": (32, 64, 64, 128, 256, 256, 256, 128, 64)}
PLAIN = {"architecture": "plain", "encoder": "", "decoder": (32, 64, 128, 256, 512), "weights": "none"}
PLAIN |= {"frozen_epochs": 0, "batch_size": 8, "optimizer": "adam", "weight_decay": 0.0}
PLAIN |= {"metric": "-loss", "averaging": ("best",)}
SDFN = Config(
    network=NetworkConfig(size=256, augmentation="affine", lr=1e-3, **BERGER | PLAIN | IMLAB | {"epochs": 100}),
    datasets=("JSRT",),
    n_folds=5,
    folds=(0, 1, 2, 3, 4),
)

# Fang et al.: U-Net on JSRT for left lung, right lung and heart, Dice loss, the epoch of the lowest loss, 256 px. The
# paper's centre crop of 224 is left out, since it cuts off the edges of lungs. Rates and number of epochs not given.
LUNGS_HEART = replace(SDFN, network=replace(SDFN.network, loss="dice", **PLAIN), structures="lungs_heart", folds=(0,))

# Ahmed et al.: the plain U-Net from scratch, Dice with squared terms, ten folds of 25 epochs at 0.005; the epoch
# that is best on a tenth of the training images is kept (algorithm 1). Optimiser not given.
_UNET = {"size": 512, "augmentation": "unet", "loss": "squared_dice", "epochs": 25, "lr": 5e-3}
UNET = Config(network=NetworkConfig(**BERGER | PLAIN | _UNET), folds=tuple(range(10)))

# All collections, five folds of an hour on one GPU: a modern pretrained encoder, full 512 px, averaged weights, flip
# and scale TTA.
STRONG = {"augmentation": "strong", "loss": "bce_dice", "batch_size": 16, "schedule": "warm_cosine", "clip_norm": 1.0}
STRONG |= {"averaging": ("ema", "window", "best_k", "best")}
LARGE = {"encoder": "convnext_small.fb_in22k_ft_in1k", "size": 512, "epochs": 50, "frozen_epochs": 1, "lr": 2e-4}
LARGE |= {"compile": "auto"}
PODIUM = Config(
    network=NetworkConfig(**BERGER | LARGE | STRONG),
    decision=DecisionConfig(pixel=(0.3, 0.4, 0.5, 0.6, 0.7), regions=(0, 2)),
    n_folds=5,
    folds=(0, 1, 2, 3, 4),
    tta=("flip", "scale"),
)

# The recipe of the shipped weights: a small network for images of other hospitals. Two hours on two CPU cores.
SMALL = {"encoder": "tf_efficientnet_lite0", "decoder": (128, 64, 32, 16, 8), "frozen_epochs": 0, "lr": 1e-3}
SHIPPED = Config(
    network=NetworkConfig(size=384, **BERGER | SMALL | STRONG | {"epochs": 28, "batch_size": 8}),
    decision=DecisionConfig(pixel=(0.4, 0.45, 0.5, 0.55, 0.6), regions=(0, 2)),
    structures="lungs_heart",
)

# Under a minute on two CPU cores: the same network on small images.
_TINY = {"size": 128, "augmentation": "affine", "epochs": 6, "averaging": ("window", "best"), "window": 2}
_FEW = {"structures": "lungs", "n_folds": 4, "folds": (0, 1), "validation": 0.15, "store_size": 128}
DEMO = replace(SHIPPED, network=replace(SHIPPED.network, **_TINY), **_FEW)

PRESETS = {"demo": DEMO, "paper": PAPER, "podium": PODIUM, "unet": UNET, "lungs_heart": LUNGS_HEART}
PRESETS |= {"sdfn": SDFN, "shipped": SHIPPED}
ABOUT = {
    "paper": "Berger et al.: fastai's U-Net with a ResNet-34",
    "unet": "Ahmed et al.: a plain U-Net from scratch, ten folds",
    "lungs_heart": "Fang et al.: left lung, right lung and heart on JSRT",
    "sdfn": "Liu et al.: the U-Net of imlab-uiip on JSRT, five folds",
    "shipped": "the recipe of the weights in this repository",
}
MORE_VERBS = {  # in addition to those of every solution
    "ablate": "train and score the comparisons of the paper",
    "cross": "train on each collection and score on the others",
    "export_segmenter": "write the network as one file for `masks` and the other solutions",
}
TOOLS = {  # likewise; they need no run
    "masks": "segment the lungs in any radiographs",
    "crops": "crop the lungs from any radiographs",
}
TAKES = ("id_map",)
KAGGLE = Source("dataset", ("kmader/pulmonary-chest-xray-abnormalities", "yoctoman/shcxr-lung-mask"))
CARD = Card("image-segmentation", "Montgomery, Shenzhen, JSRT", "each collection's terms")
