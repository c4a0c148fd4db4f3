"""`notebook`: a notebook that predicts on Kaggle, without internet, by a run in a bundle."""

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
bundle = [*INPUT.glob("{slug}/bundle.json"), *INPUT.glob("datasets/*/{slug}/bundle.json")][0].parent
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


def notebook_tool(solution, source):
    """The tool `notebook` of one solution."""

    def notebook(*, run: Path, dataset: str | None = None, out: Path | None = None, push: bool = False):
        """Write a notebook that predicts on Kaggle by what a run has learnt, and what Kaggle must know of it.

        It installs from the bundle that the run is in (`python -m solutions bundle`), with internet off and GPU on.

        Args:
            run: Folder of the run.
            dataset: The bundle's dataset on Kaggle, owner/name.
            out: Folder for the two files (default: notebook/ in the run's).
            push: Send it to Kaggle, where it is run.
        """
        check_dataset(dataset)
        about = read_json(run / "config.json") if (run / "config.json").is_file() else None
        if not isinstance(about, dict) or about.get("solution") != solution:
            raise InputError(f"--run {run}: not a run of {solution}")
        if push and dataset is None:
            raise InputError("--push needs --dataset: the bundle's, owner/name, from which the notebook installs")
        folder = out or run / "notebook"
        write_notebook(folder, solution, source, run.resolve().name, dataset or DATASET)
        log.info(f"{folder / NOTEBOOK}, {folder / METADATA}")
        if dataset is None:
            log.info(f"fill in {DATASET.split('/')[0]} in {METADATA}, or name --dataset")
        if push:
            send(folder)
        return 0

    return notebook


def write_notebook(folder, solution, source, run, dataset):
    """Write inference.ipynb and kernel-metadata.json for the run of this name in the bundle `dataset`, owner/name."""
    write_text(Path(folder) / NOTEBOOK, json.dumps(cells(solution, run, dataset), indent=1) + "\n")
    write_json(Path(folder) / METADATA, metadata(solution, source, run, dataset))


def cells(solution, run, dataset):
    """The notebook, in nbformat 4.5."""
    names = {"solution": solution, "run": run, "slug": dataset.split("/")[1]}
    title = f"# {solution}: inference\n\n"
    said = (f"Predicts the test images by the run `{run}` of the bundle `{dataset}`; no internet is needed. Made by "
            f"`python -m solutions {solution} notebook`.")  # fmt: skip
    made = [_cell("markdown", "about", title + said)]
    for name, code in (("install", INSTALL), ("predict", PREDICT), ("show", SHOW)):
        made.append(_cell("code", name, code.format(**names)) | {"execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4,
            "nbformat_minor": 5}  # fmt: skip


def _cell(kind, name, source):
    return {"cell_type": kind, "id": name, "metadata": {}, "source": source.splitlines(keepends=True)}


def metadata(solution, source, run, dataset):
    """The content of kernel-metadata.json: internet off, GPU on."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{solution} {run}".lower())[:50].strip("-")
    return {
        "id": f"{dataset.split('/')[0]}/{slug}", "title": slug.replace("-", " "), "code_file": NOTEBOOK,
        "language": "python", "kernel_type": "notebook", "is_private": True, "enable_gpu": True, "enable_tpu": False,
        "enable_internet": False,  # the client's default is true
        "dataset_sources": [dataset, *(source.slugs if source.kind == "dataset" else ())],
        "competition_sources": list(source.slugs) if source.kind == "competition" else [],
        "kernel_sources": [], "model_sources": [],
    }  # fmt: skip


def send(folder):
    """Push the notebook to Kaggle; InputError where Kaggle refuses it, or lacks one of its inputs."""
    about = read_json(Path(folder) / METADATA)
    target = f"notebook {about['id']}"
    said = client.run(["kernels", "push", "-p", str(folder)], target)
    lost = re.search(r"not valid (dataset|competition) sources.*: (.*)", said)
    if lost:
        raise InputError(f"{target}: pushed, but without its {lost[1]} {lost[2]}: is the name right, is it ready, are "
                         "the rules accepted?")  # fmt: skip
    if "successfully pushed" not in said:
        raise InputError(client.explain(said, 0, target))
    log.info(next(line for line in said.splitlines() if "successfully pushed" in line))
