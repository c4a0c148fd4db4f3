"""What a user may get wrong: named in one line, never a traceback; what is left is done, and the status says so."""

import os
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import zeros

from common.paths import read_json
from common.submit.table import read_table
from solutions.lung_segmentation.pairs import fit_mask

RUN = ["run", "demo", "--out", "run"]
PREPARE = ["prepare", "demo", "--out", "run"]


@pytest.fixture
def spoilt(refused, data, tmp_path, tiny):
    """`spoilt(*words)`: a run on the spoilt data is refused before it made anything; returns the line."""

    def run(*words):
        line = refused(*RUN, "--data", data, *tiny, *words)
        assert not (tmp_path / "run").exists() and not list(tmp_path.glob("*.partial"))
        return line

    return run


@pytest.fixture
def left_out(command, data, tmp_path, tiny):
    """`left_out(*words)`: `prepare` goes on without some of the data; returns left_out.csv and the image table."""

    def run(*words):
        result = command(*PREPARE, "--data", data, *tiny, *words)
        bad = read_table(tmp_path / "run" / "left_out.csv", ["image_id", "file", "reason"])
        assert result.status == 4 and result.errors == [
            f"done, but {len(bad)} of the inputs could not be used; they are named above"
        ], result
        for row in bad.itertuples():
            assert f"left out {row.image_id}: {row.reason} ({row.file})" in result.out
        bad.attrs["out"] = result.out
        return bad.set_index("image_id"), pd.read_parquet(tmp_path / "run" / "images.parquet")

    return run


def image_of(data, image_id):
    return next(data.rglob(f"CXR_png/{image_id}.png"))


def replace(path, content):
    """Other bytes, or another image, under the name of a file that may be linked elsewhere."""
    path.unlink()
    path.write_bytes(content) if isinstance(content, bytes) else Image.fromarray(content).save(path)


