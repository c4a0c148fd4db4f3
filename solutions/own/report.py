"""The page's sections on own images, by task."""

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import torch

from common.metrics.detection import VOC2010, bootstrap_map, evaluate
from common.metrics.statistics import bootstrap
from common.paths import read_array, read_csv, read_json, read_parquet
from common.report import class_plots, page, plots, results
from common.report.gallery import box_gallery, cached_arrays, gallery, heat_overlay, pick_extremes
from solutions.own import data
from solutions.own.scores import mean_auroc

MOST = 6  # classes with pictures


def make_report(cards, note, measure, columns, sections, submission, by_fold):
    """Return the report of a task, see `common.report.frame`.

    cards: texts by key of score.json; note: on how thresholds were chosen. measure, columns: what is plotted with its
    interval, and the columns of the table `columns[0]` that hold name, estimate, low and high. sections(job): further
    fragments by title. submission: text about submission.csv, or a function of the job. by_fold(job) -> images' folds
    and groups, and a score of some of them, as in `common.report.results.scores_by_fold`.
    """

    def headline(job, score):
        shown = []
        for name, text in cards.items():
            value = score.get(name)
            if isinstance(value, dict):
                shown.append((text, value["estimate"], f"{page.range_text(value)}, {data.size_text(score)}"))
            elif name in score:
                shown.append((text, value, "mean over classes"))
        return [page.cards(shown), page.note(f"{note}, nested by {score['nested_by']}.")]

    def parts(job):
        found = [_data(job.images)]
        if job.is_current("tune"):
            table = read_csv(job.run.path(columns[0]))
            drawn = plots.score_with_interval(table[list(columns[1:])].itertuples(index=False), measure)
            figure = page.figure(drawn, "Out of fold, with intervals by patient")
            found.append(page.section("Scores", figure, page.table(table)))
            found += [page.section(title, *fragments) for title, fragments in sections(job).items()]
        return found

    text = submission if callable(submission) else lambda job: [submission]
    return SimpleNamespace(
        TITLE="Own images",
        headline=headline,
        sections=parts,
        submission=lambda job, record: text(job),
        fold_scores=lambda job: results.scores_by_fold(*by_fold(job)),
        hints=lambda job, score, trainings: [],
    )


def _data(images):
    classes, train = images.about["classes"], images.table[images.table["split"] == "train"]
    counts = pd.DataFrame({"class": classes, "images": train[classes].sum().astype(int).to_numpy()})
    counts["unknown"] = train[classes].isna().sum().to_numpy()
    folds = train.groupby("fold").agg(images=("row", "size"), patients=("patient_id", "nunique")).reset_index()
    size = f"{len(train):,} labelled images, {len(images.table) - len(train):,} to predict"
    tables = page.grid(page.table(counts), page.table(folds))
    return page.section("Data", f"{size}; task {images.about['task']}.", tables)


def _classification(job):
    images, classes, oof = job.images, job.images.about["classes"], read_parquet(job.run.path("oof.parquet"))
    truth, probs = images.at(oof["row"])[classes].to_numpy(float), oof[classes].to_numpy()
    drawn = {"ROC curves": class_plots.roc_panels(truth, {"run": probs}, classes)}
    drawn["Reliability"] = class_plots.reliability_panels(truth, probs, classes)
    found = {"Curves": [page.figure(each, caption) for caption, each in drawn.items()]}
    if job.config.task == "multiclass":
        found["Confusion"] = [page.table(read_csv(job.run.path("confusion.csv")))]
    return found | {"Pictures": _maps(job, oof, truth, probs)}


def _maps(job, oof, truth, probs):
    """Return each class's most confident right and wrong image, under the class activation map of its own fold."""
    images, classes, chosen = job.images, job.images.about["classes"], []
    for k in range(min(MOST, len(classes))):
        order = np.argsort(-probs[:, k])
        for name, hits in (("right", truth[order, k] == 1), ("wrong", truth[order, k] == 0)):
            chosen += [(name, order[np.argmax(hits)], k)] if hits.any() else []
    rows, folds = oof["row"].to_numpy(), oof["fold"].to_numpy()

    def compute():
        networks, found = {one.fold: (one, one.load(job.run).eval()) for one in job.recipe.networks(job)}, []
        for _, at, k in chosen:
            network, model = networks[folds[at]]
            with torch.inference_mode():
                cam = model.cam(network.dataset(job, rows[[at]], False, False)[0][0][None])[0, k].numpy()
            found.append((cam - cam.min()) / max(float(np.ptp(cam)), 1e-9))
        return {"heats": np.stack(found)}

    if not chosen:
        return ["No picture: no class has known labels."]
    key = f"{job.run.step('predict')['key']} {[each[1:] for each in chosen]}"
    heats, items = cached_arrays(job.run.path("overlays.npz"), key, compute)["heats"], {"right": [], "wrong": []}
    for (name, at, k), heat in zip(chosen, heats, strict=True):
        image = data.dataset(images, rows[[at]], job.config.store_size)[0][0][0].numpy()
        items[name].append(((image, heat), [], [], f"{classes[k]} {probs[at, k]:.2f}: {oof['image_id'][at]}"))
    text = "Violet to yellow: the class activation map of the network that did not train on the image."
    return [text, *(gallery(each, f"Most confident, {name}", overlay=heat_overlay) for name, each in items.items())]


