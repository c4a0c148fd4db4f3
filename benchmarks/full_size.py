"""Challenges at their full numbers of images: time and memory of every verb, with stand-ins for networks.

    OMP_NUM_THREADS=1 python -m benchmarks.full_size [siim_pneumothorax …] [--share 1.0] [--kills 2]

The verbs are the real ones, from the challenge's files to the page, on 12,047 + 3,205, 15,000 + 3,000 and 112,120
images. At first a whole run of half of the images is killed (`kill -9`), by default in `train` and in `predict`, and
continued; then the verbs are measured one by one on half of the images, whose files must be those of the killed run,
byte for byte, and on all. No step may take more than three times as long for twice the images, and no more memory than
4 GB.

Simulated are the image files (empty), their pixels (repeated phantoms of 64 px with another brightness each), the
labels of VinBigData (drawn in the numbers of the challenge: 4,394 images with findings, three raters each) and the
networks: a segmenter of three layers whose masks are the bright parts of an image, detectors that give 100 boxes, drawn
by the image's brightness from where boxes of their class lie, and classifiers that look at the brightness; for
ChestX-ray14 a real network of a few layers. SIIM's masks and ChestX-ray14's labels are the challenge's, from
torchxrayvision (the script stops without it); the official lists are drawn by patient. Maps have 64 px: those of 1,024
px are measured by benchmarks.tuning_memory.
"""

import argparse
import contextlib
import gzip
import logging
import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from benchmarks.kills import attempt
from benchmarks.meter import Meter
from benchmarks.tables import label_table
from common import phantom
from common.cli import VERBS
from common.data.store import HEADER, RECORD, to_square
from solutions.__main__ import main as solutions_main
from solutions.vinbigdata.config import CLASSES, NO_FINDING, NOTHING
from tests.running import VARYING, hash_files

SIDE, BLOCK, FILMS, LIMIT = 64, 4096, 32, 4.0  # px, images per write, different phantoms, GB
ORIGINAL = 1024  # px of the image files
SETTINGS = {  # large batches: optimizer steps are not what is measured
    "siim_pneumothorax": f"podium --store-size {SIDE} --segmenter.sizes {SIDE} --segmenter.epochs 1 "
    "--segmenter.frozen-epochs 0 --segmenter.weights none --segmenter.augmentation light --segmenter.batch-size 64",
    "vinbigdata": f"paper --store-size {SIDE} --n-folds 5 --folds 0 1 2 3 4 --detector.size {SIDE} "
    "--detector.epochs 1 --detector.weights none --detector.batch-size 32 --detector.validate-images 500 "
    f"--healthy.size {SIDE} --healthy.epochs 1 --healthy.weights none",
    "chestxray14": f"densenet121 --store-size {SIDE} --n-folds 5 --folds 0 1 2 3 4 --whole.backbone test_resnet "
    f"--whole.size {SIDE} --whole.resize {SIDE} --whole.epochs 1 --whole.weights none --whole.batch-size 512",
}


# ---- simulated data ------------------------------------------------------------------------------------------------


def write_siim(folder, share):
    """Write SIIM's folder: the first part of the real masks, and empty image files."""
    with gzip.open(label_table("siim-pneumothorax-train-rle.csv.gz"), "rt") as file:
        masks = pd.read_csv(file, dtype=str, keep_default_na=False, skipinitialspace=True).set_axis(
            ["ImageId", "EncodedPixels"], axis=1
        )
    ids = masks["ImageId"].unique()
    ids, tests = ids[: round(share * len(ids))], [f"test.{number}" for number in range(round(share * 3205))]
    folder.mkdir()
    masks[masks["ImageId"].isin(ids)].to_csv(folder / "stage_2_train.csv", index=False)
    write_files(folder / "dicom-images-train", ids, "dcm")
    write_files(folder / "dicom-images-test", tests, "dcm")
    sample = pd.DataFrame({"ImageId": tests, "EncodedPixels": "-1"})
    sample.to_csv(folder / "stage_2_sample_submission.csv", index=False)


