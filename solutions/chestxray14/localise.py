"""Compare a run's class activation maps with true boxes (CXR-IRNet, table 3; SDFN, figures 5 and 9)."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import to_dict
from common.data.folds import make_folds
from common.errors import InputError, log
from common.infer.cam import guided_box, largest_box, peak
from common.metrics.statistics import bootstrap, paired_bootstrap
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

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NOTES = (
    "The map of a box's class, by networks that did not train on the image, is scaled to [0, 1] and cut at a "
    "threshold; iou compares the box around its largest region with the true one. hit: the map's peak lies in the box. "
    "place needs no map: it is the mean of the class's true boxes of all other patients.",
    "guided_iou is no prediction: the box has the true one's size and lies at the peak where it fits best. CXR-IRNet's "
    "code measures such boxes too, but swaps rows and columns, dilates the map five times and takes the centres of "
    "blobs for peaks: no column repeats theirs.",
)
PAPER_NOTE = "paper: table 3 of CXR-IRNet, of its feature extractor {} attention, before the feature weighting."
NO_PAPER = "This run has no network of CXR-IRNet's table 3, its feature extractor, so its figures are not shown."
VIEWS = (
    "whole_iou: of the whole image's network alone, on the same boxes, its thresholds tuned in the same way; "
    "fused_gain: what both add to it, by paired bootstrap over patients. SDFN's figure 9 shows pictures only."
)
WEIGHTED = "The features are weighted, so the map lies within {}: findings outside them cannot be found."
HEAT = "Violet to yellow: the map's lowest to highest value, whatever the probability."
NO_GAIN = "The maps locate findings no better than the class's usual place"
FEW = 5  # with fewer patients, a bootstrap's p-value means nothing
ALL, CLASSES = "all boxes", "mean of classes"
# CXR-IRNet, table 3: feature extractor with and without attention, no feature weighting. Without attention, half of the
# row is missing from the text. The paper's mean is over boxes: classes weighted by NIH's box counts reproduce it.
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

    boxes: the table of true boxes with threshold, the predicted box (found_x_min …; NaN where there is none), iou, hit,
    guided_iou and place_iou. curve: mean iou of all boxes by threshold. said: the thresholds in words.
    """

    boxes: pd.DataFrame
    curve: pd.Series
    said: str


def measure(boxes, maps, thresholds, seed=0):
    """Return Measured for `usable_boxes`. Several thresholds: each half of the patients uses the other half's best."""
    truth, patients, n = boxes[BOX].to_numpy(), boxes["patient_id"].to_numpy(), len(boxes)
    regions, peaks = np.full((n, len(thresholds), 4), np.nan), np.zeros((n, 2))  # found boxes; hit, guided_iou
    for k in tqdm(range(boxes["map"].max() + 1), desc="boxes", leave=False):
        mine, heat = np.flatnonzero(boxes["map"] == k), maps.heat(k)
        top = peak(heat)
        if top is not None:  # not a flat map
            regions[mine] = [largest_box(heat, t) for t in thresholds]
            guided = [iou_matrix(guided_box(heat, box), box)[0, 0] for box in truth[mine]]
            peaks[mine] = np.stack([((truth[mine, :2] <= top) & (top <= truth[mine, 2:])).all(1), guided], axis=1)
    scores = np.stack([_ious(regions[:, k], truth) for k in range(len(thresholds))], axis=1)
    chosen = [0] * n
    if len(thresholds) > 1:
        if len(set(patients)) < 2:
            raise InputError("boxes of one patient only, so thresholds cannot be tuned on others; name one --threshold")
        halves = make_folds(boxes["label"].to_numpy(), 2, patients, seed)
        best = [scores[halves != half].mean(axis=0).argmax() for half in (0, 1)]
        chosen = np.take(best, halves)
    places, at = other_patients_box(truth, boxes["label"].to_numpy(), patients), np.arange(n)
    measured = boxes.assign(
        threshold=np.take(thresholds, chosen),
        **dict(zip([f"found_{name}" for name in BOX], regions[at, chosen].T, strict=True)),
        iou=scores[at, chosen],
        hit=peaks[:, 0],
        guided_iou=peaks[:, 1],
        place_iou=np.where(np.isnan(places[:, 0]), np.nan, _ious(places, truth)),
    )
    used = " and ".join(f"{t:g}" for t in sorted(set(measured["threshold"])))
    said = f"thresholds {used}, tuned on the other half of the patients" if len(thresholds) > 1 else f"threshold {used}"
    return Measured(measured, pd.Series(scores.mean(axis=0), thresholds), said)


def _ious(found, truth):
    """Return the IoU of each predicted box with its true one, (n,); 0 where there is no predicted box (NaN)."""
    return np.array([np.nan_to_num(iou_matrix(a, b)[0, 0]) for a, b in zip(found, truth, strict=True)])


def other_patients_box(boxes, labels, patients):
    """Return the mean of the boxes (n, 4) of the same label and other patients, (n, 4); NaN where there are none."""
    mean = np.full(boxes.shape, np.nan)
    for k in range(len(boxes)):
        others = (labels == labels[k]) & (patients != patients[k])
        if others.any():
            mean[k] = boxes[others].mean(axis=0)
    return mean


