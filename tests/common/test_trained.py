"""Trained folders: what is written, what is checked when one is opened, and the two tools around them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from common.config import file_hash
from common.errors import InputError
from common.infer import tools
from common.kaggle import Source
from common.paths import read_json, write_json
from common.runs import Run
from common.trained import Learnt, Trained

SOURCE = Source("competition", ("film-contest",), samples=("stage_2.csv", "sample_submission.csv"))


@dataclass(frozen=True)
class Config:
    store_size: int = 32
    folds: tuple[int, ...] = (0,)


@pytest.fixture
def run(tmp_path):
    """The folder of a run with two trainings; the weights are whatever bytes."""
    folder = tmp_path / "run"
    for stage in ("gate", "net-512"):
        path = folder / "fold3" / stage / "final.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(stage.encode())
    (folder / "extra.bin").write_bytes(b"more")
    write_json(folder / "config.json", {"solution": "films", "preset": "demo", "store_size": 16, "folds": [3]})
    write_json(folder / "manifest.json", {"git": "abc", "packages": {"torch": "9"}, "steps": {}})
    return folder


def learnt(context):
    weights = [context.run.path("fold3", stage, "final.safetensors") for stage in ("gate", "net-512")]
    score = {"estimate": 0.5, "low": 0.25, "high": 0.75}
    return Learnt(weights, {"rule": {"pixel": 0.5}}, "dice", score, "-1", {"extra.bin": context.run.path("extra.bin")})


export = tools.export_tool("films", Config, learnt)


@pytest.fixture
def trained(run, tmp_path):
    assert export(run, out=tmp_path / "trained") == 0
    return tmp_path / "trained"


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_all_that_is_needed_lies_flat_in_one_folder(trained, run):
    names = ["extra.bin", "fold3-gate.safetensors", "fold3-net-512.safetensors", "trained.json"]
    assert sorted(path.name for path in trained.iterdir()) == names
    about = read_json(trained / "trained.json")
    assert about.pop("files") == {name: file_hash(trained / name) for name in names[:3]}
    assert about == {
        "format": 1,
        "solution": "films",
        "preset": "demo",
        "config": {"store_size": 16, "folds": [3]},
        "git": "abc",
        "packages": {"torch": "9"},
        "score": {"metric": "dice", "estimate": 0.5, "low": 0.25, "high": 0.75},
        "neutral": "-1",
        "rule": {"rule": {"pixel": 0.5}},
    }
    shutil.rmtree(run)
    found = Trained.open(trained, "films")
    assert found.weights(3, "net-512").read_bytes() == b"net-512" and found.path("extra.bin").read_bytes() == b"more"
    assert (found.config, found.rule, found.neutral) == (about["config"], about["rule"], "-1")
    with pytest.raises(InputError, match="has no file fold0-gate"):
        found.weights(0, "gate")


def test_weights_are_linked_where_trainings_leave_them(trained, tmp_path):
    work = Run(tmp_path / "work")
    for _ in range(2):  # a link that is there gives way
        Trained.open(trained).link(work)
        assert work.path("fold3", "net-512", "final.safetensors").read_bytes() == b"net-512"
    assert {path.name for path in work.path("fold3").iterdir()} == {"gate", "net-512"}
    work.close()


def test_an_export_takes_the_place_of_an_earlier_one_alone(trained, run, tmp_path):
    (trained / "fold9-old.safetensors").write_bytes(b"old")
    about = read_json(trained / "trained.json")
    write_json(trained / "trained.json", about | {"files": about["files"] | {"fold9-old.safetensors": "0"}})
    export(run, out=trained)
    assert len(list(trained.iterdir())) == 4 and Trained.open(trained)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        export(run, out=tmp_path / "full")
    with pytest.raises(InputError, match="not a folder"):
        export(run, out=tmp_path / "full" / "thesis.txt")


def test_an_export_that_was_cut_off_is_no_trained_folder(trained, run, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(run, out=trained)
    with pytest.raises(InputError, match="not a trained folder"):
        Trained.open(trained)


def spoil_weights(folder):
    (folder / "fold3-gate.safetensors").write_bytes(b"gatf")


def lose_weights(folder):
    (folder / "extra.bin").unlink()


def change(**values):
    def spoil(folder):
        write_json(folder / "trained.json", read_json(folder / "trained.json") | values)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, "fold3-gate.safetensors: not the file that was exported"),
        (lose_weights, "extra.bin: missing"),
        (lambda folder: (folder / "trained.json").unlink(), "not a trained folder"),
        (lambda folder: (folder / "trained.json").write_text("{"), "not a JSON file"),
        (lambda folder: (folder / "trained.json").write_text("[]"), "not of format 1"),
        (change(format=2), "not of format 1, which this program reads, but 2"),
        (change(rule=None), "no rule"),
        (change(files={"../../etc/passwd": "0"}), "not a usable id"),
        (change(solution="games"), "what games has learnt, not films"),
    ],
)
def test_what_is_damaged_or_of_others_is_refused(trained, spoil, message):
    spoil(trained)
    with pytest.raises(InputError, match=message) as caught:
        Trained.open(trained, "films")
    assert str(trained) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "not the folder of a finished run"),
        ({"solution": "games"}, "not the configuration of a run of films"),
        ({"solution": "films", "colour": 1}, "unknown field 'colour'"),
    ],
)
def test_what_is_no_run_is_not_exported(tmp_path, values, message):
    if values:
        write_json(tmp_path / "other" / "config.json", values)
    with pytest.raises(InputError, match=message):
        export(tmp_path / "other", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- inference -----------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Three test images, one in a folder of its own, and the sample submission that names two of them."""
    for number, name in enumerate(("b/c", "b/a", "d")):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((8, 8), 10 * number, np.uint8))
    (tmp_path / "data" / "sample_submission.csv").write_text("id,value\nc,0\na,0\n")
    return tmp_path / "data"


