"""Whole runs at the smallest size: what they leave, and what is refused."""

import re

import numpy as np
import pandas as pd
import pytest

from common.metrics.detection import evaluate
from common.paths import read_json
from common.post.boxes import BOX
from common.report import detection_plots, plots
from common.submit.validate import validate_boxes
from solutions.vinbigdata.config import CLASSES, NO_FINDING
from solutions.vinbigdata.postprocess import parse_predictions
from tests import browser
from tests.running import hash_files

SECTIONS = (
    "Data",
    "Classes",
    "Decision",
    "Healthy or not (2CC)",
    "Worst errors",
    "Pictures",
    "Training",
    "Submission",
    "This run",
)


def truth_of(images, boxes):
    """What the metric compares with, from the tables alone."""
    train = images[images["split"] == "train"]
    healthy = train.loc[train["abnormal"] == 0, ["image_id"]]
    healthy = healthy.assign(class_id=NO_FINDING, x_min=0.0, y_min=0.0, x_max=1.0, y_max=1.0)
    return train, pd.concat([boxes[["image_id", "class_id", *BOX]], healthy], ignore_index=True)


def by_content(table):
    columns = ["image_id", "class_id", "score", *BOX]
    return table[columns].sort_values(columns, ignore_index=True)


@pytest.fixture
def bare_page(monkeypatch):
    """Reports without plots, which take the longest."""
    for name in ("location_maps", "pr_curves", "bars", "curves"):
        monkeypatch.setattr(detection_plots, name, lambda *args: None)
    for name in ("histogram", "score_with_interval", "threshold_surface", "learning_curves"):
        monkeypatch.setattr(plots, name, lambda *args, **options: None)


def headings(run):
    text = (run / "report.html").read_text()
    return [title for title in re.findall(r"<h2>([^<]*)</h2>", text) if title != "What to try next"]


def test_a_run_leaves_tables_of_boxes_a_valid_submission_and_a_score(finished, sample):
    run = finished / "run"
    images = pd.read_parquet(run / "images.parquet")
    train = images[images["split"] == "train"]
    sizes = images.set_index("image_id")[["width", "height"]]
    for name, split in (("oof", "train"), ("test", "test")):
        boxes, healthy = pd.read_parquet(run / f"{name}.parquet"), pd.read_parquet(run / f"{name}_healthy.parquet")
        ids = images.loc[images["split"] == split, "image_id"]
        assert set(boxes["image_id"]) <= set(ids) and sorted(healthy["image_id"]) == sorted(ids)
        assert set(boxes["member"]) == {"flip", "noise"} and set(boxes["fold"]) == {0, 1}
        limits = sizes.loc[boxes["image_id"]].to_numpy()
        assert (boxes[BOX].to_numpy() >= 0).all() and (boxes[BOX[2:]].to_numpy() <= limits + 1e-6).all()
        assert boxes["class_id"].between(0, 13).all() and healthy["healthy"].between(0, 1).all()
    of = pd.read_parquet(run / "oof.parquet").merge(train[["image_id", "fold"]], on="image_id")
    assert (of["fold_x"] == of["fold_y"]).all()  # nobody was predicted by a network that saw it
    rows = {row.image_id: (row.width, row.height) for row in images[images["split"] == "test"].itertuples()}
    assert validate_boxes(run / "submission.csv", sample / "sample_submission.csv", sizes=rows, ordered=True).rows == 4
    decided = pd.read_parquet(run / "test_decided.parquet")
    pd.testing.assert_frame_equal(
        by_content(parse_predictions(run / "submission.csv")), by_content(decided), check_exact=True, check_dtype=False
    )
    hidden = read_json(run / "manifest.json")["steps"]["submit"]["hidden"]
    assert 0 <= hidden["value"] <= 1 and hidden["metric"] == "map"


