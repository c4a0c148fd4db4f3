"""From train.csv and DICOM files to boxes on which raters agree: numbers worked by hand, real tables, refusals."""

import dataclasses
import logging
import time

import numpy as np
import pandas as pd
import pytest

from benchmarks.tables import label_table, real_data
from common.data.folds import make_folds
from common.detection import boxes_by_row
from common.errors import InputError
from common.images import prepare_images
from common.listing import image_table
from common.post.boxes import BOX
from solutions.vinbigdata import data
from solutions.vinbigdata.config import CLASSES, DEMO, FusionConfig
from solutions.vinbigdata.data import FINDINGS, read_train, truth_of
from solutions.vinbigdata.pipeline import SOLUTION
from tests import dicoms
from tests.running import prevalence_deviation

HEADER = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
TRIPLE = ["image_id", "class_id", "rad_id"]
SMALL = dataclasses.replace(
    DEMO,
    detector=dataclasses.replace(DEMO.detector, size=96),
    healthy=dataclasses.replace(DEMO.healthy, size=32),
    store_size=96,
)
SIZES = {"a1": (64, 128), "b2": (100, 40), "c3": (50, 60), "d4": (80, 80), "t1": (96, 48), "t2": (33, 70)}
# a1: R1 and R2 overlap by 38/42 > 0.4, R3 stands apart; class 11 has the box of R1 and is not fused with class 3.
# b2: two of three raters see it. c3, d4: healthy.
ROWS = [
    ("a1", 3, "R1", 10, 20, 50, 60),
    ("a1", 3, "R2", 12, 20, 52, 60),
    ("a1", 3, "R3", 0, 100, 20, 128),
    ("a1", 11, "R1", 10, 20, 50, 60),
    ("b2", 0, "R1", 40, 10, 60, 20),
    ("b2", 0, "R3", 40, 10, 60, 20),
    ("b2", 14, "R2"),
    ("c3", 14, "R1"),
    ("c3", 14, "R2"),
    ("c3", 14, "R3"),
    ("d4", 14, "R4"),
    ("d4", 14, "R5"),
    ("d4", 14, "R6"),
]


def csv_row(image_id, class_id, rater, *box):
    return ",".join(map(str, [image_id, CLASSES[class_id], class_id, rater, *(box or [""] * 4)]))


