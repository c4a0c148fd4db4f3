"""The folder of a run: its lock, its finished steps, and its log."""

import json
import logging
import os
import signal
import sys
import time

import pytest

from common.config import digest, from_dict
from common.errors import InputError
from common.runs import FINISHED, PACKAGES, Run, coloured, git_revision, package_versions, start_log
from solutions.siim_pneumothorax.config import DEMO, Config


def test_a_run_is_locked_until_it_is_closed(tmp_path):
    first = Run(tmp_path / "run")
    first.record("prepare", 1)
    with pytest.raises(InputError, match="another process is working in this run"):
        Run(tmp_path / "run")
    first.close()
    Run(tmp_path / "run").close()


@pytest.mark.filterwarnings("ignore:This process")  # of forks beside threads
def test_processes_that_a_run_forked_do_not_keep_its_lock(tmp_path):
    first = Run(tmp_path / "run")
    first.record("prepare", 1)
    begun, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, b".")
        time.sleep(30)
        os._exit(0)
    os.read(begun, 1)
    first.close()
    second = Run(tmp_path / "run")
    assert not second.joined and os.waitpid(child, os.WNOHANG) == (0, 0)  # while the child lives
    second.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_new_folder_without_results_is_removed(tmp_path):
    run = Run(tmp_path / "run")
    run.path("log.txt").write_text("a line\n")
    run.close()
    assert not (tmp_path / "run").exists()
    Run(tmp_path / "runs" / "of" / "mine").close()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "kept").mkdir()
    Run(tmp_path / "kept" / "run").close()
    assert list((tmp_path / "kept").iterdir()) == []
    run = Run(tmp_path / "run")
    run.record("prepare", 1)
    run.close()
    assert (tmp_path / "run" / "manifest.json").is_file()
    (tmp_path / "users").mkdir()
    Run(tmp_path / "users").close()  # was there before
    assert (tmp_path / "users").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"not a folder \(--out\)"):
        Run(tmp_path / "file")


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    ours = ("run/.cxr-0123abcd-77.tmp.npy", "run/fold0/s/.cxr-0123abcd-77.tmp.ckpt", "run/manifest.json")
    for name in (*ours, "run/fold0/s/last.ckpt", "run/.mine.tmp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    Run(tmp_path / "run").close()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"run/fold0/s/last.ckpt", "run/.mine.tmp", "run/.lock", "run/manifest.json"}
    (tmp_path / "run" / "manifest.json").unlink()
    (tmp_path / "run" / ".lock").unlink()
    with pytest.raises(InputError, match="no folder can be created there"):
        Run("/proc/x")
    with pytest.raises(InputError, match="holds other files and no run"):
        Run(tmp_path / "run")
    assert (tmp_path / "run" / ".mine.tmp").is_file() and not (tmp_path / "run" / ".lock").exists()


def test_steps(tmp_path):
    run = Run(tmp_path)
    assert run.manifest == {} and run.step("tune") is None
    run.record("tune", ["key", 1], score=0.5)
    run.record("score", 2)
    assert run.step("tune")["score"] == 0.5 and run.step("tune")["key"] == digest(["key", 1])
    run.record("tune", "other")
    assert list(run.manifest["steps"]) == ["score", "tune"] and run.step("tune")["key"] == digest("other")
    run.forget("tune")
    run.forget("tune")
    assert list(run.manifest["steps"]) == ["score"]
    run.close()


@pytest.mark.parametrize("content", ["[]", '{"steps": []}', "{", ""])
def test_a_damaged_manifest(content, tmp_path):
    run = Run(tmp_path)
    run.path("manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json: not "):
        run.step("tune")
    run.close()


def test_versions_and_configuration_are_recorded(tmp_path):
    run = Run(tmp_path)
    run.record("prepare", 1)
    run.path("labels.csv").write_text("a")
    run.describe(7, [run.path("labels.csv")])
    run.write_config("siim_pneumothorax", "demo", DEMO)
    manifest = run.manifest
    assert manifest["seed"] == 7 and "prepare" in manifest["steps"]
    assert manifest["inputs"][str(run.path("labels.csv"))].startswith("ca978112ca1bbdca")  # SHA-256 of "a"
    assert manifest["packages"] == package_versions() and {"torch", "timm"} <= set(package_versions()) <= set(PACKAGES)
    assert manifest["git"] == git_revision()
    stored = json.loads(run.path("config.json").read_text())
    assert (stored.pop("solution"), stored.pop("preset")) == ("siim_pneumothorax", "demo")
    assert from_dict(Config, stored) == DEMO
    run.close()


def test_log(tmp_path, capfd):
    log = logging.getLogger("common.something")
    start_log(tmp_path / "log.txt")
    log.info("a figure")
    log.error("a refusal")  # the command line prints it itself
    start_log()
    log.info("after it")
    out, err = capfd.readouterr()
    assert out == "a figure\nafter it\n" and err == ""
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == ["a figure", "a refusal"] and lines[0][4] == "-"


def test_colours_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured("text", "red", sys.stderr) == "text"  # captured, no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    start_log()
    log = logging.getLogger("common.something")
    log.info("plain")
    log.warning("careful")
    log.info("done", extra=FINISHED)
    monkeypatch.setenv("NO_COLOR", "1")
    log.warning("careful")
    start_log()
    assert capsys.readouterr().out == "plain\n\x1b[33mcareful\x1b[0m\n\x1b[32mdone\x1b[0m\ncareful\n"


def test_a_full_disk_does_not_flood_the_terminal(tmp_path, capfd):
    start_log("/dev/full")
    logging.getLogger("common.something").info("a figure")
    start_log()
    out, err = capfd.readouterr()
    assert out == "a figure\n" and err == ""
