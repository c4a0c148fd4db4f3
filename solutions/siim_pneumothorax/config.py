"""Settings of the SIIM recipes with their sources. "Paper" is Țimbuș et al., VISAPP 2021."""

from dataclasses import dataclass, field, replace
from typing import Literal

from common.config import FitConfig, check_run, with_smaller_batches
from common.errors import InputError
from common.kaggle import Source
from common.trained import Card

SLUG = "siim-acr-pneumothorax-segmentation"
MaskLoss = Literal["focal_dice", "combo", "tversky", "focal_tversky", "lovasz", "bce_dice", "boundary"]
SIZE = 1024  # pixels of the competition's images, and of the masks in every submission


@dataclass(frozen=True)
class ClassifierConfig(FitConfig):
    """The gate: a classifier of images with and without a pneumothorax."""

    backbone: str = "legacy_xception"
    """Any timm model. Paper: Xception, chosen over NASNet-Large and InceptionResNetV2."""
    weights: str = "imagenet"  # imagenet, none, or the path of a weights file.
    frozen_norms: bool = False  # Keep the batch norms of pretrained weights.
    size: int = 1024  # Paper: 1024 px.
    augmentation: Literal["paper", "podium", "light"] = "paper"
    """paper: CLAHE, optical distortion, zoom in and out by 5 to 10 %, each with p = 0.5."""
    enrichment: bool = False  # Paper's alternative: balance by augmented copies of positives, nothing else.
    positive_weight: float = 1.0
    """Weight of the positive images in the loss. Paper: 1; it leaves class weights to future work."""


@dataclass(frozen=True)
class SegmenterConfig(FitConfig):
    """The network that segments the pneumothorax."""

    architecture: str = "fpn"  # A decoder of segmentation-models-pytorch. Paper: FPN, better than U-Net and PSPNet.
    encoder: str = "inceptionresnetv2"  # Paper: InceptionResNetV2, better than the SE-ResNets and ResNeXts.
    weights: str = "imagenet"  # imagenet, none, or the path of a weights file.
    sizes: tuple[int, ...] = (512,)
    """Image sizes in training, one after the other; predictions use the last. Paper: 512."""
    augmentation: Literal["paper", "podium", "light"] = "paper"
    loss: MaskLoss = "focal_dice"
    """Paper: focal binary cross-entropy plus Dice. combo: BCE, Dice and focal weighted 3:1:4 (1st place). boundary:
    BCE, Dice and the distance to the outline."""
    positive_weight: float = 1.0
    """Weight of the pneumothorax pixels in the cross-entropy. Paper: 1; it leaves class weights to future work."""
    focal_weight: float = 1.0
    """focal_dice: weight of the focal term. Keras's segmentation_models has 0.25, its alpha for both classes."""
    presence_head: bool = False  # Add a second output: whether the image has any mask.
    negatives: float = 1.0
    """Healthy images drawn at random for each positive one; 0, or a positive_rate, takes all. Paper: "randomly chosen",
    no number given."""
    positives_only: bool = False  # Train only on images with a pneumothorax, the paper's first attempt.
    positive_rate: tuple[float, ...] = ()
    """Share of positives at the start and the end of training over all sizes, e.g. 0.8 0.4 (1st place); empty: any."""
    finer_epochs: int = 0  # Epochs at each size after the first (0: as many as at the first).
    finer_lr: float = 1e-4  # Learning rate at each size after the first.
    finer_batch_size: int = 4
    finer_loss: MaskLoss | None = None  # Loss at each size after the first, e.g. lovasz; None: the same.
    finer_frozen_norms: bool = False  # Freeze batch norms after the first size.
    crop: int = 0
    """Side of random training crops, which mostly contain a part of the mask; 0: whole images. 4th place: crops of 512
    from 1024 px, prediction on whole images."""

    def __post_init__(self):
        super().__post_init__()
        if not self.sizes or any(size % 32 for size in self.sizes):
            raise InputError(f"segmenter.sizes {self.sizes}: must be multiples of 32")
        if self.crop < 0 or self.crop % 32 or self.crop > min(self.sizes):
            raise InputError(f"segmenter.crop {self.crop}: must be a multiple of 32, at most the smallest size")
        if self.positive_weight != 1 and {self.loss, self.finer_loss} & {"tversky", "focal_tversky"}:
            raise InputError("segmenter.positive_weight does not apply to the loss tversky or focal_tversky")
        if self.focal_weight != 1 and "focal_dice" not in (self.loss, self.finer_loss):
            raise InputError(f"segmenter.focal_weight does not apply to the loss {self.loss}")
        if self.positives_only and self.positive_rate:
            remedy = "--segmenter.positive-rate without a value unsets it"
            raise InputError(f"segmenter.positives_only leaves no negatives for a positive_rate; {remedy}")
        if len(self.positive_rate) not in (0, 2):
            raise InputError("segmenter.positive_rate: give two shares, at the start and at the end of training")


