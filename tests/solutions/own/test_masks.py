"""Masks from files, polygons and run lengths, beside pycocotools; and a run on a folder of masks."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from common.data.coco import box_fields, to_coco
from common.errors import InputError
from common.listing import choose_images
from common.options import Options
from common.paths import read_json
from common.post.rle import ABSOLUTE, decode, encode, runs_of
from common.submit.table import read_table
from solutions.lung_segmentation import read_mask
from solutions.own import coco, data, masks
from solutions.own.config import DEMO, replace
from tests.solutions.contract import NET
from tests.solutions.own.folders import masked_sample, read_folder, write_coco, write_images, write_lines

TINY = f"""--store-size 64 --segmenter.encoder {NET} --segmenter.weights none --segmenter.size 64
    --segmenter.batch-size 4 --segmenter.epochs 2 --segmenter.precision fp32 --workers 0""".split()


@pytest.fixture
def blob():
    rng = np.random.default_rng(0)
    return cv2.GaussianBlur(rng.random((40, 30), np.float32), (0, 0), 4) > 0.5


def test_run_lengths_are_read_as_pycocotools_writes_them(blob):
    compressed = coco_masks.encode(np.asfortranarray(blob.astype(np.uint8)))
    text = {"size": [40, 30], "counts": compressed["counts"].decode()}
    assert np.array_equal(coco.draw(text, (40, 30), ""), blob)
    counts = coco.mask_fields(runs_of(blob), SimpleNamespace(height=40, width=30))
    assert np.array_equal(coco.draw(counts["segmentation"], (40, 30), ""), blob)
    y, x = np.nonzero(blob)
    assert counts["area"] == len(x) and counts["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
    with pytest.raises(InputError, match=r"x: a run-length mask of size \[40, 30\], but its image has \[30, 40\]"):
        coco.draw(text, (30, 40), "x")


def test_run_lengths_without_a_declared_size_fit_a_resized_image(blob):
    counts = coco.mask_fields(runs_of(blob), SimpleNamespace(height=40, width=30))["segmentation"]
    found = masks.read_mark((counts, None), "x", (80, 60))
    assert np.array_equal(found, np.kron(blob, np.ones((2, 2))) > 0)


def test_polygons_are_drawn_as_pycocotools_draws_them():
    polygon = [5.0, 4.0, 90.5, 10.0, 70.0, 80.25, 12.0, 60.0]
    theirs = coco_masks.decode(coco_masks.frPyObjects([polygon], 100, 100))[..., 0] > 0
    ours = coco.draw([polygon], (100, 100), "")
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97
    square = coco.draw([[2, 3, 6, 3, 6, 8, 2, 8]], (10, 10), "")
    assert abs(square.sum() - 20) <= 10 and square[3:8, 2:6].all()
    with pytest.raises(InputError, match="x: the polygon leaves its image of 50 × 50 pixels"):
        coco.draw([polygon], (50, 50), "x")


def test_outlines_are_scaled_to_a_resized_image():
    square = [[2, 3, 6, 3, 6, 8, 2, 8]]
    large = masks.read_mark((square, (10, 10)), "x", (40, 40))
    assert np.array_equal(masks.read_mark((square, None), "x", (10, 10)), large[2::4, 2::4])
    with pytest.raises(InputError, match="x: a mask of 10 × 10 pixels for an image of 40 × 20"):
        masks.read_mark((square, (10, 10)), "x", (20, 40))


def test_a_structure_that_few_images_show_is_among_the_few_of_a_plan(tmp_path):
    names = [f"i{k}.png" for k in range(100)]
    square = {"segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]], "bbox": [1, 1, 4, 4]}
    found = [*((k, 0, square) for k in range(100)), (50, 1, square), (51, 1, square)]
    write_coco(write_images(tmp_path, names) / "labels.json", names, found)
    listing = read_folder(tmp_path, task="segmentation", classes=("nodule", "mass"))
    assert listing.strata is None
    for seed in range(3):
        assert {"i50", "i51"} <= set(choose_images(listing, 10, 2, seed).table["image_id"])


def test_answers_open_in_pycocotools(blob, tmp_path):
    images = [SimpleNamespace(image_id="a", file="x/a.png", width=30, height=40)]
    table = SimpleNamespace(itertuples=lambda: images)
    found = [(0, 1, coco.mask_fields(runs_of(blob), images[0])), (0, 0, box_fields((1, 2, 5, 8)) | {"score": 0.5})]
    (tmp_path / "answer.json").write_text(json.dumps(to_coco(table, ["mass", "nodule"], found)))
    read = COCO(str(tmp_path / "answer.json"))
    (one,) = read.loadAnns(read.getAnnIds(catIds=read.getCatIds(["nodule"])))
    assert np.array_equal(read.annToMask(one) > 0, blob)
    (box,) = read.loadAnns(read.getAnnIds(catIds=read.getCatIds(["mass"])))
    assert box["bbox"] == [1, 2, 4, 6] and read.loadImgs(box["image_id"])[0]["file_name"] == "x/a.png"


def test_mask_files(tmp_path):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    for name, pixels in {"full": 255 * (grey > 90), "ones": grey > 90, "empty": grey * 0, "grey": grey}.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.uint8(pixels))
    full = masks.read_mark(str(tmp_path / "full.png"), "", (64, 64))
    assert np.array_equal(full, grey > 90) and np.array_equal(read_mask(tmp_path / "ones.png"), full)
    assert not read_mask(tmp_path / "empty.png", may_be_empty=True).any()
    with pytest.raises(InputError, match=r"grey\.png: has many grey levels"):
        read_mask(tmp_path / "grey.png")
    with pytest.raises(InputError, match=r"full\.png: 64 × 64 pixels, but its image has 32 × 128; --mask-size any"):
        masks.read_mark(str(tmp_path / "full.png"), "", (128, 32))
    assert masks.read_mark(str(tmp_path / "full.png"), "", (128, 128), "any").sum() == 4 * full.sum()


def test_folders_of_masks_are_structures_and_what_is_absent_is_unknown(tmp_path):
    write_images(tmp_path, [f"{name}.png" for name in "abc"])
    write_images(tmp_path, ["masks/heart/a.png", "masks/heart/b.png", "masks/lungs/b.png", "masks/lungs/c.png"])
    listing = read_folder(tmp_path)
    assert listing.about == {"task": "segmentation", "classes": ["heart", "lungs"]}
    np.testing.assert_array_equal(listing.table[["heart", "lungs"]], [[1, np.nan], [1, 1], [np.nan, 1]])
    assert sorted(listing.tables["marks"][["image_id", "class_id"]].itertuples(index=False, name=None)) == [
        *(("a", 0), ("b", 0), ("b", 1), ("c", 1))
    ]
    assert read_folder(tmp_path, labels="masks/lungs", on_unlabelled="skip").about["classes"] == ["lungs"]


def test_masks_beside_images_in_a_subfolder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, [f"all/train/{kind}/{name}.png" for kind in ("images", "masks") for name in "ab"])
    folder = Path("all")
    for labels in ("train/masks", "all/train/masks", str(tmp_path / "all/train/masks")):
        assert read_folder(folder, labels=labels).table["image_id"].tolist() == ["a", "b"]
        job = SimpleNamespace(config=replace(DEMO, labels=labels), options=Options(data=folder))
        job.facts = {"task": "segmentation", "classes": []}
        assert data.read_test(job).table["image_id"].tolist() == ["a", "b"]
    for labels in ("all", "all/train/.."):
        with pytest.raises(InputError, match="the images themselves lie in this folder"):
            read_folder(folder, labels=labels)


def test_images_with_masks_of_a_dropped_structure_alone_are_left_out(tmp_path):
    write_images(tmp_path, [f"{name}.png" for name in "abc"])
    write_images(tmp_path, ["masks/heart/a.png", "masks/heart/b.png", "masks/rare/c.png"])
    listing = read_folder(tmp_path, on_rare="drop")
    assert listing.about["classes"] == ["heart"] and listing.table["image_id"].tolist() == ["a", "b"]
    assert [row[0] for row in listing.left_out] == ["c"]


def test_a_structure_of_one_patient_has_no_score(tmp_path):
    stored, patients = np.full((4, 2, 128, 128), 2, np.uint8), np.array(list("ppqr"))  # 2: unknown
    stored[:, 0], stored[:, 0, 32:96, 32:96], stored[:2, 1] = 0, 1, 1
    np.save(tmp_path / "masks.npy", stored)
    images = SimpleNamespace(about={"classes": ["heart", "rare"]}, arrays={"masks": tmp_path / "masks.npy"})
    images.groups, images.patients = (lambda rows: patients[rows],) * 2
    table = pd.DataFrame({"image_id": list("abcd"), "row": range(4), "fold": [0, 0, 0, 1]})
    oof = SimpleNamespace(table=table, maps=255 * (stored == 1).astype(np.uint8))
    job = SimpleNamespace(config=replace(DEMO, task="segmentation"), images=images)
    choice = masks.choose(job, oof)
    assert choice.rule["rules"]["rare"] == masks.UNTUNED and choice.score == 1
    assert choice.figures["structures"] == {"heart": 1, "rare": None}
    assert "heart 1.0000, rare no score" in masks.describe(choice.figures)[0]
    stored[:, 0] = 2
    np.save(tmp_path / "masks.npy", stored)
    with pytest.raises(InputError, match="no structure has masks of two patients"):
        masks.choose(job, oof)


@pytest.mark.parametrize(
    ("outline", "said"),
    [
        ([[1, 1, 4, 4]], "annotation 0: a polygon of 2 points; it needs three"),
        ([[1, 1, 4, 4, 2]], "annotation 0: a polygon must be a list of x, y"),
        ([["a", "b", "c", "d", "e", "f"]], "annotation 0: a polygon must be a list of x, y"),
        ([[1, 1, None, 4, 2, 2]], "annotation 0: a polygon must be a list of x, y"),
        ({"size": [8, 8], "counts": None}, "annotation 0: segmentation is neither polygons nor a run-length mask"),
        ({"size": [8, 8], "counts": [1.5]}, "annotation 0: segmentation is neither polygons nor a run-length mask"),
        ({"size": [8, 8, 3], "counts": [1]}, "annotation 0: segmentation is neither polygons nor a run-length mask"),
        ("dots", "annotation 0: segmentation is neither polygons nor a run-length mask"),
    ],
)
def test_bad_outlines(outline, said, tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    write_coco(tmp_path / "labels.json", ["a.png", "b.png"], [(0, 0, {"segmentation": outline})])
    with pytest.raises(InputError, match=said):
        read_folder(tmp_path)


def test_a_file_that_is_not_coco(tmp_path):
    write_images(tmp_path, ["a.png"])
    for text in ("[]", '{"annotations": []}', '{"annotations": [], "images": [{}], "categories": []}'):
        write_lines(tmp_path / "labels.json", text)
        with pytest.raises(InputError, match=r"labels.json: not a COCO file"):
            read_folder(tmp_path)
    write_coco(tmp_path / "labels.json", ["a.png"], [])
    with pytest.raises(InputError, match=r"labels.json: no annotations in it"):
        read_folder(tmp_path)
    write_coco(tmp_path / "labels.json", ["a.png"], [(0, 0, {"bbox": [1, 1, 2, 2]})], size=(8.5, 8))
    with pytest.raises(InputError, match="image 10: width and height are not those of an image"):
        read_folder(tmp_path)


def test_a_run_on_folders_of_masks(command, refused, tmp_path):
    data = masked_sample(tmp_path / "masked")
    words = ["--n-folds", "2", "--folds", "0", "1", "--lungs", "mask"]
    result = command("run", "podium", "--data", data, "--out", "mine", *TINY, *words)
    assert result.status == 0, result
    score, rules = (read_json(tmp_path / "mine" / f"{name}.json") for name in ("score", "tuned"))
    assert set(score["structures"]) == set(rules["rules"]) == {"heart", "lungs"}
    rows = read_table(tmp_path / "mine" / "submission.csv")
    assert rows.columns.tolist() == ["image_id", "width", "height", "heart", "lungs"]
    answers = COCO(str(tmp_path / "mine" / "submission.coco.json"))
    for row, image in zip(rows.itertuples(), answers.loadImgs(answers.getImgIds()), strict=True):
        assert image["file_name"] == f"images/{row.image_id}.png"
        for each in answers.loadAnns(answers.getAnnIds(image["id"])):
            name = answers.loadCats(each["category_id"])[0]["name"]
            assert np.array_equal(answers.annToMask(each), decode(getattr(row, name), (256, 256), ABSOLUTE))
    assert command("infer", "mine", "--data", data, "--out", "again.csv", "--workers", "0").status == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "mine" / "submission.csv").read_bytes()
    # an outline that has changed, one of another size, and a structure that nothing shows
    path = next((data / "masks" / "heart").glob("*.png"))
    cv2.imwrite(str(path), 255 - cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    assert "was trained on other images, labels" in refused("prepare", "--data", data, "--out", "mine")
    cv2.imwrite(str(path), np.zeros((128, 128), np.uint8))
    assert "128 × 128 pixels, but its image has 256 × 256" in refused("prepare", "demo", "--data", data, *TINY)
    for path in (data / "masks" / "heart").glob("*.png"):
        cv2.imwrite(str(path), np.zeros((256, 256), np.uint8))
    assert "no mask shows anything of the structure 'heart'" in refused("prepare", "demo", "--data", data, *TINY)
    assert encode(np.zeros((4, 4), bool), ABSOLUTE) == "-1"
