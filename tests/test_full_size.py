"""The benchmark of whole challenges, at a fiftieth of their length."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.full_size import SETTINGS
from benchmarks.meter import Meter
from benchmarks.tables import label_table

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.skipif(label_table("siim-pneumothorax-train-rle.csv.gz") is None, reason="needs torchxrayvision")
@pytest.mark.parametrize("name", SETTINGS)
def test_killed_runs_of_stand_ins_end_with_the_same_bytes(name):
    command = [sys.executable, "-m", "benchmarks.full_size", name, "--share", "0.02"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "killed in train and predict, continued: the same" in done.stdout
    assert done.stdout.count(f"{name}: report") == 2


def test_the_meter_keeps_the_figures_that_it_prints(capsys):
    measure = Meter()
    assert measure("a sum", lambda: sum(range(10**6)), lambda result, _: f"is {result}") == 499999500000
    (wall, cpu, peak) = measure.rows["a sum"]
    assert wall > 0 and cpu > 0 and 0 < peak == measure.peak < 64
    assert "is 499999500000" in capsys.readouterr().out
