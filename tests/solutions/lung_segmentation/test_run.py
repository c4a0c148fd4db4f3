"""Whole runs at the smallest size: what they leave, and what is beside the recipe."""

import re
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.tables import real_data
from common.data.dicom import read_image
from common.paths import read_array, read_json
from common.post.rle import ABSOLUTE, decode
from common.submit.table import read_table
from solutions.lung_segmentation.postprocess import MaskRule
from solutions.lung_segmentation.sample import make_sample
from solutions.lung_segmentation.segmenter import load_segmenter
from tests import browser
from tests.running import hash_files, write_times
from tests.solutions.lung_segmentation.conftest import stored_masks

FOLD0 = ["--folds", "0", "--network.epochs", "1"]
SECTIONS = (
    "Data",
    "Scores",
    "Decision and calibration",
    "Worst errors",
    "Pictures",
    "Training",
    "Submission",
    "This run",
)


def ids(run):
    return read_table(run / "submission.csv")["image_id"].tolist()


# ---- a run and its repetition --------------------------------------------------------------------------------------


def test_a_run_leaves_masks_a_table_a_score_and_a_report(finished, sample):
    run = finished / "run"
    rows = read_table(run / "submission.csv", ["image_id", "width", "height", "rle"])
    hidden = {path.stem: np.asarray(Image.open(path)) > 0 for path in (sample / "hidden").iterdir()}
    assert sorted(rows["image_id"]) == sorted(hidden) == sorted(path.stem for path in (run / "masks").iterdir())
    dice = []
    for row in rows.itertuples():
        drawn = np.asarray(Image.open(run / "masks" / f"{row.image_id}.png"))
        true = hidden[row.image_id]
        assert drawn.shape == true.shape == (int(row.height), int(row.width)) and set(np.unique(drawn)) <= {0, 255}
        assert (decode(row.rle, drawn.shape, ABSOLUTE) == (drawn > 0)).all() and drawn.any()
        dice.append(2 * ((drawn > 0) & true).sum() / ((drawn > 0).sum() + true.sum()))
    steps = read_json(run / "manifest.json")["steps"]
    assert [name for name in steps if " " not in name] == ["prepare", "predict", "tune", "submit"]
    assert steps["submit"]["hidden"]["value"] == pytest.approx(np.mean(dice))
    assert np.mean(dice) > 0.5  # it has learned something
    assert "<html" in (run / "report.html").read_text()[:300]
    copies = list((finished / "submissions").glob("lung_segmentation-run-*.csv"))
    assert [path.read_bytes() for path in copies] == [(run / "submission.csv").read_bytes()]
    assert not list(run.rglob("last.ckpt")) and not list(finished.rglob(".*tmp*"))


def export(command, folder):
    assert command("export", "run", "--out", "exported").status == 0
    return folder / "exported"


def test_lost_and_damaged_masks_are_drawn_again(run_copy, command):
    masks = {path: path.read_bytes() for path in sorted((run_copy / "masks").iterdir())}
    assert "submit: up to date" in command("submit", "--out", "run").out
    lost, damaged = list(masks)[:2]
    for spoil in (lost.unlink, lambda: damaged.write_bytes(b"")):
        spoil()
        result = command("submit", "--out", "run")
        assert result.status == 0 and "up to date" not in result.out
        assert {path: path.read_bytes() for path in sorted((run_copy / "masks").iterdir())} == masks


