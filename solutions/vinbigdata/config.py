"""Settings of the VinBigData recipes with their sources; the augmentations' are in common/data/box_augment.py.

"Paper" is Berger et al., Fine-grained localization, classification and segmentation of lungs with various diseases.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args

from common.config import Architecture, BoxConfig, GateConfig, check_run, with_smaller_batches
from common.errors import InputError, check
from common.kaggle import Source
from common.trained import Card

SLUG = "vinbigdata-chest-xray-abnormalities-detection"
_CLASSES = (
    "Aortic enlargement, Atelectasis, Calcification, Cardiomegaly, Consolidation, ILD, Infiltration, Lung Opacity, "
    "Nodule/Mass, Other lesion, Pleural effusion, Pleural thickening, Pneumothorax, Pulmonary fibrosis, No finding"
)
CLASSES = tuple(_CLASSES.split(", "))  # in the order of their numbers
NO_FINDING = 14
CLASS_NUMBERS = {name: number for number, name in enumerate(CLASSES)}
# ChestX-Det's names (Lian et al. 2021) that differ from the competition's, whose Other lesion includes fractures and
# emphysema (Nguyen et al. 2022, VinDr-CXR). Equal names: Atelectasis, Calcification, Cardiomegaly, Consolidation,
# Pleural thickening, Pneumothorax.
CHESTX_DET = {"Effusion": "Pleural effusion", "Fibrosis": "Pulmonary fibrosis"}
CHESTX_DET |= dict.fromkeys(("Nodule", "Diffuse Nodule", "Mass"), "Nodule/Mass")
CHESTX_DET |= dict.fromkeys(("Emphysema", "Fracture"), "Other lesion")
NOTHING = "14 1 0 0 1 1"  # prediction string of an image without findings
SAMPLE = ["image_id", "PredictionString"]  # columns of a submission
AUGMENTATIONS = ("none", "flip", "built_in", "built_in_no_rotation", "noise", "both", "both_no_rotation", "podium")
ARCHITECTURES = get_args(Architecture)
VARIANTS = {"": {}, "lungs": {"lung_channel": True}, "random": {"weights": "none"}, "coco": {"weights": "coco"}}


@dataclass(frozen=True)
class DetectorConfig(BoxConfig):
    """The settings of a detector."""

    default_mapper: bool = False
    """After the augmentation, flip half of the images and scale the shorter side to 640 to 800 of 800 px, as
    Detectron2 does by default."""
    lung_channel: bool = False
    """Replace the third of the network's equal grey channels by the lung mask. Paper: future work."""
    healthy: float = 0.0  # Training images without findings (of a specialist's classes) per image with some. Paper: 0.


@dataclass(frozen=True)
class HealthyConfig(GateConfig):
    """The two-class classifier (2CC) of healthy and abnormal images."""

    findings: bool = False  # Also predict each of the 14 findings, for decision.delta.


@dataclass(frozen=True)
class FusionConfig:
    """Fusion of the boxes of several raters, and of several networks."""

    raters: Literal["wbf", "nms", "none"] = "wbf"
    """Method of fusing the raters' boxes of a class. Paper: not given; the winners fused them."""
    raters_iou: float = 0.4
    weights: tuple[float, ...] = (5.0, 2.0, 1.0, 1.0, 1.0, 1.0)
    """Weights of the members, best first by validation score; 1 for all others. Paper: 5, 2, 1, 1, 1, 1."""
    iou: tuple[float, ...] = (0.4,)  # IoU thresholds to try for fusion. Paper: 0.4; 1st place: 0.33 to 0.4.
    skip: tuple[float, ...] = (0.0,)  # Minimum box scores to try. Winners: 0 to 0.001.
    nms: tuple[float, ...] = (1.0,)
    """IoU thresholds to try for NMS of each network's own boxes before fusion, which counts boxes, not networks. 1: no
    NMS. Paper: none."""
    limit: tuple[int, ...] = (0,)  # Maximum boxes per network and image to try; 0: all.
    conf_type: tuple[Literal["avg", "max", "box_and_model_avg", "absent_model_aware_avg"], ...] = ("avg",)
    """Ways of combining scores to try in weighted boxes fusion."""
    method: Literal["wbf", "nms", "soft_nms", "nmw", "none"] = "wbf"
    """Not applied to a single network's boxes: the paper found that this lowers the score."""
    try_weights: tuple[float, ...] = ()
    """Weights to try on out-of-fold predictions, one member after another, starting from `weights`."""


