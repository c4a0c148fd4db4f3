"""COCO files of boxes: read back as written, opened by pycocotools, and what is refused."""

import json

import pandas as pd
import pytest
from pycocotools.coco import COCO

from common.data.coco import read_boxes, read_coco, write_boxes
from common.errors import InputError
from common.post.boxes import BOX

CLASSES = {"Mass": 0, "Pleural effusion": 1}
FOUND = pd.DataFrame(
    [["b", 1, 0.25, 2.0, 4.0, 8.0, 16.0], ["a", 0, 1.0, 0.0, 0.0, 64.0, 32.0], ["b", 0, 0.5, 1.0, 1.0, 2.0, 3.0]],
    columns=["image_id", "class_id", "score", *BOX],
)


def write(path, annotation=(), images=(("x/a.png", 64, 32), ("b.dicom", 16, 16)), **more):
    images = [{"id": k, "file_name": name, "width": w, "height": h} | more for k, (name, w, h) in enumerate(images)]
    one = {"id": 7, "image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5} | dict(annotation)
    content = {"images": images, "categories": [{"id": 3, "name": "mass"}, {"id": 4, "name": "No finding"}]}
    path.write_text(json.dumps(content | {"annotations": [one]}))
    return path


def test_boxes_return_and_open_in_pycocotools(tmp_path):
    images = pd.DataFrame([["a", 64, 32], ["b", 16, 16], ["c", 9, 9]], columns=["image_id", "width", "height"])
    write_boxes(tmp_path / "boxes.json", FOUND, images, list(CLASSES))
    found, about = read_boxes(tmp_path / "boxes.json", CLASSES)
    pd.testing.assert_frame_equal(found, FOUND)
    assert about[["image_id", "width", "height"]].values.tolist() == images.to_numpy().tolist()
    opened = COCO(str(tmp_path / "boxes.json"))
    assert opened.loadAnns(opened.getAnnIds(2))[0]["bbox"] == [2, 4, 6, 12]
    assert opened.loadCats([2])[0]["name"] == "Pleural effusion"


def test_ids_classes_sizes_and_edges(tmp_path):
    found, images = read_boxes(write(tmp_path / "x.json", {"bbox": [-0.5, 1, 65, 31.4]}, patient_id="p"), CLASSES)
    assert found.to_numpy().tolist() == [["a", 0, 0.5, 0, 1, 64, 32]]  # clipped by less than a pixel
    assert images["image_id"].tolist() == ["a", "b"] and images["patient_id"].tolist() == ["p", "p"]
    path = write(tmp_path / "y.json", {"category_id": 4, "bbox": [0, 0, 0, 0], "score": 0.9})
    assert read_boxes(path, CLASSES | {"No finding": 14})[0].to_numpy().tolist() == [["a", 14, 0.9, 0, 0, 1, 1]]
    path = write(tmp_path / "z.json", images=(("a.png", None, None),), annotation={"bbox": [1, 2, 300, 400]})
    assert read_boxes(path, CLASSES)[0][BOX].to_numpy().tolist() == [[1, 2, 301, 402]]
    assert read_coco(path)[0]["width"].isna().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category_id": 4}, r"annotation 7: the class 'No finding' is not one of Mass, Pleural effusion"),
        ({"category_id": 5}, "annotation 7: unknown image_id or category_id"),
        ({"bbox": [1, 2, 3]}, "not a COCO file .ValueError"),
        ({"image_id": 9}, r"^[^ ]*x\.json, annotation 7: unknown image_id"),
        ({"bbox": [1, 2, 0, 4]}, "annotation 7: the box is not x, y, width, height in pixels, within its image"),
        ({"bbox": [1, 2, 70, 4]}, "annotation 7: the box is not"),
        ({"bbox": None}, "annotation 7: the box is not"),
        ({"score": 1.5}, "annotation 7: score 1.5 is not a number from 0 to 1"),
        ({"score": "nan"}, "annotation 7: score nan is not"),
    ],
)
def test_what_is_refused(change, said, tmp_path):
    with pytest.raises(InputError, match=said):
        read_boxes(write(tmp_path / "x.json", change), CLASSES)


def test_other_files(tmp_path):
    with pytest.raises(InputError, match="image 1: a second image a"):
        read_boxes(write(tmp_path / "x.json", images=(("a.png", 9, 9), ("a.jpg", 9, 9))), CLASSES)
    twice = json.loads(write(tmp_path / "x.json").read_text())
    for part in ("images", "categories"):  # as in merged files
        (tmp_path / "twice.json").write_text(json.dumps(twice | {part: [each | {"id": 3} for each in twice[part]]}))
        with pytest.raises(InputError, match=f"two of the {part} have the same id"):
            read_boxes(tmp_path / "twice.json", CLASSES)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(InputError, match=r"results\.json: not a COCO file \(no list of images\)$"):
        read_boxes(tmp_path / "results.json", CLASSES)
    (tmp_path / "none.json").write_text('{"images": [], "annotations": [], "categories": []}')
    assert [len(each) for each in read_boxes(tmp_path / "none.json", CLASSES)] == [0, 0]
