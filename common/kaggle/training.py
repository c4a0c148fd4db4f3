"""On Kaggle: a training within the hours and the disk of a notebook, continued from the last version's output."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from common.cli import STOPPED
from common.errors import InputError
from common.kaggle.bundle import NOTEBOOK_LIMIT
from common.kaggle.mounted import WORKING
from common.paths import KAGGLE_INPUT, read_json

log = logging.getLogger(__name__)
RESERVE = 0.25  # hours between a training's stop and the end, for what is left to do
LAST = 1 / 12  # hours that Kaggle has to save the output
ENDED = -1  # instead of a status
RUN = "run"  # its folder in the working one


def train_here(solution, preset, hours, options=(), working=WORKING, inputs=KAGGLE_INPUT):
    """Run a preset in this notebook, or continue it; returns True where it is finished.

    hours: the notebook's allowance; a training stops a quarter of an hour earlier with everything saved, and whatever
    else is at work is ended five minutes before the hours are over: files are written whole, so that is begun again. A
    notebook whose own last output is among its inputs goes on from there. On several GPUs it trains by torchrun.
    Decoded images lie outside the working folder, which Kaggle keeps as the output and limits. options: further words
    of the command line.
    Raises InputError where the run fails, or the output is above Kaggle's limit.
    """
    if not hours > RESERVE:
        raise InputError(f"hours must be above {RESERVE:g}, not {hours:g}")
    run = _begin(Path(working) / RUN, solution, preset, inputs)
    store = Path(tempfile.gettempdir()) / "stores"
    words = ["run", preset, "--out", str(run), "--store", str(store), "--hours", f"{hours - RESERVE:g}", *options]
    gpus = _gpus()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    log.info(f"{gpus} GPUs" + (", by torchrun" if launch else "") + f"; decoded images in {store}, not in the output")
    said = _log(run)
    status = _run([sys.executable, *launch, "-m", "solutions", solution, *words], 3600 * (hours - LAST))
    used = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    log.info(f"{run}: {used / 1e9:.2f} GB of {NOTEBOOK_LIMIT / 1e9:.0f} GB of output")
    if used > NOTEBOOK_LIMIT:
        raise InputError(f"{run}: {used / 1e9:.2f} GB are above the output's limit; name fewer --folds a version")
    # torchrun has one status for every end but success; what an earlier version said does not count
    if status in (STOPPED, ENDED) or (status and launch and "stopped: " in _log(run)[len(said) :]):
        log.info("not finished: save this version, add its output to the notebook's inputs and run it again")
        return False
    if status:
        raise InputError(f"{solution} {preset}: ended with status {status}; the reason stands above")
    return True


def _begin(run, solution, preset, inputs):
    """The run's folder: as it is, or a copy of the furthest earlier output of this preset among the inputs."""
    if (run / "config.json").is_file():
        return run
    found = []
    for config in Path(inputs).rglob("config.json"):
        about = read_json(config)
        if isinstance(about, dict) and (about.get("solution"), about.get("preset")) == (solution, preset):
            found.append((len(list(config.parent.glob("fold*/*/*"))), config.parent))
    if not found:
        log.info(f"{run}: a new run; no earlier output of {solution} {preset} is mounted")
        return run
    earlier = max(found)[1]
    shutil.copytree(earlier, run, dirs_exist_ok=True)
    for path in [run, *run.rglob("*")]:  # what Kaggle mounts is read-only
        os.chmod(path, path.stat().st_mode | 0o200)
    log.info(f"{run}: continues {earlier}")
    return run


def _log(run):
    path = run / "log.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _run(words, seconds):
    """The status of a program and its children, or ENDED where the time was over and it was told to stop."""
    process = subprocess.Popen(words, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        log.info("the hours are over: what is at work is ended")
    finally:
        for number, patience in ((signal.SIGTERM, 120), (signal.SIGKILL, None)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
    return ENDED


def _gpus():
    import torch

    return torch.cuda.device_count()
