"""`masks` and `crops` as a user gives them, on drawn radiographs whose answer is known."""

import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from common import cli
from common.post.rle import ABSOLUTE, decode
from solutions.lung_segmentation import config, segmenter, tools
from solutions.lung_segmentation.postprocess import clean_up
from tests import browser

BAR = re.compile(r"image/s|\d+%\|")
SIZE = 128
ABOUT = {
    "network": config.NetworkConfig(architecture="plain", encoder="", decoder=(4, 8), weights="none", size=SIZE),
    "structures": "lungs",
    "pixel": 0.5,
    "regions": 0,
    "trained_on": "nothing",
}


class Bright(nn.Module):
    """Finds what is bright."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor([127.5]))

    def forward(self, images):
        return (images.float() - self.level) / 8


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("masks …")` in a folder of its own with weights that find what is bright: status, text, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(segmenter, "build_network", lambda *_: Bright())
    segmenter.save_segmenter("w.safetensors", Bright(), ABOUT)

    def run(line):
        words = f"{line} --weights w.safetensors".split()
        status = cli.main("lung_segmentation", config, dict, words, lambda tool: tools.TOOLS)
        said = capsys.readouterr()
        lines = [line.strip() for line in re.split(r"[\r\n]+", said.err)]
        errors = [line for line in lines if line and not BAR.search(line)]
        return SimpleNamespace(status=status, out=said.out, errors=errors)

    return run


def write_chest(path, height, width, lungs=2, seed=0):
    """A drawn radiograph with up to two light rectangles on dark noise; returns image and mask."""
    mask = np.zeros((height, width), np.uint8)
    for k in range(lungs):
        mask[height // 4 : 3 * height // 4, (1 + 4 * k) * width // 8 : (3 + 4 * k) * width // 8] = 1
    noise = np.random.default_rng(seed).integers(0, 20, mask.shape)
    image = np.where(mask, 230, 20 + noise).astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), image)
    return image, mask


@pytest.fixture
def folder(tmp_path):
    """Three radiographs that can be used, a truncated one, a text, and a colour photo."""
    truths = {}
    for name, height, width, lungs in (("a.png", 128, 128, 2), ("sub/b.jpg", 200, 300, 2), ("none.png", 128, 256, 0)):
        truths[name[-5].replace("e", "none")] = write_chest(tmp_path / "in" / name, height, width, lungs)
    cut = write_chest(tmp_path / "in" / "cut.png", 64, 64) and tmp_path / "in" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "in" / "text.png").write_text("no image")
    (tmp_path / "in" / "README.txt").write_text("not even by its name")
    photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "in" / "photo.png"), cv2.resize(photo, (80, 80), interpolation=cv2.INTER_NEAREST))
    return truths


def read(path):
    return pd.read_csv(path, dtype={"rle": str}, keep_default_na=False)


def test_a_mask_that_scaling_down_has_emptied_is_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("one.png", np.full((1, 1), 9, np.uint8))  # the shipped network sees lungs in it
    assert cli.main("lung_segmentation", config, dict, ["masks", "one.png", "--out", "out"], lambda _: tools.TOOLS) == 0
    (row,) = read("out/masks.csv").itertuples()
    assert (row.width, row.height) == (1, 1)
    assert (row.ok, row.reason) == (False, "no lung left at the size of the image")


def test_masks_of_a_folder(command, folder, tmp_path):
    done = command("masks in --out out")
    assert done.status == 4
    assert sorted(done.errors[:-1]) == [
        "left out: in/cut.png: the PNG is cut short",
        next(line for line in done.errors if line.startswith("left out: in/photo.png: a colour picture")),
        "left out: in/text.png: not a DICOM, PNG or JPEG file",
    ]
    assert done.errors[-1] == "done, but 3 of the inputs could not be used; they are named above"
    assert "masks: 3 in out, 1 rejected" in done.out
    names = ["a.png", "b.png", "masks.csv", "none.png", "problems.csv", "report.html"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    table = read("out/masks.csv")
    assert list(table["image_id"]) == ["a", "none", "b"] and list(table["ok"]) == [True, False, True]
    assert list(table["reason"]) == ["", "no lung found", ""]
    for row in table.itertuples():
        mask, (_, truth) = cv2.imread(f"out/{row.image_id}.png", cv2.IMREAD_UNCHANGED), folder[row.image_id]
        assert mask.dtype == np.uint8 and mask.shape == truth.shape == (row.height, row.width)
        assert set(np.unique(mask)) <= {0, 255} and ((mask > 0) != truth).mean() < 0.02
        assert (decode(row.rle, mask.shape, ABSOLUTE) * 255 == mask).all()
        assert row.area == pytest.approx((mask > 0).mean(), abs=1e-5)
    assert table.loc[1, "rle"] == "-1" and table.loc[0, "area"] == 0.25
    assert sorted(read("out/problems.csv")["image_id"]) == ["cut", "photo", "text"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index("none: no lung found") < page.index("a: 30% lung") and "trained_on" in page
    assert page.count("<img ") == 3 and "in/photo.png: a colour picture" in page


def test_masks_of_structures(command, folder, tmp_path, monkeypatch):
    assert (
        "--structures: w.safetensors only segments both lungs" in command("masks in --out out --structures").errors[-1]
    )

    class Sides(Bright):
        def forward(self, images):
            found, middle = super().forward(images), images.shape[-1] // 2
            left, right = found.clone(), found.clone()
            left[..., :middle] = right[..., middle:] = -9
            return torch.cat([left, right, -9 + 0 * found], 1)

    monkeypatch.setattr(segmenter, "build_network", lambda *_: Sides())
    segmenter.save_segmenter("w.safetensors", Sides(), ABOUT | {"structures": "lungs_heart"})
    plain, flipped = (
        command("masks in --out out --structures"),
        command("masks in --out flipped --structures --tta flip"),
    )
    assert plain.status == flipped.status == 4
    for name in ("a", "b"):
        both, left, right, heart = (
            cv2.imread(f"{folder}/{name}.png", cv2.IMREAD_UNCHANGED)
            for folder in ("out", "out/left lung", "out/right lung", "out/heart")
        )
        middle = both.shape[1] // 2
        assert (left + right == both).all() and left[:, middle:].any() and not left[:, : middle - 1].any()
        assert not heart.any()
        again = cv2.imread(f"flipped/left lung/{name}.png", cv2.IMREAD_UNCHANGED)
        assert (again != left).mean() < 0.02
    page = (tmp_path / "out" / "report.html").read_text()
    assert "</i>lungs" in page


def test_a_second_call_leaves_nothing_stale(command, tmp_path):
    write_chest(tmp_path / "in" / "a.png", 128, 128)
    write_chest(tmp_path / "in" / "b.png", 128, 128)
    assert command("masks in --out out").status == 0 and not (tmp_path / "out" / "problems.csv").exists()
    write_chest(tmp_path / "in" / "a.png", 64, 64, lungs=1)
    (tmp_path / "in" / "b.png").write_bytes(b"")
    assert command("masks in --out out").status == 4
    assert cv2.imread("out/a.png", cv2.IMREAD_UNCHANGED).shape == (64, 64)
    assert not (tmp_path / "out" / "b.png").exists() and list(read("out/masks.csv")["image_id"]) == ["a"]
    assert command("masks in/a.png --out out").status == 0
    assert not (tmp_path / "out" / "problems.csv").exists()


def test_the_gate_and_the_cleaning(command, tmp_path):
    _, mask = write_chest(tmp_path / "in" / "a.png", 128, 128)
    # 2 · 32 × 64 pixels of 128²; two pixels more on every side once cleaned up, 8 of 512
    assert command("masks in --out out --gate 0.298").status == 0 and read("out/masks.csv")["ok"].all()
    done = command("masks in --out out --gate 0.3")
    assert done.status == 0 and not done.errors and not read("out/masks.csv")["ok"].any()
    assert read("out/masks.csv").loc[0, "reason"] == "lungs cover 29.8 % of the image, the gate requires 30 %"
    assert (cv2.imread("out/a.png", cv2.IMREAD_UNCHANGED) == mask * 255).all()  # written all the same
    assert command("masks in --out out --clean").status == 0
    assert (cv2.imread("out/a.png", cv2.IMREAD_UNCHANGED) == clean_up(mask) * 255).all()
    assert command("masks in --out out --gate 2").errors == ["error: --gate must lie in [0, 1], not 2"]


def test_views_may_be_asked_for(command, tmp_path):
    write_chest(tmp_path / "in" / "a.png", 128, 128)
    assert command("masks in --out plain").status == command("masks in --out out --tta flip --device cpu").status == 0
    assert (cv2.imread("out/a.png") == cv2.imread("plain/a.png")).all()  # what is bright is bright from either side


def test_the_spread_of_two_networks_and_the_gate(command, tmp_path):
    image, _ = write_chest(tmp_path / "in" / "a.png", 128, 128)
    other = Bright()
    other.level.data[:] = 240.0  # of which the lungs are not bright enough
    segmenter.save_segmenter("v.safetensors", other, ABOUT)
    line = "masks in --out out --spread --tta flip"
    assert command(line).status == 0 and read("out/masks.csv").loc[0, "spread"] == 0
    networks = " --weights w.safetensors v.safetensors"

    def run(more):
        words = f"{line}{networks}{more}".split()
        return cli.main("lung_segmentation", config, dict, words, lambda tool: tools.TOOLS)

    assert run("") == 0
    inside = cv2.imread("out/spread/a.png", cv2.IMREAD_UNCHANGED)[image > 200]
    probs = torch.sigmoid((230 - torch.tensor([127.5, 240])) / 8)
    assert inside == pytest.approx(probs.std(correction=0).item() * 510, abs=1)
    table = read("out/masks.csv")
    assert table["ok"].all() and table.loc[0, "spread"] == pytest.approx(inside[0] / 510, rel=0.01)
    assert run(" --most-spread 0.3") == 0
    assert read("out/masks.csv")["reason"].tolist() == [f"spread {table.loc[0, 'spread']:.3f}, above 0.3"]
    assert "0 under the area gate of" in Path("out/report.html").read_text()
    assert command("masks in --out out").status == 0 and not Path("out/spread/a.png").exists()


def test_crops_come_from_the_original(command, tmp_path):
    two, _ = write_chest(tmp_path / "in" / "two.png", 512, 256)  # the network's 128 px make 4 × 2 of it
    one, _ = write_chest(tmp_path / "in" / "one.png", 512, 256, lungs=1)
    none, _ = write_chest(tmp_path / "in" / "none.png", 100, 90, lungs=0)
    done = command("crops in --out out")
    assert done.status == 0 and "crops: 3 in out, 2 rejected" in done.out
    assert "two 33.33%" in done.out and "mirrored 33.33%" in done.out and "whole 33.33%" in done.out
    table = read("out/boxes.csv").set_index("image_id")
    # At 128 px the lungs span x 16 to 112, y 32 to 96; margins are 15 and 20 of 256, that is 8 and 10 px.
    margin, bottom = round(128 * 15 / 256), round(128 * 20 / 256)
    wanted = [2 * (16 - margin), 4 * (32 - margin), 2 * (112 + margin), 4 * (96 + bottom)]
    names = ["x_min", "y_min", "x_max", "y_max"]
    assert table.loc["two", names].tolist() == table.loc["one", names].tolist() == wanted
    assert table["rule"].to_dict() == {"two": "two", "one": "mirrored", "none": "whole"}
    assert table["ok"].to_dict() == {"two": True, "one": False, "none": False}
    assert table.loc["none", names].tolist() == [0, 0, 90, 100] and table.loc["none", "reason"] == "no lung found"
    x_min, y_min, x_max, y_max = wanted
    for name, image in (("two", two), ("one", one)):
        got = cv2.imread(f"out/{name}.png", cv2.IMREAD_UNCHANGED)
        assert (got == image[y_min:y_max, x_min:x_max]).all()
    assert (cv2.imread("out/none.png", cv2.IMREAD_UNCHANGED) == none).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("masks --out out", "no images given: name files or folders"),
        ("masks nowhere --out out", "nowhere: no such file or folder"),
        ("crops empty --out out", "empty: contains no image"),
        ("masks in --out in/masks", "--out in/masks: is inside in, where its pictures would be read as radiographs"),
        ("masks in/a.png --out in", "--out in: in/a.png would be overwritten"),
        ("masks in --out other", "--out other: holds other files; name an empty or a new folder"),
        ("masks in other/a.jpg other/a.png --out out", "other/a.png: a second image named 'other/a'"),
        ("crops in --out w.safetensors", "w.safetensors: not a folder (--out)"),
        ("masks in --out out --device gpu", "--device 'gpu': choose auto, cpu, cuda or cuda:<n>"),
        ("masks in --out out --most-spread 0.1", "--most-spread: above 0, and with --spread"),
        ("masks in --out out --spread", "the spread needs further views (--tta) or networks (--weights A B)"),
        ("masks in --out out --tta turn", "invalid choice 'turn' for argument '--tta'."),
        ("masks other/bad.png --out out", "none of the images could be used"),
    ],
)
def test_refusals(line, said, command, tmp_path):
    write_chest(tmp_path / "in" / "a.png", 64, 64)
    write_chest(tmp_path / "other" / "a.png", 64, 64)
    (tmp_path / "other" / "bad.png").write_bytes(b"bad")
    (tmp_path / "empty").mkdir()
    if "a.jpg" in line:
        (tmp_path / "other" / "a.jpg").touch()
    done = command(line)
    assert done.status == 2 and done.errors[-1].startswith(f"error: {said}")
    assert all(line.startswith("left out: ") for line in done.errors[:-1])
    assert not list(tmp_path.glob("**/masks.csv.*")) and (tmp_path / "in" / "a.png").is_file()


def test_names_of_files(command, tmp_path):
    write_chest(tmp_path / "chest.png", 64, 64)
    odd = "R\udcf6ntgen bild"  # a byte that is not UTF-8
    for name in ("p1/view1.png", "p2/view1.png", f"p2/{odd}.png", f"p2/{'a' * 251}.png", "p2/.ipynb_checkpoints/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes((tmp_path / "chest.png").read_bytes())
    (tmp_path / "in" / "p2" / "gone.png").symlink_to("nowhere")
    (tmp_path / "in" / "p2" / "loop.png").symlink_to("loop.png")
    (tmp_path / "in" / f"1.{'2' * 253}").write_bytes(bytes(128) + b"DICM")
    done = command("masks in --out out")
    assert done.status == 4 and done.errors[-1] == "done, but 3 of the inputs could not be used; they are named above"
    ids = ["R%F6ntgen bild", "a" * 251, "p1/view1", "p2/view1"]
    assert sorted(read("out/masks.csv")["image_id"]) == ids and all(Path("out", f"{i}.png").is_file() for i in ids)
    problems = read("out/problems.csv")["problem"].tolist()
    assert problems[0].endswith(": the name is too long") and problems[1] == "in/p2/gone.png: no such file"
    assert len(problems) == 3 and problems[2].startswith("in/p2/loop.png: cannot be read")


def test_one_file_twice_is_one_image_and_a_missing_one_is_left_out(command, tmp_path):
    write_chest(tmp_path / "in" / "a.png", 64, 64)
    done = command("masks in in/a.png gone.png --out out")
    assert done.status == 4 and done.errors[0] == "left out: gone.png: no such file or folder"
    assert list(read("out/masks.csv")["image_id"]) == ["a"]


def test_the_report_is_a_page(command, folder, tmp_path):
    browser.chromium()
    assert command("masks in --out out").status == 4
    page = tmp_path / "out" / "report.html"
    assert browser.probe(page) == browser.probe(page, 390) == (0, 0, 3)


def test_the_command_itself(tmp_path, monkeypatch, capsys):
    from solutions.__main__ import main

    with pytest.raises(SystemExit) as end:
        main(["lung_segmentation", "crops", "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "--out PATH" in said and "Minimum share of the image" in said
