"""What a user may get wrong: each ends with status 2 and one line that names it, and leaves nothing half-written."""

import builtins
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess

import numpy as np
import pydicom
import pytest
from safetensors.torch import save_file
from torch import zeros

from benchmarks.kills import TINY
from common import paths
from common.paths import read_json
from common.submit.table import read_table

RUN = ["run", "demo", "--out", "run"]


@pytest.fixture
def data(sample, tmp_path):
    """A copy of the sample that may be spoilt; images are links to the sample's own."""
    return shutil.copytree(sample, tmp_path / "data", copy_function=os.link)


@pytest.fixture
def spoilt(refused, data, tmp_path):
    """`spoilt(*words)`: a run on the spoilt data is refused before it made anything; returns the line."""

    def run(*words):
        line = refused(*RUN, "--data", data, *TINY, *words)
        assert not (tmp_path / "run").exists() and not list(tmp_path.glob("*.partial"))
        return line

    return run


def edit(path, change):
    """Rewrite a CSV as `change` does with its list of lines; links are broken first."""
    lines = path.read_text().splitlines()
    path.unlink()
    path.write_text("\n".join(change(lines)) + "\n")


def an_image(data, split="train"):
    return sorted(data.glob(f"dicom-images-{split}/*/*/*.dcm"))[0]


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("walk demo", "'walk' is not a verb"),
        ("run fast", "'fast' is not a preset"),
        ("run demo --out run --epochs 3", "Unrecognized options: --epochs"),
        ("run demo --out run --segmenter.epoch 3", "did you mean --segmenter.epochs?"),
        ("run demo --out run --segmenter.epochs x", "--segmenter.epochs: invalid literal"),
        ("run demo --out run --segmenter.epochs 0", "epochs must be above 0"),
        ("run demo --out run --segmenter.loss l1", "invalid choice 'l1'"),
        ("run demo --out run --segmenter.lr nan", "lr must be above 0, not nan"),
        ("run demo --out run --segmenter.sizes 100", "need multiples of 32"),
        ("run demo --out run --segmenter.positive-rate 0.5", "give two shares"),
        ("run demo --out run --folds 2", "must be distinct and between 0 and 1"),
        ("run demo --out run --folds 1 1", "distinct"),
        ("run demo --out run --presence head", "needs segmenter.presence_head"),
        ("run demo --out run --presence none", "nothing to gate on"),
        ("run demo --out run --workers -1", "--workers must not be negative"),
        ("run demo --out run --hours 0", "--hours must be above 0"),
        ("run demo --out run --hours nan", "--hours must be above 0"),
        ("run demo --out run --device gpu", "choose auto, cpu, cuda"),
        ("run demo --out run --device cuda:99", "GPUs on this machine"),
        ("run demo --out run --data", "Missing value for argument '--data'"),
        ("run demo --out run --data nowhere", "nowhere: no such folder (--data)"),
        ("run demo --out run --data file.csv", "file.csv: no such folder (--data)"),
        ("run demo --out run --data empty", "no train-rle.csv in it"),
        ("run demo --out file.csv --data data", "file.csv: not a folder (--out)"),
        ("run", "name a preset"),
        ("run --out run", "name a preset"),
        ("run demo --out run --data data --test nowhere", "nowhere: no such file"),
        ("run demo --out run --data data --test empty", "no images in it (--test)"),
        ("run demo --out run --data data --fold-table nowhere.csv", "nowhere.csv: not a readable CSV"),
        ("run demo --out run --data data --id-map nowhere.csv", "nowhere.csv: no such file"),
        ("run demo --out run --data data --store-size 0", "store_size 0 is under the 2"),
    ],
)
def test_words(words, said, data, tmp_path, refused, monkeypatch):
    (tmp_path / "file.csv").write_text("ImageId,EncodedPixels\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(paths, "KAGGLE_INPUT", tmp_path / "kaggle")
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(*words.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_that_cannot_be_kept(spoilt, refused, data):
    assert "batch_size 400" in refused(*RUN, "--data", data, *TINY, "--classifier.batch-size", "400")
    assert "none of timm's" not in refused(*RUN, "--data", data, *TINY, "--classifier.backbone", "resnet_5000")
    assert "architecture 'vnet'" in refused(
        "train",
        *RUN[1:],
        "--data",
        data,
        *TINY,
        "--presence",
        "none",
        "--decision.gate",
        "0",
        "--segmenter.architecture",
        "vnet",
    )


def test_a_stored_configuration_that_cannot_be_used(run_copy, refused):
    config = run_copy / "config.json"
    whole = config.read_text()
    values = json.loads(whole)
    for text, said in (
        (whole[:100], "not a JSON file"),
        ("[]", "not the configuration of a run"),
        (json.dumps({**values, "sow": 1}), "unknown field 'sow'"),
        (json.dumps({**values, "solution": "other"}), "another solution"),
        (json.dumps({**values, "n_folds": -2}), "folds"),
        (json.dumps({**values, "n_folds": "2"}), "n_folds cannot be '2'"),
        (json.dumps({**values, "tta": ["turn"]}), "tta cannot be 'turn'"),
        (json.dumps({**values, "segmenter": 3}), "segmenter: expected a JSON object"),
    ):
        config.write_text(text)
        assert said in refused("report", "--out", "run")


# ---- tables --------------------------------------------------------------------------------------------------------

EMPTY = "EncodedPixels"


@pytest.mark.parametrize(
    ("rle", "said"),
    [
        ("10 5 7", "an odd count of numbers"),
        ("1048570 10", "ends past the last pixel"),
        ("-5 10", "'-5' is not a whole number"),
        ("5 0", "a run of length 0"),
        ("5 1.5", "not a whole number"),
        ("", "blank instead of a run-length string"),
        ("-1\n{id},4 3", "has an empty row (-1) and another one"),
        ("4 3\n{id},-1", "has an empty row (-1) and another one"),
    ],
)
def test_masks(rle, said, data, spoilt):
    image_id = read_table(data / "train-rle.csv")["ImageId"].iloc[0]
    new = f"{image_id},{rle.format(id=image_id)}"
    edit(data / "train-rle.csv", lambda rows: [rows[0], new, *(r for r in rows[1:] if not r.startswith(image_id))])
    line = spoilt()
    assert said in line and "train-rle.csv, row " in line


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("train-rle.csv", lambda rows: [rows[0], "../../x,-1", *rows[1:]], "train-rle.csv, row 2: '../../x'"),
        ("train-rle.csv", lambda rows: [*rows, "1.2.3,-1"], "1 images have no file, the first is 1.2.3"),
        ("train-rle.csv", lambda rows: ["id,rle", *rows[1:]], "row 1: the header must be ImageId,EncodedPixels"),
        ("train-rle.csv", lambda rows: [rows[0], rows[1] + ",x", *rows[2:]], "row 2: 3 values"),
        ("train-rle.csv", lambda rows: rows[:1], "no rows"),
        ("sample_submission.csv", lambda rows: [*rows, rows[1]], "row 6: "),
        ("sample_submission.csv", lambda rows: [*rows, "../../x,-1"], "sample_submission.csv, row 6: '../../x'"),
        ("sample_submission.csv", lambda rows: [*rows, "1.2.3,-1"], "1 test images have no file, the first is 1.2.3"),
        ("sample_submission.csv", lambda rows: rows[:1], "no rows"),
        ("sample_submission.csv", lambda rows: [], "sample_submission.csv: empty file"),
        ("nih_id.csv", lambda rows: [*rows, rows[1]], "appears twice"),
        ("nih_id.csv", lambda rows: ["Kaggle_ID,a,b", *rows[1:]], "needs a column patient_id or NIH_ID"),
        ("nih_id.csv", lambda rows: [*rows, "../../x,00000001_000.png,1"], "nih_id.csv, row 18: '../../x'"),
    ],
)
def test_tables(name, change, said, data, spoilt):
    edit(data / name, change)
    if (data / name).read_text() == "\n":
        (data / name).write_text("")
    assert said in spoilt()


