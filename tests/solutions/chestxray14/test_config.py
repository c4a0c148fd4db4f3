"""The papers' numbers where their presets have them, and what a configuration refuses."""

import dataclasses

import numpy as np
import pytest

from common.errors import InputError
from solutions.chestxray14.config import BOX_SIDE, LABELS, PODIUM, PRESETS, SDFN, Config, LungsConfig, NetworkConfig

IRNET = {
    "resize": 256,
    "size": 224,
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "epochs": 50,
    "batch_size": 512,
    "schedule": "constant",
    "weights": "imagenet",
}
BRANCH = {
    "backbone": "densenet121",
    "size": 224,
    "resize": 224,
    "augmentation": "flip",
    "optimizer": "adam",
    "lr": 1e-4,
    "decay": 1e-5,
    "batch_size": 16,
    "epochs": 100,
    "schedule": "plateau",
    "factor": 0.1,
    "plateau_metric": "-loss",
    "patience": 5,
    "metric": "auroc",
    "averaging": ("best",),
    "attention": False,
    "weighting": False,
}


def values(config, like):
    return {name: getattr(config, name) for name in like}


def test_labels_and_the_official_lists():
    assert len(set(LABELS)) == 14 and LABELS[0] == "Atelectasis" and LABELS[12:] == ("Pleural_Thickening", "Hernia")
    assert BOX_SIDE == 1024


@pytest.mark.parametrize(
    ("preset", "backbone", "additions"),
    [
        ("resnet50", "resnet50", (False, False)),
        ("densenet121", "densenet121", (False, False)),
        ("senet", "seresnet50", (False, False)),
        ("cxr_irnet", "densenet121", (True, True)),
        ("cxr_irnet_without_weighting", "densenet121", (True, False)),
        ("cxr_irnet_without_attention", "densenet121", (False, True)),
    ],
)
def test_cxr_irnet_its_ablations_and_the_baselines_under_its_set_up(preset, backbone, additions):
    preset = PRESETS[preset]
    assert values(preset.whole, IRNET) == IRNET
    assert (preset.whole.backbone, preset.whole.attention, preset.whole.weighting) == (backbone, *additions)
    assert (preset.views, preset.needs_lungs, preset.tta) == ("whole", additions[1], ())
    assert PRESETS["paper"] is PRESETS["cxr_irnet"] and preset.whole.masks == "binary" and preset.label_table is None


def test_sdfn():
    for branch in (SDFN.whole, SDFN.lungs):
        assert values(branch, BRANCH) == BRANCH
    fusion = {
        name: BRANCH[name]
        for name in ("optimizer", "lr", "decay", "batch_size", "epochs", "schedule", "plateau_metric", "metric")
    }
    assert values(SDFN.fusion, fusion) == fusion
    assert (SDFN.views, SDFN.combine, SDFN.stages) == ("both", "fusion", ("whole", "lungs"))
    assert SDFN.label_table == "2017"  # its paper is older than the other table


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("demo", "podium", "kaggle")])
def test_a_tenth_of_the_training_images_validates_on_the_official_split(name):
    preset = PRESETS[name]
    assert (preset.split, preset.n_folds, preset.folds) == ("official", 10, (0,))


def test_every_preset_can_be_built_from_what_it_stores():
    for name, preset in PRESETS.items():
        assert dataclasses.replace(preset) == preset, name
        assert preset.split == "official", name  # no preset trains on the benchmark's test images
    assert PODIUM.whole.size > 224 and PODIUM.stages == ("whole", "lungs")


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: NetworkConfig(size=300), r"size 300 must lie between 32 and resize \(256\)"),
        (lambda: NetworkConfig(size=16), "size 16 must lie between 32"),
        (lambda: NetworkConfig(dropout=1.0), "dropout must lie in"),
        (lambda: NetworkConfig(dropout=np.nan), "dropout must lie in"),
        (lambda: LungsConfig(mask_size=4), "mask_size 4 must be at least 8"),
        (lambda: Config(store_size=128), "store_size 128 is under the 256 px of whole.resize"),
        (lambda: Config(views="both", segmenter=LungsConfig(crop_size=64)), "crop_size 64 is under the 256 px"),
        (lambda: Config(views="lungs", lungs=NetworkConfig(weighting=True)), "lungs.weighting: the crop"),
        (lambda: NetworkConfig(frozen_norms=True, weights="none"), "keeps the statistics of pretrained weights"),
        (lambda: NetworkConfig(frozen=True, weights="none"), "frozen: the features are those of pretrained"),
        (lambda: NetworkConfig(frozen=True, attention=True), "without attention"),
        (lambda: NetworkConfig(box_loss=-1.0), "box_loss must be at least 0"),
        (lambda: NetworkConfig(label_smoothing=1.0), "label_smoothing must lie in"),
        (lambda: NetworkConfig(mixup=0.4, weighting=True), "mixed images have no masks"),
        (lambda: Config(views="both", lungs=NetworkConfig(box_loss=1.0)), "the loss belongs to whole"),
        (lambda: Config(n_folds=2, folds=(3,)), "must be distinct and between 0 and 1"),
        (lambda: Config(views="both", tta=("scale",)), "tta scale: SDFN's fusion"),
        (lambda: Config(seed=-1), "seed must be at least 0"),
        (lambda: Config(seed=1 << 62), r"seed must be at least 0 and below 2\^62"),
        (lambda: Config(whole=NetworkConfig(lr=float("inf"))), "whole.lr must be a finite number"),
        (lambda: Config(store_size=1 << 15), "store_size 32768: at most 16384 px"),
    ],
)
def test_what_a_configuration_refuses(build, said):
    with pytest.raises(InputError, match=said):
        build()
