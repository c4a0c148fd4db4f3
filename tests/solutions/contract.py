"""Every solution at its smallest, one finished run of each, and ways to change its data.

A further solution enters the table SOLUTIONS.
"""

import importlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import cv2
import pytest
from filelock import FileLock

from common.cli import MORE_VERBS, VERBS
from solutions.__main__ import main

NET = "test_resnet.r160_in1k"  # timm's smallest, 0.5 million parameters


def edit(name, pattern, replacement):
    """Return a function of a data folder that replaces the first match of `pattern` in its file `name`."""

    def change(data):
        text = (data / name).read_text()
        changed = re.sub(pattern, replacement, text, count=1, flags=re.MULTILINE)
        assert changed != text
        (data / name).unlink()  # the files of a copy are links
        (data / name).write_text(changed)

    return change


def swap(one, other):
    """Return a function of a data folder that exchanges two of its files."""

    def change(data):
        contents = [(data / name).read_bytes() for name in (other, one)]
        for name, content in zip((one, other), contents, strict=True):
            (data / name).unlink()
            (data / name).write_bytes(content)

    return change


@dataclass(frozen=True)
class Case:
    """A solution with settings that make the preset demo as small as it can be.

    sample: arguments of make_sample. options: words of every command. training, decision, views: words that change a
    training, the decision rule and the views; "" where the solution has no such setting. relabel(data) changes a label.
    """

    name: str
    sample: dict
    options: str
    training: str
    relabel: Callable
    decision: str = ""
    views: str = "--tta flip"

    @cached_property
    def words(self):
        """The preset and its options."""
        return ["demo", *self.options.split()]

    @property
    def recipe(self):
        """The solution itself."""
        return importlib.import_module(f"solutions.{self.name}.pipeline").SOLUTION

    @property
    def verbs(self):
        """The names of all verbs but `run`."""
        config = importlib.import_module(f"solutions.{self.name}.config")
        return (*VERBS, *MORE_VERBS, *getattr(config, "MORE_VERBS", ()))


VIEW = """--{0}.backbone test_resnet --{0}.weights none --{0}.resize 64 --{0}.size 56 --{0}.epochs 1
    --{0}.batch-size 4 --{0}.precision fp32"""
