"""One tiny sample and one finished run for all tests of the SIIM solution, and the command as a user gives it."""

import pytest

from benchmarks.kills import TINY
from common import recipe
from solutions.__main__ import main
from solutions.siim_pneumothorax.sample import make_sample
from tests.running import one_thread, refused, run_copy, say  # noqa: F401 - fixtures


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
def command(finished, tmp_path, monkeypatch, capsys):
    """`command("train", "--out", …)` in the test's folder: its status, printed text, and lines of standard error.

    The page takes longer than all the rest: only the verb `report` draws it.
    """
    monkeypatch.chdir(tmp_path)

    def run(*words):
        store = [] if "--store" in words else ["--store", finished / "stores"]
        with monkeypatch.context() as patch:
            if words[0] != "report":
                patch.setattr(recipe, "write_report", lambda job, report: None)
            return say(capsys, "siim_pneumothorax", *words, *store)

    return run
