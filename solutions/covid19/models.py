"""The network: a backbone with the paper's head, its views of an image, its training, and Grad-CAM."""

import random
from functools import partial
from itertools import pairwise

import cv2
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from common.data.augment import Lighting, Warp, compose, homography, jitter, paper_covid
from common.data.loaders import SampleDataset, eval_loader
from common.errors import InputError
from common.metrics.classification import accuracy, auroc, confusion_counts
from common.network import Network
from common.nn import models
from common.nn.backbone import ExactLinear, build_backbone, feature_map
from common.nn.losses import bce
from common.nn.weights import load_pretrained
from solutions.covid19.config import STAGE
from solutions.covid19.data import labels_of
from solutions.covid19.lungs import MASKS

MASKED = ("lungs", "background")  # the views that need masks


class CovidNet(models.Normalised):
    """Radiographs to one logit: the backbone's last feature map, mean pooling, hidden layers, dropout, one layer.

    Images (B, 1, H, W) uint8, or floats from 0 to 255; returns float32 (B, 1). `hidden`: widths of the layers with ReLU
    before the last one. `loaded`: report on the pretrained weights or None. Source: Ahmed et al., 3.4.
    """

    def __init__(self, net, width, mean, std, hidden=(), dropout=0.0):
        super().__init__(net, mean, std)
        self.width, self.loaded = width, None
        widths, layers = [width, *hidden], []
        for before, after in pairwise(widths):
            layers += [ExactLinear(before, after), nn.ReLU()]
        self.hidden, self.dropout = nn.Sequential(*layers), nn.Dropout(dropout)
        self.head = ExactLinear(widths[-1], 1)

    def features(self, images):
        """Return the last feature map, float32 (B, K, h, w). Raises InputError for a wrong number of channels."""
        return feature_map(self.net, self.scaled(images)).float()

    def classify(self, features):
        """Return the logits float32 (B, 1) of feature maps (B, K, h, w)."""
        return self.head(self.dropout(self.hidden(features.mean((2, 3)))))

    def forward(self, images):
        return self.classify(self.features(images))

    def heat(self, images, sign=1):
        """Return Grad-CAM of the logit (sign −1: of its negative), float32 (B, h, w) >= 0 (Selvaraju et al. 2017).

        Works inside no_grad and inference mode too and leaves no gradients behind.
        """
        with torch.no_grad():
            features = self.features(images)
        with torch.inference_mode(False), torch.enable_grad():
            maps = features.clone().requires_grad_()  # a clone, since inference tensors cannot have gradients
            (gradient,) = torch.autograd.grad(self.classify(maps).sum(), maps)
        return (sign * (gradient.mean((2, 3), keepdim=True) * features).sum(1)).relu()


def build_network(config, weights=None):
    """Return the CovidNet of a NetworkConfig, its backbone pretrained as `weights`, by default the configuration's."""
    weights = config.weights if weights is None else weights
    name = models.timm_name(config.backbone)
    net, width = build_backbone(name, config.size)
    model = CovidNet(net, width, *models.mean_std(name), config.hidden, config.dropout)
    return load_pretrained(model, name, weights, [key for key in model.state_dict() if key.startswith("net.")])


def apply_view(image, mask, view, margin):
    """Return a view of an image, uint8 (H, W), black elsewhere: lungs, background (all but them), image or border.

    mask: (H, W), nonzero in the lungs; margin: of the border, a share of each side.
    """
    if view == "image":
        return image
    if view == "border":
        out = image.copy()
        down, right = (max(1, round(margin * side)) for side in image.shape)
        out[down:-down, right:-right] = 0
        return out
    return np.where((mask != 0) == (view == "lungs"), image, np.uint8(0))


class ViewDataset(Dataset):
    """Views of stored images; an item is `(image uint8 (1, size, size), label)`, or without labels the row.

    The view comes before resizing (area average) and augmentation, so that neither mixes in hidden pixels. masks: uint8
    in the order and size of the images. transform: applied if the key is `(index, seed)`.
    """

    def __init__(self, images, masks, rows, view, margin, size, transform=None, labels=None):
        self.images = SampleDataset(images, rows=rows)
        self.masks = SampleDataset(masks, rows=rows) if view in MASKED else None
        self.view, self.margin, self.size, self.transform = view, margin, size, transform
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, row = self.images[index]
        mask = None if self.masks is None else self.masks[index][0][0].numpy()
        image = apply_view(image[0].numpy(), mask, self.view, self.margin)
        image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        if self.transform is not None and seed is not None:
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            image = self.transform(image=image)["image"]
        return torch.from_numpy(image[None]), row if self.labels is None else torch.tensor(self.labels[index])


