"""What the trainings are made of: what a network may see, batches, the step, and the figures that compare epochs."""

import random
from functools import partial

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from common.data.augment import Lighting, Warp, compose, homography, jitter, paper_covid
from common.data.loaders import EpochSampler, SampleDataset, eval_loader, make_loader
from common.errors import InputError
from common.infer import tta
from common.infer.predict import predict_probs
from common.metrics.classification import accuracy, auroc, confusion_counts
from common.nn.losses import bce
from common.train import distributed

MASKED = ("lungs", "background")  # the views that need masks


def augmentation(name, size):
    """The augmentation pipeline that a configuration names, for images of `size` pixels."""
    return {"none": lambda: None, "paper": lambda: paper_covid(size), "light": lambda: light(size)}[name]()


def light(size, rotate=10.0, zoom=0.1, shift=0.05, lighting=0.1, p=0.75):
    """Return our light pipeline: flip, rotation (± degrees), zoom (1 ±) and shift (± of the side) in one warp, light.

    The flip happens with 0.5, the others with `p` each; brightness and contrast change on the logit, so that black,
    which is what the background of lung-only images is, stays black. A mirrored chest has its heart on the wrong side:
    questionable anatomy, but usual, and COVID-19 is found on both sides.
    """
    draw = partial(_light_matrix, rotate=rotate, zoom=zoom, shift=shift, p=p)
    return compose([Warp(size, draw), Lighting(lighting, lighting, p)])


def _light_matrix(random, rotate, zoom, shift, p):
    side = -1 if random.random() < 0.5 else 1
    scale = 1 + jitter(random, p, zoom)
    shifts = 2 * jitter(random, p, shift), 2 * jitter(random, p, shift)
    return homography(jitter(random, p, rotate), (side * scale, scale), 0.0, shifts)


# ---- images --------------------------------------------------------------------------------------------------------


def shown(image, mask, view, margin=None):
    """What a view lets a network see of an image, uint8 (H, W); all else is black.

    image: uint8 (H, W). mask: (H, W), the lungs where it is not 0; image and border do without. view: lungs; image, all
    of it; border, the outer `margin` of each side, a share of it; background, all but the lungs, whose outline remains.
    """
    if view == "image":
        return image
    if view == "border":
        if margin is None:
            raise InputError("border: how wide the margin is has to be given")
        out = image.copy()
        down, right = (max(1, round(margin * side)) for side in image.shape)
        out[down:-down, right:-right] = 0
        return out
    if view not in MASKED:
        raise InputError(f"view {view!r}: choose lungs, image, border or background")
    if mask is None or mask.shape != image.shape:
        raise InputError(f"{view}: an image of {image.shape} needs a mask of its size")
    return np.where((mask != 0) == (view == "lungs"), image, np.uint8(0))


class CovidDataset(Dataset):
    """Images of a store through a view; an item is `(image uint8 (1, size, size), target)`.

    images, rows: as in SampleDataset. masks: uint8 (N, S, S) of 0 and 1, or the path of its `.npy` file, of the size of
    the images and in their order; None for views without masks. view, margin: as in `shown`, which comes first, so that
    neither resizing nor augmentation mixes in what is hidden. The image shrinks to `size` by area average and is
    augmented by `transform` where the key is `(index, seed)`. labels: (n,), the targets of `rows`, float32; without
    them the target is the store row.
    """

    def __init__(self, images, masks, rows, view, margin, size, transform=None, labels=None):
        if view in MASKED and masks is None:
            raise InputError(f"{view}: no lungs were found for this run; run `prepare` with this configuration")
        self.images = SampleDataset(images, rows=rows)
        self.masks = SampleDataset(masks, rows=rows) if view in MASKED else None
        self.view, self.margin, self.size, self.transform = view, margin, size, transform
        self.labels = None if labels is None else np.asarray(labels, np.float32)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, row = self.images[index]
        mask = None if self.masks is None else self.masks[index][0][0].numpy()
        image = shown(image[0].numpy(), mask, self.view, self.margin)
        image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        if self.transform is not None and seed is not None:
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            image = self.transform(image=image)["image"]
        return torch.from_numpy(image[None]), row if self.labels is None else torch.tensor(self.labels[index])


