"""From collections to a selection, lungs, roles and folds: small folders by hand, the whole real table."""

import dataclasses
import logging

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.tables import real_data
from common.budget import Budget
from common.cost import Cost
from common.errors import InputError
from common.images import prepare_images
from common.job import Job
from common.options import Options
from common.paths import read_json
from common.plan import estimate
from common.runs import Run
from common.submit.table import read_table
from solutions.covid19.collections import read_collections
from solutions.covid19.config import DEMO, LungsConfig, SelectionConfig
from solutions.covid19.data import SELECTION, draw_evenly, read_competition, read_selection, rejected_shares
from solutions.covid19.models import fold_rows, with_origins
from solutions.covid19.pipeline import SOLUTION
from solutions.covid19.selection import select

HEADER = "patientid,sex,age,finding,view,modality,folder,filename"
NIH = "Image Index,Finding Labels,Patient ID,Patient Age,Patient Gender,View Position"
SMALL = dataclasses.replace(
    DEMO,
    network=dataclasses.replace(DEMO.network, size=32),
    store_size=32,
    n_folds=2,
    folds=(0, 1),
    lungs=LungsConfig(dilations=0, closings=0),
)
COVID = [f"c{k}.png" for k in range(8)]  # of patients 0 0 1 1 2 2 3 3
OTHER = [f"o{k}.png" for k in range(3)]  # of patients 10 11 12
NORMAL = [f"{k:08}_000.png" for k in range(6)]
TEST = ["t0.png", "t1.png"]


def write_image(path, number, lungless=False, side=48):
    """Clouds of their own for each number: images of different numbers are no copies of each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(20, 200, (8, 8)).astype(np.uint8)
    image = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    image[: side // 8, : side // 8] = 255 if lungless else 30
    assert cv2.imwrite(str(path), image)


def home_row(name, patient, finding, age="50", view="PA", modality="X-ray"):
    return f"{patient},M,{age},{finding},{view},{modality},images,{name}"


HOME = [home_row(name, k // 2, "COVID-19") for k, name in enumerate(COVID)] + [
    home_row(name, 10 + k, "SARS") for k, name in enumerate(OTHER)
]


def write(path, header, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n")


@pytest.fixture
def folder(tmp_path):
    """A home collection with images to predict, and NIH's normals in a folder of it."""
    root = tmp_path / "data"
    for number, name in enumerate([*COVID, *OTHER, *TEST]):
        write_image(root / "images" / name, number)
    for number, name in enumerate(NORMAL):
        write_image(root / "normals" / "images_001" / "images" / name, 50 + number)
    write(root / "metadata.csv", HEADER, HOME)
    normals = [f"{name},No Finding,{k},60,F,AP" for k, name in enumerate(NORMAL)]
    write(root / "normals" / "Data_Entry_2017.csv", NIH, normals)
    tests = [f"{name},{90 + k},PA" for k, name in enumerate(TEST)]
    write(root / "unlabelled_test.csv", "filename,patientid,view", tests)
    return root


