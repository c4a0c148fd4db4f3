"""ChestX-ray14's training loop against its own ceiling, and against a plain loop over PNG files.

    python -m benchmarks.chestxray14_throughput [--size 224 --batch 128 --images 4096 --epochs 3 --workers N]

Three trainings of DenseNet-121 on the same images: our loop (store, flips, mixed precision, channels last); the same
loop on one fixed batch, the upper limit; and a loop like that of public CheXNet code: PIL opens PNG files, torchvision
scales, crops and normalises three channels, float32. Prints images/s and the ratios, after comparing the pixels that
reach the network. Small by default on a CPU, where the network takes all the time and the ratios mean little.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.loop import SameBatch
from common.data.loaders import EpochSampler, make_loader
from common.nn.losses import bce
from common.nn.precision import precision
from common.train.loop import fit
from solutions.chestxray14.config import LABELS, NetworkConfig
from solutions.chestxray14.models import AUGMENTATIONS, ViewDataset, build_network


class PngImages(Dataset):
    """PNG files read as in public code: float32 (3, size, size), normalised, with the labels."""

    def __init__(self, paths, labels, resize, size):
        steps = [
            torchvision.transforms.Resize((resize, resize)),
            torchvision.transforms.CenterCrop(size),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
        self.paths, self.labels, self.transform = paths, labels, torchvision.transforms.Compose(steps)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), torch.from_numpy(self.labels[index])


def our_rate(loader, config, device, folder):
    """Return images/s of the best epoch of `fit` after the first, which warms up."""
    ends = []

    def validate(model):
        wait(device)
        ends.append(time.perf_counter())
        return {"auroc": 0.0}

    def step(model, batch):
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        return bce(model(images), labels)

    torch.manual_seed(0)
    fit(build_network(config), step, loader, validate, config, folder, device=device)
    return loader.batch_sampler.batches * config.batch_size / min(np.diff(ends))


def plain_rate(loader, epochs, device):
    """Return images/s of the best epoch after the first of a plain float32 loop."""
    torch.manual_seed(0)
    model = torchvision.models.densenet121(num_classes=len(LABELS)).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    ends = []
    for _ in range(epochs):
        n = 0
        for images, labels in loader:
            loss = bce(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            n += len(images)
        wait(device)
        ends.append(time.perf_counter())
    return n / min(np.diff(ends))


def wait(device):
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def write_images(folder, count, side, resize):
    """Return smooth random radiographs as PNG files of `side` pixels and as a store's array."""
    rng, paths = np.random.default_rng(0), []
    store = np.empty((count, resize, resize), np.uint8)
    for i in range(count):
        grain = rng.integers(0, 256, (side // 8, side // 8), dtype=np.uint8)
        image = cv2.resize(grain, (side, side), interpolation=cv2.INTER_CUBIC)
        paths.append(folder / f"{i:06d}.png")
        cv2.imwrite(str(paths[-1]), image)
        store[i] = cv2.resize(image, (resize, resize), interpolation=cv2.INTER_AREA)
    np.save(folder / "images.npy", store)
    return paths, folder / "images.npy"


def main():
    """Measure and print."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = (("size", 224, 64), ("batch", 128, 8), ("images", 4096, 32), ("epochs", 3, 2), ("side", 1024, 256))
    for name, on_gpu, on_cpu in defaults:
        parser.add_argument(f"--{name}", type=int, default=on_gpu if gpu else on_cpu)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)) if gpu else 0)
    options = parser.parse_args()
    device, resize = torch.device("cuda" if gpu else "cpu"), round(options.size * 256 / 224)
    config = NetworkConfig(
        weights="none",
        resize=resize,
        size=options.size,
        batch_size=options.batch,
        lr=1e-4,
        epochs=options.epochs,
        optimizer="adam",
        averaging=("last",),
    )
    labels = (np.random.default_rng(1).random((options.images, len(LABELS))) < 0.1).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, array = write_images(folder, options.images, options.side, resize)
        dataset = ViewDataset(
            array, np.arange(options.images), resize, options.size, None, AUGMENTATIONS["flip"](resize), labels
        )
        plain = PngImages(paths, labels, resize, options.size)
        seen = plain[0][0][0].numpy() * 0.229 + 0.485
        apart = np.abs(seen - dataset[0][0][0].numpy() / 255).mean()
        assert apart < 0.03, f"the two loops see different pixels: {apart:.3f}"  # they resize differently
        loader = make_loader(dataset, EpochSampler(len(dataset), options.batch, 0), options.workers, pin_memory=gpu)
        same = our_rate(SameBatch(loader, device), config, device, folder / "same")
        real = our_rate(loader, config, device, folder / "real")
        files = DataLoader(plain, options.batch, shuffle=True, num_workers=options.workers, drop_last=True)
        png = plain_rate(files, options.epochs, device)
    kind = torch.cuda.get_device_name() if gpu else "CPU"
    dtype = str(precision(device)).removeprefix("torch.")
    print(f"{kind}, {dtype}, DenseNet-121, {options.size} px, batch {options.batch}, {options.workers} workers")
    for what, rate in (("our loop", real), ("one batch that never changes", same), ("PNG files, float32", png)):
        print(f"{what:<32}{rate:>9.1f} images/s   our loop: {real / rate:.2f} times")


if __name__ == "__main__":
    main()
