"""Settings of the COVID-19 recipe with their sources.

"The paper" is Ahmed et al., Automated COVID-19 detection from chest X-ray images: a high resolution network (HRNet)
approach, medRxiv 2020.08.26.20182311.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from common.config import FitConfig, check_run
from common.errors import InputError, check
from common.kaggle import Source
from common.trained import Card

COVID = "COVID-19"
LABELS = {1: COVID, 0: f"no {COVID}", -1: "unknown"}
STAGE = "covid"  # name of the networks behind the submission
PREDICTIVE = "TN / (TN + FN)"  # the negative predictive value
PUBLISHED = {  # accuracy, sensitivity, specificity in %, means of ten folds (table 7); definition of the last
    "HRNet": (99.26, 98.53, 98.82, PREDICTIVE),
    "ResNet-152": (94.50, 95.12, 94.00, "specificity"),
    "DenseNet-121": (93.40, 90.24, 96.00, "specificity"),
    "EfficientNet-B4": (97.56, 95.12, 96.15, PREDICTIVE),
}
PRINTED = (
    "For HRNet and EfficientNet-B4 the paper prints TN / (TN + FN) as specificity, and mostly the mean of sensitivity "
    "and 100 % as accuracy. By its own equation HRNet's specificity is 100 %: all its errors are false negatives."
)
# What a network sees. border and background show no lung, so networks cannot learn the disease from them.
VIEWS = ("lungs", "image", "border", "background")
Check = Literal["image", "border", "background", "origin", "view"]  # of `audit`
ORIGINS = 16  # most collections that an adversary distinguishes; smaller ones are merged


@dataclass(frozen=True)
class NetworkConfig(FitConfig):
    """The classifier for COVID-19."""

    backbone: str = "hrnet_w32"  # Any timm network with a last feature map. Paper: HRNet, width not given.
    weights: str = "imagenet"  # imagenet, none, or a file with weights of the backbone.
    size: int = 512  # Side of the network's input, pixels. Paper: 512.
    hidden: tuple[int, ...] = (512,)  # Widths of the layers before the last one. Paper: "several", found by trial.
    dropout: float = 0.5  # Dropout rate before the last layer. Paper: not given.
    augmentation: Literal["none", "paper", "light"] = "paper"  # paper: its table 3. light: flips and small shifts.

    def __post_init__(self):
        super().__post_init__()
        check(self.size >= 32, f"size must be at least 32, not {self.size}")
        check(0 <= self.dropout < 1, f"dropout must lie in [0, 1), not {self.dropout}")
        check(min(self.hidden, default=1) > 0, f"hidden {self.hidden}: widths must be at least 1")

    @property
    def chooses(self):
        """Whether epochs or learning rates are chosen by validation, which then needs a separate fold."""
        return self.chooses_epoch or self.schedule == "plateau"


@dataclass(frozen=True)
class SelectionConfig:
    """The selection of images; selection.csv gives the reason for each image that is left out."""

    least_age: int = 18  # Minimum age. Paper: 18, for normals, since most COVID-19 images are of adults.
    unknown_age: Literal["keep", "leave"] = "keep"
    unknown_view: Literal["keep", "leave"] = "keep"  # Known lateral and CT images are always left out.
    devices: Literal["keep", "leave"] = "leave"  # Images with medical devices by the table. Paper: left out.
    normals: int = 1000  # Random images per collection of normals (NIH, CheXpert); 0: all. Paper: 1,000.
    duplicates: float = 0.12
    """Maximum share of hash bits that differ between duplicates; 0: equal hashes only. Of 2,345 real images, nine pairs
    differ by at most 0.09, all of them copies; the next pair, at 0.16, are two films of one patient."""

    def __post_init__(self):
        if self.least_age < 0 or self.normals < 0:
            raise InputError(f"least_age {self.least_age} and normals {self.normals} must not be negative")
        check(0 <= self.duplicates < 0.25, f"duplicates must lie in [0, 0.25), not {self.duplicates}")


@dataclass(frozen=True)
class LungsConfig:
    """How the lungs are cut out of an image. Paper: section 3.2."""

    weights: str = "shipped"  # shipped, or a file written by `cxr lung_segmentation export_segmenter`.
    dilations: int = 8
    closings: int = 2
    gate: float = 50_000 / 512**2  # Minimum share of the image that is lung. Paper: 50,000 of 512 × 512 pixels.

    def __post_init__(self):
        text = f"dilations {self.dilations} and closings {self.closings} must not be negative"
        check(min(self.dilations, self.closings) >= 0, text)
        check(0 <= self.gate <= 1, f"gate must lie in [0, 1], not {self.gate}")


@dataclass(frozen=True)
class AuditConfig:
    """Settings of `audit`, which measures how much of the score reflects the images' origin."""

    checks: tuple[Check, ...] = get_args(Check)
    """Networks to train: on the whole image, trained like the run; on its margin; on everything but the lungs; on the
    run's view, to distinguish collections among images of one label; on the whole image, to distinguish AP from PA and
    find images whose table gives the wrong view."""
    folds: tuple[int, ...] = (0, 1, 2)  # Folds to hold out from these networks, among those of the run.
    epochs: int = 10  # Epochs of all these networks except `image`, which has the run's.
    margin: float = 0.08  # border: width of the visible margin, as a share of the side.
    high: float = 0.6  # An AUROC counts as high if its confidence interval lies above this.

    def __post_init__(self):
        check(0 < self.margin < 0.5, f"margin must lie in (0, 0.5), not {self.margin}")
        check(self.epochs > 0, f"epochs must be at least 1, not {self.epochs}")
        check(0.5 <= self.high < 1, f"high must lie in [0.5, 1), not {self.high}")