@dataclass(frozen=True)
class DecisionConfig:
    """Use of the 2CC's probability of a healthy image; all combinations are tried on out-of-fold predictions."""

    rule: tuple[Literal["replace", "append", "none"], ...] = ("replace",)
    """Rules to try. replace: the paper's. append: the winners' `14 p 0 0 1 1` on every image. none: boxes unchanged."""
    alpha: tuple[float, ...] = (0.997,)  # replace: above it, all boxes are replaced by `14 1 0 0 1 1`. Paper: 0.997.
    beta: tuple[float, ...] = (0.3,)  # replace: above it and up to alpha, the no-finding box is added. Paper: 0.3.
    gamma: tuple[float, ...] = (0.0,)
    """Powers to try: multiply scores of findings by (1 - the probability of a healthy image) to that power."""
    delta: tuple[float, ...] = (0.0,)
    """Powers to try: multiply scores by the image's probability of their class; needs healthy.findings."""


@dataclass(frozen=True)
class Config:
    """A whole run of the VinBigData solution."""

    detector: DetectorConfig = field(default_factory=lambda: DetectorConfig(**BOXES))
    members: tuple[str, ...] = ("none", "built_in", "built_in_no_rotation", "noise", "both", "both_no_rotation")
    """Detectors to fuse: each an augmentation, or `architecture-augmentation` such as fcos-flip for an architecture
    other than the detector's; `@768` sets the image size; `.lungs` adds the lung mask as a channel, `.random` starts
    from random weights, `.coco` from torchvision's COCO weights. A specialist, such as aortic=fcos-flip or
    nodule+ild=flip, trains and votes only on these classes. Paper: its six best, including figure 1's."""
    healthy: HealthyConfig = field(default_factory=lambda: HealthyConfig(**HEALTHY))
    healthy_more: tuple[str, ...] = ()
    """Backbones of further 2CCs, whose logits are averaged with the first one's. Paper: three, which scored lower."""
    boxes: tuple[str, ...] = ()
    """COCO files of additional training images, next to the file, for all folds' detectors. ChestX-Det's names work."""
    lungs: str = "shipped"
    """Weights of the lung segmenter, for a lung channel: shipped, or a file of `lung_segmentation`."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    n_folds: int = 20  # Paper: 750 of 15,000 images for validation, which is one fold of 20.
    healthy_folds: int = 5
    """Number of folds of the 2CC, a divisor of n_folds; all are trained. 0: the detectors' folds. Paper: 5."""
    rater_aware: bool = False  # Balance folds by rater too: three of the 17 read 94 % of the images with findings.
    folds: tuple[int, ...] = (0,)  # Folds to train and score.
    tta: tuple[Literal["flip"], ...] = ()
    tta_scales: tuple[float, ...] = ()  # TTA: further sizes, relative to the detector's, rounded to 32 px.
    store_size: int = 1024  # Side of the stored images, in pixels; at least the largest size of the networks.
    seed: int = 0

    def __post_init__(self):
        if not self.members or len(set(self.members)) < len(self.members):
            raise InputError(f"members {self.members}: give at least one augmentation, each once")
        for member in self.members:
            classes_of(member)
            architecture, augmentation, size, variant = member_parts(member, self.detector)
            known = architecture in ARCHITECTURES and augmentation in AUGMENTATIONS and variant in VARIANTS
            if not known or not str(size).isdigit():
                names = f"an augmentation ({', '.join(AUGMENTATIONS)}), or <{'|'.join(ARCHITECTURES)}>-<augmentation>"
                raise InputError(f"member {member!r}: must be {names}; @<size>, .lungs, .random or .coco may follow")
        check_run(self, max(self.healthy.size, *(self.detector_of(member).size for member in self.members)))
        check(self.healthy.size >= 32, f"healthy.size must be at least 32 px, not {self.healthy.size}")
        fixed = [each for each in self.members if self.detector_of(each).architecture == "efficientdet"]
        check(not (self.tta_scales and fixed), f"tta_scales {self.tta_scales}: EfficientDet takes one size only")
        if any(self.decision.delta) and not self.healthy.findings:
            raise InputError("decision.delta: needs a 2CC that predicts findings, --healthy.findings True")
        if len(set(self.healthy_backbones)) < len(self.healthy_backbones):
            raise InputError(f"healthy_more {self.healthy_more}: each backbone once, none {self.healthy.backbone}")
        if self.healthy_folds and (self.healthy_folds < 2 or self.n_folds % self.healthy_folds):
            wanted = f"0, or at least 2 and a divisor of n_folds {self.n_folds}"
            raise InputError(f"healthy_folds must be {wanted}, not {self.healthy_folds}")

    def detector_of(self, member):
        """Return the DetectorConfig of a member."""
        architecture, _, size, variant = member_parts(member, self.detector)
        changes = {"architecture": architecture, "size": int(size)} | VARIANTS[variant]
        if architecture.endswith("_v2"):  # torchvision has them with one backbone
            changes |= {"backbone": "resnet50", "channels": 256}
        try:
            return dataclasses.replace(self.detector, **changes)
        except InputError as error:
            raise InputError(f"member {member!r}: {error}") from None

    @property
    def needs_lungs(self):
        """Whether `prepare` has to segment the lungs."""
        return any(self.detector_of(member).lung_channel for member in self.members)

    @property
    def healthy_backbones(self):
        """Backbones of the 2CCs."""
        return (self.healthy.backbone, *self.healthy_more)

    @property
    def healthy_trained(self):
        """Folds of the 2CC to train; network k mod `healthy_modulus` was not trained on the images of fold k."""
        return tuple(range(self.healthy_folds)) if self.healthy_folds else self.folds

    @property
    def healthy_modulus(self):
        """Number of folds of the 2CC."""
        return self.healthy_folds or self.n_folds


