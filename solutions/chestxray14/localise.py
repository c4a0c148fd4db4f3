"""Class activation maps of a run against true boxes (CXR-IRNet, table 3; SDFN, figures 5 and 9): tables and a page."""

import logging
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import to_dict
from common.data.folds import group_codes, make_folds
from common.errors import InputError
from common.infer.cam import guided_box, largest_region, peak, region_iou
from common.metrics.statistics import Interval, bootstrap, paired_bootstrap
from common.paths import read_parquet, write_csv
from common.post.boxes import BOX, iou_matrix
from common.report import page, plots
from common.report.frame import synthetic_note
from common.report.gallery import gallery, heat_overlay
from common.step import Step
from solutions.chestxray14.config import BOX_SIDE, LABELS
from solutions.chestxray14.data import place_boxes
from solutions.chestxray14.labels import read_boxes
from solutions.chestxray14.maps import class_maps, usable_boxes

log = logging.getLogger(__name__)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NOTES = (
    "The map of a box's class, of networks that did not train on the image, is stretched over the image, scaled to "
    "[0, 1] and cut at a threshold; the prediction is the box around the largest connected region. iou compares that "
    "box with the true one, region_iou the region's pixels. Each of several boxes of a class in an image is compared "
    "with the same map. hit: the map's peak lies in the box.",
    "place needs no map: it is the mean of the class's true boxes of all other patients.",
    "guided_iou is not a prediction: the box has the size of the true one and lies at that peak of the map where it "
    "fits best. The code that CXR-IRNet's authors released measures such boxes too, but swaps rows and columns, and "
    "dilates the map five times and takes the centres of blobs for peaks: none of these columns repeats theirs.",
)
PAPER_NOTE = "paper: table 3 of CXR-IRNet, of its feature extractor {} attention; see guided_iou for its measure."
VIEWS = (
    "whole_iou: of the whole image's network alone, on the same boxes, its thresholds tuned in the same way; "
    "fused_gain: what both add to it, by paired bootstrap over patients. SDFN's figure 9 shows pictures only."
)
NO_PAPER = (
    "Table 3 of CXR-IRNet is about its feature extractor on whole images, before the feature weighting; this run has "
    "no such network, so its figures are not shown."
)
WEIGHTED = (
    "The features are weighted, so the map of the whole image is counted from its lowest evidence and lies within the "
    "weighting's masks ({}): findings outside them cannot be found."
)
NO_GAIN = "The maps locate findings no better than the class's usual place"
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
    """Return the Measured boxes of `usable_boxes`; several thresholds are tuned on the other half of the patients."""
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
    """Return for each row of scores (n, T) the column with the highest mean over the other parts' rows, int64 (n,)."""
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

    label, boxes, patients; iou with its interval by patient (low, high); region_iou; hit; found_0.1 … found_0.7, shares
    of boxes with iou above; guided_iou; place_iou and place_hit; gain, iou minus place_iou, with interval and two-sided
    p-value (paired bootstrap by patient); fused_gain likewise against whole_iou. paper: 0 or 1, the column of PAPER to
    add.
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
    """Return the column of PAPER for a Config's network: 0 with attention, 1 without, None for another network."""
    return None if config.views != "whole" or config.whole.weighting else int(not config.whole.attention)


def write_localisation(job, thresholds=THRESHOLDS, out=None, further=None):
    """Measure the class activation maps of a run against the true boxes of its images, or those in `further`.

    Writes localisation.csv (a row per box), localisation_table.csv (a row per class) and localisation.html to `out`.
    """
    out, config, thresholds = out or job.run.folder, job.config, tuple(sorted(set(thresholds)))
    placed = None if further is None else place_boxes(read_boxes(further), job.images.table)
    boxes, left_out = usable_boxes(job.images, config.folds, placed)
    predictions = pd.concat([read_parquet(job.run.path(f"{name}.parquet")) for name in ("oof", "test")])
    probs = predictions.set_index("image_id").loc[boxes["image_id"], list(LABELS)].to_numpy()
    boxes["prob"] = probs[np.arange(len(boxes)), boxes["label"]]
    maps = class_maps(job, boxes)
    found, alone = measure(boxes, maps, thresholds, config.seed), None
    if config.views == "both":
        alone = class_maps(job, boxes, alone=True)
        found.boxes["whole_iou"] = measure(boxes, alone, thresholds, config.seed).boxes["iou"]
    table = class_table(found.boxes, paper_column(config) if further is None else None, seed=config.seed)
    names = np.array(LABELS, object)[found.boxes["label"]]
    write_csv(out / "localisation.csv", found.boxes.assign(label=names).drop(columns=["row", "map"]))
    write_csv(out / "localisation_table.csv", table)
    _write_page(out / "localisation.html", job, found, table, maps, alone, left_out)
    row = table.set_index("label").loc[ALL]
    log.info(
        f"mean IoU {row.iou:.4f} [{row.low:.4f}, {row.high:.4f}] over {row.boxes:.0f} boxes of {row.patients:.0f} "
        f"patients, {_threshold_text(found)}; place alone {row.place_iou:.4f}; peak in the box {row.hit:.1%}; guided "
        f"by the true size {row.guided_iou:.4f}"
    )
    if alone is not None:
        gain = page.interval_text(row.fused_gain, row.fused_gain_low, row.fused_gain_high)
        log.info(f"whole image's network alone {row.whole_iou:.4f}; both gain {gain}, p {row.fused_gain_p:.3f}")
    if row.gain <= 0:
        log.info(f"{NO_GAIN}: over all boxes their IoU is lower by {-row.gain:.4f}")
    if left_out:
        log.info(f"{left_out} boxes left out: their images were trained on, or cannot be read")
    log.info(f"{out / 'localisation_table.csv'}, localisation.csv and localisation.html")


