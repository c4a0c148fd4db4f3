"""Class activation maps against true boxes: what is measured of each box, and the table of the classes."""

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
    """What `measure` finds.

    boxes: the table of true boxes with threshold, the predicted box (found_x_min …; NaN where there is none), iou,
    region_iou, peak_x, peak_y, hit, guided_iou, place_iou and place_hit. curve: thresholds and the mean iou of all
    boxes at each. nested: whether thresholds were chosen, on the other half of the patients; chosen: those that were.
    """

    boxes: pd.DataFrame
    curve: pd.DataFrame
    nested: bool
    chosen: tuple


def measure(boxes, maps, thresholds, seed=0):
    """Compare every true box with its map; see Measured. boxes: as `usable_boxes` returns them; maps: their Maps.

    With several thresholds those of one half of the patients are chosen on the other half, by the mean iou. Raises
    InputError where there is one patient only.
    """
    truth, of = boxes[BOX].to_numpy(), boxes["map"].to_numpy()
    patients = boxes["patient_id"].to_numpy()
    at_all = np.zeros((len(boxes), len(thresholds), 6))  # found box, iou, region_iou
    more = np.zeros((len(boxes), 4))  # peak, hit, guided_iou
    for k in tqdm(range(of.max() + 1), desc="boxes", leave=False):
        mine = np.flatnonzero(of == k)
        heat = maps.heat(k)
        at_all[mine] = np.stack([_compare(heat, truth[mine], t) for t in thresholds], axis=1)
        more[mine] = [_look(heat, box) for box in truth[mine]]
    scores = at_all[:, :, 4]
    if len(thresholds) > 1:
        if len(set(patients)) < 2:
            raise InputError("boxes of one patient only: nothing can be held out to choose on; name one --threshold")
        parts = make_folds(boxes["label"].to_numpy(), 2, patients, seed)
    else:
        parts = np.zeros(len(boxes), int)
    choice = chosen_thresholds(scores, parts)
    best = at_all[np.arange(len(boxes)), choice]
    places = other_patients_box(truth, boxes["label"].to_numpy(), patients)
    centres = (places[:, :2] + places[:, 2:]) / 2
    known = np.isfinite(places).all(axis=1)
    columns = {
        "threshold": np.array(thresholds)[choice],
        **{f"found_{name}": best[:, i] for i, name in enumerate(BOX)},
        "iou": best[:, 4],
        "region_iou": best[:, 5],
        "peak_x": more[:, 0],
        "peak_y": more[:, 1],
        "hit": more[:, 2],
        "guided_iou": more[:, 3],
        "place_iou": np.where(known, _pairwise_iou(places, truth), np.nan),
        "place_hit": np.where(known, _hits(centres, truth), np.nan),
    }
    curve = pd.DataFrame({"threshold": thresholds, "iou": scores.mean(axis=0), "region_iou": at_all[..., 5].mean(0)})
    chosen = tuple(sorted(set(columns["threshold"].tolist())))
    return Measured(boxes.assign(**columns), curve, len(thresholds) > 1, chosen)


def _compare(heat, truth, threshold):
    """Found box, iou and region_iou of one map at one threshold, (n, 6), for its true boxes (n, 4)."""
    region = largest_region(heat, threshold)
    if region is None:  # a flat map
        return np.tile([np.nan] * 4 + [0.0] * 2, (len(truth), 1))
    shared = [region_iou(region.mask, box) for box in truth]
    found = np.tile(region.box, (len(truth), 1))
    return np.column_stack([found, iou_matrix(region.box, truth)[0], shared])


def _look(heat, box):
    at, guided = peak(heat), guided_box(heat, box)
    if at is None:
        return np.nan, np.nan, 0.0, 0.0
    return *at, float(_hits(np.array([at]), box[None])[0]), iou_matrix(guided, box)[0, 0]


def _hits(points, boxes):
    return ((points >= boxes[:, :2]) & (points <= boxes[:, 2:])).all(axis=1)


