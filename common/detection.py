"""Detectors as networks of a run; detections are tables in original pixels, with member and fold."""

import random
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from torchvision.ops import batched_nms
from tqdm import tqdm

from common.data.augment import light
from common.data.box_mix import mix
from common.data.loaders import eval_loader
from common.infer import tta
from common.metrics import classification
from common.network import Network, other_folds, predict
from common.nn import detectors, models, more_detectors
from common.nn.losses import bce
from common.nn.precision import autocast, precision
from common.post.boxes import BOX, scale
from common.post.fusion import FusionRule, join_members
from common.predictions import mean_over_folds
from common.train import distributed

VIEW_IOU = 0.5  # IoU above which boxes from several sizes of an image are fused; ours


def build_detector(config, n_classes, weights=None):
    """Return the Detector (`common.nn.detectors`) of a BoxConfig; norms of a pretrained backbone are frozen."""
    build = getattr(detectors, config.architecture, None) or getattr(more_detectors, config.architecture)
    how = {name: getattr(config, name) for name in ("nms", "per_image", "channels", "stride_in_1x1")}
    how |= {"score": config.min_score, "frozen_norms": config.weights != "none"}
    weights = config.weights if weights is None else weights
    return build(config.backbone, n_classes, config.size, weights, **how)


def detector_network(fold, stage, config, n_classes, augmentation, figures, rows=other_folds, samples=None, classes=()):
    """Return the Network that trains a detector; classes: classes of the boxes to train on, () for all.

    augmentation() -> pipeline for images with boxes, or None; figures(images, detections, rows) -> dict of metrics of a
    detection table; samples(job, rows, size) -> SampleDataset without targets, by default of the images alone. The
    Network's `dataset` also takes another size.
    """

    def dataset(job, rows, augment, targets, size=config.size):
        found = samples(job, rows, size) if samples else job.images.dataset(rows, size)
        how = (augmentation(), (config.mosaic, config.mixup)) if augment else ()
        return BoxDataset(found, boxes_by_row(job.images, classes), *how) if targets else found

    def measured(job, found, rows):  # packed boxes, or a table of them
        table = found if isinstance(found, pd.DataFrame) else detection_table(found, job.images, rows, config.size)
        return figures(job.images, table, rows)

    how = {"loss": None, "step": detector_loss, "collate": collate, "figures": measured, "rows": rows}
    how["couples"] = config.architecture != "retinanet"  # divide by the whole batch's boxes or samples
    how["measure"] = lambda found, targets: pack(found, config.per_image)
    return Network(fold, stage, config, partial(build_detector, config, n_classes), dataset, **how)


def gate_network(fold, stage, config, labels, rows=other_folds, augmentation=light, n_outputs=1):
    """Return the Network of a classifier of whole radiographs.

    labels(images, rows) -> 0 or 1, (n,) or (n, n_outputs), of which the first column is validated.
    """

    def dataset(job, rows, augment, targets):
        known = dict(zip(rows.tolist(), labels(job.images, rows), strict=True)) if targets else None
        target = (lambda row: np.atleast_1d(known[int(row)]).astype(np.float32)) if targets else None
        return job.images.dataset(rows, config.size, augmentation() if augment else None, target)

    def build(weights=None):
        weights = config.weights if weights is None else weights
        return models.classifier(config.backbone, n_outputs, weights, frozen_norms=config.frozen_norms)

    def figures(job, probs, rows):
        return gate_figures(np.reshape(labels(job.images, rows), (len(rows), -1))[:, 0], probs)

    how = {"loss": bce, "figures": figures, "rows": rows, "activation": torch.Tensor.float}
    how["measure"] = lambda output, target: tta.sigmoid(output)[:, 0]
    return Network(fold, stage, config, build, dataset, **how)


def gate_figures(labels, probs):
    """Return auroc and the accuracy at 0.5 from labels (n,) of 0 and 1 and probabilities (n,)."""
    return {
        "auroc": classification.auroc(labels, probs, undefined=np.nan),
        "accuracy": classification.accuracy(classification.confusion_counts(labels, probs, 0.5)),
    }


