"""Whole runs at the smallest size: what they leave, what a second one does again, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from benchmarks.kills import COMPARED, NET, TINY
from benchmarks.tables import real_data
from common import recipe
from common.paths import read_json
from common.post.rle import decode
from common.submit.table import read_table
from common.train.checkpoint import load_weights
from tests.running import prints, times

ROOT = Path(__file__).parents[3]
FOLD0 = ["--folds", "0"]
ONE_EPOCH = ["--classifier.epochs", "1", "--segmenter.epochs", "1"]


def ids(path):
    return read_table(path)["ImageId"].tolist()


# ---- a run and its repetition --------------------------------------------------------------------------------------


def test_a_run_leaves_a_valid_submission_a_score_and_a_report(finished, sample):
    run = finished / "run"
    rows = read_table(run / "submission.csv", ["ImageId", "EncodedPixels"])
    assert rows["ImageId"].tolist() == ids(sample / "sample_submission.csv")
    assert all(decode(rle).shape == (1024, 1024) for rle in rows["EncodedPixels"])
    dice = read_json(run / "score.json")["dice"]
    assert 0 <= dice["low"] <= dice["estimate"] <= dice["high"] <= 1
    oof = pd.read_parquet(run / "oof_dice.parquet")
    assert len(oof) == 16 and oof["dice"].mean() == pytest.approx(dice["estimate"])
    assert "<html" in (run / "report.html").read_text()[:300]
    assert "valid submission" in (run / "log.txt").read_text()
    copies = list((finished / "submissions").glob("siim_pneumothorax-run-*.csv"))
    assert [path.read_bytes() for path in copies] == [(run / "submission.csv").read_bytes()]
    assert not list(run.rglob("last.ckpt")) and not list(finished.rglob(".*tmp*"))
    steps = read_json(run / "manifest.json")["steps"]
    assert [step for step in steps if " " not in step] == ["prepare", "predict", "tune", "submit"]
    assert steps["submit"]["hidden"]["metric"] == "dice"


def test_a_second_run_does_nothing_again(run_copy, command, sample):
    before, done = prints(run_copy), times(run_copy, "fold*/**/*", "*_probs.npy", "*.parquet", "t*.json", "score.json")
    del done[run_copy / "images.parquet"]  # written anew, with the same bytes
    result = command("run", "--data", sample, "--out", "run")  # without a preset: with the stored configuration
    assert result.status == 0
    assert "predict: up to date" in result.out and "tune: up to date" in result.out and "epoch" not in result.out
    assert done == {path: path.stat().st_mtime_ns for path in done}
    changed = {name for name, digest in prints(run_copy).items() if before[name] != digest}
    assert changed <= {"manifest.json"}


def test_one_fold_through_all_verbs(tmp_path, command, sample):
    for verb in ("prepare", "train", "predict", "tune", "score", "submit", "report"):
        result = command(verb, "demo", "--data", sample, "--out", "run", *TINY, *FOLD0)
        assert (result.status, result.errors) == (0, [])
    score = read_json(tmp_path / "run" / "score.json")
    assert score["folds"] == [0] and score["images"] == 8 and score["nested_by"] == "halves of the patients"
    assert not (tmp_path / "run" / "fold1").exists() and (tmp_path / "run" / "report.html").is_file()
    # the other fold later, in the same folder: the first is not trained again
    done = times(tmp_path / "run", "fold0/*/final.safetensors")
    assert command("run", "--data", sample, "--out", "run", "--folds", "0", "1").status == 0
    assert done == times(tmp_path / "run", "fold0/*/final.safetensors")
    assert read_json(tmp_path / "run" / "score.json")["images"] == 16
    assert read_json(tmp_path / "run" / "config.json")["folds"] == [0, 1]


def test_a_stopped_run_continues_to_the_same_bytes(finished, tmp_path, command, sample):
    words = ["run", "demo", "--data", sample, "--out", "run", *TINY]
    result = command(*words, "--hours", "0.0001")
    assert result.status == 3 and "the same command continues" in result.out
    assert not (tmp_path / "run" / "submission.csv").exists()
    assert command(*words).status == 0
    for pattern in COMPARED:
        for path in (finished / "run").glob(pattern):
            again = tmp_path / "run" / path.relative_to(finished / "run")
            assert again.read_bytes() == path.read_bytes(), again


def test_podium_at_tiny_size(tmp_path, command, sample):
    result = command(
        "run",
        "podium",
        "--data",
        sample,
        "--out",
        "run",
        "--store-size",
        "64",
        "--n-folds",
        "2",
        "--folds",
        "0",
        "1",
        "--segmenter.encoder",
        NET,
        "--segmenter.weights",
        "none",
        "--segmenter.sizes",
        "32",
        "64",
        "--segmenter.epochs",
        "2",
        "--segmenter.finer-epochs",
        "1",
        "--segmenter.batch-size",
        "4",
        "--segmenter.finer-batch-size",
        "4",
        "--segmenter.precision",
        "fp32",
    )
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
    assert np.load(run / "test_probs.npy").shape == (4, 64, 64)


# every value of every choice is in one of these; the first network to differ is what a choice is told by
COMBINATIONS = {
    "paper": "paper focal_dice constant plateau adam fp32",
    "podium": "podium combo cosine step adamw fp32",
    "light": "light tversky warm_cosine one_cycle sgd fp32",
    "lovasz": "light lovasz one_cycle warm_cosine adamw bf16",
    "plain": "light bce_dice plateau cosine adam auto",
    "steps": "paper bce_dice step constant adam auto",
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_choice_trains(name, tmp_path, command, sample):
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
        result = command(verb, "demo", "--data", sample, "--out", "run", *TINY, *FOLD0, *ONE_EPOCH, *words)
        assert (result.status, result.errors) == (0, [])
    assert len(list((tmp_path / "run").glob("fold0/*/final.safetensors"))) == 2


def test_enrichment_and_no_gate(tmp_path, command, sample):
    words = ["demo", "--data", sample, "--out", "run", *TINY, *FOLD0, *ONE_EPOCH]
    assert command("prepare", *words).status == 0
    assert command("train", *words, "--classifier.enrichment", "True").status == 0
    words += ["--presence", "none", "--decision.gate", "0"]
    assert command("run", *words).status == 0  # the finished segmenter serves both
    assert (pd.read_parquet(tmp_path / "run" / "oof.parquet")["presence"] == 1).all()
    assert "presence" not in read_json(tmp_path / "run" / "score.json")


# ---- what was made from what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "predict", "tune", "score", "submit", "report"])
def test_verbs_before_prepare(verb, tmp_path, refused):
    assert "not prepared" in refused(verb, "demo", "--out", "run")
    assert not (tmp_path / "run").exists()


def test_verbs_out_of_order(run_copy, refused):
    manifest = read_json(run_copy / "manifest.json")
    steps = manifest["steps"]

    def has_done(*names):
        (run_copy / "manifest.json").write_text(json.dumps({**manifest, "steps": {n: steps[n] for n in names}}))

    has_done("prepare", "predict")
    for verb in ("score", "submit"):
        assert "run the verb `tune`" in refused(verb, "--out", "run")
    has_done("prepare")
    for verb in ("tune", "score", "submit"):
        assert "run the verb `predict`" in refused(verb, "--out", "run")
    shutil.rmtree(run_copy / "fold1")
    for verb in ("predict", "tune", "score", "submit"):
        assert "fold 1 is not trained" in refused(verb, "--out", "run")
    assert refused("train", "--out", "run", "--classifier.lr", "1").startswith("error: run/fold0/classifier: holds")


def test_another_training_is_refused_and_loses_nothing(run_copy, command, refused, sample):
    before = prints(run_copy, but=["manifest.json"])
    for option in (
        "--segmenter.epochs 3",
        "--classifier.lr 0.1",
        "--n-folds 3",
        "--seed 1",
        "--store-size 96",
        "--segmenter.weights /no/file",
    ):
        line = refused("run", "--data", sample, "--out", "run", *option.split())
        assert "run/fold0/" in line and "another" in line and "--out" in line, option
        assert prints(run_copy, but=["manifest.json"]) == before, option
    again = command("run", "--data", sample, "--out", "run")
    assert again.status == 0 and "epoch" not in again.out and "predict: up to date" in again.out


@pytest.mark.parametrize("option", ["--n-folds 3", "--seed 1", "--store-size 96"])
def test_options_of_prepare_are_not_passed_over(option, run_copy, refused):
    assert f"prepared with {option.split()[0]}" in refused("tune", "--out", "run", *option.split())


def test_another_decision_is_tuned_without_training(run_copy, command, sample):
    done = times(run_copy, "fold*/**/*", "*_probs.npy")
    assert "verb `tune`" in command("submit", "--out", "run", "--decision.pixel", "0.4").errors[0]
    result = command("run", "--data", sample, "--out", "run", "--decision.pixel", "0.4", "0.6")
    assert result.status == 0 and "predict: up to date" in result.out and "tune: up to date" not in result.out
    assert done == times(run_copy, "fold*/**/*", "*_probs.npy")
    assert read_json(run_copy / "tuned.json")["rule"]["pixel"] in (0.4, 0.6)
    assert read_json(run_copy / "config.json")["decision"]["pixel"] == [0.4, 0.6]


def test_other_views_are_predicted_without_training_and_a_failure_is_not_taken_for_them(
    run_copy, command, sample, monkeypatch
):
    done = times(run_copy, "fold*/*/*")
    names = ("oof_probs.npy", "test_probs.npy", "oof.parquet", "test.parquet")
    before = {name: (run_copy / name).read_bytes() for name in names}

    def full_at_last(path, table):
        if path.name == "test.parquet":
            raise OSError(28, "No space left on device", str(path))
        write_table(path, table)

    with monkeypatch.context() as patch:  # the test set's masks are of the new views when it ends
        write_table = recipe.write_table
        patch.setattr(recipe, "write_table", full_at_last)
        assert "No space left" in command("predict", "--out", "run", "--tta", "flip").errors[0]
    failed = times(run_copy, "test_probs.npy")
    assert "predict: up to date" not in command("predict", "--out", "run").out
    assert {name: (run_copy / name).read_bytes() for name in names} == before
    assert failed != times(run_copy, "test_probs.npy")  # not taken for those of this command
    assert done == times(run_copy, "fold*/*/*")


def test_other_test_images(run_copy, command, refused, sample, tmp_path):
    wanted = (run_copy / "submission.csv").read_bytes()
    (tmp_path / "mine").mkdir()
    for name in ("b", "a.1"):
        cv2.imwrite(str(tmp_path / "mine" / f"{name}.png"), np.full((300, 300), 90, np.uint8))
    assert "prepared with another --test" in refused("predict", "--out", "run", "--test", "mine")
    assert command("run", "--data", sample, "--out", "run", "--test", "mine").status == 0
    assert ids(run_copy / "submission.csv") == ["a.1", "b"]
    two = ids(sample / "sample_submission.csv")[2:0:-1]
    (tmp_path / "two.csv").write_text("name,age\n" + "".join(f"{name}.dcm,5\n" for name in two))
    assert command("run", "--data", sample, "--out", "run", "--test", "two.csv").status == 0
    assert ids(run_copy / "submission.csv") == two
    result = command("run", "--data", sample, "--out", "run")
    assert result.status == 0 and "epoch" not in result.out
    assert (run_copy / "submission.csv").read_bytes() == wanted


def test_a_bad_test_image_that_was_mended_is_predicted_again(tmp_path, command, refused, sample):
    data, words = tmp_path / "data", ["demo", "--out", "run", *TINY, *FOLD0, *ONE_EPOCH]
    shutil.copytree(sample, data)
    victim = ids(sample / "sample_submission.csv")[1]
    path = next(data.rglob(f"{victim}.dcm"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert victim in refused("run", *words, "--data", data) and not (tmp_path / "run").exists()
    assert command("run", *words, "--data", data, "--on-bad-image", "placeholder").status == 0
    rows = read_table(tmp_path / "run" / "submission.csv").set_index("ImageId")["EncodedPixels"]
    assert len(rows) == 4 and rows[victim] == "-1"
    grey = np.load(tmp_path / "run" / "test_probs.npy")
    path.write_bytes(whole)
    assert command("run", *words, "--data", data).status == 0
    assert (np.load(tmp_path / "run" / "test_probs.npy")[1] != grey[1]).any()


# ---- processes -----------------------------------------------------------------------------------------------------


def start(*words, **options):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, **options
    )


@pytest.mark.long
def test_killed_runs_end_with_the_same_bytes():
    done = start("-m", "benchmarks.kills", "--kills", "3")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("killed in") == 3 and "the same bytes" in done.stdout


@pytest.mark.long
def test_two_processes_train_what_one_trains(command, finished, sample, tmp_path):
    # U-Net, because FPN has dropout; SGD, because Adam makes whole steps of gradients that are nothing but rounding
    words = ["run", "demo", "--data", sample, *TINY, *FOLD0, "--device", "cpu", "--segmenter.architecture", "unet"]
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
    assert ids(tmp_path / "run" / "submission.csv") == ids(sample / "sample_submission.csv")
    assert (tmp_path / "run" / "report.html").is_file()


def test_real_images(tmp_path, command):
    data = real_data("siim_pneumothorax")
    if data is None:
        pytest.skip("CXR_REAL_DATA names no folder with siim_pneumothorax in it")
    result = command("prepare", "demo", "--data", data, "--out", "run", *TINY, "--n-folds", "5")
    assert (result.status, result.errors) == (0, [])
    table = pd.read_parquet(tmp_path / "run" / "images.parquet")
    assert table["split"].value_counts().to_dict() == {"train": 139, "test": 28}
    assert table["present"].sum() == 18 == (table["area"] > 0).sum()
    train = table[table["split"] == "train"]
    assert train.groupby("patient_id")["fold"].nunique().max() == 1 and set(train["fold"]) == set(range(5))
    assert (train[["width", "height"]] == 1024).all().all()
