"""Round trips on the stand-in for Kaggle's machine; `python -m tests.notebooks` rewrites the folder notebooks/."""

import sys
import zipfile
from importlib import import_module, metadata
from pathlib import Path

from packaging.utils import canonicalize_name

from common.kaggle.bundle import DATASET
from common.kaggle.notebook import INFERENCE, write_inference_notebook
from common.kaggle.rehearse import execute, make_machine
from common.kaggle.wheels import IMAGE, UNUSED, own_requirements
from solutions.__main__ import main

RUNS = {
    "siim_pneumothorax": "siim-1",
    "vinbigdata": "vinbigdata-1",
    "rsna_pneumonia": "rsna-1",
    "chestxray14": "chestxray14-1",
}


def repack(names, folder):
    """Write wheels of installed packages into `folder`, so that pip can download them without a network."""
    folder.mkdir()
    for name in names:
        dist = metadata.distribution(name)
        tags = [line[5:].split("-") for line in dist.read_text("WHEEL").splitlines() if line.startswith("Tag: ")]
        tag = "-".join(".".join(dict.fromkeys(parts)) for parts in zip(*tags, strict=True))
        stem = f"{dist.name.replace('-', '_')}-{dist.version}-{tag}"
        with zipfile.ZipFile(folder / f"{stem}.whl", "w") as archive:
            for file in dist.files:
                if ".." not in file.parts and "__pycache__" not in file.parts and file.locate().is_file():
                    archive.write(file.locate(), str(file))
    return folder


def missing_packages():
    """Return the names of the packages that a bundle carries besides ours."""
    names = (canonicalize_name(requirement.name) for requirement in own_requirements())
    return [name for name in names if name not in (*IMAGE.packages, *UNUSED)]


def read_output(book):
    """Return what the cells of an executed notebook printed, as one text."""
    return "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))


PRINT_PATHS = """
import common, imagehash, solutions, sys, os, torch, tyro
for module in (common, solutions, tyro, imagehash, torch):
    print("from", module.__name__, module.__file__)
for folder in sys.path:
    print("path", folder)
print("seconds", sum(os.times()[:4]))"""


def check_paths(text, python):
    """Check by the output of PRINT_PATHS that our packages come from the bundle, and no checkout is on the path."""
    home = python.parents[1]
    places = dict(line.split()[1:] for line in text.splitlines() if line.startswith("from "))
    assert set(places) == {"common", "solutions", "tyro", "imagehash", "torch"}
    for name, place in places.items():
        assert Path(place).is_relative_to(home.parent / "image" if name == "torch" else home), place
    folders = [Path(line[5:]) for line in text.splitlines() if line.startswith("path ") and line[5:]]
    assert folders
    for folder in folders:
        assert not (folder / "pyproject.toml").exists()
        assert folder.is_relative_to(home) or not (folder / "common").exists()


def use_local_index(monkeypatch, folder):
    """Let pip find the wheels that a bundle needs in the new `folder`, and nothing elsewhere."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(repack(missing_packages(), folder)))


def round_trip(run, solution, mounts, folder, monkeypatch, dataset="datasets/somebody/chest-x-rays"):
    """Bundle a finished run, write its notebook and execute it on this machine, with test images mounted.

    mounts: folders by their places among the inputs; dataset: the bundle's place there. Asserts that the submission is
    the run's own, byte for byte, that only the bundle was used, and no socket. Returns the output of its last cell.
    """
    use_local_index(monkeypatch, folder / "index")
    inputs, python = folder / "input", f"{sys.version_info.major}.{sys.version_info.minor}"
    assert main(["bundle", str(run), "--out", str(inputs / dataset), "--python", python]) == 0
    name = f"somebody/{Path(dataset).name}"
    words = ["notebook", "--run", str(run), "--dataset", name, "--out", str(folder / "notebook")]
    assert main([solution, *words]) == 0
    for place, source in mounts.items():
        (inputs / place).parent.mkdir(parents=True, exist_ok=True)
        (inputs / place).symlink_to(source)
    machine = make_machine(folder / "machine")
    notebook = folder / "notebook" / INFERENCE
    book, working, attempts = execute(notebook, machine, folder / "kernel", inputs, [PRINT_PATHS])
    assert attempts == []
    assert [path.name for path in working.iterdir()] == ["submission.csv"]
    assert (working / "submission.csv").read_bytes() == (run / "submission.csv").read_bytes()
    text = read_output(book)
    assert f"valid submission: {working / 'submission.csv'}" in text
    check_paths(text, machine)
    return str(book.cells[-2].outputs)


def write_notebooks(root):
    """Write the notebooks of the repository."""
    for solution, run in RUNS.items():
        source = import_module(f"solutions.{solution}.config").KAGGLE
        write_inference_notebook(root / solution, solution, source, run, DATASET)


if __name__ == "__main__":
    write_notebooks(Path("notebooks"))
