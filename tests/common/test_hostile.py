"""Runs, stores and exports with a damaged file, by the thousand: readers and verbs work or say what is wrong."""

import os

import numpy as np
import pytest

from common.cli import VERBS
from common.config import from_dict
from common.data.folds import load_folds
from common.data.store import Store
from common.export import export_tool, infer_tool
from common.infer.predict import write_masks
from common.nn.weights import read_state
from common.paths import read_array, read_csv, read_json, read_parquet
from common.runs import Run
from common.train.checkpoint import load_resume, load_weights, save_resume
from common.trained import Trained
from tests.fuzzing import COUNT, survive
from tests.toy import TOY, Config, Net, make_job, write_data

IDS = [f"i{number:02d}" for number in range(8)]
PARTS = ("run", "stores", "trained")


def call_verbs(root, verbs):
    for name in verbs:
        job = make_job(root / "run", data=root / "data")
        try:
            TOY.verbs()[name](job)
        finally:
            job.run.close()


def export(root):
    export_tool(TOY, Config)(root / "run", out=root / "trained")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """All files of a finished run, its store and its export, in folders of the test's own."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data")
    call_verbs(tmp_path, VERBS)
    export(tmp_path)
    save_resume(tmp_path / "run" / "fold0" / "net" / "last.ckpt", {"epoch": 1, "model": Net().state_dict()})
    left_out = (".lock", "log.txt", "report.html")
    found = sorted(path for part in PARTS for path in (tmp_path / part).rglob("*") if path.is_file())
    return [path for path in found if path.name not in left_out]


def read_manifest(path):
    run = Run(path.parent)
    try:
        assert isinstance(run.manifest, dict)
    finally:
        run.close()


def read_config(path):
    values = read_json(path)
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if name not in ("solution", "preset")}
    from_dict(Config, values, str(path))


def read_weights(path):
    load_weights(path, Net())
    read_state(path)


READERS = {  # by name or suffix; the others are read by what opens their folder
    "manifest.json": read_manifest,
    "config.json": read_config,
    "store.json": lambda path: Store.open(path.parent),
    "table.parquet": lambda path: Store.open(path.parent),
    "images.npy": lambda path: Store.open(path.parent),
    "trained.json": lambda path: Trained.open(path.parent),
    "folds.csv": lambda path: load_folds(path, IDS),
    "last.ckpt": load_resume,
    ".csv": read_csv,
    ".json": read_json,
    ".parquet": read_parquet,
    ".npy": read_array,
    ".safetensors": read_weights,
}


def read_file(path):
    (READERS.get(path.name) or READERS[path.suffix])(path)


@pytest.mark.long
def test_compressed_maps(tmp_path):
    images = np.random.default_rng(0).integers(0, 4, (6, 2, 32, 32), np.uint8)
    write_masks(tmp_path / "m.b2nd", images.shape, [images])
    assert COUNT // 20 < survive([read_maps], [tmp_path / "m.b2nd"]) < COUNT * 9 // 10


def read_maps(path):
    for one in read_array(path):
        assert one.dtype == "uint8"


@pytest.mark.long
def test_files_of_runs_and_exports(files):
    done = survive([read_file], files, root=str(files[0].parents[1]))
    assert COUNT // 20 < done < COUNT * 9 // 10


def use(path):
    """Call every verb and tool that reads the damaged file."""
    root = next(folder for folder in path.parents if (folder / "data").is_dir())
    os.chdir(root)
    if "trained" in path.parts:
        infer_tool(TOY, Config)(root / "trained", data=root / "data", workers=0)
    else:
        call_verbs(root, [*VERBS][1:])
        export(root)


@pytest.mark.long
def test_verbs_on_damaged_runs_and_exports(files):
    done = survive([use], files, root="", count=COUNT // 20)
    assert COUNT // 400 < done < COUNT // 20 * 9 // 10
