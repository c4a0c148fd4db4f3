"""What the two trainings are made of: batches, steps, and the figures by which epochs are compared."""

import random
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from torchvision.ops import batched_nms
from tqdm import tqdm

from common.data.augment import light
from common.data.loaders import EpochSampler, SampleDataset, eval_loader, make_loader
from common.errors import InputError
from common.infer import tta
from common.metrics import classification
from common.metrics.detection import COCO, VOC2010, coco_scores, evaluate
from common.nn.losses import bce
from common.nn.precision import autocast, precision
from common.post.boxes import BOX
from common.train import distributed
from solutions.vinbigdata import augment
from solutions.vinbigdata.config import NO_FINDING, member_parts

FINDINGS = tuple(range(NO_FINDING))


def augmentation(name, size):
    """The augmentation pipeline that a configuration names, for images of `size` pixels."""
    return {
        "none": lambda: None,
        "flip": augment.flip,
        "built_in": lambda: augment.built_in(size),
        "noise": augment.noise,
        "both": lambda: augment.both(size),
        "both_no_rotation": lambda: augment.both(size, rotate=0.0),
        "podium": lambda: augment.podium(size),
    }[name]()


class BoxDataset(Dataset):
    """Images of a store with their boxes; an item is `(image uint8 (1, S, S), target)`.

    target: boxes float32 (n, 4) in the image's pixels and labels int64 (n,), n from 0. images: as in SampleDataset;
    boxes_of: maps a store row to (boxes (n, 4) in the store's pixels, labels (n,)). `dataset[index, seed]` is augmented
    by that seed, `dataset[index]` is not.
    """

    def __init__(self, images, boxes_of, rows, size, transform=None):
        self.samples, self.transform = SampleDataset(images, size=size, rows=rows), transform
        side = self.samples.images.shape[1]
        self.targets = {}  # a few numbers an image; the function may hold the whole store
        for row in self.samples.rows.tolist():
            boxes, labels = boxes_of(row)
            boxes = np.asarray(boxes, np.float32).reshape(-1, 4) * np.float32(size / side)
            self.targets[row] = boxes, np.asarray(labels, np.int64)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, row = self.samples[index]
        boxes, labels = self.targets[int(row)]
        if self.transform is not None and seed is not None:
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            out = self.transform(image=image[0].numpy(), bboxes=boxes, labels=labels)
            image, boxes = torch.from_numpy(np.ascontiguousarray(out["image"]))[None], out["bboxes"]
            boxes, labels = np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(out["labels"], np.int64)
        return image, {"boxes": torch.as_tensor(boxes), "labels": torch.as_tensor(labels)}


def collate(items):
    """A batch: the images stacked, the targets in a list, since each holds another number of boxes."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets)


def detector_rows(context, data, fold, abnormal_only):
    """Training rows of a detector: all folds but one, and with `abnormal_only` only images with a finding."""
    rows = data.rows(folds=[k for k in range(context.config.n_folds) if k != fold])
    return rows[_abnormal(data, rows) > 0] if abnormal_only else rows


def healthy_rows(context, data, fold):
    """(training rows, held-out rows) of one fold of the 2CC, which may unite several of the detectors' folds."""
    config = context.config
    parts = np.arange(config.n_folds) % config.healthy_modulus == fold
    return tuple(data.rows(folds=np.flatnonzero(chosen)) for chosen in (~parts, parts))


def detector_loader(context, data, rows, config, member):
    """Training batches of these rows, augmented as `member` says."""
    name = member_parts(member, config.architecture)[1]
    dataset = BoxDataset(data.store.images, data.boxes_of, rows, config.size, augmentation(name, config.size))
    return _train_loader(context, dataset, config, collate)


def held_out_loader(context, data, rows, config):
    """Batches of this process's share of the held-out images, in order and without augmentation."""
    dataset = SampleDataset(data.store.images, size=config.size, rows=rows)
    share = distributed.share_rows(len(dataset))
    return eval_loader(dataset, 2 * config.batch_size, context.workers, share, context.device.type == "cuda")


def detector_step(model, batch, device):
    """The sum of a detector's losses on one batch; in evaluation, for batch norms' statistics, the pass alone."""
    images, targets = batch
    images = images.to(device, non_blocking=True)
    if not model.training:
        return model(images)
    targets = [{name: part.to(device, non_blocking=True) for name, part in each.items()} for each in targets]
    return sum(model(images, targets).values())


def detector_figures(model, loader, data, rows, config, device):
    """Figures of a detector on held-out rows, means over the findings that occur among them.

    map: the competition's AP, VOC 2010 at IoU > 0.4; map_coco: COCO's, the paper's validation figure. `loader` is that
    of `held_out_loader` for these rows.
    """
    found = [packed(each, config.per_image) for images, _ in loader for each in model(images.to(device))]
    found = distributed.gather_rows(np.array(found, np.float32).reshape(-1, config.per_image, 6), len(rows))
    table, truth = detection_table(found, data.table, rows, config.size), data.truth(rows)
    images = _rows_of(data.table, rows)["image_id"]
    return {
        "map": evaluate(table, truth, images, replace(VOC2010, counted=FINDINGS)).mean_ap,
        "map_coco": coco_scores(table, truth, images, replace(COCO, counted=FINDINGS))[0]["ap"],
    }


