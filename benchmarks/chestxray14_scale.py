"""Time and memory of every ChestX-ray14 step, from tables to submission, at its full length of 112,120 images.

    python -m benchmarks.chestxray14_scale

Names, patients, labels and boxes are real, from the tables in torchxrayvision (the script stops without it). Simulated
are the official lists (drawn by patient, with the official numbers of images and patients), the image files (empty),
the pixels (64 px phantoms with noise, written in blocks, because drawing and decoding 112,120 files would take hours)
and the networks (random probabilities; copies of pixels as pooled features). All else is the solution's own code, in a
temporary folder of about 1.5 GB, which is removed. Resident memory, including memory-mapped pages and worker processes,
must stay under 4 GB.
"""

import gzip
import logging
import os
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch

from benchmarks.meter import Meter, cpu_seconds
from benchmarks.tables import label_table
from common import phantom
from common.budget import Budget
from common.compare import comparison_tools
from common.data.folds import make_folds, shared_groups
from common.data.loaders import EpochSampler, FeatureDataset, make_loader
from common.data.store import HEADER, RECORD, to_square
from common.images import open_images, prepare_images
from common.job import Job
from common.metrics.calibration import nested_counts
from common.metrics.statistics import bootstrap_auroc
from common.network import Network, train_loader
from common.options import Options
from common.paths import find_images, read_parquet, write_table
from common.recipe import report
from common.runs import Run
from common.step import run_step
from common.submit.validate import validate_probabilities
from solutions.chestxray14.comparison import class_table
from solutions.chestxray14.config import LABELS, PRESETS, Config, LungsConfig, NetworkConfig
from solutions.chestxray14.data import BOX_TABLE, labels_of
from solutions.chestxray14.labels import read_boxes, read_labels, read_lists
from solutions.chestxray14.models import AUGMENTATIONS, ViewDataset, pooled_features
from solutions.chestxray14.pipeline import SOLUTION, fold_networks
from tests.running import prevalence_deviation

SIDE, FOLDS, LIMIT = 64, 10, 4.0  # px, folds, GB
OFFICIAL_TEST = 25_596, 2_797  # images and patients of the official test list
IMAGES, BLOCK, FILMS = 112_120, 4096, 32  # images, images per write, different phantoms
CLASSES = list(LABELS)
CONFIG = replace(
    PRESETS["densenet121"],
    whole=replace(PRESETS["densenet121"].whole, resize=SIDE, size=SIDE, augmentation="flip"),
    store_size=SIDE,
    n_folds=FOLDS,
    folds=tuple(range(FOLDS)),
)


# ---- simulated data ------------------------------------------------------------------------------------------------


def write_folder(folder, table, boxes, rng):
    """Write the competition's folder: the real tables, drawn lists, empty image files in twelve folders."""
    folder.mkdir()
    for source, name in ((table, "Data_Entry_2017_v2020.csv"), (boxes, "BBox_List_2017.csv")):
        with gzip.open(source) as packed, open(folder / name, "wb") as file:
            shutil.copyfileobj(packed, file)
    images = pd.read_csv(folder / "Data_Entry_2017_v2020.csv", usecols=["Image Index", "Patient ID"])
    names, patients = images["Image Index"], images["Patient ID"]
    in_test = patients.isin(test_patients(patients.value_counts(), rng))
    for part, chosen in (("train_val", ~in_test), ("test", in_test)):
        (folder / f"{part}_list.txt").write_text("".join(f"{name}\n" for name in names[chosen]))
    for part, some in enumerate(np.array_split(names, 12), 1):
        place = folder / f"images_{part:03}" / "images"
        place.mkdir(parents=True)
        for name in some:
            os.close(os.open(place / name, os.O_CREAT | os.O_WRONLY))


def test_patients(visits, rng):
    """Return patients of a test list with the official numbers of patients and images, favouring many images.

    visits: images (P,) by patient. One patient after another is exchanged where that brings the sum nearer.
    """
    n_images, n_patients = OFFICIAL_TEST
    order = rng.choice(len(visits), len(visits), replace=False, p=np.sqrt(visits) / np.sqrt(visits).sum())
    sizes = visits.to_numpy()[order]
    lacking = n_images - sizes[:n_patients].sum()
    while lacking:
        i, k = rng.integers(n_patients), rng.integers(n_patients, len(order))
        gain = sizes[k] - sizes[i]
        if abs(lacking - gain) < abs(lacking):
            lacking -= gain
            order[[i, k]], sizes[[i, k]] = order[[k, i]], sizes[[k, i]]
    return visits.index[order[:n_patients]]


