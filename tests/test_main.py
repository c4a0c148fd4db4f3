"""The command `cxr`: help without heavy imports, and names that mean one thing."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from common import cli, kaggle
from common.nn import weights
from common.options import SPECIAL
from common.report import page
from solutions import demo
from solutions.__main__ import NAMES, load_solution, main

WHERE = ("out of fold", "hidden test labels")
HELP = """
import contextlib, io, sys
from solutions.__main__ import NAMES, load_solution, main

lines = ["--help", "bundle --help", "demo --help"]
for name in NAMES:
    lines += [f"{name} {words}" for words in ("--help", "run demo --help", "train --help", "score podium --help")]
    lines += [f"{name} {words} --help" for words in ("score", "find_lr", "predict demo")]
lines.append("covid19 audit --help")
for line in lines:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        assert main(line.split()) == 0
    assert printed.getvalue().startswith("usage: cxr " + line.removesuffix("--help").strip()), line
print(sorted({"torch", "numpy", "pandas", "scipy", "numba", "cv2", "albumentations", "matplotlib"} & set(sys.modules)))
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_one_verb_or_tool_and_has_a_function(name):
    config = importlib.import_module(f"solutions.{name}.config")
    own, verbs = getattr(config, "TOOLS", {}), (*cli.VERBS, *cli.MORE_VERBS, *getattr(config, "MORE_VERBS", ()))
    names = ["run", *verbs, *own, *cli.TOOLS, *kaggle.tool_names(config.KAGGLE)]
    assert len(names) == len(set(names)) and set(verbs) <= set(load_solution(name).verbs())
    assert set(own) == (set(importlib.import_module(f"solutions.{name}.tools").TOOLS) if own else set())


@pytest.mark.parametrize("name", NAMES)
def test_help_of_every_verb_preset_and_tool(name, capsys):
    config = importlib.import_module(f"solutions.{name}.config")
    assert main([name, "--help"]) == 0
    overview = dict(re.findall(r"^  (\w+) +(\S.*)$", capsys.readouterr().out, re.M))
    tools = cli._tool_names(config)
    verbs = ["run", *(verb for verb in load_solution(name).verbs() if verb not in tools)]
    assert set(overview) == {*verbs, *config.PRESETS, *tools} and set(config.ABOUT) <= set(config.PRESETS)
    assert len(overview) == len(verbs) + len(config.PRESETS) + len(tools)
    special = {f"--{option.replace('_', '-')}" for option in set(SPECIAL) - set(config.TAKES)}
    for words in (*([verb] for verb in verbs), ["train", "demo"], *([tool] for tool in tools)):
        with pytest.raises(SystemExit) as end:
            main([name, *words, "--help"])
        said = capsys.readouterr().out
        assert end.value.code == 0 and said.startswith(f"usage: cxr {name} {' '.join(words)} "), words
        options = set(re.findall(r"--[a-z][\w-]*", said.split("\n\n", 1)[1]))
        assert words[0] == "score_predictions" or not options & special, words  # it has an --id-map of its own
        assert ("--fold-table" in options) == (words[0] in ("run", "prepare"))
        assert words[0] not in ("score", "tune", "submit") or options - {"--help"} == {"--out", "--config", "--hours"}
        if words[0] in verbs:
            assert overview[words[0]][1:].split(",")[0] in " ".join(said.split())


@pytest.mark.parametrize("name", NAMES)
def test_comment_lines_in_a_configuration_are_no_help(name, capsys):
    source = Path(importlib.import_module(f"solutions.{name}.config").__file__)
    lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    comments = [line[2:] for line in lines if line.startswith("# ")]  # one beside a field is that field's help
    with pytest.raises(SystemExit):
        main([name, "train", "podium", "--help"])
    said = re.sub(r"[│|\s]+", " ", capsys.readouterr().out)
    assert [comment for comment in comments if len(comment) > 20 and comment[:40] in said] == []


