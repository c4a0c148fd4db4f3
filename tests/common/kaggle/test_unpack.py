"""Archives that must not be trusted, and those whose unpacking broke off."""

import errno
import os
import struct
import zipfile
from collections import namedtuple

import pytest

from common.errors import InputError
from common.kaggle import unpack as module
from common.kaggle.unpack import DamagedArchive, unpack


@pytest.fixture
def packed(make_zip, tmp_path):
    """`packed(files)`: path of a zip with them."""

    def write(files, **options):
        path = tmp_path / "a.zip"
        path.write_bytes(make_zip(files, **options))
        return path

    return write


def find_files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def everything(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in find_files(folder)}


def test_files_folders_and_a_zip_within(packed, make_zip, tmp_path):
    inner = make_zip({"1.dcm": "one", "2.dcm": "two"})
    path = packed({"train.csv": "a,b", "deep/er/x.txt": "x", "images.zip": inner}, compression=zipfile.ZIP_DEFLATED)
    assert unpack(path, tmp_path / "out") == (4, 3 + 1 + 3 + 3)
    assert everything(tmp_path / "out") == {
        "deep/er/x.txt": "x",
        "images/1.dcm": "one",
        "images/2.dcm": "two",
        "train.csv": "a,b",
    }
    assert os.stat(tmp_path / "out/train.csv").st_mode & 0o111 == 0


@pytest.mark.parametrize(
    "name, reason",
    [
        ("../out.txt", "would not stay"),
        ("a/../../out.txt", "would not stay"),
        ("/etc/out.txt", "would not stay"),
        ("C:/out.txt", "would not stay"),
        ("..\\out.txt", "would not stay"),
        ("a//b.txt", "would not stay"),
        ("", "would not stay"),
        ("a\nb.txt", "would not stay"),
        ("a\x9bb.txt", "would not stay"),
        ("a\u2028b.txt", "would not stay"),
        ("x" * 256, "would not stay"),
        ("a/" * 30 + "x", "would not stay"),
        ("link!", "is a link"),
    ],
)
def test_names_that_lead_out_and_links_are_refused_before_anything_is_unpacked(packed, tmp_path, name, reason):
    path = packed({"good.txt": "good", name: "/etc/passwd"})
    with pytest.raises(InputError, match=reason) as caught:
        unpack(path, tmp_path / "out")
    assert "\n" not in str(caught.value) and "nothing is unpacked" in str(caught.value)
    assert everything(tmp_path / "out") == {}


def test_a_name_cut_at_a_zero_byte_is_refused(packed, tmp_path):
    path = packed({"good_x.txt": "x"})
    path.write_bytes(path.read_bytes().replace(b"good_x.txt", b"good\0x.txt"))
    with pytest.raises(InputError, match="would not stay"):
        unpack(path, tmp_path / "out")