def test_missing_tables(data, spoilt):
    (data / "sample_submission.csv").unlink()
    assert "sample_submission.csv: no such file" in spoilt()
    (data / "train-rle.csv").unlink()
    assert "no train-rle.csv in it" in spoilt()


def test_a_train_image_in_the_test_set(data, spoilt):
    train = read_table(data / "train-rle.csv")["ImageId"].iloc[0]
    edit(data / "sample_submission.csv", lambda rows: [*rows, f"{train},-1"])
    assert "1 images are in the test set too" in spoilt()


def test_named_test_images(data, spoilt, tmp_path):
    table = tmp_path / "test.csv"
    train = read_table(data / "train-rle.csv")["ImageId"].iloc[0]
    for text, said in (
        ("id\n../../x\n", "test.csv (--test), row 2: '../../x'"),
        ("id\nx.png\nx.png\n", "test.csv (--test), row 3: x appears twice"),
        ("id\nx\n", "1 test images have no file, the first is x"),
        ("id\n", "no rows"),
        ("", "empty file"),
        (f"id\n{train}\n", "are training images"),
    ):
        table.write_text(text)
        assert said in spoilt("--test", table)


def test_fold_tables(data, spoilt, finished, tmp_path):
    lines = (finished / "run" / "folds.csv").read_text().splitlines()
    table = tmp_path / "folds.csv"
    one_fold = [",".join([row.split(",")[0], "0", *row.split(",")[2:]]) for row in lines[2:]]
    for rows, said in (
        (lines[:-1], "1 images missing"),
        ([*lines, lines[-1]], "appears twice"),
        ([*lines, "../../x,0,1"], "1 images not in the image table, the first is '../../x'"),
        ([*lines[:-1], lines[-1].replace(",", ",x", 1)], "without a valid fold"),
        (["a,b", *lines[2:]], "the header must begin with image_id,fold"),
        ([*lines[:2], *one_fold], "has the folds 0"),
    ):
        table.write_text("\n".join(rows) + "\n")
        assert said in spoilt("--fold-table", table)


