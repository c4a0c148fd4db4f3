"""Sections of the report on the user's own images, by task."""

import cv2
import numpy as np
import pandas as pd
import torch

from common.infer.cam import normalise
from common.paths import read_array, read_csv, read_json, read_parquet
from common.report import class_plots, page, plots, results
from common.report.gallery import box_gallery, cached_arrays, gallery, heat_overlay, pick_extremes
from solutions.own import data
from solutions.own.classify import truth_of

TITLE = "Own images"
MOST = 6  # classes with pictures
CARDS = {"auroc": "Mean AUROC, out of fold", "dice": "Mean Dice, out of fold"}
CARDS |= {"map": "mAP at IoU 0.5, out of fold", "accuracy": "Accuracy", "average_precision": "AP", "iou": "Mean IoU"}
CARDS |= {"map_40": "mAP at IoU 0.4", "map_coco": "mAP of COCO", "f1": "F1"}
EMPTY = "An empty mask that is predicted as empty counts as 1"
# how decisions are made; the table of scores; its name, estimate, low and high columns; the metric plotted
CLASSES = ("Thresholds are chosen by Youden's index", "classes.csv", ["label", "auroc", "low", "high"], "AUROC")
MASKS = (f"{EMPTY}; pixel threshold and smallest region of each structure are", "structures.csv")
MASKS += (["structure", "dice", "dice_low", "dice_high"], "Dice")
BOXES = ("Score thresholds are chosen by F1", "classes.csv", ["class", "map", "low", "high"], "AP at IoU 0.5")
PLOTTED = {"multilabel": CLASSES, "multiclass": CLASSES, "segmentation": MASKS, "detection": BOXES}
ANSWERS = {"segmentation": "the same masks", "detection": "the boxes that reach their thresholds,"}


def headline(job, score):
    """Return the scores as cards, and a note on how they were measured."""
    shown = []
    for name, text in CARDS.items():
        value = score.get(name)
        if isinstance(value, dict):
            shown.append((text, value["estimate"], f"{page.range_text(value)}, {data.size_text(score)}"))
        elif name in score:
            shown.append((text, value, "mean over classes"))
    return [page.cards(shown), page.note(f"{PLOTTED[job.config.task][0]}, nested by {score['nested_by']}.")]


def sections(job):
    """Return the data section and, if they are up to date, the sections of the results."""
    task, images, classes = job.config.task, job.images, job.images.about["classes"]
    train = images.table[images.table["split"] == "train"]
    counts = pd.DataFrame({"class": classes, "images": train[classes].sum().astype(int).to_numpy()})
    counts["unknown"] = train[classes].isna().sum().to_numpy()
    folds = results.fold_table(train, patients=("patient_id", "nunique"))
    size = f"{len(train):,} labelled images, {len(images.table) - len(train):,} to predict"
    found = [page.section("Data", f"{size}; task {task}.", page.grid(page.table(counts), page.table(folds)))]
    if job.is_current("tune"):
        _, name, columns, measure = PLOTTED[task]
        table = read_csv(job.run.path(name))
        drawn = plots.score_with_interval(table[columns].itertuples(index=False), measure)
        figure = page.figure(drawn, f"Out of fold, with intervals by patient; {plots.FEW}")
        found.append(page.section("Scores", figure, page.table(table)))
        found += {"segmentation": _outlines, "detection": _boxes}.get(task, _classification)(job)
    return found


def _classification(job):
    oof, classes = read_parquet(job.run.path("oof.parquet")), job.images.about["classes"]
    truth, probs = truth_of(job.images, oof["row"]).astype(float), oof[classes].to_numpy()
    drawn = {"ROC curves": class_plots.roc_panels(truth, {"run": probs}, classes)}
    drawn["Reliability"] = class_plots.reliability_panels(truth, probs, classes)
    yield page.section("Curves", *(page.figure(each, caption) for caption, each in drawn.items()))
    if job.config.task == "multiclass":
        yield page.section("Confusion", page.table(read_csv(job.run.path("confusion.csv"))))
    yield page.section("Pictures", *_maps(job, oof, truth, probs))


def _maps(job, oof, truth, probs):
    """Return each class's most confident right and wrong image with the class activation map of its held-out fold."""
    images, classes = job.images, job.images.about["classes"]
    chosen = results.most_confident(truth, probs[:, :MOST])
    rows, folds = oof["row"].to_numpy(), oof["fold"].to_numpy()

    def compute():
        networks, found = {one.fold: (one, one.load(job.run).eval()) for one in job.recipe.networks(job)}, []
        for _, at, k in chosen:
            network, model = networks[folds[at]]
            with torch.inference_mode():
                found.append(model.cam(network.dataset(job, rows[[at]], False, False)[0][0][None])[0, k].numpy())
        return {"heats": np.stack([normalise(cam) for cam in found])}

    if not chosen or job.is_blend:
        return [f"No picture: {'a blend has no network' if job.is_blend else 'no class has known labels'}."]
    key = f"{job.run.step('predict')['key']} {[each[1:] for each in chosen]}"
    heats, items = cached_arrays(job.run.path("overlays.npz"), key, compute)["heats"], {"right": [], "wrong": []}
    for (name, at, k), heat in zip(chosen, heats, strict=True):
        image = data.dataset(images, rows[[at]], job.config.store_size)[0][0][0].numpy()
        items[name].append(((image, heat), [], [], f"{classes[k]} {probs[at, k]:.2f}: {oof['image_id'][at]}"))
    text = "Violet to yellow: the class activation map of the network that did not train on the image."
    return [text, *(gallery(each, f"Most confident, {name}", overlay=heat_overlay) for name, each in items.items())]


def _outlines(job):
    """Return galleries of the best, median and worst images, with the outline of the first structure in each."""
    oof, classes, found = read_parquet(job.run.path("oof_dice.parquet")), job.images.about["classes"], []
    maps, masks = read_array(job.run.maps("oof")), read_array(job.images.arrays["masks"])
    rules, side = read_json(job.run.path("tuned.json"))["rules"], job.config.store_size
    for title, rows in pick_extremes(oof.dropna(subset="dice").sort_values("dice", kind="stable")).items():
        items = []
        for at, row in rows.iterrows():
            k = int(np.argmax([mask[0, 0] != 2 and mask.any() for mask in masks[row["row"]]]))
            probs = maps[at].reshape(-1, *maps.shape[-2:])[k]
            said = cv2.resize(probs, (side, side)) >= 255 * rules[classes[k]]["pixel"]
            caption = f"{row['image_id']}: {classes[k]}, mean Dice {row['dice']:.3f}"
            items.append((job.images.store.images[row["row"]], masks[row["row"], k], said, caption))
        found.append(gallery(items, title))
    return [page.section("Pictures", *found)]


def _boxes(job):
    table, oof = job.images.table, read_parquet(job.run.path("oof.parquet"))
    boxed = table["row"].isin(job.images.tables["boxes.parquet"]["row"]) & table["fold"].isin(job.config.folds)
    title, names = "Out of fold, at most five boxes", job.images.about["classes"]
    return [page.section("Pictures", box_gallery(job.images, oof, table[boxed].head(8), title, names))]


def submission(job, record):
    """Return which file labelling tools can import, or a histogram of the predicted probabilities."""
    if job.config.task in ANSWERS:
        return [f"submission.coco.json holds {ANSWERS[job.config.task]} for labelling tools."]
    return [results.submitted_probabilities(job)]