def test_an_exported_run_predicts_the_same_masks(run_copy, command, refused, sample, tmp_path):
    exported = export(command, tmp_path)
    result = command("infer", exported, "--data", sample, "--out", "out/mine.csv")
    assert (result.status, result.errors) == (0, [])
    assert (tmp_path / "out" / "mine.csv").read_bytes() == (run_copy / "submission.csv").read_bytes()
    masks = {path.name: path.read_bytes() for path in (run_copy / "masks").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "mine_masks").iterdir()} == masks
    (tmp_path / "films").mkdir()
    hue = np.dstack([np.tile(np.arange(180, dtype=np.uint8), (200, 1)), *np.full((2, 200, 180), 200, np.uint8)])
    cv2.imwrite(str(tmp_path / "films" / "photo.png"), cv2.cvtColor(hue, cv2.COLOR_HSV2BGR))
    shutil.copy(next(sample.rglob(f"CXR_png/{min(masks)}")), tmp_path / "films")
    words = ["infer", exported, "--test", "films"]
    assert "photo.png: a colour picture, not a radiograph" in refused(*words)
    assert command(*words, "--on-bad-image", "placeholder").status == 4
    rows = read_table(tmp_path / "submission.csv").set_index("image_id")["rle"]
    assert rows["photo"] == "-1" and rows[min(masks)[:-4]] != "-1" and len(rows) == 2


def test_one_fold_through_all_verbs_and_the_other_later(tmp_path, command, sample, tiny):
    for verb in ("prepare", "train", "predict", "tune", "score", "submit", "report"):
        result = command(verb, "demo", "--data", sample, "--out", "run", *tiny, *FOLD0)
        assert (result.status, result.errors) == (0, [])
    score = read_json(tmp_path / "run" / "score.json")
    assert score["folds"] == [0] and score["images"] == 6
    assert read_json(tmp_path / "run" / "tuned.json")["halves"] is True
    assert not (tmp_path / "run" / "fold1").exists() and (tmp_path / "run" / "report.html").is_file()
    done = write_times(tmp_path / "run", "fold0/*/final.safetensors")
    assert command("run", "--data", sample, "--out", "run", "--folds", "0", "1").status == 0
    assert done == write_times(tmp_path / "run", "fold0/*/final.safetensors")
    assert read_json(tmp_path / "run" / "score.json")["images"] == 12
    assert read_json(tmp_path / "run" / "config.json")["folds"] == [0, 1]


def test_nothing_to_predict(data, command, refused, tmp_path, tiny):
    for path in (data / "hidden").iterdir():
        next(data.rglob(f"CXR_png/{path.name}")).unlink()
    result = command("run", "demo", "--data", data, "--out", "run", *tiny, *FOLD0)
    assert (result.status, result.errors) == (0, []) and "no test images" in result.out
    assert not list((tmp_path / "run").glob("masks/*")) and read_json(tmp_path / "run" / "score.json")["images"] == 6
    assert "every image has a mask" in refused("infer", export(command, tmp_path), "--data", data)


# ---- what was made from what ---------------------------------------------------------------------------------------


def test_other_masks_under_trained_networks_are_refused(data, run_copy, command, refused):
    assert command("run", "--out", "run", "--data", data).status == 0  # the same files elsewhere are the same data
    before = hash_files(run_copy, but=["manifest.json"])
    path = sorted((data / "mask" / "mask").iterdir())[0]
    whole = path.read_bytes()
    for change in (np.fliplr, lambda mask: np.roll(mask, 40, axis=1)):  # of the same area
        mask = change(np.asarray(Image.open(path)))
        path.unlink()
        Image.fromarray(mask).save(path)
        line = refused("run", "--out", "run", "--data", data)
        assert "was trained on other images, labels" in line and hash_files(run_copy, but=["manifest.json"]) == before
        path.write_bytes(whole)
    assert "epoch" not in command("run", "--out", "run", "--data", data).out


