"""Whole runs at the smallest size: what they leave, and what becomes of images without usable lungs."""

import re
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from common.config import from_dict
from common.data.store import Store
from common.paths import read_json
from common.submit.table import read_table
from common.submit.validate import validate_probabilities
from common.train.checkpoint import load_weights
from solutions.covid19.config import Config
from solutions.covid19.data import SAMPLE
from solutions.covid19.models import build_network
from solutions.covid19.sample import make_sample
from tests.running import hash_files, write_times

CHECKS = ("image", "border", "background")  # those that so small a sample can be asked
SECTIONS = [
    "Audit",
    "Rates by fold",
    "Out of fold",
    "Worst errors",
    "Data",
    "Lungs",
    "Augmentation",
    "Training",
    "Submission",
    "This run",
]


def headings(run):
    text = (run / "report.html").read_text()
    return [title for title in re.findall(r"<h2>([^<]*)</h2>", text) if title != "What to try next"]


def verdict(run):
    """The first note of the page below the one about synthetic images, above all sections."""
    return re.findall(r'<aside class="note (\w+)"[^>]*>([^<]*)<', (run / "report.html").read_text())[1]


def known(run):
    """The predictions out of fold with what is known of each image."""
    oof, images = (pd.read_parquet(run / f"{name}.parquet") for name in ("oof", "images"))
    return oof.merge(images.drop(columns="fold"), on="image_id", validate="one_to_one")


# ---- a run and its repetition --------------------------------------------------------------------------------------


def test_a_run_leaves_predictions_of_every_image_and_a_valid_submission(finished, sample):
    run = finished / "run"
    images, selection = pd.read_parquet(run / "images.parquet"), read_table(run / "selection.csv")
    listed = read_table(sample / "metadata.csv")["filename"].tolist()
    listed += pd.read_csv(sample / "normals" / "Data_Entry_2017.csv", index_col=False)["Image Index"].tolist()
    assert selection["file_name"].tolist() == listed
    assert ((selection["reason"] == "") == (selection["kept"] == "True")).all()
    used = images[images["fold"] >= 0].set_index("image_id")
    assert sorted(used.index) == sorted(selection.loc[selection["kept"] == "True", "image_id"])
    assert used.groupby(["role", "label"]).size().to_dict() == {("main", 1): 12, ("main", 0): 12, ("same_source", 0): 4}
    assert (used.groupby("patient_id")["fold"].nunique() == 1).all() and set(used["fold"]) == {0, 1}

    oof, test = (pd.read_parquet(run / f"{name}.parquet") for name in ("oof", "test"))
    assert sorted(oof["image_id"]) == sorted(used.index)
    assert (oof["fold"].to_numpy() == used.loc[oof["image_id"], "fold"].to_numpy()).all()
    assert test["image_id"].tolist() == images.loc[images["split"] == "test", "image_id"].tolist()
    for table in (oof, test):
        assert list(table.columns) == ["image_id", "fold", "probability"] and table["probability"].dtype == "f8"
        assert table["probability"].between(0, 1).all() and table["probability"].nunique() > 1

    assert validate_probabilities(run / "submission.csv", run / "sample_submission.csv", ordered=True).rows == 4
    rows, wanted = read_table(run / "submission.csv"), read_table(sample / "sample_submission.csv")
    assert list(rows.columns) == SAMPLE and rows["filename"].tolist() == wanted["filename"].tolist()
    assert rows["probability"].astype(float).to_numpy() == pytest.approx(test["probability"].to_numpy(), rel=1e-5)
    copies = list((finished / "submissions").glob("covid19-run-*.csv"))
    assert [path.read_bytes() for path in copies] == [(run / "submission.csv").read_bytes()]
    steps = read_json(run / "manifest.json")["steps"]
    assert {"prepare", "predict", "tune", "submit", "audit"} <= set(steps)
    truth = read_table(sample / "hidden_test.csv").set_index("filename")["label"].astype(int)
    hidden = roc_auc_score(truth[rows["filename"]], rows["probability"].astype(float))
    assert steps["submit"]["hidden"] == {"metric": "auroc", "value": pytest.approx(hidden), "nothing": 0.5}
    assert not list(run.rglob("last.ckpt")) and not list(finished.rglob(".*tmp*"))


