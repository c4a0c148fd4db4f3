"""What labels say, and which image they mean."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import InputError
from common.options import Options
from solutions.own import data
from solutions.own.config import DEMO, replace
from solutions.own.labels import find_labels, list_images, read_labels, task_of
from solutions.own.pipeline import pick
from tests.solutions.own.folders import read_folder, write_coco, write_images, write_lines

FOUR = ["a.png", "b.png", "c.png", "d.png"]


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "data", FOUR)


def test_columns_of_0_1_and_blanks_become_values_with_unknowns(folder):
    write_lines(folder / "labels.csv", "image_id,mass,nodule", "a,1,0", "b.png,,1", "c,0,1", "d,1.0,0.0")
    listing = read_folder(folder)
    assert listing.about == {"task": "multilabel", "classes": ["mass", "nodule"]}
    assert listing.table["image_id"].tolist() == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(listing.table["mass"], [1, np.nan, 0, 1])
    np.testing.assert_array_equal(listing.strata, [[1, 0], [0, 1], [0, 1], [1, 0]])


def test_a_column_label_becomes_one_of_several_classes(folder):
    write_lines(folder / "labels.csv", "image_id,label", "a,sick", "b,well", "c,sick", "d,well")
    listing = read_folder(folder)
    assert listing.about == {"task": "multiclass", "classes": ["sick", "well"]}
    assert listing.table[["sick", "well"]].to_numpy().tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


def test_what_the_labels_are_made_for(folder):
    box = "image_id,class,x_min,y_min,x_max,y_max"
    assert task_of(write_lines(folder / "boxes.csv", box, "a,mass,0,0,2,2")) == "detection"
    bbox, outline = {"bbox": [0, 0, 2, 2]}, {"segmentation": [[0, 0, 2, 0, 2, 2]]}
    assert task_of(write_coco(folder / "boxes.json", ["a.png"], [(0, 0, bbox)])) == "detection"
    assert task_of(write_coco(folder / "masks.json", ["a.png"], [(0, 0, bbox | outline)])) == "segmentation"
    assert task_of(folder) == "segmentation"


def test_labels_are_looked_for_beside_the_images(folder):
    with pytest.raises(InputError, match=r"data: no labels.csv, labels.json or folder masks in it"):
        find_labels(folder, "")
    path = write_lines(folder / "labels.csv", "image_id,mass", "a,1")
    assert find_labels(folder, "") == find_labels(folder, "labels.csv") == path
    with pytest.raises(InputError, match=r"other\.csv: no such file or folder"):
        find_labels(folder, "other.csv")


@pytest.mark.parametrize(
    ("masks", "others"),
    [
        ("annotations/lungs", ["annotations/heart/a.png", "annotations/heart/b.png"]),
        ("train/masks", ["test/images/a.png"]),
        ("masks/lungs", ["masks/heart/c.png"]),
    ],
)
def test_other_masks_beside_the_labels_are_no_images(masks, others, tmp_path):
    pictures = ["train/images/a.png", "train/images/b.png"]
    write_images(tmp_path, [*pictures, *(f"{masks}/{name}.png" for name in "ab"), *others])
    test = [name for name in others if name.startswith("test")]
    files, _ = list_images(tmp_path, tmp_path / masks)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in files.values()) == sorted([*pictures, *test])


def test_equal_stems_make_paths_the_ids(tmp_path):
    write_images(tmp_path, ["x/1.png", "y/1.png", "y/2.png"])
    files, names = list_images(tmp_path)
    assert list(files) == ["x/1.png", "y/1.png", "y/2.png"]
    assert names["y/1"] == names["y/1.png"] == "y/1.png" and names["2"] == "y/2.png" and names["1"] is None
    write_lines(tmp_path / "labels.csv", "image_id,mass", "1,0", "y/1,1", "y/2,1")
    with pytest.raises(InputError, match="several images are named '1'; write their paths"):
        read_folder(tmp_path)
    write_lines(tmp_path / "labels.csv", "image_id,mass", "x/1,0", "y/1,1", "y/2,1")
    assert read_folder(tmp_path).table["image_id"].tolist() == ["x/1.png", "y/1.png", "y/2.png"]


def test_patients_splits_and_folds(folder):
    write_lines(folder / "labels.csv", "image_id,mass,patient_id,split", "a,1,p,", "b,0,,", "c,1,q,", "d,,,test")
    with pytest.raises(InputError, match=r"row 2: split is '', not train\|val\|test"):
        read_folder(folder)
    rows = ["a,1,p,train", "b,0,,val", "c,1,q,train", "d,,,test"]
    write_lines(folder / "labels.csv", "image_id,mass,patient_id,split", *rows)
    listing = read_folder(folder)
    assert listing.about["n_folds"] == 2 and listing.about["folds"] == [0]
    table = listing.table.set_index("image_id")
    assert table.loc[["a", "b", "c", "d"], "patient_id"].tolist() == ["p", "image b", "q", ""]
    assert table.loc[["a", "b", "c", "d"], "fold"].tolist() == [1, 0, 1, -1]
    assert table.loc["d", "split"] == "test" and listing.sample["image_id"].tolist() == ["d"]
    write_lines(folder / "labels.csv", "image_id,mass,fold,split", "a,1,0,train", "b,0,1,val", "c,1,0,train")
    with pytest.raises(InputError, match="row 3: split is 'val', but the column fold says what is held out"):
        read_folder(folder)
    write_lines(folder / "labels.csv", "image_id,mass,fold", "a,1,0", "b,0,1", "c,1,3", "d,0,0")
    with pytest.raises(InputError, match=r"has the folds \[0, 1, 3\], not all of the n_folds 2"):
        read_folder(folder)


@pytest.mark.parametrize(("given", "folds"), [((0, 1), (0, 1, 2)), ((1,), (1,)), ((0, 2), (0, 2)), ((0, 4), None)])
def test_folds_may_be_some_of_those_in_the_labels(given, folds, folder):
    write_lines(folder / "labels.csv", "image_id,mass,fold", "a,1,0", "b,0,1", "c,1,2", "d,0,0")
    config = replace(DEMO, n_folds=2 if given == (0, 1) else 5, folds=given)
    prepared = {"about": {"task": "multilabel", "n_folds": 3, "folds": [0, 1, 2]}}
    for verb in ("prepare", "train"):
        job = SimpleNamespace(config=config, options=Options(data=folder), run=SimpleNamespace(step=lambda _: prepared))
        if folds is None:
            with pytest.raises(InputError, match=r"--folds \(0, 4\): the labels have the folds \(0, 1, 2\)"):
                pick(job, verb)
            continue
        pick(job, verb)
        assert (job.config.n_folds, job.config.folds) == (3, folds)


def test_what_does_not_fit_is_counted_and_left_out_if_chosen(folder):
    rows = ["a,1,0", "b,0,1", "gone,1,0", "c,,"]
    write_lines(folder / "labels.csv", "image_id,mass,nodule", *rows, "lost,0,1")
    with pytest.raises(InputError, match=r"row 4: 'gone' is one of 2 images without a file in .*--on-missing skip"):
        read_folder(folder)
    with pytest.raises(InputError, match="row 5: 'c' is one of 1 images without any label; --on-unlabelled skip"):
        read_folder(folder, on_missing="skip")
    skips = {"on_missing": "skip", "on_unlabelled": "skip"}
    with pytest.raises(InputError, match=r"class 'mass' has 1 images to train on .of 2 such classes.; --on-rare drop"):
        read_folder(folder, **skips)
    listing = read_folder(folder, on_rare="keep", **skips)
    assert listing.table["image_id"].tolist() == ["a", "b"]
    assert [row[0] for row in listing.left_out] == ["gone", "lost", "c", "d"]


def test_rare_classes(folder):
    write_images(folder, ["e.png"])
    rows = ["a,sick", "b,well", "c,sick", "d,well", "e,odd"]
    write_lines(folder / "labels.csv", "image_id,label", *rows)
    listing = read_folder(folder, on_rare="drop")
    assert listing.about["classes"] == ["sick", "well"] and listing.table["image_id"].tolist() == ["a", "b", "c", "d"]
    assert [row[0] for row in listing.left_out] == ["e"]
    write_lines(folder / "labels.csv", "image_id,mass,nodule", *(f"{name},1,0" for name in "abcde"))
    with pytest.raises(InputError, match="class 'nodule' has 0 images"):
        read_folder(folder, on_rare="keep")
    assert read_folder(folder, on_rare="drop").about["classes"] == ["mass"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("image_id,mass", "a,0.3", "b,1"), r"labels.csv, row 2, column mass: '0.3' is neither 0, 1 nor blank"),
        (("image_id,Mass,mass", "a,0,1"), "the classes 'Mass' and 'mass' differ only in case"),
        (("image_id,label", "a,Mass", "b,mass "), "the classes 'Mass' and 'mass' differ only in case"),
        (("image_id,mass", "a,1", "a,1"), "row 3: the image 'a' has an earlier row"),
        (("image_id,mass", "a,1", "a.png,1"), "row 3: a second name of the image a"),
        (("image_id,patient_id", "a,p"), "row 1: no column for a class beside image_id"),
        (("image_id,label", "a,x", "b,x"), "1 classes are too few for the task multiclass"),
        (("image_id,class,x_min,y_min,x_max,y_max", "a,,,,,"), "0 classes are too few for the task detection"),
        (("image_id,width", "a,1"), "'width' cannot be the name of a class"),
        (("image_id,truth", "a,1"), "'truth' cannot be the name of a class"),
        (("image_id,label", "a,x", "b,nan"), "row 3: label is 'nan', which may mean a missing value; leave it blank"),
        (("image_id,mass,patient_id", "a,1,p", "b,0,<NA>"), "row 3: patient_id is '<NA>', which may mean a missing"),
        (("image_id,class,x_min,y_min,x_max,y_max", "b,None,,,,", "a,None,1,1,2,2"), "row 3: class is 'None', which"),
        (("image_id,mass", ",1"), "row 2: no image is named"),
        (("image_id,mass,patient_id", "a,1,p", "b,1,p", "c,0,p", "d,0,p"), "4 images of 1 patients are too few"),
        (("image_id,class,x_min,y_min,x_max,y_max", "a,x,1,1,2,2", "b,X,1,1,2,2"), "'X' and 'x' differ only in case"),
    ],
)
def test_bad_tables(lines, said, folder):
    write_lines(folder / "labels.csv", *lines)
    with pytest.raises(InputError, match=said):
        read_folder(folder, on_rare="keep")


def test_three_images_are_too_few_for_five_folds(folder):
    (folder / "d.png").unlink()
    write_lines(folder / "labels.csv", "image_id,mass", "a,1", "b,0", "c,1")
    with pytest.raises(InputError, match="3 images are too few for n_folds 5"):
        read_folder(folder, n_folds=5)


def test_classes_choose_columns(folder):
    write_lines(folder / "labels.csv", "image_id,age,mass,nodule", "a,61,1,0", "b,40,0,1", "c,7,1,1", "d,33,0,0")
    assert read_folder(folder, classes=("nodule", "mass")).about["classes"] == ["nodule", "mass"]
    with pytest.raises(InputError, match="no class 'hernia': age, mass, nodule"):
        read_folder(folder, classes=("hernia",))


def test_other_images_to_predict(folder, tmp_path):
    write_lines(folder / "labels.csv", "image_id,mass", "a,1", "b,0", "c,1")
    write_lines(folder / "sample_submission.csv", "image_id,mass", "d,0.5")
    assert read_folder(folder).sample["image_id"].tolist() == ["d"]
    more = write_images(tmp_path / "new", ["e.png"])
    listing = read_folder(folder, test=more)
    assert listing.sample["image_id"].tolist() == ["e"] and listing.files["e"] == more / "e.png"
    write_lines(folder / "sample_submission.csv", "image_id", "a")
    with pytest.raises(InputError, match="a: a labelled image that is to be predicted too"):
        read_folder(folder, on_unlabelled="skip")


@pytest.mark.long
def test_200_000_rows_take_little_memory(tmp_path, monkeypatch):
    names = [f"i{number:06d}" for number in range(200_000)]
    rows = (f"{name},{k % 3 // 2},{k % 2},p{k // 3}" for k, name in enumerate(names))
    write_lines(tmp_path / "labels.csv", "image_id,mass,nodule,patient_id", *rows)
    found = dict.fromkeys(names, tmp_path), dict(zip(names, names, strict=True))
    monkeypatch.setattr(data, "list_images", lambda *args: found)
    tracemalloc.start()
    listing = read_folder(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 400e6
    tracemalloc.stop()
    assert len(listing.table) == 200_000 and listing.table["patient_id"].nunique() == 66_667


def test_values_of_labels_do_not_depend_on_their_order(folder):
    path = write_lines(folder / "labels.csv", "image_id,b,a", "x,1,0")
    labels = read_labels(path, "multilabel", ("a", "b"))
    assert labels.images[labels.classes].to_numpy().tolist() == [[0, 1]] and labels.classes == ["a", "b"]
