"""Reading the collections' tables as they are published, and as they go wrong."""

import logging
from pathlib import Path

import pytest

from benchmarks.tables import label_table, real_data
from common.errors import InputError
from common.paths import check_id
from common.submit.table import read_table
from solutions.covid19.collections import (
    ACTUALMED,
    FIGURE1,
    from_chexpert,
    label_of,
    read_collections,
    read_exclusions,
    read_test_images,
)

NIH_HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,\n"


def write(folder, name, text, images=()):
    """A table and empty image files below `folder`; nothing here reads a pixel."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    for image in images:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).touch()
    return folder


def metadata(tmp_path, rows, header="patientid,sex,age,finding,view,modality,folder,filename", images=()):
    return write(tmp_path / "home", "metadata.csv", "\n".join([header, *rows]) + "\n", images)


def row(table, file_name):
    return table[table["file_name"] == file_name].iloc[0]


def test_label():
    labels = {
        1: ["COVID-19", "COVID-19, ARDS", "Pneumonia/Viral/COVID-19", "covid 19", "SARS-CoV-2"],
        0: ["SARS", "MERS-CoV", "No Finding", "No finding", "Pneumonia/Viral", "ARDS"],
        -1: ["todo", "Unknown", "", "n/a", "No COVID-19", "COVID-19?", "Pneumonia/todo", "Coronavirus"],
    }
    for label, findings in labels.items():
        assert [label_of(finding) for finding in findings] == [label] * len(findings)


def test_ieee_rows(tmp_path):
    folder = metadata(
        tmp_path,
        [
            "7,M,65,COVID-19,AP Supine,X-ray,images,a b(1).jpeg",
            "7,F,60s,SARS,L,X-ray,images,c.png",
            ",,,todo,Axial,CT,volumes,d.nii.gz",
            "8,,414,Pneumonia,Coronal,X-ray,images,e.png",
            "9,,0.5,Pneumonia,strange,xray,images,gone.png",
        ],
        images=["images/a b(1).jpg", "images/c.png", "images/e.png", "images/.hidden.png"],
    )
    table = read_collections([folder])
    assert len(table) == 5
    assert table["line"].tolist() == [2, 3, 4, 5, 6]
    assert table["label"].tolist() == [1, 0, -1, 0, 0]
    assert table["view"].tolist() == ["frontal", "lateral", "other", "other", "unknown"]
    assert table["modality"].tolist() == ["X-ray", "X-ray", "CT", "X-ray", "X-ray"]
    assert table["age"].fillna(-1).tolist() == [65, -1, -1, -1, 0.5]
    assert table["age_said"].tolist() == ["", "60s", "", "414", ""]
    assert table["path"].isna().tolist() == [False, False, True, False, True]
    assert table["path"][0] == folder / "images/a b(1).jpg"  # a file of another suffix than the table says
    assert table["image_id"].tolist() == ["a-b-1-", "c", "d.nii.gz", "e", "gone"]
    assert table["patient_id"].tolist() == ["home 7", "home 7", "home image d.nii.gz", "home 8", "home 9"]
    assert table["home"].all() and set(table["collection"]) == {"home"} and not table["devices"].any()


def test_source_names_the_collection(tmp_path):
    header = "patientid,finding,filename,source"
    sources = ["a.png,ieee8023/covid-chestxray-dataset", "b.png,x/Actual-y", "c.png,"]
    folder = metadata(tmp_path, [f"1,SARS,{source}" for source in sources], header)
    table = read_collections([folder])
    assert table["collection"].tolist() == ["covid-chestxray-dataset", "Actual-y", "home"]
    assert table["patient_id"].nunique() == 3


def test_the_first_published_header(tmp_path):
    header = "Patientid,offset,sex,age,finding,survival,view,date,location,filename,doi, url,license,notes"
    folder = metadata(
        tmp_path,
        ['2,0,M,65,COVID-19,Y,PA,2020,,a.jpeg,,,,"two\nlines, and a comma"', "3,,,,SARS,,CT,2020,,b.jpeg,,,,"],
        header,
    )
    table = read_collections([folder])
    assert table["patient_id"].tolist() == ["home 2", "home 3"] and table["line"].tolist() == [2, 3]
    assert table["view"].tolist() == ["frontal", "other"] and table["modality"].tolist() == ["", ""]


def test_actualmed_and_figure1_are_known_by_what_names_the_image(tmp_path):
    common = "patientid,offset,sex,age,finding,survival,temperature,pO2 saturation,view,modality"
    write(
        tmp_path / "a",
        "metadata.csv",
        f"{common},imagename,artifacts/distortion,notes\n"
        'ANON1,,,,No finding,,,,PA,X-ray,CR.1.2.840.png,,"Negative, dated"\n',
        ["images/CR.1.2.840.png"],
    )
    write(
        tmp_path / "f",
        "metadata.csv",
        f"{common},originalfile,artifacts/distortion,notes\n"
        "COVID-00003a,8,M,50+,COVID-19,,,,AP erect,X-ray,COVID-0024.jpeg,,\n"
        "COVID-00003b,8,M,28,,,,,AP erect,X-ray,COVID-0025.jpeg,,\n",
        ["images/COVID-00003a.jpg"],
    )
    table = read_collections([tmp_path])
    assert table["collection"].tolist() == [ACTUALMED, FIGURE1, FIGURE1]
    assert table["image_id"].tolist() == ["CR.1.2.840", "COVID-00003a", "COVID-00003b"]
    assert table["patient_id"][1] == table["patient_id"][2] == "Figure1-COVID-chestxray-dataset COVID-00003"
    assert table["label"].tolist() == [0, 1, -1] and table["age_said"].tolist() == ["", "50+", ""]
    assert table["path"].notna().tolist() == [True, True, False]


def test_nih(tmp_path):
    rows = "00000013_000.png,No Finding,0,0013,058Y,M,PA,\n00000014_000.png,Effusion|Mass,0,14,6M,F,AP,\n"
    write(tmp_path, "Data_Entry_2017.csv", NIH_HEADER + rows, ["images_001/images/00000013_000.png"])
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("a second table of the same rows is not read\n")
    table = read_collections([tmp_path])
    assert table["patient_id"].tolist() == ["NIH ChestX-ray14 13", "NIH ChestX-ray14 14"] and not table["home"].any()
    assert table["age"].tolist() == [58, 0.5] and table["finding"].tolist() == ["No Finding", "Effusion|Mass"]
    assert table["path"].notna().tolist() == [True, False] and table["label"].tolist() == [0, 0]


@pytest.mark.parametrize("inner", ["", "CheXpert-v1.0-small/"])
def test_chexpert(tmp_path, inner):
    start = "CheXpert-v1.0-small/train/patient00001/study"
    text = (
        "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema,Fracture,Support Devices\n"
        f"{start}1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,1.0\n"
        f"{start}1/view2_lateral.jpg,Female,68,Lateral,,1.0,,,\n"
        f"{start}2/view1_frontal.jpg,Male,68,Frontal,PA,,1.0,1.0,-1.0\n"
        f"{start}3/view1_frontal.jpg,Male,68,Frontal,LL,,-1.0,0.0,0.0\n"
    )
    folder = write(tmp_path, "train.csv", text, [f"{inner}train/patient00001/study1/view1_frontal.jpg"])
    table = read_collections([folder])
    assert table["finding"].tolist() == ["No Finding", "No Finding", "Edema|Fracture", ""]
    assert table["label"].tolist() == [0, 0, 0, -1] and table["devices"].tolist() == [True, False, True, False]
    assert table["view"].tolist() == ["frontal", "lateral", "frontal", "other"]
    assert table["image_id"][0] == "patient00001_study1_view1_frontal" and table["image_id"].is_unique
    assert set(table["patient_id"]) == {"CheXpert patient00001"}
    assert table["path"].notna().tolist() == [True, False, False, False]


def test_whole_chexpert_download(tmp_path):
    start, header = "CheXpert-v1.0/train/patient0000", "Path,No Finding,Support Devices\n"
    text = header + f"{start}1/study1/view1_frontal.jpg,1.0,\n{start}2/study1/view1_frontal.jpg,,1.0\n"
    table, other = (f"CheXpert-v1.0 batch {name}" for name in ("1 (validate & csv)", "3 (train 2)"))
    write(tmp_path, f"{table}/train.csv", text, [f"{other}/patient00002/study1/view1_frontal.jpg"])
    image = "valid/patient64541/study1/view1_frontal.jpg"
    write(tmp_path, f"{table}/valid.csv", header + f"CheXpert-v1.0/{image},1.0,0.0\n", [f"{table}/{image}"])
    found = read_collections([tmp_path])
    assert found["finding"].tolist() == ["No Finding", "", "No Finding"]
    assert found["devices"].tolist() == [False, True, False] and found["path"].notna().tolist() == [False, True, True]
    assert read_collections([tmp_path / table])["path"].notna().tolist() == [False, True, True]


def test_devices_of_nih_images_if_the_table_names_them(tmp_path):
    rows = "1_0.png,No Finding,0,1,50,M,PA,1\n2_0.png,No Finding,0,2,50,M,PA,\n"
    write(tmp_path, "Data_Entry_2017.csv", NIH_HEADER.strip() + "Support Devices\n" + rows)
    assert read_collections([tmp_path])["devices"].tolist() == [True, False]


def test_exclusions_by_file_name_or_id(tmp_path, caplog):
    names = ["a.b.png", "x.jpg", "../x.jpg", "c.png"]
    table = read_collections([metadata(tmp_path, [f"1,,,SARS,PA,,,{name}" for name in names])])
    assert table["image_id"].tolist() == ["a.b", "home-x", "home-x-2", "c"]
    path = tmp_path / "exclude.csv"
    path.write_text("image,why\na.b.jpeg,marked\nhome-x-2,\nnowhere.png,\n")
    with caplog.at_level(logging.INFO):
        found = read_exclusions(path, table)
    assert found.tolist() == ["excluded by hand (marked)", "", "excluded by hand", ""]
    assert "1 of its 3 images are in no table, such as nowhere" in caplog.text
    path.write_text("c.png\n")  # without header or reasons
    assert read_exclusions(path, table).tolist() == ["", "", "", "excluded by hand"]
    path.write_text("image\nnowhere.png\n")
    with pytest.raises(InputError, match=r"exclude.csv: names no image of the collections \(--exclude\)"):
        read_exclusions(path, table)


def test_collection_below_another_keeps_its_files(tmp_path):
    folder = metadata(tmp_path, ["1,,,COVID-19,PA,,,x.png"], images=["images/x.png"])
    row = "x.png,No Finding,0,1,50,M,PA,\n"
    write(folder / "normals", "Data_Entry_2017.csv", NIH_HEADER + row, ["images_001/images/x.png"])
    table = read_collections([folder, folder / "normals"])  # the second is already found below the first
    assert table["path"].tolist() == [folder / "images/x.png", folder / "normals/images_001/images/x.png"]
    assert table["image_id"].tolist() == ["home-x", "NIH-ChestX-ray14-x"]


def test_ids_are_unique_and_safe_and_no_row_is_lost(tmp_path):
    names = ["a.png", "a.png", "a.jpg", "../../etc/passwd.png", "", "肺.png", "...x.png", "home-a-2.png"]
    table = read_collections(
        [metadata(tmp_path, [f"1,,,SARS,PA,,,{name}" for name in names], images=["images/肺.png"])]
    )
    assert table["file_name"].tolist() == names and table["image_id"].is_unique
    for image_id in table["image_id"]:
        check_id(image_id, "here")
    assert table["path"].notna().tolist() == [name == "肺.png" for name in names]


def test_of_two_files_the_table_folder_and_the_very_name_decide(tmp_path):
    files = ["images/a.png", "annotations/a.png", "images/b.png", "images/b.jpg", "masks/c.png", "other/c.png"]
    folder = metadata(tmp_path, ["1,,,SARS,PA,,images,a.png", "1,,,SARS,PA,,images,b.jpg"], images=files)
    assert read_collections([folder])["path"].tolist() == [folder / "images/a.png", folder / "images/b.jpg"]
    metadata(tmp_path, ["1,,,SARS,PA,,images,c.png"])
    with pytest.raises(InputError, match=r"metadata.csv, row 2: c.png may be .*masks.c.png or .*other.c.png"):
        read_collections([folder])


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("metadata.csv", b"patientid,filename\n1,a.png\n", "metadata.csv, row 1: no column finding"),
        ("metadata.csv", b"finding,view\nSARS,PA\n", "metadata.csv, row 1: no column patientid"),
        ("metadata.csv", b"patientid,finding,filename\n", "metadata.csv: no rows under its header"),
        ("metadata.csv", b"", "metadata.csv: empty file"),
        ("metadata.csv", b"patientid,finding,filename\n1,SARS\n", "metadata.csv, row 2: 2 values where"),
        ("metadata.csv", b"patientid,finding,filename\n1,SARS \xe9,a\n", "metadata.csv: not a CSV file"),
        ("metadata.csv", b"patientid,finding,Finding,filename\n1,SARS,SARS,a\n", "the column finding appears twice"),
        ("Data_Entry_2017.csv", b"Image Index,Finding Labels\na,No Finding\n", "2017.csv, row 1: no column Patient ID"),
        ("train.csv", b"Path,Sex\na,M\n", "train.csv, row 1: no column No Finding"),
        ("train.csv", b"id,label\n1,2\n", "no collection in it"),
        ("other.csv", b"a\n1\n", "no collection in it"),
    ],
)
def test_bad_tables_end_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_collections([tmp_path])
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_collections([tmp_path / "nowhere"])


def test_absent_columns_are_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    table = read_collections([metadata(tmp_path, ["SARS,a.png", "COVID-19,b.png"], "finding,filename")])
    assert "no column patientid, age, view; unknown for all its images" in caplog.text
    assert "home: 2 rows, 1 of them COVID-19; 0 of unknown finding, 2 without a file" in caplog.text
    assert table["patient_id"].tolist() == ["home image a", "home image b"] and set(table["view"]) == {"unknown"}


def test_unlabelled_test_beside_the_table(tmp_path):
    folder = metadata(tmp_path, ["1,,,SARS,PA,,,a.png"], images=["images/a.png", "images/b.jpg", "x/a.jpg"])
    assert len(read_test_images(folder, None)) == 0
    write(folder, "unlabelled_test.csv", "filename,patientid,view\nb.png,9,PA\nx/a.jpg,,\n")
    test = read_test_images(folder, None, taken=["a"])
    assert test["image_id"].tolist() == ["b", "test-a"]
    assert test["path"].tolist() == [folder / "images/b.jpg", folder / "x/a.jpg"]
    assert test["patient_id"].tolist() == ["9", "image test-a"] and set(test["collection"]) == {""}


def test_option_test_replaces_it(tmp_path):
    folder = metadata(tmp_path, ["1,,,SARS,PA,,,a.png"], images=["images/a.png", "images/b.png"])
    write(folder, "unlabelled_test.csv", "filename\na.png\n")
    listed = write(tmp_path, "list.csv", "name,patient_id\nb.png,4\n") / "list.csv"
    assert read_test_images(folder, listed)[["image_id", "patient_id"]].to_numpy().tolist() == [["b", "4"]]
    listed.write_text("b.png\n")  # without a header
    assert [path.name for path in read_test_images(folder, listed)["path"]] == ["b.png"]
    loose = write(tmp_path / "loose", "note.txt", "", ["t1.png", "deep/t2.jpg"])
    test = read_test_images(folder, loose)
    assert test["file_name"].tolist() == ["t2.jpg", "t1.png"] or test["file_name"].tolist() == ["t1.png", "t2.jpg"]
    assert {Path(path).name for path in test["path"]} == {"t1.png", "t2.jpg"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("filename\na.png\na.png\n", "a.png: listed twice among"),
        ("filename\na.png\ngone.png\n", "1 of 2 images to predict have no file, the first is gone.png"),
        ("filename\n", "no rows"),
        ("filename,view\n,PA\n", "row 2: no file name"),
    ],
)
def test_bad_test_lists(tmp_path, text, said):
    folder = metadata(tmp_path, ["1,,,SARS,PA,,,a.png"], images=["images/a.png"])
    write(folder, "unlabelled_test.csv", text)
    with pytest.raises(InputError, match=said):
        read_test_images(folder, None)


def test_real_collections():
    covid, nih = real_data("covid19"), real_data("chestxray14")
    if covid is None or nih is None:
        pytest.skip("no real radiographs ($CXR_REAL_DATA)")
    table = read_collections([covid, nih])
    counts = table.groupby("collection", sort=False)["label"].agg(["size", "sum"]).to_numpy().tolist()
    assert counts == [[400, 328], [33, 19], [33, 29], [1378, 0]]
    assert table["image_id"].is_unique and table["path"].notna().all() and (table["label"] >= 0).all()
    assert sorted(set(table["age_said"])) == ["", "50+", "early 40s"]
    test = read_test_images(covid, None, table["image_id"])
    assert len(test) == 142 and test["path"].notna().all() and not set(test["image_id"]) & set(table["image_id"])


def test_a_chexpert_table_without_columns_of_findings(tmp_path):
    (tmp_path / "train.csv").write_text("Path,Sex,Age,No Finding\npatient1/s1/v1.jpg,Female,68,1.0\np2/v.jpg,,,\n")
    table = from_chexpert(tmp_path / "train.csv", read_table(tmp_path / "train.csv"))
    assert table[["finding", "age", "patient_id"]].fillna(0).to_numpy().tolist() == [
        ["No Finding", 68, "patient1"],
        ["", 0, ""],
    ]


@pytest.mark.long
def test_whole_chexpert_table():
    path = label_table("chexpert_train.csv.gz")
    if path is None:
        pytest.skip("torchxrayvision, which carries CheXpert's table, is not installed")
    table = from_chexpert(path, read_table(path))
    assert len(table) == 223_414 and table["patient_id"].nunique() == 64_540
    assert (table["finding"] == "No Finding").sum() == 22_381
    assert table["view"].value_counts()["lateral"] == 32_387 and (table["view"] == "unknown").sum() == 0
