"""The network: a backbone with the paper's head, its views of an image, its training, and Grad-CAM."""

from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from common.data.augment import Lighting, Warp, compose, homography, jitter, paper_covid
from common.data.loaders import SampleDataset
from common.errors import InputError, check
from common.metrics.classification import accuracy, auroc, confusion_counts
from common.network import Network, compute
from common.nn.backbone import ExactLinear
from common.nn.classifier import Classifier, build_classifier
from common.nn.losses import bce
from solutions.covid19.config import ORIGINS, STAGE
from solutions.covid19.data import MASKS, can_predict, labels_of

MASKED = ("lungs", "background", "border")  # the views that need masks


class Adversarial(Classifier):
    """A Classifier whose features are also trained to hide an image's collection, by reversed gradients.

    In training, forward returns (B, 1 + 2 · ORIGINS): the label's logit, then for either label the collections' logits.
    strength: factor of the reversed gradient (Ganin et al. 2016). The collection is hidden given the label (Li et al.
    2018), since hiding it altogether would also hide the label, which is correlated with it.
    """

    def __init__(self, *args, strength, **options):
        super().__init__(*args, **options)
        self.strength = strength
        self.origin = torch.nn.Sequential(ExactLinear(self.width, 128), torch.nn.ReLU(), ExactLinear(128, 2 * ORIGINS))

    def forward(self, images):
        pooled = images if images.ndim == 2 else self.pooled(images)
        logits = super().forward(pooled)
        if not self.training:
            return logits
        # equal to `pooled`, but its gradient is multiplied by −strength
        reverse = (1 + self.strength) * pooled.detach() - self.strength * pooled
        return torch.cat([logits, self.origin(reverse)], 1)


def build_network(config, weights=None, adversary=0.0):
    """Return the classifier of a NetworkConfig, its backbone pretrained as `weights` says (Ahmed et al., 3.4).

    adversary: strength of an Adversarial, 0 for an ordinary Classifier.
    """
    kind = partial(Adversarial, strength=adversary) if adversary else Classifier
    return build_classifier(config, 1, weights, kind, hidden=config.hidden)


def adversarial_loss(output, target):
    """Return the cross-entropy of labels plus, in training, of collections; target: the columns label and origin."""
    label, origin = target[:, 0], target[:, 1].long()
    loss = bce(output[:, :1], label)
    if output.shape[1] == 1:
        return loss
    given = output[:, 1:].float().unflatten(1, (2, ORIGINS))[torch.arange(len(label)), (label >= 0.5).long()]
    return loss + F.cross_entropy(given, origin)


def with_origins(job, rows):
    """Return label and origin of store rows, float32 (n, 2); origin 0: the largest collection; small ones share one."""
    counts = job.images.table.loc[job.images.table["role"] == "main", "collection"].value_counts()
    numbers = pd.Series(np.arange(len(counts)).clip(max=ORIGINS - 1), counts.index)
    origins = job.images.at(rows)["collection"].map(numbers).to_numpy(np.float32)
    return np.stack([labels_of(job, rows), origins], 1)


def apply_view(image, mask, view, margin):
    """Return a view of an image, uint8 (H, W), black elsewhere: lungs, background (all but lungs), image or border.

    mask: (H, W), nonzero in the lungs; margin: width of the border, less the lungs in it, as a share of each side.
    """
    if view == "image":
        return image
    if view == "border":
        out = image.copy()
        down, right = (max(1, round(margin * side)) for side in image.shape)
        out[down:-down, right:-right] = 0
        out[mask != 0] = 0  # in closely cropped images the lungs reach into the margin
        return out
    return np.where((mask != 0) == (view == "lungs"), image, np.uint8(0))


def view_dataset(images, masks, rows, view, margin, size, transform=None, labels=None):
    """Return the SampleDataset of views of stored images; targets are `labels` (n,), or without them the store rows.

    The view is taken before resizing (area average) and augmentation, so that neither mixes in hidden pixels. masks:
    uint8, in the order and size of the images.
    """
    targets = None if labels is None else dict(zip(np.asarray(rows).tolist(), labels, strict=True)).__getitem__
    look = partial(_look, SampleDataset(masks) if view in MASKED else None, view, margin)
    return SampleDataset(images, targets, transform, size, rows=rows, look=look)


def _look(masks, view, margin, image, row):
    return apply_view(np.asarray(image), None if masks is None else masks[row][0][0].numpy(), view, margin)