def test_the_scores_are_those_of_scikit_learn(finished):
    run = finished / "run"
    score, oof = read_json(run / "score.json"), known(run)
    main, home = oof[oof["role"] == "main"], oof[oof["home"]]
    assert score["auroc"]["estimate"] == pytest.approx(roc_auc_score(main["label"], main["probability"]))
    same_source = roc_auc_score(home["label"], home["probability"])
    assert score["same_source"]["auroc"]["estimate"] == pytest.approx(same_source)
    fall = score["auroc"]["estimate"] - same_source
    assert score["same_source"]["fall"]["estimate"] == pytest.approx(fall)
    assert (score["images"], score["same_source"]["negatives"], score["same_source"]["trained_on"]) == (24, 4, False)
    tuned = read_json(run / "tuned.json")
    rules = {"0.5": np.full(24, 0.5), "tuned": main["fold"].astype(str).map(tuned["by_fold"]).str[0].to_numpy(float)}
    folds = pd.read_csv(run / "per_fold.csv")
    assert folds["fold"].tolist() == [0, 1]
    for rule, part in ((rule, score if rule == "0.5" else score["tuned"]) for rule in rules):
        called = main["probability"].to_numpy() >= rules[rule]
        assert part["accuracy"]["estimate"] == pytest.approx(accuracy_score(main["label"], called))
        assert part["sensitivity"]["estimate"] == pytest.approx(recall_score(main["label"], called))
        assert part["specificity"]["estimate"] == pytest.approx(recall_score(1 - main["label"], ~called))
    counts = folds[["tp", "fn", "tn", "fp"]].sum()
    assert counts["tp"] + counts["fn"] == counts["tn"] + counts["fp"] == 12
    assert counts["tp"] == ((main["probability"] >= 0.5) & (main["label"] == 1)).sum()


def test_a_prediction_again_by_hand(finished):
    """Pixels, lungs, the network of the image's fold, sigmoid."""
    run = finished / "run"
    values = read_json(run / "config.json")
    config = from_dict(Config, {k: v for k, v in values.items() if k not in ("solution", "preset")}, "config.json")
    prepare, oof = read_json(run / "manifest.json")["steps"]["prepare"], known(run)
    row = oof[oof["fold"] == 1].iloc[0]
    image = Store.open(prepare["store"]).images[row["row"]]
    mask = np.load(prepare["arrays"]["masks"])[row["row"]]
    assert mask.mean() == pytest.approx(row["area"]) and row["area"] >= config.lungs.gate
    model = build_network(config.network, "none").eval()
    load_weights(run / "fold1" / "covid" / "final.safetensors", model)
    with torch.inference_mode():
        logit = model(torch.from_numpy(image * mask)[None, None]).item()
    assert row["probability"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)


def test_the_audit_of_a_run(finished):
    run = finished / "run"
    found, answers = read_json(run / "audit.json"), pd.read_parquet(run / "audit.parquet")
    assert list(found["checks"]) == [*CHECKS, "origin", "view"] and found["folds"] == [0, 1]
    assert [found["checks"][check]["epochs"] for check in CHECKS] == [2, 1, 1]  # the first is trained like the run
    assert found["checks"]["origin"]["auroc"] is None and "skipped" in found["checks"]["origin"]["said"]
    main = known(run).query("role == 'main'").set_index("image_id")
    for check in CHECKS:
        part = answers[answers["check"] == check].set_index("image_id")
        assert sorted(part.index) == sorted(main.index)
        assert (part["label"] == main.loc[part.index, "label"]).all()
        assert (part["fold"] == main.loc[part.index, "fold"]).all()
        auroc = found["checks"][check]["auroc"]
        assert auroc["estimate"] == pytest.approx(roc_auc_score(part["label"], part["probability"]))
        assert (found["checks"][check]["images"], found["checks"][check]["positives"]) == (24, 12)
    focus = pd.read_parquet(run / "focus.parquet")
    assert focus.groupby("view").size().to_dict() == {"image": 12, "lungs": 12}
    assert (focus.set_index("image_id")["area"] == main.loc[focus["image_id"], "area"]).all()
    assert found["focus"]["lungs"]["area"] == pytest.approx(main.query("label == 1")["area"].mean())
    assert found["biased"] == bool(found["evidence"])
    stages = {path.parent.relative_to(run).as_posix() for path in run.rglob("final.safetensors")}
    asked = [f"audit-{check}" for check, part in found["checks"].items() if part["auroc"]]
    assert stages == {f"fold{k}/{stage}" for k in (0, 1) for stage in ("covid", *asked)}


