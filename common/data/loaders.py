"""From the store to batches, with random numbers that depend on the sample, not on a worker or process.

The sampler yields keys `(index, seed)`. The seed depends only on the run's seed, the epoch and the position within the
epoch, so batches are the same for any number of workers, after resuming within an epoch, and under torchrun.
"""

import os
import random
import shutil
from functools import cache

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from common import processes
from common.errors import InputError, check, log
from common.paths import read_array

PREFETCH = 4  # batches that a worker prepares ahead
WORKER_BYTES = 3 * 10**8  # memory per worker, measured on Linux
UNKNOWN = 2  # value of all pixels of a mask that does not exist
_SEEDS, _ORDER = 0, 1  # second words of the random streams, so that no two purposes share one


def passes(members, start, count, *key):
    """Return entries `start` to `start + count` of the endlessly repeated `members`, each pass in a new order.

    members: array (n,), n > 0. key: non-negative integers that seed the orders.
    """
    n = len(members)
    first = start // n
    orders = [np.random.default_rng([*key, p]).permutation(members) for p in range(first, (start + count - 1) // n + 1)]
    return np.concatenate([members[:0], *orders])[start - first * n :][:count]


def sliding_rate(first=0.8, last=0.4):
    """Return the linear schedule of SIIM's first place: fraction of the training in [0, 1] → share of positives."""
    return lambda fraction: first + (last - first) * fraction


class EpochSampler:
    """Batch sampler for `make_loader` that yields lists of keys `(index, seed)`, one epoch after another.

    n: samples in the dataset. batch_size: summed over all `world` processes, each of which takes an equal contiguous
    part of every batch, so that together they see the batches of a single process.
    positive_rate: maps the fraction of the training (0 in the first epoch, 1 in the last) to the epoch's share of
    positives; needs positives, (n,) of 0/1. None is a plain shuffle. Positives are spread evenly: any k consecutive
    samples contain k × rate of them, within one. A class is reshuffled only after all its samples were drawn.
    draws: samples per epoch, by default n whatever the rate, so that the number of steps is constant; with
    positives / mean rate, each positive is seen about once per epoch. An incomplete last batch is left out.
    `start_batch`, reset by set_epoch, may be set to the number of finished batches: iteration and `len()` skip them.
    Raises InputError for impossible arguments.
    """

    def __init__(self, n, batch_size, seed, positives=None, positive_rate=None, draws=None, rank=0, world=1):
        draws = n if draws is None else draws
        check(batch_size % world == 0, f"batch_size {batch_size} has no equal part for process {rank} of {world}")
        check(0 < batch_size <= draws, f"batch_size {batch_size} is larger than the {draws} samples of an epoch")
        self.n, self.batch_size, self.seed, self.draws = n, batch_size, seed, draws
        self.batches = draws // batch_size
        self.rank, self.world, self.positive_rate = rank, world, positive_rate
        if positive_rate is not None:
            positives = np.asarray(positives)
            self.classes = np.flatnonzero(positives == 0), np.flatnonzero(positives == 1)
        self.set_epoch(0, 1)

    def set_epoch(self, epoch, n_epochs):
        """Set the epoch of the next iteration, 0 to n_epochs − 1."""
        self.epoch, self.n_epochs, self.start_batch = epoch, n_epochs, 0
        if self.positive_rate is not None:
            for each in range(n_epochs):  # raise for an impossible rate now, not during the training
                self._rate(each)

    def _rate(self, epoch):
        rate = self.positive_rate(epoch / max(1, self.n_epochs - 1))
        negatives, positives = map(len, self.classes)
        if not 0 <= rate <= 1 or (rate < 1 and not negatives) or (rate > 0 and not positives):
            raise InputError(f"positive rate {rate:g} is not possible with {positives} positives of {self.n} samples")
        return rate

    def _indices(self):
        if self.positive_rate is None:
            return passes(np.arange(self.n), self.epoch * self.draws, self.draws, self.seed, _ORDER, 0)
        quota = np.floor(self._rate(self.epoch) * np.arange(self.draws + 1) + 0.5).astype(np.int64)
        positive = np.diff(quota) > 0
        drawn = sum(int(np.floor(self._rate(epoch) * self.draws + 0.5)) for epoch in range(self.epoch))
        indices = np.empty(self.draws, dtype=np.int64)
        for label, before in ((0, self.epoch * self.draws - drawn), (1, drawn)):
            where = np.flatnonzero(positive == label)
            if len(where):  # a class that is not drawn may be empty
                indices[where] = passes(self.classes[label], before, len(where), self.seed, _ORDER, label)
        return indices

    def __len__(self):
        return max(0, self.batches - self.start_batch)

    def __iter__(self):
        seeds = np.random.default_rng([self.seed, _SEEDS, self.epoch]).integers(2**63, size=self.draws)
        keys = list(zip(self._indices().tolist(), seeds.tolist(), strict=True))
        for batch in range(self.start_batch, self.batches):
            part = self.batch_size // self.world
            first = batch * self.batch_size + self.rank * part
            yield keys[first : first + part]


class FeatureDataset(TensorDataset):
    """Frozen networks' features (n, V, K) with labels (n, C); the seed of a key `(index, seed)` chooses the view."""

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, 0)
        features, labels = super().__getitem__(index)
        return features[seed % len(features)], labels


class SampleDataset(Dataset):
    """Dataset of `(image, target)` over a store, the image uint8 (1, H, W).

    `dataset[index, seed]` is augmented with that seed, `dataset[index]` is not.
    images: uint8 (M, h, w), as an array or the path of a `.npy` file, which every worker memory-maps.
    targets: maps a store row to a 0/1 mask (any height and width), which becomes uint8 (1, H, W); to several masks
    (C, height, width), which become uint8 (C, H, W), with an unknown mask filled with UNKNOWN; or to a scalar or
    vector, which becomes float32. None makes the store row the target. A mask of floats is thresholded at a level drawn
    with the sample's seed, so that its mean over epochs is the mask.
    transform: an albumentations pipeline that keeps the size (see common.data.augment), or None.
    size: side of the output, or (H, W); None keeps the store's. Images and masks are shrunk by area averaging and
    enlarged bilinearly; masks are then thresholded at one half, which preserves the area of thin structures.
    rows: store row of each sample, in any order, repetitions allowed; by default all rows.
    kinds: for each sample −1 for no augmentation, or an index into `transform`, a list of pipelines (enrichment_plan).
    look(image, store row) -> uint8 (h, w), the image to resize and augment instead of the stored one.
    crop: side of the output of `transform`, if it crops.
    Raises InputError for unusable arguments.
    """

    def __init__(self, images, targets=None, transform=None, size=None, *, rows=None, kinds=None, look=None, crop=0):
        self.path = images if isinstance(images, str | os.PathLike) else getattr(images, "filename", None)
        if self.path is not None:
            given, images = images, read_array(self.path)
            if isinstance(given, np.ndarray) and given.shape != images.shape:
                raise InputError(f"{self.path}: a slice of a memory-mapped array; pass it whole and choose by rows")
        if images.dtype != np.uint8 or images.ndim != 3:
            raise InputError(f"{self.path or 'images'}: expected uint8 (N, H, W), got {images.dtype} {images.shape}")
        self.images, self.targets, self.look, self.crop = images, targets, look, (crop, crop) if crop else None
        self.size = images.shape[1:] if size is None else (size, size) if np.isscalar(size) else tuple(size)
        self.rows = np.arange(len(images)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.pipelines = [transform] if kinds is None else list(transform)
        self.kinds = np.zeros(len(self.rows), dtype=np.int64) if kinds is None else np.asarray(kinds)

    def __getstate__(self):
        return {**self.__dict__, "images": None if self.path is not None else self.images}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.path is not None:
            self.images = read_array(self.path)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        row = int(self.rows[index])
        image = _resize(self.images[row] if self.look is None else self.look(self.images[row], row), self.size)
        target = row if self.targets is None else self._target(row, seed)
        pipeline = None if seed is None or self.kinds[index] < 0 else self.pipelines[self.kinds[index]]
        if pipeline is not None:
            # one pair of generators for the pipeline: set_random_seed would seed all steps alike, so that steps with
            # the same p would always be applied together (and it takes ten times as long)
            pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
            out = pipeline(image=image, **({"mask": target} if np.ndim(target) > 1 else {}))
            image, target = out["image"], out.get("mask", target)
            if image.shape != (self.crop or self.size):
                raise InputError(f"the augmentation turned {self.size} into {image.shape}: it must keep the size")
        target = _to_tensor(target) if np.ndim(target) > 1 else torch.as_tensor(target)
        return _to_tensor(image), target

    def _target(self, row, seed):
        target = np.asarray(self.targets(row))
        if target.ndim < 2:
            return target.astype(np.float32)
        if target.dtype.kind == "f":
            level = 1 - np.random.default_rng([seed or 0, 1]).random()
            target = np.where(target == UNKNOWN, UNKNOWN, target >= level)
        if target.ndim == 3:
            return np.stack([self._mask(part) for part in target], axis=-1)
        return self._mask(target)

    def _mask(self, mask):
        if mask.shape == self.size:
            return mask.astype(np.uint8)
        if mask.flat[0] == UNKNOWN:
            return np.full(self.size, UNKNOWN, np.uint8)
        return (_resize(mask.astype(np.uint8) * np.uint8(255), self.size) >= 128).astype(np.uint8)


def _resize(image, size):
    if image.shape == size:
        return np.array(image)
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(np.asarray(image), size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _to_tensor(plane):
    return torch.from_numpy(np.ascontiguousarray(np.atleast_3d(plane).transpose(2, 0, 1)))


def _use_one_thread(_worker):
    cv2.setNumThreads(0)  # threads within workers would only compete for cores
    torch.set_num_threads(1)


def affordable_workers(workers, batch_bytes):
    """Return how many of `workers` loader processes this machine can run in addition; log if fewer.

    batch_bytes: size of images and targets. Waiting batches are kept in /dev/shm; without space there, workers crash.
    """
    here, cores = processes.count_here(), processes.cores()
    room = {"cores": max(here, cores), "memory": processes.free_memory() // WORKER_BYTES}
    if os.path.isdir("/dev/shm"):
        room["/dev/shm"] = shutil.disk_usage("/dev/shm").free // max(1, PREFETCH * batch_bytes)
    scarce = min(room, key=room.get)
    most = room[scarce] // here
    if most < workers:
        _say_once(f"{most} instead of {workers} processes read images, for lack of {scarce}")
    return min(workers, most)


@cache
def _say_once(line):
    log.info(line)


def make_loader(dataset, sampler, workers=0, seed=0, pin_memory=False, collate=None):
    """Return a DataLoader over the batches of `sampler`, which are the same for any number of `workers`.

    Fewer workers are used if cores, memory or /dev/shm are scarce. Batches are `(images uint8 (B, 1, H, W),
    targets)`, or `collate` of a list of items. `seed` keeps the loader from drawing from torch's global generator.
    """
    if workers and len(dataset):
        workers = affordable_workers(workers, 2 * len(next(iter(sampler), ())) * dataset[0][0].nbytes)
    options = {"num_workers": workers, "worker_init_fn": _use_one_thread, "pin_memory": pin_memory}
    options |= {"collate_fn": collate} | ({"persistent_workers": True, "prefetch_factor": PREFETCH} if workers else {})
    return DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator().manual_seed(seed), **options)


def eval_loader(dataset, batch_size, workers=0, indices=None, pin_memory=False, collate=None):
    """Return a DataLoader over `dataset` (or `indices` of it) in order, unaugmented, including the last batch."""
    order = list(range(len(dataset))) if indices is None else [int(index) for index in indices]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return make_loader(dataset, batches, workers, pin_memory=pin_memory, collate=collate)
