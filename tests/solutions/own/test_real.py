"""Real collections read as a user's own; figures of runs on them stand in solutions/own/README.md."""

import pytest

from common.errors import InputError
from tests.solutions.own.folders import read_folder
from tests.solutions.own.real import ROOT, write_folder

pytestmark = pytest.mark.skipif(not (ROOT / "chestxdet").is_dir(), reason="needs CXR_REAL_DATA")


def test_nih_as_columns(tmp_path):
    listing = read_folder(write_folder("nih", tmp_path))
    assert listing.about["task"] == "multilabel" and len(listing.about["classes"]) == 14
    assert len(listing.table) == 1378 and listing.table["patient_id"].nunique() > 100


def test_chestxdet_as_boxes_and_polygons(tmp_path):
    boxes = read_folder(write_folder("boxes", tmp_path / "boxes"), boxes="fraction")
    polygons = read_folder(write_folder("polygons", tmp_path / "polygons"))
    assert (boxes.about["task"], polygons.about["task"]) == ("detection", "segmentation")
    assert len(boxes.table) == len(polygons.table) == 146
    assert len(boxes.tables["marks"]) == len(polygons.tables["marks"]) == 397
    assert boxes.about["classes"] == polygons.about["classes"]


def test_findings_as_one_label(tmp_path):
    folder = write_folder("findings", tmp_path)
    with pytest.raises(InputError, match="'Legionella' has 1 images to train on"):
        read_folder(folder)
    listing = read_folder(folder, on_rare="drop")
    assert listing.about["task"] == "multiclass" and len(listing.table) == 465 and len(listing.left_out) == 1


def test_hearts_as_masks():
    jsrt, settings = ROOT / "jsrt", {"mask_size": "any", "on_unlabelled": "skip"}
    listing = read_folder(jsrt / "images", labels=str(jsrt / "heart"), **settings)
    assert listing.about == {"task": "segmentation", "classes": ["heart"]}
    assert len(listing.table) == 208 and len(listing.left_out) == 39