OPTIONS = {  # of the first network that the preset `paper` trains
    "siim_pneumothorax": "classifier",
    "lung_segmentation": "network",
    "vinbigdata": "detector",
    "rsna_pneumonia": "detector",
    "chestxray14": "whole",
    "covid19": "network",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_are_asked_for_before_anything_is_read(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "_find_cached", lambda config: None)
    monkeypatch.setattr(weights, "_is_reachable", lambda config: False)
    words, option = [name, "prepare", "paper", "--data", str(tmp_path)], f"--{OPTIONS[name]}.weights"
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert f"cannot be fetched; give {option} a file, or none to start" in capsys.readouterr().err
    assert main([*words, option, "x.pth", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option} x.pth: no such file")
    found = [OPTIONS[name], *(["segmenter"] if name == "siim_pneumothorax" else [])]
    found += {"vinbigdata": ["healthy"], "rsna_pneumonia": ["gate"]}.get(name, [])
    none = [word for section in found for word in (f"--{section}.weights", "none")]
    assert main([*words, *none, "--out", str(tmp_path / "run")]) == 2  # now the data
    assert ".weights" not in capsys.readouterr().err


def test_what_is_no_solution(capsys):
    assert main(["siim"]) == 2
    assert capsys.readouterr().err == f"error: 'siim' is not a solution: {', '.join(NAMES)}\n"


def test_the_index_of_the_demo_names_scores_in_words(tmp_path):
    figure = {"estimate": 0.125, "low": 0.1, "high": 0.2}
    hidden = {name: {"metric": name, "value": 0.25, "nothing": 0.0} for name in ("map", "auroc", "dice")}
    demo._write_index(tmp_path, [("one", f"of {name}", {name: figure}, hidden[name]) for name in hidden], False)
    labels = re.findall('<div class="label">([^<]*)</div>', (tmp_path / "index.html").read_text())
    assert labels == [f"{name}, {where}" for name in ("mAP", "AUROC", "Dice") for where in WHERE]
    assert {load_solution(name).metric for name in NAMES} <= set(hidden)


def test_the_index_of_the_demo_has_pictures_and_the_notebook_as_a_page(tmp_path):
    pictures = [page.figure(b"\xff\xd8\xff" + name.encode(), name) for name in ("worst", "best", "second", "third")]
    sections = [page.section("Worst errors", pictures[0]), page.section("Pictures", *pictures[1:])]
    (tmp_path / "one").mkdir()
    page.write_page(tmp_path / "one" / "report.html", "t", "s", sections)
    cells = [new_markdown_cell("# About `it`"), new_code_cell("print(1)", outputs=[new_output("stream", text="<1>")])]
    (tmp_path / "kaggle").mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / "kaggle" / "executed.ipynb")
    hidden = {"metric": "dice", "value": 0.25, "nothing": 0.0}
    demo._write_index(tmp_path, [("one", "One", {"dice": {"estimate": 0.5, "low": 0.4, "high": 0.6}}, hidden)], True)
    index = (tmp_path / "index.html").read_text()
    assert re.findall("<figcaption>([^<]*)<", index) == ["best", "second"]
    assert 'href="kaggle/executed.html"' in index and 'href="kaggle/executed.ipynb"' in index
    notebook = (tmp_path / "kaggle" / "executed.html").read_text()
    assert "<code>it</code>" in notebook and "&lt;1&gt;" in notebook and "<script" not in notebook


def test_the_console_script_is_main(monkeypatch, capsys):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"cxr": "solutions.__main__:main"}
    monkeypatch.setattr(sys, "argv", ["cxr"])
    assert main() == 0 and capsys.readouterr().out.startswith("usage: cxr <name> <verb>")


TALKS = """
import logging, sys
from solutions import __main__ as solutions

def say():
    for number in range(2000):
        logging.getLogger("common.test").info(f"line {number}")

solutions.cli.kaggle.tool_names = lambda source: {"say": ""}
solutions._load_tools = lambda name, config, tool, argv: {"say": say}
sys.exit(solutions.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("line", ["--help", "siim_pneumothorax run podium --help", "siim_pneumothorax say"])
def test_a_closed_pipe_ends_quietly(line, unbuffered):
    command = [sys.executable, "-c", TALKS, *line.split()]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 3


def test_demo_reports_an_impossible_folder_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'}")


def test_demo_refuses_other_options(capsys):
    for line in (["demo", "--out", "x"], ["demo", "a", "b"]):
        assert main(line) == 2
        assert capsys.readouterr().err.startswith("usage: cxr demo [folder]\n")


@pytest.mark.parametrize("name", NAMES)
def test_every_solution_has_a_model_card_with_a_task_of_the_hub(name):
    card = importlib.import_module(f"solutions.{name}.config").CARD
    tasks = ("image-classification", "image-segmentation", "object-detection")
    assert card.task in tasks and card.data and card.licence


def test_push_and_pull_are_commands(tmp_path, capsys):
    assert main(["push", str(tmp_path), "--repo", "you/name"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: not an exported folder (no trained.json)")
    assert main(["pull", "name", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: 'name': name a repository of the hub as you/name\n"
