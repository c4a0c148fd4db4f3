"""NIH's tables, lists and boxes: small files by hand, the whole real table."""

import pandas as pd
import pytest

from benchmarks.tables import label_table
from common.post.boxes import BOX
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.labels import DIGESTS, GROUPS, names_digest, patient_of, read_boxes, read_labels, read_lists
from tests.solutions.chestxray14.folders import (
    BOX_HEADER,
    HEADER,
    ROWS,
    TEST,
    TRAIN,
    line,
    refusal,
    write_list,
    write_table,
)

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
    assert table[[*GROUPS]].to_numpy().tolist() == [
        ["F", "40 to 59", "AP"],
        ["M", "under 40", "PA"],
        ["M", "", "PA"],  # nobody is 414 years old
        ["", "", ""],
    ]
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


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (line(".x", follow_up=0, patient=1), "'.x' is not a usable id"),
        (line("00000001_000"), "00000001_000 appears twice"),
        (line("00000009_000", "Infiltrate"), "'Infiltrate' is neither a finding"),
        (line("00000009_000", ""), "'' is neither a finding"),
        (line("00000009_000", "Mass|"), "'' is neither a finding"),
        (line("00000009_000", "No Finding|Mass"), "'No Finding' beside a finding: No Finding|Mass"),
        (line("00000009_000", patient=""), "no Patient ID"),
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
    assert about["said"].startswith("train_val_list.txt (5 images of 4 patients, sha256 ")
    assert " and test_list.txt (3 images of 2 patients, sha256 " in about["said"]
    assert not about["official"] and "not the whole official lists" in about["said"]
    for part, names in (("train_val", TRAIN), ("test", TEST)):
        monkeypatch.setitem(DIGESTS, part, names_digest(names[::-1]))
    named = read_lists(folder, ids)[1]
    assert named["official"] and named["said"].endswith("the official lists, verified by the hash of their names")
    write_list(folder / "test_list.txt", [*TEST[:2], "00000006_001"])
    other = read_lists(folder, ids)[1]
    assert not other["official"] and "not the whole official lists" in other["said"]


def test_names_digest():
    """By hand: printf 'a\\nb' | sha256sum; neither order nor suffix counts."""
    wanted = "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"
    assert names_digest(["b", "a"]) == names_digest(pd.Series(["a", "b"])) == wanted


def test_lists_under_other_names_and_line_ends(folder):
    text = (folder / "test_list.txt").read_text()
    (folder / "test_list.txt").unlink()
    (folder / "test_list_NIH.txt").write_bytes(("\ufeff" + text.replace("\n", " \r\n") + "\r\n").encode())
    found, about = read_lists(folder, [*TRAIN, *TEST])
    assert found.tolist() == ["train_val"] * 5 + ["test"] * 3 and "test_list_NIH.txt (3" in about["said"]


def test_lists_that_cannot_be_used(folder):
    path = folder / "test_list.txt"
    write_list(path, [*TEST, TRAIN[1]])
    assert "1 images are in both train_val_list.txt and test_list.txt, such as 00000001_001" in refusal(
        read_lists, folder, TRAIN
    )
    write_list(path, [*TEST, TEST[0]])
    assert refusal(read_lists, folder, TRAIN) == f"{path}, row 4: 00000005_000 appears twice"
    write_list(path, [TEST[0], "a!b"])
    assert refusal(read_lists, folder, TRAIN).startswith(f"{path}, row 2: 'a!b' is not a usable id")
    path.write_text("\n\n")
    assert refusal(read_lists, folder, TRAIN) == f"{path}: empty file"
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-16 text" in refusal(read_lists, folder, TRAIN)
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
        ("a.png,Mass,1,2,3", "5 values where the header has 6 columns"),
        ("a.png,Mass,1,2,0,4", "the box 1 2 0 4 has no area"),
        ("a.png,Mass,-1,2,3,4", "leaves the image of 1024"),
        ("a.png,Mass,1000,2,25,4", "leaves the image of 1024"),
        ("a!b.png,Mass,1,2,3,4", "'a!b' is not a usable id"),
    ],
)
def test_a_box_that_cannot_be_used(row, wrong, tmp_path):
    path = write_table(tmp_path / "b.csv", ["a.png,Mass,1,2,3,4", row], BOX_HEADER)
    message = refusal(read_boxes, path)
    assert message.startswith(f"{path}, row 3") and wrong in message
    write_table(path, [row], BOX_HEADER.replace("Finding Label", "Label"))
    assert "row 1: the header must be" in refusal(read_boxes, path)


def test_boxes_of_chestx_det(tmp_path):
    """Corners instead of sides; other findings, and rows without a box, are left out; rows keep their numbers."""
    header = "pack,image_id,class,x_min,y_min,x_max,y_max,polygon"
    rows = [
        "chestxray14,a.png,No finding,,,,,",
        'x,a.png,Pleural Thickening,10,20,30,60,"[[1,2]]"',
        "x,a.png,Fracture,1,1,2,2,",
    ]
    found = read_boxes(write_table(tmp_path / "det.csv", [*rows, "x,b.png,Mass,0,0,5,1024,"], header))
    assert found.to_numpy().tolist() == [["a", 12, 10, 20, 30, 60], ["b", 4, 0, 0, 5, 1024]]
    write_table(tmp_path / "det.csv", [*rows, "x,b.png,Mass,5,0,5,9,"], header)
    assert "det.csv, row 5 (b): the box 5 0 5 9 has no area" in refusal(read_boxes, tmp_path / "det.csv")


def test_the_whole_real_table():
    path = label_table("Data_Entry_2017_v2020.csv.gz")
    if path is None:
        pytest.skip("torchxrayvision, which carries the labels, is not installed")
    labels = read_labels(path)
    assert len(labels) == 112_120 and labels["patient_id"].nunique() == 30_805
    marked = labels[list(LABELS)].to_numpy()
    assert (marked.sum(axis=1) == 0).sum() == 60_361 and labels["Hernia"].sum() == 227
    assert (patient_of(labels["image_id"]) == labels["patient_id"]).all()
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
