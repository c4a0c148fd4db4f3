"""A finished run with masks, exported: predicted by `infer` and by the notebook on Kaggle, and its pictures there."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.submit.table import read_table
from common.train.checkpoint import load_weights, save_weights
from solutions.__main__ import main
from solutions.siim_pneumothorax.config import DEMO
from solutions.siim_pneumothorax.pipeline import segmenter_networks
from solutions.siim_pneumothorax.report import largest_masks
from tests.notebooks import round_trip
from tests.solutions.contract import NET

KEEP_ALL = ["--decision.gate", "0", "--decision.pixel", "0.5", "--decision.min-area", "0"]


@pytest.fixture(scope="module")
def run_with_masks(runs, tmp_path_factory):
    """A finished run with masks in its submission, which two epochs do not reach: the networks' output is shifted."""
    finished = runs.finished("siim_pneumothorax")
    run = shutil.copytree(finished / "run", tmp_path_factory.mktemp("masks") / "run")
    config = replace(DEMO, segmenter=replace(DEMO.segmenter, encoder=NET))
    images = torch.from_numpy(np.load(next(finished.glob("stores/*/images.npy"))))[:, None]
    for path in run.glob("fold*/segmenter-64/final.safetensors"):
        model = segmenter_networks(config, 0)[-1].build("none").eval()
        load_weights(path, model)
        with torch.inference_mode():
            model.net.segmentation_head[0].bias -= model(images).median()
        save_weights(path, model.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parent)
        for verb in ("predict", "tune", "submit"):
            assert main(["siim_pneumothorax", verb, "--out", "run", *KEEP_ALL]) == 0
    assert (read_table(run / "submission.csv")["EncodedPixels"] != "-1").any()
    return run


def test_a_folder_of_images_is_predicted_and_an_unreadable_one_has_no_mask(
    run_with_masks, command, refused, sample, tmp_path
):
    (tmp_path / "images").mkdir()
    for path in (sample / "dicom-images-test").rglob("*.dcm"):
        os.link(path, tmp_path / "images" / path.name)
    assert command("export", run_with_masks, "--out", "exported").status == 0
    words = ["infer", "exported", "--test", "images", "--workers", "0"]
    assert command(*words).status == 0
    expected = read_table(run_with_masks / "submission.csv").set_index("ImageId")["EncodedPixels"].sort_index()
    assert read_table(tmp_path / "submission.csv").set_index("ImageId")["EncodedPixels"].equals(expected)
    bad = tmp_path / "images" / f"{(expected != '-1').idxmax()}.dcm"
    bad.unlink()
    bad.write_bytes(b"no image")
    assert bad.name in refused(*words)
    assert command(*words, "--on-bad-image", "placeholder").status == 4
    expected[bad.stem] = "-1"
    assert read_table(tmp_path / "submission.csv").set_index("ImageId")["EncodedPixels"].equals(expected)


def test_the_notebook_gives_the_bytes_of_the_run(run_with_masks, sample, tmp_path, monkeypatch):
    mounted = "competitions/siim-acr-pneumothorax-segmentation"
    pictures = round_trip(run_with_masks, "siim_pneumothorax", {mounted: sample}, tmp_path, monkeypatch)
    assert pictures.count("data:image/jpeg;base64,") == 4 and "% of the image" in pictures


def test_a_run_that_is_not_finished_is_not_bundled(run_copy, tmp_path, capsys):
    (run_copy / "tuned.json").unlink()
    assert main(["bundle", str(run_copy), "--out", str(tmp_path / "bundle")]) == 2
    assert "run the verb `tune`" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_largest_masks_come_first(tmp_path):
    """Sums are unsigned: their negation would put an empty mask before all others."""
    rows = ("empty,-1", "small,0 3", "large,1024 900 124 900", "middle,5 1000")
    (tmp_path / "submission.csv").write_text("ImageId,EncodedPixels\n" + "\n".join(rows) + "\n")
    masks = largest_masks(tmp_path / "submission.csv", 3)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"large": 1800, "middle": 1000, "small": 3}
    assert list(masks) == ["large", "middle", "small"] and masks["small"][:4, 0].tolist() == [1, 1, 1, 0]