def augmentation(name, size):
    """Return the augmentation pipeline of this name for images of `size` pixels, None for "none"."""
    return {"none": lambda: None, "paper": lambda: paper_covid(size), "light": lambda: light(size)}[name]()


def light(size, rotate=10.0, zoom=0.1, shift=0.05, lighting=0.1, p=0.75):
    """Return our light pipeline of flip, rotation (± degrees), zoom, shift, brightness and contrast, `p` each."""
    return compose([Warp(size, partial(_light_matrix, rotate, zoom, shift, p)), Lighting(lighting, lighting, p)])


def _light_matrix(rotate, zoom, shift, p, rng):
    side = -1 if rng.random() < 0.5 else 1
    scale = 1 + jitter(rng, p, zoom)
    shifts = 2 * jitter(rng, p, shift), 2 * jitter(rng, p, shift)
    return homography(jitter(rng, p, rotate), (side * scale, scale), 0.0, shifts)


def fold_rows(job, fold):
    """Return the store rows to train on, and those on which epochs are compared: the next fold's if any is chosen.

    The held-out fold is never used for choices. Raises InputError if one of the two sets lacks a label.
    """
    n_folds, chooses = job.config.n_folds, job.config.network.chooses
    validation = (fold + 1) % n_folds if chooses else fold
    others = [k for k in range(n_folds) if k not in (fold, validation)]
    parts = job.images.rows(folds=others, role="main"), job.images.rows(folds=[validation], role="main")
    for rows, purpose in zip(parts, ("to train on", "to validate on"), strict=True):
        for label in {0.0, 1.0} - set(labels_of(job, rows).tolist()):
            kind = "with" if label else "without"
            raise InputError(f"fold {fold}: no image {kind} COVID-19 {purpose}; choose another n_folds")
    return parts


def covid_network(config, fold, stage=STAGE, view=None, fitting=None, labels=labels_of, rows=fold_rows):
    """Return the Network of one fold, of the run's view of COVID-19 by default; labels(job, rows) -> (n,)."""
    view, fitting = view or config.view, fitting or config.network
    margin = config.audit.margin

    def dataset(job, rows, augment, targets):
        transform = augmentation(fitting.augmentation, fitting.size) if augment else None
        wanted = labels(job, rows) if targets else None
        images, masks = job.images.store.images, job.images.arrays[MASKS]
        return ViewDataset(images, masks, rows, view, margin, fitting.size, transform, wanted)

    def figures(job, logits, rows):
        truth = labels(job, rows)
        right = accuracy(confusion_counts(truth, logits, 0.0))
        loss = bce(torch.tensor(logits)[:, None], torch.tensor(truth)).item()
        return {"loss": loss, "auroc": auroc(truth, logits, undefined=np.nan), "accuracy": float(right)}

    return Network(
        fold,
        stage,
        fitting,
        partial(build_network, fitting),
        dataset,
        loss=bce,
        measure=lambda output, target: output.float()[:, 0],
        figures=figures,
        rows=rows,
        key=[view, margin if view == "border" else None],
        watched=("accuracy",),
        trained_on=lambda job: {"solution": job.solution, "fold": fold, "images": len(rows(job, fold)[0])},
    )


def heat_maps(job, network, rows, device, title, sign=1):
    """Return Grad-CAM of a trained Network on store rows, float32 (n, h, w), computed in full precision."""
    model = network.load(job.run).to(device, memory_format=torch.channels_last).eval()
    dataset = network.dataset(job, rows, False, False)
    loader = eval_loader(dataset, 2 * network.config.batch_size, job.workers)
    batches = tqdm(loader, title, leave=False)
    return np.concatenate([model.heat(images.to(device), sign).cpu().numpy() for images, _ in batches])
