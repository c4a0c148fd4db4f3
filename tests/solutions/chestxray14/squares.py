"""A small stand-in for what `prepare` leaves: squares whose class is where a patch lies, and jobs on them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from common.budget import Budget
from common.images import Images
from common.job import Job
from common.options import Options
from common.runs import Run
from solutions.chestxray14.config import DEMO, FUSION, LABELS, NetworkConfig
from solutions.chestxray14.models import view_dataset
from solutions.chestxray14.pipeline import SOLUTION

SIDE, CELLS, N = 72, 24, 12
TINY = NetworkConfig(
    backbone="test_resnet",
    weights="none",
    resize=72,
    size=64,
    attention=True,
    weighting=True,
    epochs=12,
    batch_size=6,
    lr=5e-3,
    optimizer="adam",
    weight_decay=0.0,
    schedule="constant",
    precision="fp32",
)
BOTH = replace(
    DEMO,
    views="both",
    whole=TINY,
    lungs=replace(TINY, weighting=False, size=32, resize=36),
    segmenter=replace(DEMO.segmenter, crop_size=SIDE),
    fusion=replace(FUSION, batch_size=6, epochs=30, lr=3e-2, precision="fp32", schedule="constant"),
    folds=(0,),
)


def view(images, rows, config, stage, **how):
    return view_dataset(SimpleNamespace(images=images), rows, config=config, stage=stage, **how)


@pytest.fixture(name="images")
def stored_squares(tmp_path):
    """Stored squares whose class is where a bright patch lies in the lungs; their crops are the negatives.

    Fold 1 holds the twelve squares, fold 0 the same ones again.
    """
    pixels = np.random.default_rng(0).integers(0, 60, (N, SIDE, SIDE), dtype=np.uint8)
    truth, masks = np.zeros((N, 14), np.int8), np.zeros((N, CELLS, CELLS), np.uint8)
    masks[:, 3:-3, 2:10] = masks[:, 3:-3, -9:-3] = 255
    for row in range(N):
        kind = row % 3
        truth[row, kind] = 1
        top, left = [(12, 12), (12, 48), (44, 48)][kind]
        pixels[row, top : top + 16, left : left + 14] += 180
    for name, array in {"images": pixels, "crops": 255 - pixels, "masks": masks}.items():
        np.save(tmp_path / f"{name}.npy", np.concatenate([array, array]))
    table = pd.DataFrame(np.concatenate([truth, truth]), columns=LABELS)
    table = table.assign(row=range(2 * N), image_id=[f"i{row}" for row in range(2 * N)], patient_id="", split="train")
    table["fold"] = np.repeat([1, 0], N)
    store = SimpleNamespace(images=np.load(tmp_path / "images.npy", mmap_mode="r"))
    return Images(table, store, "key", "pixels", arrays={name: tmp_path / f"{name}.npy" for name in ("crops", "masks")})


@pytest.fixture(name="job")
def jobs_on_squares(images, tmp_path):
    """`job(config)`: a Job on these images."""
    runs = []

    def make(config=BOTH, workers=0):
        runs.append(Run(tmp_path / f"run{len(runs)}"))
        options = Options(out=runs[-1].folder, workers=workers)
        device, recipe = torch.device("cpu"), SOLUTION
        made = Job("chestxray14", "demo", config, options, runs[-1], device, Budget(None), recipe=recipe)
        made.images = images
        return made

    yield make
    for run in runs:
        run.close()