# ---- images --------------------------------------------------------------------------------------------------------


def test_images_without_a_row(data, spoilt, command, tmp_path):
    shutil.copy(an_image(data), data / "dicom-images-train" / "loose.dcm")
    assert "--on-unlabelled skip" in spoilt()
    result = command("prepare", *RUN[1:], "--data", data, *TINY, "--on-unlabelled", "skip")
    assert result.status == 0 and "left out 1 images" in result.out


def test_two_files_of_one_stem(data, spoilt):
    shutil.copy(an_image(data), data / f"{an_image(data).stem}.png")
    assert "a second image named" in spoilt()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_truncated_images(split, kept, data, spoilt):
    path = an_image(data, split)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else kept])
    line = spoilt(*(["--on-bad-image", "placeholder"] if split == "train" else []))
    assert "1 of 20 images cannot be used" in line and path.name in line


def test_an_image_that_is_not_square(data, spoilt):
    path = an_image(data)
    dicom = pydicom.dcmread(path)
    dicom.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dicom.Rows, dicom.PixelData = 512, np.zeros((512, 1024), np.uint8).tobytes()
    path.unlink()
    dicom.save_as(path, enforce_file_format=True)
    assert f"{path.stem}: 1024 × 512 pixels" in spoilt()


# ---- the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["scandir", "listdir"])
def test_a_folder_that_may_not_be_read(function, data, spoilt, monkeypatch):
    real = getattr(os, function)

    def guarded(path="."):
        if str(path).endswith("dicom-images-train"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, function, guarded)
    if function == "scandir":
        assert "dicom-images-train: Permission denied" in spoilt()


