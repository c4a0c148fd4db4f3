"""From NIH's folder to the tables of a run: split, folds, labels, test images, what is left out."""

import dataclasses
import logging
import re

import numpy as np
import pandas as pd
import pytest

from benchmarks.tables import real_data
from common.images import open_images
from common.paths import read_json
from solutions.chestxray14 import data
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.data import BOX_TABLE, labels_of, place_boxes
from solutions.chestxray14.labels import BOXES, DIGESTS, names_digest, read_boxes
from tests.solutions.chestxray14.folders import (
    HEADER,
    ROWS,
    SMALL,
    TEST,
    TRAIN,
    line,
    prepare,
    refusal,
    write_image,
    write_list,
    write_table,
)


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def test_what_prepare_leaves(job, folder, said):
    prepared = prepare(job())
    table = prepared.table.set_index("image_id")
    assert table.index.tolist() == [*TRAIN, *TEST] and table["row"].tolist() == list(range(8))
    assert table["split"].tolist() == ["train"] * 5 + ["test"] * 3 and table["official"].nunique() == 2
    assert (table["fold"][TEST] == -1).all() and set(table["fold"][TRAIN]) == {0, 1}
    assert table.loc["00000001_000", "fold"] == table.loc["00000001_001", "fold"]
    assert table["width"].tolist() == [48] * 8 and table["height"].tolist() == [40] * 8 and table["ok"].all()
    labels = labels_of(prepared, prepared.rows("test"))
    assert labels.dtype == np.float32 and labels.sum(axis=1).tolist() == [1, 0, 2] and labels[2, [3, 13]].all()
    assert prepared.patients([0, 1, 7]).tolist() == ["1", "1", "6"]
    assert prepared.rows_of(["00000006_000", "00000001_001"]).tolist() == [7, 1]
    assert prepared.ids([7, 1]).tolist() == ["00000006_000", "00000001_001"]
    assert refusal(prepared.rows_of, [TRAIN[0], "x"]) == "x: not an image of this run"
    assert sorted([*prepared.rows(folds=[0]), *prepared.rows(folds=[1])]) == list(range(5))
    assert prepared.tables[BOX_TABLE]["image_id"].tolist() == ["00000005_000", "00000006_000"]
    assert prepared.tables[BOX_TABLE]["row"].tolist() == [5, 7] and prepared.tables[BOX_TABLE]["label"].tolist() == [
        4,
        3,
    ]
    assert not prepared.arrays and list(prepared.tables) == [BOX_TABLE]
    run = job().run
    sample = pd.read_csv(run.path("sample_submission.csv"))
    assert sample.columns.tolist() == ["Image Index", *LABELS] and not sample[list(LABELS)].to_numpy().any()
    assert sample["Image Index"].tolist() == [f"{name}.png" for name in TEST]
    inputs = run.manifest["inputs"]
    assert {path.rsplit("/", 1)[1] for path in inputs} == {
        "Data_Entry_2017.csv",
        "train_val_list.txt",
        "test_list.txt",
        "BBox_List_2017.csv",
    }
    digest = inputs[str(folder / "Data_Entry_2017.csv")]
    assert prepared.about["sha256"] == digest and f"labels Data_Entry_2017.csv (sha256 {digest[:12]}" in said.text
    assert prepared.about["test_name"] == "on 3 images of the test list, which is not the whole official one"


def test_only_verified_lists_are_called_official(job, folder, said, monkeypatch):
    for part, names in (("train_val", TRAIN), ("test", TEST)):
        monkeypatch.setitem(DIGESTS, part, names_digest(names))
    prepared = prepare(job())
    assert prepared.about["test_name"] == "on the official test list"
    assert "the official lists, verified by the hash of their names" in prepared.about["said"]
    (folder / "images_002" / "images" / f"{TEST[0]}.png").unlink()
    assert prepare(job(out="part")).about["test_name"] == "on 2 images of the official test list"


def test_the_key_follows_the_training_images_alone(job, folder):
    first = prepare(job())
    assert first.key == open_images(job()).key
    lines = (folder / "Data_Entry_2017.csv").read_text().splitlines()
    write_table(folder / "Data_Entry_2017.csv", lines[:0:-1])
    again = prepare(job(out="again"))
    pd.testing.assert_frame_equal(first.table, again.table)
    assert again.key == first.key and again.pixels_key == first.pixels_key
    write_list(folder / "test_list.txt", TEST[:2])
    assert prepare(job(out="fewer", on_unlabelled="skip")).key == first.key
    write_table(folder / "Data_Entry_2017.csv", [*lines[1:-5], lines[-5].replace("No Finding", "Edema"), *lines[-4:]])
    assert prepare(job(out="other")).key != first.key