def test_the_page_begins_with_the_verdict(finished):
    run = finished / "run"
    found = read_json(run / "audit.json")
    assert headings(run) == SECTIONS
    assert verdict(run) == ("warning" if found["biased"] else "info", found["said"].replace("'", "&#x27;"))


def test_one_fold_through_all_verbs_and_the_other_later(tmp_path, finished, command, sample, tiny):
    shown = []
    for verb in ("prepare", "train", "predict", "tune", "score", "submit"):
        words = [verb, "demo", "--data", sample, "--out", "run", *tiny, "--folds", "0"]
        result = command(*words)
        assert (result.status, result.errors) == (0, []), verb
        shown.append(result.out)
    run = tmp_path / "run"
    assert "auroc" in shown[3] and "AUROC" in shown[4] and "valid submission" in shown[5]
    assert not (run / "fold1").exists() and set(known(run)["fold"]) == {0}
    assert "holds out none of them" in command("audit", "--out", "run", "--audit.folds", "1").errors[0]
    done, test = write_times(run, "fold0/*/final.safetensors"), pd.read_parquet(run / "test.parquet")["probability"]
    assert command("run", "--data", sample, "--out", "run", "--folds", "0", "1").status == 0
    assert done == write_times(run, "fold0/*/final.safetensors")
    for name in ("oof.parquet", "test.parquet", "submission.csv", "score.json", "fold1/covid/final.safetensors"):
        assert (run / name).read_bytes() == (finished / "run" / name).read_bytes(), name
    both = pd.read_parquet(run / "test.parquet")["probability"]  # the test set gets the mean over the folds
    assert command("predict", "--out", "run", "--folds", "1").status == 0
    other = pd.read_parquet(run / "test.parquet")["probability"]
    assert both.to_numpy() == pytest.approx((test + other).to_numpy() / 2, abs=1e-7)


def test_images_to_predict_that_are_named(tmp_path, finished, run_copy, command, quick_lungs, sample, tiny):
    new = tmp_path / "new"
    new.mkdir()
    for number, path in enumerate(sorted((sample / "images").iterdir())[:3]):
        shutil.copy(path, new / f"new-{number}{path.suffix}")
    cv2.imwrite(str(new / "nothing.png"), np.full((80, 80), 7, np.uint8))
    words = ["prepare", "demo", "--data", sample, "--out", "other", *tiny]
    result = command(*words, "--test", new)
    assert result.status == 4 and "1 of the inputs could not be used" in result.errors[0]
    images = pd.read_parquet(tmp_path / "other" / "images.parquet")
    tests = images[images["split"] == "test"].set_index("file_name")
    assert sorted(tests.index) == sorted(path.name for path in new.iterdir())
    assert not tests.loc["nothing.png", "usable"] and tests.loc["nothing.png", "ok"]
    assert "its patient is left out of training" in result.out  # the copies of what would be trained on
    assert "was trained on other images" in command("run", "--data", sample, "--out", "run", "--test", new).errors[0]
    assert hash_files(run_copy) == hash_files(finished / "run")


