import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydicom import uid

from common.data import store as store_module
from common.data.dicom import COLOUR_LIMIT, read_image
from common.data.grey import hash_pixels
from common.data.store import Store, prepare_store
from common.errors import InputError
from tests.dicoms import dataset, deadly, picture, save

ROOT = Path(__file__).parents[3]


def write_dicom(path, pixels):
    person = {"PatientID": "P7", "PatientAge": "058Y", "PatientSex": "F", "ViewPosition": "PA"}
    save(dataset(pixels.astype(np.uint16), 12, **person), path)


def originals(folder, count=6):
    """A DICOM and PNGs of several sizes; the ids are not in the order of the names."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    write_dicom(folder / "first.dcm", rng.integers(0, 4096, (50, 40)))
    files = {"first": folder / "first.dcm"}
    for number in reversed(range(1, count)):
        path = folder / f"i{number}.png"
        cv2.imwrite(str(path), rng.integers(0, 256, (20 + number, 60 - number)).astype(np.uint8))
        files[path.stem] = path
    return files


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files decoded in this process, in order."""
    names = []
    original = store_module.read_image_and_header

    def counting(path, side):
        names.append(Path(path).name)
        return original(path, side)

    monkeypatch.setattr(store_module, "read_image_and_header", counting)
    return names


