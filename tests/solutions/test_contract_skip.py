"""Every solution: a training image that cannot be read is left out of a whole run, its predictions and its page."""

import pandas as pd
import pytest

from common.paths import read_parquet
from tests.solutions.contract import SOLUTIONS, find_image

pytestmark = [pytest.mark.long, pytest.mark.parametrize("solution", SOLUTIONS, indirect=True)]

SMALLER = {"vinbigdata": "--healthy.batch-size 4", "rsna_pneumonia": "--gate.batch-size 4"}  # an image fewer


def test_an_unreadable_training_image_is_left_out(solution, finished, command, data, tmp_path):
    table = read_parquet(finished / "run" / "images.parquet")
    used = table[(table["split"] == "train") & (table["fold"] >= 0)]
    for name in {"abnormal", "target"} & set(used):  # detectors need all the few images with boxes
        used = used[used[name] == 0]
    image_id, rows = used["image_id"].iloc[1], set(table["row"])
    path = find_image(data, image_id)
    path.unlink()
    path.write_bytes(b"no image")
    words = ["run", *solution.words, "--data", data, "--out", "skipped", "--store", tmp_path / "stores"]
    words += ["--on-bad-image", "skip", *SMALLER.get(solution.name, "").split()]
    for again in (False, True):
        result = command(*words)
        assert result.status == 4 and "1 of the inputs could not be used" in result.errors[-1], result
        assert not again or ("epoch" not in result.out and "predict: up to date" in result.out)
        assert pd.read_csv(tmp_path / "skipped" / "left_out.csv")["image_id"].tolist() == [image_id]
    left = read_parquet(tmp_path / "skipped" / "images.parquet")
    oof = read_parquet(tmp_path / "skipped" / "oof.parquet")
    assert (left.loc[left["image_id"] == image_id, "fold"] == -1).all() and image_id not in set(oof["image_id"])
    assert set(left["row"]) <= rows and len(left) >= len(table) - 1
    assert command("report", "--out", "skipped").status == 0 and (tmp_path / "skipped" / "report.html").is_file()
