"""The command `new`: a skeleton that passes contract tests as it stands, in a copy of the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from solutions.__main__ import main

ROOT = Path(__file__).parents[1]
TESTED = "ends_with_a_valid or are_refused"  # of the contract tests


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("Mine", "'Mine': the name of a solution has lower-case letters"),
        ("covid19", "covid19: the name is taken"),
        ("mine --like siim", "--like siim: no such solution"),
    ],
)
def test_names_that_are_refused(words, said, capsys):
    assert main(["new", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_the_skeleton_of_a_challenge_passes_contract_tests(tmp_path):
    for name in ("solutions", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("common", "benchmarks", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)

    def python(*words):
        here = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path)}}
        return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, **here)

    assert python("solutions", "new", "mine", "--like", "rsna_pneumonia").returncode == 0
    assert "usage: cxr mine <verb>" in python("solutions", "mine", "--help").stdout
    tested = python(
        "pytest", "-p", "no:cacheprovider", "tests/solutions/test_contract.py", "-k", f"mine and ({TESTED})"
    )
    assert tested.returncode == 0 and "2 passed" in tested.stdout, tested.stdout
