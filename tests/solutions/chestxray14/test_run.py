"""Whole runs at the smallest size: what they leave, what a second one does again, and what is refused."""

import json
import re
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from common import network
from common.config import from_dict
from common.data.store import Store
from common.paths import read_json
from common.report import class_plots, plots
from common.runs import Run
from common.submit.table import read_table
from common.submit.validate import validate_probabilities
from solutions.chestxray14 import report
from solutions.chestxray14.config import LABELS, Config
from solutions.chestxray14.pipeline import fold_networks
from tests import browser
from tests.running import hash_files, write_times

NAMES = list(LABELS)
VIEWS = ("", "_whole", "_lungs")
SECTIONS = [
    "Data",
    "Lungs",
    "Out of fold",
    "Scores on 6 images of the test list, which is not the whole official one",
    "Operating points and calibration",
    "Subgroups",
    "Worst errors",
    "Pictures",
    "Training",
    "Submission",
    "This run",
]
SCORED = set(SECTIONS[2:]) - {"Training", "This run"}  # of a run of one view


def predicted(run, name):
    return pd.read_parquet(run / f"{name}.parquet").set_index("image_id")[NAMES]


def mean_auroc(truth, probs):
    """By scikit-learn, over the labels that have images of both kinds; and how many these are."""
    known = [label for label in NAMES if truth[label].nunique() == 2]
    return np.mean([roc_auc_score(truth[label], probs[label]) for label in known]), len(known)


@pytest.fixture
def bare_page(monkeypatch):
    """Reports without plots and pictures, which take the longest."""
    for name in ("histogram", "score_with_interval", "learning_curves"):
        monkeypatch.setattr(plots, name, lambda *args, **options: None)
    for name in ("roc_panels", "reliability_panels"):
        monkeypatch.setattr(class_plots, name, lambda *args, **options: None)
    monkeypatch.setattr(report, "gallery", lambda *args, **options: "pictures")


def headings(run):
    text = (run / "report.html").read_text()
    return [title for title in re.findall(r"<h2>([^<]*)</h2>", text) if title != "What to try next"]


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
    assert [name for name in steps if " " not in name] == ["prepare", "predict", "tune", "submit"]
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
    thresholds, oof = read_json(run / "tuned.json")["thresholds"], predicted(run, "oof")
    for label in ("Infiltration", "Atelectasis"):  # no other threshold has a higher index
        false_rate, true_rate, _ = roc_curve(truth.loc[oof.index, label], oof[label])
        called, positive = oof[label] >= thresholds[label], truth.loc[oof.index, label] == 1
        assert called[positive].mean() - called[~positive].mean() == pytest.approx((true_rate - false_rate).max())


def test_no_patient_is_on_both_sides_of_a_fold(finished, tmp_path, command, sample, plain, bare_page, monkeypatch):
    """One view, one fold: the table of each view and the lungs are left out, the fold's patients were not seen."""
    seen, loader = {}, network.train_loader

    def note_patients(job, net, rows):
        seen.update(zip(job.images.ids(rows), job.images.patients(rows), strict=True))
        return loader(job, net, rows)

    monkeypatch.setattr(network, "train_loader", note_patients)
    words = ["run", "demo", "--data", sample, "--out", "run", *plain]
    result = command(*words, "--folds", "0")
    assert (result.status, result.errors) == (0, []) and "mean AUROC out of fold" in result.out
    run = tmp_path / "run"
    images = pd.read_parquet(run / "images.parquet").set_index("image_id")
    oof = pd.read_parquet(run / "oof.parquet")
    assert set(oof["image_id"]) | set(seen) == set(images.index[images["split"] == "train"])
    assert not set(images.loc[oof["image_id"], "patient_id"]) & set(seen.values())
    assert not (run / "fold1").exists() and not list(run.glob("*_whole.parquet"))
    assert not (run / "lungs.parquet").exists()
    assert command("report", "--out", "run").status == 0
    assert headings(run) == [title for title in SECTIONS if title != "Lungs"]
    # the test set gets the mean over the folds
    test = predicted(run, "test")
    assert command(*words, "--folds", "0", "1").status == 0
    both = predicted(run, "test")
    assert command("predict", "--out", "run", "--folds", "1").status == 0
    assert both.to_numpy() == pytest.approx((test + predicted(run, "test")).to_numpy() / 2, abs=1e-12)


def test_the_mean_of_both_views_needs_no_training(finished, run_copy, command, sample):
    done = write_times(run_copy, "fold*/**/*")
    result = command("run", "--data", sample, "--out", "run", "--combine", "mean")
    assert (result.status, result.errors) == (0, []) and done == write_times(run_copy, "fold*/**/*")
    for name in ("oof", "test"):
        views = [predicted(run_copy, f"{name}_{stage}") for stage in ("whole", "lungs")]
        assert predicted(run_copy, name).to_numpy() == pytest.approx(sum(views).to_numpy() / 2, abs=1e-12)
        assert (run_copy / f"{name}_whole.parquet").read_bytes() == (
            finished / "run" / f"{name}_whole.parquet"
        ).read_bytes()
    assert not predicted(run_copy, "test").equals(predicted(finished / "run", "test"))