@dataclass(frozen=True)
class DecisionConfig:
    """The rule from probabilities to a mask; all combinations of values are tried on out-of-fold predictions."""

    rule: Literal["gate", "triplet", "expected"] = "gate"
    """gate: classifier, pixel threshold, small regions removed (paper). triplet: the 1st place's rule. expected: per
    image, the mask (at several thresholds, or empty) with the highest expected Dice."""
    gate: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Minimum presence probabilities for an image to keep its mask. Paper: "a specific threshold", not given."""
    pixel: tuple[float, ...] = (0.5,)  # gate rule: pixel thresholds.
    min_area: tuple[int, ...] = (3500,)
    """gate rule: smallest region kept, pixels at 1024 × 1024. Paper, table 2: 3,500."""
    top: tuple[float, ...] = (0.55, 0.65, 0.75, 0.85)  # triplet rule: the high threshold. 1st place: about 0.75.
    top_pixels: tuple[int, ...] = (500, 1000, 1500, 2000, 3000)
    """triplet rule: minimum number of pixels above the high threshold to keep a mask. 1st place: about 2,000."""
    bottom: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5)
    """triplet rule: the low threshold, for the pixels of a mask that is kept. 1st place: about 0.3."""
    weight: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0, 2.0)
    """expected rule: weight of an empty mask; 1 would be right for perfectly calibrated probabilities."""
    connectivity: Literal[4, 8] = 8


@dataclass(frozen=True)
class Config:
    """A whole run of the SIIM solution."""

    classifier: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(**GATE))
    segmenter: SegmenterConfig = field(default_factory=lambda: SegmenterConfig(**OUTLINES))
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    presence: Literal["classifier", "head", "mean", "none"] = "classifier"
    """Source of the presence probability: a separate classifier, the segmenter's second output, their mean, or none."""
    more_segmenters: tuple[str, ...] = ()
    """Further segmenters as architecture-encoder, such as unet-resnet34; the maps of all are averaged."""
    n_folds: int = 5
    folds: tuple[int, ...] = (0,)  # Folds to train. Paper: one 80/20 split.
    tta: tuple[Literal["flip", "scale"], ...] = ()  # Test-time augmentation.
    store_size: int = 1024  # Side of the stored images, in pixels; at least the largest size of the networks.
    seed: int = 0

    def __post_init__(self):
        check_run(self, max(*self.segmenter.sizes, self.classifier.size if self.has_gate else 0))
        if self.presence in ("head", "mean") and not self.segmenter.presence_head:
            raise InputError(f"presence {self.presence!r} needs segmenter.presence_head")
        if self.decision.rule == "expected" and self.presence == "none":
            raise InputError("decision.rule 'expected' needs the probability of a mask: a presence other than 'none'")
        for name in self.more_segmenters:
            if "-" not in name or self.more_segmenters.count(name) > 1:
                raise InputError(f"more_segmenters {name!r}: each once, an architecture and an encoder: unet-resnet34")
        if self.decision.rule == "gate" and self.presence == "none" and self.decision.gate != (0.0,):
            raise InputError("presence 'none' leaves nothing to gate on: set decision.gate to 0")

    @property
    def has_gate(self):
        """Whether a classifier is trained."""
        return self.presence in ("classifier", "mean")


ADAM = {"frozen_epochs": 2, "optimizer": "adam", "weight_decay": 0.0}
# Paper, 4.1.1: 25 epochs, batch 4; Adam 2e-2 on the new layer for 2 epochs, then 2e-4 on all; rate × 0.2 after 3
# epochs without a better MCC; the epoch with the best MCC (the 17th) is kept.
GATE = {"epochs": 25, "frozen_lr": 2e-2, "lr": 2e-4, "batch_size": 4, "averaging": ("best",), **ADAM}
GATE |= {"schedule": "plateau", "patience": 3, "factor": 0.2, "metric": "mcc"}
# Paper, 4.1.2: 37 epochs, Adam 1e-3 with the first half of the layers frozen for 2 epochs, then 1e-4, cosine; weights
# averaged over the epochs where validation IoU peaks (13 to 16), or, as "typical SWA", at the ends of cycles. Batch
# size and number of cycles not given.
OUTLINES = {"epochs": 37, "lr": 1e-4, "batch_size": 8, "averaging": ("window", "classic", "best"), "keep": "window"}
OUTLINES |= {"keep_variants": True, "metric": "iou", **ADAM}
PAPER = Config(segmenter=SegmenterConfig(cycles=5, **OUTLINES))  # not the default: earlier versions had one cycle