@pytest.fixture
def job(tmp_path, folder, quick_lungs):
    """`job(config, **options)`: what a verb gets; runs of one test share the store."""
    runs = []

    def make(config=SMALL, out="run", **options):
        while runs:
            runs.pop().close()
        runs.append(Run(tmp_path / out))
        options = Options(**{"data": folder, "out": tmp_path / out, "workers": 0} | options)
        return Job("covid19", "demo", config, options, runs[-1], torch.device("cpu"), Budget(None), recipe=SOLUTION)

    yield make
    for run in runs:
        run.close()


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def refusal(work, *args):
    with pytest.raises(InputError) as caught:
        work(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prepare(job):
    return prepare_images(job, SOLUTION)


def prepared(job):
    """Prepares; returns the Images, their table by image and the selection by image."""
    images = prepare(job)
    return images, images.table.set_index("image_id"), read_selection(job.run).set_index("image_id")


# ---- what prepare leaves -------------------------------------------------------------------------------------------


def test_what_prepare_leaves(job, folder, said):
    run = job()
    _, table, selection = prepared(run)
    roles = table.loc[["c0", "c7", "00000000_000", "00000005_000", "o0", "o2"], "role"].tolist()
    assert roles == ["main"] * 4 + ["same_source"] * 2
    assert (table.loc[["t0", "t1"], ["role", "split"]] == ["", "test"]).all(axis=None)
    assert table["label"].value_counts().to_dict() == {1: 8, 0: 9, -1: 2}
    assert table.loc["o0", "home"] and not table.loc["00000000_000", "home"]
    assert table.loc["c1", "patient_id"] == "data 0" and table.loc["00000001_000", "patient_id"] == "NIH ChestX-ray14 1"
    assert table["usable"].all() and table["area"].tolist() == pytest.approx([2 * 24 * 10 / 32**2] * 19)
    assert (table["width"] == 48).all() and table["ok"].all()

    train = table[table["split"] == "train"]
    assert set(train["fold"]) == {0, 1} and (train.groupby("patient_id")["fold"].nunique() == 1).all()
    assert (table.loc[["t0", "t1"], "fold"] == -1).all()
    counts = train.groupby(["role", "label", "fold"]).size()
    assert counts["main", 1].tolist() == [4, 4] and counts["main", 0].tolist() == [3, 3]
    folds = pd.read_csv(run.run.path("folds.csv"), comment="#").set_index("image_id")
    assert folds["fold"].to_dict() == train["fold"].to_dict()
    sample = read_table(run.run.path("sample_submission.csv"))
    assert sample.to_numpy().tolist() == [["t0.png", "0.5"], ["t1.png", "0.5"]]
    assert selection.reset_index().columns.tolist() == ["image_id", *[name for name in SELECTION if name != "image_id"]]
    assert len(selection) == 17 and selection["kept"].all() and (selection["reason"] == "").all()
    assert "prepared 8 images with COVID-19 and 6 without, 3 more of the same collections that" in said.text
    assert "the gate rejected 0.0% of 8 with COVID-19, 0.0% of 9 without" in said.text
    record = run.run.step("prepare")
    assert record["images"] == 19 and record["synthetic"] is False
    inputs = read_json(run.run.path("manifest.json"))["inputs"]
    assert {path.rsplit("/", 1)[1] for path in inputs} == {"metadata.csv", "Data_Entry_2017.csv"}


# ---- the selection -------------------------------------------------------------------------------------------------


def test_bad_metadata_is_logged_and_nothing_lost(job, folder, said):
    """An unknown view, missing files, ages as text, a patient's number in two collections, a finding to come."""
    odd = [
        home_row("v.png", 20, "COVID-19", view="sideways"),
        home_row("gone.png", 21, "COVID-19"),
        home_row("a.png", 22, "COVID-19", age="60s"),
        home_row("b.png", 1, "COVID-19", age="unknown"),
        home_row("todo.png", 23, "todo"),
        home_row("side.png", 24, "COVID-19", view="L"),
        home_row("ct.png", 25, "COVID-19", modality="CT"),
        home_row("kid.png", 26, "COVID-19", age="7"),
    ]
    write(folder / "metadata.csv", HEADER, HOME + odd)
    for number, name in enumerate(("v", "a", "b", "todo", "side", "ct", "kid"), 200):
        write_image(folder / "images" / f"{name}.png", number)
    _, table, selection = prepared(job())
    assert len(selection) == 25
    reasons = selection.loc[~selection["kept"], "reason"].to_dict()
    assert reasons == {
        "gone": "no such file",
        "todo": "finding unknown (todo)",
        "side": "lateral (L)",
        "ct": "CT",
        "kid": "age 7",
    }
    assert set(table.index) == set(selection.index[selection["kept"]]) | {"t0", "t1"}
    assert table.loc["b", "patient_id"] == "data 1" and np.isnan(table.loc["b", "age"])
    metadata = folder / "metadata.csv"
    assert f"unreadable ages count as unknown: 2, the first is '60s' ({metadata}, row 15)" in said.text
    assert f"unreadable views count as unknown: 1, the first is 'sideways' ({metadata}, row 13)" in said.text
    assert "left out: 1 no such file, 1 finding unknown, 1 lateral, 1 CT, 1 age" in said.text


def test_copies_and_the_patients_of_test_images(job, folder, said):
    """o1 again among the normals; c2 among the images to predict, whose patient has c3 too."""
    for name, copy in (("o1", "normals/images_001/images/00000009_000"), ("c2", "images/t2")):
        image = cv2.imread(str(folder / "images" / f"{name}.png"), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(folder / f"{copy}.png"), cv2.resize(image, (60, 60), interpolation=cv2.INTER_AREA))
    with open(folder / "normals" / "Data_Entry_2017.csv", "a") as file:
        file.write("00000009_000.png,No Finding,9,60,F,AP\n")
    with open(folder / "unlabelled_test.csv", "a") as file:
        file.write("t2.png,92,PA\n")
    data, table, selection = prepared(job())
    assert selection.loc["00000009_000", "reason"] == "same image as o1 (data)"
    assert (selection.loc[["c2", "c3"], "reason"] == "the patient of the test image t2.png").all()
    assert table.loc["00000009_000", "fold"] == table.loc["c2", "fold"] == -1
    assert not {"c2", "c3", "00000009_000"} & set(data.ids(data.rows()))
    assert "test image t2.png is a copy of c2: its patient is left out of training" in said.text
    assert "left out: 2 the patient of the test image, 1 same image" in said.text
    # o1 and its copy are one patient, of whatever collection
    assert table.loc["o1", "patient_id"] == table.loc["00000009_000", "patient_id"]


def test_images_without_lungs_are_left_out_and_counted(job, folder, said):
    for name in ("c0", "o0", "t0"):
        write_image(folder / "images" / f"{name}.png", 300 + ord(name[0]), lungless=True)
    run = job()
    data, table, selection = prepared(run)
    assert selection.loc[["c0", "o0"], "reason"].tolist() == ["lungs: no lung found"] * 2
    assert not table.loc[["c0", "o0", "t0"], "usable"].any() and data.ids(data.rows("test")).tolist() == ["t0", "t1"]
    shares = rejected_shares(read_selection(run.run))
    assert shares == {"with COVID-19": (1 / 8, 8), "without": (1 / 9, 9)}
    assert "the gate rejected 12.5% of 8 with COVID-19, 11.1% of 9 without" in said.text


def test_rejected_shares_are_of_the_images_that_came_so_far():
    reasons = ["", "lungs: none", "age 3", "not drawn", "not drawn: negatives 5", "lungs: none", ""]
    table = pd.DataFrame({"label": [1, 1, 1, 0, 0, 0, 0], "reason": reasons, "kept": [not text for text in reasons]})
    assert rejected_shares(table) == {"with COVID-19": (1 / 2, 2), "without": (1 / 3, 3)}
    assert rejected_shares(table[table["label"] == 1]) == {"with COVID-19": (1 / 2, 2)}


# ---- roles ---------------------------------------------------------------------------------------------------------


def test_same_source_images_may_be_trained_on(job, said):
    data, table, _ = prepared(job(dataclasses.replace(SMALL, same_source="train")))
    assert set(table.loc[["o0", "o1", "o2"], "role"]) == {"main"} and len(data.rows(role="same_source")) == 0
    assert "8 images with COVID-19 and 9 without, of" in said.text


def test_negatives_are_drawn_evenly_from_their_collections(job):
    config = dataclasses.replace(SMALL, same_source="train", negatives=5)
    _, table, selection = prepared(job(config))
    drawn = selection[(selection["label"] == 0) & selection["kept"]]["collection"].value_counts().to_dict()
    assert drawn == {"data": 2, "NIH ChestX-ray14": 3} or drawn == {"data": 3, "NIH ChestX-ray14": 2}
    assert (selection.loc[~selection["kept"], "reason"] == "not drawn: negatives 5").all()
    assert (table.loc[selection.index[~selection["kept"]], ["role", "fold"]] == ["", -1]).all(axis=None)
    _, table, selection = prepared(job(dataclasses.replace(SMALL, negatives=5), out="score"))
    assert (table.loc[["o0", "o1", "o2"], "role"] == "same_source").all()  # these are not drawn from
    assert selection["kept"].sum() == 8 + 3 + 5


def test_a_plan_counts_the_negatives_that_are_drawn_and_no_others(job, monkeypatch):
    monkeypatch.setattr("common.plan.measure", lambda *args: Cost(0.5, 0.1, 1.0, 0.5, 1000, ""))
    small = dataclasses.replace(SMALL.network, backbone="test_resnet", weights="none", batch_size=1, epochs=1)
    run = job(dataclasses.replace(SMALL, network=small, negatives=2))
    (stage,) = estimate(run, read_competition(run)).stages
    images = prepare(run)
    assert (images.table["role"] == "main").sum() == 8 + 2
    assert [stage.steps, stage.held_out] == [len(part) for part in fold_rows(run, run.config.folds[0])]


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ((10, 10), 10, (5, 5)),
        ((2, 10), 10, (2, 8)),
        ((1, 2, 30), 12, (1, 2, 9)),
        ((4, 4, 4), 7, (2, 2, 3)),
        ((3, 3), 6, (3, 3)),
        ((5, 5), 1, (0, 1)),
    ],
)
def test_andraw_evenly(sizes, count, expected):
    names = np.random.default_rng(0).permutation(np.repeat([f"c{k}" for k in range(len(sizes))], sizes))
    drawn = draw_evenly(names, count, seed=0)
    assert drawn.sum() == count
    assert tuple(int((drawn & (names == f"c{k}")).sum()) for k in range(len(sizes))) == expected
    assert (draw_evenly(names, count, seed=0) == drawn).all()
    if count > 1 and sizes == (10, 10):
        assert (draw_evenly(names, count, seed=1) != drawn).any()


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_tables_that_leave_nothing_to_train_on(job, folder, tmp_path):
    write(folder / "metadata.csv", HEADER, [row for row in HOME if "SARS" in row])
    assert refusal(prepare, job()) == "no images with COVID-19 to train on"
    child = [row.replace(",50,COVID", ",5,COVID") for row in HOME]
    write(folder / "metadata.csv", HEADER, child)
    assert refusal(prepare, job()) == "no images with COVID-19 to train on; left out: 8 age"
    write(folder / "metadata.csv", HEADER, HOME)
    (folder / "normals" / "Data_Entry_2017.csv").unlink()
    line = refusal(prepare, job())
    assert line == (
        "no images without COVID-19 to train on: name a folder of normals with --normals or use those of the "
        "same collections (--same-source train)"
    )
    assert not list(tmp_path.rglob("images.npy"))  # said before an image is decoded
    assert prepare(job(dataclasses.replace(SMALL, same_source="train"), out="same")).key
    write(folder / "metadata.csv", HEADER, HOME[:8] + [home_row(name, 10, "SARS", view="L") for name in OTHER])
    line = refusal(prepare, job())
    assert line.endswith("name a folder of normals with --normals; left out: 3 lateral")
    write(folder / "metadata.csv", HEADER, [home_row(name, 1, "COVID-19", view="L") for name in COVID])
    assert refusal(prepare, job()) == "the selection leaves no image to train on; left out: 8 lateral"
    assert not (tmp_path / "run" / "images.parquet").exists()


