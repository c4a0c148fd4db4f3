"""From NIH's tables, lists and images to a split, folds and labels: small folders by hand, the whole real table."""

import dataclasses
import logging
import re

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.tables import label_table, real_data
from common.budget import Budget
from common.data.folds import make_folds, prevalence_deviation, shared_groups
from common.errors import InputError
from common.images import open_images, prepare_images
from common.job import Job
from common.options import Options
from common.paths import read_json, write_json
from common.post.boxes import BOX
from common.runs import Run
from common.train.checkpoint import save_weights
from solutions.chestxray14 import data, leaks
from solutions.chestxray14.config import DEMO, LABELS, LungsConfig
from solutions.chestxray14.data import BOX_TABLE, labels_of
from solutions.chestxray14.labels import DIGESTS, LISTS, names_digest, patient_of, read_boxes, read_labels, read_lists
from solutions.chestxray14.leaks import check_run, check_weights, origin
from solutions.chestxray14.pipeline import SOLUTION

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h]"
SMALL = dataclasses.replace(
    DEMO, whole=dataclasses.replace(DEMO.whole, resize=32, size=32, weighting=False), store_size=32
)
# (image, labels); patients 1 to 4 train, 5 and 6 test
ROWS = [
    ("00000001_000", "Cardiomegaly|Effusion"),
    ("00000001_001", "No Finding"),
    ("00000002_000", "Hernia"),
    ("00000003_000", "No Finding"),
    ("00000004_000", "Cardiomegaly"),
    ("00000005_000", "Mass"),
    ("00000005_001", "No Finding"),
    ("00000006_000", "Infiltration|Hernia"),
]
TRAIN, TEST = [name for name, _ in ROWS[:5]], [name for name, _ in ROWS[5:]]


def line(name, labels="No Finding", age="58", sex="M", view="PA", follow_up=None, patient=None):
    follow_up = int(name[-3:]) if follow_up is None else follow_up
    patient = int(name[:8]) if patient is None else patient
    return f"{name}.png,{labels},{follow_up},{patient},{age},{sex},{view},2500,2048,0.168,0.168"


def write_table(path, lines, header=HEADER):
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def write_list(path, names):
    path.write_text("".join(f"{name}.png\n" for name in names))
    return path


def write_image(path, value=90, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, value, size[0]).astype(np.uint8)
    assert cv2.imwrite(str(path), np.tile(ramp, (size[1], 1)))


@pytest.fixture
def folder(tmp_path):
    """The competition as Kaggle gives it, in two of its twelve image folders."""
    root = tmp_path / "data"
    for number, (name, _) in enumerate(ROWS):
        write_image(root / f"images_{number // 5 + 1:03}" / "images" / f"{name}.png", 20 + 20 * number)
    write_table(root / "Data_Entry_2017.csv", [line(*row) for row in ROWS])
    write_list(root / "train_val_list.txt", TRAIN)
    write_list(root / "test_list.txt", TEST)
    boxes = ["00000006_000.png,Infiltrate,100.5,200,300,400", "00000005_000.png,Mass,0,0,1024,1024"]
    write_table(root / "BBox_List_2017.csv", boxes, BOX_HEADER)
    return root


@pytest.fixture
def job(tmp_path, folder):
    """`job(config, **options)`: what a verb gets; runs of one test share the store."""
    runs = []

    def make(config=SMALL, out="run", **options):
        while runs:
            runs.pop().close()
        runs.append(Run(tmp_path / out))
        options = Options(**{"data": folder, "out": tmp_path / out, "workers": 0} | options)
        device, recipe = torch.device("cpu"), SOLUTION
        return Job("chestxray14", "demo", config, options, runs[-1], device, Budget(None), recipe=recipe)

    yield make
    for run in runs:
        run.close()


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def prepare(job):
    return prepare_images(job, SOLUTION)


