"""Other systems: Windows, macOS, terminals that are not UTF-8, folders that cannot be written."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from common import jit

WINDOWS = """
import runpy, sys

sys.platform, sys.modules["fcntl"], sys.modules["resource"] = "win32", None, None
runpy.run_module("solutions", run_name="__main__")
"""
MACOS = """
import os, sys
from pathlib import Path

del os.sched_getaffinity
from common.data.store import prepare_store
from common.processes import cores

files = {path.stem: path for path in sorted(Path("in").iterdir())}
table = prepare_store(files, Path("store"), 8, None, "placeholder", {"hole"}, progress=False).table
print(table["ok"].tolist(), cores())
"""
TALKS = """
from solutions.__main__ import main

main(["--help"])
print("100 × 40 · α")
"""


def python(code, cwd, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def test_windows_gets_one_line():
    done = python(WINDOWS, ".")
    assert (
        done.returncode == 2
        and done.stderr == "error: cxr needs Linux or macOS; on Windows, install and run it inside WSL\n"
    )


def test_images_are_read_without_what_macos_lacks(tmp_path):
    (tmp_path / "in").mkdir()
    data = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))[1].tobytes()
    (tmp_path / "in" / "a.jpg").write_bytes(data)
    (tmp_path / "in" / "hole.jpg").write_bytes(data[:1500] + bytes(500) + data[2000:])
    done = python(MACOS, tmp_path, PYTHONPATH=os.getcwd())
    assert done.stdout.splitlines()[-1] == f"[True, False] {os.cpu_count()}", done.stderr
    assert "Corrupt JPEG data" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    ("encoding", "line"), [("ascii", b"100 \\xd7 40 \\xb7 \\u03b1"), ("latin-1", b"100 \xd7 40 \xb7 \\u03b1")]
)
def test_what_a_terminal_cannot_print_is_escaped(encoding, line):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", TALKS], env=env, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == line


def test_functions_are_compiled_where_no_cache_can_be_written(monkeypatch):
    def njit(**options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available for file")
        return lambda function: (function, options)

    monkeypatch.setattr(jit, "njit", njit)
    assert jit.compiled(len) == (len, {"nogil": True})
    assert jit.compiled(error_model="numpy")(len) == (len, {"nogil": True, "error_model": "numpy"})
