"""Lung masks of many files: our threads and half precision against the same network on one float32 image at a time.

Run: python -m benchmarks.lungs [weights file] (the shipped weights by default; real COVID-19 images under CXR_REAL_DATA
if there are any, else generated ones). Goals: 10 images a second on two cores, twice the loop, memory that does not
grow with the number of images.
"""

import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.reading import anatomy
from benchmarks.tables import real_data
from common.config import from_dict
from common.data.store import to_square
from common.paths import find_images
from common.train.checkpoint import load_weights
from solutions.lung_segmentation.config import NetworkConfig
from solutions.lung_segmentation.models import build_network
from solutions.lung_segmentation.segmenter import SHIPPED, load_segmenter, read_radiograph

ROUNDS, PART, FEW, MANY = 2, 32, 200, 1000


def one_by_one(model, segmenter, files):
    """Yield the mask and probabilities of each image, one after the other."""
    for path in files.values():
        image = read_radiograph(path)
        square = torch.from_numpy(to_square(image, segmenter.size))[None, None]
        with torch.inference_mode():
            probs = (model(square).sigmoid() * 255 + 0.5).to(torch.uint8).numpy()[0]
        yield segmenter.lungs(probs, image.shape), probs


def ours(segmenter, files):
    """Return the same masks and probabilities from `Segmenter.each`."""
    found = segmenter.each(files, lambda _, image, probs: (segmenter.lungs(probs, image.shape), probs))
    return (both for _, both, _ in found)


def all_files(folder):
    """Return FEW different radiographs by id; longer lists repeat them under other ids."""
    root = real_data("covid19")
    if root is not None:
        return dict(itertools.islice(find_images(root / "images").items(), FEW))
    for seed in range(PART):
        cv2.imwrite(str(folder / f"{seed}.png"), anatomy((512, 512), 255, seed).astype(np.uint8))
    return find_images(folder)


def peak(weights, paths, count):
    """Return the peak memory in MiB of a process that makes `count` masks."""
    command = [sys.executable, "-m", "benchmarks.lungs", "--peak", str(count), weights, *paths]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(count, weights, paths):
    """Make the masks in the process of `peak`."""
    files = {str(number): path for number, path in zip(range(count), itertools.cycle(paths), strict=False)}
    assert sum(1 for _ in ours(load_segmenter(weights or None, "cpu"), files)) == count
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(weights=""):
    """Print the table."""
    segmenter = load_segmenter(weights or None, "cpu")
    plain = load_segmenter(weights or None, "cpu", precision="fp32")
    network = from_dict(NetworkConfig, plain.about["network"])
    model = build_network(network, len(plain.structures), "none").eval()
    load_weights(weights or SHIPPED, model)
    with tempfile.TemporaryDirectory() as folder:
        files = all_files(Path(folder))
        part = dict(itertools.islice(files.items(), PART))
        ways = {"ours": lambda: ours(segmenter, part), "one by one": lambda: one_by_one(model, plain, part)}
        seconds, found = dict.fromkeys(ways, np.inf), {}
        for _ in range(ROUNDS + 1):  # the first round compiles: the best time leaves it out
            for name, way in ways.items():
                began = time.perf_counter()
                found[name] = list(way())
                seconds[name] = min(seconds[name], time.perf_counter() - began)
        for (_, a), (_, b) in zip(ours(plain, dict(itertools.islice(part.items(), 8))), found["one by one"]):  # noqa: B905
            np.testing.assert_allclose(a.astype(int), b, atol=1)  # in float32; half precision rounds
        differ = np.mean([np.mean(a != b) for (a, _), (b, _) in zip(found["ours"], found["one by one"], strict=True)])
        rates = {name: PART / best for name, best in seconds.items()}
        print(
            f"{segmenter.size} px, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}: "
            f"{rates['ours']:.1f} masks/s, one float32 image at a time {rates['one by one']:.1f} masks/s, "
            f"{rates['ours'] / rates['one by one']:.2f}x (goal 10/s and 2x); "
            f"{differ:.2%} of the masks' pixels differ"
        )
        paths = [str(path) for path in files.values()]
        peaks = [peak(weights, paths, count) for count in (FEW, MANY)]
        print(f"peak memory {peaks[0]:.0f} MiB for {FEW} images, {peaks[1]:.0f} MiB for {MANY}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main(*sys.argv[1:2])