@torch.inference_mode()
def predict_boxes(model, data, rows, config, device, views=(), workers=0, progress=True):
    """The boxes that one detector finds on these rows, as a detection table in original pixels.

    Columns image_id, class_id, score, x_min, y_min, x_max, y_max; at most config.per_image boxes an image, in the order
    of rows and by falling score. views: ("flip",) also looks at the mirrored image; the boxes of both go through one
    NMS at config.nms, which keeps the higher score and moves no box (averaging is left to the fusion of the members).
    progress: shown; a string is its title. Memory: the batch, and 24 bytes a box kept.
    """
    model.to(device, memory_format=torch.channels_last).eval()
    dataset = SampleDataset(data.store.images, size=config.size, rows=rows)
    loader = eval_loader(dataset, 2 * config.batch_size, workers, pin_memory=device.type == "cuda")
    found = np.empty((len(dataset), config.per_image, 6), np.float32)
    title, dtype, done = progress if isinstance(progress, str) else "boxes", precision(device, config.precision), 0
    with tqdm(total=len(dataset), desc=title, disable=not progress, leave=False) as bar:
        for images, _ in loader:
            with autocast(device, dtype):
                batch = detect(model, images.to(device, non_blocking=True), views, config)
            for each in batch:
                found[done] = packed(each, config.per_image)
                done += 1
            bar.update(len(batch))
    return detection_table(found, data.table, rows, config.size)


def detect(model, images, views, config):
    """What the detector finds on a batch over all views: for each image a dict of boxes, scores and labels."""
    unknown = set(views) - {"flip"}
    if unknown:
        raise InputError(f"tta {', '.join(sorted(unknown))}: boxes know flip alone")
    found = model(images)
    if not views:
        return found
    side = images.shape[-1]
    merged = []
    for one, other in zip(found, model(images.flip(-1)), strict=True):
        x_min, y_min, x_max, y_max = other["boxes"].unbind(1)
        other = {**other, "boxes": torch.stack([side - x_max, y_min, side - x_min, y_max], 1)}
        union = {name: torch.cat([one[name], other[name]]) for name in one}
        kept = batched_nms(union["boxes"], union["scores"], union["labels"], config.nms)[: config.per_image]
        merged.append({name: part[kept] for name, part in union.items()})
    return merged


def packed(found, per_image):
    """One image's boxes as float32 (per_image, 6): score, label and box, NaN in the rows left over."""
    out = np.full((per_image, 6), np.nan, np.float32)
    parts = torch.cat([found["scores"][:, None], found["labels"][:, None], found["boxes"]], 1)[:per_image]
    out[: len(parts)] = parts.float().cpu().numpy()
    return out


def detection_table(found, table, rows, size):
    """The detection table, in original pixels, of boxes (n, k, 6) as in `packed`, on images of `size` pixels."""
    images = _rows_of(table, rows)
    kept = (found[..., 4:] > found[..., 2:4]).all(-1)  # no NaN, and no box that the image's border cut to nothing
    place, flat = np.nonzero(kept)[0], found[kept].astype(np.float64)
    # first times, then by: what ends at the image's border does so to the last bit
    scaled = flat[:, 2:] * images[["width", "height", "width", "height"]].to_numpy(np.float64)[place] / size
    columns = {"image_id": images["image_id"].to_numpy()[place], "class_id": flat[:, 1].astype(np.int64)}
    return pd.DataFrame({**columns, "score": flat[:, 0], **dict(zip(BOX, scaled.T, strict=True))})


def healthy_loader(context, data, rows, config):
    """Training batches of the 2CC: slightly moved and mirrored images, 1 for those without a finding."""
    targets = dict(zip(rows.tolist(), 1 - _abnormal(data, rows)[:, None].astype(np.float32), strict=True))
    dataset = SampleDataset(data.store.images, targets.__getitem__, light(), config.size, rows=rows)
    return _train_loader(context, dataset, config)


def healthy_step(model, batch, device):
    """Binary cross-entropy of one batch of the 2CC."""
    images, healthy = (part.to(device, non_blocking=True) for part in batch)
    return bce(model(images), healthy)


def healthy_figures(model, loader, data, rows, device):
    """Figures of the 2CC on held-out rows: auroc, and accuracy at the probability 0.5."""
    probs = [tta.sigmoid(model(images.to(device)))[:, 0].cpu().numpy() for images, _ in loader]
    probs = distributed.gather_rows(np.concatenate([np.empty(0, np.float32), *probs]), len(rows))
    if not np.isfinite(probs).all():
        raise InputError("the network's output is no number any more: lower the learning rate or set clip_norm")
    healthy = 1 - _abnormal(data, rows)
    return {
        "auroc": classification.auroc(healthy, probs, undefined=np.nan),
        "accuracy": classification.accuracy(classification.confusion_counts(healthy, probs, 0.5)),
    }


def _train_loader(context, dataset, config, join=None):
    sampler = EpochSampler(
        len(dataset), config.batch_size, context.config.seed, rank=distributed.rank(), world=distributed.world()
    )
    pinned = context.device.type == "cuda"
    return make_loader(dataset, sampler, context.workers, context.config.seed, pinned, collate=join)


def _rows_of(table, rows):
    return table.set_index("row").loc[np.asarray(rows)]


def _abnormal(data, rows):
    return _rows_of(data.table, rows)["abnormal"].to_numpy(np.int64)