def class_table(boxes, paper=None, n_resamples=1000, seed=0):
    """Return one row per class, one for all boxes and one for the mean of the classes; `boxes` as in Measured.

    Columns: label, boxes, patients; iou and its interval (low, high); hit; guided_iou; place_iou; gain (iou minus
    place_iou) with interval and two-sided p-value; fused_gain likewise (iou minus whole_iou). Intervals and p-values
    are by (paired) bootstrap over patients. paper: 0 or 1, the column of PAPER to add.
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
    groups, iou = boxes["patient_id"].to_numpy(), boxes["iou"].to_numpy()
    options, n = {"groups": groups, "n_resamples": n_resamples, "seed": seed}, len(set(groups))
    interval = bootstrap(iou, **options)
    figures = {"label": name, "boxes": len(boxes), "patients": n, "iou": iou.mean()}
    figures |= {"low": interval.low, "high": interval.high, **boxes[["hit", "guided_iou"]].mean()}
    for other, gain in (("place_iou", "gain"), ("whole_iou", "fused_gain")):
        if other in boxes:
            more, p = paired_bootstrap(iou, boxes[other], skip_nan=True, **options)
            figures |= {other: boxes[other].mean(), gain: more.estimate, f"{gain}_low": more.low}
            figures |= {f"{gain}_high": more.high, f"{gain}_p": p if n >= FEW else np.nan}
    return figures


def pick_examples(boxes):
    """Return each label's box of median area, a choice that does not depend on any network's result."""
    area = (boxes["x_max"] - boxes["x_min"]) * (boxes["y_max"] - boxes["y_min"])
    order = boxes.assign(area=area).sort_values(["label", "area", "image_id"]).groupby("label")
    return boxes.loc[[part.index[len(part) // 2] for _, part in order]]


def paper_column(config):
    """Return the column of PAPER for a Config's network: 0 with attention, 1 without, None for another network."""
    return None if config.views != "whole" or config.whole.weighting else int(not config.whole.attention)


def write_localisation(job, thresholds=THRESHOLDS, out=None, further=None):
    """Compare the class activation maps of a run with the true boxes of its images, or with those in `further`.

    Writes localisation.csv (one row per box), localisation_table.csv (one per class) and localisation.html to `out`.
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
        f"patients, {found.said}; place alone {row.place_iou:.4f}; peak in the box {row.hit:.1%}; guided "
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


def _write_page(path, job, found, table, maps, alone, left_out):
    row, structures = table.set_index("label").loc[ALL], job.images.about["structures"]
    paper = paper_column(job.config) if "paper" in table else None
    gain = page.interval_text(row.gain, row.gain_low, row.gain_high)
    cards = [
        ("Mean IoU", row.iou, f"95 % interval {page.as_text(row.low)}–{page.as_text(row.high)}, by patient"),
        ("Place alone", row.place_iou, f"gain of the maps {gain or '–'}"),
        ("Peak in the box", f"{row.hit:.0%}", "of the boxes"),
        ("Boxes", int(row.boxes), f"{row.patients:.0f} patients; {left_out} left out"),
    ]
    curve = plots.line_with_peak(found.curve.index, found.curve, "threshold", "mean IoU of boxes")
    how = [*NOTES, *[VIEWS] * (alone is not None)]
    how.append(NO_PAPER if paper is None else PAPER_NOTE.format("without" if paper else "with"))
    how += [WEIGHTED.format(" and ".join(structures))] if structures else []
    parts = [
        page.cards(cards),
        synthetic_note(job.run),
        page.note(f"{NO_GAIN}.", "warning") if row.gain <= 0 else None,
        page.section("How it is measured", *how, f"Here: {found.said}."),
        page.section("Classes", *_tables(table), page.figure(curve, "One threshold for all boxes, not nested")),
        page.section("Pictures", HEAT, *_galleries(job.images, found.boxes, maps, alone)),
    ]
    title, subtitle = "ChestX-ray14: where the maps point", f"run {job.run.folder.name}, preset {job.preset}"
    page.write_page(path, title, subtitle, [part for part in parts if part is not None])


def _tables(table):
    gain = ["gain", "gain_low", "gain_high"]
    for caption, columns in (
        ("Maps and place, means over boxes", ["iou", "low", "high", "hit", "place_iou", *gain]),
        ("Whole image's network alone, and both", ["whole_iou", *(f"fused_{name}" for name in [*gain, "gain_p"])]),
        ("Boxes of the true size, and the paper's", ["guided_iou", *({"paper"} & set(table))]),
    ):
        if columns[0] in table:
            yield page.table(table[["label", "boxes", *columns]], caption, dict.fromkeys(columns, ".3f"))


def _galleries(images, boxes, maps, alone):
    best = boxes.sort_values("iou", ascending=False, kind="stable").drop_duplicates("label").sort_values("label")
    for title, chosen in (("The box of median area of each class", pick_examples(boxes)), ("The best box", best)):
        items = []
        for _, box in chosen.iterrows():
            image = np.asarray(images.store.images[box["row"]])
            scale, found = image.shape[0] / BOX_SIDE, box[[f"found_{name}" for name in BOX]].to_numpy(float)
            truth = [(box[BOX].to_numpy(float) * scale, LABELS[box["label"]])]
            if alone is not None and chosen is not best:
                text = f"whole image alone: IoU {box['whole_iou']:.2f}"
                items.append(((image, alone.heat(box["map"])), truth, [], text))
            prediction = [(found * scale, f"IoU {box['iou']:.2f}")] if np.isfinite(found).all() else []
            caption = f"{box['image_id']}, probability {box['prob']:.2f}: IoU {box['iou']:.2f} at {box['threshold']:g}"
            caption += f", peak {'inside' if box['hit'] else 'outside'}"
            items.append(((image, maps.heat(box["map"])), truth, prediction, caption))
        yield gallery(items, title, overlay=heat_overlay)