FILES = ("localisation.csv", "localisation_table.csv", "localisation.html")
STEP = Step("localise", write_localisation, needs=("predict",), reads=lambda job: to_dict(job.config), files=FILES)


def _threshold_text(found):
    thresholds = " and ".join(f"{t:g}" for t in found.chosen)
    tuned = f"thresholds {thresholds}, tuned on the other half of the patients"
    return tuned if found.nested else f"threshold {thresholds}"


def _write_page(path, job, found, table, maps, alone, left_out):
    row, structures = table.set_index("label").loc[ALL], job.images.about["structures"]
    paper = paper_column(job.config) if "paper" in table else None
    gain = page.interval_text(row.gain, row.gain_low, row.gain_high)
    cards = [
        ("Mean IoU", row.iou, f"95 % interval {page.as_text(row.low)}–{page.as_text(row.high)}, by patient"),
        ("Place alone", row.place_iou, f"gain of the maps {gain or '–'}"),
        ("Peak in the box", f"{row.hit:.0%}", f"centre of the mean place: {row.place_hit:.0%}"),
        ("Boxes", int(row.boxes), f"{row.patients:.0f} patients; {left_out} left out"),
    ]
    curve = plots.line_with_peak(found.curve["threshold"], found.curve["iou"], "threshold", "mean IoU of boxes")
    parts = [
        page.cards(cards),
        synthetic_note(job.run),
        page.note(f"{NO_GAIN}.", "warning") if row.gain <= 0 else None,
        page.section(
            "How it is measured",
            *NOTES,
            *([] if alone is None else [VIEWS]),
            NO_PAPER if paper is None else PAPER_NOTE.format("without" if paper else "with"),
            *([WEIGHTED.format(" and ".join(structures))] if structures else []),
            f"Here: {_threshold_text(found)}.",
        ),
        page.section("Classes", *_tables(table), page.figure(curve, "One threshold for all boxes, not nested")),
        page.section(
            "Pictures",
            "One box of each class, chosen by its area alone; then the best, median and worst of each class by IoU. "
            "Violet to yellow: the map's lowest to highest value, whatever the probability.",
            *_galleries(job.images, found.boxes, maps, alone),
        ),
    ]
    title, subtitle = "ChestX-ray14: where the maps point", f"run {job.run.folder.name}, preset {job.preset}"
    page.write_page(path, title, subtitle, [part for part in parts if part is not None])


def _tables(table):
    shares, gain = [name for name in table if name.startswith("found_")], ["gain", "gain_low", "gain_high"]
    for caption, columns in (
        ("Maps and place, means over boxes", ["iou", "low", "high", "place_iou", *gain]),
        ("Whole image's network alone, and both", ["whole_iou", *(f"fused_{name}" for name in [*gain, "gain_p"])]),
        ("Regions and peaks, means over boxes", ["region_iou", "hit", "place_hit"]),
        ("Share of boxes with an IoU above 0.1 to 0.7", shares),
        ("Boxes of the true size, and the paper's", ["guided_iou", *({"paper"} & set(table))]),
    ):
        if columns[0] in table:
            yield page.table(table[["label", "boxes", *columns]], caption, dict.fromkeys(columns, ".3f"))


def _galleries(images, boxes, maps, alone):
    items = [item for at in pick_examples(boxes) for item in _items(images, boxes.iloc[at], maps, alone)]
    yield gallery(items, "The box of median area of each class", overlay=heat_overlay)
    for label, mine in boxes.groupby("label"):
        order = mine.sort_values("iou", ascending=False, kind="stable")
        places = sorted({0, len(order) // 2, len(order) - 1})
        items = [item for place in places for item in _items(images, order.iloc[place], maps)]
        yield gallery(items, f"{LABELS[label]}, {len(order)} boxes", overlay=heat_overlay)


def _items(images, box, maps, alone=None):
    """Return the item of a box for a gallery, after that of the whole image's network alone where it is given."""
    image = np.asarray(images.store.images[box["row"]])
    scale, found = image.shape[0] / BOX_SIDE, box[[f"found_{name}" for name in BOX]].to_numpy(float)
    truth = [(box[BOX].to_numpy(float) * scale, LABELS[box["label"]])]
    prediction = [(found * scale, f"IoU {box['iou']:.2f}")] if np.isfinite(found).all() else []
    place = "inside" if box["hit"] else "outside"
    caption = f"{box['image_id']}, probability {box['prob']:.2f}: IoU {box['iou']:.2f} at {box['threshold']:g}"
    item = ((image, maps.heat(box["map"])), truth, prediction, f"{caption}, peak {place}")
    if alone is None:
        return [item]
    return [((image, alone.heat(box["map"])), truth, [], f"whole image alone: IoU {box['whole_iou']:.2f}"), item]
