"""Settings of the ChestX-ray14 recipes with their sources.

"CXR-IRNet" is Fang et al., Weighing features of lung and heart regions for thoracic disease classification; "SDFN" is
Liu et al., SDFN: Segmentation-based deep fusion network for thoracic disease classification in chest X-ray images.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from common.config import Averaging, FitConfig, check_run, with_smaller_batches
from common.errors import InputError, check
from common.kaggle import Source
from common.trained import Card

_LABELS = """Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation Edema
    Emphysema Fibrosis Pleural_Thickening Hernia"""
LABELS = tuple(_LABELS.split())
NO_FINDING = "No Finding"  # a name in the label table for the all-zero vector, not a class
BOX_SIDE = 1024  # NIH's boxes are in pixels of the 1024 × 1024 originals, whatever the size of the files
STAGES = {"whole": ("whole",), "lungs": ("lungs",), "both": ("whole", "lungs")}


@dataclass(frozen=True)
class NetworkConfig(FitConfig):
    """The network of one view: the whole image, or the lungs."""

    backbone: str = "densenet121"  # Any timm network with a last feature map.
    weights: str = "imagenet"  # imagenet (backbone), none, or a weights file of the backbone.
    resize: int = 256  # Side of the image before the centre crop, pixels. CXR-IRNet: 256.
    size: int = 224  # Side of the network's input, pixels. Both papers: 224.
    attention: bool = False  # CXR-IRNet's multi-scale spatial attention in front of the backbone.
    weighting: bool = False  # CXR-IRNet's: mask the last feature map by the lungs (and the heart).
    masks: Literal["binary", "soft"] = "soft"
    """weighting: binary (CXR-IRNet and every preset): cells that are at least half lung or heart have weight 1, others
    0; soft: the weight is the share of lung and heart."""
    frozen: bool = False
    """Linear probe: train only the last layer, on features that the pretrained network computes once."""
    frozen_norms: bool = False  # Keep the pretrained statistics of batch norms, so that accumulate is exact.
    loss: Literal["bce", "asymmetric"] = "bce"  # asymmetric: Ridnik et al.'s loss, easy negatives count little.
    auc_loss: float = 0.0  # Weight of an additional pairwise AUC-margin loss over the batch.
    label_smoothing: float = 0.0  # Move labels by this share towards one half.
    mixup: float = 0.0  # Mix pairs of images in proportions drawn from Beta(mixup, mixup); 0: off.
    box_loss: float = 0.0  # whole: weight of a loss that pulls class maps into true boxes; 0: off.
    augmentation: Literal["none", "flip", "podium"] = "flip"
    dropout: float = 0.0
    drop_path: float = 0.0  # Stochastic depth: probability of dropping a residual branch, rising to this in the last.
    class_patience: int = 0
    """Drop a class from the loss when its validation AUROC has not risen for this many epochs; 0: never."""
    metric: str = "auroc"
    averaging: tuple[Averaging, ...] = ("best",)

    def __post_init__(self):
        super().__post_init__()
        check(32 <= self.size <= self.resize, f"size {self.size} must lie between 32 and resize ({self.resize})")
        if self.frozen_norms and self.weights == "none":
            raise InputError("frozen_norms: keeps the statistics of pretrained weights, so weights cannot be none")
        if self.frozen and (self.weights == "none" or self.attention or self.box_loss or self.augmentation == "podium"):
            what = "weights (not none) without attention and box_loss; its augmentation is none or flip"
            raise InputError(f"frozen: the features are those of pretrained {what}")
        for name in ("box_loss", "auc_loss", "mixup", "class_patience"):
            check(getattr(self, name) >= 0, f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("dropout", "drop_path", "label_smoothing"):
            check(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")
        check(not (self.mixup and (self.weighting or self.box_loss)), "mixup: mixed images have no masks and no boxes")


# SDFN, B.5: Adam 1e-4 with a decay of 1e-5 per update, up to 100 epochs, rate / 10 when the validation loss did not
# fall for 5 epochs, weights of the epoch with the highest mean AUC on validation.
_SDFN = {"optimizer": "adam", "weight_decay": 0.0, "lr": 1e-4, "decay": 1e-5, "epochs": 100, "averaging": ("best",)}
_SDFN |= {"schedule": "plateau", "plateau_metric": "-loss", "patience": 5}
FUSION = FitConfig(metric="auroc", **_SDFN)  # one layer over the pooled features of both frozen branches


@dataclass(frozen=True)
class LungsConfig:
    """How the lungs are found, for weighting and for the lungs' view."""

    weights: str = "shipped"
    """shipped, or a file written by `lung_segmentation export_segmenter`; the heart is used too if it segments one."""
    crop_size: int = 256  # Side of the stored crops of the lungs, cut from the originals, pixels.
    mask_size: int = 64  # Side of the stored masks, pixels.

    def __post_init__(self):
        if min(self.crop_size, self.mask_size) < 8:
            raise InputError(f"crop_size {self.crop_size} and mask_size {self.mask_size} must be at least 8 px")


