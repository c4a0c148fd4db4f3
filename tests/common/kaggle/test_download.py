"""`download` with the real client against the local server."""

import errno
import json
import os
import time

import pytest

from common.kaggle import client
from solutions.siim_pneumothorax.config import SLUG
from tests.kaggle_server import KEY, TOKEN, USER

FILES = {"stage_2_train.csv": "ImageId,EncodedPixels\n", "images/1.dcm": "one"}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def words(tmp_path):
    return ("siim_pneumothorax", "download", "--data", tmp_path / "data")


def test_hangs_and_breaks_continue_where_they_were(server, command, words, make_zip, tmp_path, monkeypatch):
    big = os.urandom(5_000_000)
    server.competitions[SLUG] = make_zip({**FILES, "big.bin": big})
    server.stalls[:] = [2 << 20]
    server.on_hang = lambda: monkeypatch.setattr(client, "TIMEOUT", 60.0)
    monkeypatch.setattr(client, "TIMEOUT", 1.0)
    server.cuts[:] = [None, 1 << 20]
    status, said, _ = command(*words)
    assert status == 0 and f"competition {SLUG}: 3 files, 0.005 GB" in said and "Resuming from" in said
    first, second, third = (headers.get("Range") for headers in server.asked("GET"))
    assert first is None and 1 << 20 <= int(second[6:-1]) <= 2 << 20 and int(third[6:-1]) > int(second[6:-1])
    assert names(tmp_path / "data") == [".kaggle-download.json", "big.bin", "images/1.dcm", "stage_2_train.csv"]
    assert (tmp_path / "data/big.bin").read_bytes() == big
    asked = len(server.requests)
    assert "complete since" in command(*words)[1] and len(server.requests) == asked
    (tmp_path / "data/big.bin").unlink()
    server.refuse("DownloadDataFiles", 503)
    assert "internal error (503)" in command(*words)[2]
    assert all("Authorization" not in headers for headers in server.asked("GET"))


def test_a_full_disk_keeps_what_has_arrived(server, command, refused, words, make_zip, tmp_path, monkeypatch):
    server.competitions[SLUG] = make_zip({**FILES, "big.bin": os.urandom(3_000_000)})
    server.cuts[:] = [2 << 20]

    def fail(seconds):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(time, "sleep", fail)  # called before the client tries again
    assert "the disk is full; make room, what has arrived is kept" in refused(*words)
    begun = (tmp_path / "data" / f"{SLUG}.zip").stat().st_size
    server.requests.clear()
    assert begun > 1 << 20 and command(*words)[0] == 0
    assert [headers.get("Range") for headers in server.asked("GET")] == [None, f"bytes={begun}-"]


def test_a_disk_without_room_is_seen_before_the_transfer(server, refused, words, make_zip, tmp_path, monkeypatch):
    server.competitions[SLUG] = make_zip(FILES)
    monkeypatch.setattr(client.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 100}))
    assert "the disk has 1e-07 GB free; make room" in refused(*words) and names(tmp_path / "data") == []


def test_a_damaged_archive_is_downloaded_again(server, command, refused, words, make_zip, tmp_path):
    whole = make_zip(FILES)
    server.competitions[SLUG] = whole.replace(b"one", b"ONE")
    line = refused(*words)
    assert "damaged archive" in line and "the same command downloads it again" in line
    assert names(tmp_path / "data") == ["stage_2_train.csv"]
    server.competitions[SLUG] = whole
    assert command(*words)[0] == 0 and (tmp_path / "data/images/1.dcm").read_text() == "one"


@pytest.mark.parametrize("note", ["", "[]", "[" * 100_000, '{"%s": 5}', '{"%s": {}}', '{"%s": {"files": "3"}}'])
def test_a_damaged_note_is_no_complete_download(server, command, words, make_zip, tmp_path, note):
    server.competitions[SLUG] = make_zip(FILES)
    assert command(*words)[0] == 0
    path = tmp_path / "data/.kaggle-download.json"
    whole = json.loads(path.read_text())
    path.write_text(note.replace("%s", SLUG))
    status, said, _ = command(*words)
    assert status == 0 and "complete since" not in said and json.loads(path.read_text())[SLUG]["files"] == 2
    assert whole[SLUG]["files"] == 2 and "complete since" in command(*words)[1]


@pytest.mark.parametrize("name", ["archive.zip.x", "archive.7z", "archive"])
def test_the_end_of_an_address_names_no_other_file(server, refused, words, make_zip, tmp_path, name):
    server.competitions[SLUG], server.archive = make_zip(FILES), name
    assert "Kaggle did not send a zip" in refused(*words) and names(tmp_path / "data") == []


def test_each_refusal_is_a_line_and_keeps_what_is_there(server, home, refused, words, make_zip, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.txt").write_text("mine")
    assert "knows no such competition" in refused(*words)
    server.competitions[SLUG] = make_zip(FILES)
    server.rules.add(SLUG)
    assert f"accept its rules at https://www.kaggle.com/competitions/{SLUG}/rules" in refused(*words)
    server.refuse("DownloadDataFiles", 429, headers={"Retry-After": "60"}.items())
    assert "too many requests (429): wait some minutes" in refused(*words)
    monkeypatch.setattr(client, "TIMEOUT", 0.5)
    server.hang("DownloadDataFiles")
    assert "connection to Kaggle failed (ReadTimeout)" in refused(*words)
    monkeypatch.setattr(client, "TIMEOUT", 60.0)
    (home / ".kaggle/kaggle.json").write_text(json.dumps({"username": USER, "key": "an-old-key"}))
    assert "does not accept the credentials in" in refused(*words)
    (home / ".kaggle/kaggle.json").unlink()
    assert "no Kaggle credentials found" in refused(*words)
    assert names(tmp_path / "data") == ["mine.txt"]


def test_a_token_and_no_server(server, home, command, refused, words, make_zip, tmp_path, monkeypatch):
    (home / ".kaggle/kaggle.json").unlink()
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    server.competitions[SLUG] = make_zip(FILES)
    assert command(*words)[0] == 0
    assert server.asked("DownloadDataFiles")[0]["Authorization"] == f"Bearer {TOKEN}"
    for name, value in (("http_proxy", "http://127.0.0.1:9"), ("KAGGLE_USERNAME", USER), ("KAGGLE_KEY", KEY)):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    assert "connection to Kaggle failed" in refused(*words, "--again")
    assert names(tmp_path / "data") == [".kaggle-download.json", *sorted(FILES)]


def test_datasets_need_no_account_and_have_folders_of_their_own(server, home, command, make_zip, tmp_path):
    (home / ".kaggle/kaggle.json").unlink()
    server.datasets["kmader/pulmonary-chest-xray-abnormalities"] = make_zip({"a.png": "a"})
    server.datasets["yoctoman/shcxr-lung-mask"] = make_zip({"a_mask.png": "m"})
    assert command("lung_segmentation", "download", "--data", tmp_path / "data")[0] == 0
    found = [name for name in names(tmp_path / "data") if not name.endswith(".json")]
    assert found == ["pulmonary-chest-xray-abnormalities/a.png", "shcxr-lung-mask/a_mask.png"]
    assert all("Authorization" not in headers for _, _, headers in server.requests)


def test_wrong_folders_and_a_solution_without_files_on_kaggle(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refused("vinbigdata", "download", "--data", tmp_path / "file")
    line = refused("covid19", "download", "--data", tmp_path / "d")
    assert "Kaggle does not have its files. Clone github.com" in line
