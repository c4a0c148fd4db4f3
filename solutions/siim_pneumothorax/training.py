"""What the two trainings are made of: batches, steps, and the figures by which epochs are compared."""

import numpy as np
import torch

from common.data.augment import enrichment_plan, paper_siim_enrichment
from common.data.loaders import EpochSampler, eval_loader, make_loader, sliding_rate
from common.errors import InputError
from common.infer import tta
from common.metrics import classification, segmentation
from common.nn.losses import bce
from common.train import distributed
from solutions.siim_pneumothorax.config import SIZE
from solutions.siim_pneumothorax.models import augmentation


def classifier_loader(context, data, fold, config):
    """Training batches of one fold's gate: augmented images, or balanced by enrichment."""
    rows = training_rows(context, data, fold)
    transform, kinds = augmentation(config.augmentation, config.size), None
    if config.enrichment:
        transform = paper_siim_enrichment()
        indices, kinds = enrichment_plan(presence_of(data)[rows], len(transform), context.config.seed)
        rows = rows[indices]
    return _train_loader(context, data.dataset(rows, config.size, transform, data.has_mask, kinds), config)


def segmenter_loader(context, data, fold, config, size):
    """Training batches of one fold's segmenter: the positives with some negatives, or at the sliding rate."""
    rows = training_rows(context, data, fold)
    rows = with_some_negatives(data, rows, config.negatives, context.config.seed + fold)
    dataset = data.dataset(rows, size, augmentation(config.augmentation, size), data.mask)
    return _train_loader(context, dataset, config, presence_of(data)[rows])


def classifier_step(model, batch, device):
    """Binary cross-entropy of one batch."""
    images, target = _to(batch, device)
    return bce(model(images), target)


def segmenter_step(model, batch, loss, device):
    """The mask loss of one batch, and the presence head's cross-entropy where there is one."""
    images, masks = _to(batch, device)
    output = model(images)
    if not isinstance(output, tuple):
        return loss(output, masks)
    present = masks.flatten(1).amax(1, keepdim=True).float()
    return loss(output[0], masks) + bce(output[1], present)


def gate_figures(present, probs):
    """Figures of a gate at the probability 0.5: mcc, precision, recall, accuracy, and auroc."""
    counts = classification.confusion_counts(present, probs, 0.5)
    return {
        "mcc": classification.mcc(counts),
        "auroc": classification.auroc(present, probs, undefined=np.nan),
        "precision": classification.precision(counts),
        "recall": classification.recall(counts),
        "accuracy": classification.accuracy(counts),
    }


def mask_figures(model, loader, n, device, size):
    """Figures of a segmenter at the probability 0.5 and the network's size, means over images, both empty being 1.

    iou, f1 and f2 of the plain masks; dice where masks under 1,000 pixels (of 1024 × 1024) count as empty, which is
    nearer to what a tuned rule will make of them.
    """
    counts = []
    for images, masks in loader:
        images, masks = _to((images, masks), device)
        logits = model(images)
        predicted = _finite(logits[0] if isinstance(logits, tuple) else logits) > 0
        masks = masks.bool()
        sums = [(predicted & masks), predicted, masks]
        counts.append(torch.stack([part.sum((1, 2, 3)) for part in sums], 1).cpu().numpy())
    both, predicted, true = distributed.gather_rows(np.concatenate(counts), n).T
    cells = segmentation.counts_from_areas(both, predicted, true, size * size)
    kept = predicted >= 1000 * (size / SIZE) ** 2
    return {
        "iou": segmentation.iou(cells, reduce="image"),
        "f1": segmentation.f_beta(cells, 1, reduce="image"),
        "f2": segmentation.f_beta(cells, 2, reduce="image"),
        "dice": segmentation.dice_from_areas(both * kept, predicted * kept, true).mean(),
    }


def predict_shared(model, loader, n, device):
    """Probabilities (n,) of a gate; each process computes its share of the images, all get the whole."""
    probs = [tta.sigmoid(_finite(model(images.to(device))))[:, 0].cpu().numpy() for images, _ in loader]
    return distributed.gather_rows(np.concatenate(probs), n)


def _finite(logits):
    if not torch.isfinite(logits).all():
        raise InputError("the network's output is no number any more: lower the learning rate or set clip_norm")
    return logits


def presence_of(data):
    """0 or 1 for every row of the store, int64 (N,); 0 for test rows."""
    return data.table.sort_values("row")["present"].to_numpy()


def training_rows(context, data, fold):
    """Rows of all folds but one."""
    return data.rows(folds=[k for k in range(context.config.n_folds) if k != fold])


def with_some_negatives(data, rows, per_positive, seed):
    """All positive rows and `per_positive` random negatives for each; all rows where that is 0."""
    present = presence_of(data)[rows] > 0
    wanted = round(per_positive * present.sum())
    if not per_positive or wanted >= (~present).sum():
        return rows
    chosen = np.random.default_rng(seed).choice(rows[~present], wanted, replace=False)
    return np.sort(np.concatenate([rows[present], chosen]))


def _train_loader(context, dataset, config, positives=None):
    rate = getattr(config, "positive_rate", ())
    sampler = EpochSampler(
        len(dataset),
        config.batch_size,
        context.config.seed,
        positives=positives,
        positive_rate=sliding_rate(*rate) if rate else None,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    return make_loader(dataset, sampler, context.workers, context.config.seed, context.device.type == "cuda")


def held_out_loader(context, dataset, batch_size):
    """Batches of this process's share of the held-out images, in order and without augmentation."""
    share = distributed.share_rows(len(dataset))
    return eval_loader(dataset, 2 * batch_size, context.workers, share, context.device.type == "cuda")


def _to(batch, device):
    return [part.to(device, non_blocking=True) for part in batch]
