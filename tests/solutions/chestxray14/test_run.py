"""Whole runs at the smallest size: what they leave, what a second one does again, and what is refused."""

import json
import re
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import brier_score_loss, roc_auc_score

from common.config import from_dict
from common.data.store import Store
from common.paths import read_json
from common.report import class_plots, plots
from common.submit.table import read_table
from common.submit.validate import validate_probabilities
from common.train import loop
from common.train.checkpoint import load_weights
from solutions.chestxray14 import data as data_module
from solutions.chestxray14 import pictures, pipeline, report, training
from solutions.chestxray14.config import LABELS, Config
from solutions.chestxray14.lungs import open_lungs
from solutions.chestxray14.models import build_fusion, load_network
from tests import browser
from tests.running import prints, times

NAMES = list(LABELS)
VIEWS = ("", "_whole", "_lungs")
COMPARED = (
    "fold*/*/final.safetensors",
    "oof*.parquet",
    "test*.parquet",
    "tuned.json",
    "score.json",
    "*.csv",
    "images.parquet",
    "truth_boxes.parquet",
    "lungs.parquet",
)
MADE = ("fold*/**/*", "oof*.parquet", "test*.parquet", "tuned.json", "score.json")
SECTIONS = [
    "Data",
    "Lungs",
    "Out of fold",
    "Scores on 6 images of the test list, which is not the whole official one",
    "Views",
    "Operating points and calibration",
    "Pictures",
    "Training",
    "Submission",
    "This run",
]
SCORED = set(SECTIONS[2:]) - {"Views", "Training", "This run"}  # of a run of one view


def same(run, other):
    for pattern in COMPARED:
        for path in run.glob(pattern):
            assert (other / path.relative_to(run)).read_bytes() == path.read_bytes(), path


def predicted(run, name):
    return pd.read_parquet(run / f"{name}.parquet").set_index("image_id")[NAMES]


def mean_auroc(truth, probs):
    """By scikit-learn, over the labels that have images of both kinds; and how many these are."""
    known = [label for label in NAMES if truth[label].nunique() == 2]
    return np.mean([roc_auc_score(truth[label], probs[label]) for label in known]), len(known)


def broken(*args, **options):
    raise KeyboardInterrupt


@pytest.fixture
def bare_page(monkeypatch):
    """Reports without plots and pictures, which take the longest."""
    for name in ("histogram", "score_with_interval", "learning_curves"):
        monkeypatch.setattr(plots, name, lambda *args, **options: None)
    for name in ("roc_panels", "reliability_panels"):
        monkeypatch.setattr(class_plots, name, lambda *args, **options: None)
    monkeypatch.setattr(pictures, "gallery", lambda *args, **options: "pictures")
    monkeypatch.setattr(report, "map_gallery", lambda *args: "maps")


def headings(run):
    return re.findall(r"<h2>([^<]*)</h2>", (run / "report.html").read_text())


# ---- a run and its repetition --------------------------------------------------------------------------------------


def test_a_run_leaves_predictions_of_every_image_and_a_valid_submission(finished, sample):
    run = finished / "run"
    images = pd.read_parquet(run / "images.parquet").set_index("image_id")
    lists = {"train": "train_val_list.txt", "test": "test_list.txt"}
    for split, name in lists.items():
        listed = [line.removesuffix(".png") for line in (sample / name).read_text().split()]
        assert sorted(images.index[images["split"] == split]) == sorted(listed)
    train = images[images["split"] == "train"]
    assert set(train["fold"]) == {0, 1} and (train.groupby("patient_id")["fold"].nunique() == 1).all()
    for view in VIEWS:
        oof, test = (pd.read_parquet(run / f"{name}{view}.parquet") for name in ("oof", "test"))
        assert sorted(oof["image_id"]) == sorted(train.index)
        assert (oof["fold"].to_numpy() == train.loc[oof["image_id"], "fold"].to_numpy()).all()
        assert list(test["image_id"]) == list(images.index[images["split"] == "test"]) and set(test["fold"]) == {-1}
        for table in (oof, test):
            assert list(table.columns) == ["image_id", "fold", *NAMES] and set(table[NAMES].dtypes) == {np.dtype("f8")}
            assert table[NAMES].stack().between(0, 1).all()
            assert table[NAMES].nunique().gt(1).all()
    assert not predicted(run, "oof").equals(predicted(run, "oof_whole"))
    stages = {path.parent.relative_to(run).as_posix() for path in run.rglob("final.safetensors")}
    assert stages == {f"fold{fold}/{stage}" for fold in (0, 1) for stage in ("whole", "lungs", "fusion")}

    assert validate_probabilities(run / "submission.csv", run / "sample_submission.csv", ordered=True).rows == 6
    rows, test = read_table(run / "submission.csv"), predicted(run, "test")
    assert list(rows.columns) == ["Image Index", *NAMES]
    assert rows["Image Index"].tolist() == [f"{name}.png" for name in test.index]
    assert rows[NAMES].to_numpy(float) == pytest.approx(test.to_numpy(), rel=1e-5)
    copies = list((finished / "submissions").glob("chestxray14-run-*.csv"))
    assert [path.read_bytes() for path in copies] == [(run / "submission.csv").read_bytes()]
    steps = read_json(run / "manifest.json")["steps"]
    assert [name for name in steps if " " not in name] == ["prepare", "predict", "tune", "score", "submit"]
    assert not list(run.rglob("last.ckpt")) and not list(finished.rglob(".*tmp*"))
    assert not list(run.glob("fold*/*.parquet"))  # parts of what lies above them


