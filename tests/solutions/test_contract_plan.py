"""Every solution's presets are planned on its sample: each of their networks takes real steps at its full size."""

import importlib
import json

import pytest

from common.cost import Cost
from tests.solutions.contract import ON_SAMPLE, SOLUTIONS

COST = Cost(train=0.5, predict=0.1, fixed=1.0, each=0.5, weights=1000, whole="")

PRESETS = [
    (name, preset)
    for name in SOLUTIONS
    for preset in importlib.import_module(f"solutions.{name}.config").PRESETS
    if preset != "kaggle"  # podium in smaller batches
]


@pytest.mark.parametrize("solution", ["siim_pneumothorax"], indirect=True)
def test_plan_names_every_stage_and_leaves_no_run(solution, command, sample, tmp_path):
    result = command("plan", *solution.words, "--data", sample)
    assert result.status == 0, result
    assert "classifier" in result.out and "segmenter-64" in result.out and "hours: prepare" in result.out
    assert not (tmp_path / "runs").exists()


SLOW = pytest.param("covid19", marks=pytest.mark.long)


@pytest.mark.parametrize("solution", [SLOW if name == "covid19" else name for name in SOLUTIONS], indirect=True)
def test_counts_are_those_of_all_images_whatever_is_decoded(solution, command, sample, monkeypatch):
    found = []
    for few in (8, 1000):
        monkeypatch.setattr("common.plan.FEW", few)
        monkeypatch.setattr("common.plan.measure", lambda *args: COST)
        result = command("plan", *solution.words, "--data", sample, "--json")
        assert result.status == 0, result
        plan = json.loads(result.out[result.out.index("{") :])
        found.append([(stage["stage"], stage["steps"], stage["held_out"]) for stage in plan["stages"]])
    assert found[0] == found[1]


@pytest.mark.long
@pytest.mark.parametrize(("solution", "preset"), PRESETS, indirect=["solution"])
def test_networks_of_every_preset_take_steps_at_their_full_size(solution, preset, command, sample):
    result = command("plan", preset, "--data", sample, "--card", "H100", *ON_SAMPLE[solution.name])
    assert "hours: prepare" in result.out and result.status in (0, 2), result
    assert result.status == 0 or "GiB" in result.errors[-1], result