@dataclass(frozen=True)
class Config:
    """A whole run of the ChestX-ray14 solution."""

    views: Literal["whole", "lungs", "both"] = "whole"  # Whole image, crop around the lungs, or one network for each.
    combine: Literal["fusion", "mean"] = "fusion"  # both: SDFN's layer over both's features, or the mean probability.
    whole: NetworkConfig = field(default_factory=NetworkConfig)
    lungs: NetworkConfig = field(default_factory=NetworkConfig)
    fusion: FitConfig = FUSION
    segmenter: LungsConfig = field(default_factory=LungsConfig)
    label_table: Literal["2020", "2017"] | None = None
    """2020: Data_Entry_2017_v2020.csv (CXR-IRNet); 2017: Data_Entry_2017.csv (SDFN); default: the newest found."""
    split: Literal["official", "all"] = "official"
    """official: the benchmark's train/val and test lists. all: every labelled image is in a fold, none is a test image;
    such networks have seen the official test images and are refused for them."""
    seen_unlabelled: Literal["refuse", "allow"] = "refuse"
    """allow: accept weights pretrained on NIH's unlabelled images, perhaps of the test list, such as RAD-DINO's."""
    boxes: str | None = None
    """CSV of additional boxes, since NIH's are all on the official test list: in NIH's format, or with the columns
    image_id, class, x_min, y_min, x_max, y_max in pixels of the 1024 × 1024 image, such as ChestX-Det's."""
    n_folds: int = 10  # Folds of the training images, by patient and labels. CXR-IRNet: 10 % for validation.
    folds: tuple[int, ...] = (0,)  # Folds to hold out, each with its own networks; the test set gets their mean.
    tta: tuple[Literal["flip", "scale"], ...] = ()  # Test-time augmentation: mirrored; at 7/8 and 9/8 of the size.
    store_size: int = 256  # Side of the stored images, in pixels; at least the largest resize of the networks.
    seed: int = 0

    def __post_init__(self):
        check_run(self, 1)  # the sizes of the networks follow
        check(not ("scale" in self.tta and self.is_fused), "tta scale: SDFN's fusion has features of one size")
        store, crop, whole, lungs = self.store_size, self.segmenter.crop_size, self.whole, self.lungs
        if self.views != "lungs":
            check(store >= whole.resize, f"store_size {store} is under the {whole.resize} px of whole.resize")
        if self.views != "whole":
            check(crop >= lungs.resize, f"crop_size {crop} is under the {lungs.resize} px of lungs.resize")
            check(not lungs.box_loss, "lungs.box_loss: boxes lie on whole images; the loss belongs to whole")
            check(not lungs.weighting, "lungs.weighting: the crop has no mask; weighting belongs to whole")

    @property
    def stages(self):
        """Names of the networks in the order of training: whole, lungs or both."""
        return STAGES[self.views]

    @property
    def branches(self):
        """The NetworkConfig of each stage."""
        return tuple(getattr(self, stage) for stage in self.stages)

    @property
    def is_fused(self):
        """Whether a trained layer fuses the two networks."""
        return self.views == "both" and self.combine == "fusion"

    @property
    def needs_lungs(self):
        """Whether `prepare` has to segment the lungs."""
        return self.views != "whole" or self.whole.weighting

    @property
    def weights_features(self):
        """Whether a network weights its features by the lungs."""
        return self.views != "lungs" and self.whole.weighting