def augmentation(name, size):
    """Return the augmentation pipeline called `name` for images of `size` pixels, None for "none"."""
    return None if name == "none" else {"paper": paper_covid, "light": light}[name](size)


def light(size):
    """Return our light augmentations: flip, rotation (± 10°), zoom, shift, brightness and contrast, p 0.75 each."""
    return compose([Warp(size, _light_matrix), Lighting(0.1, 0.1, 0.75)])


def _light_matrix(rng):
    side = -1 if rng.random() < 0.5 else 1
    scale = 1 + jitter(rng, 0.75, 0.1)
    shifts = 2 * jitter(rng, 0.75, 0.05), 2 * jitter(rng, 0.75, 0.05)
    return homography(jitter(rng, 0.75, 10.0), (side * scale, scale), 0.0, shifts)


def fold_rows(job, fold):
    """Return the store rows to train on and those to validate on, which are the next fold's if an epoch is selected.

    The held-out fold is never used for choices. Raises InputError if one of the two sets lacks a label.
    """
    n_folds, chooses = job.config.n_folds, job.config.network.chooses
    validation = (fold + 1) % n_folds if chooses and fold < n_folds else fold  # fold n_folds: train on all images
    others = [k for k in range(n_folds) if k not in (fold, validation)]
    parts = job.images.rows(folds=others, role="main"), job.images.rows(folds=[validation], role="main")
    for rows, purpose in zip(parts, ("to train on", "to validate on"), strict=True):
        for label in {0.0, 1.0} - set(labels_of(job, rows).tolist()) if fold < n_folds else ():
            kind = "with" if label else "without"
            raise InputError(f"fold {fold}: no image {kind} COVID-19 {purpose}; choose another n_folds")
    several = job.images.at(parts[0]).groupby("label")["collection"].nunique().max() > 1
    check(several or not job.config.adversary, "--adversary: no label has images from two collections to train on")
    return (balance(job, parts[0]), parts[1]) if job.config.balance else parts


def balance(job, rows):
    """Return store rows, repeating those of small groups until all groups of collection and label are equally large.

    An image is repeated ten times at most.
    """
    groups = job.images.at(rows).groupby(["collection", "label"])["row"]
    most = groups.size().max()
    return np.sort(np.concatenate([np.resize(group, min(most, 10 * len(group))) for _, group in groups]))


def covid_network(config, fold, stage=STAGE, view=None, fitting=None, labels=labels_of, rows=fold_rows):
    """Return the Network of one fold, by default that of the run's view for COVID-19; labels(job, rows) -> (n,).

    The run's settings against collection bias apply only to networks whose `rows` are `fold_rows`.
    """
    view, fitting = view or config.view, fitting or config.network
    margin, adversary = config.audit.margin, config.adversary if rows is fold_rows else 0.0

    def dataset(job, rows, augment, targets):
        transform = augmentation(fitting.augmentation, fitting.size) if augment else None
        wanted = (with_origins if adversary else labels)(job, rows) if targets else None
        images, masks = job.images.store.images, job.images.arrays[MASKS]
        return view_dataset(images, masks, rows, view, margin, fitting.size, transform, wanted)

    def figures(job, logits, rows):
        truth = labels(job, rows)
        right = accuracy(confusion_counts(truth, logits, 0.0))
        loss = bce(torch.tensor(logits)[:, None], torch.tensor(truth)).item()
        return {"loss": loss, "auroc": auroc(truth, logits, undefined=np.nan), "accuracy": float(right)}

    def taught(job, rows):
        check(not adversary, "--pseudo: an --adversary needs the collection of every image, which test images lack")
        return rows[can_predict(job.images.at(rows), job.config)]

    return Network(
        fold,
        stage,
        fitting,
        partial(build_network, fitting, adversary=adversary),
        dataset,
        loss=adversarial_loss if adversary else bce,
        measure=lambda output, target: output.float()[:, 0],
        figures=figures,
        rows=rows,
        taught=taught,
        key=[view, [margin, "without lungs"] if view == "border" else None, *[adversary] * (adversary > 0)],
        watched=("accuracy",),
        trained_on=lambda job: {"solution": job.solution, "fold": fold, "images": len(rows(job, fold)[0])},
    )


def heat_maps(job, network, rows, device, title, sign=1):
    """Return the Grad-CAM maps of a trained Network for store rows, float32 (n, h, w), computed in full precision."""
    model = network.load(job.run)
    return compute(job, network, model, partial(model.heat, sign=sign), rows, title, device)