def test_the_score_is_that_of_scikit_learn(finished):
    run = finished / "run"
    truth = pd.read_parquet(run / "images.parquet").set_index("image_id")[NAMES]
    score, classes = read_json(run / "score.json"), pd.read_csv(run / "classes.csv")
    for name, images, patients in (("oof", 16, 7), ("test", 6, 4)):
        probs = predicted(run, name)
        expected, known = mean_auroc(truth.loc[probs.index], probs)
        part = score[name]
        assert part["mean"]["estimate"] == pytest.approx(expected, abs=1e-12)
        assert part["mean"]["low"] <= expected <= part["mean"]["high"]
        assert (part["images"], part["patients"], part["classes"]) == (images, patients, known)
        mine = classes[classes["split"] == name].set_index("label")
        assert list(mine.index) == NAMES and mine["auroc"].notna().sum() == known
        assert mine["positive"].tolist() == truth.loc[probs.index].sum().tolist()
        assert mine["auroc"].mean() == pytest.approx(expected, abs=1e-12)
    assert score["auroc"] == score["oof"]["mean"]
    hidden = read_json(run / "manifest.json")["steps"]["submit"]["hidden"]
    assert hidden["value"] == pytest.approx(score["test"]["mean"]["estimate"], abs=1e-12)
    points, oof = pd.read_csv(run / "operating_points.csv").set_index("label"), predicted(run, "oof")
    for label in NAMES:
        expected = brier_score_loss(truth.loc[oof.index, label], oof[label])
        assert points.loc[label, "brier"] == pytest.approx(expected, abs=1e-12)
    assert points[["threshold", "sensitivity", "specificity"]].stack().dropna().between(0, 1).all()
    assert read_json(run / "tuned.json")["thresholds"] == pytest.approx(points["threshold"].to_dict())


def test_a_second_run_does_nothing_again(run_copy, command, sample):
    before, done = prints(run_copy), times(run_copy, *MADE)
    result = command("run", "--data", sample, "--out", "run")  # without a preset: with the stored configuration
    assert (result.status, result.errors) == (0, [])
    assert "predict: up to date" in result.out and "tune: up to date" in result.out and "epoch" not in result.out
    assert "features" not in result.out
    assert done == times(run_copy, *MADE)
    assert {name for name, digest in prints(run_copy).items() if before[name] != digest} <= {"manifest.json"}


