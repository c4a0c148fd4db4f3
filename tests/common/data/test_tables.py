"""Tables that a user gives: ids, patients, images to predict."""

import logging

import pandas as pd
import pytest

from common.data.tables import match_names, named_images, read_ids, read_list, read_patients, some_rows
from common.errors import InputError


@pytest.fixture
def write(tmp_path):
    def run(*lines, name="table.csv"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return run


def test_rows_are_text(write):
    assert some_rows(write("id, rle", "007, -1")).to_dict("list") == {"id": ["007"], "rle": ["-1"]}
    with pytest.raises(InputError, match=r"table\.csv: no rows under its header"):
        some_rows(write("id,rle"))
    with pytest.raises(InputError, match="the header must be a,b"):
        some_rows(write("id,rle", "1,2"), ["a", "b"])


def test_patients_by_name_or_by_their_first_image(write, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    caplog.set_level("INFO", "common")
    found = read_patients(write("image,patient_id,age", "a,p1,5", "b,p1,6", "c,,7"), ["b", "c", "x", "a"])
    assert found.tolist() == ["p1", "image c", "image x", "p1"]  # nothing known, or nothing said: alone
    assert "1 of 4 images are not in it" in caplog.text
    found = read_patients(
        write("Kaggle_ID,NIH_ID", "a,00000005_001.png", "b,00000005_000.png", "c,00000006_000.png"), "abc"
    )
    assert found.tolist() == ["00000005", "00000005", "00000006"]
    assert read_patients(write("file,patient_id", "a.dcm,p1", "b.png,p1"), ["a", "b"]).tolist() == ["p1", "p1"]


def test_folders_in_a_map_of_patients(write):
    lines = write("file,patient_id", "x/a.png,p1", "y/a.png,p2", "b.dcm,p3", "z/c.png,p4", "d.png,p5", "d.jpg,p6")
    assert read_patients(lines, ["x/a.png", "y/a.png", "q/b.png", "c"]).tolist() == ["p1", "p2", "p3", "p4"]
    assert read_patients(lines, pd.Series(["b"], [7])).tolist() == ["p3"]
    with pytest.raises(InputError, match=r"none of the 1 images is in it, such as a"):
        read_patients(lines, pd.Series(["a"], [7]))  # which of the two?
    with pytest.raises(InputError, match=r"row 7: d appears twice"):
        read_patients(lines, ["b", "d"])


def test_names_match_by_path_then_by_an_unambiguous_last_part():
    known = pd.Index(["x/1", "y/1", "2", "x/3", "4"])
    assert match_names(pd.Index(["x/1", "2", "3", "x/4", "5"]), known).tolist() == ["x/1", "2", "x/3", "4", "5"]
    assert match_names(pd.Index(["1", "z/3", "a/4", "b/4"]), known).tolist() == ["1", "z/3", "a/4", "b/4"]


def test_the_name_of_a_patient_is_preferred(write):
    table = write("id,NIH_ID,patient_id", "a,00000005_001.png,p")
    assert read_patients(table, ["a"]).tolist() == ["p"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["id,who", "a,p"], r"table\.csv: needs a column patient_id or NIH_ID, has id, who"),
        (["id,patient_id", "a,p", "a,q"], r"table\.csv, row 3: a appears twice"),
        (["id,patient_id", "../a,p"], r"table\.csv, row 2: '\.\.' is not a usable id"),
        (["id,patient_id", "a"], r"table\.csv, row 2: 1 values"),
        (["id,patient_id", "a.png,p", "a.dcm,q"], r"table\.csv, row 3: a appears twice"),
        (["id,patient_id", "b,p", "c,p"], r"table\.csv: none of the 1 images is in it, such as a"),
    ],
)
def test_unusable_patient_tables_are_refused(lines, said, write):
    with pytest.raises(InputError, match=said):
        read_patients(write(*lines), ["a"])


def test_ids_keep_their_order(write):
    assert read_ids(write("id,x", "b,1", "a,2"), ["id", "x"]) == ["b", "a"]
    for lines, said in (
        (["id,x", "a,1", "a,2"], "row 3: a appears twice"),
        (["id,x", "a/b,1"], "row 2: 'a/b' is not"),
        (["id,x"], "no rows"),
    ):
        with pytest.raises(InputError, match=said):
            read_ids(write(*lines), ["id", "x"])