def test_other_test_images(run_copy, command, refused, sample, tmp_path):
    wanted = (run_copy / "submission.csv").read_bytes()
    own = ids(run_copy)
    (tmp_path / "mine").mkdir()
    for name in ("b", "a.1"):
        cv2.imwrite(str(tmp_path / "mine" / f"{name}.png"), np.tile(np.arange(200, dtype=np.uint8), (300, 1)))
    assert "prepared with another --test" in refused("predict", "--out", "run", "--test", "mine")
    assert command("run", "--data", sample, "--out", "run", "--test", "mine").status == 0
    assert ids(run_copy) == ["a.1", "b"] == sorted(path.stem for path in (run_copy / "masks").iterdir())
    (tmp_path / "two.csv").write_text("name,age\n" + "".join(f"{name}.png,5\n" for name in own[::-1]))
    result = command("run", "--data", sample, "--out", "run", "--test", "two.csv")
    assert result.status == 0 and "epoch" not in result.out
    assert ids(run_copy) == own[::-1]  # in another order, in a store of its own
    masks = {path.name: path.read_bytes() for path in (run_copy / "masks").iterdir()}
    result = command("run", "--data", sample, "--out", "run")
    assert result.status == 0 and "epoch" not in result.out
    assert (run_copy / "submission.csv").read_bytes() == wanted
    assert {path.name: path.read_bytes() for path in (run_copy / "masks").iterdir()} == masks


# ---- beside the recipe ---------------------------------------------------------------------------------------------


def test_ablation_and_range_test(run_copy, command):
    result = command("ablate", "--out", "run")
    assert (result.status, result.errors) == (0, [])
    names = {f"fold{k}/network{n}" for n in ("", "-simple", "-complex", "-simple-sgd") for k in (0, 1)}
    assert {str(path.relative_to(run_copy)) for path in run_copy.glob("fold*/network*")} == names
    table = pd.read_csv(run_copy / "ablation.csv")
    assert list(table["augmentation"]) == ["simple", "complex", "simple, sgd"] and (table["images"] == 12).all()
    for name in ("dice", "precision", "recall", "accuracy", "dice_pooled"):
        assert (table[f"{name}_low"] <= table[name]).all() and (table[name] <= table[f"{name}_high"]).all()
    assert table["dice_change"][1] == pytest.approx(table["dice"][1] - table["dice"][0])
    assert not (run_copy / "experiments").exists()
    again = command("ablate", "--out", "run")
    assert again.status == 0 and "epoch" not in again.out
    assert pd.read_csv(run_copy / "ablation.csv").equals(table)
    assert command("find_lr", "--out", "run").status == 0
    rates = pd.read_csv(run_copy / "lr_network.csv")
    assert np.all(np.diff(rates["lr"]) > 0) and rates["suggestion"].iloc[0] in rates["lr"].to_numpy()
    assert command("report", "--out", "run").status == 0
    page = (run_copy / "report.html").read_text()
    assert "Ablation" in page and "Learning rates" in page
    (run_copy / "lr_network.csv").unlink()
    assert command("find_lr", "--out", "run").status == 0 and (run_copy / "lr_network.csv").is_file()


def test_the_suggested_rate_is_used(tmp_path, command, refused, sample, tiny):
    words = ["demo", "--data", sample, "--out", "run", *tiny, "--folds", "0", "--network.epochs", "2"]
    words += ["--network.schedule", "constant", "--network.lr", "auto"]
    assert command("prepare", *words).status == 0
    assert "no encoder to freeze" in refused("train", *words, "--network.frozen-epochs", "1")
    assert command("train", *words).status == 0
    found = pd.read_csv(tmp_path / "run" / "lr_network.csv")["suggestion"].iloc[0]
    used = pd.read_csv(tmp_path / "run" / "fold0" / "network" / "history.csv")["lr"]
    assert used.tolist() == pytest.approx([found, found])
    again = command("train", *words)
    assert again.status == 0 and "find_lr: up to date" in again.out and "epoch 1" not in again.out


