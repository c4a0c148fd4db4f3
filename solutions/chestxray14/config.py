"""The numbers of the ChestX-ray14 recipes beside their source.

"CXR-IRNet" is Fang et al., Weighing features of lung and heart regions for thoracic disease classification; "SDFN" is
Liu et al., SDFN: Segmentation-based deep fusion network for thoracic disease classification in chest X-ray images.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from common.config import Averaging, FitConfig, check_folds, with_smaller_batches
from common.errors import InputError, check
from common.kaggle import Source
from common.trained import Card

_LABELS = """Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax Consolidation Edema
    Emphysema Fibrosis Pleural_Thickening Hernia"""
LABELS = tuple(_LABELS.split())
NO_FINDING = "No Finding"  # of the label table; the all-zero vector, not a class
BOX_SIDE = 1024  # NIH's boxes are in pixels of its 1024 × 1024 images, whatever size the files at hand have
STAGES = {"whole": ("whole",), "lungs": ("lungs",), "both": ("whole", "lungs")}


@dataclass(frozen=True)
class NetworkConfig(FitConfig):
    """A network of one view, the whole image or the lungs."""

    backbone: str = "densenet121"  # Any timm network with a last feature map.
    weights: str = "imagenet"  # imagenet (backbone), none, or a file of the backbone.
    resize: int = 256  # Side of the whole image, of which the centre is cut out. CXR-IRNet: 256.
    size: int = 224  # Side of the network's images. Both papers: 224.
    attention: bool = False  # CXR-IRNet's multi-scale spatial attention in front of the backbone.
    weighting: bool = False  # CXR-IRNet's: the last feature map counts only where the lungs (and the heart) are.
    masks: Literal["binary", "soft"] = "soft"
    """weighting: binary (CXR-IRNet and every preset): cells of which at least half are lung or heart count wholly,
    others not at all; soft: each by its share."""
    frozen: bool = False
    """Linear probe: only the last layer is trained, on features of the pretrained network that are computed once."""
    frozen_norms: bool = False  # Batch norms keep the pretrained statistics, so that accumulate is exact.
    loss: Literal["bce", "asymmetric"] = "bce"  # asymmetric: Ridnik et al.'s, in which easy negatives count little.
    auc_loss: float = 0.0  # Weight of a further loss on the batch's pairs of a positive and a negative image.
    label_smoothing: float = 0.0  # Labels are moved by this share towards one half.
    mixup: float = 0.0  # Images are mixed in pairs, in proportions drawn from Beta(mixup, mixup); 0: they are not.
    box_loss: float = 0.0  # whole: weight of a loss that draws class maps into boxes; 0: labels alone.
    augmentation: Literal["none", "flip", "podium"] = "flip"
    dropout: float = 0.0
    drop_path: float = 0.0  # Share of residual branches left out at random, rising to this in the last; if timm has it.
    class_patience: int = 0
    """A class whose AUROC on validation has not risen for so many epochs leaves the loss; 0: none does."""
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


# SDFN, B.5: Adam 1e-4 with a decay of 1e-5 an update, up to 100 epochs, rate / 10 where the validation loss did not
# fall for 5 epochs, weights of the highest mean AUC on validation.
_SDFN = {"optimizer": "adam", "weight_decay": 0.0, "lr": 1e-4, "decay": 1e-5, "epochs": 100, "averaging": ("best",)}
_SDFN |= {"schedule": "plateau", "plateau_metric": "-loss", "patience": 5}
FUSION = FitConfig(metric="auroc", **_SDFN)  # one layer over the pooled features of both frozen branches


@dataclass(frozen=True)
class LungsConfig:
    """Where the lungs come from, for weighting and for the lungs' view."""

    weights: str = "shipped"
    """shipped, or a file that `lung_segmentation export_segmenter` wrote; if it has the heart, that weights too."""
    crop_size: int = 256  # Side of the stored crops, cut from the original pixels.
    mask_size: int = 64  # Side of the stored masks.

    def __post_init__(self):
        if min(self.crop_size, self.mask_size) < 8:
            raise InputError(f"crop_size {self.crop_size} and mask_size {self.mask_size} must be at least 8 px")