def test_the_score_is_the_metric_of_the_decided_boxes(finished):
    run = finished / "run"
    train, truth = truth_of(pd.read_parquet(run / "images.parquet"), pd.read_parquet(run / "boxes.parquet"))
    found, score = pd.read_parquet(run / "oof_decided.parquet"), read_json(run / "score.json")
    result = evaluate(found.sample(frac=1, random_state=0), truth, train["image_id"])
    assert score["map"]["estimate"] == pytest.approx(result.mean_ap, abs=1e-12)
    assert score["map"]["low"] <= score["map"]["estimate"] <= score["map"]["high"]
    classes = pd.read_csv(run / "classes.csv").set_index("class_id")
    assert classes["ap"].to_numpy() == pytest.approx(result.classes["ap"].to_numpy(), nan_ok=True)
    assert classes["name"].tolist() == list(CLASSES)
    assert (score["images"], score["abnormal"]) == (16, int(train["abnormal"].sum()))
    # No finding at one score everywhere: the tied rows enter together, so precision is the share of healthy images
    present = truth["class_id"].nunique()
    nothing = train[["image_id"]].assign(class_id=NO_FINDING, score=1.0, x_min=0.0, y_min=0.0, x_max=1.0, y_max=1.0)
    assert score["map_no_finding"] == pytest.approx(evaluate(nothing, truth, train["image_id"]).mean_ap)
    assert 0 < score["map_no_finding"] <= 1 / present
    healthy = pd.read_parquet(run / "oof_healthy.parquet").set_index("image_id")["healthy"]
    right = (healthy[train["image_id"]].to_numpy() >= 0.5) == (train["abnormal"] == 0).to_numpy()
    assert score["healthy"]["accuracy"] == pytest.approx(right.mean())
    tuned = read_json(run / "tuned.json")
    assert set(tuned["part_rules"]) == {"0", "1"} and tuned["members"] == ["flip", "noise"] and not tuned["halves"]


def test_one_fold_and_one_member_through_all_verbs(tmp_path, command, sample, tiny, bare_page):
    words = [*tiny, "--folds", "0", "--members", "flip", "--detector.architecture", "faster_rcnn"]
    for verb in ("prepare", "train", "predict", "tune", "score", "submit", "ablate", "report"):
        result = command(verb, "demo", "--data", sample, "--out", "run", *words)
        assert (result.status, result.errors) == (0, []), verb
    run = tmp_path / "run"
    score = read_json(run / "score.json")
    assert score["images"] == 8 and score["nested_by"] == "halves of the patients"
    assert not (run / "fold1").exists()
    assert headings(run)[-4:] == ["Ablation", "Training", "Submission", "This run"]


def test_the_winners_rule_puts_no_finding_on_every_image(run_copy, command):
    for verb in ("tune", "submit"):
        assert command(verb, "--out", "run", "--decision.rule", "append", "--fusion.skip", "0", "0.1").status == 0
    assert read_json(run_copy / "tuned.json")["rule"]["beta"] == -1
    decided = pd.read_parquet(run_copy / "test_decided.parquet")
    counts = decided[decided["class_id"] == NO_FINDING]["image_id"].value_counts()
    assert len(counts) == 4 and (counts == 1).all()


def check_the_sweep_of_one_members_boxes(run, boxes, members):
    sweep = pd.read_csv(run / "wbf_sweep.csv")
    best = members.loc[members["map"].argmax(), "member"]
    assert sweep["member"].tolist() == [best] * 10 + [name for name in ("flip", "noise") if name != best] * 10
    assert sweep["iou"].tolist() == pytest.approx([k / 10 for k in range(1, 11)] * 2)
    counts = [(boxes["member"] == name).sum() for name in sweep["member"]]
    assert (sweep["boxes"] <= counts).all() and sweep["boxes"][9] == counts[9]
    images, own = pd.read_parquet(run / "images.parquet"), boxes[boxes["member"] == best]
    train, truth = truth_of(images, pd.read_parquet(run / "boxes.parquet"))
    empty = train.loc[~train["image_id"].isin(own["image_id"]), ["image_id"]]
    empty = empty.assign(class_id=NO_FINDING, score=1.0, x_min=0.0, y_min=0.0, x_max=1.0, y_max=1.0)
    alone = evaluate(pd.concat([own, empty]), truth, train["image_id"]).mean_ap
    assert sweep["map"][9] == pytest.approx(alone, abs=1e-12)
    assert sweep[["paper_low", "paper_high"]].iloc[[0, 10]].to_numpy().tolist() == [[0.087, 0.165], [0.127, 0.163]]


