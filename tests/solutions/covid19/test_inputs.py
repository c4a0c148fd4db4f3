"""What a user may get wrong: named in one line with exit status 2, never a traceback, and nothing is lost."""

import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

from common.submit.table import read_table

pytestmark = pytest.mark.usefixtures("quick_lungs")
RUN = ["run", "demo", "--out", "run"]
PREPARE = ["prepare", "demo", "--out", "run"]


def replace(path, content):
    """Other bytes, another image or another table under the name of a file that may be linked elsewhere."""
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        assert cv2.imwrite(str(path), content)
    else:
        content.to_csv(path, index=False)


def a_photo(shape=(300, 400)):
    hue = np.tile(np.linspace(0, 179, shape[1]).astype(np.uint8), (shape[0], 1))
    return cv2.cvtColor(np.dstack([hue, np.full_like(hue, 200), np.full_like(hue, 180)]), cv2.COLOR_HSV2BGR)


@pytest.fixture
def spoilt(refused, data, tmp_path, tiny):
    """`spoilt(*words)`: a run on the spoilt data is refused before it made anything; returns the line."""

    def run(*words):
        line = refused(*RUN, "--data", data, *tiny, *words)
        assert not (tmp_path / "run").exists()
        return line

    return run


@pytest.fixture
def prepared(command, data, tmp_path, tiny):
    """`prepared(*words)`: what `prepare` says of the data, the selection and the image table, by image."""

    def run(*words, status=0):
        result = command(*PREPARE, "--data", data, *tiny, *words)
        assert result.status == status and len(result.errors) == (status > 0), result
        selection = read_table(tmp_path / "run" / "selection.csv").set_index("image_id")
        return result.out, selection, pd.read_parquet(tmp_path / "run" / "images.parquet").set_index("image_id")

    return run


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("demo --network.size 512", "store_size 128 is under the 512 px of a network"),
        ("demo --view border", "invalid choice 'border'"),
        ("paper --n-folds 2 --folds 0", "n_folds 2: must be at least 3"),
        ("demo", "name the folder of the images with --data"),
        ("demo --data nowhere", "nowhere: no such folder"),
        ("demo --data empty", "empty: no collection in it or its subfolders (no metadata.csv"),
        ("demo --data data --normals nowhere", "nowhere: no such folder"),
        ("demo --data data --test nowhere", "nowhere: no such file"),
        ("demo --data data --test empty", "empty: no images in it (--test)"),
        ("demo --data data --id-map file.csv", "--id-map does not apply to covid19"),
    ],
)
def test_words(words, said, data, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.csv").write_text("a,b\n1,2\n")
    assert said in refused("run", *words.split(), "--out", "run")
    assert not (tmp_path / "run").exists()


# ---- tables --------------------------------------------------------------------------------------------------------


def test_normals_in_a_folder_of_their_own(data, tmp_path, command, tiny):
    shutil.move(data / "normals", tmp_path / "nih")
    words = [*PREPARE, "--data", data, *tiny]
    assert command(*words, "--normals", tmp_path / "nih").status == 0
    images = pd.read_parquet(tmp_path / "run" / "images.parquet")
    assert images["collection"].value_counts()["NIH ChestX-ray14"] >= 12
    line = command("train", "--out", "run", "--normals", data).errors[0]
    assert "prepared with other --normals" in line


def test_all_lungs_are_rejected(spoilt):
    line = spoilt("--lungs.gate", "1")
    assert line.startswith("error: no images with COVID-19 to train on; left out: ") and "lungs" in line


# ---- images --------------------------------------------------------------------------------------------------------


def a_home_image(data):
    """One that is used, of a patient whose age is known."""
    table = read_table(data / "metadata.csv")
    used = (table["finding"] == "COVID-19") & (table["view"] == "PA") & (table["age"].str.len() == 2)
    return data / "images" / table.loc[used, "filename"].iloc[0]


def test_an_image_to_train_on_that_cannot_be_read(data, spoilt, tmp_path):
    path = a_home_image(data)
    replace(path, b"\x89PNG\r\n\x1a\nbut no more")
    for words in ([], ["--on-bad-image", "placeholder"]):  # which is for images to predict
        line = spoilt("--store", tmp_path / "stores", *words)
        assert path.name in line


def test_unreadable_training_images_are_left_out(data, prepared):
    path = a_home_image(data)
    replace(path, b"\x89PNG\r\n\x1a\nbut no more")
    out, selection, images = prepared("--on-bad-image", "skip", status=4)
    assert f"left out {path.stem}: " in out
    assert selection.loc[path.stem, "reason"] == "cannot be read" and images.loc[path.stem, "fold"] == -1


def test_a_colour_picture_is_no_radiograph(data, prepared):
    path = a_home_image(data)
    replace(path, a_photo())
    _, selection, images = prepared()
    assert selection.loc[path.stem, "reason"] == "lungs: a colour picture"
    assert (images.loc[path.stem, "fold"], images.loc[path.stem, "area"]) == (-1, 0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("filename,patientid,view\ngone.png,1,PA\n", "1 of 1 images to predict have no file, the first is gone.png"),
        ("filename,patientid,view\n,1,PA\n", "list.csv, row 2: no file name"),
        ("", "list.csv: empty file"),
        ("filename\n", "list.csv: no rows under its header"),
    ],
)
def test_lists_of_images_to_predict(text, said, tmp_path, spoilt):
    (tmp_path / "list.csv").write_text(text)
    assert said in spoilt("--test", tmp_path / "list.csv")
