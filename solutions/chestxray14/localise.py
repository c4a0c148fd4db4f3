"""`localise`: class activation maps of a run against NIH's boxes (CXR-IRNet, table 3; SDFN, figure 5)."""

import logging

import numpy as np
import pandas as pd

from common.config import to_dict
from common.paths import read_parquet, write_csv
from common.post.boxes import BOX
from common.report import page, plots
from common.report.frame import synthetic_note
from common.report.gallery import gallery, heat_overlay
from common.step import Step
from solutions.chestxray14.config import BOX_SIDE, LABELS
from solutions.chestxray14.localise_scores import ALL, class_table, measure, paper_column
from solutions.chestxray14.maps import class_maps, usable_boxes

log = logging.getLogger(__name__)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NOTES = (
    "The map of a box's class, of networks that did not train on the image, is stretched over the image, scaled to "
    "[0, 1] and cut at a threshold; the prediction is the box around the largest connected region. iou compares that "
    "box with the true one, region_iou the region's pixels. Several boxes of a class in an image count each, against "
    "the same map. hit: the map's peak lies in the box.",
    "place is what no map is needed for: the mean of the class's true boxes of all other patients.",
    "guided_iou follows the code that CXR-IRNet's authors released, which measures something else than this page: the "
    "predicted box has the size of the true box and, of the places where the map peaks, the one where it fits best. It "
    "is no prediction, but the only column beside which the paper's figures can be laid.",
)
PAPER_IS = "paper: table 3 of CXR-IRNet, of its feature extractor {} attention; it leaves the threshold open."
NO_PAPER = (
    "Table 3 of CXR-IRNet is about its feature extractor on whole images, before the feature weighting: networks that "
    "this run does not have, so that its figures are not shown."
)
WEIGHTED = (
    "The features are weighted, so that the map of the whole image is counted from its lowest evidence and lies where "
    "the weighting's masks do ({}): what lies outside them cannot be found."
)
NO_GAIN = "The maps point nowhere better than the class's usual place"


def write_localisation(job, thresholds=THRESHOLDS, out=None):
    """Measure the class activation maps of a run against the true boxes of its images.

    Writes localisation.csv (a row per box, in pixels of the 1024 × 1024 image), localisation_table.csv (a row per
    class) and localisation.html to `out`, the run's folder by default. thresholds: as in `measure`.
    """
    out, config = out or job.run.folder, job.config
    boxes, left_out = usable_boxes(job.images, config.folds)
    boxes["prob"] = _probs(job.run, boxes)
    maps = class_maps(job, boxes)
    found = measure(boxes, maps, tuple(sorted(set(thresholds))), config.seed)
    table = class_table(found.boxes, paper_column(config), seed=config.seed)
    names = np.array(LABELS, object)[found.boxes["label"]]
    write_csv(out / "localisation.csv", found.boxes.assign(label=names).drop(columns=["row", "map"]))
    write_csv(out / "localisation_table.csv", table)
    _write_page(out / "localisation.html", job, found, table, maps, left_out)
    _log(found, table, left_out, out)


STEP = Step(
    "localise",
    write_localisation,
    needs=("predict",),
    reads=lambda job: to_dict(job.config),
    files=("localisation.csv", "localisation_table.csv", "localisation.html"),
)


def _probs(run, boxes):
    """The probability that the run gives to the class of each box."""
    tables = [read_parquet(run.path(f"{name}.parquet")) for name in ("oof", "test")]
    probs = pd.concat(tables).set_index("image_id").loc[boxes["image_id"], list(LABELS)].to_numpy()
    return probs[np.arange(len(boxes)), boxes["label"]]


# ---- what is shown -------------------------------------------------------------------------------------------------


def _log(found, table, left_out, out):
    whole = table.set_index("label").loc[ALL]
    how = "each chosen on the other half of the patients" if found.nested else "as asked for"
    log.info(
        f"mean IoU {whole.iou:.4f} [{whole.low:.4f}, {whole.high:.4f}] over {whole.boxes:.0f} boxes of "
        f"{whole.patients:.0f} patients, threshold {' and '.join(f'{t:g}' for t in found.chosen)}, {how}; place alone "
        f"{whole.place_iou:.4f}; peak in the box {whole.hit:.1%}; guided as the paper's code {whole.guided_iou:.4f}"
    )
    if whole.gain <= 0:
        log.info(f"{NO_GAIN}: over all boxes their IoU is lower by {-whole.gain:.4f}")
    if left_out:
        log.info(f"{left_out} boxes left out: their images were trained on, or cannot be read")
    log.info(f"{out / 'localisation_table.csv'}, localisation.csv and localisation.html")