def test_ablation_and_what_makes_it_stale(run_copy, command, bare_page):
    result = command("ablate", "--out", "run")
    assert (result.status, result.errors) == (0, [])
    table, figure = pd.read_csv(run_copy / "ablation.csv"), pd.read_csv(run_copy / "figure1.csv")
    assert table["step"].tolist() == ["base", "WBF", "2CC", "WBF + 2CC", "WBF + winners' rule"]
    assert (table["low"] <= table["map"]).all() and (table["map"] <= table["high"]).all()
    assert table["gain"].isna().tolist() == [True, *[False] * 4]
    assert table["gain"][1:].to_numpy() == pytest.approx((table["map"] - table["map"][0])[1:].to_numpy())
    assert (table["gain_low"] <= table["gain_high"])[1:].all() and table["p"][1:].between(0, 1).all()
    boxes = pd.read_parquet(run_copy / "oof.parquet")
    assert table["before"].dropna().tolist() == [len(boxes)] * 3 and (table["after"] <= len(boxes)).all()
    assert table["skipped"].between(0, 1).all() and not table["skipped"][[0, 1, 4]].any()
    assert figure["member"].tolist() == ["flip", "noise"] and figure[["map", "map_coco"]].stack().between(0, 1).all()
    members = pd.read_csv(run_copy / "members.csv")
    assert figure["map"].to_numpy() == pytest.approx(members["map"].to_numpy())
    check_the_sweep_of_one_members_boxes(run_copy, boxes, members)
    curves, classes = (pd.read_csv(run_copy / f"figure1_{name}.csv") for name in ("curves", "classes"))
    images = pd.read_parquet(run_copy / "images.parquet")
    steps = [int(((images["fold"] == 1 - fold) & (images["abnormal"] > 0)).sum()) // 4 for fold in (0, 1)]
    assert curves[["member", "epoch", "iteration"]].to_numpy().tolist() == [
        [member, 0, np.mean(steps)] for member in ("flip", "noise")
    ]
    histories = [pd.read_csv(run_copy / f"fold{fold}" / "noise" / "history.csv")["map_coco"][0] for fold in (0, 1)]
    assert curves["map_coco"][1] == pytest.approx(np.mean(histories))
    assert classes["class"].tolist() == list(CLASSES[:NO_FINDING]) and list(classes)[2:] == ["flip", "noise"]
    assert classes["noise"].mean() == pytest.approx(figure["map_coco"][1])
    errors = pd.read_csv(run_copy / "errors_2cc.csv").set_index("error")
    assert (errors["count_after"] <= errors["count_before"]).drop("missed").all()
    assert not (run_copy / "locations.csv").exists()
    assert command("report", "--out", "run").status == 0 and "Ablation" in headings(run_copy)
    assert command("report", "--out", "run", "--fusion.iou", "0.5").status == 0
    assert "Ablation" not in headings(run_copy)
    assert command("tune", "--out", "run", "--decision.rule", "replace").status == 0
    alone = read_json(run_copy / "score.json")["map"]["estimate"]  # the run with this rule is that step
    assert table["map"][3] == pytest.approx(alone, abs=1e-12)


def test_options_that_cannot_be_are_refused_in_one_line(run_copy, refused):
    before = hash_files(run_copy, but=["manifest.json"])
    for options, said in (
        ("--fusion.raters nms", "prepared with --fusion.raters"),
        ("--detector.size 128", "store_size 96 is under the 128 px"),
        ("--store-size 1000000", "store_size 1000000: at most 16384 px"),
        ("--seed -1", "seed must be at least 0"),
        ("--members flip blur", "blur"),
        ("--members flip flip", "each once"),
        ("--members flip both", "fold 0 is not trained"),
        ("--detector.size 0", "size 0: a detector needs a multiple of 32, at least 96"),
        ("--members flip fcos-flip@64", "member 'fcos-flip@64': size 64: a detector needs a multiple"),
        ("--detector.channels 48", "channels 48: a detector needs a multiple of 32, at least 64"),
        ("--healthy.size 16", "healthy.size must be at least 32 px"),
        ("--fusion.weights -1 1", "weights must be positive"),
        ("--decision.rule replace --decision.alpha 0.1 --decision.beta 0.5", "no rule to try"),
    ):
        assert said in refused("tune", "--out", "run", *options.split()), options
    assert hash_files(run_copy, but=["manifest.json"]) == before


def test_a_run_and_its_copy_fused_are_the_run(run_copy, finished, command, tmp_path):
    result = command("ensemble", finished / "run", run_copy, "--out", "fused.csv", "--iou", "0.99")
    assert (result.status, result.errors) == (0, []) and "valid submission" in result.out
    fused, own = (by_content(parse_predictions(path)) for path in (tmp_path / "fused.csv", run_copy / "submission.csv"))
    assert fused["image_id"].tolist() == own["image_id"].tolist()
    assert np.allclose(fused[["score", *BOX]], own[["score", *BOX]], atol=1e-3)


def test_the_page_of_a_run_in_a_browser(finished):
    browser.chromium()
    run = finished / "run"
    assert [title for title in headings(run) if title in SECTIONS] == list(SECTIONS)
    for width in (1200, 390):
        broken, overflow, images = browser.probe(run / "report.html", width, 900)
        assert (broken, overflow) == (0, 0) and images > 0
    assert browser.screenshot(run / "report.html", 1200, 900).std() > 5
