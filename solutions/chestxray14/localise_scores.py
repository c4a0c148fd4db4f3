"""Class activation maps against true boxes: the measures of each box, and the table of the classes."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.data.folds import group_codes, make_folds
from common.errors import InputError
from common.infer.cam import guided_box, largest_region, peak, region_iou
from common.metrics.statistics import Interval, bootstrap, paired_bootstrap
from common.post.boxes import BOX, iou_matrix
from solutions.chestxray14.config import LABELS

T_IOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # of the share of boxes found; Wang et al. 2017, ChestX-ray8
FEW = 5  # patients, below which a bootstrap's p-value means nothing
ALL, CLASSES = "all boxes", "mean of classes"
# CXR-IRNet, table 3, of its feature extractor with and without attention, no feature weighting; the second half of the
# row without is lost in the text. Its mean is that over boxes: the rows weighted by NIH's boxes of each class give it.
PAPER = {
    "Atelectasis": (0.1713, 0.1212),
    "Cardiomegaly": (0.5515, 0.4430),
    "Effusion": (0.3242, 0.3258),
    "Infiltration": (0.3819, 0.2783),
    "Mass": (0.1768, np.nan),
    "Nodule": (0.0460, np.nan),
    "Pneumonia": (0.3097, np.nan),
    "Pneumothorax": (0.3345, np.nan),
    ALL: (0.3014, 0.2437),
}


class Measured(NamedTuple):
    """The result of `measure`.

    boxes: the table of true boxes with threshold, the predicted box (found_x_min …; NaN where there is none), iou,
    region_iou, peak_x, peak_y, hit, guided_iou, place_iou and place_hit. curve: thresholds and the mean iou of all
    boxes at each. nested: whether thresholds were chosen, on the other half of the patients; chosen: those used.
    """

    boxes: pd.DataFrame
    curve: pd.DataFrame
    nested: bool
    chosen: tuple


def measure(boxes, maps, thresholds, seed=0):
    """Return the Measured comparison of every true box with its map; boxes: of `usable_boxes`, maps: their Maps.

    Several thresholds are tuned on one half of the patients for the other half, by the mean iou. Raises InputError
    where there is one patient only.
    """
    truth, patients = boxes[BOX].to_numpy(), boxes["patient_id"].to_numpy()
    regions = np.zeros((len(boxes), len(thresholds), 6))  # found box, iou, region_iou
    peaks = np.zeros((len(boxes), 4))  # x, y, hit, guided_iou
    for k in tqdm(range(boxes["map"].max() + 1), desc="boxes", leave=False):
        mine, heat = np.flatnonzero(boxes["map"] == k), maps.heat(k)
        regions[mine] = np.stack([_region_scores(heat, truth[mine], t) for t in thresholds], axis=1)
        peaks[mine] = [_peak_scores(heat, box) for box in truth[mine]]
    parts = np.zeros(len(boxes), int)
    if len(thresholds) > 1:
        if len(set(patients)) < 2:
            raise InputError("boxes of one patient only, so thresholds cannot be tuned on others; name one --threshold")
        parts = make_folds(boxes["label"].to_numpy(), 2, patients, seed)
    scores = regions[:, :, 4]
    choice = nested_choice(scores, parts)
    best = regions[np.arange(len(boxes)), choice]
    places = other_patients_box(truth, boxes["label"].to_numpy(), patients)
    known = np.isfinite(places).all(axis=1)
    place_iou = [iou_matrix(place, box)[0, 0] for place, box in zip(places, truth, strict=True)]
    measured = boxes.assign(
        threshold=np.array(thresholds)[choice],
        **dict(zip([*(f"found_{name}" for name in BOX), "iou", "region_iou"], best.T, strict=True)),
        **dict(zip(("peak_x", "peak_y", "hit", "guided_iou"), peaks.T, strict=True)),
        place_iou=np.where(known, place_iou, np.nan),
        place_hit=np.where(known, _hits((places[:, :2] + places[:, 2:]) / 2, truth), np.nan),
    )
    curve = pd.DataFrame({"threshold": thresholds, "iou": scores.mean(axis=0), "region_iou": regions[..., 5].mean(0)})
    return Measured(measured, curve, len(thresholds) > 1, tuple(sorted(set(measured["threshold"].tolist()))))


def _region_scores(heat, truth, threshold):
    """Return found box, iou and region_iou of one map at one threshold, (n, 6), for its true boxes (n, 4)."""
    region = largest_region(heat, threshold)
    if region is None:  # a flat map
        return np.tile([np.nan] * 4 + [0.0] * 2, (len(truth), 1))
    region_ious = [region_iou(region.mask, box) for box in truth]
    return np.column_stack([np.tile(region.box, (len(truth), 1)), iou_matrix(region.box, truth)[0], region_ious])


def _peak_scores(heat, box):
    place = peak(heat)
    if place is None:
        return np.nan, np.nan, 0.0, 0.0
    return *place, float(_hits(np.array([place]), box[None])[0]), iou_matrix(guided_box(heat, box), box)[0, 0]


def _hits(points, boxes):
    return ((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(axis=1)


def nested_choice(scores, parts):
    """Return for each row of scores (n, T) the column with the highest mean over the other parts' rows, int64 (n,).

    parts: (n,); with one part, all rows choose. The first of equal columns wins.
    """
    choice = np.empty(len(scores), np.int64)
    for part in np.unique(parts):
        others = parts != part
        choice[parts == part] = scores[others if others.any() else slice(None)].mean(axis=0).argmax()
    return choice


def other_patients_box(boxes, labels, patients):
    """Return the mean of the boxes (n, 4) of the same label and other patients, (n, 4); NaN where there are none."""
    mean, patients = np.full(boxes.shape, np.nan), group_codes(patients, len(boxes))
    for k in range(len(boxes)):
        others = (labels == labels[k]) & (patients != patients[k])
        if others.any():
            mean[k] = boxes[others].mean(axis=0)
    return mean


def class_table(boxes, paper=None, n_resamples=1000, seed=0):
    """Return a row of figures for each class, for all boxes and for the classes' mean; `boxes` as in Measured.

    label, boxes, patients; iou with its bootstrap interval by patient (low, high; NaN with one patient); region_iou;
    hit; found_0.1 … found_0.7, shares of boxes with iou above; guided_iou; place_iou and place_hit over boxes that
    have a place; gain, iou minus place_iou over those, with interval and two-sided p-value (paired bootstrap by
    patient); fused_gain likewise against whole_iou, where the boxes have it. The classes' mean has no interval. paper:
    0 or 1, the column of PAPER that becomes the column `paper`; None: no column.
    """
    label = np.array(LABELS, object)[boxes["label"].to_numpy()]
    rows = [_figures(name, boxes[label == name], n_resamples, seed) for name in LABELS if (label == name).any()]
    mean = pd.DataFrame(rows).mean(numeric_only=True).to_dict()
    mean |= {"label": CLASSES, "boxes": len(boxes), "patients": boxes["patient_id"].nunique()}
    mean |= {name: np.nan for name in mean if name.endswith(("low", "high", "_p"))}
    table = pd.DataFrame([*rows, _figures(ALL, boxes, n_resamples, seed), mean])
    if paper is not None:
        table["paper"] = [PAPER.get(name, (np.nan, np.nan))[paper] for name in table["label"]]
    return table


def _figures(name, boxes, n_resamples, seed):
    groups, iou = (boxes[column].to_numpy() for column in ("patient_id", "iou"))
    options, several = {"groups": groups, "n_resamples": n_resamples, "seed": seed}, len(set(groups)) > 1
    interval = bootstrap(iou, **options) if several else Interval(iou.mean(), np.nan, np.nan)
    figures = {"label": name, "boxes": len(boxes), "patients": len(set(groups))}
    figures |= {"iou": interval.estimate, "low": interval.low, "high": interval.high}
    figures |= boxes[["region_iou", "hit"]].mean().to_dict() | {f"found_{t}": (iou > t).mean() for t in T_IOU}
    figures |= boxes[["guided_iou", "place_hit"]].mean().to_dict()
    for other, gain in (("place_iou", "gain"), ("whole_iou", "fused_gain")):
        if other in boxes:
            more, p = Interval(np.nan, np.nan, np.nan), np.nan
            if several and boxes[other].notna().any():
                more, p = paired_bootstrap(iou, boxes[other], skip_nan=True, **options)
            figures |= {other: boxes[other].mean(), gain: more.estimate}
            p = p if len(set(groups)) >= FEW else np.nan
            figures |= {f"{gain}_low": more.low, f"{gain}_high": more.high, f"{gain}_p": p}
    return figures


def pick_examples(boxes):
    """Return the positions of one box of each label: of median area, so that no result of a network can choose it."""
    area = (boxes["x_max"] - boxes["x_min"]) * (boxes["y_max"] - boxes["y_min"])
    order = boxes.assign(area=area, at=range(len(boxes))).sort_values(["label", "area", "image_id"])
    return order.groupby("label")["at"].agg(lambda places: places.iloc[len(places) // 2]).tolist()


def paper_column(config):
    """Return the column of PAPER for a Config's network: 0 with attention, 1 without, None for another network.

    The paper measures its feature extractor on whole images, before the features are weighted.
    """
    return None if config.views != "whole" or config.whole.weighting else int(not config.whole.attention)