def undecoded(target, todo, workers):
    """Stand in for `decode_all`: write phantoms with noise in blocks."""
    films = np.stack([to_square(phantom.draw(seed, 256).image, target.size) for seed in range(FILMS)])
    rng, record = np.random.default_rng(0), dict.fromkeys(RECORD) | {"width": 1024, "height": 1024, "colour": 0.0}
    with open(target.path, "r+b") as file:
        file.seek(HEADER)
        for start in range(0, len(todo), BLOCK):
            rows = np.array([row for row, _ in todo[start : start + BLOCK]])
            noise = rng.integers(0, 64, (len(rows), target.size, target.size), np.uint8)
            file.write(films[rows % FILMS] // 4 * 3 + noise)
            file.flush()
            for row in rows.tolist():
                yield row, record, None


def write_weights(job):
    """Write a stand-in for the weights of every fold."""
    for fold in range(FOLDS):
        weights = job.run.path(f"fold{fold}", "whole", "final.safetensors")
        weights.parent.mkdir(parents=True)
        weights.write_text(f"stand-in {fold}")


def draw_predictions(job, folds, rows, path, title):
    """In place of the recipe's `predict`: probabilities that are drawn; the folds' networks agree on most of it."""
    labels = labels_of(job.images, np.arange(len(job.images.table)))
    seen = np.random.default_rng(0).normal(-3, 1, labels.shape) + 1.4 * labels
    logits = seen[rows] + np.random.default_rng([1, folds[0], len(rows)]).normal(0, 0.3, (len(rows), len(CLASSES)))
    table = pd.DataFrame(1 / (1 + np.exp(-logits)), columns=CLASSES)
    table.insert(0, "image_id", job.images.ids(rows))
    return {"": table}


class PooledPixels(torch.nn.Module):
    """Stand in for a network: return 1,024 pixels as pooled features, as many as DenseNet-121 has."""

    width = 1024

    def pooled(self, images):
        return images.flatten(1)[:, : self.width].float()


# ---- steps ---------------------------------------------------------------------------------------------------------


def tables_and_folds(measure, folder):
    """Measure each file that `prepare` reads, and the folds."""
    labels = measure("label table", lambda: read_labels(folder / "Data_Entry_2017_v2020.csv"), _rows)
    assert len(labels) == IMAGES
    files = measure("image files found", lambda: find_images(folder), _rows)
    assert len(files) == IMAGES
    official, about = measure("official lists", lambda: read_lists(folder, labels["image_id"]))
    assert not about["official"]  # of the official numbers, but drawn
    assert [(official == part).sum() for part in ("train_val", "test")] == [86_524, 25_596]
    measure("boxes", lambda: read_boxes(folder / "BBox_List_2017.csv"), _rows)
    train = labels[official == "train_val"]
    y, patients = train[CLASSES].to_numpy(), train["patient_id"].to_numpy()
    make_folds(y[:500], 2, patients[:500])  # compiles
    folds = measure(
        f"{FOLDS} folds by patient, all labels",
        lambda: make_folds(y, FOLDS, patients),
        lambda found, _: f"{len(found):,} rows, worst prevalence {prevalence_deviation(y, found):.1%} off",
    )
    assert shared_groups(folds, patients) == 0


def loaders(measure, job):
    """An epoch of the sampler alone, of the train loader, and batches at the papers' size."""
    network, rows = fold_networks(job.config, 0)[0], job.images.rows(folds=range(1, FOLDS))
    sampler = train_loader(job, network, rows).batch_sampler
    batches = measure("epoch of the sampler, batch 512", lambda: sum(map(len, sampler)), lambda n, _: f"{n:,} keys")
    assert batches == len(rows) // 512 * 512
    for workers in (0, 2):
        job.options = replace(job.options, workers=workers)
        title = f"epoch of the train loader, {SIDE} px, {workers} workers"
        measure(title, lambda: read_all(train_loader(job, network, rows)), _per_second)
    job.options = replace(job.options, workers=0)
    labels = labels_of(job.images, rows)
    papers = ViewDataset(job.images.store.images, rows, 256, 224, None, AUGMENTATIONS["flip"](256), labels)
    sampler = EpochSampler(len(rows), 512, 0, draws=20 * 512)
    measure("20 batches, 64 → 256 → 224 px, 0 workers", lambda: read_all(make_loader(papers, sampler)), _per_second)


def read_all(loader):
    """Return the number of images in all batches of a loader, and free it."""
    count = 0
    for images, labels in loader:
        assert images.dtype == torch.uint8 and labels.shape == (len(images), len(CLASSES))
        count += len(images)
    return count


def fusion(measure, job):
    """The pooled features of SDFN's branches for one fold's training images, and an epoch over them."""
    rows, view = job.images.rows(folds=range(1, FOLDS)), NetworkConfig(resize=SIDE, size=SIDE, batch_size=256)
    config = Config(views="both", whole=view, lungs=view, segmenter=LungsConfig(crop_size=SIDE), store_size=SIDE)
    job.images.arrays["crops"] = job.images.store.images.filename  # the images once more in place of the crops
    branches = fold_networks(config, 0)[:2]
    with mock.patch.object(Network, "load", lambda network, run: PooledPixels()):
        features = measure(
            "features of both views and flips, without networks",
            lambda: pooled_features(job, branches, rows, flips=True),
            lambda found, _: f"{found.shape}, {found.nbytes / 2**30:.2f} GB",
        )
    dataset, sampler = (
        FeatureDataset(*map(torch.from_numpy, (features, labels_of(job.images, rows)))),
        EpochSampler(len(rows), 512, 0),
    )
    epoch = partial(lambda loader: sum(len(y) for _, y in loader), make_loader(dataset, sampler))
    measure("epoch of the fusing layer's loader, batch 512", epoch, _per_second)


def scoring(measure, job):
    """The goal's figure, and the steps of a run from predictions to the page."""
    measure("predict: tables of the folds joined and averaged", lambda: run_step(job, job.steps["predict"]))
    both = pd.concat([read_parquet(job.run.path(f"{name}.parquet")) for name in ("oof", "test")])
    assert len(both) == IMAGES and both["image_id"].is_unique
    whole = job.run.path("all.parquet")
    measure("table of 112,120 × 14 probabilities written", lambda: write_table(whole, both))
    again = measure("… and read", lambda: read_parquet(whole), _rows)
    pd.testing.assert_frame_equal(again, both.reset_index(drop=True))
    for name, limit in (("test", 20), ("oof", np.inf)):  # CPU seconds: 10 s on two cores
        table = read_parquet(job.run.path(f"{name}.parquet"))
        rows = job.images.rows_of(table["image_id"])
        y, probs, patients = labels_of(job.images, rows), table[CLASSES].to_numpy(), job.images.patients(rows)
        bootstrap_auroc(y[:2000], probs[:2000], patients[:2000], 2, skip_undefined=True)  # compiles
        began = cpu_seconds()
        measure(
            f"class table, 14 × 1,000 resamples, {len(rows):,} images",
            partial(class_table, y, probs, patients, LABELS),
            _mean,
        )
        assert cpu_seconds() - began < limit, "the goal of the bootstrap is not met"
    folds = table["fold"].to_numpy()
    measure(f"operating points nested over {FOLDS} folds", lambda: nested_counts(y, probs, folds))
    measure("tune: all of this, for both lists", lambda: run_step(job, job.steps["tune"]))
    measure("submit: written and validated", lambda: run_step(job, job.steps["submit"]), lambda *_: "25,596 rows")
    paths = [job.run.path(f"{name}.csv") for name in ("submission", "sample_submission")]
    measure("… validated alone", lambda: validate_probabilities(*paths, ordered=True))
    measure("report", lambda: report(job))
    table = job.options.data / "Data_Entry_2017_v2020.csv"
    score = partial(comparison_tools(SOLUTION, Config)["score_predictions"], paths[0], labels=table)
    measure("tool `score_predictions`, 25,596 predictions", score)


def _mean(table, _):
    return f"mean AUROC {table['auroc'].iloc[-1]:.4f}"


def _rows(found, _):
    return f"{len(found):,} rows"


def _per_second(count, seconds):
    return f"{count / seconds:,.0f} images/s"


def main():
    """Print the table."""
    table, boxes = (label_table(name) for name in ("Data_Entry_2017_v2020.csv.gz", "BBox_List_2017.csv.gz"))
    if table is None or boxes is None:
        print("skipped: the NIH tables come with the package torchxrayvision (requirements-dev.txt)")
        return
    logging.getLogger("common").setLevel(logging.WARNING)
    rng, measure = np.random.default_rng(0), Meter()
    with tempfile.TemporaryDirectory() as root:
        folder, run = Path(root) / "data", Run(Path(root) / "run")
        print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
        print(f"{'':<54}{'wall s':>8}{'CPU s':>8}{'GB':>7}")
        measure("stand-in folder", lambda: write_folder(folder, table, boxes, rng))
        tables_and_folds(measure, folder)
        recipe, options = replace(SOLUTION, predict=draw_predictions), Options(data=folder, out=run.folder, workers=0)
        submissions = Path(root) / "submissions"
        device, budget = torch.device("cpu"), Budget(None)
        job = Job("chestxray14", "densenet121", CONFIG, options, run, device, budget, submissions, recipe=recipe)
        with mock.patch("common.data.store.decode_all", undecoded):
            measure("prepare: all of this and the store, without decoding", lambda: prepare_images(job, recipe))
        measure("prepare again: up to date", lambda: prepare_images(job, recipe))
        images = measure("prepared tables and store opened", lambda: open_images(job))
        assert len(images.rows()) == 86_524 and len(images.rows("test")) == 25_596
        assert len(images.tables[BOX_TABLE]) == 984
        loaders(measure, job)
        fusion(measure, job)
        write_weights(job)
        scoring(measure, job)
        run.close()
    print(f"peak: {measure.peak:.2f} GB resident (limit {LIMIT:.0f})")
    assert measure.peak < LIMIT, "resident memory passed the limit"


if __name__ == "__main__":
    main()
