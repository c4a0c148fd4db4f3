"""The command `cxr`: help without heavy imports, and names that mean one thing."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common import cli, kaggle
from solutions.__main__ import NAMES, load_solution, main

HELP = """
import contextlib, io, sys
from solutions.__main__ import NAMES, load_solution, main

lines = ["--help", "bundle --help"]
for name in NAMES:
    lines += [f"{name} {words}" for words in ("--help", "run demo --help", "train --help", "score podium --help")]
for line in lines:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        assert main(line.split()) == 0
    assert "usage: cxr" in printed.getvalue(), line
print(sorted({"torch", "numpy", "pandas", "scipy", "numba", "cv2", "albumentations", "matplotlib"} & set(sys.modules)))
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_one_verb_or_tool_and_has_a_function(name):
    config = importlib.import_module(f"solutions.{name}.config")
    own, verbs = getattr(config, "TOOLS", ()), (*cli.VERBS, *cli.MORE_VERBS, *getattr(config, "MORE_VERBS", ()))
    names = ["run", *verbs, *own, *cli.TOOLS, *kaggle.tool_names(config.KAGGLE)]
    assert len(names) == len(set(names)) and set(verbs) <= set(load_solution(name).verbs())
    assert set(own) == (set(importlib.import_module(f"solutions.{name}.tools").TOOLS) if own else set())


def test_what_is_no_solution(capsys):
    assert main(["siim"]) == 2
    assert capsys.readouterr().err == f"error: 'siim' is not a solution: {', '.join(NAMES)}\n"


def test_the_console_script_is_main(monkeypatch, capsys):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"cxr": "solutions.__main__:main"}
    monkeypatch.setattr(sys, "argv", ["cxr"])
    assert main() == 0 and capsys.readouterr().out.startswith("usage: cxr <name> <verb>")
