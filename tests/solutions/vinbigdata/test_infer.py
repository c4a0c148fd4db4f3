"""Inference with other sizes of the originals, and on an image that cannot be read."""

import os

import pytest

from common.paths import find_images
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


def test_other_sizes_in_the_same_work_folder(run_copy, command, unlabelled, tmp_path):
    assert command("export", "run", "--out", "trained").status == 0
    words, submission = ["infer", "trained", "--data", unlabelled, "--work", "work", "--workers", "0"], "submission.csv"
    assert command(*words).status == 0
    assert (tmp_path / submission).read_bytes() == (run_copy / submission).read_bytes()
    sizes = read_table(unlabelled / "sample_submission.csv")[["image_id"]].assign(width="40000", height="40000")
    write_submission(tmp_path / "sizes.csv", sizes)
    assert command(*words, "--sizes", "sizes.csv").status == 0
    found = read_table(tmp_path / submission)["PredictionString"].str.split()
    assert max(float(value) for row in found for value in row) > 20000  # not the boxes that were there


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
