"""Detection on the user's own images: one detector per fold, and one score threshold per class."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from common import detection
from common.data.box_augment import pipeline
from common.data.coco import write_boxes
from common.errors import InputError
from common.listing import leave_out_unreadable
from common.metrics.detection import COCO, VOC2010, bootstrap_map, coco_scores, evaluate
from common.metrics.statistics import as_interval, format_interval
from common.post.boxes import BOX
from common.post.fusion import FusionRule, fuse_members
from common.recipe import Choice
from common.submit.table import read_table
from common.submit.validate import Summary, id_problems, refuse_rows
from solutions.lung_segmentation import same_proportions
from solutions.own import data

STAGE = "detector"
OUTSIDE = 1.0  # pixels by which a box may exceed its image
COLUMNS = ["image_id", "class", *BOX, "score", "keep"]


def refine(job, listing, store):
    """Return the listing with the table boxes.parquet: image_id, row, class_id and corners in pixels of the original.

    Boxes of a COCO file are scaled from the image's size in it to that of the image file. Raises InputError naming the
    row of a box without area or outside its image, and for sizes of other proportions and fractions given as pixels.
    """
    listing, unit = leave_out_unreadable(listing), job.config.boxes
    marks, table = listing.tables["marks"], listing.table
    rows = table.set_index("image_id").loc[marks["image_id"], ["row", "width", "height"]]
    given, sizes = marks[BOX].to_numpy(float), rows[["width", "height"] * 2].to_numpy(float)
    if unit == "pixels" and len(given) and given.max() <= 1:
        raise InputError(f"{listing.inputs[0]}: all boxes lie in [0, 1]; --boxes fraction takes shares of the sides")
    declared = marks.reindex(columns=["width", "height"] * 2).to_numpy(float)  # by COCO; the files may be resized
    declared = np.where(np.isnan(declared), sizes, declared)
    for at in np.flatnonzero(~same_proportions(declared.T[1::-1], sizes.T[1::-1]))[:1]:
        sides = "{:g} × {:g} pixels, but its file has {:g} × {:g}".format(*declared[at, :2], *sizes[at, :2])
        raise InputError(f"{marks['where'].iloc[at]}: a box in an image of {sides}")
    corners = given * (sizes if unit == "fraction" else sizes / declared)
    outside = ((corners < -OUTSIDE) | (corners > sizes + OUTSIDE)).any(axis=1)
    for at in np.flatnonzero(outside | (corners[:, 2:] <= corners[:, :2]).any(axis=1))[:1]:
        place = "lies outside its image of {:g} × {:g} pixels".format(*sizes[at])
        fault = f"{given[at].tolist()} {place if outside[at] else 'has no area'} (--boxes {unit})"
        raise InputError(f"{marks['where'].iloc[at]}: the box {fault}")
    boxes = marks[["image_id", "class_id"]].assign(row=rows["row"].to_numpy())
    boxes[BOX] = np.clip(corners, 0, sizes)
    boxes = boxes.sort_values(["row", "class_id", *BOX])
    classes = listing.about["classes"]
    strata = table.loc[table["split"] == "train", classes].to_numpy().astype(int)
    labels = [classes, boxes[["row", "class_id", *BOX]].to_numpy().tolist()]
    listing = replace(listing, tables={"boxes.parquet": boxes.reset_index(drop=True)}, strata=strata, labels=labels)
    return data.add_view(job, listing, store)


def network(job, fold):
    """Return the detector of one fold; epochs are compared by the mean AP at IoU 0.5."""
    config, n_classes = job.config.detector, data.count_classes(job)

    def figures(images, found, rows):
        truth = detection.true_boxes(images, rows)
        return {"map": evaluate(found, truth, images.ids(rows), rule(n_classes)).mean_ap if len(truth) else 0.0}

    augmentation = partial(pipeline, config.augmentation, config.size)
    samples = lambda job, rows, size: data.dataset(job.images, rows, size)  # noqa: E731
    return detection.detector_network(fold, STAGE, config, n_classes, augmentation, figures, samples=samples)


def rule(n_classes, iou=0.5, base=VOC2010):
    """Return the rule that matches boxes of the user's classes at an IoU threshold."""
    return replace(base, n_classes=n_classes, no_finding=None, iou_threshold=iou)


def predict_rows(job, folds, rows, path, title):
    """Return the boxes of the folds' detectors on store rows."""
    return {"": detection.predict_members(job, [network(job, fold) for fold in folds], rows, title)}