def write_vinbigdata(folder, share):
    """Write VinBigData's folder: drawn findings of three raters per image, and empty image files."""
    rng, n = np.random.default_rng(0), round(share * 15_000)
    ids, tests = ([f"{kind}{number:05}" for number in range(count)] for kind, count in (("a", n), ("t", n // 5)))
    abnormal = rng.permutation(n)[: round(4394 / 15_000 * n)]
    rows = [pd.DataFrame({"image": np.repeat(np.setdiff1d(np.arange(n), abnormal), 3), "class_id": NO_FINDING})]
    marked = np.repeat(abnormal, rng.integers(1, 5, len(abnormal)))  # findings, each seen by all three raters
    found = pd.DataFrame({"image": np.repeat(marked, 3), "class_id": np.repeat(rng.integers(0, 14, len(marked)), 3)})
    places = PLACES[found["class_id"], np.repeat(rng.integers(0, PLACES.shape[1], len(marked)), 3)]
    boxes = (ORIGINAL * (places + rng.normal(0, 0.01, places.shape))).clip(0, ORIGINAL - 1)
    found[["x_min", "y_min", "x_max", "y_max"]] = boxes.round(1)
    table = pd.concat([*rows, found], ignore_index=True)
    table["rad_id"] = [f"R{8 + number % 3}" for number in range(len(table))]
    table["image_id"], table["class_name"] = np.array(ids)[table["image"]], np.array(CLASSES)[table["class_id"]]
    folder.mkdir()
    columns = ["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"]
    table[columns].to_csv(folder / "train.csv", index=False)
    for name, some in (("train", ids), ("test", tests)):
        write_files(folder / name, some, "dicom", flat=True)
    sample = pd.DataFrame({"image_id": tests, "PredictionString": NOTHING})
    sample.to_csv(folder / "sample_submission.csv", index=False)


def write_chestxray14(folder, share):
    """Write ChestX-ray14's folder: the first part of the label table, lists drawn by patient, and empty image files."""
    with gzip.open(label_table("Data_Entry_2017_v2020.csv.gz"), "rt") as file:
        table = pd.read_csv(file, dtype=str)
    table = table.iloc[: round(share * len(table))]
    folder.mkdir()
    table.to_csv(folder / "Data_Entry_2017_v2020.csv", index=False)
    patients = table["Patient ID"].unique()
    in_test = table["Patient ID"].isin(np.random.default_rng(0).permutation(patients)[: len(patients) // 5])
    for part, chosen in (("train_val", ~in_test), ("test", in_test)):
        (folder / f"{part}_list.txt").write_text("".join(f"{name}\n" for name in table.loc[chosen, "Image Index"]))
    write_files(folder / "images_001" / "images", table["Image Index"].str.removesuffix(".png"), "png", flat=True)


def write_files(folder, ids, ending, flat=False):
    """Write an empty file for each image, in folders of its own as in SIIM unless `flat`."""
    for name in ids:
        place = folder if flat else folder / name / name
        place.mkdir(parents=True, exist_ok=True)
        os.close(os.open(place / f"{name}.{ending}", os.O_CREAT | os.O_WRONLY))


def undecoded(target, todo, workers):
    """Stand in for `decode_all`: write phantoms in blocks, each row's the same whenever it is written."""
    films = np.stack([to_square(phantom.draw(seed, 256).image, target.size) for seed in range(FILMS)]) // 4 * 3
    record = dict.fromkeys(RECORD) | {"width": ORIGINAL, "height": ORIGINAL, "colour": 0.0}
    with open(target.path, "r+b") as file:
        for start in range(0, len(todo), BLOCK):
            for row, _ in todo[start : start + BLOCK]:
                file.seek(HEADER + row * target.size**2)
                file.write(films[row % FILMS] + np.uint8(row * 37 % 64))
            file.flush()
            for row, _ in todo[start : start + BLOCK]:
                yield row, record, None


# ---- stand-ins for networks ----------------------------------------------------------------------------------------


def _places():
    """Return eight typical boxes of each class, (14, 8, 4): x_min, y_min, x_max, y_max in shares of the side."""
    rng = np.random.default_rng(1)
    centre, half = rng.uniform(0.2, 0.8, (14, 8, 2)), rng.uniform(0.03, 0.15, (14, 8, 2))
    return np.concatenate([centre - half, centre + half], 2)


PLACES = _places()


class Segmenter(torch.nn.Module):
    """Stand in for a segmenter: the logits of bright parts plus those of two layers, and a presence logit."""

    def __init__(self, *shape, empty_head=False, frozen_norms=False):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(1, 4, 3, 4, 1), torch.nn.Conv2d(4, 1, 1)
        self.present, self.empty_head = torch.nn.Linear(4, 1), empty_head

    def forward(self, images):
        x = images.float() / 255
        seen = functional.relu(self.first(x))
        logits = functional.interpolate(self.second(seen), scale_factor=4) / 4 + 24 * functional.avg_pool2d(
            x - 0.62, 5, 1, 2
        )
        return (logits, self.present(seen.mean((2, 3)))) if self.empty_head else logits


class Detector(torch.nn.Module):
    """Stand in for a detector: a hundred boxes, shifted a little by each network, whose scores its training changes."""

    def __init__(self, config, n_classes, weights=None):
        super().__init__()
        self.per_image, self.size = config.per_image, config.size
        self.shift = torch.nn.Parameter(torch.randn(self.per_image, 4) / 200)
        self.scores = torch.nn.Parameter(torch.rand(self.per_image))
        self.register_buffer("places", torch.tensor(PLACES, dtype=torch.float32).reshape(-1, 4))

    def forward(self, images, targets=None):
        if self.training:
            counts = torch.tensor([float(len(each["labels"])) for each in targets])
            return {"count": (self.scores.mean() - counts.mean() / 10) ** 2 + self.shift.square().mean()}
        order, found = self.scores.argsort(descending=True), []
        for brightness in images.flatten(1).float().mean(1).mul(1000).long().tolist():
            place = (brightness + 5 * torch.arange(self.per_image)) % len(self.places)
            boxes = (self.places[place] + self.shift).clip(0, 1) * self.size
            found.append({"boxes": boxes[order], "labels": place[order] // 8, "scores": self.scores[order].sigmoid()})
        return found


class Classifier(torch.nn.Module):
    """Stand in for a classifier: logits of the mean brightness."""

    def __init__(self, backbone, n_classes, weights, **how):
        super().__init__()
        self.last = torch.nn.Linear(1, n_classes)

    def forward(self, images):
        return self.last(images.float().flatten(1).mean(1, keepdim=True) / 255)


@contextlib.contextmanager
def stand_ins():
    """Replace the decoding of images and the networks."""
    with contextlib.ExitStack() as stack:
        for target, stand_in in (
            ("common.data.store.decode_all", undecoded),
            ("solutions.siim_pneumothorax.pipeline.segmenter", Segmenter),
            ("common.detection.build_detector", Detector),
            ("common.nn.models.classifier", Classifier),
        ):
            stack.enter_context(mock.patch(target, stand_in))
        yield


# ---- runs ----------------------------------------------------------------------------------------------------------


def write_data(name, folder, share):
    """Write the folder of a challenge, a share of its full length."""
    writers = {"siim_pneumothorax": write_siim, "vinbigdata": write_vinbigdata, "chestxray14": write_chestxray14}
    writers[name](folder, share)


def words(name, data):
    """Return the preset and the options of all verbs."""
    return [*SETTINGS[name].split(), "--data", data, "--out", "run", "--workers", "0", "--device", "cpu"]


def run_killed(name, data, folder, kills):
    """Kill a whole run some seconds into these verbs, {verb: seconds}, and continue it to its end."""
    command = [name, "run", *words(name, data)]
    for kill in kills.items():
        reached = attempt(command, folder, kill)
        assert "end" not in reached and kill[0] in reached, f"not killed in {kill[0]}"
    assert "end" in attempt(command, folder)


def run_verbs(name, data, folder, measure):
    """Measure every verb of a run one after the other, in the folder."""
    folder.mkdir()
    with contextlib.chdir(folder):
        for verb in VERBS:
            command = [name, verb, *words(name, data)]
            status = measure(f"{name}: {verb}", lambda command=command: solutions_main(list(map(str, command))))
            assert status == 0, verb


def compare(killed, measured):
    """Return the number of files of both runs. Raises AssertionError unless all are the same."""
    one, other = (hash_files(folder / "run", but=VARYING) for folder in (killed, measured))
    differ = sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))
    assert one and not differ, differ
    return len(one)


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(SETTINGS), metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--share", type=float, default=1.0, help="of the full length, for a try")
    parser.add_argument("--kills", type=int, default=2, choices=range(3))
    parser.add_argument("--folder", help="where the temporary folder goes")
    options = parser.parse_args()
    if unknown := set(options.names) - SETTINGS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(SETTINGS)}")
    if label_table("siim-pneumothorax-train-rle.csv.gz") is None:
        print("skipped: SIIM's masks come with the package torchxrayvision (requirements-dev.txt)")
        return
    for name in options.names:
        with tempfile.TemporaryDirectory(dir=options.folder) as root, stand_ins():
            root = Path(root)
            write_data(name, root / "whole", options.share)
            write_data(name, root / "half", options.share / 2)
            moments = {"train": 0.1 + 5 * options.share, "predict": 0.05 + 2 * options.share}
            kills = dict(list(moments.items())[: options.kills])
            run_killed(name, root / "half", root / "killed", kills)
            meters = Meter(), Meter()
            for part, measure in zip(("half", "whole"), meters, strict=True):
                print(f"{part:<54}{'wall s':>8}{'CPU s':>8}{'GB':>7}")
                run_verbs(name, root / part, root / f"run-{part}", measure)
            same = compare(root / "killed", root / "run-half")
            print(f"killed in {' and '.join(kills) or 'nothing'}, continued: the same {same} files")
        for (title, (_, less, _)), (_, more, peak) in zip(meters[0].rows.items(), meters[1].rows.values(), strict=True):
            assert more < 3 * less + 3, f"{title}: {less:.1f} CPU seconds for half of the images, {more:.1f} for all"
            assert peak < LIMIT, f"{title}: {peak:.1f} GB"


if __name__ == "__main__":
    logging.getLogger("common").setLevel(logging.WARNING)
    main()