def member_parts(member, detector):
    """Return (architecture, augmentation, size, variant) from a member's name; defaults are the detector's."""
    member, dot, variant = member.rpartition("=")[2].partition(".")
    member, at, size = member.partition("@")
    first, _, rest = member.partition("-")
    names = (first, rest) if rest else (detector.architecture, member)
    return (*names, size or at or detector.size, variant or dot)


def classes_of(member):
    """Return a specialist's class numbers, given by the beginnings of class names; () for other members."""
    names, found = member.rpartition("=")[0], []
    for name in names.split("+") if "=" in member else ():
        known = [k for k, each in enumerate(CLASSES[:NO_FINDING]) if each.lower().replace(" ", "-").startswith(name)]
        if len(known) != 1 or not name:
            wanted = "one class by its beginning, such as aortic or pleural-effusion"
            raise InputError(f"member {member!r}: {name!r} must name {wanted}, not {len(known)}")
        found += known
    return tuple(found)


# Paper, 3.1: Faster R-CNN on ResNet-101-FPN with COCO weights, Detectron2's faster_rcnn_R_101_FPN_3x; image size not
# given (library default: shorter side 800); NMS 0.8; always 100 boxes per image, so a lowest score of 0. Batch 4,
# cosine schedule from 1e-3, 10,000 iterations, which are about 9.6 epochs of the 4,174 abnormal training images (95 %
# of 4,394); validation every 1,000, here every epoch. SGD: library default.
BOXES = {"epochs": 10, "lr": 1e-3, "batch_size": 4, "optimizer": "sgd", "weight_decay": 1e-4, "averaging": ("best",)}
BOXES |= {"schedule": "warm_cosine", "clip_norm": 10.0, "metric": "map"}
# Paper, 3.2: ResNet-18, 256 px, five stratified folds, 15 epochs, accuracy about 0.93. Rate, batch, optimiser: ours.
HEALTHY = {"size": 256, "epochs": 15, "lr": 1e-4, "batch_size": 32, "optimizer": "adam", "weight_decay": 1e-4}
HEALTHY |= {"averaging": ("best",)}
# Detectron2's defaults, which the paper used: its mapper, 1,000 of the 10,000 iterations for warm-up, no clipping, and
# epochs compared by COCO's AP (3.1).
LIBRARY = {"default_mapper": True, "min_score": 0.0, "warmup": 0.1, "clip_norm": 0.0, "metric": "map_coco"}
PAPER = Config(DetectorConfig(**BOXES | LIBRARY))

