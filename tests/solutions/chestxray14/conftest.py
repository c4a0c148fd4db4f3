"""One tiny sample and one finished run for all tests of ChestX-ray14, and the command as a user gives it."""

import os
import shutil

import pytest

from common import recipe
from solutions.__main__ import main
from solutions.chestxray14.pipeline import SOLUTION
from solutions.chestxray14.sample import make_sample
from tests.running import one_thread, refused, run_copy, say  # noqa: F401 - fixtures
from tests.solutions.chestxray14.folders import folder, job  # noqa: F401 - fixtures

VIEW = """--{0}.backbone test_resnet --{0}.weights none --{0}.resize 64 --{0}.size 56 --{0}.epochs 1
    --{0}.batch-size 4 --{0}.precision fp32"""
TINY = f"""--store-size 64 --segmenter.crop-size 64 --segmenter.mask-size 16 --fusion.epochs 3 --fusion.batch-size 4
    --workers 0 {VIEW.format("whole")} {VIEW.format("lungs")}""".split()
PLAIN = ["--views", "whole", "--whole.attention", "False", "--whole.weighting", "False"]


@pytest.fixture(scope="session")
def tiny():
    """Options that make the preset demo as small as it can be: two folds, one epoch a view, three of the fusion."""
    return TINY


@pytest.fixture(scope="session")
def plain():
    """Options of a run that needs no lungs, which take longest."""
    return [*TINY, *PLAIN]


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("chestxray14") / "data", n_train=16, n_test=6)


@pytest.fixture(scope="session")
def finished(sample, tmp_path_factory):
    """Folder that holds a finished run of both views, weighted and fused, `run`, its `stores` and `submissions`."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        words = ["run", "demo", "--views", "both", "--data", str(sample), "--out", "run", *TINY]
        assert main(["chestxray14", *words]) == 0
    return root


@pytest.fixture
def data(sample, tmp_path):
    """A copy of the sample that may be spoilt; its files are links: to be replaced, not edited."""
    return shutil.copytree(sample, tmp_path / "data", copy_function=os.link)


@pytest.fixture
def command(finished, tmp_path, monkeypatch, capsys):
    """`command("train", "--out", …)` in the test's folder, on the finished run's stores.

    The page takes long: only the verb `report` draws it.
    """
    monkeypatch.chdir(tmp_path)

    def run(*words):
        is_verb = words[0] == "run" or words[0] in SOLUTION.verbs().keys() - {"localise"}
        store = ["--store", finished / "stores"] if is_verb and "--store" not in words else []
        with monkeypatch.context() as patch:
            if words[0] != "report":
                patch.setattr(recipe, "write_report", lambda job, report: None)
            return say(capsys, "chestxray14", *words, *store)

    return run
