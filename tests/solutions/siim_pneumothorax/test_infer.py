"""What a finished run leaves for others: exported, and then as good as the run itself."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.kills import NET
from common.submit.table import read_table
from common.train.checkpoint import load_weights, save_weights
from solutions.__main__ import main
from solutions.siim_pneumothorax.config import DEMO
from solutions.siim_pneumothorax.models import build_segmenter
from tests.running import say

KEEP_ALL = ["--decision.gate", "0", "--decision.pixel", "0.5", "--decision.min-area", "0"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("infer", …)` in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: say(capsys, "siim_pneumothorax", *words)


@pytest.fixture
def unlabelled(sample, tmp_path):
    """The competition's folder without labels and training images; its files are links: to be replaced, not edited."""
    shutil.copytree(sample / "dicom-images-test", tmp_path / "data", copy_function=os.link)
    os.link(sample / "sample_submission.csv", tmp_path / "data" / "sample_submission.csv")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def lively(finished, tmp_path_factory):
    """A finished run with masks in its submission: the networks of the other one see nothing after two epochs."""
    run = shutil.copytree(finished / "run", tmp_path_factory.mktemp("lively") / "run")
    config = replace(DEMO.segmenter, encoder=NET)
    images = torch.from_numpy(np.load(next(finished.glob("stores/*/images.npy"))))[:, None]
    for path in run.glob("fold*/segmenter-64/final.safetensors"):
        model = build_segmenter(config, "none").eval()
        load_weights(path, model)
        with torch.inference_mode():
            model.net.segmentation_head[0].bias -= model(images).median()
        save_weights(path, model.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parent)
        for verb in ("predict", "tune", "score", "submit"):
            assert main(["siim_pneumothorax", verb, "--out", "run", *KEEP_ALL]) == 0
    assert (read_table(run / "submission.csv")["EncodedPixels"] != "-1").any()
    return run


@pytest.fixture
def run(lively, tmp_path):
    """A copy of it in the test's folder."""
    return shutil.copytree(lively, tmp_path / "run")


def test_inference_gives_the_bytes_of_the_run(run, command, unlabelled, tmp_path):
    assert command("export", "run", "--out", "trained").status == 0
    names = {f"fold{k}-{stage}.safetensors" for k in (0, 1) for stage in ("classifier", "segmenter-64")}
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {"trained.json", *names}
    submission, probs = (run / "submission.csv").read_bytes(), np.load(run / "test_probs.npy")
    assert len(np.unique(probs)) > 100
    presence = pd.read_parquet(run / "test.parquet")["presence"]
    run.rename(tmp_path / "gone")  # nothing of it is read
    words = ["infer", "trained", "--data", unlabelled, "--out", "out/answer.csv", "--work", "work", "--workers", "0"]
    result = command(*words)
    assert (result.status, result.errors) == (0, []) and "valid submission: out/answer.csv" in result.out
    assert (tmp_path / "out" / "answer.csv").read_bytes() == submission
    assert (np.load(tmp_path / "work" / "test_probs.npy") == probs).all()
    assert (pd.read_parquet(tmp_path / "work" / "test.parquet")["presence"] == presence).all()
    # again in the same folder: nothing is predicted twice
    before = (tmp_path / "work" / "test_probs.npy").stat().st_mtime_ns
    (tmp_path / "out" / "answer.csv").unlink()
    assert command(*words).status == 0
    assert (tmp_path / "work" / "test_probs.npy").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "answer.csv").read_bytes() == submission


def test_an_image_that_cannot_be_read(run, command, refused, unlabelled, tmp_path):
    assert command("export", "run", "--out", "trained").status == 0
    expected = read_table(run / "submission.csv")
    for path in unlabelled.rglob("*.dcm"):  # as users have them: a folder of images, --test
        path.rename(unlabelled / path.name)
    bad = unlabelled / f"{expected['ImageId'][(expected['EncodedPixels'] != '-1').idxmax()]}.dcm"
    bad.unlink()
    bad.write_bytes(b"no image")
    words = ["infer", "trained", "--test", unlabelled, "--workers", "0"]
    line = refused(*words)
    assert bad.name in line and not (tmp_path / "submission.csv").exists()
    result = command(*words, "--on-bad-image", "placeholder")
    assert result.status == 4 and "1 of the inputs" in result.errors[-1]
    found = read_table(tmp_path / "submission.csv").set_index("ImageId")["EncodedPixels"]
    expected = expected.set_index("ImageId")["EncodedPixels"].sort_index()
    expected[bad.stem] = "-1"
    assert found.to_dict() == expected.to_dict() and found.index.tolist() == sorted(found.index)


def test_what_is_not_finished_is_not_exported(run_copy, refused, command):
    (run_copy / "score.json").unlink()
    assert "score.json, which is missing" in refused("export", "run", "--out", "trained")
    (run_copy / "tuned.json").unlink()
    assert "run the verb `tune`" in refused("export", "run", "--out", "trained")
    shutil.copy(run_copy / "fold0/classifier/final.safetensors", run_copy / "fold1/classifier/final.safetensors")
    assert "`predict` is out of date" in refused("export", "run", "--out", "trained")
    (run_copy / "fold1" / "classifier" / "final.safetensors").unlink()
    assert "fold 1 is not trained" in refused("export", "run", "--out", "trained")
