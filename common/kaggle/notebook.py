"""`notebook`: a notebook that predicts on Kaggle, without internet, by a run in a bundle, or that trains there."""

import json
import logging
import re
from pathlib import Path

from common.errors import InputError
from common.kaggle import client
from common.kaggle.bundle import DATASET, check_dataset
from common.paths import read_json, write_json, write_text

log = logging.getLogger(__name__)
NOTEBOOK = "inference.ipynb"
METADATA = "kernel-metadata.json"

INSTALL = """\
import os, subprocess, sys
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
found = [*INPUT.glob("{slug}/bundle.json"), *INPUT.glob("datasets/*/{slug}/bundle.json")]
assert found, "add the dataset {slug} to this notebook's inputs"
bundle = found[0].parent
wheels = map(str, sorted(bundle.glob("*.whl")))
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels], check=True)"""
PREDICT = """\
from common.kaggle.mounted import WORKING, trained_folder
from solutions.__main__ import main

trained, submission = trained_folder(bundle, "{run}"), WORKING / "submission.csv"
# an image that cannot be read gets the neutral prediction and is named
status = main(["{solution}", "infer", str(trained), "--on-bad-image", "placeholder", "--out", str(submission)])
assert status in (0, 4), "the reason stands above" """.rstrip()
SHOW = """\
from solutions.{solution}.mounted import show

show(submission)"""

TRAIN = """\
from common.kaggle.training import train_here
from common.runs import start_log

start_log()
finished = train_here("{solution}", "{preset}", {hours:g}, {options!r})"""
TRAINING = "training.ipynb"


def notebook_tool(solution, source, presets=()):
    """The tool `notebook` of one solution with these presets."""

    def notebook(
        *,
        run: Path | None = None,
        train: str | None = None,
        hours: float = 11.5,
        options: tuple[str, ...] = (),
        resume: bool = False,
        dataset: str | None = None,
        out: Path | None = None,
        push: bool = False,
    ):
        """Write a notebook that predicts on Kaggle by what a run has learnt, or that trains there.

        It installs from a bundle (`python -m solutions bundle`), with internet off and GPU on; kernel-metadata.json
        beside it says what Kaggle must know.

        Args:
            run: Folder of the run to predict by; the bundle must hold it.
            train: Preset to train on Kaggle instead, within --hours, on all GPUs of the notebook.
            hours: Allowance of a training notebook; it stops in time and goes on in its next version.
            options: Further words of the training's command line, such as fold numbers; after `--`.
            resume: The training's own last output is an input of the next version; after the first one.
            dataset: The bundle's dataset on Kaggle, owner/name.
            out: Folder for the two files (default: notebook/ in the run's, or notebook-<preset>).
            push: Send it to Kaggle, where it is run.
        """
        check_dataset(dataset)
        if (run is None) == (train is None):
            raise InputError("name either --run, to predict by, or --train with a preset")
        if push and dataset is None:
            raise InputError("--push needs --dataset: the bundle's, owner/name, from which the notebook installs")
        if train is not None:
            if train not in presets:
                raise InputError(f"--train {train!r} is not a preset of {solution}: {', '.join(presets)}")
            folder = out or Path(f"notebook-{train}")
            write_training(folder, solution, source, train, hours, options, dataset or DATASET, resume)
            return _told(folder, TRAINING, dataset, push)
        about = read_json(run / "config.json") if (run / "config.json").is_file() else None
        if not isinstance(about, dict) or about.get("solution") != solution:
            raise InputError(f"--run {run}: not a run of {solution}")
        folder = out or run / "notebook"
        write_notebook(folder, solution, source, run.resolve().name, dataset or DATASET)
        return _told(folder, NOTEBOOK, dataset, push)

    return notebook


def _told(folder, name, dataset, push):
    log.info(f"{folder / name}, {folder / METADATA}")
    if dataset is None:
        log.info(f"fill in {DATASET.split('/')[0]} in {METADATA}, or name --dataset")
    if push:
        send(folder)
    return 0


def write_training(folder, solution, source, preset, hours, options, dataset, resume=False):
    """Write training.ipynb and kernel-metadata.json of a notebook that trains a preset; resume: its own output is an
    input, so that each version goes on where the last one stopped."""
    names = {"solution": solution, "preset": preset, "hours": hours, "options": tuple(options)}
    title = (
        f"# {solution}: training {preset}\n\nStops after {hours:g} hours with everything saved; its next version, "
        "with this one's output as an input, continues."
    )
    made = [_cell("markdown", "about", title)]
    for name, code in (("install", INSTALL.format(slug=dataset.split("/")[1])), ("train", TRAIN.format(**names))):
        made.append(_cell("code", name, code) | {"execution_count": None, "outputs": []})
    about = metadata(solution, source, f"{preset} training", dataset) | {"code_file": TRAINING}
    about["kernel_sources"] = [about["id"]] if resume else []
    write_text(Path(folder) / TRAINING, json.dumps(_book(made), indent=1) + "\n")
    write_json(Path(folder) / METADATA, about)


def write_notebook(folder, solution, source, run, dataset):
    """Write inference.ipynb and kernel-metadata.json for the run of this name in the bundle `dataset`, owner/name."""
    write_text(Path(folder) / NOTEBOOK, json.dumps(cells(solution, run, dataset), indent=1) + "\n")
    write_json(Path(folder) / METADATA, metadata(solution, source, run, dataset))


def cells(solution, run, dataset):
    """The notebook, in nbformat 4.5."""
    names = {"solution": solution, "run": run, "slug": dataset.split("/")[1]}
    title = f"# {solution}: inference\n\n"
    said = (
        f"Predicts the test images by the run `{run}` of the bundle `{dataset}`; no internet is needed. Made by "
        f"`python -m solutions {solution} notebook`."
    )
    made = [_cell("markdown", "about", title + said)]
    for name, code in (("install", INSTALL), ("predict", PREDICT), ("show", SHOW)):
        made.append(_cell("code", name, code.format(**names)) | {"execution_count": None, "outputs": []})
    return _book(made)


def _book(made):
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": made,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind, name, source):
    return {"cell_type": kind, "id": name, "metadata": {}, "source": source.splitlines(keepends=True)}


def metadata(solution, source, run, dataset):
    """The content of kernel-metadata.json: internet off, GPU on."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{solution} {run}".lower())[:50].strip("-")
    return {
        "id": f"{dataset.split('/')[0]}/{slug}",
        "title": slug.replace("-", " "),
        "code_file": NOTEBOOK,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": False,  # the client's default is true
        "dataset_sources": [dataset, *(source.slugs if source.kind == "dataset" else ())],
        "competition_sources": list(source.slugs) if source.kind == "competition" else [],
        "kernel_sources": [],
        "model_sources": [],
    }


def send(folder):
    """Push the notebook to Kaggle; InputError where Kaggle refuses it, or lacks one of its inputs."""
    about = read_json(Path(folder) / METADATA)
    target = f"notebook {about['id']}"
    said = client.run(["kernels", "push", "-p", str(folder)], target)
    lost = re.search(r"not valid (dataset|competition) sources.*: (.*)", said)
    if lost:
        raise InputError(
            f"{target}: pushed, but without its {lost[1]} {lost[2]}: is the name right, is it ready, are "
            "the rules accepted?"
        )
    if "successfully pushed" not in said:
        raise InputError(client.explain(said, 0, target))
    log.info(next(line for line in said.splitlines() if "successfully pushed" in line))
