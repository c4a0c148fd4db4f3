"""One tiny sample and one finished run for all tests of lung segmentation, and the command as a user gives it."""

import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from solutions.__main__ import main
from solutions.lung_segmentation import pipeline
from solutions.lung_segmentation.sample import make_sample

MOVES = re.compile(r"\x1b\[[A-Z]")  # of the cursor, by bars below bars
BAR = re.compile(r"\d+%\||\d+it \[|it/s|s/it|image/s")
TINY = """--store-size 64 --n-folds 2 --folds 0 1 --validation 0.2 --network.architecture plain --network.encoder=
    --network.weights none --network.decoder 4 8 --network.size 32 --network.epochs 2 --network.batch-size 2
    --network.lr 0.02 --network.precision fp32 --network.window 2""".split()  # noqa: SIM905 - as a user types them


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """Options that make the preset demo as small as it can be: two folds, a network of 2,000 weights."""
    return TINY


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("lungs") / "data", n_montgomery=4, n_shenzhen=8, n_jsrt=0, n_test=2)


@pytest.fixture(scope="session")
def finished(sample, tmp_path_factory):
    """Folder that holds a finished run, `run`, its `stores` and its `submissions`; trained for a little longer."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        words = ["run", "demo", "--data", str(sample), "--out", "run", *TINY, "--network.epochs", "8"]
        assert main(["lung_segmentation", *words]) == 0
    return root


@pytest.fixture
def run_copy(finished, tmp_path):
    """A copy of the finished run, in a folder of the test's own."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def data(sample, tmp_path):
    """A copy of the sample that may be spoilt; its files are links: to be replaced, not edited."""
    return shutil.copytree(sample, tmp_path / "data", copy_function=os.link)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("train", "--out", …)` in the test's folder: its status, printed text, and lines of standard error.

    The page takes longer than all the rest: only the verb `report` draws it.
    """
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            if words[0] != "report":
                patch.setattr(pipeline, "write_report", lambda context, data: None)
            status = main(["lung_segmentation", *map(str, words)])
        said = capsys.readouterr()
        lines = re.split(r"[\r\n]+|(?=error: )", MOVES.sub("", said.err))
        errors = [line.strip() for line in lines if line.strip() and not BAR.search(line)]
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