def refusal(work, *args):
    with pytest.raises(InputError) as caught:
        work(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the label table -----------------------------------------------------------------------------------------------


def test_read_labels(tmp_path):
    path = write_table(
        tmp_path / "t.csv",
        [
            line("00000013_004", "Cardiomegaly|Pleural_Thickening|Hernia", "058Y", "F", "AP"),
            line("00000013_005", "No Finding", "018M", follow_up=7),
            line("00000014_000", age="414", patient="0014"),
            line("00000015_000", age="", sex="", view=""),
        ],
    )
    table = read_labels(path)
    assert table["image_id"].tolist() == ["00000013_004", "00000013_005", "00000014_000", "00000015_000"]
    assert table["file_name"][0] == "00000013_004.png" and table["patient_id"].tolist() == ["13", "13", "14", "15"]
    assert table["age"].tolist()[:3] == [58, 1.5, 414] and np.isnan(table["age"][3])
    assert table["follow_up"].tolist() == [4, 7, 0, 0] and table["sex"].tolist() == ["F", "M", "M", ""]
    marked = table[list(LABELS)]
    assert marked.columns[marked.loc[0] == 1].tolist() == ["Cardiomegaly", "Pleural_Thickening", "Hernia"]
    assert not marked.loc[1:].to_numpy().any() and (marked.dtypes == "int8").all()


def test_the_other_headers(tmp_path):
    """The corrected table calls it sex, and ends header and rows in a comma."""
    plain = read_labels(write_table(tmp_path / "a.csv", [line(*row) for row in ROWS]))
    header = HEADER.replace("Gender", "Sex") + ","
    other = read_labels(write_table(tmp_path / "b.csv", [line(*row) + "," for row in ROWS], header))
    pd.testing.assert_frame_equal(plain, other)
    path = write_table(tmp_path / "c.csv", [], header)
    assert refusal(read_labels, path).endswith("no rows under its header")
    path = write_table(tmp_path / "c.csv", [line(*ROWS[0])], HEADER.replace("Patient ID", "Patient"))
    assert refusal(read_labels, path) == f"{path}, row 1: no column Patient ID"
    path = write_table(tmp_path / "c.csv", [line(*ROWS[0])], HEADER.replace("Gender", "G"))
    assert refusal(read_labels, path) == f"{path}, row 1: no column Patient Gender or Patient Sex"


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (line("../../x", follow_up=0, patient=1), "'../../x' is not a usable id"),
        (line("00000001_000"), "this image is there twice"),
        (line("00000009_000", "Infiltrate"), "'Infiltrate' is neither a finding"),
        (line("00000009_000", ""), "'' is neither a finding"),
        (line("00000009_000", "Mass|"), "'' is neither a finding"),
        (line("00000009_000", "No Finding|Mass"), "'No Finding' beside a finding: No Finding|Mass"),
        (line("00000009_000", patient=""), "no Patient ID"),
        (line("00000009_000", age="old"), "the age 'old' is not a number"),
        (line("00000009_000", age="-3"), "the age '-3' is not a number"),
        (line("00000009_000", follow_up="1.5"), "the follow-up '1.5' is not a whole number"),
        (line("00000009_000", sex="X"), "the sex 'X'"),
        (line("00000009_000", view="LL"), "the view 'LL'"),
    ],
)
def test_a_row_that_cannot_be_used(row, wrong, tmp_path):
    path = write_table(tmp_path / "t.csv", [line(*ROWS[0]), line(*ROWS[1]), row, line(*ROWS[2])])
    message = refusal(read_labels, path)
    assert message.startswith(f"{path}, row 4") and wrong in message


def test_patient_of():
    names = pd.Series(["00000013_004", "00030805_000", "13_004", "a", "00000000_000"])
    assert patient_of(names).tolist() == ["13", "30805", "", "", "0"]


# ---- lists and boxes -----------------------------------------------------------------------------------------------


def test_read_lists(folder, monkeypatch):
    ids = ["00000006_000", "00000099_000", "00000001_001"]
    found, about = read_lists(folder, ids)
    assert found.tolist() == ["test", "", "train_val"]
    part = about["train_val"]
    assert (part["file"], part["images"], part["patients"], part["absent"]) == ("train_val_list.txt", 5, 4, 4)
    assert about["test"]["images"] == 3 and about["test"]["patients"] == 2 and len(about["test"]["sha256"]) == 64
    assert not about["whole"] and "not the whole official lists" in about["said"]
    for part, images, patients in (("train_val", 5, 4), ("test", 3, 2)):
        monkeypatch.setitem(LISTS, part, (LISTS[part][0], images, patients))
    sized = read_lists(folder, ids)[1]  # as large as the official ones, which any list can be
    assert (
        sized["whole"]
        and not sized["official"]
        and sized["said"].endswith("of the official size, not verified by a hash")
    )
    for part, names in (("train_val", TRAIN), ("test", TEST)):
        monkeypatch.setitem(DIGESTS, part, names_digest(names[::-1]))
    named = read_lists(folder, ids)[1]
    assert named["official"] and named["said"].endswith("the official lists, verified by the hash of their names")
    write_list(folder / "test_list.txt", [*TEST[:2], "00000006_001"])
    other = read_lists(folder, ids)[1]
    assert other["whole"] and not other["official"] and "with other names than the official lists" in other["said"]
    write_list(folder / "test_list.txt", TEST)
    monkeypatch.setitem(LISTS, "test", (LISTS["test"][0], 3, 3))  # as many images, other patients: another list
    fewer = read_lists(folder, ids)[1]
    assert not fewer["whole"] and not fewer["official"]
    before = about["test"]["sha256"]
    write_list(folder / "test_list.txt", TEST[:2])
    assert read_lists(folder, ids)[1]["test"]["sha256"] != before