def test_one_fold_through_all_verbs(tmp_path, command, sample, plain, bare_page, monkeypatch):
    seen, shown, loader = {}, [], pipeline.train_loader
    monkeypatch.setattr(
        pipeline,
        "train_loader",
        lambda context, data, rows, *more: (
            seen.update(zip(data.ids(rows), data.patients(rows), strict=True)) or loader(context, data, rows, *more)
        ),
    )
    for verb in ("prepare", "train", "predict", "tune", "score", "submit", "report"):
        result = command(verb, "demo", "--data", sample, "--out", "run", *plain, "--folds", "0")
        assert (result.status, result.errors) == (0, []), verb
        shown.append(result.out)
    run = tmp_path / "run"
    images = pd.read_parquet(run / "images.parquet").set_index("image_id")
    oof = pd.read_parquet(run / "oof.parquet")
    assert set(oof["image_id"]) | set(seen) == set(images.index[images["split"] == "train"])
    assert not set(images.loc[oof["image_id"], "patient_id"]) & set(seen.values())
    assert "nested by halves of the patients" in shown[3] and "mean AUROC out of fold" in shown[4]
    assert not (run / "fold1").exists() and not list(run.glob("*_whole.parquet"))
    assert not (run / "lungs.parquet").exists()
    assert headings(run) == [title for title in SECTIONS if title not in ("Lungs", "Views")]
    # the other fold later, in the same folder: the first is not trained again
    done, test = times(run, "fold0/*/final.safetensors"), predicted(run, "test")
    assert command("run", "--data", sample, "--out", "run", "--folds", "0", "1").status == 0
    assert done == times(run, "fold0/*/final.safetensors") and read_json(run / "score.json")["oof"]["images"] == 16
    both = predicted(run, "test")
    assert command("predict", "--out", "run", "--folds", "1").status == 0  # the test set gets the mean over the folds
    assert both.to_numpy() == pytest.approx((test + predicted(run, "test")).to_numpy() / 2, abs=1e-12)


def test_the_mean_of_both_views_needs_no_training(finished, run_copy, command, sample):
    done = times(run_copy, "fold*/**/*")
    result = command("run", "--data", sample, "--out", "run", "--combine", "mean")
    assert (result.status, result.errors) == (0, []) and done == times(run_copy, "fold*/**/*")
    for name in ("oof", "test"):
        views = [predicted(run_copy, f"{name}_{stage}") for stage in ("whole", "lungs")]
        assert predicted(run_copy, name).to_numpy() == pytest.approx(sum(views).to_numpy() / 2, abs=1e-12)
        assert (run_copy / f"{name}_whole.parquet").read_bytes() == (
            finished / "run" / f"{name}_whole.parquet"
        ).read_bytes()
    assert not predicted(run_copy, "test").equals(predicted(finished / "run", "test"))
    assert command("run", "--data", sample, "--out", "run", "--combine", "fusion").status == 0
    same(finished / "run", run_copy)


def test_the_fused_answer_is_a_layer_over_both_networks_features(finished):
    """Predictions of the run again, by hand: pixels, mask, both pooled features, one linear layer, sigmoid."""
    run = finished / "run"
    values = read_json(run / "config.json")
    config = from_dict(Config, {k: v for k, v in values.items() if k not in ("solution", "preset")}, "config.json")
    steps, images = read_json(run / "manifest.json")["steps"], pd.read_parquet(run / "images.parquet")
    store = Store.open(steps["prepare"]["store"]).images
    lungs = open_lungs(steps["prepare"]["lungs_folder"], steps["prepare"]["lungs"])
    row = int(images.loc[images["fold"] == 1, "row"].iloc[0])
    centre = slice(4, 60)  # 56 of 64 pixels
    mask = cv2.resize(np.load(lungs.masks)[row], (64, 64), interpolation=cv2.INTER_LINEAR)
    views = {"whole": np.stack([store[row], mask]), "lungs": np.load(lungs.crops)[row][None]}
    with torch.inference_mode():
        pooled = [
            load_network(getattr(config, stage), run / "fold1" / stage / "final.safetensors")
            .eval()
            .pooled(torch.from_numpy(np.ascontiguousarray(view[:, centre, centre]))[None])
            for stage, view in views.items()
        ]
        layer = build_fusion(*(part.shape[1] for part in pooled))
        load_weights(run / "fold1" / "fusion" / "final.safetensors", layer)
        logits = torch.cat(pooled, 1) @ layer.weight.T + layer.bias
    found = predicted(run, "oof").loc[images.loc[row, "image_id"]]
    assert found.to_numpy() == pytest.approx(torch.sigmoid(logits)[0].numpy(), abs=1e-5)


