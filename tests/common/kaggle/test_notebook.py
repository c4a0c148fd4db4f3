"""`notebook`: what it writes, its way to Kaggle with the real client, and that the tests' machine has no network."""

import ast
import json
import re
import socket
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

from common import kaggle
from common.errors import InputError
from common.kaggle import rehearse
from common.kaggle.bundle import DATASET
from common.kaggle.notebook import write_training_notebook
from common.paths import read_json
from solutions.__main__ import main
from tests import notebooks
from tests.notebooks import DEMOS, source_of


def read_book(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    return book


@pytest.mark.parametrize("name", DEMOS)
def test_the_notebooks_of_the_repository_are_up_to_date_and_executed(name, tmp_path):
    notebooks.write_notebooks(tmp_path)
    kept, made = notebooks.NOTEBOOKS / name, tmp_path / name
    file = "training.ipynb" if name == "training" else "inference.ipynb"
    assert sorted(path.name for path in kept.iterdir()) == sorted([file, "kernel-metadata.json"])
    assert (kept / "kernel-metadata.json").read_text() == (made / "kernel-metadata.json").read_text()
    book, fresh = read_book(kept / file), read_book(made / file)
    assert [cell.source for cell in book.cells] == [cell.source for cell in fresh.cells], (
        "run `python -m tests.notebooks`"
    )
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) == (2 if name == "training" else 3) and all(cell.outputs for cell in code)
    assert all(len(line) <= 140 for cell in code for line in cell.source.splitlines())
    assert "--no-index" in code[0].source and "/kaggle/input" in code[0].source
    said = (kept / file).read_text()
    assert (
        not re.search("CompletedProcess|Warning|/tmp/(?!stores)|Traceback", said)
        and "A template" in book.cells[0].source
    )
    assert "wheels installed" in notebooks.read_output(book)
    if name == "training":
        assert "epoch" in notebooks.read_output(book) and "valid submission" in notebooks.read_output(book)
    else:
        assert "valid submission: /kaggle/working/submission.csv" in notebooks.read_output(book)
        assert str(code[2].outputs).count("data:image/jpeg;base64,") == 4


def test_the_committed_gallery_of_siim_shows_the_largest_masks_first():
    book = read_book(notebooks.NOTEBOOKS / "siim_pneumothorax" / "inference.ipynb")
    shares = [float(share) for share in re.findall(r": (\d+\.\d+)% of the image", str(book.cells[-1].outputs))]
    assert len(shares) >= 4 and shares == sorted(shares, reverse=True) and shares[0] > 0


@pytest.mark.parametrize(
    "solution, competitions, datasets",
    [
        ("siim_pneumothorax", ["siim-acr-pneumothorax-segmentation"], [DATASET]),
        ("vinbigdata", ["vinbigdata-chest-xray-abnormalities-detection"], [DATASET]),
        ("chestxray14", [], [DATASET, "nih-chest-xrays/data"]),
        ("covid19", [], [DATASET, "OWNER/YOUR-IMAGES"]),
    ],
)
def test_settings_on_kaggle(solution, competitions, datasets):
    about = read_json(notebooks.NOTEBOOKS / solution / "kernel-metadata.json")
    assert (about["enable_internet"], about["enable_gpu"], about["is_private"]) == (False, True, True)
    assert about["competition_sources"] == competitions and about["dataset_sources"] == datasets
    assert about["id"] == f"OWNER/{solution.replace('_', '-')}-your-run"
    assert about["title"].replace(" ", "-") == about["id"].split("/")[1]  # else Kaggle names it otherwise


@pytest.mark.parametrize(
    "solution, tools",
    [
        ("siim_pneumothorax", ("download", "upload", "notebook")),
        ("vinbigdata", ("download", "upload", "notebook")),
        ("chestxray14", ("download", "notebook")),
        ("covid19", ("download", "notebook")),
        ("lung_segmentation", ("download", "notebook")),
    ],
)
def test_which_solution_has_which_tools(solution, tools):
    config = import_module(f"solutions.{solution}.config")
    assert tuple(kaggle.tool_names(config.KAGGLE)) == tools


@pytest.fixture
def run(home, tmp_path):
    folder = tmp_path / "work" / "runs" / "My_run.2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"solution": "siim_pneumothorax", "preset": "demo"}')
    return folder


