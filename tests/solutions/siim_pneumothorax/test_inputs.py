"""What a user may get wrong: each ends with status 2 and one line that names it, and leaves nothing half-written."""

import shutil

import numpy as np
import pydicom
import pytest

from common.submit.table import read_table

RUN = ["run", "demo", "--out", "run"]


@pytest.fixture
def spoilt(refused, data, tmp_path, tiny):
    """`spoilt(*words)`: a run on the spoilt data is refused before it made anything; returns the line."""

    def run(*words):
        line = refused(*RUN, "--data", data, *tiny, *words)
        assert not (tmp_path / "run").exists() and not list(tmp_path.glob("*.partial"))
        return line

    return run


def edit(path, change):
    """Rewrite a CSV as `change` does with its list of lines; links are broken first."""
    lines = path.read_text().splitlines()
    path.unlink()
    path.write_text("\n".join(change(lines)) + "\n" if change(lines) else "")


def an_image(data, split="train"):
    return sorted(data.glob(f"dicom-images-{split}/*/*/*.dcm"))[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--segmenter.epoch 3", "did you mean --segmenter.epochs?"),
        ("--segmenter.loss l1", "invalid choice 'l1'"),
        ("--segmenter.lr nan", "lr must be above 0, not nan"),
        ("--segmenter.sizes 100", "must be multiples of 32"),
        ("--segmenter.positive-rate 0.5", "give two shares"),
        ("--segmenter.positives-only True", "leaves no negatives for a positive_rate"),
        ("--segmenter.loss tversky --segmenter.positive-weight 2", "does not apply to the loss tversky"),
        ("--segmenter.loss combo --segmenter.focal-weight 0.25", "does not apply to the loss combo"),
        ("--segmenter.cycles 3", "2 epochs after the frozen ones cannot have 3 cycles"),
        ("--segmenter.architecture vnet", "architecture 'vnet'"),
        ("--classifier.batch-size 400", "batch_size 400"),
        ("--classifier.backbone resnet_5000", "resnet_5000"),
        ("--folds 2", "must be distinct and between 0 and 1"),
        ("--presence head", "needs segmenter.presence_head"),
        ("--presence none", "nothing to gate on"),
        ("--data empty", "no stage_2_train.csv or train-rle.csv in it"),
        ("--test nowhere", "nowhere: no such file"),
        ("--test empty", "no images in it (--test)"),
        ("--fold-table nowhere.csv", "nowhere.csv: no such file"),
        ("--id-map nowhere.csv", "nowhere.csv: no such file"),
        ("--store-size 32", "store_size 32 is under the 64"),
    ],
)
def test_words(words, said, data, tmp_path, refused, tiny):
    (tmp_path / "empty").mkdir()
    assert said in refused(*RUN, "--data", data, *tiny, *words.split())


# ---- tables --------------------------------------------------------------------------------------------------------


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
        ("nih_id.csv", lambda rows: [*rows, "../../x,00000001_000.png,1"], "nih_id.csv, row 18: '..'"),
    ],
)
def test_tables(name, change, said, data, spoilt):
    edit(data / name, change)
    assert said in spoilt()


def test_missing_tables(data, spoilt):
    (data / "sample_submission.csv").unlink()
    assert "sample_submission.csv: no such file" in spoilt()
    (data / "train-rle.csv").unlink()
    assert "no stage_2_train.csv or train-rle.csv in it" in spoilt()


def test_a_train_image_in_the_test_set(data, spoilt):
    train = read_table(data / "train-rle.csv")["ImageId"].iloc[0]
    edit(data / "sample_submission.csv", lambda rows: [*rows, f"{train},-1"])
    assert "1 images are in the test set too" in spoilt()


def test_named_test_images(data, spoilt, tmp_path):
    table = tmp_path / "test.csv"
    train = read_table(data / "train-rle.csv")["ImageId"].iloc[0]
    for text, said in (
        ("id\n../../x!\n", "test.csv (--test), row 2: 'x!' is not a usable id"),
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
    one_fold = [",".join([row.split(",")[0], "0", *row.split(",")[2:]]) for row in lines[2:]]
    for rows, said in ((lines[:-1], "1 images missing"), ([*lines[:2], *one_fold], "has the folds 0")):
        (tmp_path / "folds.csv").write_text("\n".join(rows) + "\n")
        assert said in spoilt("--fold-table", tmp_path / "folds.csv")


# ---- images --------------------------------------------------------------------------------------------------------


def test_images_without_a_row(data, spoilt, command, tiny):
    shutil.copy(an_image(data), data / "dicom-images-train" / "loose.dcm")
    assert "--on-unlabelled skip" in spoilt()
    result = command("prepare", *RUN[1:], "--data", data, *tiny, "--on-unlabelled", "skip")
    assert result.status == 0 and "left out 1 images" in result.out


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_truncated_images(split, kept, data, spoilt):
    path = an_image(data, split)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else kept])
    line = spoilt(*(["--on-bad-image", "placeholder"] if split == "train" else []))
    assert "1 of 20 images cannot be used" in line and path.name in line


def test_truncated_training_images_are_left_out(data, command, tiny, tmp_path):
    path = an_image(data)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:100])
    result = command("prepare", *RUN[1:], "--data", data, *tiny, "--on-bad-image", "skip")
    assert result.status == 4 and f"left out {path.stem}: " in result.out


def test_an_image_that_is_not_square(data, spoilt):
    path = an_image(data)
    dicom = pydicom.dcmread(path)
    dicom.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dicom.Rows, dicom.PixelData = 512, np.zeros((512, 1024), np.uint8).tobytes()
    path.unlink()
    dicom.save_as(path, enforce_file_format=True)
    assert f"{path.stem}: 1024 × 512 pixels" in spoilt()