# The 1st place's recipe (0.8679 private) with a current encoder: combo loss, sliding positive rate, 512 then 1024 px,
# best three checkpoints of a fold averaged, flip TTA, triplet rule tuned out of fold.
ADAMW = {"optimizer": "adamw", "weight_decay": 1e-2, "schedule": "warm_cosine"}
SLIDING = {"negatives": 0, "positive_rate": (0.8, 0.4), "keep": "highest"}
_WINNER = {"architecture": "unet", "encoder": "convnext_small.fb_in22k_ft_in1k", "presence_head": True}
_WINNER |= {"sizes": (512, 1024), "augmentation": "podium", "loss": "combo", "metric": "dice", "batch_size": 16}
_WINNER |= {"epochs": 30, "frozen_epochs": 1, "lr": 2e-4, "averaging": ("best_k", "ema", "window", "best")}
_WINNER |= {"finer_epochs": 15, "finer_lr": 5e-5, "finer_batch_size": 8, "clip_norm": 1.0, "keep_variants": False}
_WINNER |= {"compile": "auto", "half_weights": True}
PODIUM = Config(
    segmenter=SegmenterConfig(**_WINNER, **ADAMW, **SLIDING),
    decision=DecisionConfig(rule="triplet", gate=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5)),
    presence="head",
    folds=(0, 1, 2, 3, 4),
    tta=("flip",),
)

# For two GPUs of 15 GB, with maps of 768 px, which need 0.56 times the operations of podium's.
FINER = replace(PODIUM.segmenter, sizes=(512, 768), finer_batch_size=4)
ON_KAGGLE = with_smaller_batches(replace(PODIUM, segmenter=FINER, store_size=768), segmenter=2)

# Under two minutes on two CPU cores: the paper's cascade with small networks on small images.
SMALL = {**ADAMW, "augmentation": "light", "frozen_epochs": 0, "batch_size": 8}
LITE = "tf_efficientnet_lite0"
_GATE = {"backbone": LITE, "size": 128, "epochs": 6, "lr": 1e-3, "clip_norm": 1.0}
_GATE |= {"averaging": ("classic",), "classic_start": 0.5}  # batch norms are re-estimated for averages
_OUTLINES = {"encoder": LITE, "sizes": (160,), "epochs": 7, "lr": 1e-3, "window": 3}
DEMO = Config(
    classifier=ClassifierConfig(**GATE | SMALL | _GATE),
    segmenter=SegmenterConfig(**OUTLINES | SLIDING | SMALL | _OUTLINES),
    decision=DecisionConfig(gate=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9), pixel=(0.3, 0.5, 0.7), min_area=(0, 1000, 3500)),
    n_folds=2,
    folds=(0, 1),
    store_size=224,
)

# Paper: the gate in its best epoch (4.1.1); the segmenter on average over the epochs of its window (4.1.2)
PUBLISHED = {
    "classifier": {"epochs": "17", "mcc": 0.7702, "precision": 0.8010, "recall": 0.8674, "accuracy": 0.9360},
    "segmenter": {"epochs": "13–16", "iou": 0.6553, "f1": 0.6773, "f2": 0.6811},
}

PRESETS = {"demo": DEMO, "paper": PAPER, "podium": PODIUM, "kaggle": ON_KAGGLE}
ABOUT = {
    "paper": "Țimbuș et al. (2021): a classifier gates the masks of an FPN",
    "kaggle": "podium with batches for two T4, and maps of 768 px (see `plan --kaggle`)",
    "podium": "the 1st place's recipe with a current encoder, five folds",
}
MORE_VERBS = {"ablate": "train and score the comparisons of the paper"}  # in addition to those of every solution
TAKES = ("id_map", "on_unlabelled")


def check_submission(path, sample):
    """Return the Summary of a submission. Raises InputError unless it is valid for the images of `sample`."""
    from common.submit.validate import validate_masks  # imported late because it takes seconds

    return validate_masks(path, sample)


SAMPLES = ("stage_2_sample_submission.csv", "sample_submission.csv")
KAGGLE = Source("competition", (SLUG,), samples=SAMPLES, check=check_submission, score="dice")
CARD = Card("image-segmentation", "SIIM-ACR Pneumothorax on NIH ChestX-ray14", "the competition's rules")
