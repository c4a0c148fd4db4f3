"""One tiny sample and one finished run for all tests of the SIIM solution, and the command as a user gives it."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kills import TINY
from solutions.__main__ import main
from solutions.siim_pneumothorax.sample import make_sample

BAR = re.compile(r"\d+%\||\d+it \[|it/s|s/it|image/s")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("siim") / "data", n_train=16, n_test=4)


@pytest.fixture(scope="session")
def finished(sample, tmp_path_factory):
    """Folder that holds a finished run of the preset demo, `run`, its `stores` and its `submissions`."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["siim_pneumothorax", "run", "demo", "--data", str(sample), "--out", "run", *TINY]) == 0
    return root


@pytest.fixture
def run_copy(finished, tmp_path):
    """A copy of the finished run, in a folder of the test's own."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def command(finished, tmp_path, monkeypatch, capsys):
    """`command("train", "--out", …)` in the test's folder: its status, printed text, and lines of standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        store = [] if "--store" in words else ["--store", str(finished / "stores")]
        status = main(["siim_pneumothorax", *map(str, words), *store])
        said = capsys.readouterr()
        errors = [line for line in re.split(r"[\r\n]+", said.err) if line.strip() and not BAR.search(line)]
        return SimpleNamespace(status=status, out=said.out, errors=errors)

    return run


@pytest.fixture
def refused(command):
    """`refused(*words)`: asserts that the command is refused in one line, and returns the line."""

    def run(*words):
        result = command(*words)
        assert result.status == 2 and len(result.errors) == 1, result
        assert result.errors[0].startswith("error: ")
        return result.errors[0]

    return run