def _pairwise_iou(a, b):
    return np.array([iou_matrix(one, other)[0, 0] for one, other in zip(a, b, strict=True)])


def chosen_thresholds(scores, parts):
    """For each row of scores (n, T) the column with the highest mean over the rows of the other parts, int64 (n,).

    parts: (n,). With one part all rows choose. Of columns that tie the first is taken.
    """
    choice = np.empty(len(scores), np.int64)
    for part in np.unique(parts):
        others = parts != part
        choice[parts == part] = scores[others if others.any() else slice(None)].mean(axis=0).argmax()
    return choice


def other_patients_box(boxes, labels, patients):
    """The mean of the boxes of the same label and other patients, float64 (n, 4); NaN where there are none.

    boxes: (n, 4); labels: int (n,); patients: (n,).
    """
    mean = np.full(boxes.shape, np.nan)
    patients = group_codes(patients, len(boxes))
    for k in range(len(boxes)):
        others = (labels == labels[k]) & (patients != patients[k])
        if others.any():
            mean[k] = boxes[others].mean(axis=0)
    return mean


def class_table(boxes, paper=None, n_resamples=1000, seed=0):
    """The figures of each class, of all boxes and of the classes' mean, a row each; `boxes` as in Measured.

    label, boxes, patients; iou with its bootstrap interval by patient (low, high; NaN with one patient); region_iou;
    hit; found_0.1 … found_0.7, shares of boxes with iou above; guided_iou; place_iou and place_hit over boxes that
    have a place; gain, iou less place_iou over those, with its interval. The classes' mean, of those that have boxes,
    has no interval. paper: 0 or 1, the column of PAPER that is laid beside as `paper`; None: no column.
    """
    label = np.array(LABELS, object)[boxes["label"].to_numpy()]
    parts = [(name, label == name) for name in PAPER if (label == name).any()]
    rows = [_figures(name, boxes[mask], n_resamples, seed) for name, mask in parts]
    mean = pd.DataFrame(rows).mean(numeric_only=True).to_dict()
    mean |= {"label": CLASSES, "boxes": len(boxes), "patients": boxes["patient_id"].nunique()}
    mean |= dict.fromkeys(("low", "high", "gain_low", "gain_high"), np.nan)
    table = pd.DataFrame([*rows, _figures(ALL, boxes, n_resamples, seed), mean])
    if paper is not None:
        table["paper"] = [PAPER.get(name, (np.nan, np.nan))[paper] for name in table["label"]]
    return table


def _figures(name, boxes, n_resamples, seed):
    groups = boxes["patient_id"].to_numpy()
    iou, place_iou = boxes["iou"].to_numpy(), boxes["place_iou"].to_numpy()
    unknown = Interval(np.nan, np.nan, np.nan)
    interval, gain = Interval(iou.mean(), np.nan, np.nan), unknown
    if len(set(groups)) > 1:
        interval = bootstrap(iou, groups, n_resamples, seed)
        if np.isfinite(place_iou).any():
            gain, _ = paired_bootstrap(iou, place_iou, groups, n_resamples, seed, skip_nan=True)
    return {
        "label": name,
        "boxes": len(boxes),
        "patients": len(set(groups)),
        "iou": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "region_iou": boxes["region_iou"].mean(),
        "hit": boxes["hit"].mean(),
        **{f"found_{t}": (iou > t).mean() for t in T_IOU},
        "guided_iou": boxes["guided_iou"].mean(),
        "place_iou": boxes["place_iou"].mean(),
        "place_hit": boxes["place_hit"].mean(),
        "gain": gain.estimate,
        "gain_low": gain.low,
        "gain_high": gain.high,
    }


def paper_column(config):
    """The column of PAPER for the network of a Config: 0 with attention, 1 without; None where it is another network.

    The paper measures its feature extractor on whole images, before the features are weighted.
    """
    return None if config.views != "whole" or config.whole.weighting else int(not config.whole.attention)
