"""SIIM's sections of the report: scores, decision rule, presence gate, ablation and pictures."""

from dataclasses import replace

import cv2
import numpy as np
import pandas as pd

from common.kaggle.session import display_gallery, read_images
from common.paths import read_array, read_csv, read_json, read_parquet
from common.post.rle import decode, paint, parse
from common.report import page, plots, results
from common.report.frame import step_section
from common.report.gallery import gallery, outline_overlay, pick_extremes, to_jpeg
from common.submit.table import read_table
from common.tuning import Rule
from solutions.siim_pneumothorax.config import KAGGLE, PUBLISHED, SIZE
from solutions.siim_pneumothorax.data import mask

TITLE = "SIIM pneumothorax"
EXPERIMENTS = ("enrichment-", "positives-", "larger-", "classifier-")
COLUMNS = (
    "Mean Dice with 95 % intervals by patient; change: paired difference from the paper's choice, with its p-value; "
    "mcc: of the gate at 0.5; paper: its score on the private leaderboard"
)


def hints(job, score, trainings):
    """Return a hint about a weak gate, see common.report.hints."""
    found = (score.get("presence") or {}).get("auroc")
    return results.gate_hints(found, "--presence none --decision.gate 0")


def headline(job, score):
    """Return the scores as cards, and a note on how they were measured."""
    dice, positive, presence = score["dice"], score["dice_positive"], score.get("presence")
    cards = [
        ("Dice, out of fold", dice["estimate"], page.range_text(dice)),
        ("Dice of empty masks", score["dice_all_empty"], "score of predicting nothing"),
    ]
    if positive:
        cards.append(("Dice of positive images", positive["estimate"], page.range_text(positive)))
    if presence:
        cards.append(("AUROC of presence", presence["auroc"], f"MCC {page.as_text(presence['mcc'])} at 0.5"))
    return [page.cards(cards), page.nested_note(score["nested_by"], "Dice", score["dice_not_nested"])]


def sections(job):
    """Return the data section and the sections of those results that are up to date."""
    parts = [_data(job.images)]
    if job.is_current("tune"):
        of = job, read_parquet(job.run.path("oof_dice.parquet")), read_json(job.run.path("tuned.json"))
        parts += [_decision(*of), _calibration(*of), *_pictures(*of)]
    return [*parts, _published(job.run), step_section(job, "ablate", "Ablation", _ablation)]


def _data(images):
    train = images.table[images.table["split"] == "train"]
    areas = train["area"].where(train["area"] > 0)
    columns = {"positive": ("present", "sum"), "patients": ("patient_id", "nunique"), "median_area": ("area", "median")}
    folds = results.fold_table(train.assign(area=areas), **columns)
    shares = {"masks": 100 * areas / SIZE**2}
    return page.section(
        "Data",
        f"{len(train):,} labelled images, {int(train['present'].sum()):,} with a pneumothorax; "
        f"{len(images.table) - len(train):,} to predict.",
        page.table(folds, "Folds, stratified by presence and mask size"),
        page.figure(plots.histogram(shares, "mask area, % of the image"), "Sizes of the masks"),
    )


def _decision(job, oof, tuned):
    rules = page.rules_table(tuned["rule"], tuned["fold_rules"])
    constant = [name for name in rules if rules[name].nunique() == 1 and rules[name].iloc[0] in (0, False)]
    surface, rule = read_csv(job.run.path("surface.csv")), tuned["rule"]
    x, y = ("top", "min_pixels") if rule["min_pixels"] else ("pixel", "min_area")
    caption = "Mean Dice of all out-of-fold images, with the best other settings"
    figures = results.rule_surface(surface, x, y, "dice", rule, caption)
    if surface["gate"].nunique() > 1:
        best = surface.groupby("gate")["dice"].max()
        drawn = plots.line_with_peak(best.index, best, "gate", "dice", rule["gate"])
        figures.append(page.figure(drawn, "Dice by the presence probability below which a mask is dropped"))
    positive = oof["present"] > 0
    groups = {"with": oof.loc[positive, "dice"], "without": oof.loc[~positive, "dice"]}
    drawn = plots.histogram(groups, "dice of an image", 20)
    figures.append(page.figure(drawn, "Dice of images with and without a pneumothorax"))
    table = page.table(rules.drop(columns=constant), "Decision rules, chosen on out-of-fold predictions")
    return page.section("Decision", table, page.grid(*figures))


def _calibration(job, oof, tuned):
    """Return the section on the presence probabilities, if the run has any, and on the calibration of the pixels."""
    drawn, gate = [], tuned["rule"]["gate"] or 0.5
    if job.config.presence != "none" and oof["present"].nunique() > 1:
        patients = job.images.patients(oof["row"])
        drawn = results.one_class(oof, "present", "presence", ("none", "pneumothorax"), gate, patients)
    pixels = results.pixel_calibration(read_array(job.run.maps("oof")), lambda k: mask(job.images, oof["row"].iloc[k]))
    return page.section("Presence and calibration", *drawn, pixels)


