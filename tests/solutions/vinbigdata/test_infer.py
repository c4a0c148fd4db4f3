"""What a finished run leaves for others: exported, and then as good as the run itself."""

import os
import shutil

import pytest

from common.paths import find_images, read_json
from common.submit.table import read_table, write_submission


@pytest.fixture
def unlabelled(sample, tmp_path):
    """The competition's folder without labels and training images; its files are links: to be replaced, not edited."""
    table, files = read_table(sample / "sample_submission.csv"), find_images(sample)
    (tmp_path / "data" / "test").mkdir(parents=True)
    for image_id in table["image_id"]:
        os.link(files[image_id], tmp_path / "data" / "test" / files[image_id].name)
    write_submission(tmp_path / "data" / "sample_submission.csv", table)
    return tmp_path / "data"


def test_inference_gives_the_bytes_of_the_run(run_copy, command, unlabelled, tmp_path):
    assert command("export", "run", "--out", "trained").status == 0
    names = {f"fold{k}-{stage}.safetensors" for k in (0, 1) for stage in ("flip", "noise", "healthy")}
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {"trained.json", *names}
    about, submission = read_json(tmp_path / "trained" / "trained.json"), (run_copy / "submission.csv").read_bytes()
    assert about["score"] == {"metric": "map", **read_json(run_copy / "score.json")["map"]}
    assert about["neutral"] == "14 1 0 0 1 1" and about["rule"] == read_json(run_copy / "tuned.json")
    assert submission.count(b" ") > 100  # boxes
    run_copy.rename(tmp_path / "gone")  # nothing of it is read
    words = ["infer", "trained", "--data", unlabelled, "--work", "work", "--workers", "0"]
    result = command(*words)
    assert (result.status, result.errors) == (0, [])
    assert (tmp_path / "submission.csv").read_bytes() == submission
    # other sizes in the same folder: the boxes are those of these sizes, not the ones that are there
    sizes = read_table(unlabelled / "sample_submission.csv")[["image_id"]].assign(width="40000", height="40000")
    write_submission(tmp_path / "sizes.csv", sizes)
    assert command(*words, "--sizes", "sizes.csv").status == 0
    found = read_table(tmp_path / "submission.csv")["PredictionString"].str.split()
    assert max(float(value) for row in found for value in row) > 20000


def test_an_image_that_cannot_be_read(run_copy, command, refused, unlabelled, tmp_path):
    assert command("export", "run", "--out", "trained").status == 0
    expected = read_table(run_copy / "submission.csv").set_index("image_id")["PredictionString"]
    bad = next(path for path in sorted((unlabelled / "test").iterdir()) if " 0 0 1 1" not in expected[path.stem][:9])
    bad.unlink()
    bad.write_bytes(b"no image")
    words = ["infer", "trained", "--test", unlabelled / "test", "--workers", "0"]
    assert bad.name in refused(*words)
    assert command(*words, "--on-bad-image", "placeholder").status == 4
    found = read_table(tmp_path / "submission.csv").set_index("image_id")["PredictionString"]
    assert found.to_dict() == {**expected.to_dict(), bad.stem: "14 1 0 0 1 1"}


def test_what_is_not_finished_is_not_exported(run_copy, refused):
    (run_copy / "tuned.json").unlink()
    assert "run the verb `tune`" in refused("export", "run", "--out", "trained")
    shutil.copy(run_copy / "fold0/noise/final.safetensors", run_copy / "fold1/noise/final.safetensors")
    assert "no predictions of these networks" in refused("export", "run", "--out", "trained")
