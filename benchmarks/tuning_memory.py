"""Predict, tune and submit at a challenge's scale: memory, and settings × images per second.

    python -m benchmarks.tuning_memory                            300 images, under a minute
    python -m benchmarks.tuning_memory --n 12000 --test 3205 --side 1024    the scale of SIIM, under 1 GB of disk

Probabilities are synthetic: a few soft blobs per image, written as two folds, joined, tuned and turned into a
submission by the functions of the SIIM solution, in a temporary folder, which is removed. The fast search is compared
with whole masks on a few images. The limit of 1.5 GB applies to all resident memory;
the anonymous part is printed too.
"""

import argparse
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from common.infer.predict import drain, write_masks
from common.metrics.segmentation import dice_from_areas
from common.paths import read_array
from common.post.regions import resize_mask_probs
from common.post.rle import paint, runs_of
from common.submit.table import write_submission
from common.submit.validate import validate_masks
from common.tuning import grid, rule_dice, summarise, tune_nested
from solutions.siim_pneumothorax.postprocess import submission_rows

PIXELS = (0.3, 0.45, 0.6, 0.75)


def synthetic(rng, side):
    """Return a uint8 probability map (side, side) and the runs of its truth at 1024; two images of five have blobs."""
    coarse = np.zeros((64, 64))
    truth = np.zeros((1024, 1024), np.uint8)
    y, x = np.mgrid[:64, :64]
    for _ in range(rng.integers(1, 4) if rng.random() < 0.4 else 0):
        cy, cx, ry, rx = *rng.uniform(10, 54, 2), *rng.uniform(2, 8, 2)
        coarse = np.maximum(coarse, np.exp(-(((y - cy) / ry) ** 2) - ((x - cx) / rx) ** 2) * rng.uniform(0.4, 1))
        if rng.random() < 0.7:
            top, left = int((cy - ry) * 16), int((cx - rx) * 16)
            truth[top : top + int(2 * ry * 16), left : left + int(2 * rx * 16)] = 1
    speckle = rng.random((64, 64)) < 0.002
    coarse = np.round(255 * np.maximum(coarse, speckle * rng.uniform(0.3, 0.9, (64, 64)))).astype(np.uint8)
    return resize_mask_probs(coarse, (side, side)), runs_of(truth)


class PeakMemory(threading.Thread):
    """Samples this process's anonymous memory while a block runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self._stop_event = 0, threading.Event()

    def run(self):
        process = psutil.Process()
        while not self._stop_event.wait(0.05):
            self.peak = max(self.peak, anonymous(process))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._stop_event.set()
        self.join()


def anonymous(process):
    """Return the bytes that no file backs: RssAnon on Linux, the unique set size elsewhere."""
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024
    return process.memory_full_info().uss


def predict(path, n, side, rng):
    """Write n maps one image at a time, as a prediction does; return their true runs."""
    runs = []

    def blocks():
        for _ in range(n):
            probs, truth = synthetic(rng, side)
            runs.append(truth)
            yield probs[None]

    write_masks(path, (n, side, side), blocks())
    return runs


def predict_folds(path, n, side, rng):
    """Write the maps of two folds and join them; return their true runs."""
    parts, sizes = [path.with_stem(f"fold{k}") for k in (0, 1)], [n // 2, n - n // 2]
    runs = [predict(path, size, side, rng) for path, size in zip(parts, sizes, strict=True)]
    write_masks(path, (n, side, side), drain(parts))
    return [*runs[0], *runs[1]]


def timed(name, work, detail=lambda seconds: "", repeats=1):
    """Run the work, print its best time, and return its result and the seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    print(f"{name:34}{min(seconds):10.2f} s   {detail(min(seconds))}", flush=True)
    return result, min(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="out-of-fold images")
    parser.add_argument("--test", type=int, default=80, help="test images")
    parser.add_argument("--side", type=int, default=512, help="network resolution in pixels")
    parser.add_argument("--format", choices=["b2nd", "npy"], default="b2nd", help="of the maps; npy: not compressed")
    parser.add_argument("--folder", help="where the temporary folder goes")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rules = grid(pixel=PIXELS, min_area=range(0, 5000, 250), gate=(0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    rules += grid(pixel=(0.3,), top=(0.6, 0.75, 0.9), min_pixels=(500, 1000, 2000, 4000))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, PeakMemory() as memory:
        folder, oof = Path(folder), Path(folder, f"oof.{args.format}")
        runs, _ = timed("predict (synthetic)", lambda: predict_folds(oof, args.n, args.side, rng))
        predict(oof.with_stem("test"), args.test, args.side, rng)
        probs, size = read_array(oof), oof.stat().st_size
        print(f"out-of-fold maps: {size / 1e9:.2f} GB, {np.prod(probs.shape) / size:.0f} × compressed", flush=True)
        positive = np.array([len(r) > 0 for r in runs])
        gate_probs = np.clip(0.5 * positive + 0.5 * rng.random(args.n), 0, 1)
        folds = np.arange(args.n) % 5

        summarise(probs[:2], runs[:2], PIXELS)  # compiles
        regions, labelling = timed(
            f"summarise ({len(PIXELS)} thresholds)",
            lambda: summarise(probs, runs, PIXELS),
            lambda s: f"{args.n / s:,.0f} images/s",
        )
        tuned, choosing = timed(
            f"tune ({len(rules)} settings, nested)",
            lambda: tune_nested(rules, lambda rule: rule_dice(regions, rule, gate_probs), folds),
            lambda s: f"{len(rules) * args.n / s:,.0f} settings × images/s",
            repeats=3,
        )

        few = rng.choice(args.n, min(args.n, 20), replace=False)
        fast = [rule_dice(regions, rule, gate_probs) for rule in (tuned.rule, rules[-1])]
        whole_masks = []
        for rule, dice in zip((tuned.rule, rules[-1]), fast, strict=True):
            for i in few:
                start = time.perf_counter()
                mask, truth = rule.apply(probs[i], gate_probs[i]) > 0, paint(runs[i], order="C") > 0
                areas = [np.array([m.sum()]) for m in (mask & truth, mask, truth)]
                exact = dice_from_areas(*areas)[0]
                whole_masks.append(time.perf_counter() - start)
                assert abs(exact - dice[i]) < 1e-12, (rule, i)

        def submit():
            test = read_array(oof.with_stem("test"))
            ids = [f"1.2.{i}" for i in range(args.test)]
            write_submission(folder / "sample.csv", pd.DataFrame({"ImageId": ids, "EncodedPixels": "-1"}))
            write_submission(folder / "submission.csv", submission_rows(ids, test, np.ones(args.test), tuned.rule))
            return validate_masks(folder / "submission.csv", folder / "sample.csv", ordered=True)

        timed("submit and validate", submit, lambda s: f"{args.test / s:,.0f} images/s")
    per_mask = np.median(whole_masks)
    whole = per_mask * args.n * len(rules)
    print(f"the grid on whole masks, one thread, at {per_mask * 1e3:.1f} ms a mask: {whole / 60:,.0f} min")
    print(f"ratio of whole masks to summarise and tune: {whole / (labelling + choosing):,.0f} ×")
    print(f"nested Dice {tuned.score:.4f}, naive {tuned.naive:.4f}, {tuned.rule}")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak: {memory.peak / 2**30:.2f} GB anonymous, {resident:.2f} GB resident")
    assert resident < 1.5, "resident memory passed 1.5 GB"


if __name__ == "__main__":
    main()
