"""Trainings on Kaggle: the notebook that does one, its hours and its output, and how the next version goes on."""

import shutil
import sys
import time

import nbformat
import pytest

from common.errors import InputError
from common.kaggle import session
from common.kaggle.session import train_in_session
from common.paths import read_json, write_json
from solutions.__main__ import main


@pytest.fixture
def launched(monkeypatch):
    """What train_in_session starts; `act(words)` stands for it and returns its status."""
    said = []

    def stand(act, gpus=0):
        def run(words, seconds):
            said.append(words)
            return act(words)

        monkeypatch.setattr(session, "_run_for", run)
        monkeypatch.setattr(session, "_count_gpus", lambda: gpus)
        return said

    return stand


def earlier(folder, epochs, preset="paper"):
    """The output of an earlier version: a run with this many files of its trainings."""
    write_json(folder / "config.json", {"solution": "vinbigdata", "preset": preset})
    for number in range(epochs):
        (folder / "fold0" / "flip").mkdir(parents=True, exist_ok=True)
        (folder / "fold0" / "flip" / f"epoch{number}.safetensors").write_bytes(b"w")
    return folder


def test_a_new_run_stops_before_the_hours_are_over(launched, tmp_path):
    said = launched(lambda words: (tmp_path / "run").mkdir() or 0)
    assert train_in_session("vinbigdata", "paper", 9, ["--folds", "0"], tmp_path, tmp_path / "input")
    (words,) = said
    assert words[:5] == [sys.executable, "-m", "solutions", "vinbigdata", "run"]
    assert words[words.index("--hours") + 1] == "8.75" and words[-2:] == ["--folds", "0"]
    assert words[words.index("--out") + 1] == str(tmp_path / "run")
    assert not words[words.index("--store") + 1].startswith(str(tmp_path / "run"))  # no part of the output


def test_two_cards_train_by_torchrun(launched, tmp_path):
    said = launched(lambda words: (tmp_path / "run").mkdir() or 0, gpus=2)
    assert train_in_session("vinbigdata", "paper", 9, (), tmp_path, tmp_path / "input")
    assert said[0][1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_the_furthest_output_of_the_same_preset_goes_on(launched, tmp_path):
    earlier(tmp_path / "input" / "a" / "run", 2)
    far = earlier(tmp_path / "input" / "notebooks" / "me" / "b" / "run", 3)
    earlier(tmp_path / "input" / "c" / "run", 9, preset="podium")
    for path in far.rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222)
    launched(lambda words: session.STOPPED)
    assert not train_in_session("vinbigdata", "paper", 9, (), tmp_path / "working", tmp_path / "input")
    run = tmp_path / "working" / "run"
    assert len(list(run.glob("fold0/flip/*"))) == 3 and read_json(run / "config.json")["preset"] == "paper"
    (run / "fold0" / "flip" / "epoch0.safetensors").write_bytes(b"more")  # may be written
    (tmp_path / "input" / "d").mkdir()
    (tmp_path / "input" / "d" / "config.json").write_bytes(b"\xff{")  # whatever else is mounted
    assert not train_in_session("vinbigdata", "paper", 9, (), tmp_path / "working", tmp_path / "input")
    assert (run / "fold0" / "flip" / "epoch0.safetensors").read_bytes() == b"more"  # what is there is not replaced


def cut_off(source, *_, copyfile=shutil.copyfile, **options):
    if source.name.startswith(("epoch2", "config")):
        raise OSError("cut off")
    return copyfile(source, *_, **options)


def test_a_copy_that_was_cut_off_is_repeated(launched, tmp_path, monkeypatch):
    earlier(tmp_path / "input" / "run", 3)
    launched(lambda words: session.STOPPED)
    words = ("vinbigdata", "paper", 9, (), tmp_path / "working", tmp_path / "input")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cut off"):
        patch.setattr(session.shutil, "copyfile", cut_off)
        train_in_session(*words)
    run = tmp_path / "working" / "run"
    assert sorted(path.name for path in run.glob("fold0/flip/*")) == ["epoch0.safetensors", "epoch1.safetensors"]
    assert not train_in_session(*words)
    assert len(list(run.glob("fold0/flip/*"))) == 3 and read_json(run / "config.json")["preset"] == "paper"


@pytest.mark.parametrize(
    "line, stopped", [("stopped: the 8.75 hours are over. Everything is saved", True), ("error: no such file", False)]
)
def test_torchrun_has_one_status_for_a_stop_and_a_failure(launched, tmp_path, line, stopped):
    def act(words):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.txt").write_text(f"prepared\n{line}\n")
        return 1

    launched(act, gpus=2)
    if stopped:
        assert not train_in_session("vinbigdata", "paper", 9, (), tmp_path, tmp_path / "input")
    else:
        with pytest.raises(InputError, match="vinbigdata paper: ended with status 1"):
            train_in_session("vinbigdata", "paper", 9, (), tmp_path, tmp_path / "input")


def test_what_an_earlier_version_said_is_no_stop_of_this_one(launched, tmp_path):
    far = earlier(tmp_path / "input" / "run", 1)
    (far / "log.txt").write_text("stopped: the 8.75 hours are over. Everything is saved\n")
    launched(lambda words: 1, gpus=2)
    with pytest.raises(InputError, match="ended with status 1"):
        train_in_session("vinbigdata", "paper", 9, (), tmp_path / "working", tmp_path / "input")


def test_a_program_is_told_to_stop_when_its_time_is_over(tmp_path):
    assert session._run_for([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
    begun = time.monotonic()
    assert session._run_for([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) == session.TIMED_OUT
    assert time.monotonic() - begun < 30


def test_what_cannot_be_done(launched, tmp_path, monkeypatch):
    launched(lambda words: earlier(tmp_path / "run", 3) and 0)
    monkeypatch.setattr(session, "OUTPUT_LIMIT", 2)
    with pytest.raises(InputError, match="above the output's limit; name fewer --folds a version"):
        train_in_session("vinbigdata", "paper", 9, (), tmp_path, tmp_path / "input")
    with pytest.raises(InputError, match=r"hours must be above 0\.25, not 0\.2"):
        train_in_session("vinbigdata", "paper", 0.2, (), tmp_path, tmp_path / "input")


def test_the_notebook_and_what_kaggle_must_know(tmp_path, capsys):
    words = ["notebook", "--train", "paper", "--hours", "8.5"]
    assert main(["vinbigdata", *words, "--resume", "--dataset", "me/cxr-bundle", "--out", str(tmp_path)]) == 0
    book = nbformat.read(tmp_path / "training.ipynb", as_version=4)
    nbformat.validate(book)
    install, train = (cell.source for cell in book.cells if cell.cell_type == "code")
    assert "--no-index" in install and 'train_in_session("vinbigdata", "paper", 8.5, ())' in train
    about = read_json(tmp_path / "kernel-metadata.json")
    assert (about["enable_internet"], about["enable_gpu"]) == (False, True) and about["code_file"] == "training.ipynb"
    assert about["kernel_sources"] == [about["id"]] == ["me/vinbigdata-paper-training"]
    wrongs = {"name either --run": [], "'best' is not a preset of vinbigdata": ["--train", "best"]}
    wrongs |= {
        f"the verbs after training need: {hours}": ["--train", "paper", "--hours", hours]
        for hours in ("nan", "inf", "0")
    }
    for reason, wrong in wrongs.items():
        assert main(["vinbigdata", "notebook", *wrong]) == 2
        assert reason in capsys.readouterr().err