# The winners' techniques with a current backbone: three families of detectors, fused raters, flip TTA, No finding on
# every image. Ours, tried out of fold: suppression before the fusion, and scores scaled by the image's findings, which
# helped on a few real images (README).
LARGE = {"backbone": "convnext_small.fb_in22k_ft_in1k", "optimizer": "adamw", "half_weights": True}
STRONG = {"epochs": 20, "lr": 1e-4, "batch_size": 8, "weight_decay": 5e-2, "averaging": ("ema", "best_k", "best")}
PODIUM = Config(
    detector=DetectorConfig(**BOXES | LARGE | STRONG),
    members=("podium", "retinanet-podium", "fcos-podium"),
    healthy=HealthyConfig(**HEALTHY | LARGE | {"size": 512, "epochs": 10, "findings": True, "compile": "auto"}),
    fusion=FusionConfig(
        weights=(1.0,),
        iou=(0.33, 0.4, 0.5),
        skip=(0.0, 0.001),
        nms=(0.5, 1.0),
        conf_type=("avg", "box_and_model_avg"),
        try_weights=(1.0, 2.0, 3.0),
    ),
    decision=DecisionConfig(("append", "replace"), alpha=(0.95, 0.997), beta=(0.0, 0.1, 0.3), delta=(0.0, 0.25, 0.5)),
    n_folds=5,
    healthy_folds=0,
    folds=(0, 1, 2, 3, 4),
    tta=("flip",),
)

# A minute or two on two CPU cores: the paper's cascade with small networks on small images; FCOS needs the fewest
# steps. The last epoch is kept, so that no choice of epochs inflates the scores.
SMALL = {"backbone": "tf_efficientnet_lite0", "optimizer": "adamw", "weight_decay": 1e-2, "averaging": ("last",)}
SMALL |= {"schedule": "warm_cosine", "batch_size": 4}
_DETECTOR = {"architecture": "fcos", "size": 160, "channels": 64, "epochs": 12, "lr": 1e-3, "per_image": 50}
DEMO = Config(
    detector=DetectorConfig(**BOXES | SMALL | _DETECTOR),
    members=("flip", "noise"),
    healthy=HealthyConfig(**HEALTHY | SMALL | {"frozen_norms": True, "size": 128, "epochs": 8, "lr": 3e-4}),
    fusion=FusionConfig(weights=(1.0,)),
    decision=DecisionConfig(rule=("replace", "append"), alpha=(0.9, 0.95, 0.997), beta=(0.0, 0.1, 0.3, 0.5)),
    n_folds=2,
    healthy_folds=0,
    folds=(0, 1),
    store_size=256,
)

PRESETS = {"demo": DEMO, "paper": PAPER, "podium": PODIUM}
PRESETS["kaggle"] = with_smaller_batches(PODIUM, detector=2, healthy=2)  # for GPUs with 15 GB
ABOUT = {
    "paper": "Berger et al.: six Faster R-CNNs fused, and a classifier of healthy images",
    "podium": "three families of detectors with a current backbone, five folds",
}
MORE_VERBS = {"ablate": "train and score the comparisons of the paper"}  # in addition to those of every solution
TOOLS = {"ensemble": "fuse anyone's submissions"}  # in addition, too; it needs no run
TAKES = ("sizes", "id_map", "on_unlabelled")


def check_submission(path, sample):
    """Return the Summary of a submission. Raises InputError unless it is valid for the images of `sample`."""
    from common.submit.validate import validate_boxes  # imported late because it takes seconds

    return validate_boxes(path, sample)


KAGGLE = Source("competition", (SLUG,), check=check_submission, score="map")
CARD = Card("object-detection", "VinBigData Chest X-ray (Kaggle)", "the competition's rules")
