"""Losses, weights and scores of classification by hand, and a run on own images from the command line."""

from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from common.errors import InputError
from common.metrics.classification import aurocs
from common.nn.classifier import build_classifier
from common.paths import read_json, read_parquet
from common.submit.table import read_table
from solutions.own import classify
from solutions.own.comparison import COMPARISON, TRUE, measure
from solutions.own.config import DEMO, replace
from tests.solutions.contract import NET
from tests.solutions.own.folders import write_lines

NAN = np.nan


def test_blank_labels_take_no_part_in_the_loss():
    logits, target = torch.tensor([[0.0, 5.0], [0.0, -3.0]]), torch.tensor([[1.0, NAN], [0.0, NAN]])
    assert classify.label_loss(logits, target).item() == pytest.approx(np.log(2))
    assert classify.label_loss(logits, target, np.float32([3, 1])).item() == pytest.approx(2 * np.log(2))
    assert classify.label_loss(logits, torch.full((2, 2), NAN)).item() == 0


def test_class_weights_and_repeats():
    truth = np.array([[1, 0], [0, 0], [0, 0], [0, NAN]])
    assert classify.class_weights(truth, False).tolist() == [3, 3]
    one_hot = np.repeat(np.eye(2), [6, 2], axis=0)
    assert classify.class_weights(one_hot, True) == pytest.approx([8 / 12, 2])
    assert classify.repeat_rare(np.arange(8), one_hot).tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7]
    assert classify.repeat_rare(np.arange(4), truth).tolist() == [0, 0, 1, 2, 3]


def test_auroc_of_known_labels():
    truth = np.array([[1, NAN], [0, NAN], [NAN, 1]])
    found = aurocs(truth, np.array([[0.9, 0.1], [0.2, 0.1], [0.1, 0.3]]))
    assert found[0] == 1 and np.isnan(found[1])


def test_a_blank_label_leaves_the_rows_of_a_table():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.random((40, 2)), columns=["mass", "nodule"])
    table[[f"{TRUE}mass", f"{TRUE}nodule"]] = (rng.random((40, 2)) < 0.5).astype(float)
    whole = measure(table, np.arange(40), 50, 0)
    table.loc[0, f"{TRUE}mass"] = NAN
    found = measure(table, np.arange(40), 50, 0)
    assert list(found) == ["mass", "nodule", "mean"] and len(found["mean"][1]) == 50
    np.testing.assert_array_equal(found["nodule"][1], whole["nodule"][1])


def test_runs_with_blank_labels_are_compared(tmp_path):
    labels = pd.DataFrame({"image_id": ["a", "b"], "patient_id": "", "mass": [1, NAN], "nodule": [0.0, 1.0]})
    images = SimpleNamespace(about={"classes": ["mass", "nodule"]}, at=lambda rows: labels.iloc[rows])
    job = SimpleNamespace(config=replace(DEMO, task="multilabel"), images=images)
    job.run = SimpleNamespace(path=lambda name: tmp_path / name)
    pd.DataFrame({"row": [0, 1], "mass": 0.5, "nodule": 0.5}).to_parquet(tmp_path / "oof.parquet")
    assert COMPARISON.results(job, "oof")[""]["truth"].tolist() == ["1.0 0.0", "nan 1.0"]


def test_labels_and_predictions_may_name_images_differently(tmp_path):
    predictions = write_lines(tmp_path / "sub.csv", "image_id,mass", "a,0.9", "b,0.2", "c,0.5")
    for names in (["a", "b", "c"], ["a.png", "b.png", "c.jpg"], ["x/a.png", "y/b.png", "x/c.png"]):
        labels = write_lines(tmp_path / "l.csv", "file,mass", *(f"{name},{k % 2}" for k, name in enumerate(names)))
        assert COMPARISON.score(predictions, labels) == 0
    predictions = write_lines(tmp_path / "sub.csv", "image_id,mass", "x/a.png,0.9", "y/a.png,0.2")
    assert COMPARISON.score(predictions, write_lines(tmp_path / "l.csv", "file,mass", "x/a,1", "y/a,0")) == 1
    labels = write_lines(tmp_path / "l.csv", "file,mass", "z/a,1", "y/a,0")
    with pytest.raises(InputError, match="lacks images of"):  # those of other folders are other images
        COMPARISON.score(predictions, labels)
    predictions = write_lines(tmp_path / "sub.csv", "image_id,mass", "x/a,0.9", "b,0.2")
    more = write_lines(tmp_path / "l.csv", "file,mass", "x/a,1", "y/a,1", "z/b.png,0")
    assert COMPARISON.score(predictions, more) == 1
    with pytest.raises(InputError, match="two rows of the image a"):
        COMPARISON.score(predictions, write_lines(tmp_path / "l.csv", "file,mass", "a.png,1", "a.jpg,0"))