def test_podium_on_every_labelled_image_has_nothing_to_submit(tmp_path, command, sample, tiny, bare_page):
    words = [
        "podium",
        "--split",
        "all",
        "--data",
        sample,
        "--out",
        "run",
        *tiny,
        "--n-folds",
        "2",
        "--lungs.size",
        "64",
    ]
    result = command("run", *words)
    assert (result.status, result.errors) == (0, [])
    assert "submit: no test images" in result.out and "--split all holds none back" in result.out
    run = tmp_path / "run"
    assert set(read_json(run / "fold0" / "whole" / "variants.json")["variants"]) == {"ema", "best_k", "best"}
    score = read_json(run / "score.json")
    assert score["test"] is None and score["oof"]["images"] == len(predicted(run, "oof")) > 0
    assert len(pd.read_parquet(run / "test.parquet")) == 0 and not (run / "submission.csv").exists()
    assert set(pd.read_csv(run / "classes.csv")["split"]) == {"oof"}
    assert command("report", "--out", "run").status == 0
    assert "No test images." in (run / "report.html").read_text() and "Out of fold" in headings(run)
    assert "have no labels" in command("table", "run").errors[0] or "no test" in command("table", "run").errors[0]
    assert command("table", "run", "--split", "oof", "--resamples", "20").status == 0


def test_images_without_labels_are_predicted_and_not_scored(tmp_path, run_copy, command, sample, bare_page):
    new = tmp_path / "new"
    new.mkdir()
    for number, path in enumerate(sorted(sample.rglob("*.png"))[:3]):
        shutil.copy(path, new / f"new-{number}.png")
    done = times(run_copy, "fold*/**/*")
    result = command("run", "--data", sample, "--out", "run", "--test", new)
    assert (result.status, result.errors) == (0, []) and done == times(run_copy, "fold*/**/*")
    rows = read_table(run_copy / "submission.csv")
    assert rows["Image Index"].tolist() == ["new-0.png", "new-1.png", "new-2.png"]
    assert predicted(run_copy, "test").stack().between(0, 1).all()
    assert read_json(run_copy / "score.json")["test"] is None
    assert read_json(run_copy / "manifest.json")["steps"]["submit"]["hidden"] is None
    assert command("report", "--out", "run").status == 0
    assert not [title for title in headings(run_copy) if title.startswith("Scores")]
    assert "no labels" in command("table", "run").errors[0]


def test_a_label_that_no_training_image_has_is_left_out_of_the_mean(tmp_path, command, data, plain, bare_page):
    table = data / "Data_Entry_2017.csv"
    text = table.read_text().replace("|Hernia", "").replace("Hernia|", "").replace("Hernia", "No Finding")
    table.unlink()
    table.write_text(text)
    assert command("run", "demo", "--data", data, "--out", "run", *plain).status == 0
    run = tmp_path / "run"
    score, points = read_json(run / "score.json"), pd.read_csv(run / "operating_points.csv").set_index("label")
    assert score["oof"]["classes"] == 13 and np.isnan(points.loc["Hernia", "threshold"])
    assert read_json(run / "tuned.json")["thresholds"]["Hernia"] is None
    assert command("report", "--out", "run").status == 0 and set(headings(run)) >= SCORED


def test_a_test_image_that_cannot_be_read_gets_the_mean_of_the_others(tmp_path, command, data, plain):
    bad = (data / "test_list.txt").read_text().split()[2]
    path = next(data.rglob(bad))
    path.unlink()
    path.write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    words = ["run", "demo", "--data", data, "--out", "run", "--store", "stores", *plain, "--folds", "0"]
    result = command(*words)
    assert result.status == 2 and len(result.errors) == 1 and bad in result.errors[0]
    assert command(*words, "--on-bad-image", "placeholder").status == 0
    rows = read_table(tmp_path / "run" / "submission.csv").set_index("Image Index")[NAMES].astype(float)
    mean = predicted(tmp_path / "run", "oof").mean()
    assert rows.loc[bad].to_numpy() == pytest.approx(mean.to_numpy(), rel=1e-5)
    assert (rows.drop(bad) != rows.loc[bad]).any(axis=1).all()


# ---- broken off ----------------------------------------------------------------------------------------------------