def test_a_table_that_may_not_be_read(data, spoilt, monkeypatch):
    real = builtins.open

    def guarded(path, *args, **options):
        if str(path).endswith("train-rle.csv"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(builtins, "open", guarded)
    assert "train-rle.csv" in (line := spoilt()) and "Permission denied" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everywhere")
def test_folders_without_permission(data, refused, tmp_path):
    (data / "dicom-images-train").chmod(0)
    assert "Permission denied" in refused(*RUN, "--data", data)
    (data / "dicom-images-train").chmod(0o700)
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused("run", "demo", "--out", "locked/run", "--data", data)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no small disk can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full(small_disk, refused, command, sample, tmp_path):
    """The disk fills up in the store, then in each step's files; with room again, the run continues."""
    ballast = small_disk / "ballast"
    words = ["demo", "--out", "disk/run", "--data", sample, *TINY, "--folds", "0"]
    ballast.write_bytes(b"0" * (2 << 20))
    assert "the disk is full, the store needs" in refused("prepare", *words, "--store-size", "512", "--store", "disk")
    assert command("prepare", *words).status == 0
    line = refused("train", *words)  # a checkpoint of 6 MB
    assert "No space left on device" in line and "disk/run/fold0/classifier/" in line
    assert not list(small_disk.rglob(".*tmp*"))
    shutil.move(tmp_path / "disk" / "run", tmp_path / "run")


@pytest.mark.parametrize("name", ["oof_probs.npy", "test.parquet", "surface.csv", "score.json", "submission.csv"])
def test_a_disk_that_is_full_in_any_step(name, run_copy, refused, command, sample, monkeypatch):
    (run_copy / name).unlink()
    real = os.fsync

    def full(descriptor):
        if hashlib.sha256(name.encode()).hexdigest()[:8] in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = refused("run", "--out", "run", "--data", sample)
        assert line.startswith("error: run/") and line.endswith(f"/{name}: No space left on device")
    assert not (run_copy / name).exists() and not list(run_copy.rglob(".*tmp*"))
    assert command("run", "--out", "run", "--data", sample).status == 0 and (run_copy / name).exists()


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("fold0/classifier/final.safetensors", "train"),
        ("fold0/segmenter-64/final.safetensors", "predict"),
        ("images.parquet", "train"),
        ("manifest.json", "tune"),
        ("test.parquet", "tune --decision.pixel 0.4"),
        ("test_probs.npy", "tune --decision.pixel 0.4"),
        ("oof_dice.parquet", "score"),
        ("tuned.json", "submit"),
        ("fold1/classifier/variants.json", "train"),
    ],
)
@pytest.mark.parametrize("damage", ["half", "nothing", "other"])
def test_files_of_a_run_that_were_damaged(name, verb, damage, run_copy, refused):
    path = run_copy / name
    whole = path.read_bytes()
    path.write_bytes({"half": whole[: len(whole) // 2], "nothing": b"", "other": b"[]"}[damage])
    assert name in refused(*verb.split(), "--out", "run")


@pytest.mark.parametrize("damage", ["half", "nothing", "other"])
def test_a_damaged_resume_file(damage, run_copy, refused, command):
    folder = run_copy / "fold0" / "classifier"
    shutil.rmtree(folder)
    folder.mkdir()
    content = {"half": b"PK\x03\x04" + bytes(5000), "nothing": b"", "other": b"not a checkpoint"}[damage]
    (folder / "last.ckpt").write_bytes(content)
    assert "run/fold0/classifier/last.ckpt: not a resume file" in refused("train", "--out", "run")
    (folder / "last.ckpt").unlink()
    assert command("train", "--out", "run").status == 0


def test_weights_of_another_network(data, refused, tmp_path):
    save_file({"fc.weight": zeros(3, 3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    words = [*RUN, "--data", data, *TINY, "--classifier.weights"]
    assert "other.safetensors: none of its 1 tensors fits" in refused(*words, tmp_path / "other.safetensors")
    assert "broken.safetensors: not a file of tensors" in refused(*words, tmp_path / "broken.safetensors")
    assert "missing.pth: no such file" in refused(*words, "missing.pth")


def test_a_loss_that_is_not_a_number(sample, refused, command):
    words = ["demo", "--out", "run", "--data", sample, *TINY, "--folds", "0"]
    assert command("prepare", *words).status == 0
    line = refused("train", *words, "--classifier.lr", "1e30", "--classifier.epochs", "4")
    assert "run/fold0/classifier: " in line and "lower the learning rate" in line
    # nothing stands in the way of a better one
    assert command("train", *words, "--classifier.epochs", "1", "--segmenter.epochs", "1").status == 0


def test_two_processes_in_one_folder(run_copy, refused):
    with open(run_copy / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is working in this run" in refused("report", "--out", "run")
    assert read_json(run_copy / "manifest.json")["steps"]
