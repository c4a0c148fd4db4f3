"""Round trips on the stand-in for Kaggle's machine; `python -m tests.notebooks` executes notebooks/ anew on phantoms.

`python -m tests.notebooks siim_pneumothorax training` executes only these (minutes each).
"""

import shutil
import sys
import tempfile
import zipfile
from importlib import import_module, metadata
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from packaging.utils import canonicalize_name

from common.kaggle.bundle import DATASET, write_bundle
from common.kaggle.notebook import INFERENCE, RUN, TRAINING, write_inference_notebook, write_training_notebook
from common.kaggle.rehearse import execute, find_warnings, make_machine, rehearse
from common.kaggle.wheels import IMAGE, UNUSED, own_requirements
from common.paths import walk_files
from common.runs import start_log
from solutions.__main__ import export_run, main

# Short versions of the preset demo: arguments of the sample, and options.
DEMOS = {
    "siim_pneumothorax": ({"n_train": 48, "n_test": 12}, ""),
    "lung_segmentation": ({"n_montgomery": 12, "n_shenzhen": 36, "n_jsrt": 0, "n_test": 6}, "--folds 0"),
    "vinbigdata": ({"n_train": 24, "n_test": 6}, "--folds 0 --members flip --detector.epochs 6"),
    "rsna_pneumonia": ({"n_train": 40, "n_test": 12}, "--folds 0"),
    "chestxray14": ({"n_train": 32, "n_test": 8}, "--folds 0"),
    "covid19": ({"n_covid": 12, "n_other": 4, "n_normals": 12, "n_test": 8}, "--folds 0"),
    "training": ({"n_train": 16, "n_test": 4}, ""),  # of TRAINED
}
TRAINED, PRESET, HOURS = "siim_pneumothorax", "demo", 11.5  # of the notebook that trains
SOLUTIONS = [name for name in DEMOS if name != "training"]
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


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
    assert attempts == [] and find_warnings(book) == []
    assert [path.name for path in working.iterdir()] == ["submission.csv"]
    assert (working / "submission.csv").read_bytes() == (run / "submission.csv").read_bytes()
    text = read_output(book)
    assert f"valid submission: {working / 'submission.csv'}" in text
    check_paths(text, machine)
    return str(book.cells[-2].outputs)


def source_of(solution):
    """Return the files of a solution on Kaggle."""
    return import_module(f"solutions.{solution}.config").KAGGLE


def write_notebooks(root):
    """Write the notebooks of the repository, not executed."""
    for solution in SOLUTIONS:
        write_inference_notebook(root / solution, solution, source_of(solution), RUN, DATASET)
    write_training_notebook(root / "training", TRAINED, source_of(TRAINED), PRESET, HOURS, (), DATASET)


def save_executed(book, folder, path):
    """Write an executed notebook without times and progress bars, with the paths of Kaggle's machine."""
    for cell in (each for each in book.cells if each.cell_type == "code"):
        cell.metadata.pop("execution", None)
        cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
        for output in (each for each in cell.outputs if "text" in each):
            for here, there in (("input", "/kaggle/input"), ("kernel/working", "/kaggle/working")):
                output.text = output.text.replace(str(folder / here), there)
    nbformat.write(book, path)


def execute_inference(solution, root):
    """Train a short demo on phantoms, and return its notebook, executed by `rehearse`."""
    options, words = DEMOS[solution]
    data = images = import_module(f"solutions.{solution}.sample").make_sample(root / "data", **options)
    test = []
    if source_of(solution).kind == "none":
        names = set(pd.read_csv(next(data.rglob("unlabelled_test.csv"))).iloc[:, 0])
        images = root / "images"
        images.mkdir()
        for path in walk_files(data):
            if path.name in names:
                shutil.copyfile(path, images / path.name)
        test = ["--test", str(images)]
    command = ["run", "demo", "--data", str(data), "--out", str(root / RUN), *test, *words.split()]
    assert main([solution, *command]) == 0
    start_log()
    executed = rehearse(solution, source_of(solution), root / RUN, images, root / "kaggle", export_run)
    save_executed(nbformat.read(executed, as_version=4), root / "kaggle", executed)
    return executed


def execute_training(root):
    """Return the notebook that trains, executed on phantoms."""
    data = import_module(f"solutions.{TRAINED}.sample").make_sample(root / "data", **DEMOS["training"][0])
    place = root / "input" / "competitions" / source_of(TRAINED).slugs[0]
    place.parent.mkdir(parents=True)
    place.symlink_to(data)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    write_bundle([], root / "input" / "datasets" / DATASET, export_run, python)
    write_training_notebook(root / "notebook", TRAINED, source_of(TRAINED), PRESET, HOURS, (), DATASET)
    machine = make_machine(root / "machine")
    book, _, attempts = execute(root / "notebook" / TRAINING, machine, root / "kernel", root / "input")
    assert attempts == [] and find_warnings(book) == []
    save_executed(book, root, root / "executed.ipynb")
    return root / "executed.ipynb"


def rewrite(names):
    """Execute the notebooks of these names anew, and write them to notebooks/."""
    write_notebooks(fresh := Path(tempfile.mkdtemp()))
    for name in names:
        root = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            use_local_index(patch, root / "index")
            executed = execute_training(root) if name == "training" else execute_inference(name, root)
        shutil.copytree(fresh / name, NOTEBOOKS / name, dirs_exist_ok=True)
        shutil.copyfile(executed, NOTEBOOKS / name / (TRAINING if name == "training" else INFERENCE))
        shutil.rmtree(root)


if __name__ == "__main__":
    rewrite(sys.argv[1:] or DEMOS)
