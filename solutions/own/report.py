"""The page's sections on own images, by task."""

from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import torch

from common.paths import read_array, read_csv, read_json, read_parquet
from common.report import class_plots, page, plots
from common.report.gallery import box_gallery, cached_arrays, gallery, heat_overlay, pick_extremes
from solutions.own import data

TITLE, MOST = "Own images", 6


def data_section(images):
    """Return the section on the data: images by class and fold."""
    classes, train = images.about["classes"], images.table[images.table["split"] == "train"]
    counts = pd.DataFrame({"class": classes, "images": train[classes].sum().astype(int).to_numpy()})
    counts["unknown"] = train[classes].isna().sum().to_numpy()
    folds = train.groupby("fold").agg(images=("row", "size"), patients=("patient_id", "nunique")).reset_index()
    text = (
        f"{len(train):,} labelled images, {len(images.table) - len(train):,} to predict; task {images.about['task']}."
    )
    return page.section("Data", text, page.grid(page.table(counts), page.table(folds)))


def _headline(job, score):
    size = data.size_text(score)
    cards = [("Mean AUROC, out of fold", score["auroc"]["estimate"], f"{page.range_text(score['auroc'])}, {size}")]
    if "accuracy" in score:
        cards.append(("Accuracy", score["accuracy"]["estimate"], page.range_text(score["accuracy"])))
    cards += [(text, score[name], "mean over classes") for name, text in (("average_precision", "AP"), ("f1", "F1"))]
    return [page.cards(cards), page.note(f"Thresholds are chosen by Youden's index, nested by {score['nested_by']}.")]


def _sections(job):
    parts, images = [data_section(job.images)], job.images
    if job.is_current("tune"):
        classes, table = images.about["classes"], read_csv(job.run.path("classes.csv"))
        oof = read_parquet(job.run.path("oof.parquet"))
        truth, probs = images.at(oof["row"])[classes].to_numpy(float), oof[classes].to_numpy()
        rows = table[["label", "auroc", "low", "high"]].itertuples(index=False)
        parts.append(
            page.section(
                "Classes",
                page.figure(plots.score_with_interval(rows, "AUROC", 0.5), "Out of fold, with intervals by patient"),
                page.figure(class_plots.roc_panels(truth, {"run": probs}, classes), "ROC curves with their areas"),
                page.figure(class_plots.reliability_panels(truth, probs, classes), "Reliability"),
                page.table(table),
            )
        )
        if job.config.task == "multiclass":
            parts.append(page.section("Confusion", page.table(read_csv(job.run.path("confusion.csv")))))
        parts.append(page.section("Pictures", *_pictures(job, oof, truth, probs)))
    return parts


def _pictures(job, oof, truth, probs):
    """Return each class's most confident right and wrong image, under the class activation map of its own fold."""
    images, classes, chosen = job.images, job.images.about["classes"], []
    for k in range(min(MOST, len(classes))):
        order = np.argsort(-probs[:, k])
        for name, hits in (("right", truth[order, k] == 1), ("wrong", truth[order, k] == 0)):
            chosen += [(name, order[np.argmax(hits)], k)] if hits.any() else []

    def compute():
        trained, found = {one.fold: one.load(job.run).eval() for one in job.recipe.networks(job)}, []
        for _, at, k in chosen:
            one = next(each for each in job.recipe.networks(job) if each.fold == oof["fold"][at])
            image, _ = one.dataset(job, oof["row"].to_numpy()[[at]], False, False)[0]
            with torch.inference_mode():
                cam = trained[one.fold].cam(image[None])[0, k].numpy()
            found.append((cam - cam.min()) / max(float(np.ptp(cam)), 1e-9))
        return {"heats": np.stack(found)}

    if not chosen:
        return ["No picture: no class has known labels."]
    key = f"{job.run.step('predict')['key']} {[each[1:] for each in chosen]}"
    heats, items = cached_arrays(job.run.path("overlays.npz"), key, compute)["heats"], {"right": [], "wrong": []}
    for (name, at, k), heat in zip(chosen, heats, strict=True):
        image = data.dataset(images, oof["row"].to_numpy()[[at]], job.config.store_size)[0][0][0].numpy()
        items[name].append(((image, heat), [], [], f"{classes[k]} {probs[at, k]:.2f}: {oof['image_id'][at]}"))
    text = "Violet to yellow: the class activation map of the network that did not train on the image."
    return [text, *(gallery(each, f"Most confident, {name}", overlay=heat_overlay) for name, each in items.items())]


