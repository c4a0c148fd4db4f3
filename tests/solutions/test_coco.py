"""Boxes of a run as a COCO file, and such a file in place of a submission."""

import numpy as np
import pandas as pd
import pytest

from common.paths import read_csv, read_json, read_parquet

COCO = "trained/submission.coco.json"


@pytest.mark.parametrize(
    "solution", ["rsna_pneumonia", pytest.param("vinbigdata", marks=pytest.mark.long)], indirect=True
)
def test_boxes_as_coco(run_copy, command, sample, tmp_path):
    exported = command("export", "run", "--out", "trained", "--coco")
    assert exported.status == 0, exported.errors
    table = read_parquet(run_copy / "images.parquet").query("split == 'test'")
    content = read_json(tmp_path / COCO)
    assert [image["file_name"] for image in content["images"]] == table["image_id"].tolist()
    inferred = command("infer", "trained", "--data", sample, "--out", "again.csv")
    assert inferred.status == 0, inferred.errors
    # a blend fuses the same boxes, whichever form they have
    fused = []
    for name, file in (("csv", "run/submission.csv"), ("coco", COCO)):
        result = command("blend", "run", file, "--out", name)
        assert result.status == 0, result.errors
        fused.append(read_parquet(tmp_path / name / "test.parquet"))
    pd.testing.assert_frame_equal(*fused, rtol=1e-6)
    # and has the same score on the hidden labels
    labels, scores = sample / "hidden" / "truth.csv", []
    for file in ("run/submission.csv", COCO):
        result = command("score_predictions", file, "--labels", labels, "--out", "out.csv", "--resamples", 20)
        assert result.status == 0, result.errors
        scores.append(read_csv(tmp_path / "out.csv", ["metric", "estimate"]))
    np.testing.assert_allclose(scores[0]["estimate"], scores[1]["estimate"], rtol=1e-6)


@pytest.mark.parametrize("solution", ["siim_pneumothorax"], indirect=True)
def test_masks_have_no_boxes(run_copy, refused):
    assert "--coco: a submission of siim_pneumothorax has no boxes" in refused("export", "run", "--out", "x", "--coco")
