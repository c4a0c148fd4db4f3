"""Is the loader the bottleneck? The real training loop against the same loop fed with one batch that never changes.

    python -m benchmarks.loop [--encoder resnet34 --size 512 --batch 32 --images 1024 --epochs 3 --workers N]

Prints images/s of both, their ratio (1: the loader costs nothing), and the share of the device's measured rate of
matrix products that the training step reaches (operations counted by torch). Small by default on a CPU.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.config import FitConfig
from common.data.augment import podium_siim
from common.data.loaders import EpochSampler, SampleDataset, make_loader
from common.nn.losses import combo
from common.nn.models import segmenter
from common.nn.precision import autocast, precision
from common.train.loop import fit


class SameBatch:
    """A loader that hands out one batch, already on the device, as often as the real one has batches."""

    def __init__(self, loader, device):
        self.batch_sampler = loader.batch_sampler
        loader.batch_sampler.set_epoch(0, 1)
        self.batch = [part.to(device) for part in next(iter(loader))]

    def __iter__(self):
        return (self.batch for _ in range(len(self.batch_sampler)))


def square(row, size):
    """A mask with one square that depends on the row."""
    mask = np.zeros((size, size), np.uint8)
    corner = row * 37 % (size // 2)
    mask[corner : corner + size // 4, corner : corner + size // 4] = 1
    return mask


def step(model, batch, device):
    """Combo loss of one batch."""
    images, masks = (part.to(device, non_blocking=True) for part in batch)
    return combo(model(images), masks)


def images_per_second(loader, options, device, folder):
    """Images/s of the last epochs of a real `fit`; the first epoch warms up and does not count."""
    ends = []

    def validate(model):
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return {"score": 0.0}

    torch.manual_seed(0)
    config = FitConfig(epochs=options.epochs, batch_size=options.batch, averaging=("last",), lr=1e-4)
    model = segmenter("fpn", options.encoder, "none")
    fit(model, partial(step, device=device), loader, validate, config, folder, device=device)
    return loader.batch_sampler.batches * options.batch / min(np.diff(ends))


def matrix_rate(device, dtype):
    """Operations per second of a square matrix product on random data."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = np.inf
    for _ in range(10):
        begun = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def operations(options, device, dtype):
    """Floating-point operations of one training step, per image."""
    model = segmenter("fpn", options.encoder, "none").to(device)
    images = torch.zeros(options.batch, 1, options.size, options.size, dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter, autocast(device, dtype):
        model(images).mean().backward()
    return counter.get_total_flops() / options.batch


def main():
    """Measure and print."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, on_gpu, on_cpu in (("size", 512, 128), ("batch", 32, 4), ("images", 2048, 64), ("epochs", 3, 3)):
        parser.add_argument(f"--{name}", type=int, default=on_gpu if gpu else on_cpu)
    parser.add_argument("--encoder", default="resnet34")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)) if gpu else 0)
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    dtype = precision(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npy")
        np.save(path, np.random.default_rng(0).integers(0, 256, (options.images, 1024, 1024), dtype=np.uint8))
        dataset = SampleDataset(path, partial(square, size=1024), podium_siim(options.size), options.size)
        sampler = EpochSampler(len(dataset), options.batch, 0)
        loader = make_loader(dataset, sampler, options.workers, pin_memory=gpu)
        same = images_per_second(SameBatch(loader, device), options, device, Path(folder, "same"))
        real = images_per_second(loader, options, device, Path(folder, "real"))
    rate, each = matrix_rate(device, dtype), operations(options, device, dtype)
    what = [torch.cuda.get_device_name() if gpu else "CPU", str(dtype).removeprefix("torch."), f"FPN {options.encoder}"]
    print(*what, f"{options.size} px", f"{options.workers} workers", sep=", ")
    print(f"same batch {same:8.1f} images/s\nreal loop  {real:8.1f} images/s   ratio {real / same:.3f}")
    print(f"share of the measured matrix rate ({rate / 1e12:.2f} TFLOP/s): {real * each / rate:.1%}")


if __name__ == "__main__":
    main()
