"""`notebook`: write a notebook that predicts on Kaggle with a bundled run and without internet, or trains there."""

import json
import re
from pathlib import Path

from common.errors import InputError, check, log
from common.kaggle.bundle import DATASET, RESERVE, check_dataset_name, check_name
from common.kaggle.client import connect
from common.paths import read_json, write_json, write_text

INFERENCE, TRAINING = "inference.ipynb", "training.ipynb"
METADATA = "kernel-metadata.json"

IMAGES, RUN = "OWNER/YOUR-IMAGES", "YOUR-RUN"  # placeholders for the user's names, like bundle.DATASET
INSTALL = """\
import os
import subprocess
import sys
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))  # elsewhere, set it to the folder of the inputs


def find_input(name):
    found = [*INPUT.glob(name), *INPUT.glob(f"datasets/*/{{name}}")]
    assert found, f"add the dataset {{name}} to this notebook's inputs"
    return found[0]


bundle = find_input("{slug}")
wheels = list(map(str, sorted(bundle.glob("*.whl"))))
pip = [sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action=ignore", "--no-index", "--no-deps"]
installed = subprocess.run([*pip, *wheels], check=True)
print(len(wheels), "wheels installed")"""
PREDICT = """\
from common.kaggle.session import WORKING, open_bundle
from solutions.__main__ import main

trained, submission = open_bundle(bundle, {run}), WORKING / "submission.csv"
IMAGES = {images}  # a dataset of radiographs; None: the test images of the competition
images = find_input(IMAGES) if IMAGES else None
words = ["infer", str(trained), "--out", str(submission), *(["--test", str(images)] if images else [])]
# an image that cannot be read gets the neutral prediction and is named
status = main([{solution}, *words, "--on-bad-image", "placeholder"])
assert status in (0, 4), "see above for the reason" """.rstrip()
PREVIEW = """\
from common.errors import InputError
from solutions.{package}.report import show_predictions

try:
    show_predictions(submission, images)
except InputError as error:  # such as an unreadable image; the submission is complete
    print("no pictures:", error)"""
TRAIN = """\
from common.kaggle.session import train_in_session
from common.runs import start_log

start_log()
finished = train_in_session({solution}, {preset}, {hours}, {options})"""


def notebook_tool(solution, source, presets=()):
    """Return the tool `notebook` of one solution with these presets."""

    def notebook(
        *,
        run: Path | None = None,
        train: str | None = None,
        hours: float = 11.5,
        options: tuple[str, ...] = (),
        resume: bool = False,
        dataset: str | None = None,
        images: str | None = None,
        out: Path | None = None,
        push: bool = False,
    ):
        """Write a notebook that predicts on Kaggle with the weights and rule of a run, or that trains there.

        It installs from a bundle (`python -m solutions bundle`), with internet off and GPU on; the settings are in
        kernel-metadata.json beside it.

        Args:
            run: Folder of the run to predict with; the bundle must hold it.
            train: Preset to train on Kaggle instead, within --hours, on all GPUs of the notebook.
            hours: Time limit of a training notebook; it stops in time and continues in its next version.
            options: Further words of the training's command line, such as fold numbers; after `--`.
            resume: Make the notebook's own last output an input of the next version; from the second one on.
            dataset: The bundle's dataset on Kaggle, owner/name.
            images: A dataset on Kaggle, owner/name, whose images are predicted instead of the competition's.
            out: Folder for the two files (default: notebook/ in the run's, or notebook-<preset>).
            push: Send it to Kaggle, which runs it.
        """
        check((run is None) != (train is None), "name either --run, to predict with, or --train with a preset")
        if push and dataset is None:
            raise InputError("--push needs --dataset: the bundle's, owner/name, from which the notebook installs")
        bundle = dataset or DATASET
        if train is not None:
            check(train in presets, f"--train {train!r} is not a preset of {solution}: {', '.join(presets)}")
            least = f"{RESERVE:g}, which the verbs after training need"
            check(RESERVE < hours < float("inf"), f"--hours must be a number above {least}: {hours:g}")
            folder = out or Path(f"notebook-{train}")
            write_training_notebook(folder, solution, source, train, hours, options, bundle, resume)
        else:
            about = read_json(run / "config.json") if (run / "config.json").is_file() else None
            if not isinstance(about, dict) or about.get("solution") != solution:
                raise InputError(f"--run {run}: not a run of {solution}")
            folder = out or run / "notebook"
            write_inference_notebook(folder, solution, source, run.resolve().name, bundle, images)
        log.info(f"{folder / (INFERENCE if train is None else TRAINING)}, {folder / METADATA}")
        if dataset is None:
            log.info(f"fill in {DATASET.split('/')[0]} in {METADATA}, or name --dataset")
        if push:
            push_notebook(folder)
        return 0

    return notebook


