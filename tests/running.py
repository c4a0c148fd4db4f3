"""What the tests of whole runs share: the command as a user gives it, and what it left and touched."""

import hashlib
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from solutions.__main__ import main

MOVES = re.compile(r"\x1b\[[A-Z]")  # of the cursor, by bars below bars
BAR = re.compile(r"\d+%\||\d+it \[|it/s|s/it|image/s")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_copy(finished, tmp_path):
    """A copy of the finished run, in a folder of the test's own."""
    return shutil.copytree(finished / "run", tmp_path / "run")


@pytest.fixture
def refused(command):
    """`refused(*words)`: asserts that the command is refused in one line, and returns the line."""

    def run(*words):
        result = command(*words)
        assert result.status == 2 and len(result.errors) == 1, result
        assert result.errors[0].startswith("error: ")
        return result.errors[0]

    return run


def say(capsys, *words):
    """Give the command `python -m solutions <words>`: its status, printed text, and lines of standard error."""
    capsys.readouterr()
    status = main(list(map(str, words)))
    said = capsys.readouterr()
    lines = re.split(r"[\r\n]+|(?=error: )", MOVES.sub("", said.err))
    errors = [line.strip() for line in lines if line.strip() and not BAR.search(line)]
    return SimpleNamespace(status=status, out=said.out, errors=errors)


def prints(run, but=()):
    """SHA-256 of every file of a run but its log and those named."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name not in ("log.txt", ".lock", *but))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def times(run, *patterns):
    """When each file of these patterns was written, ns."""
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in sorted(run.glob(pattern))}
