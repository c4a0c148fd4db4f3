"""Every hint's rule, and that each names options that exist."""

import dataclasses
import importlib
import re
from types import SimpleNamespace

import pandas as pd
import pytest

from common.cli import parse
from common.paths import write_json
from common.report import hints
from common.report.training import Training
from solutions.__main__ import NAMES
from tests.solutions.contract import SOLUTIONS

COLUMNS = ["fold", "images", "estimate", "low", "high"]
ALIKE = pd.DataFrame([(0, 9, 0.8, 0.7, 0.9), (1, 9, 0.75, 0.65, 0.85)], columns=COLUMNS)
APART = pd.DataFrame([(0, 9, 0.8, 0.75, 0.9), (1, 9, 0.6, 0.5, 0.7), (2, 1, *[float("nan")] * 3)], columns=COLUMNS)


def job_of(name, tmp_path, rule=None, **changes):
    """A demo run of a solution, not trained, with tuned.json."""
    config = importlib.import_module(f"solutions.{name}.config").PRESETS["demo"]
    config = dataclasses.replace(config, **changes)
    write_json(tmp_path / "tuned.json", {"rule": rule})
    recipe = SOLUTIONS[name].recipe
    return SimpleNamespace(config=config, recipe=recipe, run=SimpleNamespace(path=tmp_path.joinpath))


def trained(stage, epochs, best, folds=2):
    """Trainings whose metric is best in the epoch `best`."""
    history = pd.DataFrame({"epoch": range(1, epochs + 1)})
    return [Training(f"fold{k}", stage, history, (best, best), best) for k in range(folds)]


def check_options(name, texts):
    """Parse what stands between backticks as options of the solution's demo."""
    base = importlib.import_module(f"solutions.{name}.config").PRESETS["demo"]
    found = [words for text in texts for words in re.findall("`(--[^`]+)`", text)]
    assert len(found) >= len(texts) > 0
    for words in found:
        assert parse(base, words.split(), name)[1] != base


@pytest.mark.parametrize("name", NAMES)
def test_a_best_epoch_that_was_the_last_or_an_early_one(name, tmp_path):
    job = job_of(name, tmp_path)
    networks = {network.stage: network for network in job.recipe.networks(job)}
    for stage, network in networks.items():
        epochs = network.config.epochs
        late = hints.find_hints(job, trained(stage, epochs, epochs), ALIKE, [])[0]
        assert (
            late.startswith(f"The best epoch of {stage} was the last in 2 of 2 folds")
            and f".epochs {2 * epochs}`" in late
        )
        check_options(name, [late])
        early = hints.find_hints(job, trained(stage, epochs, 1), ALIKE, [])[:1]
        if epochs >= hints.FEW:
            assert early[0].startswith(f"{stage} was best by epoch 1 of {epochs} in every fold")
            check_options(name, early)
        middle = hints.find_hints(job, trained(stage, epochs, epochs // 2 + 1), ALIKE, [])
        assert not any(f"{stage} was" in text for text in middle)


def test_folds_that_differ_and_folds_that_are_missing(tmp_path):
    job = job_of("lung_segmentation", tmp_path)
    first, second = hints.find_hints(job, [], APART, [])
    assert "fold 0 0.8000 [0.7500,\u00a00.9000], fold 1 0.6000 [0.5000,\u00a00.7000]" in first
    assert second.startswith("2 of 4 folds are trained: `--folds 0 1 2 3`")
    check_options("lung_segmentation", [first, second])
    assert hints.find_hints(job, [], ALIKE, []) == [second]
    assert hints.find_hints(job, [], APART, ["own", "more"]) == ["own", "more", first]


def test_a_rule_at_the_end_of_its_grid(tmp_path):
    name, grid = "siim_pneumothorax", {"pixel": (0.3, 0.5, 0.7), "gate": (0.0, 0.5, 0.9), "min_area": (0, 1000, 3500)}
    rules = {"pixel": 0.3, "gate": 0.9, "min_area": 3500}
    job = job_of(name, tmp_path, rules)
    assert {key: getattr(job.config.decision, key)[0] for key in grid} == {key: grid[key][0] for key in grid}
    low, area = hints.find_hints(job, [], ALIKE, [])
    assert low == "The chosen pixel, 0.3, is the lowest tried: add `--decision.pixel 0.1 0.3 0.5 0.7`."
    assert area == "The chosen min area, 3500, is the highest tried: add `--decision.min-area 0 1000 3500 6000`."
    check_options(name, [low, area])
    assert hints.find_hints(job_of(name, tmp_path, {"pixel": 0.5, "gate": 0.0, "min_area": 0}), [], ALIKE, []) == []


def own(name, job, score, trainings=()):
    return importlib.import_module(f"solutions.{name}.report").hints(job, score, trainings)


def test_the_gate_of_siim(tmp_path):
    name = "siim_pneumothorax"
    job = job_of(name, tmp_path)
    texts = own(name, job, {"presence": {"auroc": 0.58}})
    assert texts == ["The gate's AUROC is 0.58: drop it with `--presence none --decision.gate 0`."]
    check_options(name, texts)
    for presence in ({"auroc": 0.9}, {"auroc": None}, None):
        assert own(name, job, {"presence": presence}) == []


def test_the_gate_of_rsna(tmp_path):
    name = "rsna_pneumonia"
    texts = own(name, job_of(name, tmp_path), {"gate_auroc": 0.5})
    assert texts == ["The gate's AUROC is 0.50: drop it with `--decision.gate 0`."]
    check_options(name, texts)
    assert own(name, job_of(name, tmp_path), {"gate_auroc": 0.9}) == []


def test_a_member_that_is_better_than_the_fusion(tmp_path):
    name, job = "vinbigdata", job_of("vinbigdata", tmp_path)
    pd.DataFrame({"member": ["flip", "noise"], "map": [0.25, 0.1]}).to_csv(tmp_path / "members.csv", index=False)
    texts = own(name, job, {"map_findings": 0.2})
    assert "mAP of 0.200, those of flip alone 0.250: compare `--members flip`" in texts[0]
    check_options(name, texts)
    assert own(name, job, {"map_findings": 0.25}) == own(name, job, {"map_findings": None}) == []


def test_the_origin_of_covid19(tmp_path):
    name, same = "covid19", {"auroc": {"estimate": 0.7}, "fall": {"estimate": 0.2, "low": 0.1}, "trained_on": False}
    texts = own(name, job_of(name, tmp_path, view="image"), {"same_source": same})
    assert [re.findall("`([^`]+)`", text) for text in texts] == [["--view lungs"], ["--same-source train"]]
    check_options(name, texts[1:])
    assert own(name, job_of(name, tmp_path), {"same_source": None}) == []
    assert own(name, job_of(name, tmp_path), {"same_source": same | {"fall": {"estimate": 0.1, "low": -0.1}}}) == []
