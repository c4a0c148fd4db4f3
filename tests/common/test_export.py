"""Exported folders: what they hold, what is checked when one is opened, and the two tools around them."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from common import export as exporting
from common.cli import VERBS
from common.config import file_hash
from common.errors import InputError
from common.export import export_tool, infer_tool
from common.paths import read_json, write_json
from common.runs import Run
from common.trained import Trained
from tests.toy import TOY, Config, make_job, write_data

export, infer = export_tool(TOY, Config), infer_tool(TOY, Config)
WEIGHTS = ["fold0-net.safetensors", "fold1-net.safetensors"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder with a finished run, `run`, and its `data`."""
    root = tmp_path_factory.mktemp("finished")
    write_data(root / "data")
    for name in [*VERBS][:-1]:
        job = make_job(root / "run", data=root / "data")
        TOY.verbs()[name](job)
        job.run.close()
    return root


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished / "run", tmp_path / "run")


@pytest.fixture
def data(finished, tmp_path):
    """The test images and the sample submission alone."""
    (tmp_path / "data").mkdir()
    for path in [finished / "data" / "sample_submission.csv", *(finished / "data").glob("i[01][0189].png")]:
        shutil.copy(path, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def exported(run, tmp_path):
    assert export(run, out=tmp_path / "exported") == 0
    return tmp_path / "exported"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"facts": None}, "facts is missing or not what `export` writes"),
        ({"score": None}, "score is missing or not"),
        ({"score": {"estimate": 1.0}}, "score: metric is missing or not"),
        ({"members": {"0": {}}}, "mixing: names is missing or not"),
        ({"members": []}, "members is missing or not"),
    ],
)
def test_a_changed_trained_json_is_refused_in_one_line(exported, change, said):
    write_json(exported / "trained.json", read_json(exported / "trained.json") | change)
    with pytest.raises(InputError, match=rf"trained\.json: {said}"):
        Trained.open(exported)


def test_the_command_has_no_folders(run, tmp_path):
    manifest = read_json(run / "manifest.json")
    write_json(run / "manifest.json", manifest | {"command": "toy run demo --data ~/siim/ --test=../b/c.csv --out a/b"})
    export(run, out=tmp_path / "exported")
    command = read_json(tmp_path / "exported" / "trained.json")["command"]
    assert command == "toy run demo --data siim/ --test=c.csv --out b"


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_an_export_holds_all_that_predicts_in_one_flat_folder(exported, run):
    assert sorted(path.name for path in exported.iterdir()) == [*WEIGHTS, "trained.json"]
    about, score = read_json(exported / "trained.json"), read_json(run / "score.json")["accuracy"]
    assert about["files"] == {name: file_hash(exported / name) for name in WEIGHTS}
    assert (about["format"], about["solution"], about["preset"], about["neutral"]) == (1, "toy", "demo", 0.5)
    assert about["score"] == {"metric": "accuracy", **score} and about["rule"] == read_json(run / "tuned.json")
    config = read_json(run / "config.json")
    assert about["config"] == {name: value for name, value in config.items() if name not in ("solution", "preset")}
    found = Trained.open(exported, "toy")
    assert (found.config, found.rule, found.files) == (about["config"], about["rule"], tuple(WEIGHTS))


def test_weights_are_linked_where_trainings_write_them(exported, run, tmp_path):
    work = Run(tmp_path / "work")
    for _ in range(2):  # an earlier link is replaced
        Trained.open(exported).link(work)
    work.close()
    for fold in (0, 1):
        linked, own = (folder / f"fold{fold}" / "net" / "final.safetensors" for folder in (tmp_path / "work", run))
        assert linked.read_bytes() == own.read_bytes()


def test_an_export_replaces_an_earlier_one_and_nothing_else(exported, run, tmp_path):
    (exported / "fold9-old.safetensors").write_bytes(b"old")
    about = read_json(exported / "trained.json")
    write_json(exported / "trained.json", about | {"files": about["files"] | {"fold9-old.safetensors": "0"}})
    export(run, out=exported)
    assert len(list(exported.iterdir())) == 3 and Trained.open(exported)
    for folder in (exported, tmp_path):
        (folder / ".cxr-0123abcd-77.tmp.safetensors").touch()  # left by a kill
    export(run, out=exported)
    assert len(list(exported.iterdir())) == 3 and (tmp_path / ".cxr-0123abcd-77.tmp.safetensors").exists()
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / ".cxr-0123abcd-78.tmp.json").touch()  # killed before trained.json was there
    export(run, out=tmp_path / "first")
    assert Trained.open(tmp_path / "first")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    for out, said in ((tmp_path / "full", "holds other files"), (tmp_path / "full" / "thesis.txt", "not a folder")):
        with pytest.raises(InputError, match=said):
            export(run, out=out)