def test_images_of_a_folder_or_a_table(write, tmp_path):
    folder = tmp_path / "films"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "deep/a.1.JPG", "c.IMG", "notes.txt", ".hidden.png"):
        (folder / name).touch()
    assert named_images(folder) == (["a.1", "b"], {"a.1": folder / "deep" / "a.1.JPG", "b": folder / "b.png"})
    ids, files = named_images(folder, (".png", ".img"))
    assert ids == ["b", "c"] and files["c"] == folder / "c.IMG"
    table = write("name,age", "b.png,5", "a.1,6", "c.IMG,7")
    assert named_images(table) == (["b", "a.1", "c.IMG"], {})
    assert named_images(table, (".png", ".img")) == (["b", "a.1", "c"], {})


@pytest.mark.parametrize("first", ["film.png", "00000013", "1.2.276.0", "film.PNG"])
def test_a_list_without_a_header_loses_no_image(first, write):
    stem = first.removesuffix(".png").removesuffix(".PNG")
    assert named_images(write(first, "b.png", "c.png"))[0] == [stem, "b", "c"]
    assert named_images(write(f"{first},5", "b.png,6"))[0] == [stem, "b"]
    assert named_images(write(first))[0] == [stem]
    with pytest.raises(InputError, match=r"row 2: film appears twice|row 1: '-7' is not"):
        named_images(write("-7" if first == "00000013" else "film.png", "film.jpg", "film.png"))
    assert named_images(write(first, "", "b.png", ""))[0] == [stem, "b"]
    assert named_images(write(f"{first},0,0", "b.png,1,0"))[0] == [stem, "b"]  # no header with a column twice
    for header in ("Image Index", "image_id", "filename"):
        assert named_images(write(header, "b.png"))[0] == ["b"]


def test_a_first_line_without_digit_or_suffix(write, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    with caplog.at_level("INFO"):
        assert named_images(write("anna", "berta"), known={"anna", "berta"})[0] == ["anna", "berta"]
        assert named_images(write("anna", "berta"))[0] == ["berta"]
    said = dict.fromkeys(line.split(": ")[1] for line in caplog.messages)  # other tests may leave a second handler
    assert list(said) == ["no header; anna is taken for the first image", "anna is taken for the header"]


def test_lists_of_chexnet(write):
    lists = [f"0000000{k}_000.png " + " ".join("01"[j == k] for j in range(14)) for k in (1, 2, 3)]
    table = read_list(write(*lists, name="train_list.txt"))
    assert table.shape == (3, 15) and table.iloc[1].tolist() == ["00000002_000.png", "0", "0", "1", *["0"] * 11]
    assert named_images(write(*lists))[0] == ["00000001_000", "00000002_000", "00000003_000"]
    assert named_images(write("Viral Pneumonia-1.png", "x 0 1.png"))[0] == ["Viral Pneumonia-1", "x 0 1"]


def test_images_of_the_same_name(write, tmp_path):
    for name in ("p1/view1.jpg", "p2/view1.jpg", "p2/a.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    ids, files = named_images(tmp_path / "in")
    assert ids == ["a", "p1/view1", "p2/view1"] and files["p2/view1"] == tmp_path / "in" / "p2" / "view1.jpg"
    assert named_images(write("Path", "p1/view1.jpg", "p2/view1.jpg", "p2/a.png"))[0] == ["p1/view1", "p2/view1", "a"]
    for listed, found in ((["p1/view1.jpg"], ["p1/view1"]), (["p2/view1.jpg", "x/p2/a.png"], ["p2/view1", "a"])):
        assert named_images(write("Path", *listed), known=files, folder=tmp_path / "in")[0] == found
    with pytest.raises(InputError, match=r"p1/a has no file, but .*p2/a\.png is in another folder"):
        named_images(write("Path", "p1/a.png"), known=files, folder=tmp_path / "in")
    flat = {"a": tmp_path / "in" / "p2" / "a.png"}
    assert named_images(write("Path", "train/p1/a.png"), known=flat, folder=tmp_path / "in" / "p2")[0] == ["a"]
    with pytest.raises(InputError, match=r"row 3: '\.\.' is not a usable id"):
        named_images(write("Path", "p1/view1.jpg", "../view1.jpg"))


def test_images_that_are_refused(write, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "my film!.png").touch()
    for path, said in (
        (tmp_path / "empty", "no images in it"),
        (tmp_path / "odd", "'my film!' is not a usable id"),
        (tmp_path / "nowhere", "no such file"),
        (write("id", "a.png", "a.jpg"), r"\(--test\), row 3: a appears twice"),
        (write("id", "/etc/x.png", name="other.csv"), "row 2"),
        (write("id", name="none.csv"), "no rows"),
    ):
        if path.name == "other.csv":  # a path in a table is cut to its name
            assert named_images(path)[0] == ["x"]
            continue
        with pytest.raises(InputError, match=said):
            named_images(path)
