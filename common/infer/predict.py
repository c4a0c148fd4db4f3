"""Probabilities for the rows of a store, in constant memory, averaged over models and views."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from common.data.loaders import SampleDataset, eval_loader
from common.errors import InputError
from common.infer.tta import IDENTITY, predict_tta, sigmoid
from common.nn.precision import autocast, precision
from common.paths import atomic_path


def predict_masks(
    models,
    images,
    rows,
    out_path,
    size,
    batch_size=8,
    device=None,
    views=(IDENTITY,),
    amp="auto",
    progress=True,
    activation=sigmoid,
    workers=0,
    channels=1,
):
    """Write mask probabilities to the `.npy` file `out_path` and return it memory-mapped, uint8 (n, h, w).

    models: networks or other callables from images (B, 1, h, w) uint8 to mask logits (B, C, h, w); all are held on
    the device at once, moved there, channels last and in eval mode. channels: C; with more than one the file is (n, C,
    h, w). images: a store, uint8 (N, H, W) or its path.
    rows: n store rows in the order wanted, None for all. size: the network's side or (h, w), None for the store's.
    activation: from a model's output to probabilities (B, 1, h, w), or to a pair of these and of presence (B, 1): then
    (memory map, presence float32 (n,)) is returned. amp: as in `common.nn.precision.precision`.
    progress: shown; a string is its title. The mean of the probabilities over models and views, p, is stored as
    p × 255, halves rounded up. The file appears when it is complete. Raises InputError for unusable arguments, and for
    a row whose probability is not a number.
    """
    dataset, present = _as_dataset(images, rows, size), []
    shape = dataset.size if channels == 1 else (channels, *dataset.size)

    def blocks():
        for probs, *more in _batches(models, dataset, batch_size, device, views, amp, progress, activation, workers):
            for part in more:
                present.extend(part[:, 0].tolist())
            if probs.shape[1:] != (channels, *dataset.size):
                found = tuple(probs.shape[1:])
                raise InputError(f"masks {found} from the network: expected {(channels, *dataset.size)}")
            yield (probs * 255 + 0.5).to(torch.uint8).cpu().numpy().reshape(-1, *shape)

    masks = write_masks(out_path, (len(dataset), *shape), blocks())
    return (masks, np.array(present, np.float32)) if present else masks


def write_masks(out_path, shape, blocks):
    """Write consecutive `blocks` of uint8 images as one `.npy` file of `shape` (n, …), whole or not at all.

    Returns it memory-mapped. Raises InputError for a path that does not end in .npy.
    """
    if Path(out_path).suffix != ".npy":
        raise InputError(f"{out_path}: mask probabilities go to a .npy file")
    # written as a plain file: pages of a written memory map would count as this process's memory
    with atomic_path(out_path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for block in blocks:
            file.write(np.ascontiguousarray(block))
    return np.load(out_path, mmap_mode="r")


def predict_probs(
    models,
    images,
    rows=None,
    size=None,
    batch_size=16,
    device=None,
    views=(IDENTITY,),
    amp="auto",
    progress=True,
    activation=sigmoid,
    workers=0,
):
    """Return class probabilities float32 (n, C), averaged over models and views; arguments as in `predict_masks`.

    images may also be a Dataset of items (image uint8 (channels, h, w), store row), without rows and size. What
    `activation` returns may have any shape (B, …) but that of maps, (B, C, h, w), which views would move.
    """
    dataset = _as_dataset(images, rows, size)
    if not len(dataset):
        raise InputError("no rows to predict")
    batches = _batches(models, dataset, batch_size, device, views, amp, progress, activation, workers)
    found, done = None, 0
    for (probs,) in batches:  # into one array: a list joined at the end would take twice its memory
        probs = probs.cpu().numpy()
        if found is None:
            found = np.empty((len(dataset), *probs.shape[1:]), probs.dtype)
        found[done : done + len(probs)] = probs
        done += len(probs)
    return found


def _as_dataset(images, rows, size):
    if not isinstance(images, Dataset):
        return SampleDataset(images, size=size, rows=rows)
    if rows is not None or size is not None:
        raise InputError("a dataset to predict has rows and a size of its own")
    return images


@torch.inference_mode()
def _batches(models, dataset, batch_size, device, views, amp, progress, activation, workers):
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, models = precision(device, amp), list(models)
    if not models:
        raise InputError("no model to predict with")
    for model in models:
        if isinstance(model, torch.nn.Module):
            model.to(device, memory_format=torch.channels_last).eval()
    loader = eval_loader(dataset, batch_size, workers, pin_memory=device.type == "cuda")
    title = progress if isinstance(progress, str) else "predict"
    with tqdm(total=len(dataset), desc=title, disable=not progress, leave=False) as bar:
        for images, rows in loader:
            images = images.to(device, non_blocking=True)
            with autocast(device, dtype):
                outputs = [predict_tta(model, images, views, activation) for model in models]
            outputs = [output if isinstance(output, tuple) else (output,) for output in outputs]
            means = [sum(parts) / len(models) for parts in zip(*outputs, strict=True)]
            bad = ~torch.stack([torch.isfinite(mean).flatten(1).all(1) for mean in means]).all(0).cpu()
            if bad.any():
                raise InputError(
                    f"row {int(rows[bad][0])}: the predicted probability is not a number; use fp32 or check the weights"
                )
            yield means
            bar.update(len(images))
