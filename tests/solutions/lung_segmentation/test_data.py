"""Pairs in every layout, masks and what is wrong with them, and what `prepare` makes of the sample."""

import json
import logging
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from common.errors import InputError
from common.images import Images
from solutions.lung_segmentation.data import split_rows
from solutions.lung_segmentation.pairs import find_pairs, fit_mask, read_mask
from tests.solutions.lung_segmentation.conftest import stored_masks

LEFT, RIGHT = "ManualMask/leftMask", "ManualMask/rightMask"
OUTLINES = ("left lung", "right lung", "heart", "left clavicle")


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(folder):
    return {
        p.image_id: (p.dataset, p.patient_id, p.image.suffix, " ".join(sorted(p.masks))) for p in find_pairs(folder)
    }


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)
    return path


# ---- layouts -------------------------------------------------------------------------------------------------------


def test_montgomery_as_downloaded(tmp_path):
    touch(
        tmp_path,
        *(f"MontgomerySet/{part}/MCUCXR_{n}_{n % 2}.png" for part in ("CXR_png", LEFT, RIGHT) for n in (1000, 1001)),
        "MontgomerySet/ClinicalReadings/MCUCXR_1000_0.txt",
        "MontgomerySet/CXR_png/Thumbs.db",
        "__MACOSX/CXR_png/._MCUCXR_1000_0.png",
    )
    assert found(tmp_path) == {
        "MCUCXR_1000_0": ("Montgomery", "MCUCXR_1000", ".png", "left right"),
        "MCUCXR_1001_1": ("Montgomery", "MCUCXR_1001", ".png", "left right"),
    }
    pair = find_pairs(tmp_path)[0]
    left, right = (tmp_path / "MontgomerySet" / part / "MCUCXR_1000_0.png" for part in (LEFT, RIGHT))
    assert pair.files_of("lungs") == [[left, right]] and pair.files_of("left_right") == [[left], [right]]
    assert pair.files_of("lungs_heart") == [[left], [right], []]


def test_shenzhen_as_downloaded(tmp_path):
    touch(tmp_path, "CXR_png/CHNCXR_0001_0.png", "CXR_png/CHNCXR_0002_1.png", "mask/CHNCXR_0001_0_mask.png")
    assert found(tmp_path) == {
        "CHNCXR_0001_0": ("Shenzhen", "CHNCXR_0001", ".png", "lungs"),
        "CHNCXR_0002_1": ("Shenzhen", "CHNCXR_0002", ".png", ""),
    }
    assert find_pairs(tmp_path)[0].files_of("left_right") == [find_pairs(tmp_path)[0].files_of("lungs")[0]] * 2


def test_jsrt_with_scr(tmp_path):
    touch(
        tmp_path,
        "All247images/JPCLN001.IMG",
        "All247images/JPCNN002.IMG",
        "landmarks/JPCLN001.pfs",
        *(
            f"scratch/fold{fold}/masks/{part}/{name}.gif"
            for part in OUTLINES
            for fold, name in ((1, "JPCLN001"), (2, "JPCNN002"))
        ),
    )
    assert found(tmp_path) == {name: ("JSRT", name, ".IMG", "heart left right") for name in ("JPCLN001", "JPCNN002")}
    channels = find_pairs(tmp_path)[0].files_of("lungs_heart")
    assert [paths[0].parent.name for paths in channels] == ["left lung", "right lung", "heart"]


def test_as_kaggle_nests_them_and_all_together(tmp_path):
    touch(
        tmp_path,
        "pulmonary/Montgomery/MontgomerySet/CXR_png/MCUCXR_0001_0.png",
        f"pulmonary/Montgomery/MontgomerySet/{LEFT}/MCUCXR_0001_0.png",
        f"pulmonary/Montgomery/MontgomerySet/{RIGHT}/MCUCXR_0001_0.png",
        "pulmonary/ChinaSet_AllFiles/ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png",
        "shcxr-lung-mask/mask/mask/CHNCXR_0001_0_mask.png",
        "jsrt/JPCLN001.IMG",
    )
    assert {name: about[0] for name, about in found(tmp_path).items()} == {
        "CHNCXR_0001_0": "Shenzhen",
        "JPCLN001": "JSRT",
        "MCUCXR_0001_0": "Montgomery",
    }