def view_dataset(data, rows, config, view, margin=None, transform=None, labels=None):
    """The CovidDataset of a view at the size of a NetworkConfig; data: what `prepare` left."""
    return CovidDataset(data.store.images, data.masks, rows, view, margin, config.size, transform, labels)


def train_loader(context, data, rows, labels, config, view):
    """Training batches of these rows with labels (n,) of 0 and 1; InputError for a row whose label is another."""
    labels = _known(labels, rows)
    transform = augmentation(config.augmentation, config.size)
    dataset = view_dataset(data, rows, config, view, context.config.audit.margin, transform, labels)
    rank, world = distributed.rank(), distributed.world()
    sampler = EpochSampler(len(rows), config.batch_size, context.config.seed, rank=rank, world=world)
    return make_loader(dataset, sampler, context.workers, context.config.seed, _pinned(context))


def held_out_loader(context, data, rows, config, view):
    """Batches of this process's share of the held-out images, in order and without augmentation."""
    dataset = view_dataset(data, rows, config, view, context.config.audit.margin)
    share = distributed.share_rows(len(dataset))
    return eval_loader(dataset, 2 * config.batch_size, context.workers, share, _pinned(context))


def _pinned(context):
    return context.device.type == "cuda"


def _known(labels, rows):
    labels = np.array(labels, np.float32)
    if labels.shape != (len(rows),):
        raise InputError(f"{len(rows)} rows need as many labels, not {labels.shape}")
    bad = np.flatnonzero(~np.isin(labels, (0, 1)))
    if len(bad):
        raise InputError(f"row {int(np.asarray(rows)[bad[0]])} has the label {labels[bad[0]]:g}: expected 0 or 1")
    return labels


# ---- training ------------------------------------------------------------------------------------------------------


def step(model, batch, device):
    """Binary cross-entropy of one batch of (images, labels)."""
    images, labels = (part.to(device, non_blocking=True) for part in batch)
    return bce(model(images), labels)


def figures(model, loader, labels, device):
    """Figures of a network on held-out images: loss; auroc, NaN without both labels; accuracy at the probability 0.5.

    `loader` is that of `held_out_loader`, `labels` (n,) those of all its rows, 0 and 1.
    """
    labels = np.array(labels, np.float32)
    logits = [model(images.to(device, non_blocking=True)).float().cpu().numpy()[:, 0] for images, _ in loader]
    logits = distributed.gather_rows(np.concatenate([np.empty(0, np.float32), *logits]), len(labels))
    if not np.isfinite(logits).all():
        raise InputError("the network's output is no number any more: lower the learning rate or set clip_norm")
    loss = bce(torch.from_numpy(logits)[:, None], torch.from_numpy(labels)).item()
    right = accuracy(confusion_counts(labels, logits, 0.0))
    return {"loss": loss, "auroc": auroc(labels, logits, undefined=np.nan), "accuracy": float(right)}


def predict(models, data, rows, config, view, device, views=(), workers=0, progress=True, margin=None):
    """Probabilities float64 (n,) of these rows, the mean over networks and views of test-time augmentation.

    views: ("flip",) also looks at the mirrored image. progress: shown; a string is its title. margin: as in `shown`.
    """
    if not len(rows):
        return np.empty(0)
    seen = [tta.IDENTITY, *[tta.FLIP] * ("flip" in views)]
    return predict_probs(
        models,
        view_dataset(data, rows, config, view, margin),
        batch_size=2 * config.batch_size,
        device=device,
        views=seen,
        amp=config.precision,
        progress=progress,
        workers=workers,
    )[:, 0].astype(np.float64)
