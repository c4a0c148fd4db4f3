"""A finished run with its audit, and what the tests of COVID-19 share."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.budget import Budget
from common.images import Images
from common.job import Job
from common.options import Options
from common.report import class_plots, plots
from common.runs import Run
from solutions.__main__ import main
from solutions.covid19 import report
from solutions.covid19.data import MASKS
from solutions.covid19.pipeline import SOLUTION
from solutions.lung_segmentation import segmenter


def _without_drawings(patch):
    for name in ("histogram", "score_with_interval", "forest", "learning_curves", "confusion_matrix"):
        patch.setattr(plots, name, lambda *args, **options: None)
    patch.setattr(class_plots, "reliability_panels", lambda *args, **options: None)
    for name in ("_view_pictures", "_heat_pictures"):
        patch.setattr(report, name, lambda *args, **options: "pictures")
    patch.setattr(report, "_lung_pictures", lambda *args, **options: [])


@pytest.fixture
def bare_page(monkeypatch):
    """Reports without plots and pictures, which take the longest."""
    _without_drawings(monkeypatch)


@pytest.fixture(scope="session")
def finished(runs, tmp_path_factory):
    """Folder that holds a finished run with its audit, its page without plots, `run`, its `stores` and submissions."""
    root = shutil.copytree(runs.finished("covid19"), tmp_path_factory.mktemp("audited") / "root")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        _without_drawings(patch)
        assert main(["covid19", "audit", "--out", "run"]) == 0
    return root


@pytest.fixture
def quick_lungs(monkeypatch):
    """Two lungs of a fixed size on every image but those of one grey level or with a white first pixel."""

    class Segmenter:
        def each(self, sources, finish, workers=None, load=None):
            for name, source in sources.items():
                image = load(source)
                yield name, finish(name, image, image), ""

        def lungs(self, probs, shape):
            """probs: here the image itself."""
            mask, (height, width) = np.zeros(shape, np.uint8), shape
            if probs[0, 0] != 255 and probs.std() > 0:
                for left, right in ((4, 14), (18, 28)):
                    mask[4 * height // 32 : 28 * height // 32, left * width // 32 : right * width // 32] = 1
            return mask

    monkeypatch.setattr(segmenter, "load_segmenter", lambda weights, device: Segmenter())


@pytest.fixture
def job_of(tmp_path):
    """`job_of(config, table, images, masks)`: a job on images that are given, its run in `run`."""
    runs = []

    def make(config, table, images, masks):
        runs.append(Run(tmp_path / "run"))
        np.save(tmp_path / "masks.npy", masks)
        made = Job("covid19", "demo", config, Options(), runs[-1], torch.device("cpu"), Budget(None), recipe=SOLUTION)
        arrays = {MASKS: tmp_path / "masks.npy"}
        made.__dict__["images"] = Images(table, SimpleNamespace(images=images), "key", "pixels", arrays=arrays)
        return made

    yield make
    for run in runs:
        run.close()