def test_a_run_that_is_broken_off_in_every_step_continues_to_the_same_bytes(
    finished, run_copy, command, sample, tiny, monkeypatch
):
    shutil.rmtree(run_copy / "fold1")
    for name in ("oof.parquet", "tuned.json", "submission.csv"):
        (run_copy / name).unlink()
    words = ["run", "demo", "--views", "both", "--data", sample, "--out", "run", *tiny]
    for owner in (
        (data_module, "save_folds"),
        (loop._Trainer, "finish"),
        (pipeline, "pooled_features"),
        (training.FeatureLoader, "__iter__"),
        (pipeline, "predict_view"),
        (pipeline, "write_csv"),
        (pipeline, "class_table"),
        (pipeline, "validate_probabilities"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*owner, broken)
            assert command(*words).status == 130, owner
    assert command(*words).status == 0
    same(finished / "run", run_copy)


def test_a_fusion_killed_in_its_second_epoch_continues_to_the_same_weights(
    finished, run_copy, command, sample, monkeypatch
):
    shutil.rmtree(run_copy / "fold0" / "fusion")
    train_epoch, begun = loop._Trainer.train_epoch, []

    def dies(trainer):
        begun.append(trainer.epoch)
        return broken() if trainer.epoch == 1 else train_epoch(trainer)

    done = times(run_copy, "fold*/whole/*", "fold*/lungs/*", "fold1/**/*")
    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "train_epoch", dies)
        assert command("train", "--out", "run").status == 130
    assert begun == [0, 1] and (run_copy / "fold0" / "fusion" / "last.ckpt").is_file()
    assert "fold 0 is not trained" in command("predict", "--out", "run").errors[0]
    result = command("run", "--data", sample, "--out", "run")
    assert result.status == 0 and "epoch 1/3" not in result.out and "epoch 2/3" in result.out
    assert done == times(run_copy, "fold*/whole/*", "fold*/lungs/*", "fold1/**/*")
    same(finished / "run", run_copy)


def test_a_run_out_of_time_says_so_and_ends_with_3(run_copy, command, sample):
    shutil.rmtree(run_copy / "fold1" / "lungs")
    result = command("run", "--data", sample, "--out", "run", "--hours", "0.000001")
    assert result.status == 3 and "the same command continues" in result.out


# ---- what was made from what ---------------------------------------------------------------------------------------


def test_stale_results_are_not_shown(run_copy, command, bare_page, monkeypatch):
    assert command("report", "--out", "run").status == 0 and set(headings(run_copy)) >= SCORED
    for option in (["--tta", "flip"], ["--combine", "mean"], ["--folds", "0"]):
        assert command("report", "--out", "run", *option).status == 0
        assert not SCORED & set(headings(run_copy)), option
    assert "The score is out of date" in (run_copy / "report.html").read_text()
    assert "run the verb `predict`" in command("submit", "--out", "run", "--tta", "flip").errors[0]
    monkeypatch.setattr(pipeline, "predict_view", broken)
    assert command("predict", "--out", "run", "--tta", "flip").status == 130
    assert command("report", "--out", "run").status == 0 and not SCORED & set(headings(run_copy))


def test_maps_are_shown_as_long_as_they_are_of_these_networks(run_copy, command, bare_page):
    assert command("localise", "run", "--threshold", "0.5").status == 0
    assert command("report", "--out", "run").status == 0 and "Localisation" in headings(run_copy)
    assert command("report", "--out", "run", "--combine", "mean").status == 0
    assert "Localisation" not in headings(run_copy)
    shutil.rmtree(run_copy / "fold0" / "fusion")
    assert command("train", "--out", "run", "--fusion.lr", "0.1", "--folds", "0").status == 0
    assert command("report", "--out", "run").status == 0
    assert not {*SCORED, "Localisation"} & set(headings(run_copy))
    assert "The score is out of date" in (run_copy / "report.html").read_text()


def test_flips_at_test_time_are_predicted_tuned_and_shown(run_copy, finished, command, bare_page):
    for verb in ("predict", "tune", "score"):
        assert command(verb, "--out", "run", "--tta", "flip").status == 0
    assert not predicted(run_copy, "test").equals(predicted(finished / "run", "test"))
    assert command("report", "--out", "run").status == 0
    assert "Submission" not in headings(run_copy) and "Out of fold" in headings(run_copy)


@pytest.mark.parametrize("verb", ["train", "predict", "tune", "score", "submit", "report"])
def test_verbs_before_prepare(verb, tmp_path, refused):
    assert "not prepared" in refused(verb, "demo", "--out", "run")
    assert not (tmp_path / "run").exists()


def test_verbs_out_of_order(run_copy, refused):
    manifest = read_json(run_copy / "manifest.json")
    prepared = {"prepare": manifest["steps"]["prepare"]}
    (run_copy / "manifest.json").write_text(json.dumps({**manifest, "steps": prepared}))
    for verb in ("tune", "score", "submit"):
        assert "run the verb `predict`" in refused(verb, "--out", "run")
    assert "no predictions" in refused("table", "run") and "no predictions" in refused("localise", "run")
    (run_copy / "fold1" / "fusion" / "final.safetensors").unlink()
    for verb in ("predict", "tune", "submit"):
        assert "fold 1 is not trained" in refused(verb, "--out", "run")


