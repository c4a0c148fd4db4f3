"""Settings of the RSNA pneumonia recipes with their sources.

"Paper" is Gabruseva, Poplavskiy and Kalinin, Deep Learning for Automatic Pneumonia Detection (CVPR workshops 2020),
with its code: the 2nd place. "1st place" is Pan, Cadrin-Chênevert and Cheng, AJR 2019;213:568-574.
"""

from dataclasses import dataclass, field
from typing import Literal

from common.config import BoxConfig, GateConfig, check_run, with_smaller_batches
from common.errors import InputError
from common.kaggle import Source
from common.trained import Card

SLUG = "rsna-pneumonia-detection-challenge"
LABELS, CLASS_INFO = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
SAMPLE_FILE, SAMPLE = "stage_2_sample_submission.csv", ["patientId", "PredictionString"]
CLASSES = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
CLASS_NUMBERS = {"Lung Opacity": 0}  # classes of boxes
SIDE = 1024  # side of every image of the challenge in pixels, the boxes' unit


@dataclass(frozen=True)
class DetectorConfig(BoxConfig):
    """The detector of opacities."""

    augmentation: Literal["none", "flip", "noise", "podium"] = "podium"
    """Pipeline of `common.data.box_augment`. Paper: shift, scale, rotation, flip, tone, blur and noise."""


@dataclass(frozen=True)
class DecisionConfig:
    """Values to try on out-of-fold predictions, in every combination; see postprocess.BoxRule. The grids are ours."""

    iou: tuple[float, ...] = (0.1, 0.3)
    gate: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    threshold: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7)
    shrink: tuple[float, ...] = (1.0, 0.95, 0.9, 0.875, 0.85)
    """1st place: 0.875, since the boxes of the test set, agreed on by several readers, are smaller."""


@dataclass(frozen=True)
class Config:
    """A whole run of the RSNA solution."""

    detector: DetectorConfig = field(default_factory=lambda: DetectorConfig(**BOXES | CODE))
    gate: GateConfig = field(default_factory=GateConfig)
    members: tuple[Literal["faster_rcnn", "retinanet", "fcos"], ...] = ("retinanet",)
    """Architectures of the detectors to fuse, with equal weights. Paper: RetinaNet."""
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    boxes: tuple[str, ...] = ()
    """COCO files of additional training images, next to the file, with boxes of Lung Opacity, for every fold."""
    n_folds: int = 4  # Paper's code: 4; 1st place: 10.
    folds: tuple[int, ...] = (0, 1, 2, 3)  # Folds to train and score.
    tta: tuple[Literal["flip"], ...] = ()
    tta_scales: tuple[float, ...] = ()  # TTA: further sizes, relative to the detector's, rounded to 32 px.
    store_size: int = 512  # Side of the stored images, in pixels; at least the largest size of the networks.
    seed: int = 0

    def __post_init__(self):
        check_run(self, max(self.detector.size, self.gate.size))
        if self.gate.size < 32 or not self.members or len(set(self.members)) < len(self.members):
            raise InputError(f"members {self.members}, each once; size of the gate {self.gate.size}, at least 32 px")


# Paper: SE-ResNeXt-101 at 512 pixels (256 was worse). Its code: Adam at 1e-5, rate × 0.2 after 4 epochs without
# improvement, about 12 epochs, gradients clipped to 0.05, batch norms frozen. 1st place: DenseNet-169 among the
# classifiers. Batch size and the gate's training: ours.
BOXES = {"size": 512, "nms": 0.5, "metric": "map"}
CODE = {"epochs": 12, "lr": 1e-5, "optimizer": "adam", "weight_decay": 0.0, "schedule": "plateau", "patience": 4}
CODE |= {"backbone": "seresnext101_32x4d", "factor": 0.2, "clip_norm": 0.05, "batch_size": 4, "averaging": ("best",)}
PAPER = Config(gate=GateConfig(backbone="densenet169", epochs=10, lr=1e-4))
# The winners' recipe with a current backbone: three families of detectors, flip TTA. Rates and epochs: ours.
LARGE = {"backbone": "convnext_small.fb_in22k_ft_in1k", "lr": 1e-4, "weight_decay": 5e-2, "schedule": "warm_cosine"}
LARGE |= {"epochs": 12, "batch_size": 8, "averaging": ("ema", "best_k", "best"), "half_weights": True}
PODIUM = Config(
    DetectorConfig(clip_norm=10.0, **BOXES | LARGE | {"size": 768}),
    GateConfig(compile="auto", **LARGE),
    members=("retinanet", "faster_rcnn", "fcos"),
    **{"n_folds": 10, "folds": tuple(range(10)), "tta": ("flip",), "store_size": 768},
)
# A minute on two CPU cores: FCOS needs the fewest steps. The last epoch is kept, so that no choice inflates the scores.
SMALL = {"backbone": "tf_efficientnet_lite0", "size": 128, "batch_size": 4, "schedule": "warm_cosine"}
SMALL |= {"averaging": ("last",)}
DEMO = Config(
    DetectorConfig(channels=64, epochs=12, lr=1e-3, clip_norm=10.0, augmentation="flip", **BOXES | SMALL),
    GateConfig(frozen_norms=True, epochs=8, lr=3e-4, **SMALL),
    **{"members": ("fcos",), "n_folds": 2, "folds": (0, 1), "store_size": 256},
)
PRESETS = {"demo": DEMO, "paper": PAPER, "podium": PODIUM}
PRESETS["kaggle"] = with_smaller_batches(PODIUM, detector=2, gate=2)  # for GPUs with 15 GB
ABOUT = {"paper": "Gabruseva et al.: RetinaNet on SE-ResNeXt-101", "podium": "three families of detectors, ten folds"}
TAKES = ("id_map", "on_unlabelled")


def check_submission(path, sample):
    """Return the Summary of a submission. Raises InputError unless it is valid for the images of `sample`."""
    from common.submit.sides import validate_sides  # imported late because it takes seconds

    return validate_sides(path, sample, SAMPLE, SIDE)


KAGGLE = Source("competition", (SLUG,), samples=(SAMPLE_FILE,), check=check_submission, score="map")
CARD = Card("object-detection", "RSNA Pneumonia Detection (Kaggle)", "the challenge's terms of use")