def test_names_digest():
    """By hand: printf 'a\\nb' | sha256sum; neither order nor suffix counts."""
    wanted = "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"
    assert names_digest(["b", "a"]) == names_digest(pd.Series(["a", "b"])) == wanted


def test_lists_under_other_names_and_line_ends(folder):
    text = (folder / "test_list.txt").read_text()
    (folder / "test_list.txt").unlink()
    (folder / "test_list_NIH.txt").write_bytes(("\ufeff" + text.replace("\n", " \r\n") + "\r\n").encode())
    found, about = read_lists(folder, [*TRAIN, *TEST])
    assert found.tolist() == ["train_val"] * 5 + ["test"] * 3 and about["test"]["file"] == "test_list_NIH.txt"


def test_lists_that_cannot_be_used(folder):
    path = folder / "test_list.txt"
    write_list(path, [*TEST, TRAIN[1]])
    assert "1 images are in both train_val_list.txt and test_list.txt, such as 00000001_001" in refusal(
        read_lists, folder, TRAIN
    )
    write_list(path, [*TEST, TEST[0]])
    assert refusal(read_lists, folder, TRAIN) == f"{path}, line 4: 00000005_000 is there twice"
    write_list(path, [TEST[0], "a b"])
    assert refusal(read_lists, folder, TRAIN).startswith(f"{path}, line 2: 'a b' is not a usable id")
    path.write_text("\n\n")
    assert refusal(read_lists, folder, TRAIN) == f"{path}: no image in it"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not a readable list" in refusal(read_lists, folder, TRAIN)
    path.unlink()
    assert refusal(read_lists, folder, TRAIN) == f"{folder}: no test_list.txt; --split all trains without the " + (
        "official lists"
    )


def test_read_boxes(tmp_path):
    rows = ["00000006_000.png,Infiltrate,100.5,200,300,400", "a.png,Hernia,0,0,1024,1024"]
    plain = read_boxes(write_table(tmp_path / "a.csv", rows, BOX_HEADER))
    odd = read_boxes(write_table(tmp_path / "b.csv", [row + ",,," for row in rows], BOX_HEADER + ",,,"))
    pd.testing.assert_frame_equal(plain, odd)
    pd.testing.assert_frame_equal(plain, read_boxes(write_table(tmp_path / "c.csv", rows, BOX_HEADER + ",,,")))
    assert plain["image_id"].tolist() == ["00000006_000", "a"] and plain["label"].tolist() == [3, 13]
    assert plain[BOX].to_numpy().tolist() == [[100.5, 200, 400.5, 600], [0, 0, 1024, 1024]]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ("a.png,Infiltrates,1,2,3,4", "'Infiltrates' is none of the 14"),
        ("a.png,No Finding,1,2,3,4", "'No Finding' is none of the 14"),
        ("a.png,Mass,1,2,3,x", "the box 1 2 3 x is not four finite"),
        ("a.png,Mass,1,2,3,inf", "is not four finite"),
        ("a.png,Mass,1,2,3", "is not four finite"),
        ("a.png,Mass,1,2,0,4", "the box 1 2 0 4 has no area"),
        ("a.png,Mass,-1,2,3,4", "leaves the image of 1024"),
        ("a.png,Mass,1000,2,25,4", "leaves the image of 1024"),
        ("a/b.png,Mass,1,2,3,4", "'a/b' is not a usable id"),
    ],
)
def test_a_box_that_cannot_be_used(row, wrong, tmp_path):
    path = write_table(tmp_path / "b.csv", ["a.png,Mass,1,2,3,4", row], BOX_HEADER)
    message = refusal(read_boxes, path)
    assert message.startswith(f"{path}, row 3") and wrong in message
    write_table(path, [row], BOX_HEADER.replace("Finding Label", "Label"))
    assert "row 1: the header must be" in refusal(read_boxes, path)