def test_rows_hold_the_stretched_images_in_order(tmp_path):
    files = originals(tmp_path / "data")
    store = prepare_store(files, tmp_path / "deep" / "store", 32, progress=False)
    assert store.images.shape == (6, 32, 32) and store.images.dtype == np.uint8
    assert isinstance(store.images, np.memmap) and not store.images.flags.writeable
    for row, path in enumerate(files.values()):
        expected = cv2.resize(read_image(path), (32, 32), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(store.images[row], expected)
    table = store.table
    columns = "image_id row width height colour content ok patient_id patient_age patient_sex view_position note"
    assert list(table.columns) == columns.split()
    assert list(table.image_id) == ["first", "i5", "i4", "i3", "i2", "i1"] and list(table.row) == list(range(6))
    assert list(table.width) == [40, 55, 56, 57, 58, 59] and list(table.height) == [50, 25, 24, 23, 22, 21]
    assert table.ok.all() and list(table.patient_id) == ["P7"] + [""] * 5 and table.view_position[0] == "PA"
    ages = table.patient_age
    assert ages[0] == 58 and ages.isna().sum() == 5 and str(ages.dtype) == "Int64"
    assert (table.colour == 0).all() and table.colour.dtype == float
    assert sorted(contents(store.folder)) == ["images.npy", "store.json", "table.parquet"]
    assert not (tmp_path / "deep" / "store.partial").exists()


def test_colour_is_a_column_of_the_table(tmp_path):
    files = originals(tmp_path / "data")
    photograph = np.full((40, 40, 3), 100, np.uint8)
    photograph[:10] = 80, 110, 110
    cv2.imwrite(str(files["i4"]), photograph)
    table = prepare_store(files, tmp_path / "s", 32, progress=False).table
    assert list(table.colour) == [0, 0, 0.25, 0, 0, 0] and (table.colour > COLOUR_LIMIT).sum() == 1


def test_stretching_by_hand():
    image = np.array([[10, 20, 0, 0], [30, 40, 0, 4]], np.uint8)
    np.testing.assert_array_equal(store_module.to_square(image, 1), [[13]])  # mean 104 / 8
    square = np.full((3, 3), 7, np.uint8)
    assert store_module.to_square(square, 3) is square
    np.testing.assert_array_equal(store_module.to_square(np.array([[0, 100]], np.uint8), 4)[0], [0, 25, 75, 100])


def test_a_finished_store_is_opened_and_a_changed_one_rebuilt(tmp_path, decoded, capsys):
    files = originals(tmp_path / "data")
    prepare_store(files, tmp_path / "s", 16, progress=False)
    assert len(decoded) == 6
    prepare_store(files, tmp_path / "s", 16, progress=False)
    assert len(decoded) == 6 and "up to date" in capsys.readouterr().out
    store = prepare_store(files, tmp_path / "s", 24, progress=False)
    assert len(decoded) == 12 and store.images.shape == (6, 24, 24) and "rebuilding" in capsys.readouterr().out
    write_dicom(files["first"], np.arange(20).reshape(4, 5))
    store = prepare_store(files, tmp_path / "s", 24, progress=False)
    assert len(decoded) == 18 and store.table.width[0] == 5
    shorter = dict(list(files.items())[:3])
    assert len(prepare_store(shorter, tmp_path / "s", 24, progress=False).images) == 3


def test_bad_images_are_named_together_and_only_they_are_decoded_again(tmp_path, decoded):
    files = originals(tmp_path / "data", 9)
    good = files["i3"].read_bytes()
    bad = ("i1", "i2", "i3", "i4", "i5", "i6")
    for name in bad:
        files[name].write_bytes(good[:-9])
    files["gone"] = tmp_path / "gone.png"
    with pytest.raises(InputError, match=r"7 of 10 images cannot be used: .*i6\.png: .* and 2 more") as caught:
        prepare_store(files, tmp_path / "s", 16, progress=False)
    assert "i2.png" in str(caught.value) and "i1.png" not in str(caught.value)  # the first five, in row order
    assert not (tmp_path / "s").exists()
    decoded.clear()
    for name in (*bad, "gone"):
        files[name].write_bytes(good)
    assert prepare_store(files, tmp_path / "s", 16, progress=False).table.ok.all()
    assert sorted(decoded) == sorted(path.name for name, path in files.items() if name not in ("first", "i7", "i8"))


def test_placeholders_only_where_they_are_allowed(tmp_path, capsys):
    files = originals(tmp_path / "data")
    files["i2"].write_bytes(files["i2"].read_bytes()[:-20])  # its header can be read
    files["i3"].write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 6 .*i3\.png"):
        prepare_store(files, tmp_path / "s", 16, None, "placeholder", {"i2"}, progress=False)
    with pytest.raises(InputError, match=r"2 of 6"):
        prepare_store(files, tmp_path / "s", 16, None, "error", {"i2", "i3"}, progress=False)
    capsys.readouterr()
    store = prepare_store(files, tmp_path / "s", 16, None, "placeholder", {"i2", "i3"}, progress=False)
    out = capsys.readouterr().out
    assert "i2.png" in out and "i3.png" in out and out.count("a grey placeholder takes its place") == 2
    assert list(store.table.image_id[~store.table.ok]) == ["i3", "i2"]
    for row in store.table.row[~store.table.ok]:
        assert (store.images[row] == store_module.PLACEHOLDER_GREY).all()
    assert list(store.table.colour.isna()) == list(~store.table.ok) and store.table.colour.dtype == float
    sizes = store.table.set_index("image_id")
    assert tuple(sizes.loc["i2", ["width", "height"]]) == (58, 22)
    assert tuple(sizes.loc["i3", ["width", "height"]]) == (16, 16)
    with pytest.raises(InputError, match=r"2 of 6 images cannot be used: .*/i3\.png; .*/i2\.png; delete .*/s to try"):
        prepare_store(files, tmp_path / "s", 16, progress=False)
    prepare_store(files, tmp_path / "s", 16, None, "placeholder", {"i2", "i3"}, progress=False)
    assert "2 of them are grey placeholders, such as i3; delete " in capsys.readouterr().out


SCRIPT = """
import sys, time
from pathlib import Path
from common.data import store
folder, out, workers, pause = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
store.COMMIT_SECONDS = 0
if pause:  # slow enough to be killed on the way
    write = store._commit
    store._commit = lambda *args: (write(*args), time.sleep(pause))
files = {p.stem: p for p in sorted(folder.iterdir())}
if __name__ == "__main__":
    store.prepare_store(files, out, 48, workers=workers, progress=False)
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, decoded):
    originals(tmp_path / "data", 40)
    files = {path.stem: path for path in sorted((tmp_path / "data").iterdir())}
    prepare_store(files, tmp_path / "whole", 48, progress=False)
    (tmp_path / "run.py").write_text(SCRIPT)
    journal = tmp_path / "s.partial" / "journal"
    command = [sys.executable, "run.py", str(tmp_path / "data"), str(tmp_path / "s"), "2", "0.05"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.005)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice and end
    process.wait()
    assert not (tmp_path / "s").exists()
    deadline = time.monotonic() + 10
    while session_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session_members(process.pid)
    with open(journal, "ab") as file:
        file.write(b'[39, [1, 2], {"wid')  # a line torn by the kill
    done = journal.read_bytes().count(b"\n") - 1
    decoded.clear()
    prepare_store(files, tmp_path / "s", 48, progress=False)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
    assert len(decoded) == 40 - done < 40


def session_members(session):
    """Live processes of a session, from /proc."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            members.append(int(entry.name))
    return members


def test_a_kill_between_the_last_steps_costs_no_decoding(tmp_path, decoded, monkeypatch):
    files = originals(tmp_path / "data")
    prepare_store(files, tmp_path / "whole", 16, progress=False)
    steps = (store_module.pd.DataFrame, "to_parquet"), (store_module.shutil, "rmtree"), (os, "rename")
    for owner, step in (*steps, (store_module, "write_json")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, stop)
            (tmp_path / step).mkdir()
            with pytest.raises(KeyboardInterrupt):
                prepare_store(files, tmp_path / step, 16, progress=False)
        decoded.clear()
        prepare_store(files, tmp_path / step, 16, progress=False)
        assert not decoded
        assert contents(tmp_path / step) == contents(tmp_path / "whole")


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_originals_that_change_during_an_interruption_are_decoded_again(tmp_path, decoded, monkeypatch):
    files = originals(tmp_path / "data")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store_module, "_finish", stop)
        prepare_store(files, tmp_path / "s", 16, progress=False)
    files["i4"].write_bytes(files["i2"].read_bytes())
    decoded.clear()
    store = prepare_store(files, tmp_path / "s", 16, progress=False)
    assert decoded == ["i4.png"]
    np.testing.assert_array_equal(store.images[2], store.images[4])