def _pictures(job, oof, tuned):
    """Return the section on the worst errors and the section of further pictures."""
    probs = read_array(job.run.maps("oof"))
    rules = {part: Rule(**rule) for part, rule in tuned["fold_rules"].items()}
    positive = oof[oof["present"] > 0].sort_values("dice", kind="stable")
    false = oof[(oof["present"] == 0) & (oof["dice"] < 1)].sort_values("presence", ascending=False)
    galleries, columns, connectivity = {}, [], job.config.decision.connectivity
    for title, rows in (pick_extremes(positive) | {"False positives": false[:4]}).items():
        items = []
        for position, row in rows.iterrows():
            image, rule = job.images.store.images[row["row"]], rules[str(row["part"])]
            how = {"probs": np.asarray(probs[position]), "gate_prob": row["presence"], "connectivity": connectivity}
            masks = mask(job.images, row["row"]), replace(rule, min_area=0).apply(**how), rule.apply(**how)
            truth, before, after = (_shrink(one, image) for one in masks)
            caption = f"{row['image_id']}: dice {row['dice']:.3f}, presence {row['presence']:.2f}"
            items.append((image, truth, after, caption))
            columns.append((image, truth, before, after, caption))
        galleries |= {title: gallery(items, title)} if items else {}
    text = "Green: the true outline. Orange: the prediction, using the rule chosen on the other parts."
    worst = [galleries.pop(title) for title in ("Worst", "False positives") if title in galleries]
    listed = oof.sort_values("dice", kind="stable")[["image_id", "fold", "present", "presence", "dice"]]
    further = page.section("Pictures", *galleries.values(), *_columns(job, columns))
    return [results.worst_errors(listed, text, *worst), further]


def _shrink(mask, image):
    return cv2.resize(mask, image.shape[::-1], interpolation=cv2.INTER_AREA)


def _columns(job, items):
    """Return the paper's figure 2 for the four images in which removing small regions changes the most pixels."""
    if job.config.decision.rule != "gate":
        return []
    fragments = ["The paper's figure 2: radiograph, truth, prediction before and after small regions are removed."]
    for image, truth, before, after, caption in sorted(items, key=lambda item: -int((item[2] != item[3]).sum()))[:4]:
        marks = ({}, {"truth": truth}, {"prediction": before}, {"prediction": after})
        picture = np.hstack([outline_overlay(image, **mark, size=256) for mark in marks])
        fragments.append(page.figure(to_jpeg(picture), caption))
    return fragments


def _published(run):
    """Return a section with the paper's validation metrics and this run's, averaged over the epochs that were kept."""
    tables = []
    for name, published in PUBLISHED.items():
        rows = [{"training": "paper", **published}]
        for path in sorted(run.folder.glob(f"fold*/*{name}*/variants.json")):
            summary, names = read_json(path), [metric for metric in published if metric != "epochs"]
            epochs = summary["variants"][summary["chosen"]]["epochs"]
            means = read_csv(path.with_name("history.csv"), names)[names].iloc[epochs].mean()
            which = ", ".join(str(epoch + 1) for epoch in epochs)
            rows.append({"training": f"{path.parts[-3]}, {path.parts[-2]}", "epochs": which, **means})
        tables += [page.table(pd.DataFrame(rows))] if len(rows) > 1 else []
    if not tables:
        return None
    text = "Mean validation figures of the epochs whose weights were kept. The paper's private score: Dice 0.8347."
    return page.section("Beside the paper", text, *tables)


def _ablation(job):
    table = read_csv(job.run.path("ablation.csv"))
    drawn = plots.score_with_interval(table[["setting", "dice", "low", "high"]].itertuples(index=False), "dice")
    table["dice"] = [page.interval_text(*row) for row in table[["dice", "low", "high"]].to_numpy()]
    return [
        "The paper's comparisons on this run's out-of-fold images, one change at a time. The gate's threshold is "
        "chosen in the first row, on the other parts, and kept in all others.",
        page.table(table.drop(columns=["low", "high"]), COLUMNS),
        page.figure(drawn, "Dice with its interval"),
    ]


def submission(job, record):
    """Return the number of masks in submission.csv, and the first of them as pictures."""
    rows = read_csv(job.run.path("submission.csv"), dtype=str, keep_default_na=False)
    found = rows[rows["EncodedPixels"] != "-1"]
    by_id, items = job.images.table.set_index("image_id")["row"], []
    for image_id, rle in found.head(8).itertuples(index=False):
        image = job.images.store.images[by_id[image_id]]
        items.append((image, None, _shrink(paint(parse(rle), (SIZE, SIZE), order="C"), image), image_id))
    text = f"{len(found):,} images with a mask ({len(found) / len(rows):.1%})."
    return [text, *([gallery(items, "First test images with a mask")] if items else [])]


def show_predictions(submission, folder=None, count=4):
    """Show the test images with the largest masks, outlined; folder: other images to use instead."""
    masks = largest_masks(submission, count)
    images = read_images(KAGGLE, masks, SIZE, folder=folder)
    display_gallery([(images[i], None, mask, f"{i}: {mask.mean():.2%} of the image") for i, mask in masks.items()])


def largest_masks(submission, count):
    """Return the `count` largest masks of a submission by image id, largest first; uint8 (SIZE, SIZE)."""
    masks = {row.ImageId: decode(row.EncodedPixels, (SIZE, SIZE)) for row in read_table(submission).itertuples()}
    return dict(sorted(masks.items(), key=lambda item: -int(item[1].sum()))[:count])