def test_push(server, command, refused, run):
    words = ("siim_pneumothorax", "notebook", "--run", run)
    status, said, _ = command(*words)
    assert status == 0 and "fill in OWNER in kernel-metadata.json, or name --dataset" in said
    assert sorted(path.name for path in (run / "notebook").iterdir()) == ["inference.ipynb", "kernel-metadata.json"]
    server.datasets["chest/my-bundle"] = b""
    words = (*words, "--dataset", "chest/my-bundle", "--out", "made", "--push")
    line = refused(*words)
    assert "pushed without its inputs siim-acr-pneumothorax-segmentation; check their names" in line
    server.competitions["siim-acr-pneumothorax-segmentation"] = b""
    status, said, errors = command(*words)
    assert (status, errors) == (0, "") and "notebook chest/siim-pneumothorax-my-run-2: version 2 pushed" in said
    asked = server.kernels["chest/siim-pneumothorax-my-run-2"]["asked"]
    assert asked["enableInternet"] is False and asked["enableGpu"] is True and asked["isPrivate"] is True
    assert asked["datasetDataSources"] == ["chest/my-bundle"]
    assert asked["competitionDataSources"] == ["siim-acr-pneumothorax-segmentation"]
    sent = json.loads(asked["text"])
    assert any('open_bundle(bundle, "My_run.2")' in cell["source"] for cell in sent["cells"])
    server.refuse("SaveKernel", 403, "Permission 'kernels.push' was denied")
    assert "not allowed (Permission 'kernels.push' was denied)" in refused(*words)


CODE = 'x") or __import__("os").system("true"); ("'


@pytest.mark.parametrize("name", [CODE, "x\ny", "it's", "{run}", "`x`", "=x", "a..b", "<b>x", "x\u2028y"])
def test_no_name_becomes_code(refused, run, name):
    run = run.rename(run.with_name(name))
    line = refused("siim_pneumothorax", "notebook", "--run", run, "--out", "made")
    assert "cannot be part of file names" in line and not Path("made").exists()


def test_texts_of_a_training_notebook_are_literals(tmp_path):
    words = ('"); evil(); ("', "\\", "{hours}", "it's\n")
    for preset in ("paper", *words):
        write_training_notebook(tmp_path, "vinbigdata", source_of("vinbigdata"), preset, 8.5, words, DATASET)
        cell = read_json(tmp_path / "training.ipynb")["cells"][2]
        call = ast.parse("".join(cell["source"])).body[-1].value
        assert [ast.literal_eval(value) for value in call.args] == ["vinbigdata", preset, 8.5, words]
    with pytest.raises(InputError, match="not a dataset's name"):
        write_training_notebook(tmp_path, "vinbigdata", source_of("vinbigdata"), "paper", 8.5, (), 'me/x"); evil(); ("')


def test_wrong_options(refused, run):
    words = ("notebook", "--run", run)
    assert "--push needs --dataset" in refused("siim_pneumothorax", *words, "--push")
    assert "not a run of vinbigdata" in refused("vinbigdata", *words)
    assert "above 0.25, which" in refused("vinbigdata", "notebook", "--train", "paper", "--hours", "0.2")
    assert "not a run of siim_pneumothorax" in refused("siim_pneumothorax", "notebook", "--run", run.parent)
    assert "not a dataset's name" in refused("siim_pneumothorax", *words, "--dataset", "a bundle/of mine")
    assert main(["lung_segmentation", "notebook", "--run", str(run)]) == 2


# ---- the machine of the tests --------------------------------------------------------------------------------------


def notebook_of(folder, *cells):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(book, folder / "n.ipynb")
    return folder / "n.ipynb"


def test_warnings_of_a_notebook_are_found(tmp_path):
    cells = ("import warnings; warnings.warn('careful', RuntimeWarning)", "print('fine, no warning')")
    book, *_ = rehearse.execute(notebook_of(tmp_path, *cells), Path(sys.executable), tmp_path / "kernel", tmp_path)
    assert len(found := rehearse.find_warnings(book)) == 1 and "RuntimeWarning: careful" in found[0]


def test_an_attempt_to_use_the_network_is_seen(tmp_path):
    machine = rehearse.make_machine(tmp_path / "machine")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # it can be reached from here
        quiet = "import urllib.request\ntry: urllib.request.urlopen('http://{0}')\nexcept OSError: print('no {0}')"
        child = f"import socket; socket.socket().connect(('127.0.0.1', {port}))"
        cells = (
            quiet.format(f"127.0.0.1:{port}"),
            quiet.format("example.org"),
            f'import subprocess, sys\nprint("child:", subprocess.run([sys.executable, "-c", {child!r}]).returncode)',
        )
        notebook = notebook_of(tmp_path, *cells)
        book, _, attempts = rehearse.execute(notebook, machine, tmp_path / "kernel", tmp_path)
    said = notebooks.read_output(book)
    assert f"no 127.0.0.1:{port}" in said and "no example.org" in said and "child: 1" in said
    assert [line.split()[0] for line in attempts] == ["socket.getaddrinfo", "socket.getaddrinfo", "socket.connect"]
    assert "example.org" in attempts[1] and str(port) in attempts[2]


def test_nothing_of_ours_is_on_the_machine(tmp_path):
    machine = rehearse.make_machine(tmp_path / "machine")
    lost = "import importlib.util as u; print([n for n in {} if u.find_spec(n)])"
    names = ("common", "solutions", "tests", "tyro", "imagehash", "segmentation_models_pytorch", "kaggle", "nbclient")
    notebook = notebook_of(tmp_path, lost.format((*names, "torch", "pip")))
    book, *_ = rehearse.execute(notebook, machine, tmp_path / "kernel", tmp_path)
    assert notebooks.read_output(book).strip() == "['torch', 'pip']"