def test_a_full_disk_is_named_and_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    files = originals(tmp_path / "data")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    usage = type("Usage", (), {"free": 1000})()
    for owner, name, fake in (
        (store_module.shutil, "disk_usage", lambda path: usage),
        (store_module, "_write_row", full),
        (store_module, "_commit", full),
        (store_module.pd.DataFrame, "to_parquet", full),
    ):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=r"s: the disk is full, .* 6,144 bytes"):
            patch.setattr(owner, name, fake)
            prepare_store(files, tmp_path / "s", 32, progress=False)
        assert not (tmp_path / "s").exists()
    assert len(prepare_store(files, tmp_path / "s", 32, progress=False).images) == 6


def test_foreign_folders_and_second_processes_are_refused(tmp_path):
    files = originals(tmp_path / "data")
    with pytest.raises(InputError, match="not a store"):
        prepare_store(files, tmp_path / "data", 16, progress=False)
    assert len(list((tmp_path / "data").iterdir())) == 6
    (tmp_path / "s.partial").mkdir()
    handle = os.open(tmp_path / "s.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process"):
        prepare_store(files, tmp_path / "s", 16, progress=False)
    os.close(handle)
    prepare_store(files, tmp_path / "s", 16, progress=False)
    with pytest.raises(InputError, match="no images"):
        prepare_store({}, tmp_path / "s", 16)
    for size in (0, 1 << 15, 10**30):
        with pytest.raises(InputError, match=f"images of {size} px"):
            prepare_store(originals(tmp_path / "more"), tmp_path / "s", size)


def test_opening(tmp_path, capsys):
    store = prepare_store(originals(tmp_path / "data"), tmp_path / "s", 16, progress=False)
    dumped = pickle.dumps(store)
    assert len(dumped) < 1000  # the path travels, not the pixels
    np.testing.assert_array_equal(pickle.loads(dumped).images, store.images)
    with pytest.raises(InputError, match="not a finished store"):
        Store.open(tmp_path / "data")
    path = tmp_path / "s" / "store.json"
    about = json.loads(path.read_text())
    for change, message in (({"version": 99}, "format 99"), ({"shape": [7, 16, 16]}, "disagree")):
        path.write_text(json.dumps(about | change))
        with pytest.raises(InputError, match=message):
            Store.open(tmp_path / "s")
    path.write_text(json.dumps(about))
    os.truncate(tmp_path / "s" / "images.npy", 1000)
    with pytest.raises(InputError, match=r"images.npy: damaged array .*; delete it and run again"):
        Store.open(tmp_path / "s")
    for damaged in ("images.npy", "table.parquet", "store.json"):
        (tmp_path / "s" / damaged).write_text("[]")
        rebuilt = prepare_store(originals(tmp_path / "data"), tmp_path / "s", 16, progress=False)
        assert "rebuilding" in capsys.readouterr().out and rebuilt.table.equals(store.table)