# ---- prepare -------------------------------------------------------------------------------------------------------


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
    for part, images, patients in (("train_val", 5, 4), ("test", 3, 2)):
        monkeypatch.setitem(LISTS, part, (LISTS[part][0], images, patients))
    prepared = prepare(job())
    assert prepared.about["test_name"] == (
        "on 3 images of the test list, which is of the official size but not verified by its hash"
    )
    assert "of the official size, not verified by a hash" in prepared.about["said"]
    for part, names in (("train_val", TRAIN), ("test", TEST)):
        monkeypatch.setitem(DIGESTS, part, names_digest(names))
    assert prepare(job(out="verified")).about["test_name"] == "on the official test list"
    (folder / "images_002" / "images" / f"{TEST[0]}.png").unlink()
    assert prepare(job(out="part")).about["test_name"] == "on 2 images of the test list"


def test_the_size_on_disk_is_announced(job, said, monkeypatch):
    prepare(job())
    assert "on disk" not in said.text
    monkeypatch.setattr(data, "LARGE", 8 * 32 * 32 - 1)
    prepare(job())
    assert "8 images take 0.0 GB on disk: store 0.0 GB" in said.text
    said.clear()
    both = dataclasses.replace(DEMO, views="both", store_size=512, segmenter=LungsConfig(crop_size=448, mask_size=64))
    data._announce_size(both, 112_120)
    assert "52.4 GB on disk: store 29.4 GB, masks of the lungs 0.5 GB, crops of the lungs 22.5 GB" in said.text


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
    assert "no Data_Entry_2017.csv or Data_Entry_2017_v2020.csv in it" in refusal(prepare, job())


def test_two_versions_of_the_table(job, folder, said):
    other = [line(name, "Edema") for name, _ in ROWS]
    write_table(folder / "Data_Entry_2017_v2020.csv", other, HEADER.replace("Gender", "Sex"))
    assert prepare(job()).about["labels"] == "Data_Entry_2017.csv"
    assert "holds Data_Entry_2017_v2020.csv too" in said.text
    (folder / "Data_Entry_2017.csv").unlink()
    prepared = prepare(job(out="b"))
    assert prepared.about["labels"] == "Data_Entry_2017_v2020.csv" and labels_of(prepared, [3])[0, 9] == 1


def test_impossible_ages_become_unknown(job, folder, said):
    lines = [line(*row) for row in ROWS]
    write_table(folder / "Data_Entry_2017.csv", [line(*ROWS[0], age="414"), *lines[1:]])
    age = prepare(job()).table["age"]
    assert np.isnan(age[0]) and (age[1:] == 58).all() and "1 ages over 120 years count as unknown" in said.text


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
    assert test["patient_id"].tolist() == ["6", "99", "4"] and test["follow_up"].tolist() == [0, -1, -1]
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


# ---- weights that have seen the test images ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "m-25012018-123527.pth.tar",
        "nih-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
        "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt",
        "densenet121-res224-all/model.pt",
        "models--torchxrayvision--densenet121-res224-nih/snapshots/0/model.pt",
    ],
)
def test_public_weights_that_have_seen_the_test_list(name, tmp_path):
    assert "have seen official test images" in refusal(check_weights, str(tmp_path / name), "official")
    check_weights(str(tmp_path / name), "all")


def test_weights_by_their_form(tmp_path, said):
    state = {"module.densenet121.features.conv0.weight": torch.zeros(2, 3, 1, 1)}
    torch.save({"state_dict": state}, tmp_path / "model.pth.tar")
    check_weights(str(tmp_path / "model.pth.tar"), "official")
    assert f"{tmp_path / 'model.pth.tar'}: whether these weights have seen the test images is unknown" in said.text
    torch.save(
        {"state_dict": state | {"module.densenet121.classifier.0.weight": torch.zeros(14, 2)}},
        tmp_path / "model.pth.tar",
    )
    assert "it has the form of public CheXNet code" in refusal(check_weights, tmp_path / "model.pth.tar", "official")
    said.clear()
    for name in ("imagenet", "none"):
        check_weights(name, "official")
    for name in ("chex-densenet121-d121-x.pt", "densenet121-res224-chex/model.pt", "absent.safetensors"):
        assert not leaks._public(tmp_path / name)
    assert not said.text