def test_an_interrupted_export_is_incomplete_and_made_again(exported, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(run, out=exported)
    with pytest.raises(InputError, match="an incomplete export; run `export` again"):
        Trained.open(exported)
    export(run, out=exported)
    assert Trained.open(exported)


def change(**values):
    def spoil(folder):
        write_json(folder / "trained.json", read_json(folder / "trained.json") | values)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / WEIGHTS[0]).write_bytes(b"other"), "fold0-net.safetensors: not the file that was"),
        (lambda folder: (folder / WEIGHTS[1]).unlink(), "fold1-net.safetensors: missing"),
        (lambda folder: (folder / "trained.json").unlink(), "not an exported folder"),
        (lambda folder: (folder / "trained.json").write_text("{"), "not a JSON file"),
        (lambda folder: (folder / "trained.json").write_text("[]"), "format None, but this program reads format 1"),
        (change(format=2), "format 2, but this program reads format 1"),
        (change(rule=None), "rule is missing"),
        (change(files={"../../etc/passwd": "0"}), "not a usable id"),
        (change(solution="games"), "exported from a run of games, not toy"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(exported, spoil, said):
    spoil(exported)
    with pytest.raises(InputError, match=said) as caught:
        Trained.open(exported, "toy")
    assert str(exported) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, "not the folder of a finished run"),
        ({"solution": "games"}, "not the configuration of a run of toy"),
        ({"solution": "toy", "colour": 1}, "unknown field 'colour'"),
        ({"solution": "toy"}, "not prepared"),
    ],
)
def test_other_folders_are_not_exported(tmp_path, values, said):
    if values:
        write_json(tmp_path / "other" / "config.json", values)
    with pytest.raises(InputError, match=said):
        export(tmp_path / "other", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- inference -----------------------------------------------------------------------------------------------------


def test_inference_writes_the_submission_of_the_run_and_nothing_else(exported, run, data, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(exporting.tempfile, "tempdir", str(tmp_path / "temporary"))
    assert infer(exported, data=data, workers=0) == 0
    assert (tmp_path / "submission.csv").read_bytes() == (run / "submission.csv").read_bytes()
    assert not list((tmp_path / "temporary").iterdir())
    monkeypatch.setattr(exporting, "WORKING", tmp_path / "temporary")  # as on Kaggle
    assert infer(exported, data=data, workers=0, work=tmp_path / "work") == 0
    assert (tmp_path / "temporary" / "submission.csv").is_file() and list(tmp_path.glob("work/stores/*/images.npy"))


def test_inference_of_the_users_own_images(exported, data, tmp_path):
    (data / "i09.png").write_bytes(b"")
    (data / "sample_submission.csv").unlink()
    with pytest.raises(InputError, match=r"i09\.png"):
        infer(exported, test=data, workers=0)
    assert infer(exported, test=data, workers=0, on_bad_image="placeholder") == 1  # image without a prediction
    rows = pd.read_csv(tmp_path / "submission.csv").set_index("id")["bright"]
    assert rows.index.tolist() == sorted(path.stem for path in data.iterdir()) and rows["i09"] == 0.5


def test_options_that_cannot_be_used(exported, run, data, tmp_path):
    for given, said in (
        ({"sizes": (Path("s.csv"),)}, "--sizes does not apply to toy"),
        ({"out": tmp_path}, "--out .*: a folder"),
        ({"out": tmp_path / "names.csv", "test": tmp_path / "names.csv"}, "--out .*: is an input"),
        ({"work": run}, "--work .*: is a run"),
        ({"work": exported}, "--work .*: is a run or an exported folder"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"workers": -1}, "--workers must not be negative"),
    ):
        with pytest.raises(InputError, match=said):
            infer(exported, **{"data": data, "out": tmp_path / "s.csv", **given})
    write_json(exported / "trained.json", read_json(exported / "trained.json") | {"config": {"shop_size": 16}})
    with pytest.raises(InputError, match="unknown field 'shop_size'"):
        infer(exported, data=data)
    assert not (tmp_path / "s.csv").exists()


# ---- ONNX ----------------------------------------------------------------------------------------------------------


def test_onnx_files_predict_the_same_submission(run, data, tmp_path, monkeypatch, caplog):
    pytest.importorskip("onnxscript", reason="pip install -e '.[onnx]'")
    caplog.set_level("INFO", "common")
    exported = tmp_path / "exported"
    export(run, out=exported, onnx=True)
    files = read_json(exported / "trained.json")["files"]
    assert sorted(files) == sorted([*WEIGHTS, *(name.replace("safetensors", "onnx") for name in WEIGHTS)])
    assert caplog.text.count("equal to torch within") == 2
    infer(exported, data=data, workers=0)
    assert "fold0/net: torch " in caplog.text and "fold1/net: torch " in caplog.text
    own, found = (pd.read_csv(folder / "submission.csv") for folder in (run, tmp_path))
    assert (own["id"] == found["id"]).all() and (own["bright"] - found["bright"]).abs().max() < 1e-4
    export(run, out=exported)
    assert sorted(path.name for path in exported.iterdir()) == [*WEIGHTS, "trained.json"]


def test_detectors_have_no_onnx_file(run, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "common")
    monkeypatch.setattr(exporting, "require_extra", lambda *_: None)
    monkeypatch.setattr(exporting, "Detector", torch.nn.Module)
    export(run, out=tmp_path / "exported", onnx=True)
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == [*WEIGHTS, "trained.json"]
    assert "fold0-net.onnx: not written, since" in caplog.text