def test_flattened_copies_and_other_extensions(tmp_path):
    one = ("CHNCXR_0001_0.JPG", "CHNCXR_0001_0_mask.PNG", "CHNCXR_0003_1.dcm", "CHNCXR_0003_1_mask.tif")
    touch(tmp_path / "one", *one)  # images and masks in one folder
    touch(
        tmp_path / "two",
        "images/MCUCXR_0001_0.jpeg",
        "masks/MCUCXR_0001_0.bmp",
        "images/CHNCXR_0001_0.jpg",
        "Masks/CHNCXR_0001_0_mask.png",
    )
    touch(
        tmp_path / "three",
        "MCUCXR_0001_0.jpeg",
        "outlines/MCUCXR_0001_0.png",
        "leftMask/MCUCXR_0002_0_mask.png",
        "MCUCXR_0002_0.png",
        "right-lung/MCUCXR_0002_0.png",
    )
    touch(tmp_path / "four", "JPCLN001.png", "heart/JPCLN001.png", "left lung/JPCLN001.gif", "Right Lung/JPCLN001.gif")
    assert found(tmp_path / "one") == {
        "CHNCXR_0001_0": ("Shenzhen", "CHNCXR_0001", ".JPG", "lungs"),
        "CHNCXR_0003_1": ("Shenzhen", "CHNCXR_0003", ".dcm", "lungs"),
    }
    assert [about[3] for about in found(tmp_path / "two").values()] == ["lungs", "lungs"]
    assert found(tmp_path / "four") == {"JPCLN001": ("JSRT", "JPCLN001", ".png", "heart left right")}
    with pytest.raises(InputError, match="a second file for the image of MCUCXR_0001_0"):
        find_pairs(tmp_path / "three")  # `outlines` is not known as a folder of masks
    (tmp_path / "three" / "outlines" / "MCUCXR_0001_0.png").unlink()
    assert found(tmp_path / "three")["MCUCXR_0002_0"][3] == "left right"


def test_jsrt_as_png_copies_are_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    caplog.set_level("INFO", "common")
    masks = ("left_lung_png", "RightLungMasks", "heart-masks", "left_clavicle_png")
    touch(tmp_path, "png/JPCLN001.IMG.png", *(f"{name}/JPCLN001.png" for name in masks))
    touch(tmp_path, "png/JPCNN002.img.PNG", "lung_masks_gif/JPCNN002.IMG.gif", "png/JPCNN002.IMG_old.png")
    assert found(tmp_path) == {
        "JPCLN001": ("JSRT", "JPCLN001", ".png", "heart left right"),
        "JPCNN002": ("JSRT", "JPCNN002", ".PNG", "lungs"),
    }
    assert "ignored 1 files with a suffix to the name" in caplog.text


def test_a_folder_named_lungs_may_hold_radiographs(tmp_path):
    touch(tmp_path, "lungs/JPCLN001.IMG", "Left Lungs/JPCLN001.gif")
    assert found(tmp_path) == {"JPCLN001": ("JSRT", "JPCLN001", ".IMG", "left")}


def test_a_users_own_pairs(tmp_path):
    touch(
        tmp_path,
        "images/b.png",
        "images/a.1.dcm",
        "images/c.png",
        "masks/b.gif",
        "masks/a.1_mask.png",
        "notes.txt",
        "masks/lost.png",
        "elsewhere/b.png",
        "elsewhere/deep/b.png",
    )
    assert found(tmp_path) == {
        "a.1": ("folder", "a.1", ".dcm", "lungs"),
        "b": ("folder", "b", ".png", "lungs"),
        "c": ("folder", "c", ".png", ""),
    }


