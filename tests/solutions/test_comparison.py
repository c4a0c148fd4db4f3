"""`table` gives the score of a run, and `score_predictions` the right score of hand-made predictions."""

import cv2
import numpy as np
import pandas as pd
import pytest

from common.paths import read_json
from solutions.covid19.collections import read_collections
from tests.running import run_command
from tests.solutions.contract import SOLUTIONS

SCORES = {
    "siim_pneumothorax": ("dice", lambda score: score["dice"]),
    "lung_segmentation": ("dice", lambda score: score["dice"]),
    "vinbigdata": ("mAP", lambda score: score["map"]),
    "rsna_pneumonia": ("mAP", lambda score: score["map"]),
    "chestxray14": ("mean", lambda score: score["oof"]["mean"]),
    "covid19": ("AUROC", lambda score: score["auroc"]),
    "own": ("mean", lambda score: score["auroc"]),
}


@pytest.mark.parametrize("solution", SOLUTIONS, indirect=True)
def test_table_has_the_score_of_the_run_with_its_interval(solution, run_copy, command):
    metric, read = SCORES[solution.name]
    result = command("table", "run", "--split", "oof", "--out", "table.csv")
    assert (result.status, result.errors) == (0, [])
    found = pd.read_csv("table.csv").set_index(["run", "metric"]).loc[("run", metric)]
    expected = read(read_json(run_copy / "score.json"))
    assert found["pooled"] == pytest.approx(expected["estimate"], abs=1e-12)
    np.testing.assert_allclose(found[["low", "high"]].astype(float), [expected["low"], expected["high"]], atol=1e-9)
    assert f"{expected['estimate']:.4f} [{expected['low']:.4f}" in result.out and "oof: " in result.out


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """`score(solution, predictions, labels)`: status, figures by metric and text."""
    monkeypatch.chdir(tmp_path)

    def run(solution, *words):
        words = ["score_predictions", *words, "--out", "out.csv", "--resamples", 50]
        result = run_command(capsys, solution, *words)
        if result.status == 2:
            return result.errors[0]
        found = pd.read_csv("out.csv").set_index("metric")["estimate"].to_dict()
        return result.status, found, result.out

    return run


def test_siim_submission_against_train_rle(score, tmp_path):
    (tmp_path / "train-rle.csv").write_text("ImageId, EncodedPixels\na, 0 10\nb, -1\nc, 5 10\nc, 10 10\nd, -1\n")
    (tmp_path / "sub.csv").write_text("ImageId,EncodedPixels\na,5 10\nb,-1\nc,5 10\nd,3 4\n")
    (tmp_path / "patients.csv").write_text("id,patient_id\na,1\nb,1\nc,2\nd,3\n")
    status, found, said = score(
        "siim_pneumothorax", "sub.csv", "--labels", "train-rle.csv", "--patients", "patients.csv"
    )
    dice = [0.5, 1, 0.8, 0]
    assert status == 0 and found["dice"] == pytest.approx(np.mean(dice))
    assert found["dice with pneumothorax"] == pytest.approx(0.65)
    assert "4 images of 3 patients" in said
    with open("sub.csv", "a") as file:
        file.write("stranger,-1\n")
    status, found, said = score("siim_pneumothorax", "sub.csv", "--labels", "train-rle.csv")
    assert status == 4 and found["dice"] == pytest.approx(np.mean(dice)) and "such as stranger" in said
    assert "names no patients" in said


def test_vinbigdata_boxes_against_train(score, tmp_path):
    header = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\n"
    rows = "a,Aortic enlargement,0,R1,10,10,110,110\na,Aortic enlargement,0,R2,10,10,110,110\nb,No finding,14,R1,,,,\n"
    (tmp_path / "train.csv").write_text(header + rows + "c,Nodule/Mass,8,R3,0,0,50,50\n")
    strings = {"a": "0 0.9 10 10 110 110", "b": "14 1 0 0 1 1", "c": "8 0.3 0 0 50 20 8 0.2 0 0 50 45"}
    pd.DataFrame(strings.items(), columns=["image_id", "PredictionString"]).to_csv(tmp_path / "sub.csv", index=False)
    status, found, said = score("vinbigdata", "sub.csv", "--labels", "train.csv")
    # a and b are found at once; of c, the first box overlaps by 0.4, which is not enough: precision 1/2 at recall 1
    assert found == {"mAP": pytest.approx(2.5 / 3), "Aortic enlargement": 1, "Nodule/Mass": 0.5, "No finding": 1}
    assert status == 0 and "3 images" in said