def test_a_test_image_without_lungs_gets_the_mean_of_the_others(finished, tmp_path, run_copy, command, data):
    """So does one that cannot be read, and a colour picture, which is no radiograph."""
    names = read_table(data / "unlabelled_test.csv")["filename"].tolist()
    hue = np.dstack([np.tile(np.linspace(0, 179, 200), (200, 1)), np.full((200, 200), 200), np.full((200, 200), 180)])
    photo = cv2.imencode(".png", cv2.cvtColor(hue.astype(np.uint8), cv2.COLOR_HSV2BGR))[1].tobytes()
    for name, content in ((names[1], b"\x89PNG\r\n\x1a\nbut no more"), (names[3], photo)):
        (data / "images" / name).unlink()
        (data / "images" / name).write_bytes(content)
    words = ["run", "--data", data, "--out", "run", "--store", "stores"]
    result = command(*words)
    assert result.status == 2 and len(result.errors) == 1 and names[1] in result.errors[0]
    assert hash_files(run_copy) == hash_files(finished / "run")
    result = command(*words, "--on-bad-image", "placeholder")
    assert result.status == 4 and "2 test images without usable lungs get the mean probability" in result.out
    assert read_table(run_copy / "left_out.csv")["file"].tolist() == [names[1], names[3]]
    rows = read_table(run_copy / "submission.csv").set_index("filename")["probability"].astype(float)
    mean = known(run_copy)["probability"].mean()
    assert rows[[names[1], names[3]]].to_numpy() == pytest.approx([mean] * 2, rel=1e-5)
    assert rows[names[0]] != pytest.approx(mean, rel=1e-5) and rows.index.tolist() == names
    assert pd.read_parquet(run_copy / "test.parquet").shape[0] == 2


@pytest.mark.long
def test_nothing_to_predict(run_copy, command, data):
    (data / "unlabelled_test.csv").unlink()
    result = command("run", "--data", data, "--out", "run")
    assert (result.status, result.errors) == (0, []) and "submit: no test images; --test names some" in result.out
    assert len(pd.read_parquet(run_copy / "test.parquet")) == 0


def test_another_decision_about_the_audit_needs_no_training(run_copy, command):
    done = write_times(run_copy, "fold*/**/*", "score.json")
    (run_copy / "report.html").unlink()
    result = command("audit", "--out", "run", "--audit.high", "0.99", "--audit.checks", "border")
    assert (result.status, result.errors) == (0, []) and done == write_times(run_copy, "fold*/**/*", "score.json")
    assert list(read_json(run_copy / "audit.json")["checks"]) == ["border"]
    assert read_json(run_copy / "config.json")["audit"]["high"] == 0.99  # what the page is drawn by
    result = command("audit", "--out", "run")
    assert "audit: up to date" in result.out


# ---- longer --------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("preset", ["paper", "podium"])
def test_presets_at_tiny_size(preset, tmp_path, finished, command, sample, tiny):
    words = [preset, "--data", sample, "--out", "run", *tiny]
    words += ["--n-folds", "3", "--folds", "0", "1", "2"]
    result = command("run", *words)
    assert (result.status, result.errors) == (0, [])
    assert command("audit", "--out", "run").status == 0
    config, score = (read_json(tmp_path / "run" / f"{name}.json") for name in ("config", "score"))
    assert config["preset"] == preset and score["same_source"]["trained_on"] == (preset == "podium")
    assert command("report", "--out", "run").status == 0 and headings(tmp_path / "run") == SECTIONS


@pytest.mark.long
@pytest.mark.parametrize("view", ["lungs", "image"])
def test_the_whole_image_as_the_run_s_view(view, tmp_path, finished, command, sample, tiny):
    words = ["demo", "--data", sample, "--out", "run", *tiny, "--view", view]
    assert command("run", *words).status == 0 and command("audit", "--out", "run").status == 0
    found = read_json(tmp_path / "run" / "audit.json")
    assert set(found["focus"]) == {"image", "lungs"}
    said = "a network that sees the whole image" if view == "lungs" else "a network that sees only the lungs"
    assert found["checks"]["image"]["said"] == f"COVID-19 by {said}"


@pytest.mark.long
@pytest.mark.parametrize("marker", [True, False])
def test_the_audit_finds_the_planted_marker_and_nothing_in_the_clean_sample(marker, tmp_path, command):
    sample = make_sample(tmp_path / "data", marker=marker)
    words = ["run", "demo", "--data", sample, "--out", "run", "--network.size", "64", "--store-size", "64"]
    words += ["--network.epochs", "4", "--audit.epochs", "12", "--n-folds", "2", "--folds", "0", "1"]
    assert command(*words).status == 0
    assert command("audit", "--out", "run").status == 0
    assert command("report", "--out", "run").status == 0
    found = read_json(tmp_path / "run" / "audit.json")
    assert found["biased"] is marker, found["said"]
    assert all(part["auroc"] for part in found["checks"].values())  # everything was asked
    kind, said = verdict(tmp_path / "run")
    assert (kind, said.startswith("Do not trust the score")) == (("warning", True) if marker else ("info", False))
