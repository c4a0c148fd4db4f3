"""What a training is made of: batches, the step, and the figures by which epochs are compared."""

import numpy as np
import torch

from common.data.loaders import EpochSampler, eval_loader, make_loader
from common.errors import InputError
from common.metrics import segmentation
from common.train import distributed
from solutions.lung_segmentation import augment


def augmentation(name, size, flip):
    """The augmentation pipeline that a configuration names, for images of `size` pixels; flip: left becomes right."""
    return {
        "none": lambda: None,
        "simple": lambda: augment.simple(size, flip=flip),
        "complex": lambda: augment.complex_(size, flip=flip),
        "unet": lambda: augment.unet(size),
        "affine": lambda: augment.affine(size, flip=flip),
        "strong": lambda: augment.strong(size, flip=flip),
    }[name]()


def train_loader(context, data, rows, config):
    """Training batches of these rows; where lungs have sides, no image is flipped."""
    transform = augmentation(config.augmentation, config.size, context.config.structures == "lungs")
    dataset = data.dataset(rows, config.size, transform, data.mask)
    sampler = EpochSampler(
        len(dataset), config.batch_size, context.config.seed, rank=distributed.rank(), world=distributed.world()
    )
    return make_loader(dataset, sampler, context.workers, context.config.seed, context.device.type == "cuda")


def held_out_loader(context, data, rows, config):
    """Batches of this process's share of the held-out images, in order and without augmentation."""
    dataset = data.dataset(rows, config.size, targets=data.mask)
    share = distributed.share_rows(len(dataset))
    return eval_loader(dataset, 2 * config.batch_size, context.workers, share, context.device.type == "cuda")


def step(model, batch, loss, device):
    """The loss of one batch of (images, masks)."""
    images, masks = (part.to(device, non_blocking=True) for part in batch)
    return loss(model(images), masks)


def mask_figures(model, loader, n, device, loss):
    """Figures of a network at the probability 0.5 and its own size: dice and iou, means over images and channels;
    loss, the mean over images."""
    rows = []
    for images, masks in loader:
        images, masks = images.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        logits = model(images)
        if not torch.isfinite(logits).all():
            raise InputError("the network's output is no number any more: lower the learning rate or set clip_norm")
        predicted, true = logits > 0, masks.bool()
        areas = torch.stack([(predicted & true).sum((2, 3)), predicted.sum((2, 3)), true.sum((2, 3))], 2)
        each = torch.stack([loss(one[None], mask[None]) for one, mask in zip(logits, masks, strict=True)])
        rows.append(np.concatenate([areas.flatten(1).double().cpu().numpy(), each.double().cpu().numpy()[:, None]], 1))
    rows = distributed.gather_rows(np.concatenate(rows), n)
    both, predicted, true = rows[:, :-1].reshape(n, -1, 3).transpose(2, 0, 1).astype(np.int64)
    pixels = images.shape[2] * images.shape[3]
    cells = segmentation.counts_from_areas(both, predicted, true, pixels)
    return {"dice": segmentation.dice(cells).mean(), "iou": segmentation.iou(cells).mean(), "loss": rows[:, -1].mean()}