def test_another_training_is_refused_and_loses_nothing(run_copy, refused, sample):
    before = prints(run_copy, but=["manifest.json"])
    for option in (
        "--whole.lr 0.1",
        "--lungs.lr 0.1",
        "--fusion.lr 0.1",
        "--n-folds 3",
        "--store-size 128",
        "--views whole",
        "--split all",
    ):
        line = refused("run", "--data", sample, "--out", "run", *option.split())
        assert "run/fold0/" in line and "another" in line, line
        assert prints(run_copy, but=["manifest.json"]) == before, option


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--n-folds 3", "prepared with --n-folds 2"),
        ("--seed 1", "prepared with --seed 0"),
        ("--store-size 128", "prepared with --store-size 64"),
        ("--split all", "prepared with --split official"),
        ("--segmenter.mask-size 32", "prepared with another segmenter, mask_size or crop_size"),
        ("--segmenter.weights nowhere.pt", "nowhere.pt: no such file (--segmenter.weights)"),
        ("--whole.resize 128", "store_size 64 is under the 128 px"),
        ("--whole.size 65", "must lie between 32 and"),
        ("--lungs.resize 128", "crop_size 64 is under the 128 px"),
        ("--lungs.weighting True", "has no mask"),
        ("--folds 0 2", "name some of 0 to 1"),
        ("--seed -1", "seed must be at least 0"),
        ("--views none", "views"),
        ("--tta rotate", "tta"),
        ("--combine max", "combine"),
        ("--data nowhere", "prepared with another --data"),
        ("--backbone resnet50", "backbone"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options, said, run_copy, command):
    before = prints(run_copy)
    result = command("tune", "--out", "run", *options.split())
    assert result.status == 2 and len(result.errors) == 1 and said in result.errors[0], result
    assert {name for name, digest in prints(run_copy).items() if before[name] != digest} <= {"manifest.json"}


def test_no_data(tmp_path, refused):
    assert "nowhere" in refused("run", "demo", "--data", "nowhere", "--out", "run")
    (tmp_path / "empty").mkdir()
    assert "Data_Entry_2017.csv" in refused("run", "demo", "--data", "empty", "--out", "run")
    assert not (tmp_path / "run").exists()


def test_options_of_prepare_that_cannot_be(tmp_path, refused, sample, plain):
    words = ["prepare", "demo", "--data", sample, "--out", "run", *plain]
    line = refused(*words, "--test", sample / "test_list.txt")  # its first line would be lost as a header
    assert "test_list.txt, row 1: " in line and "is an image; a header is wanted above it (--test)" in line
    assert "--id-map: the label table names the patients" in refused(*words, "--id-map", sample / "test_list.txt")
    (tmp_path / "empty").mkdir()
    assert "empty: no images in it (--test)" in refused(*words, "--test", "empty")


@pytest.mark.parametrize("name", ["classes.csv", "operating_points.csv", "submission.csv"])
def test_a_damaged_table_is_named(name, run_copy, refused, bare_page):
    (run_copy / name).write_text("")
    assert f"run/{name}: damaged" in refused("report", "--out", "run")


# ---- beside the recipe ---------------------------------------------------------------------------------------------


def test_anybodys_tools_agree_with_the_run(finished, command, sample):
    run, labels = finished / "run", sample / "Data_Entry_2017.csv"
    found = read_json(run / "score.json")["test"]["mean"]["estimate"]
    scored = command("score", run / "submission.csv", "--labels", labels, "--resamples", "20")
    assert (scored.status, scored.errors) == (0, []) and f"mean AUROC {found:.4f}" in scored.out
    table = command("table", run, "--resamples", "20", "--out", "table.csv")
    assert (table.status, table.errors) == (0, []) and f"{found:.4f}" in table.out
    rows = pd.read_csv("table.csv")
    assert rows["run"].unique().tolist() == ["run: whole", "run: lungs", "run"]


def test_the_page_of_a_run_in_a_browser(finished):
    browser.chromium()
    run = finished / "run"
    assert headings(run) == SECTIONS
    for width in (1200, 390):
        broken, overflow, images = browser.probe(run / "report.html", width, 900)
        assert (broken, overflow) == (0, 0) and images > 0
    assert browser.screenshot(run / "report.html", 1200, 900).std() > 5