@pytest.mark.long
def test_across_datasets(tmp_path, command, refused, sample, tiny):
    words = ["demo", "--data", sample, "--out", "run", *tiny, *FOLD0, "--network.batch-size", "1"]
    assert command("prepare", *words).status == 0
    result = command("cross", *words)
    assert (result.status, result.errors) == (0, [])
    table = pd.read_csv(tmp_path / "run" / "cross.csv").set_index(["trained", "tested"])
    images = {
        "Montgomery": {"Montgomery": 2, "Shenzhen": 8},
        "Shenzhen": {"Montgomery": 4, "Shenzhen": 4},
        "all": {"Montgomery": 2, "Shenzhen": 4},
    }
    assert table["images"].to_dict() == {(a, b): n for a, row in images.items() for b, n in row.items()}
    assert table["dice"].between(0, 1).all() and command("report", *words).status == 0
    assert "Across datasets" in (tmp_path / "run" / "report.html").read_text()
    names = {"network", "network-Montgomery", "network-Shenzhen"}
    assert {path.name for path in (tmp_path / "run" / "fold0").iterdir()} == names
    table = [line.split(",") for line in (tmp_path / "run" / "folds.csv").read_text().splitlines()[2:]]
    rows = [f"{name},{int(name.startswith('M'))}" for name, *_ in table]  # a dataset a fold
    (tmp_path / "folds.csv").write_text("\n".join(["image_id,fold", *rows]) + "\n")
    words = [*words[:3], "--out", "other", *words[5:], "--fold-table", "folds.csv"]
    assert command("prepare", *words).status == 0
    assert "cross needs an image to validate on and two held out of each dataset: Montgomery has" in refused(
        "cross", *words
    )
    assert command("prepare", *words, "--datasets", "Shenzhen", "--n-folds", "2").status == 2  # names others


def test_cross_needs_two_datasets(sample, command, refused, tiny):
    words = ["demo", "--data", sample, "--out", "run", *tiny, "--datasets", "Shenzhen"]
    assert command("prepare", *words).status == 0
    assert "cross needs two datasets, but there is only Shenzhen" in refused("cross", *words)


def test_an_exported_network_gives_the_masks_of_the_run(run_copy, command, sample, tmp_path):
    assert command("export_segmenter", "--out", "run", "--folds", "0").status == 2  # no rule of this choice of folds
    assert command("export_segmenter", "--out", "run").status == 0
    (other,) = run_copy.glob("lungs_fold*.safetensors")
    assert (
        other.name == "lungs_fold1.safetensors" and other.read_bytes() != (run_copy / "lungs.safetensors").read_bytes()
    )
    segmenter = load_segmenter(run_copy / "lungs.safetensors")
    tuned = read_json(run_copy / "tuned.json")["rule"]
    assert (segmenter.size, segmenter.pixel, segmenter.regions) == (32, tuned["pixel"], tuned["regions"])
    oof, probs = pd.read_parquet(run_copy / "oof.parquet"), read_array(run_copy / "oof_probs.b2nd")[:]
    first = (oof["fold"] == 0).to_numpy()
    files = {name: next(sample.rglob(f"CXR_png/{name}.png")) for name in oof["image_id"][first]}
    ours = np.concatenate(list(segmenter.probs(read_image(path) for path in files.values())))
    # the run shrinks in two steps, over the store
    assert np.abs(ours.astype(int) - probs[first]).mean() < 3
    result = command("masks", *files.values(), "--out", "masks", "--weights", "run/lungs.safetensors")
    assert result.status == 0
    for name, probability in zip(files, probs[first], strict=True):
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{name}.png")) > 0
        expected = MaskRule(**tuned).lungs(probability, mask.shape, "lungs") > 0
        assert 2 * (mask & expected).sum() / (mask.sum() + expected.sum()) > 0.97
    about = segmenter.about
    dice = pd.read_parquet(run_copy / "oof_dice.parquet").set_index("image_id")["dice"]
    assert about["held_out_folds"] == [0, 1] and about["images"] == {"Montgomery": 4, "Shenzhen": 8}
    assert about["dice"]["all"]["estimate"] == pytest.approx(dice.mean())  # by the rules that other images chose