def test_frozen_features_train_the_same_layer_that_predicts_images():
    config = replace(DEMO.classifier, backbone=NET, weights="none", size=32, only_head=True)
    model = build_classifier(config, 2).eval()
    images = torch.randint(0, 255, (3, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(model(images), model(model.pooled(images)))
    assert torch.allclose(model.cam(images).mean((2, 3)) + model.head.bias, model(images), atol=1e-5)


def test_several_classes_with_given_splits_weights_and_frozen_features(tiny, command, data, tmp_path):
    rows = read_table(data / "labels.csv")
    lines = [f"{row.image_id},{'true' if row.mass == '1' else 'well'}" for row in rows.itertuples()]
    splits = ["val" if k % 8 < 2 else "train" for k in range(len(lines))]
    labels = write_lines(
        tmp_path / "own.csv", "image_id,label,split", *(f"{a},{b}" for a, b in zip(lines, splits, strict=True))
    )
    options = ["--classifier.only-head", "True", "--classifier.class-weights", "True", "--classifier.balanced", "True"]
    words = ["--data", data, "--labels", labels, "--out", "mine", *tiny, *options, "--lungs", "mask"]
    result = command("run", "small", *words)
    assert result.status == 0, result
    score = read_json(tmp_path / "mine" / "score.json")
    assert score["images"] == splits.count("val") and 0 <= score["accuracy"]["estimate"] <= 1
    config = read_json(tmp_path / "mine" / "config.json")
    assert (config["task"], config["n_folds"], config["folds"]) == ("multiclass", 2, [0])
    probs = read_parquet(tmp_path / "mine" / "test.parquet")[["true", "well"]]
    confusion = read_table(tmp_path / "mine" / "confusion.csv")
    assert confusion.columns.tolist() == ["true class", "true", "well"]
    assert confusion["true class"].tolist() == ["true", "well"]
    assert confusion.iloc[:, 1:].astype(int).sum(axis=None) == score["images"]
    assert probs.sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    result = command("infer", "mine", "--data", data, "--out", "predictions.csv", "--workers", "0")
    assert result.status == 0
    assert (tmp_path / "predictions.csv").read_bytes() == (tmp_path / "mine" / "submission.csv").read_bytes()


def test_new_images_are_predicted_straight_from_a_run(run_copy, command, sample, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    for path in sorted((sample / "images").glob("*.png"))[:3]:
        (new / f"new_{path.name}").write_bytes(path.read_bytes())
    assert command("infer", "run", "--data", new, "--out", "predictions.csv").status == 0
    found = read_table(tmp_path / "predictions.csv")
    assert found.columns.tolist() == ["image_id", "effusion", "mass", "pneumothorax"]
    assert found["image_id"].str.startswith("new_").all() and len(found) == 3


def test_podium_sees_an_image_and_its_mirror_alike_and_keeps_the_patients_of_a_map(tiny, command, data, tmp_path):
    rows = read_table(data / "labels.csv")
    write_lines(data / "mass.csv", "image_id,mass", *(f"{row.image_id},{row.mass}" for row in rows.itertuples()))
    lines = (f"{row.image_id},{row.patient_id}" for row in rows.itertuples())
    patients = write_lines(tmp_path / "patients.csv", "image_id,patient_id", *lines)
    words = ["--data", data, "--labels", "mass.csv", "--id-map", patients, "--n-folds", "2", "--folds", "0"]
    result = command("run", "podium", "--out", "mine", *tiny, *words)
    assert result.status == 0, result
    table = read_parquet(tmp_path / "mine" / "images.parquet")
    assert table[table["split"] == "train"].groupby("patient_id")["fold"].nunique().max() == 1
    mirrored = tmp_path / "mirrored"
    mirrored.mkdir()
    submission = read_table(tmp_path / "mine" / "submission.csv").set_index("image_id")["mass"].astype(float)
    for name in submission.index:
        image = cv2.imread(str(data / "images" / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(mirrored / f"{name}.png"), image[:, ::-1])
    assert command("infer", "mine", "--data", mirrored, "--out", "again.csv", "--workers", "0").status == 0
    again = read_table(tmp_path / "again.csv").set_index("image_id")["mass"].astype(float)
    assert again[submission.index].to_numpy() == pytest.approx(submission.to_numpy(), abs=1e-4)


def test_networks_may_see_the_box_around_the_lungs(tiny, command, data, tmp_path):
    result = command("run", "demo", "--data", data, "--out", "mine", *tiny, "--lungs", "crop", "--folds", "0")
    assert result.status == 0, result
    arrays = read_json(tmp_path / "mine" / "manifest.json")["steps"]["prepare"]["arrays"]
    images = read_json(tmp_path / "mine" / "manifest.json")["steps"]["prepare"]["store"]
    seen, whole = np.load(arrays["view"]), np.load(f"{images}/images.npy")
    assert seen.shape == whole.shape and (seen != whole).any(axis=(1, 2)).all()
    assert command("infer", "mine", "--data", data, "--out", "again.csv", "--workers", "0").status == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "mine" / "submission.csv").read_bytes()
    odd = tmp_path / "odd"  # images without lungs count as a whole
    odd.mkdir()
    cv2.imwrite(str(odd / "dark.png"), np.zeros((64, 64), np.uint8))
    cv2.imwrite(str(odd / "red.png"), np.full((64, 64, 3), (20, 20, 200), np.uint8))
    assert command("infer", "mine", "--test", odd, "--out", "odd.csv", "--workers", "0").status == 0
    assert read_table(tmp_path / "odd.csv")["image_id"].tolist() == ["dark", "red"]