def write_csv(path, rows):
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def write_dicom(path, width, height, inverted=False):
    """A raw 12-bit radiograph that brightens to the right."""
    pixels = np.tile(np.linspace(0, 4095, width).astype("<u2"), (height, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "MONOCHROME1" if inverted else "MONOCHROME2"
    dicoms.save(dicoms.dataset(4095 - pixels if inverted else pixels, 12, PhotometricInterpretation=kind), path)


@pytest.fixture
def folder(tmp_path):
    """The competition in its own layout: four labelled images of four sizes, two to predict."""
    for image_id, size in SIZES.items():
        part = "test" if image_id[0] == "t" else "train"
        write_dicom(tmp_path / "data" / part / f"{image_id}.dicom", *size, inverted=image_id in "b2 d4")
    write_csv(tmp_path / "data" / "train.csv", [csv_row(*row) for row in ROWS])
    sample = "image_id,PredictionString\nt1,14 1 0 0 1 1\nt2,14 1 0 0 1 1\n"
    (tmp_path / "data" / "sample_submission.csv").write_text(sample)
    return tmp_path / "data"


@pytest.fixture
def make(folder, make_job):
    """`make(config, **options)`: what a verb gets."""
    return lambda config=SMALL, out="run", **options: make_job(config, options.pop("data", folder), out, **options)


def prepare(job):
    return prepare_images(job, SOLUTION)


def refusal(job):
    with pytest.raises(InputError) as caught:
        prepare(job)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- train.csv -----------------------------------------------------------------------------------------------------


def test_read_train(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [csv_row(*row) for row in ROWS]
    table = read_train(write_csv(tmp_path / "train.csv", [*rows, rows[1], rows[7]]))
    assert table.columns.tolist() == ["image_id", "class_id", "rad_id", *BOX] and table.index.tolist() == [*range(13)]
    assert table["class_id"].tolist() == [row[1] for row in ROWS] and table["class_id"].dtype == "int64"
    assert table.loc[1, BOX].tolist() == [12, 20, 52, 60] and table.loc[table["class_id"] == 14, BOX].isna().all(
        axis=None
    )
    assert "2 rows repeat another one, the first is row 15" in caplog.text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("../x,No finding,14,R1,,,,", "'../x' is not a usable id"),
        ("x,No finding,15,R1,,,,", "(x): class_id '15' is not a whole number from 0 to 14"),
        ("x,Cardiomegaly,3.0,R1,1,2,3,4", "class_id '3.0' is not a whole"),
        ("x,Cardiomegaly,4,R1,1,2,3,4", "class_id 4 does not belong to class_name 'Cardiomegaly'"),
        ("x,Cardiomegaly,3,,1,2,3,4", "no rad_id"),
        ("x,No finding,14,R1,0,0,1,1", "class 14 (No finding) with the box 0 0 1 1; it must be blank"),
        ("x,Cardiomegaly,3,R1,,,,", "a finding needs x_min, y_min, x_max and y_max"),
        ("x,Cardiomegaly,3,R1,1,2,,4", "y_max, not 1 2 (blank) 4"),
        ("x,Cardiomegaly,3,R1,1,2,nan,4", "the box 1 2 nan 4 is not four finite numbers"),
        ("x,Cardiomegaly,3,R1,1,2,three,4", "is not four finite numbers"),
        ("x,Cardiomegaly,3,R1,3,2,1,4", "the box 3 2 1 4 must have x_min < x_max"),
        ("x,Cardiomegaly,3,R1,1,4,3,2", "must have x_min < x_max and y_min < y_max"),
        ("x,Cardiomegaly,3,R1,-0.5,2,3,4", "the box -0.5 2 3 4 starts outside the image"),
        ("x,Cardiomegaly,3,R1,1,2,3", "7 values where the header has 8 columns"),
    ],
)
def test_a_row_that_cannot_be_used(row, said, tmp_path):
    path = write_csv(tmp_path / "train.csv", [csv_row("w", 14, "R1"), csv_row("w", 14, "R2"), row, "!,,,,,,,"])
    if said.startswith("7"):
        path.write_text(path.read_text().replace("!,,,,,,,\n", ""))
    else:  # the last row's id is unusable too: a fault is named where it comes first
        path.write_text(path.read_text().replace("!,,,", "y,No finding,14,R1"))
    with pytest.raises(InputError) as caught:
        read_train(path)
    assert str(caught.value).startswith(f"{path}, row 4") and said in str(caught.value)


def test_tables_that_cannot_be_used(tmp_path):
    path = write_csv(tmp_path / "train.csv", [csv_row("a", 3, "R1", 1, 2, 3, 4), csv_row("a", 14, "R1")])
    with pytest.raises(InputError, match=r"row 3 \(a\): R1 marks a finding and No finding in this image"):
        read_train(path)
    path = write_csv(path, [])
    with pytest.raises(InputError, match="no rows under its header"):
        read_train(path)
    path.write_text(HEADER.replace("rad_id", "reader") + "\n")
    with pytest.raises(InputError, match="row 1: the header must have image_id,class_name,class_id,rad_id"):
        read_train(path)


# ---- prepare -------------------------------------------------------------------------------------------------------


def test_what_prepare_leaves(make):
    images = prepare(make())
    table = images.table.set_index("image_id")
    assert table.index.tolist() == [*SIZES] and table["row"].tolist() == [*range(6)]
    assert dict(zip(table.index, zip(table["width"], table["height"], strict=True), strict=True)) == SIZES
    assert table["split"].tolist() == ["train"] * 4 + ["test"] * 2 and table["ok"].all()
    assert sorted(table["fold"]) == [-1, -1, 0, 0, 1, 1] and (table.loc[["t1", "t2"], "fold"] == -1).all()
    assert table["abnormal"].tolist() == [1, 1, 0, 0, 0, 0] and table["raters"].tolist() == [3, 3, 3, 3, 0, 0]
    marked = [name for name in FINDINGS if table[name].any()]
    assert marked == ["c0", "c3", "c11"] and table.loc["a1", marked].tolist() == [0, 1, 1]
    assert (table["patient_id"] == "").all()

    boxes = images.tables["boxes.parquet"].set_index(["image_id", "row", "class_id", "votes"])
    assert boxes.index.tolist() == [("a1", 0, 3, 2), ("a1", 0, 3, 1), ("a1", 0, 11, 1), ("b2", 1, 0, 2)]
    expected = [[11, 20, 51, 60], [0, 100, 20, 128], [10, 20, 50, 60], [40, 10, 60, 20]]
    np.testing.assert_allclose(boxes[BOX].to_numpy(), expected, rtol=1e-6)

    assert images.rows().tolist() == [0, 1, 2, 3] and images.rows("test").tolist() == [4, 5]
    assert sorted([*images.rows(folds=[0]), *images.rows(folds=[1])]) == [0, 1, 2, 3]
    sample = make().run.path("sample_submission.csv").read_text()
    assert sample == "image_id,PredictionString\nt1,14 1 0 0 1 1\nt2,14 1 0 0 1 1\n"


def test_boxes_in_the_stored_square(make):
    images = prepare(make())
    boxes, labels = boxes_by_row(images)[0]  # 64 × 128 pixels in 96 × 96: x by 1.5, y by 0.75
    assert boxes.dtype == np.float32 and labels.dtype == np.int64 and labels.tolist() == [3, 3, 11]
    np.testing.assert_allclose(boxes, [[16.5, 15, 76.5, 45], [0, 75, 30, 96], [15, 15, 75, 45]], rtol=1e-6)
    boxes, labels = boxes_by_row(images)[1]  # 100 × 40: x by 0.96, y by 2.4
    np.testing.assert_allclose(boxes, [[38.4, 24, 57.6, 48]], rtol=1e-6)
    assert boxes_by_row(images).keys() == {0, 1}
    columns = images.store.images.mean(axis=1)  # MONOCHROME1 or not, every image brightens to the right
    assert images.store.images.shape == (6, 96, 96)
    assert (np.diff(columns) >= 0).all() and (columns[:, -1] > columns[:, 0]).all()


def test_truth_of_the_metric(make):
    images = prepare(make())
    truth = truth_of(images, [3, 1, 0])
    assert truth.columns.tolist() == ["image_id", "class_id", *BOX] and truth["class_id"].dtype == "int64"
    pairs = [*zip(truth["image_id"], truth["class_id"], strict=True)]
    assert pairs == [("a1", 3), ("a1", 3), ("a1", 11), ("b2", 0), ("d4", 14)]
    assert truth[BOX].to_numpy()[-2:].tolist() == [[40, 10, 60, 20], [0, 0, 1, 1]]
    assert not len(truth_of(images, []))


@pytest.mark.parametrize(
    ("raters", "iou", "kept", "votes"),
    [("wbf", 0.95, [12, 20, 52, 60], 1), ("nms", 0.4, [10, 20, 50, 60], 2), ("none", 0.4, [12, 20, 52, 60], 1)],
)
def test_other_fusions_of_raters(raters, iou, kept, votes, make):
    config = dataclasses.replace(SMALL, fusion=FusionConfig(raters=raters, raters_iou=iou))
    boxes = prepare(make(config)).tables["boxes.parquet"]
    found = boxes[(boxes[BOX] == kept).all(axis=1) & (boxes["class_id"] == 3)]
    assert found["votes"].tolist() == [votes] and len(boxes) == {"wbf": 5, "nms": 4, "none": 6}[raters]


def test_the_order_of_rows_does_not_matter(make, folder):
    first = prepare(make())
    path = folder / "train.csv"
    lines = path.read_text().splitlines()[1:]
    write_csv(path, np.random.default_rng(1).permutation(lines))
    again = prepare(make(out="again"))
    pd.testing.assert_frame_equal(first.table, again.table)
    pd.testing.assert_frame_equal(first.tables["boxes.parquet"], again.tables["boxes.parquet"])
    assert first.key == again.key


def test_a_box_beyond_its_image_is_cut_or_refused(make, folder, caplog):
    caplog.set_level(logging.INFO)
    path = folder / "train.csv"
    rows = [csv_row(*row) for row in ROWS]
    write_csv(path, [*rows, csv_row("b2", 1, "R1", 90, 30, 101.5, 44)])
    boxes = prepare(make()).tables["boxes.parquet"]
    assert boxes.loc[boxes["class_id"] == 1, BOX].to_numpy().tolist() == [[90, 30, 100, 40]]
    assert "1 boxes were clipped to their image, the first: " in caplog.text
    assert f"{path}, row 15 (b2), 100 × 40" in caplog.text
    write_csv(path, [*rows, csv_row("b2", 1, "R1", 90, 40, 95, 44)])
    assert f"{path}, row 15 (b2): the box lies outside its image of 100 × 40" in refusal(make(out="other"))


def test_files_that_do_not_fit_the_tables(make, folder, caplog):
    caplog.set_level(logging.INFO)
    write_dicom(folder / "train" / "e5.dicom", 40, 40)
    assert "e5.dicom: one of 1 images without a row in train.csv" in refusal(make())
    images = prepare(make(on_unlabelled="skip"))
    assert len(images.table) == 6 and "left out 1 images without a row" in caplog.text
    sample = folder / "sample_submission.csv"
    sample.write_text(sample.read_text() + "c3,14 1 0 0 1 1\n")
    assert "train.csv: 1 images are in the test set too, such as c3" in refusal(make(out="r2"))
    sample.write_text(sample.read_text().replace("c3", "t9"))
    assert "1 test images have no file, the first is t9" in refusal(make(out="r2"))
    (folder / "train" / "d4.dicom").unlink()
    assert "train.csv: 1 images have no file, the first is d4" in refusal(make(out="r2"))
    write_csv(folder / "train.csv", [csv_row("a1", 14, "R1"), csv_row("e5", 14, "R1")])
    sample.write_text("image_id,PredictionString\nt1,14 1 0 0 1 1\n")
    assert "train.csv: no image has a finding" in refusal(make(out="r2", on_unlabelled="skip"))


def test_other_images_to_predict(make, tmp_path, folder):
    write_dicom(tmp_path / "more" / "n1.dicom", 30, 20)
    (tmp_path / "more" / "n2.dicom").write_bytes(b"no image")
    assert "n2.dicom" in refusal(make(test=tmp_path / "more"))
    images = prepare(make(test=tmp_path / "more", on_bad_image="placeholder"))
    table = images.table.set_index("image_id")
    assert table.index[table["split"] == "test"].tolist() == ["n1", "n2"]
    assert table["ok"].tolist() == [True] * 5 + [False]
    (tmp_path / "ids.csv").write_text("image\nd4.dicom\n")
    assert "--test: 1 of the images are training images, such as d4" in refusal(make(test=tmp_path / "ids.csv"))
    (folder / "train" / "d4.dicom").write_bytes(b"no image")
    assert "1 of 6 images cannot be used" in refusal(make(on_bad_image="placeholder"))


def test_unreadable_training_images_are_left_out(make, folder):
    whole = prepare(make(out="whole", on_bad_image="skip"))
    first = whole.tables["boxes.parquet"]["image_id"].iloc[0]
    (folder / "train" / f"{first}.dicom").write_bytes(b"no image")
    images = prepare(job := make(on_bad_image="skip"))
    boxes = images.tables["boxes.parquet"]
    assert job.left_out == 1 and first not in set(images.table["image_id"]) | set(boxes["image_id"])
    expected = whole.tables["boxes.parquet"].query("image_id != @first").reset_index(drop=True)
    pd.testing.assert_frame_equal(boxes, expected)  # the rows are still those of the store
    assert boxes_by_row(images).keys() == set(boxes["row"])


def test_prepared_with_other_settings(make):
    prepare(make())
    aware = dataclasses.replace(SMALL, rater_aware=True)
    others = {"--rater-aware False": aware}
    for name, value, old in (("raters", "nms", "raters wbf"), ("raters_iou", 0.5, "raters-iou 0.4")):
        fusion = dataclasses.replace(SMALL.fusion, **{name: value})
        others[f"--fusion.{old}"] = dataclasses.replace(SMALL, fusion=fusion)
    for option, config in others.items():
        with pytest.raises(InputError, match=f"prepared with {option}, not .*; run `prepare` with the new value"):
            _ = make(config).images
    training = make().run.path("fold0", "flip", "last.ckpt")
    training.parent.mkdir(parents=True)
    training.touch()
    prepare(make())  # as it was: trainings may stay
    assert "was trained on other images" in refusal(make(config))


# ---- folds ---------------------------------------------------------------------------------------------------------


def test_folds_by_patient_and_by_table(make, tmp_path):
    (tmp_path / "map.csv").write_text("image_id,patient_id\na1,p\nb2,p\nc3,p\nd4,q\n")
    table = prepare(make(id_map=tmp_path / "map.csv")).table.set_index("image_id")
    assert table["patient_id"].tolist() == ["p", "p", "p", "q", "", ""]
    assert table.loc[["a1", "b2", "c3"], "fold"].nunique() == 1 and table.loc["d4", "fold"] != table.loc["a1", "fold"]
    (tmp_path / "folds.csv").write_text("image_id,fold\nd4,0\nc3,0\nb2,0\na1,1\n")
    table = prepare(make(out="b", fold_table=tmp_path / "folds.csv")).table
    assert table["fold"].tolist() == [1, 0, 0, 0, -1, -1]
    (tmp_path / "folds.csv").write_text("image_id,fold\nd4,0\nc3,0\nb2,0\na1,2\n")
    assert "has the folds 0, 2" in refusal(make(out="c", fold_table=tmp_path / "folds.csv"))


def folds_of(labels, rater_aware, n_folds=5):
    """Image table and folds of a raters' table, without pixels."""
    ids = sorted(labels["image_id"].unique())
    table = data.make_image_table(labels, image_table(ids, []))
    return table, make_folds(data.make_strata(table, labels, rater_aware), n_folds)


def readers(labels):
    return pd.crosstab(labels["image_id"], labels["rad_id"]).to_numpy().clip(max=1)


def test_rater_aware_folds():
    rng = np.random.default_rng(0)
    reader = np.where(np.arange(400) < 20, "R1", np.where(rng.random(400) < 0.3, "R2", "R3"))
    ill = rng.random(400) < 0.7
    marks = (rng.random((400, 6)) < 0.1) & ill[:, None]
    marks[ill & ~marks.any(axis=1), 0] = True
    rows = [(n, number) for n, classes in enumerate(marks) for number in np.flatnonzero(classes)]
    rows += [(n, 14) for n in np.flatnonzero(~marks.any(axis=1))]
    labels = pd.DataFrame([(f"i{n:03}", number, reader[n]) for n, number in rows], columns=TRIPLE)
    table, plain = folds_of(labels, False)
    _, aware = folds_of(labels, True)
    assert prevalence_deviation(readers(labels), aware) < 0.05 < prevalence_deviation(readers(labels), plain)
    for folds in (plain, aware):  # No finding counts as a class, although its rows have a rater
        assert prevalence_deviation(table[FINDINGS].to_numpy(), folds) < 0.3
        assert np.ptp(np.bincount(folds, 1 - table["abnormal"])) <= 1


# ---- the real tables -----------------------------------------------------------------------------------------------


def test_the_whole_real_table():
    path = label_table("vinbigdata-train.csv.gz")
    if path is None:
        pytest.skip("torchxrayvision, which carries the annotations, is not installed")
    labels = read_train(path)
    assert len(labels) == 67_914 and (labels["class_id"] == 14).sum() == 31_818
    table, folds = folds_of(labels, False)
    assert len(table) == 15_000 and table["abnormal"].sum() == 4_394 and (table["raters"] == 3).all()
    healthy = labels["class_id"] == 14  # where one of the three raters finds nothing, no one finds anything
    assert healthy.groupby(labels["image_id"]).nunique().max() == 1
    trio = labels.groupby("image_id")["rad_id"].agg(lambda raters: {*raters} == {"R8", "R9", "R10"})
    assert trio.sum() == 5_501 and trio[table["abnormal"].to_numpy() == 1].sum() == 4_146
    assert np.bincount(folds).tolist() == [3_000] * 5
    assert prevalence_deviation(table[FINDINGS].to_numpy(), folds) < 0.05
    _, aware = folds_of(labels, True)
    assert prevalence_deviation(readers(labels), aware) < 0.01 < prevalence_deviation(readers(labels), folds)

    table["row"], table["width"], table["height"] = range(15_000), 3_200, 3_400  # the largest box ends at 3131, 3384
    began = time.process_time()
    boxes = data.fuse_marks(labels[~healthy], table, FusionConfig(), path)
    assert time.process_time() - began < 40  # some 2 s: a guard against quadratic work, on slow machines too
    assert boxes["image_id"].nunique() == 4_394 and boxes["votes"].max() == 3 and boxes["row"].is_monotonic_increasing
    apart = data.fuse_marks(labels[~healthy], table, FusionConfig(raters="none"), path)
    assert len(apart) == 36_096 and apart[BOX].sum().equals(labels[BOX].sum())
    by_class = ["image_id", "class_id"]
    wide, all_ = boxes.groupby(by_class)[BOX], apart.groupby(by_class)[BOX]
    assert (wide.min() >= all_.min() - 1e-3).all(axis=None) and (wide.max() <= all_.max() + 1e-3).all(axis=None)


def test_the_real_radiographs(tmp_path, make):
    folder = real_data("vinbigdata")
    if folder is None:
        pytest.skip("no real radiographs ($CXR_REAL_DATA/vinbigdata)")
    images = prepare(make(data=folder, out="real"))
    assert len(images.rows()) == 281 and len(images.rows("test")) == 78
    table, boxes = images.table, images.tables["boxes.parquet"]
    assert table["abnormal"].sum() == 164 and set(table.loc[table["split"] == "train", "raters"]) == {1}
    by_row = boxes_by_row(images)
    square = np.vstack([by_row[row][0] for row in images.rows() if row in by_row])
    assert len(square) == len(boxes) and square.min() >= 0 and square.max() <= 96
    back = square * np.tile(table.loc[boxes["row"], ["width", "height"]].to_numpy() / 96, 2)
    np.testing.assert_allclose(back, boxes[BOX].to_numpy(), rtol=1e-5, atol=1e-3)
    truth = truth_of(images, images.rows())
    assert truth["image_id"].nunique() == 281 and (truth["class_id"] == 14).sum() == 117
