"""The paper's numbers where its presets have them, and what a configuration refuses."""

import dataclasses

import pytest

from common.errors import InputError
from solutions.covid19.config import DEMO, PODIUM, PRESETS, AuditConfig, Config, LungsConfig, NetworkConfig
from solutions.covid19.config import SelectionConfig as Selection

BACKBONES = {"paper": "hrnet_w32"} | {name: name for name in ("resnet152", "densenet121", "efficientnet_b4")}
NETWORK = {"size": 512, "optimizer": "sgd", "lr": 0.01, "momentum": 0.8, "weight_decay": 1e-4, "schedule": "step"}
NETWORK |= {"milestones": (30, 60, 90), "factor": 0.1, "batch_size": 8, "epochs": 25, "augmentation": "paper"}


@pytest.mark.parametrize("name", BACKBONES)
def test_the_paper_and_its_baselines_under_its_set_up(name):
    preset = PRESETS[name]
    assert {field: getattr(preset.network, field) for field in NETWORK} == NETWORK
    assert (preset.network.backbone, preset.network.hidden != ()) == (BACKBONES[name], True)
    assert (preset.n_folds, preset.folds, preset.view, preset.same_source) == (10, tuple(range(10)), "lungs", "score")
    assert (preset.negatives, preset.selection.normals, preset.selection.least_age) == (500, 1000, 18)
    assert (preset.lungs.dilations, preset.lungs.closings, preset.store_size) == (8, 2, 512)
    assert preset.lungs.gate * 512 * 512 == pytest.approx(50_000, abs=1e-6)
    assert preset.network.chooses  # a tenth of the images validates, which here is the next fold


def test_every_preset_can_be_built_from_what_it_stores():
    for name, preset in PRESETS.items():
        assert dataclasses.replace(preset) == preset, name
        assert set(preset.audit.folds) <= set(preset.folds), name
    assert PODIUM.same_source == "train" and PODIUM.negatives == 0 and not DEMO.network.chooses


@pytest.mark.parametrize(
    ("options", "chooses"),
    [
        ({"averaging": ("last",)}, False),
        ({"averaging": ("ema",)}, False),
        ({"averaging": ("classic",)}, False),
        ({"averaging": ("best",)}, True),
        ({"averaging": ("window",)}, True),
        ({"averaging": ("last", "ema")}, True),
        ({"averaging": ("last", "best"), "keep": "last"}, False),
        ({"averaging": ("last", "best"), "keep": "best"}, True),
        ({"averaging": ("last",), "schedule": "plateau"}, True),
    ],
)
def test_what_is_chosen_by_validation_figures(options, chooses):
    network = NetworkConfig(**options)
    assert network.chooses is chooses
    if chooses:
        with pytest.raises(InputError, match="n_folds 2: must be at least 3"):
            Config(network=network, n_folds=2, folds=(0,))
    else:
        Config(network=network, n_folds=2, folds=(0,))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: NetworkConfig(size=16), "size must be at least 32, not 16"),
        (lambda: NetworkConfig(dropout=1.0), r"dropout must lie in \[0, 1\), not 1.0"),
        (lambda: NetworkConfig(hidden=(64, 0)), r"hidden \(64, 0\): widths must be at least 1"),
        (lambda: Selection(least_age=-1), "least_age -1 and normals 1000 must not be negative"),
        (lambda: Selection(duplicates=0.25), r"duplicates must lie in \[0, 0.25\), not 0.25"),
        (lambda: LungsConfig(dilations=-1), "dilations -1 and closings 2 must not be negative"),
        (lambda: LungsConfig(gate=1.5), r"gate must lie in \[0, 1\], not 1.5"),
        (lambda: AuditConfig(margin=0.5), r"margin must lie in \(0, 0.5\), not 0.5"),
        (lambda: AuditConfig(epochs=0), "epochs must be at least 1, not 0"),
        (lambda: AuditConfig(high=1.0), r"high must lie in \[0.5, 1\), not 1.0"),
        (lambda: Config(store_size=256), "store_size 256 is under the 512 px of a network"),
        (lambda: Config(folds=(0, 10)), "must be distinct and between 0 and 9"),
        (lambda: Config(seed=-1), r"seed must be at least 0 and below 2\^62, not -1"),
    ],
)
def test_what_a_configuration_refuses(build, said):
    with pytest.raises(InputError, match=said):
        build()
