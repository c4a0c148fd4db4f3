"""Networks trained on all folds' images, which claim no score, and runs of several seeds, blended."""

import pytest

from common.paths import read_csv, read_json, read_parquet
from tests.solutions.contract import SOLUTIONS

QUICK = ("siim_pneumothorax", "own")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SOLUTIONS]
pytestmark = pytest.mark.parametrize("solution", NAMES, indirect=True)


def test_a_refit_is_trained_on_every_image_and_submits_by_the_rule(run_copy, command, refused, sample, tmp_path):
    result = command("refit", "run", "--out", "whole")
    assert not result.errors and result.status == 0, result.errors
    whole, settings = tmp_path / "whole", read_json(tmp_path / "whole" / "manifest.json")["steps"]["refit"]["settings"]
    (fold,) = read_json(whole / "config.json")["folds"]
    assert fold == read_json(run_copy / "config.json")["n_folds"]
    trained = {path.parent.name: path for path in whole.glob(f"fold{fold}/*/history.csv")}
    assert trained and set(trained) <= set(settings)
    for stage, path in trained.items():
        assert len(read_csv(path, ["epoch"])) == settings[stage]["epochs"]
    assert read_json(whole / "tuned.json") == read_json(run_copy / "tuned.json")
    assert len(read_csv(whole / "submission.csv", [])) == len(read_csv(run_copy / "submission.csv", []))
    assert not list(whole.glob("oof*")) and not (whole / "report.html").exists()
    again = command("refit", "run", "--out", "whole")
    assert again.status == 0 and again.out.count("up to date") == 3
    assert command("export", "whole", "--out", "trained").status == 0
    assert "estimate" not in read_json(tmp_path / "trained" / "trained.json")["score"]
    inferred = command("infer", "trained", "--data", sample, "--out", "again.csv")
    assert inferred.status == 0, inferred.errors
    assert (tmp_path / "again.csv").read_bytes() == (whole / "submission.csv").read_bytes()
    for verb in ("train", "find_lr"):
        assert "trained on all images; use the run it comes from" in refused(verb, "--out", "whole")
    shown = command("report", "--out", "whole").out
    assert "no page: the page of" in shown and "no score: whole: trained on all images" in shown
    assert "has no score of its own" in refused("score", "--out", "whole")
    assert "is the run itself" in refused("refit", "run", "--out", "run")
    assert "use the run it comes from" in refused("refit", "whole", "--out", "more")
    for path in run_copy.glob("fold*/*/variants.json"):
        path.unlink()
    assert "no fold has the variants.json of" in refused("refit", "run", "--out", "more")


def test_all_folds_and_then_a_refit(command, refused, solution, sample, tmp_path):
    words = ["run", *solution.words, "--data", sample, "--out", "whole", "--folds", "all"]
    result = command(*words)
    assert not result.errors and result.status == 0, result.errors
    assert read_json(tmp_path / "whole/manifest.json")["steps"]["refit"]["run"] == str(tmp_path / "whole-folds")
    assert (tmp_path / "whole-folds/score.json").is_file() and (tmp_path / "whole/submission.csv").is_file()
    assert "--folds all belongs to `run`, without --seeds" in refused(*words, "--seeds", "3", "4")
    assert "--folds all belongs to `run`" in refused("train", *words[1:])


def test_a_run_per_seed_on_the_same_folds_blended(command, refused, solution, sample, tmp_path):
    words = ["run", *solution.words, "--data", sample, "--out", "all"]
    result = command(*words, "--seeds", "3", "4")
    assert not result.errors and result.status == 0, result.errors
    one, two = (tmp_path / f"all-seed{seed}" for seed in (3, 4))
    assert [read_json(each / "config.json")["seed"] for each in (one, two)] == [3, 4]
    assert read_parquet(one / "images.parquet")["fold"].equals(read_parquet(two / "images.parquet")["fold"])
    assert {path.name for path in (one, two)} == set(
        read_json(tmp_path / "all/manifest.json")["steps"]["blend"]["members"]
    )
    assert (tmp_path / "all" / "submission.csv").is_file()
    assert "two or more, each once" in refused(*words, "--seeds", "3")
    assert "--seeds does not apply to the verb train" in refused("train", "--out", "all-seed3", "--seeds", "3", "4")