def _write_page(path, job, found, table, maps, left_out):
    whole = table.set_index("label").loc[ALL]
    cards = [
        ("Mean IoU", whole.iou, f"95 % interval {page.as_text(whole.low)}–{page.as_text(whole.high)}, by patient"),
        (
            "Place alone",
            whole.place_iou,
            f"gain of the maps {page.as_text(whole.gain)} "
            f"[{page.as_text(whole.gain_low)}, {page.as_text(whole.gain_high)}]",
        ),
        ("Peak in the box", f"{whole.hit:.0%}", f"middle of the mean place: {whole.place_hit:.0%}"),
        ("Boxes", int(whole.boxes), f"{whole.patients:.0f} patients; {left_out} left out"),
    ]
    curve = plots.line_with_peak(found.curve["threshold"], found.curve["iou"], "threshold", "mean IoU of boxes")
    kept, paper = " and ".join(f"{t:g}" for t in found.chosen), paper_column(job.config)
    structures = job.images.about["structures"]
    weighted = [WEIGHTED.format(" and ".join(structures))] if structures else []
    how = f"Thresholds {kept}, of the halves of the patients." if found.nested else f"Threshold {kept}."
    parts = [
        page.cards(cards),
        synthetic_note(job.run),
        page.note(f"{NO_GAIN}.", "warning") if whole.gain <= 0 else None,
        page.section(
            "How it is measured",
            *NOTES,
            PAPER_IS.format("without" if paper else "with") if paper is not None else NO_PAPER,
            *weighted,
            how,
        ),
        page.section(
            "Classes",
            *_tables(table),
            page.figure(curve, "One threshold for all boxes, scored on the boxes that show it to be best"),
        ),
        page.section(
            "Pictures",
            "Of each class the best, a middling and the worst box by IoU. "
            "Violet to yellow is the map from its lowest to its highest, whatever the probability is.",
            *_galleries(job.images, found.boxes, maps),
        ),
    ]
    subtitle = f"run {job.run.folder.name}, preset {job.preset}"
    page.write_page(path, "ChestX-ray14: where the maps point", subtitle, [part for part in parts if part is not None])


def _tables(table):
    shares = [name for name in table if name.startswith("found_")]
    for caption, columns in (
        ("Maps and place, means over the boxes", ["iou", "low", "high", "place_iou", "gain", "gain_low", "gain_high"]),
        ("Regions and peaks, means over the boxes", ["region_iou", "hit", "place_hit"]),
        ("Share of the boxes with an IoU above 0.1 to 0.7", shares),
        ("Boxes of the true size, and the paper's", ["guided_iou", *({"paper"} & set(table))]),
    ):
        yield page.table(table[["label", "boxes", *columns]], caption, dict.fromkeys(columns, ".3f"))


def _galleries(images, boxes, maps):
    for label, mine in boxes.groupby("label"):
        order = mine.sort_values("iou", ascending=False, kind="stable")
        at = sorted({0, len(order) // 2, len(order) - 1})
        items = [_item(images, order.iloc[k], maps) for k in at]
        yield gallery(items, f"{LABELS[label]}, {len(order)} boxes", overlay=heat_overlay)


def _item(images, box, maps):
    image = np.asarray(images.store.images[box["row"]])
    scale = image.shape[0] / BOX_SIDE
    heat = maps.heat(box["map"])
    found = box[[f"found_{name}" for name in BOX]].to_numpy(float)
    name = LABELS[box["label"]]
    prediction = [(found * scale, f"IoU {box['iou']:.2f}")] if np.isfinite(found).all() else []
    peaked = "in" if box["hit"] else "outside"
    caption = (
        f"{box['image_id']}, probability {box['prob']:.2f}: IoU {box['iou']:.2f} at {box['threshold']:g}, peak {peaked}"
    )
    return (image, heat), [(box[BOX].to_numpy(float) * scale, name)], prediction, caption