def choose(job, oof):
    """Choose each class's score threshold by F1 at IoU 0.5; F1 is nested over folds, or halves of a single fold."""
    config, classes, found = job.config, job.images.about["classes"], oof.table
    rows, n, seed = np.concatenate([job.images.rows(folds=[fold]) for fold in config.folds]), len(classes), config.seed
    ids, groups, truth = job.images.ids(rows), job.images.groups(rows), detection.true_boxes(job.images, rows)
    result, at_04 = (evaluate(found, truth, ids, rule(n, iou)) for iou in (0.5, 0.4))
    of_class, mean = bootstrap_map(result, groups, seed=seed)
    coco_figures, by_class = coco_scores(found, truth, ids, rule(n, 0.5, COCO))
    parts, counts = data.parts_of(job, rows), np.zeros((n, 3), int)  # found, predicted, true
    for part in np.unique(parts):
        there = ids[parts != part]
        others = [table[table["image_id"].isin(there)] for table in (found, truth)]
        if len(others[1]):
            best = evaluate(*others, there, rule(n)).classes["score_at_best_f1"]
            counts += count_boxes(result, parts == part, best.to_numpy())
    f1 = np.divide(2 * counts[:, 0], counts[:, 1:].sum(axis=1), out=np.full(n, np.nan), where=counts[:, 2] > 0)
    table = result.classes[["n_truth", "ap"]].set_axis(["boxes", "map"], axis=1).reset_index(drop=True)
    table.insert(0, "class", classes)
    table[["low", "high"]] = [[each.low, each.high] for each in of_class]
    table = table.assign(map_40=at_04.classes["ap"].to_numpy(), map_coco=by_class["ap"].to_numpy(), f1=f1)
    table["threshold"] = result.classes["score_at_best_f1"].fillna(0.5).to_numpy()
    figures = {"map": as_interval(mean), "map_40": as_interval(bootstrap_map(at_04, groups, seed=seed)[1])}
    figures |= {"map_coco": coco_figures["ap"], "f1": float(np.nanmean(f1)), "boxes": len(truth)}
    thresholds = dict(zip(classes, table["threshold"].tolist(), strict=True))
    return Choice({"thresholds": thresholds}, result.mean_ap, figures | data.counts(job, rows), {"classes.csv": table})


def count_boxes(result, chosen, thresholds):
    """Return the numbers of true positives, predicted boxes and true boxes in the chosen images, int (C, 3)."""
    class_of = np.repeat(np.arange(len(result.starts) - 1), np.diff(result.starts))
    said, n = chosen[result.image] & (result.score >= np.nan_to_num(thresholds, nan=np.inf)[class_of]), len(thresholds)
    true = np.bincount(result.truth_class[chosen[result.truth_image]], minlength=n)
    found = np.bincount(class_of[said & result.found], minlength=n)
    return np.stack([found, np.bincount(class_of[said], minlength=n), true], 1)


def describe(figures):
    """Return the lines that report the score."""
    scores = f"mAP at IoU 0.5 {format_interval(figures['map'])}, at 0.4 {format_interval(figures['map_40'])}"
    more = f"COCO's {figures['map_coco']:.4f}; F1 {figures['f1']:.4f}, thresholds nested by {figures['nested_by']}"
    return [f"out of fold, {data.size_text(figures)}, {figures['boxes']:,} boxes: {scores}, {more}"]


def answer(job, test, chosen, neutral):
    """Return one row of COLUMNS per box; keep: 1 if it reaches its class's threshold. No box: a row of blanks.

    Boxes from the detectors of several folds are fused.
    """
    classes, images = job.images.about["classes"], job.images.at(job.images.rows("test"))
    how = FusionRule((1.0,), 0.5, skip=job.config.detector.min_score)
    boxes = fuse_members(test.table, images, [STAGE], how, no_finding=None)
    boxes = boxes[boxes["image_id"].isin(images.loc[images["ok"], "image_id"])]
    names = np.array(classes, object)[boxes["class_id"]]
    keep = (boxes["score"] >= [chosen["thresholds"][name] for name in names]).map({True: "1", False: "0"})
    boxes = boxes.assign(**{"class": names}, keep=keep).sort_values("score", ascending=False, kind="stable")
    rows = images[["image_id"]].merge(boxes[COLUMNS], on="image_id", how="left")
    rows[[*BOX, "score"]] = rows[[*BOX, "score"]].map("{:.6g}".format, na_action="ignore")
    return rows.fillna("")


def check(path, job):
    """Return the Summary of a submission; write the boxes to keep as COCO JSON beside it."""
    classes, images = job.images.about["classes"], job.images.at(job.images.rows("test"))
    table = read_table(path, COLUMNS)
    refuse_rows(path, id_problems(table["image_id"].unique(), images["image_id"]))
    boxed, kept = table[table["score"] != ""], table[table["keep"] == "1"]
    kept = kept.assign(class_id=pd.Index(classes).get_indexer(kept["class"]))
    write_boxes(path.with_suffix(".coco.json"), kept, images, classes)
    return Summary(str(path), len(images), boxed["image_id"].nunique(), len(boxed), "boxes")


FURTHER = {"pool": detection.pool_tables, "check": check, "answered": ("submission.coco.json",)}