def options(**given):
    return SimpleNamespace(**{"data": None, "test": None, **given})


def test_test_images_are_those_of_the_sample_submission_or_the_users(data, tmp_path, monkeypatch):
    def find(**given):
        folder, ids, files = tools.find_test(options(**given), SOURCE, ["id", "value"])
        assert list(files) == ids
        return folder, ids, [path.name for path in files.values()]

    assert find(data=data) == (data, ["c", "a"], ["c.png", "a.png"])
    assert find(test=data) == (data, ["a", "c", "d"], ["a.png", "c.png", "d.png"])
    (tmp_path / "names.csv").write_text("name\nd\n")
    assert find(data=data, test=tmp_path / "names.csv") == (data, ["d"], ["d.png"])
    (data / "stage_2.csv").write_text("id,value\nd,0\n")  # comes first
    assert find(data=data)[1] == ["d"]
    (data / "d.png").unlink()
    for given in ({"data": data}, {"data": data, "test": tmp_path / "names.csv"}):
        with pytest.raises(InputError, match="1 test images have no file, the first is d"):
            find(**given)


def test_without_a_sample_submission_all_its_names_are_said(tmp_path):
    with pytest.raises(InputError, match=r"no stage_2\.csv or sample_submission\.csv in it"):
        tools.find_test(options(data=tmp_path), SOURCE, ["id", "value"])
    with pytest.raises(InputError, match="no such folder"):
        tools.find_test(options(data=tmp_path / "none"), SOURCE, ["id", "value"])


def prepare(context, trained):
    folder, ids, files = tools.find_test(context.options, SOURCE, ["id", "value"])
    return SimpleNamespace(ids=ids, store=tools.test_store(context, folder, files))


def answer(context, data, trained, out):
    assert context.config == Config(16, (3,)) and data.store.images.shape[1:] == (16, 16)
    net = context.run.path("fold3", "net-512", "final.safetensors").read_bytes().decode()
    values = data.store.images.mean(axis=(1, 2))
    out.write_text("".join(f"{i},{net},{value:.0f}\n" for i, value in zip(data.ids, values, strict=True)))
    return f"{out}: fine"


infer = tools.infer_tool("films", Config, prepare, answer)


def test_inference_ends_with_a_submission_and_leaves_nothing_else(trained, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tools.tempfile, "tempdir", None)
    assert infer(trained, data=data, workers=0) == 0
    assert (tmp_path / "submission.csv").read_text() == "c,net-512,0\na,net-512,10\n"
    assert not list((tmp_path / "temporary").iterdir())
    monkeypatch.setattr(tools, "WORKING", tmp_path / "temporary")  # as on Kaggle
    assert infer(trained, data=data, workers=0, work=tmp_path / "work") == 0
    assert (tmp_path / "temporary" / "submission.csv").is_file() and list(tmp_path.glob("work/stores/*/images.npy"))
    (data / "b" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.png"):
        infer(trained, data=data, workers=0)
    assert infer(trained, data=data, workers=0, on_bad_image="placeholder") == 1  # image without a prediction


def test_unusable_options_are_refused(trained, run, data, tmp_path):
    for given, message in (
        ({"sizes": (Path("s.csv"),)}, "--sizes: films has no use"),
        ({"out": tmp_path}, "--out .*: a folder"),
        ({"work": run}, "--work .*: is a run"),
        ({"work": trained}, "--work .*: is a run or a trained folder"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"workers": -1}, "--workers must not be negative"),
    ):
        with pytest.raises(InputError, match=message):
            infer(trained, **{"data": data, "out": tmp_path / "s.csv", **given})
    assert not (tmp_path / "s.csv").exists()
    about = read_json(trained / "trained.json")
    write_json(trained / "trained.json", about | {"config": {"shop_size": 16}})
    with pytest.raises(InputError, match="unknown field 'shop_size'"):
        infer(trained, data=data)
