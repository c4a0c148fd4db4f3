"""What the tests of VinBigData share."""

import pytest
import torch

from common.budget import Budget
from common.job import Job
from common.options import Options
from common.runs import Run
from solutions.vinbigdata.pipeline import SOLUTION


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
