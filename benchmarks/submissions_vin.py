"""`ensemble` on the paper's six submissions, the whole command, against reading them by hand and ensemble-boxes.

Run: OMP_NUM_THREADS=1 python -m benchmarks.submissions_vin    (about a minute)

The files: 6 × 3,000 rows of 100 boxes, 82 MB; weights 5 2 1 1 1 1, IoU 0.4. The command starts, reads, checks, fuses,
writes, and reads and checks what it wrote; its first run may compile. The peer, a loop over the images that splits
the strings and calls ensemble-boxes, neither checks nor writes; it does some of them, and its time is that of all by
proportion. Seconds are of the processor. What the command wrote is compared with the peer's boxes.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.fusion import IMAGES, IOU, MODELS, PEERS, WEIGHTS, workload
from common.submit.validate import validate_boxes
from solutions.vinbigdata.postprocess import parse_predictions

ROUNDS = 2


def write_files(folder):
    """Write six submissions, scores with 6 decimals, coordinates with 3, as is common; return paths and sizes."""
    boxes, scores, labels, sizes = workload()
    pixels = boxes * np.tile(sizes, 2)[:, None, None]
    paths = [folder / f"{m}.csv" for m in range(MODELS)]
    for m, path in enumerate(paths):
        with open(path, "w") as file:
            file.write("image_id,PredictionString\n")
            for k in range(IMAGES):
                rows = zip(labels[k, m], scores[k, m], pixels[k, m], strict=True)
                entries = (f"{c} {max(s, 1e-6):.6f} {b[0]:.3f} {b[1]:.3f} {b[2]:.3f} {b[3]:.3f}" for c, s, b in rows)
                file.write(f"{k:032x},{' '.join(entries)}\n")
    return paths, sizes


def numbers(text):
    return np.array(text.split(), float).reshape(-1, 6)


def by_hand(paths, sizes):
    """Return the peer's (label, score, box in pixels) of some images, and its seconds for all in proportion."""
    import ensemble_boxes as peer

    texts = [pd.read_csv(path)["PredictionString"] for path in paths]
    chosen, fused = range(0, IMAGES, IMAGES // PEERS), {}
    begin = time.process_time()
    for k in chosen:
        parts, size = [numbers(column[k]) for column in texts], np.tile(sizes[k], 2)
        lists = [p[:, 2:] / size for p in parts], [p[:, 1] for p in parts], [p[:, 0] for p in parts]
        boxes, scores, labels = peer.weighted_boxes_fusion(*lists, weights=WEIGHTS, iou_thr=IOU)
        fused[k] = np.column_stack([labels, scores, boxes * size])
    return fused, (time.process_time() - begin) * IMAGES / len(chosen)


def command(*words):
    """Run `python -m solutions vinbigdata <words>`; return its output and CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-m", "solutions", "vinbigdata", *map(str, words)]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))


def compare(path, expected):
    """Assert that a submission has the peer's boxes; its scores exceed 1, ours are divided by the highest."""
    texts, top = pd.read_csv(path)["PredictionString"], None
    for k, rows in expected.items():
        own = numbers(texts[k])
        top = rows[0, 1] / own[0, 1] if top is None else top
        assert (own[:, 0] == rows[:, 0]).all(), k
        np.testing.assert_allclose(own[:, 1] * top, rows[:, 1], rtol=1e-5)
        np.testing.assert_allclose(own[:, 2:], rows[:, 2:], atol=0.01)


def seconds(function, *arguments):
    begin = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - begin


def main():
    with tempfile.TemporaryDirectory() as folder:
        paths, sizes = write_files(Path(folder))
        out = Path(folder, "fused.csv")
        words = ["ensemble", *paths, "--weights", *WEIGHTS, "--iou", IOU, "--out", out]
        command(*words)  # compiles
        said, taken = min((command(*words) for _ in range(ROUNDS)), key=lambda pair: pair[1])
        assert "1,800,000 boxes of 6 submissions fused; valid submission" in said and "accepted" not in said
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        _, start = min((command("ensemble", "--help") for _ in range(ROUNDS)), key=lambda pair: pair[1])
        expected, slow = by_hand(paths, sizes)
        compare(out, expected)
        read = min(seconds(parse_predictions, path)[1] for path in paths)
        summary, checked = seconds(validate_boxes, out, out)
    print(f"{'CPU seconds':44}{'ours':>10}{'peer':>10}{'ratio':>10}")
    print(f"{'the command, all of it':44}{taken:10.2f}{slow:10.2f}{slow / taken:10.1f}")
    print(f"{'without its start':44}{taken - start:10.2f}{slow:10.2f}{slow / (taken - start):10.1f}")
    print(f"    one of the files read and checked in {read:.2f} s, the fused one checked in {checked:.2f} s")
    print(f"    {summary.amount:,} boxes left; peak memory of the command {memory:.2f} GB")


if __name__ == "__main__":
    main()
