"""Every solution under torchrun: several processes share the trainings and the images and leave the bytes of one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solutions.__main__ import main
from tests.running import VARYING, hash_files
from tests.solutions.contract import SOLUTIONS

ROOT = Path(__file__).parents[2]
BUT = (*VARYING, "report.html")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(case, processes, sample, finished, folder, verb="run", nodes="--standalone"):
    """Start a verb of a solution under torchrun in `folder` and return the process, the head of a session."""
    words = [case.name, verb, *case.words, "--data", sample, "--out", "run", "--store", finished / "stores"]
    return torchrun(processes, words, folder, nodes)


def torchrun(processes, words, folder, nodes="--standalone"):
    argv = [sys.executable, "-m", "torch.distributed.run", *nodes.split(), "--nproc-per-node", str(processes)]
    argv += ["-m", "solutions", *map(str, words), "--device", "cpu"]
    return subprocess.Popen(
        argv, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def output_of(process):
    text = process.communicate(timeout=900)[0].decode()
    assert process.returncode == 0, text[-4000:]
    return text


def assert_same(folder, finished):
    assert not list(folder.rglob("lease*")) and not list(folder.rglob("*.ckpt")) and not list(folder.rglob(".*tmp*"))
    assert hash_files(folder, but=BUT) == hash_files(finished / "run", but=BUT)


@pytest.mark.parametrize("solution", ["siim_pneumothorax"], indirect=True)
def test_two_processes_leave_what_one_leaves(solution, finished, sample, tmp_path):
    said = output_of(launch(solution, 2, sample, finished, tmp_path))
    assert said.count("valid submission") == 1
    assert_same(tmp_path / "run", finished)


@pytest.mark.long
@pytest.mark.parametrize("solution", SOLUTIONS, indirect=True)
def test_two_processes_infer_what_one_predicts(solution, finished, sample, tmp_path):
    assert main([solution.name, "export", str(finished / "run"), "--out", str(tmp_path / "trained")]) == 0
    words = [solution.name, "infer", tmp_path / "trained", "--data", sample, "--out", tmp_path / "answer.csv"]
    said = output_of(torchrun(2, words, tmp_path))
    assert said.count("valid submission") == 1
    assert (tmp_path / "answer.csv").read_bytes() == (finished / "run" / "submission.csv").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("solution", SOLUTIONS, indirect=True)
def test_any_number_of_processes_leaves_what_one_leaves(solution, finished, sample, tmp_path, processes):
    output_of(launch(solution, processes, sample, finished, tmp_path))
    assert_same(tmp_path / "run", finished)


@pytest.mark.long
@pytest.mark.parametrize("solution", SOLUTIONS, indirect=True)
def test_processes_killed_in_the_middle_continue_to_the_same_bytes(solution, finished, sample, tmp_path):
    process = launch(solution, 3, sample, finished, tmp_path)
    while not list(tmp_path.glob("run/fold*/*/history.csv")):  # a training is under way
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for each in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's children have sessions of their own
        if str(tmp_path).encode() in _read(each) or _works_in(each.parent, tmp_path):
            os.kill(int(each.parent.name), signal.SIGKILL)
    output_of(launch(solution, 2, sample, finished, tmp_path))
    assert_same(tmp_path / "run", finished)


@pytest.mark.long
@pytest.mark.parametrize("solution", ["siim_pneumothorax"], indirect=True)
def test_a_second_command_joins_the_trainings_of_a_run(solution, finished, sample, tmp_path):
    output_of(launch(solution, 1, sample, finished, tmp_path, "prepare"))
    both = [launch(solution, 2, sample, finished, tmp_path, "train") for _ in range(2)]
    said = [output_of(each) for each in both]
    assert sum("joining its trainings" in text for text in said) == 1
    output_of(launch(solution, 1, sample, finished, tmp_path))
    assert_same(tmp_path / "run", finished)


@pytest.mark.long
@pytest.mark.parametrize("solution", ["siim_pneumothorax"], indirect=True)  # four trainings for four processes
def test_two_machines_that_torchrun_connects_share_a_run(solution, finished, sample, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = f"--nnodes 2 --rdzv-backend c10d --rdzv-id {port} --rdzv-endpoint 127.0.0.1:{port}"
    for each in [launch(solution, 2, sample, finished, tmp_path, nodes=nodes) for _ in range(2)]:
        output_of(each)
    assert_same(tmp_path / "run", finished)


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _works_in(process, folder):
    try:
        return os.readlink(process / "cwd") == str(folder)
    except OSError:
        return False
