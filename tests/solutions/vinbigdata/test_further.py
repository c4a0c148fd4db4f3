"""Further training images with boxes: in every fold's training rows, never held out, patients kept apart."""

import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest

from common.errors import InputError
from common.images import open_images, prepare_images
from common.plan import count_images, estimate
from common.post.boxes import BOX
from solutions.vinbigdata import config, data, pipeline
from solutions.vinbigdata.pipeline import SOLUTION
from tests.solutions.vinbigdata.test_data import ROWS, SIZES, SMALL, csv_row, write_csv, write_dicom


@pytest.fixture
def folder(tmp_path):
    for image_id, size in SIZES.items():
        write_dicom(tmp_path / "data" / ("test" if image_id[0] == "t" else "train") / f"{image_id}.dicom", *size)
    write_csv(tmp_path / "data" / "train.csv", [csv_row(*row) for row in ROWS])
    sample = "image_id,PredictionString\nt1,14 1 0 0 1 1\nt2,14 1 0 0 1 1\n"
    (tmp_path / "data" / "sample_submission.csv").write_text(sample)
    (tmp_path / "map.csv").write_text("image_id,patient_id\na1,p\nb2,q\nc3,p\nd4,q\n")
    return tmp_path / "data"


def write_coco(path, *boxes, names=("x.png", "y.png", "z.png", "a1.png"), kind="Cardiomegaly", drawn=True, **more):
    """COCO's file of 100 × 50 pixels an image, with boxes (image, x, y, width, height); its pictures have 50 × 50."""
    path.parent.mkdir(exist_ok=True)
    images = [{"id": k, "file_name": name, "width": 100, "height": 50} | more for k, name in enumerate(names)]
    images[0]["patient_id"] = "p"
    found = [{"image_id": k, "category_id": 1, "bbox": box} for k, *box in boxes]
    path.write_text(json.dumps({"images": images, "annotations": found, "categories": [{"id": 1, "name": kind}]}))
    for k, name in enumerate(names if drawn else ()):
        cv2.imwrite(str(path.parent / name), np.full((50, 50), 40 * k, np.uint8))
    return str(path)


def prepare(make_job, folder, *paths, out="run", **options):
    job = make_job(replace(SMALL, boxes=paths), folder, out, id_map=folder.parent / "map.csv", **options)
    return job, prepare_images(job, SOLUTION)


def test_the_rows_of_every_fold(folder, make_job, tmp_path):
    path = write_coco(tmp_path / "more" / "x.json", (0, 10, 5, 20, 10), (1, 0, 0, 100, 50), (3, 1, 1, 9, 9))
    job, images = prepare(make_job, folder, path)
    table = images.table.set_index("image_id")
    assert table.index.tolist() == [*SIZES, "x", "y"]  # z has no box, and a1 is the competition's
    assert table.loc[["x", "y"], "split"].tolist() == ["further"] * 2 and (table.loc[["x", "y"], "fold"] == -1).all()
    boxes = images.tables["boxes.parquet"].set_index("image_id")
    assert boxes.loc[["x", "y"], BOX].to_numpy().tolist() == [[5, 5, 15, 15], [0, 0, 50, 50]]  # in the picture's pixels
    assert boxes.loc["x", "class_id"] == 3 and boxes["row"].is_monotonic_increasing
    for network in pipeline.networks(job):
        rows, held_out = network.rows(job, network.fold)
        named, held = set(images.ids(rows)), set(images.ids(held_out))
        assert not {"x", "y"} & held and held < set(SIZES)
        if network.stage == "healthy":
            assert named == {"a1", "b2", "c3", "d4"} - held
        else:  # x is of the patient p, to whom a1 and c3 belong
            assert named == {"y", *({"b2"} if "a1" in held else {"a1", "x"})}
    assert open_images(job).key == images.key
    assert data.out_of_fold(job)[0]["image_id"].isin(SIZES).all()


def test_copies_of_held_out_images_are_left_out(folder, make_job, tmp_path):
    path = write_coco(tmp_path / "more" / "x.json", (1, 0, 0, 100, 50), (2, 0, 0, 9, 9))
    (tmp_path / "more" / "z.png").unlink()
    shutil.copyfile(folder / "train" / "b2.dicom", tmp_path / "more" / "z.dicom")
    job, images = prepare(make_job, folder, path)
    for network in pipeline.networks(job):
        named, held = (set(images.ids(rows)) for rows in network.rows(job, network.fold))
        assert network.stage == "healthy" or ({"y", "z"} & named == ({"y"} if "b2" in held else {"y", "z"}))