def test_only_part_of_the_images_is_there(job, folder, said):
    (folder / "images_002" / "images" / f"{TEST[0]}.png").unlink()
    (folder / "images_001" / "images" / f"{TRAIN[3]}.png").unlink()
    prepared = prepare(job())
    assert prepared.table["image_id"].tolist() == [TRAIN[0], TRAIN[1], TRAIN[2], TRAIN[4], TEST[1], TEST[2]]
    assert "2 of 8 images have no file and are left out, the first is 00000003_000.png; 1 of them are in the test" in (
        said.text
    )
    assert prepared.about["missing"] == 2 and "2 of them without a file" in prepared.about["said"]
    assert "left out 1 of 2 boxes" in said.text and prepared.tables[BOX_TABLE]["row"].tolist() == [5]
    for path in folder.glob("images_002/images/*"):
        path.unlink()
    assert not len(prepare(job(out="b")).rows("test"))
    assert "no test images: scores are out of fold, and nothing is submitted" in said.text
    assert len(job(out="b").run.path("sample_submission.csv").read_text().splitlines()) == 1
    for path in folder.glob("images_001/images/*"):
        path.unlink()
    assert f"{folder}: none of the images of Data_Entry_2017.csv" in refusal(prepare, job(out="c"))


def test_a_folder_that_does_not_fit(job, folder, said):
    write_image(folder / "images_001" / "images" / "00000099_000.png")
    message = refusal(prepare, job())
    assert "00000099_000.png: one of 1 images without a row in Data_Entry_2017.csv; --on-unlabelled skip" in message
    assert len(prepare(job(on_unlabelled="skip")).table) == 8
    write_list(folder / "train_val_list.txt", TRAIN[:4])
    assert len(prepare(job(on_unlabelled="skip", out="b")).table) == 7
    assert "left out 1 labelled images that are in neither list" in said.text
    write_list(folder / "train_val_list.txt", [*TRAIN, "00000005_001"])
    write_list(folder / "test_list.txt", [TEST[0], TEST[2]])
    assert "1 patients are in both lists, such as patient 5 (00000005_000, 00000005_001)" in refusal(
        prepare, job(on_unlabelled="skip", out="c")
    )
    write_table(folder / "Data_Entry_2017.csv", [line(name) for name, _ in ROWS])
    assert "no image has a finding" in refusal(prepare, job(out="c"))
    (folder / "Data_Entry_2017.csv").unlink()
    assert "no Data_Entry_2017_v2020.csv or Data_Entry_2017.csv in it" in refusal(prepare, job())


def test_two_versions_of_the_table(job, folder, said):
    other = [line(name, "Edema") for name, _ in ROWS]
    write_table(folder / "Data_Entry_2017_v2020.csv", other, HEADER.replace("Gender", "Sex"))
    prepared = prepare(job())
    assert prepared.about["labels"] == "Data_Entry_2017_v2020.csv" and labels_of(prepared, [3])[0, 9] == 1
    assert "holds Data_Entry_2017.csv too" in said.text
    older = dataclasses.replace(SMALL, label_table="2017")
    assert "prepared with --label-table None, not 2017" in refusal(lambda: job(older).images)
    assert prepare(job(older, out="b")).about["labels"] == "Data_Entry_2017.csv"
    (folder / "Data_Entry_2017.csv").unlink()
    assert "no Data_Entry_2017.csv in it" in refusal(prepare, job(older, out="c"))


def test_split_all(job, folder, said):
    config = dataclasses.replace(SMALL, split="all")
    prepared = prepare(job(config))
    assert prepared.table["image_id"].tolist() == [*TRAIN, *TEST] and (prepared.table["fold"] >= 0).all()
    assert prepared.table["official"].tolist() == ["train_val"] * 5 + ["test"] * 3
    assert len(prepared.rows("test")) == 0 and labels_of(prepared, prepared.rows("test")).shape == (0, 14)
    assert "--split all holds none back" in said.text and "those of the official test list too" in said.text
    assert "prepared with --split all" in refusal(open_images, job())
    for name in ("train_val_list.txt", "test_list.txt"):
        (folder / name).unlink()
    assert prepare(job(config, out="b")).key == prepared.key
    assert "no train_val_list.txt; --split all" in refusal(prepare, job(out="c"))