def _submission(job, record):
    table = read_csv(job.run.path("submission.csv"))
    return [page.figure(plots.histogram({name: table[name] for name in table.columns[1:5]}, "probability"), "Answers")]


of_classification = SimpleNamespace(TITLE=TITLE, headline=_headline, sections=_sections, submission=_submission)


# ---- segmentation --------------------------------------------------------------------------------------------------


def _mask_headline(job, score):
    size = data.size_text(score)
    names = {"dice": "Mean Dice, out of fold", "iou": "Mean IoU"}
    cards = [(text, score[name]["estimate"], f"{page.range_text(score[name])}, {size}") for name, text in names.items()]
    rule = f"Pixel threshold and smallest region of each structure are nested by {score['nested_by']}."
    return [page.cards(cards), page.note(f"{rule} An empty mask that is predicted as empty counts as 1.")]


def _mask_sections(job):
    parts = [data_section(job.images)]
    if job.is_current("tune"):
        table = read_csv(job.run.path("structures.csv"))
        rows = table[["structure", "dice", "dice_low", "dice_high"]].itertuples(index=False)
        drawn = page.figure(plots.score_with_interval(rows, "Dice"), "Out of fold, with intervals by patient")
        parts += [page.section("Structures", drawn, page.table(table)), page.section("Pictures", *_outlines(job))]
    return parts


def _outlines(job):
    """Return galleries of the best, median and worst images, with the outlines of their worst structure."""
    oof, classes = read_parquet(job.run.path("oof_dice.parquet")), job.images.about["classes"]
    maps, masks = read_array(job.run.path("oof_probs.npy")), read_array(job.images.arrays["masks"])
    rules, side = read_json(job.run.path("tuned.json"))["rules"], job.config.store_size
    for title, rows in pick_extremes(oof.sort_values("dice", kind="stable")).items():
        items = []
        for at, row in rows.iterrows():
            probs = maps[at].reshape(-1, *maps.shape[-2:])
            k = int(np.argmax([mask[0, 0] != 2 and mask.any() for mask in masks[row["row"]]]))
            said = cv2.resize(probs[k], (side, side)) >= 255 * rules[classes[k]]["pixel"]
            image = job.images.store.images[row["row"]]
            items.append(
                (image, masks[row["row"], k], said, f"{row['image_id']}: {classes[k]}, Dice {row['dice']:.3f}")
            )
        yield gallery(items, title)


def _mask_submission(job, record):
    return ["submission.coco.json holds the same masks for pycocotools and labelling tools."]


of_segmentation = SimpleNamespace(
    TITLE=TITLE, headline=_mask_headline, sections=_mask_sections, submission=_mask_submission
)


# ---- detection -----------------------------------------------------------------------------------------------------


def _box_headline(job, score):
    size = f"{data.size_text(score)}, {score['boxes']:,} boxes"
    cards = [("mAP at IoU 0.5, out of fold", score["map"]["estimate"], f"{page.range_text(score['map'])}, {size}")]
    cards += [("mAP at IoU 0.4", score["map_40"]["estimate"], page.range_text(score["map_40"]))]
    cards += [("mAP of COCO", score["map_coco"], "IoU 0.50 to 0.95"), ("F1", score["f1"], "mean over classes")]
    return [page.cards(cards), page.note(f"Score thresholds of the F1 are nested by {score['nested_by']}.")]


def _box_sections(job):
    parts = [data_section(job.images)]
    if job.is_current("tune"):
        table, oof = read_csv(job.run.path("classes.csv")), read_parquet(job.run.path("oof.parquet"))
        rows = table[["class", "map", "low", "high"]].itertuples(index=False)
        drawn = page.figure(plots.score_with_interval(rows, "AP at IoU 0.5"), "Out of fold, with intervals by patient")
        boxed = job.images.table[job.images.table["row"].isin(job.images.tables["boxes.parquet"]["row"])]
        boxed = boxed[boxed["fold"].isin(job.config.folds)].head(8)
        pictures = box_gallery(job.images, oof, boxed, "Out of fold, at most five boxes", job.images.about["classes"])
        parts += [page.section("Classes", drawn, page.table(table)), page.section("Pictures", pictures)]
    return parts


def _box_submission(job, record):
    return ["submission.coco.json holds the boxes that reach their thresholds, for labelling tools."]


of_detection = SimpleNamespace(TITLE=TITLE, headline=_box_headline, sections=_box_sections, submission=_box_submission)