@dataclass(frozen=True)
class Config:
    """A whole run of the ChestX-ray14 solution."""

    views: Literal["whole", "lungs", "both"] = "whole"  # The image, the crop around the lungs, or a network of each.
    combine: Literal["fusion", "mean"] = "fusion"  # both: SDFN's layer over both's features, or the mean probability.
    whole: NetworkConfig = field(default_factory=NetworkConfig)
    lungs: NetworkConfig = field(default_factory=NetworkConfig)
    fusion: FitConfig = FUSION
    segmenter: LungsConfig = field(default_factory=LungsConfig)
    label_table: Literal["2020", "2017"] | None = None
    """2020: Data_Entry_2017_v2020.csv, CXR-IRNet's; 2017: Data_Entry_2017.csv, SDFN's; default: the newest there is."""
    split: Literal["official", "all"] = "official"
    """official: the benchmark's train/val and test lists. all: every labelled image is in a fold, none is a test image;
    such networks have seen the official test images and are refused for them."""
    seen_unlabelled: Literal["refuse", "allow"] = "refuse"
    """Weights that have seen NIH's images, perhaps those of the test list, without labels, such as RAD-DINO's."""
    boxes: str | None = None
    """CSV of boxes beside NIH's, which are all on the official test list: in NIH's form, or with the columns image_id,
    class, x_min, y_min, x_max, y_max, in pixels of the 1024 × 1024 image, such as ChestX-Det's."""
    n_folds: int = 10  # Of the training images, by patient and all labels. CXR-IRNet: 10 % validate; SDFN: not given.
    folds: tuple[int, ...] = (0,)  # Held-out folds, each with its own networks; the test set gets the mean over them.
    tta: tuple[Literal["flip", "scale"], ...] = ()  # Further views at test time: mirrored; at 7/8 and 9/8 of the size.
    store_size: int = 256  # Side of the stored images, in pixels; at least the largest resize of the networks.
    seed: int = 0

    def __post_init__(self):
        check_folds(self.folds, self.n_folds)
        check(self.seed >= 0, f"seed must be at least 0, not {self.seed}")
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
        """Names of the networks, in the order of training: whole, lungs or both."""
        return STAGES[self.views]

    @property
    def branches(self):
        """The NetworkConfig of each stage."""
        return tuple(getattr(self, stage) for stage in self.stages)

    @property
    def is_fused(self):
        """True where a trained layer fuses the two networks."""
        return self.views == "both" and self.combine == "fusion"

    @property
    def needs_lungs(self):
        """True where `prepare` has to find the lungs."""
        return self.views != "whole" or self.whole.weighting

    @property
    def weights_features(self):
        """True where a network weights its features by the lungs."""
        return self.views != "lungs" and self.whole.weighting


# CheXNet's network under the set-up of CXR-IRNet's comparison: Adam 1e-3, weight decay 1e-4, 50 epochs, batch 512,
# resize 256, centre crop 224, no augmentation named.
_IRNET = {"masks": "binary", "augmentation": "none", "lr": 1e-3, "optimizer": "adam", "weight_decay": 1e-4}
_IRNET |= {"epochs": 50, "batch_size": 512, "schedule": "constant"}
PRESETS = {
    "cxr_irnet": Config(whole=NetworkConfig(attention=True, weighting=True, **_IRNET)),
    "densenet121": Config(whole=NetworkConfig(**_IRNET)),
    "resnet50": Config(whole=NetworkConfig(backbone="resnet50", **_IRNET)),
    "senet": Config(whole=NetworkConfig(backbone="seresnet50", **_IRNET)),  # the paper's: a DenseNet with such blocks
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

# Two CPU cores, minutes: CXR-IRNet with a small network on small images, and with `--views both` SDFN's two branches.
# The last epoch is kept, so that choosing among epochs inflates no score.
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
PRESETS["kaggle"] = with_smaller_batches(PODIUM, whole=8, lungs=8)  # for cards of 15 GB
ABOUT = {
    "paper": "CXR-IRNet (Fang et al.)",
    "kaggle": "podium in batches for two T4 (see `plan --kaggle`)",
    "podium": "a current backbone at 512 px on the image and the lungs",
    "cxr_irnet": "the same as paper",
    "sdfn": "SDFN (Liu et al.): two DenseNets, image and lungs, fused",
    "densenet121": "CheXNet's network, CXR-IRNet's baseline",
    "resnet50": "CXR-IRNet's baseline",
    "senet": "CXR-IRNet's baseline with squeeze-and-excitation",
    "cxr_irnet_without_weighting": "CXR-IRNet's ablation: attention alone",
    "cxr_irnet_without_attention": "CXR-IRNet's ablation: feature weighting alone",
}
TOOLS = {"localise": "score heat maps against the boxes of findings"}  # besides those of every solution
TAKES = ("on_unlabelled",)
KAGGLE = Source("dataset", ("nih-chest-xrays/data",))
CARD = Card("image-classification", "NIH ChestX-ray14", "any use with attribution")