def test_the_fused_answer_is_a_layer_over_both_networks_features(finished):
    """Predictions of the run again, by hand: pixels, mask, both pooled features, one linear layer, sigmoid."""
    run = finished / "run"
    values = read_json(run / "config.json")
    config = from_dict(Config, {k: v for k, v in values.items() if k not in ("solution", "preset")}, "config.json")
    record, images = read_json(run / "manifest.json")["steps"]["prepare"], pd.read_parquet(run / "images.parquet")
    store, arrays = Store.open(record["store"]).images, {name: np.load(path) for name, path in record["arrays"].items()}
    row = int(images.loc[images["fold"] == 1, "row"].iloc[0])
    centre = slice(4, 60)  # 56 of 64 pixels
    mask = cv2.resize(arrays["masks"][row], (64, 64), interpolation=cv2.INTER_LINEAR)
    views = {"whole": np.stack([store[row], mask]), "lungs": arrays["crops"][row][None]}
    networks = {one.stage: one.load(Run(run)).eval() for one in fold_networks(config, 1)}
    with torch.inference_mode():
        pooled = [
            networks[stage].pooled(torch.from_numpy(np.ascontiguousarray(view[:, centre, centre]))[None])
            for stage, view in views.items()
        ]
        layer = networks["fusion"]
        logits = torch.cat(pooled, 1) @ layer.weight.T + layer.bias
    found = predicted(run, "oof").loc[images.loc[row, "image_id"]]
    assert found.to_numpy() == pytest.approx(torch.sigmoid(logits)[0].numpy(), abs=1e-5)


@pytest.mark.long  # the split has tests of its own, and the preset's settings too
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
        "--folds",
        "0",
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
    done = write_times(run_copy, "fold*/**/*")
    result = command("run", "--data", sample, "--out", "run", "--test", new)
    assert (result.status, result.errors) == (0, []) and done == write_times(run_copy, "fold*/**/*")
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
    assert read_json(run / "score.json")["oof"]["classes"] == 13
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


# ---- what is shown and refused --------------------------------------------------------------------------------------


def test_maps_are_shown_as_long_as_they_are_of_these_networks(run_copy, command, bare_page):
    assert command("localise", "run", "--threshold", "0.5").status == 0
    assert command("report", "--out", "run").status == 0 and {"Localisation", *SCORED} <= set(headings(run_copy))
    assert command("report", "--out", "run", "--combine", "mean").status == 0
    assert not {"Localisation", *SCORED} & set(headings(run_copy))
    manifest = read_json(run_copy / "manifest.json")
    del manifest["steps"]["predict"]
    (run_copy / "manifest.json").write_text(json.dumps(manifest))
    for tool in ("table", "localise"):
        assert "`predict`" in command(tool, "run").errors[0]


def test_flips_at_test_time_are_predicted_tuned_and_shown(run_copy, finished, command, bare_page):
    for verb in ("predict", "tune", "score"):
        assert command(verb, "--out", "run", "--tta", "flip").status == 0
    assert not predicted(run_copy, "test").equals(predicted(finished / "run", "test"))
    assert command("report", "--out", "run").status == 0
    assert "Submission" not in headings(run_copy) and "Out of fold" in headings(run_copy)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--split all", "prepared with --split official"),
        ("--segmenter.mask-size 32", "prepared with --segmenter.mask-size 16, not 32"),
        ("--views whole", "prepared with --segmenter.crop-size 64, not None"),
        ("--segmenter.weights nowhere.pt", "nowhere.pt: no such file (--segmenter.weights)"),
        ("--whole.resize 128", "store_size 64 is under the 128 px"),
        ("--whole.size 65", "must lie between 32 and"),
        ("--lungs.resize 128", "crop_size 64 is under the 128 px"),
        ("--lungs.weighting True", "has no mask"),
        ("--views none", "views"),
        ("--tta rotate", "tta"),
        ("--combine max", "combine"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options, said, run_copy, command):
    before = hash_files(run_copy)
    result = command("tune", "--out", "run", *options.split())
    assert result.status == 2 and len(result.errors) == 1 and said in result.errors[0], result
    assert {name for name, digest in hash_files(run_copy).items() if before[name] != digest} <= {"manifest.json"}


def test_options_of_prepare_that_cannot_be(tmp_path, refused, sample, plain):
    words = ["prepare", "demo", "--data", sample, "--out", "run", *plain]
    assert "--id-map does not apply to chestxray14" in refused(*words, "--id-map", sample / "test_list.txt")


# ---- beside the recipe ---------------------------------------------------------------------------------------------


def test_anybodys_tools_agree_with_the_run(finished, command, sample):
    run, labels = finished / "run", sample / "Data_Entry_2017.csv"
    found = read_json(run / "score.json")["test"]["mean"]["estimate"]
    scored = command("score_predictions", run / "submission.csv", "--labels", labels, "--resamples", "20")
    assert (scored.status, scored.errors) == (0, []) and f" {found:.4f} [" in scored.out
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
