"""Every solution under torchrun: several processes share the trainings and the images and leave the bytes of one."""

import os
import shutil
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


def launch(case, processes, sample, finished, folder, verb="run", nodes="--standalone", words=()):
    """Start a verb of a solution under torchrun in `folder` and return the process, the head of a session."""
    given = [case.name, verb, *case.words, "--data", sample, "--out", "run", "--store", finished / "stores", *words]
    return torchrun(processes, given, folder, nodes)


def torchrun(processes, words, folder, nodes="--standalone", program=("-m", "solutions")):
    argv = [sys.executable, "-m", "torch.distributed.run", *nodes.split(), "--nproc-per-node", str(processes)]
    argv += [*program, *map(str, words), "--device", "cpu"]
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


IN_BLOCKS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from solutions.__main__ import main
from solutions.lung_segmentation import segmenter
load, segmenter.BLOCK = segmenter.load_segmenter, 4
segmenter.load_segmenter = lambda *args: print("a segmenter in process", os.environ["RANK"]) or load(*args)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("solution", "more"),
    [("covid19", ""), ("chestxray14", ""), ("vinbigdata", "--members flip noise.lungs"), ("own", "--lungs crop")],
    indirect=["solution"],
)
def test_all_processes_find_the_lungs_that_prepare_needs(solution, more, sample, tmp_path, monkeypatch):
    (tmp_path / "blocks.py").write_text(IN_BLOCKS)
    words = [solution.name, "prepare", *solution.words, *more.split(), "--data", sample, "--out", "run"]
    said = output_of(torchrun(2, words, tmp_path, program=["blocks.py"]))
    assert all(f"a segmenter in process {rank}" in said for rank in (0, 1))
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert main([*map(str, words), "--device", "cpu"]) == 0
    assert list(tmp_path.glob("stores/*-lungs-*/lungs.parquet"))
    assert hash_files(tmp_path / "stores") == hash_files(tmp_path / "one" / "stores")
    assert hash_files(tmp_path / "run", but=BUT) == hash_files(tmp_path / "one" / "run", but=BUT)


@pytest.mark.long
@pytest.mark.parametrize("solution", ["covid19"], indirect=True)
def test_all_processes_audit_to_the_bytes_of_one(solution, finished, sample, run_copy, tmp_path, monkeypatch):
    shutil.copytree(run_copy, tmp_path / "one" / "run")
    output_of(launch(solution, 2, sample, finished, tmp_path, "audit"))
    monkeypatch.chdir(tmp_path / "one")
    words = ["--data", sample, "--out", "run", "--store", finished / "stores", "--device", "cpu"]
    assert main([*map(str, [solution.name, "audit", *solution.words, *words])]) == 0
    assert_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize("solution", ["lung_segmentation"], indirect=True)
@pytest.mark.parametrize("tool", ["masks", "crops"])
def test_all_processes_apply_the_lung_tools(solution, tool, sample, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number, path in enumerate([*sorted(sample.rglob("CHNCXR*.png"))[:9], Path(__file__)]):
        shutil.copy(path, tmp_path / "images" / f"{number}.png")  # the last one is no image
    words = [solution.name, tool, tmp_path / "images", "--device", "cpu", "--out"]
    process = torchrun(2, [*words, tmp_path / "two"], tmp_path)
    said = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 1 and said.count("9.png") == 1 and "exitcode  : 4" in said, said[-4000:]
    assert main([*map(str, words), str(tmp_path / "one")]) == 4
    assert hash_files(tmp_path / "two", but=BUT) == hash_files(tmp_path / "one", but=BUT)


@pytest.mark.long
@pytest.mark.parametrize("solution", ["siim_pneumothorax"], indirect=True)
def test_the_hours_and_an_error_end_prepare_in_one_line(solution, finished, sample, tmp_path):
    for words, line in (
        (["--hours", "1e-6"], "stopped: the 1e-06 hours are over"),
        (["--data", tmp_path / "none"], f"error: {tmp_path / 'none'}: no such folder"),
    ):
        process = launch(solution, 2, sample, finished, tmp_path, words=words)
        said = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 1 and said.count(line) == 1 and "gloo" not in said, said
    output_of(launch(solution, 2, sample, finished, tmp_path))
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
