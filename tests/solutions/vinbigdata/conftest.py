"""One tiny sample and one finished run for all tests of VinBigData, and the command as a user gives it."""

import pytest
import torch

from common import recipe
from common.budget import Budget
from common.job import Job
from common.options import Options
from common.runs import Run
from solutions.__main__ import main
from solutions.vinbigdata.pipeline import SOLUTION
from solutions.vinbigdata.sample import make_sample
from tests.running import one_thread, refused, run_copy, say  # noqa: F401 - fixtures

TINY = """--store-size 96 --detector.architecture fcos --detector.weights none --detector.size 96 --detector.channels 64
    --detector.epochs 1 --detector.precision fp32 --members flip noise --healthy.weights none --healthy.size 64
    --healthy.epochs 1 --healthy.precision fp32 --workers 0""".split()  # noqa: SIM905 - as a user types them


@pytest.fixture(scope="session")
def tiny():
    """Options that make the preset demo as small as it can be: two folds, two detectors each, one epoch."""
    return TINY


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("vinbigdata") / "data", n_train=16, n_test=4)


@pytest.fixture(scope="session")
def finished(sample, tmp_path_factory):
    """Folder that holds a finished run, `run`, its `stores` and its `submissions`."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["vinbigdata", "run", "demo", "--data", str(sample), "--out", "run", *TINY]) == 0
    return root


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command("train", "--out", …)` in the test's folder; the page takes long: only the verb `report` draws it."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        with monkeypatch.context() as patch:
            if words[0] != "report":
                patch.setattr(recipe, "write_report", lambda job, report: None)
            return say(capsys, "vinbigdata", *words)

    return run


@pytest.fixture
def make_job(tmp_path):
    """`make_job(config, data, out, **options)`: what a verb gets; runs of one test share the store."""
    runs = []

    def make(config, data, out="run", **options):
        while runs:
            runs.pop().close()
        runs.append(Run(tmp_path / out))
        options = Options(**{"data": data, "out": tmp_path / out, "workers": 0} | options)
        device = torch.device("cpu")
        return Job("vinbigdata", "demo", config, options, runs[-1], device, Budget(None), recipe=SOLUTION)

    yield make
    for run in runs:
        run.close()