CASES = (
    Case(
        "siim_pneumothorax",
        {"n_train": 16, "n_test": 4},
        f"""--store-size 64
        --classifier.backbone {NET} --classifier.weights none --classifier.size 64 --classifier.batch-size 4
        --classifier.epochs 2 --classifier.precision fp32
        --segmenter.encoder {NET} --segmenter.weights none --segmenter.sizes 64 --segmenter.batch-size 4
        --segmenter.epochs 2 --segmenter.precision fp32""",
        training="--segmenter.epochs 3",
        decision="--decision.pixel 0.4",
        relabel=edit("train-rle.csv", r" -1$", " 5 5"),
    ),
    Case(
        "lung_segmentation",
        {"n_montgomery": 4, "n_shenzhen": 8, "n_jsrt": 0, "n_test": 2},
        """--store-size 64 --n-folds 2 --folds 0 1 --validation 0.2 --network.architecture plain --network.encoder=
        --network.weights none --network.decoder 4 8 --network.size 32 --network.epochs 8 --network.batch-size 2
        --network.lr 0.02 --network.precision fp32 --network.window 2""",
        training="--network.epochs 9",
        decision="--decision.pixel 0.4",
        relabel=swap("mask/mask/CHNCXR_0001_0_mask.png", "mask/mask/CHNCXR_0002_0_mask.png"),
    ),
    Case(
        "vinbigdata",
        {"n_train": 16, "n_test": 4},
        f"""--store-size 96 --detector.architecture fcos --detector.backbone {NET} --detector.weights none
        --detector.size 96 --detector.channels 64 --detector.epochs 1 --detector.precision fp32 --members flip noise
        --healthy.backbone {NET} --healthy.weights none --healthy.size 64 --healthy.epochs 1 --healthy.precision fp32
        --workers 0""",
        training="--healthy.epochs 2",
        decision="--decision.alpha 0.8",
        relabel=edit("train.csv", r"\.0$", ".5"),
    ),
    Case(
        "rsna_pneumonia",
        {"n_train": 16, "n_test": 4},
        f"""--store-size 96 --members fcos --detector.backbone {NET} --detector.weights none --detector.size 96
        --detector.channels 64 --detector.epochs 1 --detector.precision fp32 --gate.backbone {NET} --gate.weights none
        --gate.size 64 --gate.epochs 1 --gate.precision fp32 --decision.threshold 0 0.05 0.1 --workers 0""",
        training="--gate.epochs 2",
        decision="--decision.gate 0.8",
        relabel=edit("stage_2_train_labels.csv", r"\.0,1", ".5,1"),
    ),
    Case(
        "chestxray14",
        {"n_train": 16, "n_test": 6},
        f"""--views both --store-size 64 --segmenter.crop-size 64 --segmenter.mask-size 16 --fusion.epochs 3
        --fusion.batch-size 4 --workers 0 {VIEW.format("whole")} {VIEW.format("lungs")}""",
        training="--lungs.epochs 2",
        relabel=edit("Data_Entry_2017.csv", "No Finding", "Mass"),
    ),
    Case(
        "covid19",
        {"n_covid": 12, "n_other": 4, "n_normals": 12, "n_test": 4},
        """--store-size 64 --n-folds 2 --folds 0 1 --network.backbone test_resnet --network.weights none
        --network.size 64 --network.epochs 2 --network.batch-size 4 --network.precision fp32 --audit.folds 0 1
        --audit.epochs 1 --workers 0""",
        training="--network.epochs 3",
        relabel=edit("metadata.csv", "No Finding", "COVID-19"),
    ),
    Case(
        "own",
        {"n_train": 16, "n_test": 4},
        """--store-size 64 --classifier.backbone test_resnet --classifier.weights none --classifier.size 64
        --classifier.epochs 2 --classifier.batch-size 4 --classifier.precision fp32 --workers 0""",
        training="--classifier.epochs 3",
        relabel=edit("labels.csv", "p0000,1", "p0000,0"),
    ),
)
SOLUTIONS = {case.name: case for case in CASES}
# for slow tests: by default those that differ most (masks, boxes with further networks, labels that a user gives)
QUICK = ("siim_pneumothorax", "own")
FEW_FOLDS = ("--n-folds", "3", "--folds", "0")
ON_SAMPLE = dict.fromkeys(SOLUTIONS, FEW_FOLDS) | {  # with what every preset can be planned on the small sample
    "vinbigdata": ("--n-folds", "5", "--folds", "0"),  # `paper` needs folds that five divides
    "lung_segmentation": (*FEW_FOLDS, "--structures", "lungs", "--datasets", "Montgomery", "Shenzhen"),  # no hearts
}
MOSTLY_LONG = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SOLUTIONS]


def make_sample(case, folder):
    """Make the tiny sample of a solution in `folder` and return it."""
    return importlib.import_module(f"solutions.{case.name}.sample").make_sample(folder, **case.sample)


class Runs:
    """The sample and a finished run of each solution, made when they are first asked for, once for all test processes.

    shared: a folder that the processes of a session share; new_folder(name): returns a new one of this process.
    """

    def __init__(self, shared, new_folder):
        self._shared, self._new_folder, self._finished = shared, new_folder, {}

    def sample(self, name):
        """Return the folder of the tiny sample."""
        return self._make_once(f"{name}-sample", lambda folder: make_sample(SOLUTIONS[name], folder / "data")) / "data"

    def finished(self, name):
        """Return the folder that holds a finished run, `run`, its `stores` and its `submissions`."""

        def run(folder):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                words = [name, "run", *SOLUTIONS[name].words, "--data", str(sample), "--out", "run"]
                assert main(words) == 0

        if name not in self._finished:
            sample = self.sample(name)
            made, own = self._make_once(f"{name}-finished", run), self._new_folder(f"{name}-finished")
            self._finished[name] = shutil.copytree(made, own, dirs_exist_ok=True)  # commands add to its stores
        return self._finished[name]

    def _make_once(self, name, make):
        folder, done = self._shared / name, self._shared / f"{name}.done"
        with FileLock(self._shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder


def find_image(data, image_id):
    """Return the path of an image by its id, which is the name of its file with or without the suffix."""
    found = [path for path in sorted(data.rglob("*")) if image_id in (path.name, path.stem)]
    return next(path for path in found if path.is_file() and "mask" not in str(path.relative_to(data)).lower())


def edit_image(path):
    """Write another image of the same size to `path`, which may be a link; a DICOM file gets that of another one."""
    if path.suffix in (".dcm", ".dicom"):
        content = next(p for p in sorted(path.parents[2].rglob(f"*{path.suffix}")) if p != path).read_bytes()
        path.unlink()
        path.write_bytes(content)
    else:
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        path.unlink()
        cv2.imwrite(str(path), image // 2 + 20)
