"""From probability maps to masks by a rule, and how good they are at the images' own sizes."""

import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from common.metrics import segmentation
from common.metrics.statistics import bootstrap
from common.steps import as_interval
from common.tuning import release_pages
from solutions.lung_segmentation.config import STRUCTURES
from solutions.lung_segmentation.postprocess import decide

METRICS = ("dice", "iou", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class MaskRule:
    """Pixels of at least the probability `pixel`, of which the `regions` largest regions are kept (0: all)."""

    pixel: float = 0.5
    regions: int = 0

    def parts(self, probs, shape, structures):
        """The channels' masks, uint8 (C, height, width), of maps uint8 (h, w) or (C, h, w), at `shape`.

        `regions` counts those of two lungs; a channel that shows one lung, or the heart, keeps half of them.
        """
        maps = probs[None] if probs.ndim == 2 else probs
        kept = self.regions if structures == "lungs" else -(-self.regions // 2)
        return np.stack([decide(np.ascontiguousarray(part), shape, self.pixel, kept) for part in maps])

    def lungs(self, probs, shape, structures):
        """The lungs' mask, uint8 (height, width)."""
        return self.parts(probs, shape, structures)[:2].max(0)


def rules(decision):
    """Every rule that a DecisionConfig allows."""
    return [MaskRule(pixel, regions) for pixel, regions in itertools.product(decision.pixel, decision.regions)]


def measure(data, rows, probs, tried, structures, workers=None):
    """Count pixels of every image, rule and structure: int64 (N, rules, S, 4) of overlap, predicted, true, all.

    Structures: the lungs united, then the channels where there are several. True masks are read at the images' own
    size, one image at a time.
    """

    def of_image(item):
        row, maps = item
        true = data.truth(row)
        counts = []
        for rule in tried:
            parts = rule.parts(maps, true.shape[1:], structures).astype(bool)
            pairs = [(parts[:2].any(0), true[:2].any(0)), *(zip(parts, true, strict=True) if len(true) > 1 else ())]
            counts.append([(*map(np.count_nonzero, (p & t, p, t)), t.size) for p, t in pairs])
        return counts

    workers = workers or len(os.sched_getaffinity(0))
    items = ((int(row), np.asarray(maps)) for row, maps in zip(rows, probs, strict=True))
    counts, waiting = [], deque()
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(rows), desc="measure", leave=False) as bar:
        for item in itertools.chain(items, [None] * 2 * workers):  # a few images at a time: originals are large
            if item is not None:
                waiting.append(pool.submit(of_image, item))
            if waiting and (item is None or len(waiting) > 2 * workers):
                counts.append(waiting.popleft().result())
                bar.update()
                if len(counts) % 64 == 0:
                    release_pages(probs)
        counts += [job.result() for job in waiting]
    return np.array(counts, np.int64)


def figures(table, areas, structures):
    """Figures of all images, of each dataset and each structure; returns (dict for score.json, the table with `dice`).

    table: dataset and patient_id of N images; areas: int64 (N, S, 4) as `measure` counts. Each figure is an interval
    over patients; dice, precision, recall and accuracy are means over images, their pooled forms one ratio over the
    pixels of all images.
    """
    lungs, groups = areas[:, 0], table["patient_id"].to_numpy()
    found = _figures(lungs, groups)
    found["datasets"] = {}
    for name in sorted(table["dataset"].unique()):
        chosen = (table["dataset"] == name).to_numpy()
        if len(set(groups[chosen])) > 1:
            found["datasets"][name] = _figures(lungs[chosen], groups[chosen])
    names = STRUCTURES[structures] if areas.shape[1] > 1 else ()
    found["structures"] = {name: _figures(areas[:, k], groups) for k, name in enumerate(names, start=1)}
    cells = _cells(lungs)
    return found, table.assign(dice=segmentation.dice(cells), iou=segmentation.iou(cells))


def _figures(areas, groups):
    cells = _cells(areas)
    found = {"images": len(cells), "patients": len(set(groups))}
    for name in METRICS:
        metric = getattr(segmentation, name)
        found[name] = as_interval(bootstrap(metric(cells), groups))
        pooled = bootstrap(lambda rows, metric=metric: float(metric(cells[rows], reduce="pooled")), groups)
        found[f"{name}_pooled"] = as_interval(pooled)
    return found


def _cells(areas):
    both, predicted, true, pixels = np.asarray(areas).T
    return segmentation.counts_from_areas(both, predicted, true, pixels)