def test_a_fold_without_a_label_is_named(job, folder):
    write(folder / "metadata.csv", HEADER, [home_row(name, 1, "COVID-19") for name in COVID])
    run = job()
    data = prepare(run)
    fold = int(data.table.loc[data.table["label"] == 1, "fold"].iloc[0])
    assert refusal(fold_rows, run, fold) == (f"fold {fold}: no image with COVID-19 to train on; choose another n_folds")


def test_where_an_epoch_is_chosen_the_next_fold_validates(job):
    network = dataclasses.replace(SMALL.network, averaging=("best",))
    run = job(dataclasses.replace(SMALL, network=network, n_folds=3, folds=(0, 1, 2)))
    data = prepare(run)
    main = {k: set(data.rows(folds=[k], role="main")) for k in range(3)}
    for fold in range(3):
        learn, judge = fold_rows(run, fold)
        assert set(learn) == main[(fold + 2) % 3] and set(judge) == main[(fold + 1) % 3]
    last = dataclasses.replace(network, averaging=("last",))
    run = job(dataclasses.replace(SMALL, network=last, n_folds=3, folds=(0, 1, 2)))
    learn, judge = fold_rows(run, 0)
    assert set(learn) == main[1] | main[2] and set(judge) == main[0]


def test_small_groups_are_shown_more_often_in_training_alone(job):
    run = job(dataclasses.replace(SMALL, n_folds=3, folds=(0, 1, 2), balance=True))
    data = prepare(run)
    learn, judge = fold_rows(run, 0)
    shown = data.at(np.unique(learn)).groupby(["collection", "label"]).size()
    counts = data.at(learn).groupby(["collection", "label"]).size()
    assert shown.nunique() > 1 and (counts == np.minimum(shown.max(), 10 * shown)).all()
    assert len(set(judge)) == len(judge) and not set(judge) & set(learn)
    assert set(learn) == set(data.rows(folds=[1, 2], role="main"))


