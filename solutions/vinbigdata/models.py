"""The networks: the detector with its batches and boxes, and the classifier of healthy images (2CC)."""

import random
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from torchvision.ops import batched_nms
from tqdm import tqdm

from common.data.loaders import eval_loader
from common.infer import tta
from common.metrics import classification
from common.metrics.detection import COCO, VOC2010, coco_scores, evaluate
from common.network import predict
from common.nn import detectors, models
from common.nn.precision import autocast, precision
from common.post.boxes import BOX
from solutions.vinbigdata.config import NO_FINDING
from solutions.vinbigdata.data import truth_of

FINDINGS = tuple(range(NO_FINDING))
VOC_FINDINGS, COCO_FINDINGS = (replace(rule, counted=FINDINGS) for rule in (VOC2010, COCO))  # without class 14


def build_detector(config, weights=None):
    """Return the detector of a DetectorConfig, a `common.nn.detectors.Detector` of the 14 findings.

    The batch norms of a pretrained backbone are frozen, as in the paper's library, since batches of four are too small
    for statistics. Everything else is trained. Raises InputError for unknown names and weights that do not fit.
    """
    build = {"faster_rcnn": detectors.faster_rcnn, "retinanet": detectors.retinanet, "fcos": detectors.fcos}
    return build[config.architecture](
        config.backbone,
        NO_FINDING,
        config.size,
        config.weights if weights is None else weights,
        nms=config.nms,
        per_image=config.per_image,
        score=config.min_score,
        channels=config.channels,
        frozen_norms=config.weights != "none",
        stride_in_1x1=config.stride_in_1x1,
    )


def build_healthy(config, weights=None):
    """Return the 2CC of a HealthyConfig: radiographs (B, 1, H, W) to one logit each, above 0 for healthy."""
    return models.classifier(config.backbone, 1, config.weights if weights is None else weights)


class BoxDataset(Dataset):
    """Images with their boxes; an item is `(image uint8 (1, S, S), target)`, or (2, S, S) with lungs.

    target: boxes float32 (n, 4) in the image's pixels and labels int64 (n,), n >= 0. samples: a SampleDataset without
    targets; boxes: {store row: (boxes (n, 4) in the store's pixels, labels (n,))} of the rows with boxes.
    `dataset[index, seed]` is augmented by that seed, `dataset[index]` is not.
    """

    def __init__(self, samples, boxes, transform=None):
        self.samples, self.transform, self.targets = samples, transform, {}
        factor, none = np.float32(samples.size[0] / samples.images.shape[1]), np.zeros((0, 4), np.float32)
        for row in samples.rows.tolist():
            found, labels = boxes.get(row, (none, np.zeros(0, np.int64)))
            self.targets[row] = found * factor, labels

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        image, row = self.samples[index]
        boxes, labels = self.targets[int(row)]
        if self.transform is not None and seed is not None:
            self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            planes = dict(zip(("image", "mask"), image.numpy(), strict=False))
            out = self.transform(**planes, bboxes=boxes, labels=labels)
            image, boxes = torch.from_numpy(np.stack([out[name] for name in planes])), out["bboxes"]
            boxes, labels = np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(out["labels"], np.int64)
        return image, {"boxes": torch.as_tensor(boxes), "labels": torch.as_tensor(labels)}


def collate(items):
    """Return a batch: stacked images, and a list of targets, since their numbers of boxes differ."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets)


def detector_loss(model, images, targets):
    """Return the sum of a detector's losses; in eval mode (for batch-norm statistics) only predict."""
    return sum(model(images, targets).values()) if model.training else model(images)


def pack(found, per_image):
    """Return the boxes of a batch, a dict per image, as float32 (B, per_image, 6): score, label, box, padded by 0."""
    packed = np.zeros((len(found), per_image, 6), np.float32)
    for out, each in zip(packed, found, strict=True):
        parts = torch.cat([each["scores"][:, None], each["labels"][:, None], each["boxes"]], 1)[:per_image]
        out[: len(parts)] = parts.float().cpu().numpy()
    return packed


def detection_table(packed, images, rows, size):
    """Return the detections, in original pixels, from boxes (n, k, 6) of `pack` on images of `size` pixels."""
    about = images.at(rows)
    kept = (packed[..., 4:] > packed[..., 2:4]).all(-1)  # drops padding and boxes without area
    place, flat = np.nonzero(kept)[0], packed[kept].astype(np.float64)
    # multiplied before it is divided, so that boxes at the image's border stay there exactly
    scaled = flat[:, 2:] * about[["width", "height", "width", "height"]].to_numpy(np.float64)[place] / size
    columns = {"image_id": about["image_id"].to_numpy()[place], "class_id": flat[:, 1].astype(np.int64)}
    return pd.DataFrame({**columns, "score": flat[:, 0], **dict(zip(BOX, scaled.T, strict=True))})


def detector_figures(images, packed, rows, size):
    """Return the mean APs of a detector's boxes (`pack`) on rows, over the findings that occur there.

    map: the competition's AP, VOC 2010 at IoU > 0.4; map_coco: COCO's, the paper's validation metric.
    """
    table, truth, ids = detection_table(packed, images, rows, size), truth_of(images, rows), images.ids(rows)
    return {
        "map": evaluate(table, truth, ids, VOC_FINDINGS).mean_ap,
        "map_coco": coco_scores(table, truth, ids, COCO_FINDINGS)[0]["ap"],
    }


def healthy_figures(healthy, probs):
    """Return auroc and the accuracy at 0.5 of the 2CC from true labels (n,) of 0 and 1 and probabilities (n,)."""
    return {
        "auroc": classification.auroc(healthy, probs, undefined=np.nan),
        "accuracy": classification.accuracy(classification.confusion_counts(healthy, probs, 0.5)),
    }


def predict_logits(job, networks, rows, title=""):
    """Return the logits of store rows by each of several 2CCs, one after the other, float64 (k · n,)."""
    logits = [np.zeros(0)]
    for each in networks:
        exact = replace(each, config=replace(each.config, precision="fp32"))  # in bf16, confident images would tie
        logits.append(predict(job, [exact], rows, tta.views(job.config.tta), f"{title}, 2CC {each.fold}")[:, 0])
    return np.concatenate(logits)


@torch.inference_mode()
def predict_boxes(job, network, rows, title=""):
    """Return the boxes that a trained detector finds on store rows, as a detection table in original pixels.

    Columns image_id, class_id, score, x_min, y_min, x_max, y_max; at most config.per_image boxes per image, in the
    order of rows and by descending score.
    """
    config, device, found = network.config, job.device, [np.zeros((0, network.config.per_image, 6), np.float32)]
    model = network.load(job.run).to(device, memory_format=torch.channels_last).eval()
    dataset, dtype = network.dataset(job, rows, False, False), precision(device, config.precision)
    loader = eval_loader(dataset, 2 * config.batch_size, job.workers, pin_memory=device.type == "cuda")
    for images, _ in tqdm(loader, desc=f"{network.stage}, {title}", leave=False):
        with autocast(device, dtype):
            batch = detect(model, images.to(device, non_blocking=True), "flip" in job.config.tta, config)
        found.append(pack(batch, config.per_image))
    return detection_table(np.concatenate(found), job.images, rows, config.size)


def detect(model, images, flip, config):
    """Return a detector's boxes on a batch, a dict of boxes, scores and labels per image.

    flip: whether mirrored images are used too. The boxes of both views go through one NMS at config.nms; boxes are not
    averaged before the fusion of the members.
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