def test_files_of_others_are_passed_over(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    caplog.set_level("INFO", "common")
    touch(
        tmp_path,
        "CHNCXR_0001_0.png",
        "CHNCXR_0001_0_mask.png",
        "CHNCXR_0001_0_mask_old.png",
        "a/x.png",
        "b/x.png",
        "images/y.png",
        "masks/y.png",
        "z/images/y.png",
    )
    touch(tmp_path, "mask/CHNCXR_0009_0_mask.png")
    assert list(found(tmp_path)) == ["CHNCXR_0001_0"]
    assert "ignored 1 names in images/ and masks/ that belong to no known collection" in caplog.text
    assert "1 masks have no image, such as that of CHNCXR_0009_0" in caplog.text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "no radiographs of Montgomery, Shenzhen or JSRT, and no images/ with masks/ in it"),
        (("x.png",), "no radiographs of"),
        (("masks/x.png",), "no radiographs of"),
        (("mask/CHNCXR_0001_0_mask.png",), "no radiographs of"),
        (("CHNCXR_0001_0.png", "copy/CHNCXR_0001_0.jpg"), "a second file for the image of CHNCXR_0001_0; the first is"),
        (("x/CHNCXR_0001_0_mask.png", "y/CHNCXR_0001_0_mask.png"), "a second file for lungs of CHNCXR_0001_0"),
        (("leftMask/MCUCXR_0001_0.png", "leftMask/MCUCXR_0001_0.gif"), "a second file for left of MCUCXR_0001_0"),
        (("images/a.png", "images/a.jpg"), "a second file for the image of a"),
        (("images/my film!.png", "masks/my film!.png"), "'my film!' is not a usable id"),
    ],
)
def test_folders_that_are_refused(names, said, tmp_path):
    touch(tmp_path, *names)
    with pytest.raises(InputError, match=said):
        find_pairs(tmp_path)