def _probabilities(job):
    table = read_csv(job.run.path("submission.csv"))
    groups = {name: table[name] for name in table.columns[1:5]}
    return [page.figure(plots.histogram(groups, "probability"), "Probabilities of the first classes")]


def _outlines(job):
    """Return galleries of the best, median and worst images, with the outline of their first structure."""
    oof, classes, found = read_parquet(job.run.path("oof_dice.parquet")), job.images.about["classes"], []
    maps, masks = read_array(job.run.path("oof_probs.npy")), read_array(job.images.arrays["masks"])
    rules, side = read_json(job.run.path("tuned.json"))["rules"], job.config.store_size
    for title, rows in pick_extremes(oof.sort_values("dice", kind="stable")).items():
        items = []
        for at, row in rows.iterrows():
            k = int(np.argmax([mask[0, 0] != 2 and mask.any() for mask in masks[row["row"]]]))
            probs = maps[at].reshape(-1, *maps.shape[-2:])[k]
            said = cv2.resize(probs, (side, side)) >= 255 * rules[classes[k]]["pixel"]
            caption = f"{row['image_id']}: {classes[k]}, mean Dice {row['dice']:.3f}"
            items.append((job.images.store.images[row["row"]], masks[row["row"], k], said, caption))
        found.append(gallery(items, title))
    return {"Pictures": found}


def _boxes(job):
    table, oof = job.images.table, read_parquet(job.run.path("oof.parquet"))
    boxed = table["row"].isin(job.images.tables["boxes.parquet"]["row"]) & table["fold"].isin(job.config.folds)
    title, names = "Out of fold, at most five boxes", job.images.about["classes"]
    return {"Pictures": [box_gallery(job.images, oof, table[boxed].head(8), title, names)]}


def _auroc_by_fold(job):
    oof, classes = read_parquet(job.run.path("oof.parquet")), job.images.about["classes"]
    truth, probs = job.images.at(oof["row"])[classes].to_numpy(float), oof[classes].to_numpy()
    score = lambda chosen, groups: mean_auroc(truth[chosen], probs[chosen], groups)  # noqa: E731
    return oof["fold"], job.images.groups(oof["row"]), score


def _dice_by_fold(job):
    oof = read_parquet(job.run.path("oof_dice.parquet"))
    dice = oof["dice"].to_numpy()
    return oof["fold"], job.images.groups(oof["row"]), lambda chosen, groups: bootstrap(dice[chosen], groups)


def _map_by_fold(job):
    found, truth = read_parquet(job.run.path("oof.parquet")), job.images.tables["boxes.parquet"]
    table = job.images.table[job.images.table["fold"].isin(job.config.folds)]
    rule = replace(VOC2010, n_classes=len(job.images.about["classes"]), no_finding=None, iou_threshold=0.5)

    def score(chosen, groups):
        ids = table["image_id"][chosen]
        parts = (part[part["image_id"].isin(ids)] for part in (found, truth))
        return bootstrap_map(evaluate(*parts, ids, rule), groups)[1]

    return table["fold"].to_numpy(), job.images.groups(table["row"]), score


INTERVAL = ("low", "high")
CLASSIFICATION = make_report(
    {"auroc": "Mean AUROC, out of fold", "accuracy": "Accuracy", "average_precision": "AP", "f1": "F1"},
    "Thresholds are chosen by Youden's index",
    "AUROC",
    ("classes.csv", "label", "auroc", *INTERVAL),
    _classification,
    _probabilities,
    _auroc_by_fold,
)
SEGMENTATION = make_report(
    {"dice": "Mean Dice, out of fold", "iou": "Mean IoU"},
    "An empty mask that is predicted as empty counts as 1; pixel threshold and smallest region of each structure are",
    "Dice",
    ("structures.csv", "structure", "dice", "dice_low", "dice_high"),
    _outlines,
    "submission.coco.json holds the same masks for labelling tools.",
    _dice_by_fold,
)
DETECTION = make_report(
    {"map": "mAP at IoU 0.5, out of fold", "map_40": "mAP at IoU 0.4", "map_coco": "mAP of COCO", "f1": "F1"},
    "Score thresholds are chosen by F1",
    "AP at IoU 0.5",
    ("classes.csv", "class", "map", *INTERVAL),
    _boxes,
    "submission.coco.json holds the boxes that reach their thresholds, for labelling tools.",
    _map_by_fold,
)
