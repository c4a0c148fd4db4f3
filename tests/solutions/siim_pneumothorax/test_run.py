"""Whole runs at the smallest size: what they leave, every choice of the recipe, and several processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.tables import real_data
from common.paths import read_array, read_json
from common.post.rle import decode
from common.submit.table import read_table
from common.train.checkpoint import load_weights
from tests.running import write_times
from tests.solutions.contract import NET

ROOT = Path(__file__).parents[3]
FOLD0 = ["--folds", "0", "--classifier.epochs", "1", "--segmenter.epochs", "1"]


def test_a_run_leaves_masks_and_its_dice(finished, sample):
    run = finished / "run"
    rows = read_table(run / "submission.csv", ["ImageId", "EncodedPixels"])
    assert rows["ImageId"].tolist() == read_table(sample / "sample_submission.csv")["ImageId"].tolist()
    assert all(decode(rle).shape == (1024, 1024) for rle in rows["EncodedPixels"])
    oof = pd.read_parquet(run / "oof_dice.parquet")
    assert len(oof) == 16 and oof["dice"].mean() == pytest.approx(read_json(run / "score.json")["dice"]["estimate"])
    assert read_json(run / "manifest.json")["steps"]["submit"]["hidden"]["metric"] == "dice"


def test_one_fold_through_all_verbs_and_the_other_later(tmp_path, command, sample, solution):
    for verb in ("prepare", "train", "predict", "tune", "score", "submit"):
        result = command(verb, *solution.words, "--data", sample, "--out", "run", *FOLD0)
        assert (result.status, result.errors) == (0, [])
    score = read_json(tmp_path / "run" / "score.json")
    assert score["folds"] == [0] and score["images"] == 8 and score["nested_by"] == "halves of the patients"
    assert not (tmp_path / "run" / "fold1").exists()
    done = write_times(tmp_path / "run", "fold0/*/final.safetensors")
    assert command("run", "--data", sample, "--out", "run", "--folds", "0", "1").status == 0
    assert done == write_times(tmp_path / "run", "fold0/*/final.safetensors")
    assert read_json(tmp_path / "run" / "score.json")["images"] == 16
    assert read_json(tmp_path / "run" / "config.json")["folds"] == [0, 1]


def test_podium_at_tiny_size(tmp_path, command, sample):
    options = f"""--store-size 64 --n-folds 2 --folds 0 1 --segmenter.encoder {NET} --segmenter.weights none
        --segmenter.sizes 32 64 --segmenter.epochs 2 --segmenter.finer-epochs 1 --segmenter.batch-size 4
        --segmenter.finer-batch-size 4 --segmenter.precision fp32"""
    result = command("run", "podium", "--data", sample, "--out", "run", *options.split())
    assert (result.status, result.errors) == (0, [])
    run = tmp_path / "run"
    assert {path.name for path in (run / "fold1").iterdir() if path.is_dir()} == {"segmenter-32", "segmenter-64"}
    assert set(read_json(run / "fold0" / "segmenter-32" / "variants.json")["variants"]) == {
        "best_k",
        "ema",
        "window",
        "best",
    }
    assert pd.read_parquet(run / "oof.parquet")["presence"].between(1e-6, 1 - 1e-6).all()
    assert read_json(run / "tuned.json")["rule"]["min_pixels"] > 0
    assert read_array(run / "test_probs.b2nd").shape == (4, 64, 64)


# every value of every choice is in one of these: augmentation, loss, both schedules, optimizer and precision
COMBINATIONS = {
    "paper": "paper focal_dice constant plateau adam fp32",
    "podium": "podium combo cosine step adamw fp32",
    "light": "light tversky warm_cosine one_cycle sgd fp32",
    "lovasz": "light lovasz one_cycle warm_cosine adamw bf16",
    "plain": "light bce_dice plateau cosine adam auto",
    "steps": "paper bce_dice step constant adam auto",
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_choice_trains(name, tmp_path, command, sample, solution):
    augmentation, loss, masks, gate, optimizer, precision = COMBINATIONS[name].split()
    words = ["--segmenter.loss", loss, "--segmenter.schedule", masks, "--classifier.schedule", gate]
    for network in ("classifier", "segmenter"):
        words += [f"--{network}.augmentation", augmentation, f"--{network}.optimizer", optimizer]
        words += [f"--{network}.precision", precision]
    words += ["--segmenter.negatives", "1", "--segmenter.positive-rate"] if name == "paper" else []
    words += ["--segmenter.accumulate", "2", "--segmenter.clip-norm", "1"] if name == "podium" else []
    words += ["--tta", "flip", "scale"] if name == "light" else []
    words += ["--decision.rule", "triplet"] if name == "lovasz" else []
    last = ["classifier.averaging", "segmenter.averaging"] if name == "plain" else []
    words += [w for option in last for w in (f"--{option}", "last", "best", "best_k", "window", "classic", "ema")]
    verbs = ("prepare", "train", "predict", "tune") if name in ("light", "lovasz", "plain") else ("prepare", "train")
    for verb in verbs:
        result = command(verb, *solution.words, "--data", sample, "--out", "run", *FOLD0, *words)
        assert (result.status, result.errors) == (0, [])
    assert len(list((tmp_path / "run").glob("fold0/*/final.safetensors"))) == 2


def test_enrichment_and_no_gate(tmp_path, command, sample, solution):
    words = [*solution.words, "--data", sample, "--out", "run", *FOLD0]
    assert command("prepare", *words).status == 0
    assert command("train", *words, "--classifier.enrichment", "True").status == 0
    words += ["--presence", "none", "--decision.gate", "0"]
    assert command("run", *words).status == 0  # the finished segmenter serves both
    assert (pd.read_parquet(tmp_path / "run" / "oof.parquet")["presence"] == 1).all()
    assert "presence" not in read_json(tmp_path / "run" / "score.json")


@pytest.mark.long
def test_killed_runs_end_with_the_same_bytes():
    done = start("-m", "benchmarks.kills", "--kills", "3", "--solution", "siim_pneumothorax")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("killed in") == 3 and "the same bytes" in done.stdout


def start(*words):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )


@pytest.mark.long
def test_two_processes_train_what_one_trains(command, finished, sample, tmp_path, solution):
    # U-Net, because FPN has dropout; SGD, because Adam makes whole steps of gradients that are nothing but rounding
    words = ["run", *solution.words, "--data", sample, "--folds", "0", "--device", "cpu"]
    words += ["--segmenter.architecture", "unet"]
    words += [w for net in ("classifier", "segmenter") for w in (f"--{net}.optimizer", "sgd", f"--{net}.lr", "0.01")]
    assert command(*words, "--out", "one").status == 0
    words = ["-m", "solutions", "siim_pneumothorax", *words, "--store", finished / "stores", "--out", tmp_path / "run"]
    done = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("valid submission") == 1
    finals = sorted((tmp_path / "one").glob("fold0/*/final.safetensors"))
    assert len(finals) == 2
    for path in finals:
        one = load_weights(path)[0]
        two = load_weights(tmp_path / "run" / path.relative_to(tmp_path / "one"))[0]
        for name, values in one.items():
            np.testing.assert_allclose(two[name], values, rtol=1e-4, atol=1e-5, err_msg=f"{path.parent.name} {name}")
    assert len(read_table(tmp_path / "run" / "submission.csv")) == 4
    assert (tmp_path / "run" / "report.html").is_file()


def test_real_images(tmp_path, command, solution):
    data = real_data("siim_pneumothorax")
    if data is None:
        pytest.skip("CXR_REAL_DATA names no folder with siim_pneumothorax in it")
    result = command("prepare", *solution.words, "--data", data, "--out", "run", "--n-folds", "5")
    assert (result.status, result.errors) == (0, [])
    table = pd.read_parquet(tmp_path / "run" / "images.parquet")
    assert table["split"].value_counts().to_dict() == {"train": 139, "test": 28}
    assert table["present"].sum() == 18 == (table["area"] > 0).sum()
    train = table[table["split"] == "train"]
    assert train.groupby("patient_id")["fold"].nunique().max() == 1 and set(train["fold"]) == set(range(5))
    assert (train[["width", "height"]] == 1024).all().all()