def test_weights_of_a_run(tmp_path, said):
    path = tmp_path / "run" / "fold0" / "whole" / "final.safetensors"
    path.parent.mkdir(parents=True)
    save_weights(path, {"a": torch.zeros(1)})
    config = {"solution": "chestxray14", "split": "official"}
    write_json(tmp_path / "run" / "config.json", config)
    check_weights(str(path), "official")
    assert "is unknown" not in said.text
    write_json(tmp_path / "run" / "config.json", config | {"split": "all"})
    assert "was trained with split all" in refusal(check_weights, str(path), "official")
    check_weights(str(path), "all")
    assert "is unknown" not in said.text
    check_weights(str(path), "all", {"test images": ["c"]})
    assert "is unknown" in said.text  # without its images.parquet
    said.clear()
    images = pd.DataFrame({"image_id": list("abcd"), "split": ["train"] * 3 + ["test"], "fold": [0, 1, 2, -1]})
    images.to_parquet(tmp_path / "run" / "images.parquet")
    check_weights(str(path), "all", {"test images": ["d", "e"], "images that fold 4 holds out": ["a"]})
    for name in ("test images", "images that fold 4 holds out"):
        message = refusal(check_weights, str(path), "all", {name: ["b", "d"]})
        assert message.endswith(f"run was trained on 1 of the {name}, such as b")
    variant = path.parent / "variants" / "ema.safetensors"
    variant.parent.mkdir()
    variant.write_bytes(path.read_bytes())
    assert "such as c" in refusal(check_weights, str(variant), "all", {"x": ["c"]})
    check_weights(str(variant), "all", {"x": ["a"]})
    other = tmp_path / "run" / "own.safetensors"  # of no fold: all training images count
    other.write_bytes(path.read_bytes())
    assert "such as a" in refusal(check_weights, str(other), "all", {"x": ["a"]})
    assert "is unknown" not in said.text
    write_json(tmp_path / "run" / "config.json", {"solution": "siim_pneumothorax"})
    assert "3,833" in refusal(check_weights, str(path), "official")
    write_json(tmp_path / "run" / "config.json", {"solution": "vinbigdata"})
    check_weights(str(path), "official")
    assert "is unknown" in said.text


def image_table(folds, test=("t",)):
    """An image table: the images a, b, … in these folds, then test images."""
    ids = [chr(ord("a") + number) for number in range(len(folds))]
    return pd.DataFrame(
        {
            "image_id": [*ids, *test],
            "split": ["train"] * len(ids) + ["test"] * len(test),
            "fold": [*folds, *[-1] * len(test)],
        }
    )


def with_weights(path, **changes):
    changed = dataclasses.replace(SMALL, whole=dataclasses.replace(SMALL.whole, weights=str(path)), **changes)
    return dataclasses.replace(changed, folds=(0,)) if "folds" not in changes else changed


def test_copied_weights_say_what_they_have_seen(tmp_path, said):
    """A file outside its run's folder has its metadata alone."""
    table, path = image_table([0, 0, 1, 1]), tmp_path / "copy.safetensors"
    about = origin(SMALL, table, 0)
    assert about == {
        "solution": "chestxray14",
        "split": "official",
        "fold": 0,
        "images": 2,
        "names": names_digest(["c", "d"]),
    }
    save_weights(path, {"a": torch.zeros(1)}, trained_on=about)
    check_run(with_weights(path), table)  # of the very images that this run trains on
    assert not said.text
    for config, other in (
        (with_weights(path, folds=(1,)), table),
        (with_weights(path, folds=(0, 1)), table),
        (with_weights(path), image_table([0, 1, 0, 1])),
        (with_weights(path, split="all"), image_table([0, 1, 1, 0], ())),
    ):
        message = refusal(check_run, config, other)
        assert message.startswith(f"{path}: trained on 2 images of ChestX-ray14 other than")
    save_weights(path, {"a": torch.zeros(1)}, trained_on=about | {"split": "all"})
    assert "their run was trained with split all" in refusal(check_run, with_weights(path), table)
    save_weights(path, {"a": torch.zeros(1)}, trained_on="what others write")
    check_run(with_weights(path), table)
    assert "is unknown" in said.text