def test_content_follows_the_pixels_alone(tmp_path):
    files = originals(tmp_path / "data")
    store = prepare_store(files, tmp_path / "s", 16, progress=False)
    before = store.table.set_index("image_id").content
    assert before.nunique() == 6 and before["i2"] == hash_pixels(store.images[4])
    pixels = cv2.imread(str(files["i2"]), cv2.IMREAD_UNCHANGED)
    pixels[:9, :9] ^= 128
    cv2.imwrite(str(files["i2"]), pixels)
    os.utime(files["i3"], (1, 1))
    after = prepare_store(files, tmp_path / "s", 16, progress=False).table.set_index("image_id").content
    assert list(before.index[before != after]) == ["i2"]


def test_ignored_elements_are_said_once(tmp_path, capsys):
    files = {f"i{n}": tmp_path / f"{n}.dcm" for n in range(5)}
    for n, path in enumerate(files.values()):
        save(dataset(picture(12), 12, **({"RescaleSlope": 0, "RescaleIntercept": 0} if n % 2 else {})), path)
    table = prepare_store(files, tmp_path / "s", 16, progress=False).table
    out = capsys.readouterr().out
    assert "2 images, i1 for one: unusable elements were ignored (rescaling: leaves 1 grey levels)" in out
    assert [bool(note) for note in table.note] == [False, True, False, True, False]


def test_a_file_that_kills_its_decoder_is_one_bad_image(tmp_path, capsys):
    files = originals(tmp_path / "data")
    files["bad"] = deadly(tmp_path / "data" / "bad.dcm")
    for workers in (1, 2):
        with pytest.raises(InputError, match=r"1 of 7 .*bad\.dcm: .*crashed"):
            prepare_store(files, tmp_path / str(workers), 16, workers, progress=False)
        store = prepare_store(files, tmp_path / str(workers), 16, workers, "placeholder", {"bad"}, progress=False)
        assert list(store.table.image_id[~store.table.ok]) == ["bad"] and store.table.content.iloc[-1] == ""


def test_processes_start_once_they_pay_and_change_nothing(tmp_path, monkeypatch):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    files = originals(tmp_path / "data", 30)
    expected = contents(prepare_store(files, tmp_path / "a", 16, workers=1, progress=False).folder)
    monkeypatch.setattr(store_module, "FEW", 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        store = prepare_store(files, tmp_path / "b", 16, progress=False)
    assert contents(store.folder) == expected


def test_large_jpeg_2000_may_be_decoded_at_a_lower_resolution_into_another_store(tmp_path, capsys):
    ds = dataset(picture(12, shape=(90, 80)), 12)
    ds.compress(uid.JPEG2000Lossless)
    files = {"packed": save(ds, tmp_path / "packed.dcm"), **originals(tmp_path / "files", 2)}
    whole, halved = (prepare_store(files, tmp_path / name, 20, halve=name == "halved") for name in ("whole", "halved"))
    assert "1 of 3 images were decoded at a lower resolution, the others at full size" in capsys.readouterr().out
    assert halved.table["note"].tolist() == ["JPEG 2000 decoded at 1/4 of its size", "", ""]
    assert whole.table[["width", "height"]].equals(halved.table[["width", "height"]])
    np.testing.assert_array_equal(whole.images[1:], halved.images[1:])
    assert 0 < np.abs(whole.images[0].astype(int) - halved.images[0]).mean() < 4
    prepare_store(files, tmp_path / "halved", 20)  # another kind of store is replaced
    np.testing.assert_array_equal(Store.open(tmp_path / "halved").images, whole.images)
