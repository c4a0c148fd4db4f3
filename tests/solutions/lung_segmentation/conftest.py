"""One tiny sample and one finished run for all tests of lung segmentation, and the command as a user gives it."""

import os
import shutil

import numpy as np
import pytest

from common import recipe
from common.paths import read_json
from solutions.__main__ import main
from solutions.lung_segmentation.sample import make_sample
from tests.running import one_thread, refused, run_copy, say  # noqa: F401 - fixtures

TINY = """--store-size 64 --n-folds 2 --folds 0 1 --validation 0.2 --network.architecture plain --network.encoder=
    --network.weights none --network.decoder 4 8 --network.size 32 --network.epochs 2 --network.batch-size 2
    --network.lr 0.02 --network.precision fp32 --network.window 2""".split()  # noqa: SIM905 - as a user types them


def stored_masks(run):
    """The masks of a run's images at the store's size, by store row."""
    return np.load(read_json(run / "manifest.json")["steps"]["prepare"]["arrays"]["masks"])


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
        with monkeypatch.context() as patch:
            if words[0] != "report":
                patch.setattr(recipe, "write_report", lambda job, report: None)
            return say(capsys, "lung_segmentation", *words)

    return run