def test_weights_copied_into_another_run_are_not_taken_for_its_own(tmp_path):
    path = tmp_path / "run" / "fold0" / "whole" / "final.safetensors"
    path.parent.mkdir(parents=True)
    write_json(tmp_path / "run" / "config.json", {"solution": "chestxray14", "split": "official"})
    own, other = image_table([0, 0, 1, 1]), image_table([1, 1, 1, 0])
    own.to_parquet(tmp_path / "run" / "images.parquet")
    save_weights(path, {"a": torch.zeros(1)}, trained_on=origin(SMALL, own, 0))
    check_run(with_weights(path), own)
    assert "2 of the images that fold 1 holds out, such as c" in refusal(
        check_run, with_weights(path, folds=(0, 1)), own
    )
    save_weights(path, {"a": torch.zeros(1)}, trained_on=origin(SMALL, other, 0))
    assert "trained on 3 images of ChestX-ray14 other than" in refusal(check_run, with_weights(path), own)


def test_a_run_refuses_such_weights(job, tmp_path):
    """Those that have seen test images before anything is decoded, those of held-out images before training."""
    first = prepare(job(out="first"))
    held = first.table.loc[first.table["fold"] == 0, "image_id"].tolist()
    job(out="first").run.write_config("chestxray14", "demo", SMALL)
    path = tmp_path / "first" / "fold1" / "whole" / "final.safetensors"
    path.parent.mkdir(parents=True)
    save_weights(path, {"a": torch.zeros(1)}, trained_on=origin(SMALL, first.table, 1))
    second = job(with_weights(path), out="second")
    prepare(second)
    message = refusal(SOLUTION.before_training, second)
    assert f"was trained on {len(held)} of the images that fold 0 holds out, such as {held[0]}" in message
    second = job(with_weights(path, folds=(1,)), out="second")
    SOLUTION.before_training(second)
    job(out="first").run.write_config("chestxray14", "demo", dataclasses.replace(SMALL, split="all"))
    other = job(with_weights(path, folds=(1,)), out="other", store=tmp_path / "fresh")
    assert "was trained with split all" in refusal(prepare, other) and not (tmp_path / "fresh").exists()


# ---- the real tables -----------------------------------------------------------------------------------------------


def test_the_whole_real_table():
    path = label_table("Data_Entry_2017_v2020.csv.gz")
    if path is None:
        pytest.skip("torchxrayvision, which carries the labels, is not installed")
    labels = read_labels(path)
    assert len(labels) == 112_120 and labels["patient_id"].nunique() == 30_805
    marked = labels[list(LABELS)].to_numpy()
    assert (marked.sum(axis=1) == 0).sum() == 60_361 and labels["Hernia"].sum() == 227
    assert (patient_of(labels["image_id"]) == labels["patient_id"]).all()
    patients = labels["patient_id"].to_numpy()
    folds = make_folds(marked, 10, patients)
    assert shared_groups(folds, patients) == 0 and np.ptp(np.bincount(folds)) < 30
    assert prevalence_deviation(marked, folds) < 0.05
    boxes = read_boxes(label_table("BBox_List_2017.csv.gz"))
    counts = {LABELS[label]: n for label, n in boxes["label"].value_counts().items()}
    assert len(boxes) == 984 and boxes["image_id"].nunique() == 880
    assert counts == {
        "Atelectasis": 180,
        "Effusion": 153,
        "Cardiomegaly": 146,
        "Infiltration": 123,
        "Pneumonia": 120,
        "Pneumothorax": 98,
        "Mass": 85,
        "Nodule": 79,
    }
    assert boxes["image_id"].isin(labels["image_id"]).all()


def test_the_real_folder():
    folder = real_data("chestxray14")
    if folder is None:
        pytest.skip("no real radiographs ($CXR_REAL_DATA/chestxray14)")
    labels, about = data._read_labels(folder, folder / "Data_Entry_2017.csv", "official")
    assert len(labels) == 1_378 and (labels["official"] == "test").sum() == 221
    assert about["lists"]["train_val"]["images"] == 1_157 and not about["lists"]["whole"]
    boxes = data._boxes(folder, labels)
    assert len(boxes) == 58 and set(labels["official"][boxes["row"]]) == {"test"}  # NIH drew boxes in test images only


def test_the_record(job):
    prepare(job())
    record = read_json(job().run.path("manifest.json"))["steps"]["prepare"]
    assert record["about"]["lists"]["test"]["images"] == 3 and record["about"]["structures"] is None
    assert re.fullmatch("[0-9a-f]{64}", record["about"]["sha256"]) and not record["synthetic"]
