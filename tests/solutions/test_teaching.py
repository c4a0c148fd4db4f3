"""Pseudo-labels and soft targets from a finished run, in every solution."""

import pytest

from common.paths import read_json, read_parquet
from common.train.checkpoint import load_weights
from tests.solutions.contract import SOLUTIONS

QUICK = ("siim_pneumothorax", "rsna_pneumonia", "own")  # masks, boxes, probabilities
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SOLUTIONS]
pytestmark = pytest.mark.parametrize("solution", NAMES, indirect=True)
LOW = ["--pseudo-confidence", "0.005"]  # of networks that have hardly learned anything


@pytest.fixture
def words(solution, sample, run_copy):
    """The command that trains on the same images and folds as the teacher, `run`."""
    return ["run", *solution.words, "--data", sample, "--fold-table", run_copy / "folds.csv", "--seed", "1"]


def test_pseudo_labels(words, solution, command, refused, run_copy, sample, tmp_path):
    result = command(*words, "--out", "pupil", "--pseudo", "run", *LOW)
    assert not result.errors and result.status == 0, result.errors
    pupil, record = tmp_path / "pupil", read_json(tmp_path / "pupil" / "manifest.json")["steps"]["pseudo"]
    tests = read_parquet(pupil / "images.parquet").query("split == 'test'")["image_id"]
    for fold, n in record["images"].items():
        labels = read_parquet(pupil / f"fold{fold}" / "pseudo" / "labels.parquet")
        assert 0 < n == len(labels) and set(labels["image_id"]) <= set(tests)
    assert "samples with labels of" in result.out
    stage = next(path for path in sorted(pupil.glob("fold0/*/final.safetensors")) if "healthy" not in str(path))
    assert load_weights(stage)[1]["trained_on"]["taught"]["pseudo"]["run"] == "run"
    again = command("train", "--out", "pupil")  # without the option
    assert again.status == 0 and "pseudo: as before, from" in again.out
    assert command("export", "pupil", "--out", "trained").status == 0
    about = read_json(tmp_path / "trained" / "trained.json")["taught"]["pseudo"]
    assert about["confidence"] == 0.005 and str(tmp_path) not in str(about)
    assert "was trained without --pseudo run, or" in refused("train", "--out", "pupil", "--pseudo", "run")
    assert "is the run itself" in refused("train", "--out", "run", "--pseudo", "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"solution": "another"}')
    assert "not the configuration of a run of" in refused(*words, "--out", "early", "--teacher", "other")
    assert not (tmp_path / "early").exists()  # refused before anything is read
    assert "is the run itself" in refused("plan", *words[1:], "--out", "run", "--teacher", "run")
    assert "was trained without --pseudo pupil" in refused("train", "--out", "run", "--pseudo", "pupil")
    assert command("refit", "pupil", "--out", "whole").status == 0
    (fold,) = read_json(tmp_path / "whole" / "config.json")["folds"]
    assert f"fold{fold}/{stage.parent.name}: " in (tmp_path / "whole" / "log.txt").read_text()
    assert command("export", "whole", "--out", "exported").status == 0
    assert read_json(tmp_path / "exported" / "trained.json")["taught"]["pseudo"]["run"] == "run"