def write_training_notebook(folder, solution, source, preset, hours, options, dataset, resume=False):
    """Write training.ipynb and kernel-metadata.json; resume: make the notebook's own last output an input."""
    text = (
        f"# {solution}: training {preset}\n\nStops after {hours:g} hours with everything saved; its next version, "
        f"with this one's output as an input, continues.{_say_placeholders(dataset)}"
    )
    code = _fill({"install": INSTALL, "train": TRAIN}, solution, dataset, preset=preset, hours=hours, options=options)
    _write(folder, TRAINING, text, code, solution, source, f"{preset} training", dataset, resume=resume)


def write_inference_notebook(folder, solution, source, run, dataset, images=None):
    """Write inference.ipynb and kernel-metadata.json for the run called `run` in the bundle `dataset`, owner/name.

    images: the dataset to predict; None: the competition's test images, or a placeholder if it has none.
    """
    images = images or (IMAGES if source.kind == "none" else None)
    text = (
        f"# {solution}: inference\n\nPredicts {f'the images of `{images}`' if images else 'the test images'} with the "
        f"run `{run}` of the bundle `{dataset}`; no internet is needed. Made by `cxr {solution} notebook`."
        f"{_say_placeholders(dataset, run, images)}"
    )
    check_name(run, "a run's name in a notebook")
    cells = {"install": INSTALL, "predict": PREDICT, "show": PREVIEW}
    if images is not None:
        check_dataset_name(images.lower())
    code = _fill(cells, solution, dataset, run=run, images=images and images.split("/")[1])
    _write(folder, INFERENCE, text, code, solution, source, run, dataset, images)


def _say_placeholders(*names):
    """Return a sentence about the placeholders among `names`, "" if there are none."""
    known = {"OWNER": "your name on Kaggle", RUN: "the name of your run", "YOUR-IMAGES": "your dataset of radiographs"}
    found = [f"`{name}` ({what})" for name, what in known.items() if any(name in (each or "") for each in names)]
    return f"\n\n**A template.** Replace {' and '.join(found)}." if found else ""


def _fill(cells, solution, dataset, **values):
    """Return the cells with the values filled in as Python literals."""
    check_dataset_name(dataset)
    literals = {name: json.dumps(value) if isinstance(value, str) else repr(value) for name, value in values.items()}
    names = literals | {"solution": json.dumps(solution), "package": solution, "slug": dataset.split("/")[1]}
    return {name: cell.format(**names) for name, cell in cells.items()}


def _write(folder, file, text, code, solution, source, name, dataset, images=None, resume=False):
    """Write a notebook in nbformat 4.5 (a text, then code cells by name) and its settings for Kaggle."""
    cells, extra = [_make_cell("markdown", "about", text)], {"execution_count": None, "outputs": []}
    cells += [_make_cell("code", cell, lines) | extra for cell, lines in code.items()]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    book = {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    slug = re.sub(r"[^a-z0-9]+", "-", f"{solution} {name}".lower())[:50].strip("-")
    ref = f"{dataset.split('/')[0]}/{slug}"
    settings = {
        "id": ref,
        "title": slug.replace("-", " "),
        "code_file": file,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": False,  # the client's default is true
        "dataset_sources": [dataset, *([images] if images else source.slugs if source.kind == "dataset" else [])],
        "competition_sources": list(source.slugs) if source.kind == "competition" and not images else [],
        "kernel_sources": [ref] if resume else [],
        "model_sources": [],
    }
    write_text(Path(folder) / file, json.dumps(book, indent=1) + "\n")
    write_json(Path(folder) / METADATA, settings)


def _make_cell(kind, name, source):
    return {"cell_type": kind, "id": name, "metadata": {}, "source": source.splitlines(keepends=True)}


def push_notebook(folder):
    """Push the notebook to Kaggle; raise InputError if Kaggle refuses it or does not find an input."""
    target = f"notebook {read_json(Path(folder) / METADATA)['id']}"
    with connect(target) as api:
        answer = api.kernels_push(str(folder))
        check(not answer.error, f"{target}: refused: {answer.error}")
        lost = [*answer.invalid_dataset_sources, *answer.invalid_competition_sources, *answer.invalid_kernel_sources]
        remedy = "check their names, whether they are ready, and whether the rules are accepted"
        check(not lost, f"{target}: pushed without its inputs {', '.join(lost)}; {remedy}")
    log.info(f"{target}: version {answer.version_number} pushed; progress at {answer.url}")