def test_device_encrypted_twice_and_clash(packed, make_zip, tmp_path):
    path = packed({"pipe": ""})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\1\2")
    device, locked, packing = content.copy(), content.copy(), content.copy()
    struct.pack_into("<H", packing, directory + 10, zipfile.ZIP_BZIP2)  # its blocks are unpacked whole, whatever size
    struct.pack_into("<I", device, directory + 38, 0o020644 << 16)
    struct.pack_into("<H", locked, directory + 8, 1)
    two = make_zip({"b.txt": "2", "c.txt": "3"}).replace(b"c.txt", b"b.txt")
    clash = make_zip({"a": "file", "a/b": "file"})
    reasons = {"device": device, "encrypted": locked, "by method 12": packing, "twice": two, "and a folder": clash}
    for reason, content in reasons.items():
        path.write_bytes(bytes(content))
        with pytest.raises(InputError, match=reason):
            unpack(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_bombs(packed, tmp_path, monkeypatch):
    path = packed({"zeros": "0" * 10_000_000}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(module, "RATIO_FROM", 1_000_000)
    with pytest.raises(InputError, match="zip bomb"):
        unpack(path, tmp_path / "out")
    monkeypatch.setattr(module, "MAX_RATIO", 2000)
    monkeypatch.setattr(module, "MAX_FILES", 0)
    with pytest.raises(InputError, match="1 entries, more than the limit of 0"):
        unpack(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(module, "MAX_FILES", 10)
    assert unpack(path, tmp_path / "out") == (1, 10_000_000)


def test_a_size_that_lies_ends_at_that_size(packed, tmp_path):
    path = packed({"zeros": "0" * 100_000}, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    for place in (content.index(b"PK\3\4") + 22, content.index(b"PK\1\2") + 24):
        struct.pack_into("<I", content, place, 10)
    path.write_bytes(content)
    with pytest.raises(DamagedArchive, match="damaged archive"):
        unpack(path, tmp_path / "out")
    assert everything(tmp_path / "out") == {}


def test_damage_keeps_what_came_before(packed, tmp_path):
    path = packed({"1.txt": "first", "2.txt": "second", "3.txt": "third"})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"second", b"sEcond"))
    with pytest.raises(DamagedArchive, match="damaged archive"):
        unpack(path, tmp_path / "out")
    assert everything(tmp_path / "out") == {"1.txt": "first"}
    path.write_bytes(whole[:-40])
    with pytest.raises(DamagedArchive):
        unpack(path, tmp_path / "out")


def test_a_zip_within_that_is_none_stays(packed, make_zip, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module.log, "warning", said.append)
    path = packed({"a.zip": "no zip", "b.zip": make_zip({"../x": "x"}), "c.zip": make_zip({"x": "x"})})
    path = path.rename(tmp_path / "outer.zip")
    unpack(path, tmp_path / "out")
    assert [p.name for p in sorted((tmp_path / "out").rglob("*")) if p.is_file()] == ["a.zip", "b.zip", "x"]
    assert len(said) == 2 and "damaged" in said[0] and "would not stay" in said[1]
    with pytest.raises(InputError, match="the archive itself"):
        unpack(packed({"a.zip": "x"}), tmp_path)


@pytest.mark.parametrize(
    "names, reason",
    [
        (["...zip"], "would not stay"),
        (["..zip"], "would not stay"),
        ([".zip"], "would not stay"),
        (["a/.zip"], "would not stay"),
        (["a/...zip"], "would not stay"),
        (["a", "a.zip"], "'a' is a file and a folder"),
        (["a.zip", "a/x.txt"], "'a/x.txt' occurs twice"),
        (["a.zip", "a/x.txt/b"], "'a/x.txt' is a file and a folder"),
        (["b.zip", "b.ZIP"], "'b/x.txt' occurs twice"),
    ],
)
def test_a_zip_within_stays_where_its_folder_would_be_odd_or_taken(packed, make_zip, tmp_path, caplog, names, reason):
    inner = make_zip({"x.txt": "inner"})
    path = packed({name: inner if name.lower().endswith(".zip") else "outer" for name in names})
    (tmp_path / "x.txt").write_text("the user's own")
    unpack(path, tmp_path / "out")
    files = {file.relative_to(tmp_path / "out").as_posix(): file.read_bytes() for file in find_files(tmp_path / "out")}
    kept = {name: inner if name.endswith(".zip") else b"outer" for name in names}
    assert files == ({"b.ZIP": inner, "b/x.txt": b"inner"} if "b.zip" in names else kept)
    assert (tmp_path / "x.txt").read_text() == "the user's own" and len(list(tmp_path.iterdir())) == 3
    (line,) = caplog.messages
    assert reason in line and "\n" not in line


def test_zips_within_share_one_budget(packed, make_zip, tmp_path, monkeypatch, caplog):
    inner = make_zip({"zeros": "0" * 600_000}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(module, "RATIO_FROM", 1_000_000)
    path = packed({f"{k}.zip": inner for k in range(3)})
    assert unpack(path, tmp_path / "out") == (3, 600_000 + 2 * len(inner))
    assert [line.count("zip bomb") for line in caplog.messages] == [1, 1]
    monkeypatch.setattr(module, "MAX_FILES", 5)
    monkeypatch.setattr(module, "RATIO_FROM", 10**9)
    assert unpack(path, tmp_path / "new")[0] == 3 and "6 entries, more than the limit of 5" in caplog.messages[-1]


def test_an_interrupted_unpacking_continues(packed, tmp_path, monkeypatch, caplog):
    path, out = packed({f"{k}.txt": f"content {k}" for k in range(4)}), tmp_path / "out"
    rename, renamed = os.replace, []

    def once(a, b):
        if len(renamed) == 2:
            raise KeyboardInterrupt
        renamed.append(b)
        rename(a, b)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        unpack(path, out)
    assert sorted(p.name for p in out.iterdir()) == ["0.txt", "1.txt"]
    (out / module.STAGING).mkdir()
    (out / module.STAGING / "2.txt").write_text("left by a process that was killed")
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append(b), rename(a, b)))
    assert unpack(path, out) == (4, 36) and [p.name for p in renamed[2:]] == ["2.txt", "3.txt"]
    assert everything(out) == {f"{k}.txt": f"content {k}" for k in range(4)}


def test_what_is_there_is_compared(packed, tmp_path, monkeypatch):
    path, out = packed({"same.txt": "same", "other.txt": "new!", "part.txt": "whole"}), tmp_path / "out"
    out.mkdir()
    for name, text in (("same.txt", "same"), ("other.txt", "old!"), ("part.txt", "who")):
        (out / name).write_text(text)
    said = []
    monkeypatch.setattr(module.log, "info", said.append)
    inode = (out / "same.txt").stat().st_ino
    unpack(path, out)
    assert everything(out) == {"same.txt": "same", "other.txt": "new!", "part.txt": "whole"}
    assert (out / "same.txt").stat().st_ino == inode
    assert len(said) == 1 and said[0].startswith("2 files differed") and "other.txt" in said[0]


def test_links_that_are_there_lead_nowhere(packed, make_zip, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept.txt").write_text("kept")
    out = tmp_path / "out"
    out.mkdir()
    (out / "train").symlink_to(tmp_path / "elsewhere")
    (out / module.STAGING).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a link that leads out"):
        unpack(packed({"a.txt": "a"}), out)
    (out / module.STAGING).unlink()
    for name, content in (("train/x.txt", "x"), ("train/in/x.txt", "x")):
        with pytest.raises(InputError, match="a link that leads out"):
            unpack(packed({"a.txt": "a", name: content}), out)
    with pytest.raises(InputError, match="a link that leads out"):
        unpack(packed({"train.zip": make_zip({"x.txt": "x"})}), out)
    assert sorted(path.name for path in out.iterdir()) == ["train", "train.zip"]
    (out / "kept.txt").symlink_to(tmp_path / "elsewhere/kept.txt")
    unpack(packed({"kept.txt": "kept"}), out)
    assert not (out / "kept.txt").is_symlink() and everything(tmp_path / "elsewhere") == {"kept.txt": "kept"}


def test_a_folder_in_the_place_of_a_file_and_the_reverse(packed, tmp_path):
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="Is a directory; files unpacked so far are kept"):
        unpack(packed({"a": "x"}), out)
    (out / "b").write_text("x")
    with pytest.raises(InputError, match=r"File exists|Not a directory"):
        unpack(packed({"b/c": "x"}), out)


def test_full_disks(packed, tmp_path, monkeypatch):
    path, out = packed({"1.txt": "first", "2.txt": "second"}), tmp_path / "out"
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(10))
    with pytest.raises(InputError, match=r"needs 1\.1e-08 GB, .* has 1e-08 GB free; make room"):
        unpack(path, out)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(100))
    copy, copied = module.shutil.copyfileobj, []

    def full(source, target):
        if copied:
            raise OSError(errno.ENOSPC, "No space left on device")
        copied.append(copy(source, target))

    monkeypatch.setattr(module.shutil, "copyfileobj", full)
    with pytest.raises(InputError, match=r"2\.txt: No space left on device; files unpacked so far are kept"):
        unpack(path, out)
    assert everything(out) == {"1.txt": "first"} and path.exists()