class BoxDataset(Dataset):
    """Images with their boxes; an item is `(image uint8 (1, S, S), target)`, or (2, S, S) with lungs.

    target: boxes float32 (n, 4) in the image's pixels and labels int64 (n,), n >= 0. samples: a SampleDataset without
    targets; boxes: {store row: (boxes (n, 4) in the store's pixels, labels (n,))} of the rows with boxes.
    `dataset[index, seed]` is augmented with that seed, `dataset[index]` is not. chances: of a mosaic and of mixup.
    """

    def __init__(self, samples, boxes, transform=None, chances=(0.0, 0.0)):
        self.samples, self.transform, self.chances, self.targets = samples, transform, chances, {}
        factor, none = np.float32(samples.size[0] / samples.images.shape[1]), np.zeros((0, 4), np.float32)
        for row in samples.rows.tolist():
            found, labels = boxes.get(row, (none, np.zeros(0, np.int64)))
            self.targets[row] = found * factor, labels

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, boxes, labels = self._read(index)
        if seed is not None and any(self.chances):
            rng = np.random.default_rng([seed, 1])  # independent of the transform's numbers
            image, boxes, labels = mix(self._read, index, len(self), self.chances, rng)
        if self.transform is not None and seed is not None:
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            planes = dict(zip(("image", "mask"), image, strict=False))
            out = self.transform(**planes, bboxes=boxes, labels=labels)
            image, boxes = np.stack([out[name] for name in planes]), out["bboxes"]
            boxes, labels = np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(out["labels"], np.int64)
        return torch.from_numpy(image), {"boxes": torch.as_tensor(boxes), "labels": torch.as_tensor(labels)}

    def _read(self, index):
        image, row = self.samples[int(index)]
        return image.numpy(), *self.targets[int(row)]


def collate(items):
    """Return a batch: stacked images, and a list of targets, whose numbers of boxes differ."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets)


def detector_loss(model, images, targets):
    """Return the sum of a detector's losses; in eval mode (for batch-norm statistics), only predict."""
    return sum(model(images, targets).values()) if model.training else model(images)


def pack(found, per_image):
    """Return a batch's boxes, a dict per image, as float32 (B, per_image, 6): score, label, box, padded with 0."""
    packed = np.zeros((len(found), per_image, 6), np.float32)
    for out, each in zip(packed, found, strict=True):
        parts = torch.cat([each["scores"][:, None], each["labels"][:, None], each["boxes"]], 1)[:per_image]
        out[: len(parts)] = parts.float().cpu().numpy()
    return packed


def detection_table(packed, images, rows, size):
    """Return detections in original pixels from the output (n, k, 6) of `pack` for images of `size` pixels."""
    about = images.at(rows)
    kept = (packed[..., 4:] > packed[..., 2:4]).all(-1)  # drops padding and boxes without area
    place, flat = np.nonzero(kept)[0], packed[kept].astype(np.float64)
    # multiplied before divided, so that boxes at the image's border stay exactly there
    scaled = flat[:, 2:] * about[["width", "height", "width", "height"]].to_numpy(np.float64)[place] / size
    columns = {"image_id": about["image_id"].to_numpy()[place], "class_id": flat[:, 1].astype(np.int64)}
    return pd.DataFrame({**columns, "score": flat[:, 0], **dict(zip(BOX, scaled.T, strict=True))})


@lru_cache(maxsize=8)  # for several members; each training with a teacher has its own images
def boxes_by_row(images, classes=()):
    """Return {row: (boxes, classes)} of images with findings of these classes (() for all).

    Boxes are float32 (n, 4) in pixels of the store, classes int64 (n,).
    """
    boxes = images.tables["boxes.parquet"]
    boxes = boxes[boxes["class_id"].isin(classes)] if classes else boxes
    factors = images.store.images.shape[1] / images.at(boxes["row"])[["width", "height"]].to_numpy(float)
    corners = scale(boxes[BOX].to_numpy(float), *factors.T).astype(np.float32)
    labels = boxes["class_id"].to_numpy(np.int64)
    return {row: (corners[places], labels[places]) for row, places in boxes.groupby("row").indices.items()}