@dataclass(frozen=True)
class Config:
    """A whole run of the COVID-19 solution."""

    view: Literal["lungs", "image"] = "lungs"  # The classifier's input: only the lungs, or the whole image.
    same_source: Literal["score", "train"] = "score"
    """Images without COVID-19 from the collections of the COVID-19 images. score: only predict them, as a check, since
    the paper's negatives come from elsewhere; train: use them as negatives like the others."""
    balance: bool = False  # Repeat images of small groups of collection and label, so that the origin helps less.
    adversary: float = 0.0
    """Strength, relative to the loss, of reversed gradients that remove the collection of images of one label from the
    features; 0: off. Use it with same_source train, so that each label has several kinds of collections."""
    exclude: str = ""
    """CSV of images to leave out, optionally with reasons in a second column. Paper, by hand: laterals, scans of PDFs,
    marked images with COVID-19, and normals with medical equipment."""
    negatives: int = 500  # Negatives to train on and score, drawn evenly from their collections; 0: all. Paper: 500.
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(**PAPER))
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    lungs: LungsConfig = field(default_factory=LungsConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    n_folds: int = 10  # By patient. If epochs are chosen, the next fold is used for validation (paper: 10 %).
    folds: tuple[int, ...] = tuple(range(10))  # Folds to hold out; the test set gets the mean over their networks.
    tta: tuple[Literal["flip"], ...] = ()
    store_size: int = 512  # Side of the stored images and masks, in pixels; at least network.size.
    seed: int = 0

    def __post_init__(self):
        check_run(self, self.network.size)
        if self.n_folds < 2 + self.network.chooses:
            raise InputError(f"n_folds {self.n_folds}: must be at least 3, as one is held out and one validates")
        check(self.adversary >= 0, f"adversary must be at least 0, not {self.adversary}")
        check(self.negatives >= 0, f"negatives must be at least 0, not {self.negatives}")


# Paper: SGD, and a rate that falls at epochs of which its 25 reach none.
PAPER = {"epochs": 25, "batch_size": 8, "lr": 1e-2, "optimizer": "sgd", "momentum": 0.8, "weight_decay": 1e-4}
PAPER |= {"schedule": "step", "milestones": (30, 60, 90), "factor": 0.1, "metric": "-loss", "averaging": ("best",)}

# Ours: negatives from the COVID-19 images' collections and balanced groups, so that the origin helps less; all images
# instead of a random subset; a schedule that decays within its epochs; averaged weights, flip TTA.
MODERN = {"hidden": (), "dropout": 0.2, "augmentation": "light", "optimizer": "adamw", "schedule": "warm_cosine"}
_PODIUM = {"backbone": "convnext_tiny.fb_in22k_ft_in1k", "lr": 1e-4, "weight_decay": 5e-2, "clip_norm": 1.0}
_PODIUM |= {"batch_size": 32, "epochs": 15, "averaging": ("ema", "best_k", "best"), "compile": "auto"}
PODIUM = Config(
    same_source="train",
    balance=True,
    negatives=0,
    network=NetworkConfig(**PAPER | MODERN | _PODIUM),
    selection=SelectionConfig(normals=2000),
    tta=("flip",),
)

# Minutes on two CPU cores. The last epoch is kept, so that no fold is needed for validation.
SMALL = {"backbone": "tf_efficientnet_lite0", "size": 128, "lr": 1e-3, "weight_decay": 1e-2, "batch_size": 16}
SMALL |= {"epochs": 6, "averaging": ("last",)}
DEMO = Config(
    negatives=0,
    network=NetworkConfig(**PAPER | MODERN | SMALL),
    audit=AuditConfig(folds=(0, 1), epochs=5),
    n_folds=3,
    folds=(0, 1, 2),
    store_size=128,
)

BASELINES = ("resnet152", "densenet121", "efficientnet_b4")
PRESETS = {"demo": DEMO, "paper": Config()}
PRESETS |= {name: Config(network=NetworkConfig(**PAPER | {"backbone": name})) for name in BASELINES}
PRESETS["podium"] = PODIUM
ABOUT = {"paper": "Ahmed et al. (2020): HRNet on the lungs only, ten folds"}
ABOUT |= {name: f"the paper's baseline {name}" for name in BASELINES}
MORE_VERBS = {"audit": "measure how much of the score is the images' origin"}  # in addition to those of every solution
IN_DEMO = ("audit",)  # verbs that `cxr demo` runs after `run`
TAKES = ("normals",)
KAGGLE = Source(
    "none",
    advice="Clone github.com/ieee8023/covid-chestxray-dataset, github.com/agchung/Figure1-COVID-chestxray-dataset and "
    "github.com/agchung/Actualmed-COVID-chestxray-dataset into one folder; the normals are ChestX-ray14's (--normals)",
)
CARD = Card("image-classification", "covid-chestxray-dataset and others", "each image's own licence")