# CheXNet's network with the settings of CXR-IRNet's comparison: Adam 1e-3, weight decay 1e-4, 50 epochs, batch 512,
# resize 256, centre crop 224, no augmentation named.
_IRNET = {"masks": "binary", "augmentation": "none", "lr": 1e-3, "optimizer": "adam", "weight_decay": 1e-4}
_IRNET |= {"epochs": 50, "batch_size": 512, "schedule": "constant"}
PRESETS = {
    "cxr_irnet": Config(whole=NetworkConfig(attention=True, weighting=True, **_IRNET)),
    "densenet121": Config(whole=NetworkConfig(**_IRNET)),
    "resnet50": Config(whole=NetworkConfig(backbone="resnet50", **_IRNET)),
    "senet": Config(whole=NetworkConfig(backbone="seresnet50", **_IRNET)),  # the paper's is a DenseNet with such blocks
    "cxr_irnet_without_weighting": Config(whole=NetworkConfig(attention=True, **_IRNET)),  # its feature extractor, "FE"
    "cxr_irnet_without_attention": Config(whole=NetworkConfig(weighting=True, **_IRNET)),
}

# SDFN, B.3: 224 px, horizontal flips, batch 16.
_BRANCH = NetworkConfig(masks="binary", resize=224, size=224, augmentation="flip", batch_size=16, **_SDFN)
_CROPS = LungsConfig(crop_size=224)
SDFN = Config("both", whole=_BRANCH, lungs=_BRANCH, segmenter=_CROPS, label_table="2017", store_size=224)

# A current backbone at twice the papers' size, both views, averaged weights, five folds; at test time flips and sizes.
# On disk the whole data set takes 29.4 GB at 512 px, and its crops 22.5 GB.
_PODIUM = {"masks": "binary", "backbone": "convnext_small.fb_in22k_ft_in1k", "augmentation": "podium", "dropout": 0.2}
_PODIUM |= {"lr": 1e-4, "optimizer": "adamw", "weight_decay": 5e-2, "schedule": "warm_cosine", "clip_norm": 1.0}
_PODIUM |= {"epochs": 6, "batch_size": 128, "averaging": ("ema", "best_k", "best"), "compile": "auto"}
PODIUM = Config(
    views="both",
    combine="mean",
    whole=NetworkConfig(resize=512, size=512, **_PODIUM),
    lungs=NetworkConfig(resize=448, size=448, **_PODIUM),
    segmenter=LungsConfig(crop_size=448),
    store_size=512,
    n_folds=5,
    folds=(0, 1, 2, 3, 4),
    tta=("flip", "scale"),
)

# Minutes on two CPU cores: CXR-IRNet with a small network on small images, and with `--views both` SDFN's two branches.
# The last epoch is kept, so that no choice of epochs inflates the scores.
_SMALL = {"masks": "binary", "backbone": "tf_efficientnet_lite0", "resize": 160, "size": 160, "augmentation": "flip"}
_SMALL |= {"lr": 1e-3, "optimizer": "adamw", "weight_decay": 1e-2, "schedule": "warm_cosine"}
_SMALL |= {"epochs": 8, "batch_size": 16, "averaging": ("last",)}
DEMO = Config(
    whole=NetworkConfig(attention=True, weighting=True, **_SMALL),
    lungs=NetworkConfig(**_SMALL),
    fusion=replace(FUSION, epochs=40, lr=1e-3, decay=0.0, schedule="cosine", averaging=("last",)),
    segmenter=LungsConfig(crop_size=160),
    n_folds=2,
    folds=(0, 1),
    store_size=160,
)

PRESETS = {"demo": DEMO, "paper": PRESETS["cxr_irnet"], "podium": PODIUM, "sdfn": SDFN} | PRESETS
PRESETS["kaggle"] = with_smaller_batches(PODIUM, whole=8, lungs=8)  # for GPUs with 15 GB
ABOUT = {
    "paper": "CXR-IRNet (Fang et al.)",
    "podium": "a current backbone at 512 px on the image and the lungs",
    "cxr_irnet": "the same as paper",
    "sdfn": "SDFN (Liu et al.): two DenseNets, image and lungs, fused",
    "densenet121": "CheXNet's network, CXR-IRNet's baseline",
    "resnet50": "CXR-IRNet's baseline",
    "senet": "CXR-IRNet's baseline with squeeze-and-excitation",
    "cxr_irnet_without_weighting": "CXR-IRNet's ablation: attention only",
    "cxr_irnet_without_attention": "CXR-IRNet's ablation: feature weighting only",
}
TOOLS = {"localise": "score heat maps against the boxes of findings"}  # in addition to those of every solution
TAKES = ("on_unlabelled",)
KAGGLE = Source("dataset", ("nih-chest-xrays/data",))
CARD = Card("image-classification", "NIH ChestX-ray14", "any use with attribution")