def test_rsna_submission_against_the_label_table(score, tmp_path):
    rows = "a,10,10,100,100,1\nb,,,,,0\nc,,,,,0\nd,0,0,50,50,1\n"
    (tmp_path / "labels.csv").write_text(f"patientId,x,y,width,height,Target\n{rows}")
    strings = {"a": "0.9 10 10 100 100", "b": "", "c": "0.2 5 5 10 10", "d": "0.5 0 0 50 30"}
    pd.DataFrame(strings.items(), columns=["patientId", "PredictionString"]).to_csv("sub.csv", index=False)
    # a is right at every threshold, b does not count, c is a false alarm, d reaches 0.4, 0.45, 0.5 and 0.55 (IoU 0.6)
    status, found, said = score("rsna_pneumonia", "sub.csv", "--labels", "labels.csv")
    assert status == 0 and found["mAP"] == pytest.approx((1 + 0 + 4 / 8) / 3) and "4 images" in said


def test_lung_masks_in_a_folder_or_a_table(score, tmp_path):
    truth, other = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    truth[5:15, 5:15] = other[5:15, 10:20] = 255
    for folder, masks in {"true": [truth, truth], "mine": [other, truth], "empty": [0 * truth, truth]}.items():
        (tmp_path / folder).mkdir()
        for name, mask in zip("ab", masks, strict=True):
            cv2.imwrite(str(tmp_path / folder / f"{name}.png"), mask)
    status, found, _ = score("lung_segmentation", "mine", "--labels", "true")
    assert status == 0 and found == {"dice": pytest.approx(0.75), "IoU": pytest.approx((1 / 3 + 1) / 2)}
    assert score("lung_segmentation", "empty", "--labels", "true")[1] == {"dice": 0.5, "IoU": 0.5}
    starts = " ".join(f"{20 * column + 6} 10" for column in range(10, 20))
    (tmp_path / "masks.csv").write_text(f"image_id,width,height,area,rle\na,30,20,1,{starts}\nb,30,20,1,-1\n")
    assert score("lung_segmentation", "masks.csv", "--labels", "true")[1]["dice"] == pytest.approx(0.25)
    (tmp_path / "none").mkdir()
    assert "none: contains no masks" in score("lung_segmentation", "mine", "--labels", "none")
    assert "true/a.png: an empty mask" not in score("lung_segmentation", "mine", "--labels", "empty")[2]


def test_lung_masks_against_a_collection(score, runs):
    data = runs.sample("lung_segmentation")
    status, found, said = score("lung_segmentation", data, "--labels", data)
    assert status == 0 and found == {"dice": 1, "IoU": 1} and "12 images of 12 patients" in said


def test_covid19_probabilities_against_labels(score, tmp_path):
    (tmp_path / "mine.csv").write_text("filename,probability\nx/a.png,0.9\nb.jpg,0.2\nc.png,0.6\nd.png,0.1\n")
    (tmp_path / "truth.csv").write_text("image,label\na,1\nb,1\nc,0\nd,0\n")
    status, found, _ = score("covid19", "mine.csv", "--labels", "truth.csv")
    assert status == 0 and found["accuracy"] == 0.5 and found["sensitivity"] == 0.5 and found["AUROC"] == 0.75
    (tmp_path / "mine.csv").write_text("filename,probability\na.png,0.9\nb.jpg,1.2\n")
    assert "mine.csv, row 3 (b): '1.2' is not a probability" in score("covid19", "mine.csv", "--labels", "truth.csv")


def test_covid19_collections_are_labels(score, runs, tmp_path):
    data = runs.sample("covid19")
    table = read_collections([data])
    table[["image_id", "label"]].replace(-1, 0).to_csv(tmp_path / "mine.csv", index=False)
    status, found, said = score("covid19", "mine.csv", "--labels", data)
    assert status == 4 and found["accuracy"] == found["AUROC"] == 1  # one has an unknown finding
    assert f"{(table['label'] >= 0).sum()} images of" in said