def test_other_images_to_predict(job, tmp_path, folder, said):
    write_image(folder / "images_001" / "images" / "00000004_007.png")
    write_image(folder / "images_001" / "images" / "odd.png")
    path = tmp_path / "named.csv"
    path.write_text(f"Image Index,Patient ID\n{TEST[2]}.png,6\nodd.png,0099\n00000004_007.png,4\n")
    prepared = prepare(job(test=path))
    test = prepared.table[prepared.table["split"] == "test"]
    assert test["image_id"].tolist() == [TEST[2], "odd", "00000004_007"]
    assert test["file_name"].tolist() == [f"{TEST[2]}.png", "odd.png", "00000004_007.png"]
    assert test["patient_id"].tolist() == ["6", "99", "4"]
    labels = labels_of(prepared, test["row"])
    assert labels[0].sum() == 2 and np.isnan(labels[1:]).all()
    assert test["official"].tolist() == ["test", "", ""] and (test["fold"] == -1).all()
    assert "--test replaces the 3 images of the test list" in said.text
    assert "1 of the 3 images are of patients with training images" in said.text
    assert prepared.about["test_name"] == "on the 3 images of --test"
    path.write_text(f"id\n{TRAIN[1]}\n{TEST[1]}\n")
    assert "--test: 1 of the images are training images, such as 00000001_001" in refusal(prepare, job(test=path))
    path.write_text(f"id\n{TEST[1]}\n")
    every = dataclasses.replace(SMALL, split="all")
    assert "(--split all trains on every labelled image), such as 00000005_001" in refusal(
        prepare, job(every, test=path)
    )
    path.write_text("id\nnowhere.png\n")
    assert "--test: 1 images have no file, the first is nowhere" in refusal(prepare, job(test=path))


def test_a_folder_to_predict(job, tmp_path):
    write_image(tmp_path / "more" / "00000077_001.jpg")
    (tmp_path / "more" / "bad.png").write_bytes(b"no image")
    assert "bad.png" in refusal(prepare, job(test=tmp_path / "more"))
    prepared = prepare(job(test=tmp_path / "more", on_bad_image="placeholder"))
    test = prepared.table[prepared.table["split"] == "test"]
    assert test["file_name"].tolist() == ["00000077_001.jpg", "bad.png"] and test["ok"].tolist() == [True, False]
    assert test["patient_id"].tolist() == ["77", ""] and not len(prepared.tables[BOX_TABLE])


def test_unreadable_training_images_are_left_out(job, folder):
    boxed = prepare(job()).tables[BOX_TABLE]
    next(folder.rglob(f"{TRAIN[0]}.png")).write_bytes(b"no image")
    images = prepare(made := job(on_bad_image="skip", out="other"))
    assert made.left_out == 1 and TRAIN[0] not in set(images.table["image_id"])
    pd.testing.assert_frame_equal(images.tables[BOX_TABLE], boxed)  # the rows are still those of the store
    pd.testing.assert_frame_equal(place_boxes(boxed.drop(columns="row"), images.table), boxed)


def test_folds_by_table_and_other_settings(job, tmp_path, said):
    path = tmp_path / "folds.csv"
    path.write_text("image_id,fold\n" + "".join(f"{name},{n % 2}\n" for n, name in enumerate(TRAIN)))
    prepared = prepare(job(fold_table=path))
    assert prepared.table["fold"].tolist()[:5] == [0, 1, 0, 1, 0]
    assert "2 images have a patient in another fold" in said.text
    run = job().run
    run.path("fold0", "whole").mkdir(parents=True)
    run.path("fold0", "whole", "last.ckpt").touch()
    prepare(job(fold_table=path))  # as it was: trainings may stay
    assert "was trained on other images" in refusal(prepare, job(dataclasses.replace(SMALL, seed=3)))


def test_the_real_folder():
    folder = real_data("chestxray14")
    if folder is None:
        pytest.skip("no real radiographs ($CXR_REAL_DATA/chestxray14)")
    labels, about = data._read_labels(folder, folder / "Data_Entry_2017.csv", "official")
    assert len(labels) == 1_378 and (labels["official"] == "test").sum() == 221
    assert "(1,157 images" in about["lists"]["said"] and not about["lists"]["official"]
    boxes = data.place_boxes(read_boxes(folder / BOXES[0]), labels)
    assert len(boxes) == 58 and set(labels["official"][boxes["row"]]) == {"test"}  # NIH drew boxes in test images only


def test_the_record(job):
    prepare(job())
    record = read_json(job().run.path("manifest.json"))["steps"]["prepare"]
    assert not record["about"]["lists"]["official"] and record["about"]["structures"] is None
    assert re.fullmatch("[0-9a-f]{64}", record["about"]["sha256"]) and not record["synthetic"]