def true_boxes(images, rows):
    """Return the true boxes of store rows: image_id, class_id and corners in pixels of the originals."""
    boxes = images.tables["boxes.parquet"]
    return boxes.loc[boxes["row"].isin(np.asarray(rows)), ["image_id", "class_id", *BOX]].reset_index(drop=True)


@torch.inference_mode()
def predict_boxes(job, network, rows, title=""):
    """Return the boxes that a trained detector finds on store rows, as a detection table in original pixels.

    At most config.per_image boxes per image, in the order of rows and by descending score. With job.config.tta_scales,
    boxes from all sizes are fused as equal voters.
    """
    config, device, views = network.config, job.device, {}
    model = network.load(job.run).to(device, memory_format=torch.channels_last).eval()
    dtype = precision(device, config.precision)
    share = range(len(rows))[distributed.share(len(rows), 2 * config.batch_size)]
    for factor in (1.0, *getattr(job.config, "tta_scales", ())):
        size = max(1, round(config.size * factor / 32)) * 32 if factor != 1 else config.size
        found = [np.zeros((0, config.per_image, 6), np.float32)]
        dataset = network.dataset(job, rows, False, False, size)
        loader = eval_loader(dataset, 2 * config.batch_size, job.workers, share, pin_memory=device.type == "cuda")
        quiet = not distributed.is_main()
        for images, _ in tqdm(loader, desc=f"{network.stage}, {title}", leave=False, disable=quiet):
            with autocast(device, dtype):
                batch = detect(model, images.to(device, non_blocking=True), "flip" in job.config.tta, config)
            found.append(pack(batch, config.per_image))
        views[size] = detection_table(distributed.join(np.concatenate(found)), job.images, rows, size)
    if len(views) == 1:
        return views[config.size]
    rule = FusionRule((1.0,) * len(views), VIEW_IOU)
    return join_members(views, job.images.at(rows), rule, no_finding=None).groupby("image_id").head(config.per_image)


def predict_members(job, networks, rows, title=""):
    """Return the boxes of several trained detectors on store rows, with the columns member (the stage) and fold."""
    found = [predict_boxes(job, each, rows, title).assign(member=each.stage, fold=each.fold) for each in networks]
    return pd.concat(found, ignore_index=True)


def predict_logits(job, networks, rows, title=""):
    """Return the logits of store rows by each of several gates, one after the other, float64 (k · n, outputs)."""
    logits = []
    for each in networks:
        exact = replace(each, config=replace(each.config, precision="fp32"))  # in bf16, confident predictions would tie
        logits.append(predict(job, [exact], rows, tta.views(job.config.tta), f"{title}, fold {each.fold}"))
    return np.concatenate(logits).astype(float) if logits else np.zeros((0, 1))


def pool_tables(suffix, tables):
    """Return all boxes of the test images or, with a suffix, the mean over folds of `predict_logits`."""
    return mean_over_folds(suffix, tables) if suffix else pd.concat(tables, ignore_index=True)


def detect(model, images, flip, config):
    """Return a detector's boxes on a batch, a dict of boxes, scores and labels per image.

    flip: also detect on mirrored images; the boxes of both views go through one NMS at config.nms.
    """
    found = model(images)
    if not flip:
        return found
    side, merged = images.shape[-1], []
    for one, other in zip(found, model(images.flip(-1)), strict=True):
        x_min, y_min, x_max, y_max = other["boxes"].unbind(1)
        other = {**other, "boxes": torch.stack([side - x_max, y_min, side - x_min, y_max], 1)}
        union = {name: torch.cat([one[name], other[name]]) for name in one}
        kept = batched_nms(union["boxes"], union["scores"], union["labels"], config.nms)[: config.per_image]
        merged.append({name: part[kept] for name, part in union.items()})
    return merged
