"""What the trainings are made of: views of the images, batches, the step, and the figures that compare epochs."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset

# the library from there, where its look-up of newer versions is switched off
from common.data.augment import A, compose
from common.data.loaders import EpochSampler, SampleDataset, eval_loader, make_loader
from common.errors import InputError
from common.infer import tta
from common.infer.predict import predict_probs
from common.metrics.classification import auroc, mean_of_defined
from common.nn.losses import bce
from common.train import distributed
from solutions.chestxray14.config import LABELS


def augmentation(name, size):
    """The augmentation pipeline that a configuration names, for images of `size` pixels."""
    return {"none": lambda: None, "flip": lambda: compose([_flip()]), "podium": lambda: podium(size)}[name]()


def podium(size):
    """Return our pipeline for the podium preset, for images of `size` pixels; its numbers are ours.

    Flip; crop of 70 to 100 % of the area, stretched back; shift, scale and rotation in one step; brightness and
    contrast; now and then a little blur or noise.
    """
    moved = A.Affine(scale=(0.92, 1.08), translate_percent=(-0.05, 0.05), rotate=(-10.0, 10.0), keep_ratio=True, p=0.5)
    cropped = A.RandomResizedCrop((size, size), scale=(0.7, 1.0), ratio=(0.9, 1.11), p=0.5)
    soft = size / 512
    grain = [
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3 * soft, 1.2 * soft), p=1.0),
        A.GaussNoise((0.005, 0.03), p=1.0),
    ]
    return compose([_flip(), cropped, moved, A.RandomBrightnessContrast(0.2, 0.2, p=0.5), A.OneOf(grain, p=0.15)])


def _flip():
    return A.HorizontalFlip(p=0.5)


# ---- images --------------------------------------------------------------------------------------------------------


class ViewDataset(Dataset):
    """Images of a store as a network sees them; an item is `(image uint8 (1 or 2, size, size), target)`.

    images, rows: as in SampleDataset. Each is scaled to `resize`, augmented where the key is `(index, seed)`, and its
    centre of `size` pixels cut out. masks: path of a `.npy` uint8 (N, m, m), 0 to 255, whose rows are those of the
    images; scaled and moved with the image it becomes the second channel. labels: float32 (n, 14), the targets of
    `rows`; without them the target is the store row. Raises InputError for an image whose mask is empty.
    """

    def __init__(self, images, rows, resize, size, masks=None, transform=None, labels=None):
        self.images = SampleDataset(images, size=resize, rows=rows)
        self.masks = None if masks is None else SampleDataset(masks, size=resize, rows=rows)
        start = (resize - size) // 2
        self.centre = slice(start, start + size)
        self.transform, self.labels = transform, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, row = self.images[index]
        planes = {"image": image[0].numpy()}
        if self.masks is not None:
            planes["mask"] = self.masks[index][0][0].numpy()
            if not planes["mask"].any():
                raise InputError(f"{self.masks.path}: the mask of row {int(row)} is empty; run prepare again")
        if self.transform is not None and seed is not None:
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            planes = self.transform(**planes)
        planes = [planes[name][self.centre, self.centre] for name in ("image", "mask") if name in planes]
        return torch.from_numpy(np.stack(planes)), row if self.labels is None else torch.from_numpy(self.labels[index])


def view_dataset(data, rows, config, stage, transform=None, labels=None):
    """The ViewDataset of a stage, whole or lungs, as its NetworkConfig wants it; InputError where pixels are missing.

    data: what `prepare` left. transform, labels: as in ViewDataset.
    """
    images = data.store.images if stage == "whole" else data.crops
    masks = data.masks if config.weighting else None
    if images is None or (config.weighting and masks is None):
        raise InputError(f"{stage}: no lungs were found for this run; run `prepare` with this configuration")
    return ViewDataset(images, rows, config.resize, config.size, masks, transform, labels)


def train_loader(context, data, rows, config, stage):
    """Training batches of these rows; InputError for a row whose labels are unknown."""
    transform = augmentation(config.augmentation, config.resize)
    dataset = view_dataset(data, rows, config, stage, transform, _known_labels(data, rows))
    sampler = _sampler(context, len(rows), config)
    return make_loader(dataset, sampler, context.workers, context.config.seed, _pinned(context))


def held_out_loader(context, data, rows, config, stage):
    """Batches of this process's share of the held-out images, in order and without augmentation."""
    dataset = view_dataset(data, rows, config, stage)
    share = distributed.share_rows(len(dataset))
    return eval_loader(dataset, 2 * config.batch_size, context.workers, share, _pinned(context))


def _sampler(context, n, config):
    rank, world = distributed.rank(), distributed.world()
    return EpochSampler(n, config.batch_size, context.config.seed, rank=rank, world=world)


def _pinned(context):
    return context.device.type == "cuda"