def test_an_adversary_needs_two_collections_of_a_label(job, folder):
    options = {"n_folds": 3, "folds": (0, 1, 2), "adversary": 0.5}
    run = job(dataclasses.replace(SMALL, same_source="train", **options))
    data = prepare(run)
    rows = fold_rows(run, 0)[0]
    labels, origins = with_origins(run, rows).T
    counts = data.at(data.rows(role="main"))["collection"].value_counts()
    assert (data.at(rows)["collection"] == counts.index[origins.astype(int)]).all() and len(set(origins)) > 1
    assert (labels == data.at(rows)["label"]).all()
    lonely = job(dataclasses.replace(SMALL, **options), out="lonely")
    table = prepare(lonely).table
    lonely.images.table["collection"] = lonely.images._by_row["collection"] = table["label"].astype(str).to_numpy()
    assert refusal(fold_rows, lonely, 0) == "--adversary: no label has images from two collections to train on"


# ---- what trainings follow from ------------------------------------------------------------------------------------


def test_other_settings_need_another_prepare(job):
    prepare(job())
    for change, line in (
        ({"same_source": "train"}, "prepared with --same-source score"),
        ({"negatives": 5}, "prepared with --negatives 0"),
        ({"selection": SelectionConfig(least_age=30)}, "prepared with --selection.least-age 18, not 30"),
        ({"lungs": LungsConfig(dilations=1, closings=0)}, "prepared with --lungs.dilations 0, not 1"),
    ):
        other = job(dataclasses.replace(SMALL, **change))
        assert line in refusal(lambda other=other: other.images), change
    assert job(dataclasses.replace(SMALL, view="image")).images.key  # what is seen is not prepared


def test_the_key_follows_what_is_trained_on(job, folder):
    first = prepare(job())
    (folder / "unlabelled_test.csv").unlink()
    fewer = prepare(job(out="fewer"))
    assert fewer.key == first.key and len(fewer.rows("test")) == 0 and fewer.pixels_key != first.pixels_key
    write(folder / "metadata.csv", HEADER, [row.replace("SARS", "COVID-19") for row in HOME])
    assert prepare(job(out="labels")).key != first.key


# ---- the real collections ------------------------------------------------------------------------------------------


def test_the_real_selection():
    folder = real_data("covid19")
    if folder is None:
        pytest.skip("no real radiographs of COVID-19 (CXR_REAL_DATA)")
    table = select(read_collections([folder]), SelectionConfig(), 0)
    kept = table[table["reason"] == ""]
    assert len(kept) > 100 and {0, 1} <= set(kept["label"]) and not table["image_id"].duplicated().any()
    assert set(kept["view"]) <= {"frontal", "unknown"} and kept["path"].notna().all()
