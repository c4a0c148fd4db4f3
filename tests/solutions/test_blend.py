"""A blend of two runs of every solution: valid, repeatable, refused where it would leak or train."""

import json
import shutil

import numpy as np
import pytest

from common.paths import read_array, read_csv, read_json, read_parquet
from tests.solutions.contract import SOLUTIONS

QUICK = ("siim_pneumothorax", "rsna_pneumonia", "own")  # masks, boxes, probabilities
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SOLUTIONS]
pytestmark = pytest.mark.parametrize("solution", NAMES, indirect=True)


@pytest.fixture
def blended(run_copy, command, solution, tmp_path):
    """The folder of a blend, `both`, of the finished run and of one with other views."""
    shutil.copytree(run_copy, tmp_path / "other")
    result = command("predict", "--out", "other", *solution.views.split())
    assert result.status == 0, result.errors
    result = command("blend", "run", "other", "--out", "both")
    assert (result.status, result.errors) == (0, [])
    return tmp_path / "both"


def test_a_blend_is_a_run(blended, solution, command, refused, run_copy, sample, tmp_path):
    members = read_csv(blended / "blend.csv", ["weight", "score", "without", "cost"])
    assert {name.split(":")[0] for name in members["member"]} == {"run", "other"}
    assert members["weight"].sum() == pytest.approx(1)
    assert read_json(blended / "manifest.json")["steps"]["blend"]["members"]["other"] == str(tmp_path / "other")
    for part in ("oof", "test"):
        one, mean = (read_parquet(folder / f"{part}.parquet") for folder in (run_copy, blended))
        if "x_min" not in one:
            assert mean["image_id"].equals(one["image_id"]) and mean["fold"].equals(one["fold"])
        if solution.recipe.maps:
            shapes = [read_array(folder / f"{part}_probs.b2nd").shape for folder in (run_copy, blended)]
            assert shapes[0] == shapes[1]
    assert "valid submission" in (blended / "log.txt").read_text() and (blended / "submission.csv").is_file()
    again = command("blend", "run", "other", "--out", "both")
    assert again.status == 0 and again.out.count("up to date") == 3
    for verb in ("prepare", "train", "find_lr"):
        words = [verb, "--out", "both", *(["--data", sample] if verb == "prepare" else [])]
        assert "a blend has no networks of its own" in refused(*words)
    exported = command("export", "both", "--out", "trained")
    assert exported.status == 0, exported.errors
    inferred = command("infer", "trained", "--data", sample, "--out", "again.csv")
    assert inferred.status == 0, inferred.errors
    assert (tmp_path / "again.csv").read_bytes() == (blended / "submission.csv").read_bytes()
    used = tmp_path / read_json(tmp_path / "trained" / "trained.json")["mixing"]["runs"][0] / "manifest.json"
    kept, changed = used.read_bytes(), read_json(used)
    changed["steps"]["predict"]["key"] = "of other predictions"
    used.write_text(json.dumps(changed))
    assert f"{used.parent.name}: its predictions have changed since" in refused("export", "both", "--out", "more")
    used.write_bytes(kept)
    assert command("tune", "--out", "both").status == 0
    page = command("report", "--out", "both")
    assert page.status == 0, page.errors
    text = (blended / "report.html").read_text()
    boxes = "x_min" in read_parquet(blended / "oof.parquet")
    assert "Members of the blend" in text and ("Boxes fused above an overlap of" in text) == boxes
    (blended / "oof.parquet").write_bytes(b"")
    assert "predict` left oof.parquet" in refused("tune", "--out", "both")
    assert "use its runs, or `blend` again" in refused("predict", "--out", "both")
    assert command("blend", "run", "other", "--out", "both").status == 0
    if solution.recipe.maps:
        assert "only probabilities of images have ranks" in refused(
            "blend", "run", "other", "--out", "ranks", "--average", "rank"
        )


def test_anyones_predictions_take_part(run_copy, command, refused, solution, tmp_path):
    theirs = tmp_path / "theirs.csv"
    shutil.copy(run_copy / "submission.csv", theirs)
    words = ["blend", "run", "theirs.csv", "--out", "both"]
    result = command(*words, "--share", "0.25")
    assert not result.errors and result.status == 0, result.errors
    assert "the score is without theirs.csv" in result.out
    members = read_csv(tmp_path / "both" / "blend.csv", ["member", "weight", "score"])
    assert members["weight"].iloc[-1] == pytest.approx(0.25) and np.isnan(members["score"].iloc[-1])
    one, mean = (read_parquet(folder / "test.parquet") for folder in (run_copy, tmp_path / "both"))
    if solution.recipe.maps:
        paths = [folder / "test_probs.b2nd" for folder in (run_copy, tmp_path / "both")]
        one, mean = (read_array(path)[:].astype(float) for path in paths)
        assert (mean - 0.75 * one > -1).all() and (mean - 0.75 * one < 65).all()  # a quarter of 0 or 255
    elif "x_min" not in one:  # the same probabilities, rounded in the submission
        values = one.select_dtypes("float").to_numpy()
        np.testing.assert_allclose(mean.select_dtypes("float").to_numpy(), values, atol=1e-6)
    assert "predictions of networks that are not here" in refused("export", "both", "--out", "trained")
    words += ["--weights", "3", "1"]
    result = command(*words)
    assert not result.errors and result.status == 0, result.errors
    assert read_csv(tmp_path / "both" / "blend.csv", ["weight"])["weight"].iloc[-1] == 0.25
    assert "needs one per run, none negative" in refused(*words, "1")
    theirs.write_text("".join(theirs.read_text().splitlines(keepends=True)[:-1]))
    assert "theirs.csv: has no prediction of 1 test images" in refused(*words)


def test_what_is_refused(run_copy, refused, tmp_path):
    for words in (["run", "--out", "both"], ["run", "run", "--out", "both"], ["run", "other", "--out", "run"]):
        assert "two or more different runs, another --out" in refused("blend", *words)
    shutil.copytree(run_copy, tmp_path / "other")
    (tmp_path / "other" / "oof.parquet").write_bytes(b"")
    assert "other: `predict` left oof.parquet" in refused("blend", "run", "other", "--out", "both")
    assert not (tmp_path / "both").exists()