def _known_labels(data, rows):
    labels = np.ascontiguousarray(data.labels(rows), np.float32)
    unknown = np.isnan(labels).any(axis=1)
    if unknown.any():
        raise InputError(f"row {int(np.asarray(rows)[unknown][0])} has no label: it cannot be trained or validated on")
    return labels


# ---- training ------------------------------------------------------------------------------------------------------


def step(model, batch, device):
    """Binary cross-entropy of one batch of (images or features, labels)."""
    inputs, labels = (part.to(device, non_blocking=True) for part in batch)
    return bce(model(inputs), labels)


def figures(model, loader, data, rows, device):
    """Figures of a network on held-out rows: auroc, the mean over the classes that have labels of both kinds; loss.

    `loader` is that of `held_out_loader` for these rows.
    """
    logits = [model(images.to(device, non_blocking=True)).float().cpu().numpy() for images, _ in loader]
    logits = np.concatenate([np.empty((0, len(LABELS)), np.float32), *logits])
    return _figures(distributed.gather_rows(logits, len(rows)), _known_labels(data, rows))


def _figures(logits, labels):
    if not np.isfinite(logits).all():
        raise InputError("the network's output is no number any more: lower the learning rate or set clip_norm")
    loss = bce(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    return {"auroc": mean_of_defined(auroc(labels, logits, undefined=np.nan)), "loss": loss}


def predict_view(models, data, rows, config, stage, device, views=(), workers=0, progress=True):
    """Probabilities float64 (n, 14) of these rows, the mean over networks and views.

    views: ("flip",) also looks at the mirrored image. progress: shown; a string is its title.
    """
    seen = [tta.IDENTITY, *[tta.FLIP] * ("flip" in views)]
    return predict_probs(
        models,
        view_dataset(data, rows, config, stage),
        batch_size=2 * config.batch_size,
        device=device,
        views=seen,
        amp=config.precision,
        progress=progress,
        workers=workers,
    ).astype(np.float64)


# ---- fusion --------------------------------------------------------------------------------------------------------


class FeatureLoader:
    """Batches (features (B, K), labels (B, 14)) out of features of frozen networks, float32 (n, V, K), in memory.

    V is 1, or 2 where the second are those of the mirrored images: the sample's seed takes one of them. labels: float32
    (n, 14). batch_sampler: an EpochSampler.
    """

    def __init__(self, features, labels, batch_sampler):
        self.features, self.labels = torch.from_numpy(features), torch.from_numpy(labels)
        self.batch_sampler = batch_sampler

    def __iter__(self):
        for keys in self.batch_sampler:
            index, seeds = (torch.tensor(each) for each in zip(*keys, strict=True))
            yield self.features[index, seeds % self.features.shape[1]], self.labels[index]


def pooled_features(context, data, rows, branches, config, flips=True, shared=False):
    """The pooled features of frozen networks side by side, float32 (n, V, K1 + K2).

    branches: stage → ChestNet, in the order of the columns; config: the whole Config. V is 2 with `flips`: the image,
    then its mirror. Memory: the result and one network's part of it. shared: each process of a training under torchrun
    computes its share, and all get the whole.
    """
    mine = np.asarray(rows)[distributed.share_rows(len(rows))] if shared else rows
    widths = [model.width for model in branches.values()]
    found = np.empty((len(mine), 1 + flips, sum(widths)), np.float32)
    columns = np.split(found, np.cumsum(widths)[:-1], axis=2)
    for (stage, model), its in zip(branches.items(), columns, strict=True):
        part = getattr(config, stage)
        its[:] = _features(context, view_dataset(data, mine, part, stage), model, part, stage, flips)
    return distributed.gather_rows(found, len(rows)) if shared else found


def _features(context, dataset, model, config, stage, flips):
    if not len(dataset):
        return np.empty((0, 1 + flips, model.width), np.float32)
    model.to(context.device, memory_format=torch.channels_last).eval()

    def pooled(images):
        views = (images, images.flip(-1)) if flips else (images,)
        return torch.stack([model.pooled(view) for view in views], 1)

    return predict_probs(
        [pooled],
        dataset,
        batch_size=2 * config.batch_size,
        device=context.device,
        amp=config.precision,
        activation=lambda features: features,
        progress=f"features, {stage}",
        workers=context.workers,
    )


def fusion_loader(context, data, rows, features, config):
    """Training batches of the fusing layer: features of these rows, mirrored at random if the networks' images were.

    features: as `pooled_features` gives them; config: the FusionConfig. The layer learns from them what it would learn
    with both frozen networks in front of it and flips as the augmentation.
    """
    if all(getattr(context.config, stage).augmentation == "none" for stage in context.config.stages):
        features = features[:, :1]
    return FeatureLoader(features, _known_labels(data, rows), _sampler(context, len(rows), config))


def fusion_figures(model, features, data, rows, device):
    """Figures of the fusing layer on held-out rows, as in `figures`; every process computes them all."""
    logits = model(torch.from_numpy(features[:, 0]).to(device)).float().cpu().numpy()
    return _figures(logits, _known_labels(data, rows))