def test_an_unreadable_further_image_is_left_out_and_named(folder, make_job, tmp_path):
    path = write_coco(tmp_path / "more" / "x.json", (0, 10, 5, 20, 10), (1, 0, 0, 100, 50))
    (tmp_path / "more" / "y.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"y\.png"):
        prepare(make_job, folder, path, out="strict")
    job, images = prepare(make_job, folder, path, on_bad_image="skip")
    assert job.left_out == 1 and "y.png" in job.run.path("left_out.csv").read_text()
    assert images.table["image_id"].tolist() == [*SIZES, "x"]
    assert set(images.tables["boxes.parquet"]["image_id"]) == {"a1", "b2", "x"}


def test_a_plan_counts_further_images_of_more_than_it_decodes(folder, make_job, tmp_path, monkeypatch):
    monkeypatch.setattr("common.plan.FEW", 2)
    path = write_coco(tmp_path / "more" / "x.json", (1, 10, 5, 20, 10), (2, 0, 0, 100, 50))
    found, detector = [], replace(SMALL.detector, size=96, backbone="test_resnet", channels=64, batch_size=1)
    small = replace(
        SMALL, store_size=96, detector=detector, members=("flip", "aortic=flip")
    )  # none has an aortic enlargement
    for paths in ((), (path,)):
        job = make_job(replace(small, boxes=paths), folder)
        found.append(estimate(job, SOLUTION.read(job)))
    assert [plan.images["further"] for plan in found] == [0, 2] and [count_images(p.images) for p in found] == [6, 8]
    steps = [{stage.stage: stage.steps for stage in plan.stages} for plan in found]
    assert steps[0].keys() == steps[1].keys() and steps[0]["healthy"] == steps[1]["healthy"]
    assert steps[1]["flip"] - steps[0]["flip"] == 2 * detector.epochs, steps


def test_other_boxes_and_other_pixels_are_other_images(folder, make_job, tmp_path):
    path = write_coco(tmp_path / "more" / "x.json", (0, 10, 5, 20, 10))
    key = prepare(make_job, folder, path)[1].key
    assert prepare(make_job, folder, path, out="same")[1].key == key
    write_coco(tmp_path / "more" / "x.json", (0, 10, 5, 20, 11))
    assert prepare(make_job, folder, path, out="other")[1].key != key
    without = prepare(make_job, folder, out="none")
    assert without[1].key != key and "boxes" not in SOLUTION.made_with(without[0].config)


def test_names_of_chestx_det(folder, make_job, tmp_path):
    path = write_coco(tmp_path / "more" / "x.json", (1, 0, 25, 100, 25), kind="Fibrosis")
    images = prepare(make_job, folder, path)[1]
    assert images.tables["boxes.parquet"].iloc[-1][["class_id", *BOX]].tolist() == [13, 0, 25, 50, 50]


def test_every_name_of_chestx_det_has_a_class():
    theirs = "Atelectasis Calcification Cardiomegaly Consolidation Effusion Emphysema Fibrosis Fracture Mass Nodule"
    names = [*theirs.split(), "Diffuse Nodule", "Pleural Thickening", "Pneumothorax"]
    known = {name.casefold() for name in (*config.CLASSES, *config.CHESTX_DET)}
    assert {name.casefold() for name in names} <= known and set(config.CHESTX_DET.values()) <= set(config.CLASSES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "No finding"}, "annotation 0: the class 'No finding' is not one of Aortic enlargement"),
        ({"kind": "Rib"}, "annotation 0: the class 'Rib' is not one of"),
        ({"drawn": False}, "x.json, image 0: x.png needs a file in"),
        ({"width": None}, "x.json, image 0: x.png needs a file in .*, width and height"),
        ({"names": ("x|y.png",)}, "x.json, image 0: 'x.y' is not a usable id"),
    ],
)
def test_what_is_refused(change, said, folder, make_job, tmp_path):
    path = write_coco(tmp_path / "more" / "x.json", (0, 10, 5, 20, 10), **change)
    with pytest.raises(InputError, match=said):
        prepare(make_job, folder, path)


def test_boxes_of_other_runs(folder, make_job, tmp_path):
    path = write_coco(tmp_path / "more" / "x.json", (0, 10, 5, 20, 10))
    job, _ = prepare(make_job, folder, path)
    job.config = replace(job.config, boxes=())
    with pytest.raises(InputError, match="prepared with --boxes"):
        open_images(job)


def test_pandas_keeps_the_types(folder, make_job, tmp_path):
    plain = prepare(make_job, folder, out="plain")[1]
    path = write_coco(tmp_path / "more" / "x.json", (0, 10, 5, 20, 10))
    images = prepare(make_job, folder, path)[1]
    pd.testing.assert_series_equal(images.table.dtypes, plain.table.dtypes)
    name = "boxes.parquet"
    pd.testing.assert_series_equal(images.tables[name].dtypes, plain.tables[name].dtypes)
