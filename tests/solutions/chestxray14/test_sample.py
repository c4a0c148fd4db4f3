"""The embedded sample: Kaggle's layout, patients kept apart, and findings where labels and boxes say."""

import hashlib
from collections import Counter

import cv2
import numpy as np
import pandas as pd
import pytest

from common import phantom
from common.data.dicom import read_image
from common.data.folds import make_folds
from common.errors import InputError
from common.paths import find_images
from solutions.chestxray14 import sample
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.sample import make_sample

N_TRAIN, N_TEST, SEED = 30, 14, 2
SMALL = {"n_train": 4, "n_test": 1}
BOX_COLUMNS = ["file", "label", "x", "y", "width", "height"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("chestxray14") / "sample", N_TRAIN, N_TEST, SEED)


@pytest.fixture(scope="module")
def table(folder):
    return pd.read_csv(folder / "Data_Entry_2017.csv", index_col=False)


@pytest.fixture(scope="module")
def boxes(folder):
    return pd.read_csv(folder / "BBox_List_2017.csv", skiprows=1, names=BOX_COLUMNS)


def labels_of(cases):
    return np.array([[label in case.labels for label in LABELS] for case in cases], int)


def fingerprint(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_layout(folder, table):
    names = [
        "BBox_List_2017.csv",
        "Data_Entry_2017.csv",
        "images_001",
        "images_002",
        "sample.json",
        "test_list.txt",
        "train_val_list.txt",
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    first, second = (sorted(folder.glob(f"images_00{part}/images/*.png")) for part in (1, 2))
    assert len(first) == len(second) == (N_TRAIN + N_TEST) // 2
    assert [path.name for path in first + second] == table["Image Index"].tolist() == sorted(table["Image Index"])
    lists = [(folder / name).read_text().splitlines() for name in ("train_val_list.txt", "test_list.txt")]
    assert [len(files) for files in lists] == [N_TRAIN, N_TEST]
    assert sorted(lists[0] + lists[1]) == table["Image Index"].tolist() and all(
        files == sorted(files) for files in lists
    )
    assert not {file[:8] for file in lists[0]} & {file[:8] for file in lists[1]}  # patients


def test_headers_have_the_oddities_of_the_real_files(folder):
    head, line, *_ = (folder / "Data_Entry_2017.csv").read_bytes().split(b"\n")
    assert head == (
        b"Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        b"OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    )
    assert line.endswith(b",") and line.count(b",") == head.count(b",") == 11
    head, line, *_ = (folder / "BBox_List_2017.csv").read_bytes().split(b"\n")
    assert head == b"Image Index,Finding Label,Bbox [x,y,w,h],,," and line.count(b",") == 5


def test_rows_are_well_formed(table):
    numbers = table["Image Index"].str.extract(r"^(\d{8})_(\d{3})\.png$").astype(int)
    assert (numbers[0] == table["Patient ID"]).all() and (numbers[1] == table["Follow-up #"]).all()
    people = table.groupby("Patient ID")
    assert sorted(people.groups) == list(range(1, len(people) + 1)) and people.size().max() > 1
    assert (people["Follow-up #"].apply(list).map(len) == people["Follow-up #"].max() + 1).all()
    assert (people["Patient Gender"].nunique() == 1).all() and set(table["Patient Gender"]) == {"F", "M"}
    assert table["Patient Age"].between(18, 90).all()
    assert set(table["View Position"]) == {"AP", "PA"}
    found = [row.split("|") for row in table["Finding Labels"]]
    assert all(row == ["No Finding"] or (row == sorted(set(row)) and set(row) <= set(LABELS)) for row in found)
    assert max(map(len, found)) == 4
    assert table["OriginalImage[Width"].between(2000, 3100).all() and table["y]"].between(0.1, 0.2).all()


def test_images_are_square_8_bit_and_some_have_four_channels(folder):
    shapes = Counter()
    for path in find_images(folder).values():
        stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        shapes[stored.shape] += 1
        image = read_image(path)
        assert stored.dtype == image.dtype == np.uint8 and image.shape == (512, 512)
        assert np.ptp(image) > 120 and image[:30, :30].mean() < image[:, 250:262].mean()  # air is dark, the spine not
    assert shapes == {(512, 512): N_TRAIN + N_TEST - 1, (512, 512, 4): 1}


def test_boxes_are_on_test_images_and_name_their_labels(folder, table, boxes):
    labels = table.set_index("Image Index")["Finding Labels"].str.split("|")
    tests = (folder / "test_list.txt").read_text().split()
    expected = {(file, label) for file in tests for label in labels[file] if label in LABELS[:8]}
    named = boxes["label"].replace("Infiltrate", "Infiltration")
    assert "Infiltration" not in set(boxes["label"]) and set(named) == set(LABELS[:8])
    assert Counter(zip(boxes["file"], named, strict=True)) == Counter(expected)
    assert (boxes[["x", "y"]] >= 0).all(axis=None) and (boxes[["width", "height"]] >= 10).all(axis=None)
    assert (boxes["x"] + boxes["width"]).max() <= 1024 and (boxes["y"] + boxes["height"]).max() <= 1024
    assert (boxes["x"] + boxes["width"]).max() > 600  # not in pixels of the files


def test_findings_are_drawn_where_boxes_say(folder, boxes):
    images, seen = find_images(folder), Counter()
    for case in (case for case in sample._plan(N_TRAIN, N_TEST, SEED) if case.split == "test"):
        side, moved = 512 if case.view == "PA" else 548, [sample.draws.emphysema] if "Emphysema" in case.labels else []
        normal = phantom.draw(case.number, side, moved, patient=case.person)
        stored = read_image(images[case.file_name[:-4]]).astype(int)
        full = cv2.matchTemplate(np.float32(normal.image), np.float32(stored), cv2.TM_SQDIFF)
        _, _, (x, y), _ = cv2.minMaxLoc(full)
        change = np.abs(stored - normal.image[y : y + 512, x : x + 512])
        for row in boxes[boxes["file"] == case.file_name].itertuples():
            x_min, y_min = int(row.x) // 2, int(row.y) // 2
            part = change[y_min : y_min + int(row.height) // 2, x_min : x_min + int(row.width) // 2]
            assert np.percentile(part, 90) > 12, (case, row)
            seen[row.label] += 1
    assert len(seen) == 8


def test_healthy_images_show_nothing_and_followups_the_same_person(folder):
    images = find_images(folder)
    cases = sample._plan(N_TRAIN, N_TEST, SEED)
    healthy = [case for case in cases if not case.labels and case.view == "PA"]
    assert len(healthy) > 4
    for case in healthy[:4]:
        film = phantom.draw(case.number, 512, patient=case.person)
        assert np.array_equal(read_image(images[case.file_name[:-4]]), film.image)
    persons = {}
    for case in cases:
        persons.setdefault(case.patient, set()).add(case.person)
    assert all(len(person) == 1 for person in persons.values())
    assert len(set.union(*persons.values())) == len(persons) and len({case.number for case in cases}) == len(cases)


def test_the_chest_fills_more_of_an_ap_film(tmp_path):
    for number in range(3):
        widths = []
        for view in ("PA", "AP"):
            case = sample._Case("test", number, number, 1, 0, ("Cardiomegaly",), view)
            widths.append(sample._write_image(tmp_path, case)["Cardiomegaly"][2])
            assert read_image(tmp_path / case.file_name).shape == (512, 512)
        assert abs(widths[1] / widths[0] - sample.CLOSER) < 0.01


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_label_can_be_trained_and_scored_by_default(seed):
    cases = sample._plan(96, 32, seed)
    train, test = ([case for case in cases if case.split == split] for split in ("train", "test"))
    assert len(train) == 96 and len(test) == 32
    labels = labels_of(train)
    assert abs((labels.sum(axis=1) == 0).mean() - 0.4) < 0.02 and set(labels.sum(axis=1)) == {0, 1, 2, 3, 4}
    assert np.ptp(labels.sum(axis=0)) <= 1
    folds = make_folds(labels, 2, np.array([case.patient for case in train]), seed)
    assert min(labels[folds == fold].sum(axis=0).min() for fold in (0, 1)) >= 4
    assert labels_of(test).sum(axis=0).min() >= 3
    assert not {case.patient for case in train} & {case.patient for case in test}
    assert 0.25 < np.mean([case.view == "AP" for case in cases]) < 0.55
    assert 20 < sum(case.visit > 0 for case in cases) < 80


def test_every_way_to_draw_a_label_draws_it():
    for label, ways in sample.FINDINGS.items():
        for way in ways:
            (found,) = phantom.draw(1, 128, [way]).findings
            assert found.name == {"Nodule": "nodule"}.get(label, label.lower())
    assert set(sample.FINDINGS) == set(LABELS)


def test_bytes_depend_on_the_parameters_alone(tmp_path):
    one, same, other = (
        fingerprint(make_sample(tmp_path / name, **SMALL, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == same
    assert not {digest for name, digest in one.items() if name.endswith("png")} & set(other.values())


def test_a_complete_sample_is_kept_and_another_replaced(tmp_path, monkeypatch):
    folder = make_sample(str(tmp_path / "sample"), **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "_write", None)  # a call would fail
        assert make_sample(folder, **SMALL) == folder
    make_sample(folder, n_train=5, n_test=1)
    assert len((folder / "train_val_list.txt").read_text().split()) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


@pytest.mark.parametrize("name, value", [("n_train", 3), ("n_test", 0), ("seed", -1), ("n_train", 4.5)])
def test_bad_parameters_are_named(tmp_path, name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        make_sample(tmp_path / "sample", **SMALL | {name: value})
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "sample.json").write_text('{"sample": "siim_pneumothorax"}')
    with pytest.raises(InputError, match="something other than a sample"):
        make_sample(tmp_path, **SMALL)