def a_photo(shape=(300, 400)):
    hue = np.tile(np.linspace(0, 179, shape[1]).astype(np.uint8), (shape[0], 1))
    return cv2.cvtColor(np.dstack([hue, np.full_like(hue, 200), np.full_like(hue, 180)]), cv2.COLOR_HSV2RGB)


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run demo --out run --network.loss l1", "invalid choice 'l1'"),
        ("run demo --out run --network.size 100", "must be a multiple of 32"),
        ("run demo --out run --network.size 512", "store_size 128 is under the 512 px"),
        ("run demo --out run --datasets Chest", "invalid choice 'Chest'"),
        ("run demo --out run --structures heart", "invalid choice 'heart'"),
        ("run demo --out run --decision.pixel 0", "give probabilities above 0, up to 1"),
        ("run demo --out run --decision.pixel 2", "give probabilities above 0, up to 1"),
        ("run demo --out run --decision.regions -1", "give numbers from 0"),
        ("run demo --out run --validation 0", "leave images to train on"),
        ("run demo --out run --validation 0.8", "leave images to train on"),
        ("run demo --out run --data nowhere", "nowhere: no such folder"),
        ("run demo --out run --data empty", "empty: no radiographs of Montgomery"),
        ("run demo --out run", "kaggle: no such folder"),
        ("run demo --out run --data data --datasets JSRT", "no images of JSRT, only of Montgomery, Shenzhen"),
        ("run demo --out run --data data --structures lungs_heart", "no image has a mask of heart"),
        ("run demo --out run --data data --n-folds 20 --folds 0", "20 folds need as many groups, there are 12"),
    ],
)
def test_words(words, said, data, tmp_path, refused, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("solutions.lung_segmentation.data.KAGGLE_INPUT", tmp_path / "kaggle")
    before = sorted(path for path in tmp_path.rglob("*") if "stores" not in path.parts)
    assert said in refused(*words.split())
    assert sorted(path for path in tmp_path.rglob("*") if "stores" not in path.parts) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--network.batch-size 400", "batch_size 400"),
        ("--network.weights imagenet", "plain takes no encoder"),
        ("--network.encoder resnet18", "plain takes no encoder"),
        ("--network.decoder 8", "a width for every level"),
        ("--network.decoder 0 8", "give channels for every stage"),
        ("--network.decoder 4 8 8 8 8 8 8 8", "this network needs multiples of 128"),
        ("--network.architecture vnet --network.encoder resnet18", "architecture 'vnet'"),
        ("--network.architecture unet --network.encoder resnet_5000", "resnet_5000"),
        ("--network.metric auc", "metric 'auc': validation gives loss, dice, iou, train_dice"),
        ("--network.weights nowhere.safetensors", "nowhere.safetensors: no such file"),
        ("--network.weights other.safetensors", "other.safetensors: none of its 1 tensors fits"),
        ("--network.weights broken.safetensors", "broken.safetensors: not a file of tensors"),
        ("--network.lr 1e30 --network.epochs 4", "lower the learning rate"),
    ],
)
def test_networks_that_cannot_be_trained(words, said, sample, tmp_path, refused, tiny, command):
    save_file({"fc.weight": zeros(3, 3)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    assert command(*PREPARE, "--data", sample, *tiny).status == 0
    assert said in refused("train", "demo", "--out", "run", *tiny, *words.split())


# ---- masks ---------------------------------------------------------------------------------------------------------


def test_masks_that_cannot_be_used_are_left_out_and_the_others_trained_on(data, left_out, tmp_path, command, tiny):
    masks = sorted((data / "mask" / "mask").iterdir())
    whole = masks[0].read_bytes()
    shape = np.asarray(Image.open(masks[1])).shape
    replace(masks[0], np.zeros(np.asarray(Image.open(masks[0])).shape, np.uint8))
    replace(masks[1], np.full(shape, 255, np.uint8))
    replace(masks[2], whole[: len(whole) // 2])
    replace(masks[3], np.asarray(Image.open(masks[3]))[:-9])
    left = sorted((data / "Montgomery").rglob("leftMask/*"))
    replace(left[0], b"")
    left[1].unlink()
    bad, table = left_out()
    names = [path.name.removesuffix("_mask.png") for path in masks[:4]]
    height, width = np.asarray(Image.open(image_of(data, names[3]))).shape
    for name, said in zip(
        names,
        (
            "an empty mask",
            "covers the whole image",
            "the mask cannot be read",
            f"a mask of {width} × {height - 9} pixels for an image of {width} × {height}",
        ),
        strict=True,
    ):
        assert said in bad.loc[name, "reason"] and bad.loc[name, "file"].endswith(f"{name}_mask.png")
    assert "the mask cannot be read" in bad.loc[left[0].stem, "reason"] and "leftMask" in bad.loc[left[0].stem, "file"]
    assert bad.loc[left[1].stem, "reason"] == "has masks of right, but needs lungs"
    train = table[table["split"] == "train"]
    assert len(bad) == 6 and len(train) == 6 and not set(bad.index) & set(table["image_id"])
    result = command(*RUN, "--data", data, *tiny, "--network.epochs", "1", "--network.batch-size", "1")
    assert result.status == 4 and "6 of the inputs could not be used" in result.errors[-1]
    assert read_json(tmp_path / "run" / "score.json")["images"] == 6
    assert len(read_table(tmp_path / "run" / "submission.csv")) == 2
    again = command("run", "--data", data, "--out", "run")
    assert again.status == 4 and "epoch" not in again.out


def test_a_mask_of_nearly_the_size_is_resized_and_that_is_said(data, command, tmp_path, tiny):
    path = sorted((data / "mask" / "mask").iterdir())[0]
    true = np.asarray(Image.open(path))
    replace(path, np.asarray(Image.fromarray(true).resize((true.shape[1] // 2, (true.shape[0] + 1) // 2))))
    result = command(*PREPARE, "--data", data, *tiny)
    assert result.status == 0 and "masks of 1 images differ in size from their image and were resized" in result.out
    table = pd.read_parquet(tmp_path / "run" / "images.parquet").set_index("image_id")
    assert table.loc[path.stem.removesuffix("_mask"), "area"] == pytest.approx((true > 0).mean(), abs=0.005)
    fitted, _ = fit_mask(np.asarray(Image.open(path)) > 127, true.shape, path)
    assert 2 * (fitted & (true > 0)).sum() / (fitted.sum() + (true > 0).sum()) > 0.98


def test_images_without_a_mask_are_predicted(data, command, tmp_path, tiny):
    path = sorted((data / "mask" / "mask").iterdir())[0]
    path.unlink()
    result = command(*PREPARE, "--data", data, *tiny)
    assert result.status == 0 and "3 images without a mask are not trained on, but predicted" in result.out
    table = pd.read_parquet(tmp_path / "run" / "images.parquet").set_index("image_id")
    assert table.loc[path.name.removesuffix("_mask.png"), "split"] == "test"


def test_masks_alone_and_links_that_lead_nowhere(data, left_out):
    films = sorted((data / "ChinaSet_AllFiles").rglob("*.png"))
    masks = {path.name.removesuffix("_mask.png"): path for path in (data / "mask" / "mask").iterdir()}
    one, two, three = [path for path in films if path.stem in masks][:3]
    one.unlink()
    two.unlink()
    two.symlink_to("nowhere.png")
    masks[three.stem].unlink()
    masks[three.stem].symlink_to("nowhere.png")
    bad, table = left_out()
    assert one.stem not in bad.index and one.stem not in set(table["image_id"])
    assert "no such file" in bad.loc[two.stem, "reason"] and "the mask cannot be read" in bad.loc[three.stem, "reason"]


def test_no_pair_is_left(data, spoilt):
    for path in data.rglob("*.png"):
        if "ask" in path.parent.name:
            replace(path, b"no mask")
    assert "no pair of image and mask can be used; " in spoilt()


def test_no_masks_at_all(data, spoilt):
    shutil.rmtree(data / "mask")
    shutil.rmtree(data / "Montgomery" / "MontgomerySet" / "ManualMask")
    assert "no image has a mask of lungs" in spoilt()


# ---- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_that_cannot_be_used_are_left_out(split, data, left_out, tmp_path):
    masks = {path.name.removesuffix("_mask.png") for path in (data / "mask" / "mask").iterdir()}
    films = [
        path
        for path in sorted((data / "ChinaSet_AllFiles").rglob("*.png"))
        if (path.stem in masks) == (split == "train")
    ]
    whole = films[0].read_bytes()
    replace(films[0], a_photo())
    if split == "train":
        replace(films[1], whole[: len(whole) // 2])
        replace(films[2], b"")
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 255
        replace(films[3], bytes(damaged))
        replace(films[4], cv2.circle(np.zeros((300, 200), np.uint8), (90, 100), 40, 1, -1))
    else:
        cv2.imwrite(str(tmp_path / "x.jpg"), np.tile(np.arange(200, dtype=np.uint8), (300, 1)))
        jpeg = (tmp_path / "x.jpg").read_bytes()
        films[1].unlink()
        films[1].with_suffix(".jpg").write_bytes(jpeg[: len(jpeg) // 2])
    bad, table = left_out()
    said = {films[0].stem: "a colour picture, not a radiograph"}
    said |= {films[1].stem: "cut short" if split == "train" else "Premature end of JPEG file"}
    said |= {films[2].stem: "empty file", films[3].stem: "damaged"} if split == "train" else {}
    said |= {films[4].stem: "a mask, not a radiograph"} if split == "train" else {}
    assert set(bad.index) == set(said)
    for name, reason in said.items():
        assert reason in bad.loc[name, "reason"]
    assert (table["split"] == split).sum() == {"train": 7, "test": 0}[split]


def test_placeholders_keep_the_rows_of_bad_test_images(data, command, tmp_path, tiny):
    masks = {path.name.removesuffix("_mask.png") for path in (data / "mask" / "mask").iterdir()}
    films = [path for path in sorted((data / "ChinaSet_AllFiles").rglob("*.png")) if path.stem not in masks]
    whole = films[0].read_bytes()
    height, width = np.asarray(Image.open(films[0])).shape
    replace(films[0], whole[: len(whole) // 2])
    replace(films[1], a_photo())
    words = [*RUN, "--data", data, *tiny, "--network.epochs", "1"]
    assert command(*words, "--on-bad-image", "placeholder").status == 4
    rows = read_table(tmp_path / "run" / "submission.csv").set_index("image_id")
    assert rows["rle"].tolist() == ["-1", "-1"]
    assert rows.loc[films[0].stem, ["width", "height"]].tolist() == [str(width), str(height)]
    drawn = np.asarray(Image.open(tmp_path / "run" / "masks" / films[0].name))
    assert drawn.shape == (height, width) and not drawn.any()
    replace(films[0], whole)  # mended: predicted again, with the networks that are there
    result = command(*words)
    assert result.status == 4 and "epoch" not in result.out
    rows = read_table(tmp_path / "run" / "submission.csv").set_index("image_id")
    assert list(rows.index) == [films[0].stem] and rows.loc[films[0].stem, "rle"] != "-1"
    assert [path.name for path in (tmp_path / "run" / "masks").iterdir()] == [films[0].name]


def test_two_files_of_one_image(data, spoilt):
    film = sorted((data / "ChinaSet_AllFiles").rglob("*.png"))[0]
    shutil.copy(film, data / film.name)
    assert f"a second file for the image of {film.stem}; the first is" in spoilt()


# ---- images to predict ---------------------------------------------------------------------------------------------


def test_named_test_images(data, spoilt, tmp_path):
    table = tmp_path / "test.csv"
    train = sorted((data / "mask" / "mask").iterdir())[0].name.removesuffix("_mask.png")
    for name, said in (("x", "1 images have no file, the first is x"), (train, "are training images, such as")):
        table.write_text(f"id\n{name}\n")
        assert said in spoilt("--test", table)
    (tmp_path / "mine").mkdir()
    shutil.copy(image_of(data, train), tmp_path / "mine")
    assert "1 of the images are training images" in spoilt("--test", tmp_path / "mine")


# ---- files of a run ------------------------------------------------------------------------------------------------


def test_masks_that_went_away_after_prepare(data, command, refused, tmp_path, tiny):
    words = ["demo", "--data", data, "--out", "run", *tiny, "--network.epochs", "1"]
    for verb in ("prepare", "train", "predict"):
        assert command(verb, *words).status == 0
    shutil.rmtree(data / "mask")
    assert "_mask.png: the mask cannot be read" in refused("tune", *words)


def test_a_folder_that_may_not_be_read(data, spoilt, monkeypatch):
    real = os.scandir

    def guarded(path="."):
        if str(path).endswith("mask"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert "mask: Permission denied" in spoilt()