def test_a_folder_that_is_not_there_or_goes_round(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_pairs(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path)
    touch(tmp_path, "images/a.png")
    assert [pair.image for pair in find_pairs(tmp_path)] == [tmp_path / "images" / "a.png"]


# ---- masks ---------------------------------------------------------------------------------------------------------


def lungs(shape=(40, 60), top=255):
    mask = np.zeros(shape, np.uint8)
    mask[10:30, 8:24] = mask[10:30, 36:52] = top
    return mask


@pytest.mark.parametrize(
    ("suffix", "make"),
    [
        (".png", lungs),
        (".bmp", lungs),
        (".tif", lungs),
        (".gif", lungs),
        (".jpg", lungs),
        (".png", lambda: lungs(top=1)),
        (".png", lambda: lungs() > 0),
        (".png", lambda: lungs().astype(np.uint16) * 257),
        (".png", lambda: lungs(top=1).astype(np.uint16)),
        (".png", lambda: np.repeat(lungs()[..., None], 3, axis=2)),
        (".png", lambda: np.dstack([lungs()] * 3 + [np.full((40, 60), 255, np.uint8)])),
        (".tif", lambda: lungs().astype(np.int32)),
    ],
)
def test_masks_of_every_kind(suffix, make, tmp_path):
    path = save(tmp_path / f"m{suffix}", make())
    assert (read_mask(path) == (lungs() > 0)).mean() > (0.99 if suffix == ".jpg" else 1 - 1e-9)


def test_masks_that_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    labels = lungs()
    labels[:, :30] //= 255
    labels[:, 30:] //= 127  # 1 and 2 for either lung
    small = lungs(top=2)
    small[:6, :6] = 1
    for name, pixels, said in (
        ("empty", np.zeros((40, 60), np.uint8), "an empty mask"),
        ("full", np.full((40, 60), 255, np.uint8), "covers the whole image"),
        ("film", rng.integers(0, 256, (40, 60), np.uint8), "many grey levels"),
        ("labels", labels, "many grey levels"),
        ("small", small, "grey areas, like a map of several labels"),
    ):
        path = save(tmp_path / f"{name}.png", pixels)
        with pytest.raises(InputError, match=said) as error:
            read_mask(path)
        assert str(error.value).startswith(f"{path}: ")
    soft = cv2.resize(lungs(), (240, 160), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(read_mask(save(tmp_path / "soft.png", soft)), soft > 127)
    y, x = np.mgrid[:64, :64]
    round_one = np.clip((20 - np.hypot(y - 32, x - 32)) * 80 + 128, 0, 255).astype(np.uint8)  # soft edges, enlarged
    blocks = np.kron(round_one, np.ones((8, 8), np.uint8))
    assert np.array_equal(read_mask(save(tmp_path / "blocks.png", blocks)), blocks > 127)
    with pytest.raises(InputError, match=r"nowhere\.png: the mask cannot be read"):
        read_mask(tmp_path / "nowhere.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own
@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif", ".bmp", ".jpg"])
def test_damaged_masks_never_end_in_a_traceback(suffix, tmp_path):
    whole = save(tmp_path / f"m{suffix}", lungs()).read_bytes()
    rng, path = np.random.default_rng(0), tmp_path / f"x{suffix}"
    for number in range(60):
        spoilt = bytearray(whole)
        if number % 3 == 0:
            spoilt = spoilt[: rng.integers(len(spoilt))]
        for _ in range(number % 3):
            spoilt[rng.integers(len(spoilt))] = rng.integers(256)
        path.write_bytes(spoilt)
        try:
            assert read_mask(path).dtype == bool
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_a_png_mask_with_a_wrong_check_sum_is_refused(tmp_path):
    path = save(tmp_path / "m.png", lungs())
    whole = bytearray(path.read_bytes())
    at = whole.index(b"IDAT")
    length = int.from_bytes(whole[at - 4 : at], "big")
    whole[at + 4 + length] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match="the mask cannot be read"):
        read_mask(path)


@pytest.mark.parametrize(
    ("mask", "image", "taken"),
    [
        ((1024, 1024), (2048, 2048), True),  # SCR for JSRT
        ((512, 512), (512, 512), True),
        ((500, 410), (1000, 820), True),
        ((600, 734), (603, 734), False),
        ((602, 734), (603, 734), True),  # a pixel
        ((734, 603), (603, 734), False),  # turned
        ((201, 245), (603, 734), True),  # a third: 244.67
        ((1205, 1469), (603, 734), True),  # the image was halved
        ((201, 240), (603, 734), False),
        ((512, 512), (603, 734), False),  # made square
    ],
)
def test_masks_of_another_size(mask, image, taken):
    true = np.zeros(mask, bool)
    true[: mask[0] // 2] = True
    if not taken:
        with pytest.raises(InputError, match=f"x.png: a mask of {mask[1]} × {mask[0]} pixels for an image of "):
            fit_mask(true, image, "x.png")
        return
    fitted, resized = fit_mask(true, image, "x.png")
    assert fitted.shape == image and resized == (mask != image)
    expected = np.zeros(image, bool)
    expected[: image[0] // 2] = True
    assert (fitted != expected).mean() < 0.01


# ---- prepare -------------------------------------------------------------------------------------------------------


def test_prepare_on_the_sample(finished, sample):
    run = finished / "run"
    table, masks = pd.read_parquet(run / "images.parquet"), stored_masks(run)
    assert masks.shape == (14, 1, 64, 64) and set(np.unique(masks)) == {0, 1}
    train, test = (table[table["split"] == split] for split in ("train", "test"))
    assert train["dataset"].value_counts().to_dict() == {"Shenzhen": 8, "Montgomery": 4}
    assert set(test["image_id"]) == {path.stem for path in (sample / "hidden").iterdir()}
    assert not (set(test["image_id"]) & set(train["image_id"])) and (test["fold"] == -1).all()
    for row in train.itertuples():
        with Image.open(next(sample.rglob(f"CXR_png/{row.image_id}.png"))) as image:
            assert image.size == (row.width, row.height)
        if row.dataset == "Montgomery":
            names = [f"Montgomery/MontgomerySet/{part}/{row.image_id}.png" for part in (LEFT, RIGHT)]
        else:
            names = [f"mask/mask/{row.image_id}_mask.png"]
        assert [str(sample / name) for name in names] == json.loads(row.masks)[0]
        true = np.any([np.asarray(Image.open(sample / name)) > 0 for name in names], axis=0)
        assert row.area == pytest.approx(true.mean(), abs=1e-12)
        small = Image.fromarray(true.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.BOX)
        assert ((np.asarray(small) >= 128) == masks[row.row, 0]).mean() > 0.995
    assert not masks[test["row"]].any()
    for fold in (0, 1):
        assert train[train["fold"] == fold]["dataset"].value_counts().to_dict() == {"Shenzhen": 4, "Montgomery": 2}
    assert not (run / "left_out.csv").exists()


def test_parts_of_a_fold_share_no_patient(finished):
    table = pd.read_parquet(finished / "run" / "images.parquet")
    train = table["split"] == "train"
    table.loc[train, "patient_id"] = [f"p{number // 2}" for number in range(train.sum())]
    table.loc[train, "fold"] = np.arange(train.sum()) // 2 % 3
    patient = table.set_index("row")["patient_id"]
    for fold in range(3):
        images = Images(table, None, "", "")
        job = SimpleNamespace(images=images, config=SimpleNamespace(validation=0.25, seed=0, n_folds=3))
        rows, validation = split_rows(job, fold)
        held_out = images.rows(folds=[fold])
        parts = [set(patient[part]) for part in (rows, validation, held_out)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 6
        assert sorted([*rows, *validation, *held_out]) == sorted(table.loc[train, "row"])
        assert len(validation) in (2, 4)  # a quarter of 12, by pairs
    rows, validation = split_rows(job, 3)  # of a refit
    assert sorted(rows) == sorted(table.loc[train, "row"]) and not len(validation)


def test_an_id_map_keeps_patients_together(sample, command, tmp_path, tiny):
    ids = sorted(path.name.removesuffix("_mask.png") for path in (sample / "mask" / "mask").iterdir())
    rows = [f"{image_id},p{number // 4}" for number, image_id in enumerate(ids)]
    (tmp_path / "map.csv").write_text("\n".join(["image_id,patient_id", *rows]) + "\n")
    result = command("prepare", "demo", "--data", sample, "--out", "run", *tiny, "--id-map", "map.csv")
    assert result.status == 0 and "4 of 12 images are not in it" in result.out
    table = pd.read_parquet(tmp_path / "run" / "images.parquet").set_index("image_id")
    assert table.loc[ids, "patient_id"].tolist() == [row.split(",")[1] for row in rows]
    assert table.loc[ids].groupby("patient_id")["fold"].nunique().tolist() == [1, 1]
    folds = pd.read_csv(tmp_path / "run" / "folds.csv", comment="#").set_index("image_id")
    assert (folds["group"] == table.loc[folds.index, "patient_id"]).all()


def test_the_folder_of_the_data_may_be_named_from_anywhere(sample, command, tmp_path, tiny, monkeypatch):
    (tmp_path / "link").symlink_to(sample)
    assert command("prepare", "demo", "--data", "link", "--out", tmp_path / "run", *tiny).status == 0
    masks = pd.read_parquet(tmp_path / "run" / "images.parquet")["masks"]
    assert all(path.startswith(str(tmp_path)) for text in masks if text for path in json.loads(text)[0])