def test_lungs_and_heart_on_raw_jsrt(tmp_path, command, tiny):
    data = make_sample(tmp_path / "data", n_montgomery=1, n_shenzhen=1, n_jsrt=4, n_test=1)
    words = f"--test {data}/ChinaSet_AllFiles --network.augmentation affine --network.batch-size 1 --validation 0.25"
    result = command("run", "lungs_heart", "--data", data, "--out", "run", *tiny, *words.split())
    assert (result.status, result.errors) == (0, [])
    run = tmp_path / "run"
    masks, table = stored_masks(run), pd.read_parquet(run / "images.parquet")
    train = table[table["split"] == "train"]
    assert len(train) == 4 and (train[["width", "height"]] == 2048).all().all() and masks.shape[1:] == (3, 64, 64)
    assert "masks of 4 images differ in size from their image and were resized" in result.out
    for row in train.itertuples():
        left, right, heart = masks[row.row].astype(bool)
        assert min(left.sum(), right.sum(), heart.sum()) > 50 and not (left & right).any()
        middle = [np.flatnonzero(part.any(0)).mean() for part in (right, heart, left)]
        assert middle == sorted(middle)  # the patient's left is at the image's right
        assert row.area == pytest.approx((left | right).mean(), abs=0.01)
    probs = read_array(run / "oof_probs.b2nd")[:]
    assert probs.shape == (4, 3, 32, 32) and read_array(run / "test_probs.b2nd").shape[1:] == (3, 32, 32)
    score = read_json(run / "score.json")
    assert set(score["structures"]) == {"left", "right", "heart"} and score["datasets"].keys() == {"JSRT"}
    assert "Lungs" not in score and 0 <= score["structures"]["heart"]["dice"]["estimate"] <= 1
    assert command("export_segmenter", "--out", "run").status == 0
    segmenter = load_segmenter(run / "lungs.safetensors")
    image = read_image(next(data.rglob("JPCLN001.IMG")))
    parts = segmenter.parts(next(segmenter.probs([image])), image.shape)
    assert list(parts) == ["left", "right", "heart"] and parts["heart"].shape == (2048, 2048)


@pytest.mark.parametrize("preset", ["paper", "unet", "sdfn", "podium"])
def test_presets_at_tiny_size(preset, tmp_path, command, sample, tiny):
    words = [*tiny, *FOLD0, "--network.frozen-epochs", "0", "--datasets", "Shenzhen", "--network.batch-size", "2"]
    for verb in ("prepare", "train"):
        result = command(verb, preset, "--data", sample, "--out", "run", *words)
        assert (result.status, result.errors) == (0, [])
    assert (tmp_path / "run" / "lr_network.csv").is_file() == (preset == "paper")
    assert (tmp_path / "run" / "fold0" / "network" / "final.safetensors").is_file()


def test_the_page_of_a_run_in_a_browser(finished):
    browser.chromium()
    page = finished / "run" / "report.html"
    headings = re.findall(r"<h2>([^<]*)</h2>", page.read_text())
    assert [title for title in headings if title in SECTIONS] == list(SECTIONS)
    for width in (1200, 390):
        broken, overflow, images = browser.probe(page, width, 900)
        assert (broken, overflow) == (0, 0) and images > 0
    assert browser.screenshot(page, 1200, 900).std() > 5


def test_real_images(tmp_path, command, tiny):
    data = real_data("lung_segmentation")
    if data is None:
        pytest.skip("CXR_REAL_DATA names no folder with lung_segmentation in it")
    result = command("prepare", "demo", "--data", data, "--out", "run", *tiny, "--n-folds", "5", "--workers", "1")
    assert (result.status, result.errors) == (0, [])
    table = pd.read_parquet(tmp_path / "run" / "images.parquet")
    assert table["split"].value_counts().to_dict() == {"train": 642, "test": 62}
    assert table["dataset"].value_counts().to_dict() == {"Shenzhen": 521, "Montgomery": 121, "": 62}
    train = table[table["split"] == "train"]
    assert train.groupby("patient_id")["fold"].nunique().max() == 1 and set(train["fold"]) == set(range(5))
    assert train["area"].between(0.05, 0.6).all() and (train[["width", "height"]] == 512).all().all()
