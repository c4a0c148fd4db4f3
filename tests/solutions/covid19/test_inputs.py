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

    def run(*words):
        result = command(*PREPARE, "--data", data, *tiny, *words)
        assert (result.status, result.errors) == (0, []), result
        selection = read_table(tmp_path / "run" / "selection.csv").set_index("image_id")
        return result.out, selection, pd.read_parquet(tmp_path / "run" / "images.parquet").set_index("image_id")

    return run


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run demo --out run --network.size 512", "store_size 128 is under the 512 px of network.size"),
        ("run demo --out run --network.dropout 1", "dropout must lie in [0, 1), not 1"),
        ("run demo --out run --view border", "invalid choice 'border'"),
        ("run demo --out run --audit.checks ribs", "invalid choice 'ribs'"),
        ("run demo --out run --audit.margin 0.6", "margin must lie in (0, 0.5), not 0.6"),
        ("run demo --out run --same-source both", "invalid choice 'both'"),
        ("run demo --out run --selection.duplicates 0.5", "duplicates must lie in [0, 0.25), not 0.5"),
        ("run demo --out run --lungs.gate 2", "gate must lie in [0, 1], not 2"),
        ("run demo --out run --folds 3", "name some of 0 to 2"),
        ("run paper --out run --n-folds 2 --folds 0", "so at least 3 are needed"),
        ("run demo --out run", "name the folder of the images with --data"),
        ("run demo --out run --data nowhere", "nowhere: no such folder"),
        ("run demo --out run --data empty", "empty: no collection in it or in a folder of it (no metadata.csv"),
        ("run demo --out run --data data --normals nowhere", "nowhere: no such folder"),
        ("run demo --out run --data data --normals empty", "empty: no collection in it"),
        ("run demo --out run --data data --test nowhere", "nowhere: no such file"),
        ("run demo --out run --data data --test empty", "empty: no images in it (--test)"),
        ("run demo --out run --data data --id-map file.csv", "--id-map: the collections' tables name the patients"),
    ],
)
def test_words(words, said, data, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.csv").write_text("a,b\n1,2\n")
    assert said in refused(*words.split())
    assert not (tmp_path / "run").exists()


# ---- tables --------------------------------------------------------------------------------------------------------


def test_bad_metadata_is_logged_and_its_rows_are_kept_in_the_selection(data, prepared):
    """Unknown view, missing file, age as text, a patient's number in both collections: all at once."""
    table = read_table(data / "metadata.csv")
    before = len(table) + len(pd.read_csv(data / "normals" / "Data_Entry_2017.csv", index_col=False))
    covid = table.index[(table["finding"] == "COVID-19") & (table["view"] == "PA") & (table["age"].str.len() == 2)]
    view, gone, age = (table["filename"][row].rsplit(".", 1)[0] for row in covid[:3])
    table.loc[covid[0], "view"], table.loc[covid[2], "age"] = "from above", "about 50"
    replace(data / "metadata.csv", table)
    next((data / "images").glob(f"{gone}.*")).unlink()
    out, selection, images = prepared()
    assert len(selection) == before and selection.loc[gone, "reason"] == "no such file"
    assert {view, age} <= set(images.index) and gone not in images.index
    assert images.loc[view, "view"] == "unknown" and np.isnan(images.loc[age, "age"])
    assert "unreadable views count as unknown: 1, the first is 'from above'" in out
    assert "unreadable ages count as unknown: 2" in out
    assert "patient numbers in more than one collection" in out
    leave = ["--selection.unknown-view", "leave", "--selection.unknown-age", "leave"]
    _, selection, images = prepared(*leave)
    assert selection.loc[view, "reason"] == "view unknown (from above)"
    assert selection.loc[age, "reason"] == "age unknown (about 50)" and not {view, age} & set(images.index)


def test_tables_that_cannot_be_read(data, spoilt):
    metadata = data / "metadata.csv"
    table, lines = read_table(metadata), metadata.read_text().splitlines()
    for content, said in (
        (b"", "metadata.csv: empty file"),
        (lines[0].encode(), "metadata.csv: no rows under its header"),
        ("\n".join([*lines[:3], "a,b", *lines[3:]]).encode(), "metadata.csv, row 4: 2 values where the header has 29"),
        (table.drop(columns="finding"), "metadata.csv, row 1: no column finding"),
        (b"\x89PNG\r\n\x1a\n\0\0", "metadata.csv: not a CSV file"),
        (table.assign(finding="SARS"), "no image with COVID-19 to train on"),
    ):
        replace(metadata, content)
        assert said in spoilt()


def test_no_normals(data, spoilt, prepared):
    table = read_table(data / "metadata.csv")
    (data / "normals" / "Data_Entry_2017.csv").unlink()
    assert "no image without COVID-19 to train on: name a folder of normals by --normals or take those of the same" in (
        spoilt()
    )
    out, _, images = prepared("--same-source", "train")
    assert (images.loc[images["label"] == 0, "role"] == "main").sum() == 4 and "of the same collections" not in out
    shutil.rmtree(data.parent / "run")
    replace(data / "metadata.csv", table[table["finding"].str.contains("COVID")])
    assert spoilt("--same-source", "train").endswith("name a folder of normals by --normals")


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
    assert line.startswith("error: no image with COVID-19 to train on; left out: ") and "lungs" in line


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


def test_an_image_to_predict_that_is_named_twice_or_missing(data, spoilt):
    table = read_table(data / "unlabelled_test.csv")
    replace(data / "unlabelled_test.csv", pd.concat([table, table[:1]]))
    assert f"{table['filename'][0]}: twice among the images to predict" in spoilt()
    (data / "unlabelled_test.csv").unlink()
    table.to_csv(data / "unlabelled_test.csv", index=False)
    (data / "images" / table["filename"][1]).unlink()
    assert f"1 of 4 images to predict have no file, the first is {table['filename'][1]}" in spoilt()
