"""RSNA's sections of the report: data, rule, gate and pictures with boxes."""

from common.kaggle.session import display_boxes
from common.paths import read_csv, read_json, read_parquet
from common.post.boxes import BOX
from common.report import detection_plots, page, results
from common.report.gallery import best_boxes, box_gallery, pick_extremes
from solutions.rsna_pneumonia.config import KAGGLE, SIDE
from solutions.rsna_pneumonia.postprocess import read_submission

TITLE, NAMES = "RSNA pneumonia detection", ("opacity",)


def headline(job, score):
    """Return the score, the gate's AUROC and the counts as cards, and a note on how they were measured."""
    cards = [
        ("mAP, out of fold", score["map"]["estimate"], page.range_text(score["map"])),
        ("AUROC of the gate", score["gate_auroc"], ""),
        ("Images", score["images"], f"{score['positive']} with an opacity; {score['counted']} with any box count"),
    ]
    return [page.cards(cards), page.nested_note(score["nested_by"], "mAP", score["map_not_nested"])]


def sections(job):
    """Return the data section and, if they are up to date, the sections of the results."""
    table, boxes = job.images.table, job.images.tables["boxes.parquet"]
    train, shares = table[table["split"] == "train"], boxes[BOX].to_numpy() / SIDE
    data = page.section(
        "Data",
        f"{len(train):,} labelled images with {len(boxes):,} boxes; {sum(table.split == 'test'):,} to predict.",
        page.table(train.groupby(["class_name", "fold"]).size().unstack().reset_index(), "Images by class and fold"),
        page.figure(detection_plots.location_maps({"opacity": shares}), "Where the boxes are"),
    )
    return [data, *(_results(job) if job.is_current("tune") else [])]


def _results(job):
    tuned, surface = read_json(job.run.path("tuned.json")), read_csv(job.run.path("surface.csv"), ["map"])
    best, rules = tuned["rule"], page.rules_table(tuned["rule"], tuned["fold_rules"])
    scored = job.images.table.merge(read_parquet(job.run.path("oof_scores.parquet")), on="image_id")
    scored["note"] = " · gate " + scored["gate"].map("{:.2f}".format) + " · " + scored["score"].map(page.as_text)
    positive, found = scored["target"] == 1, read_parquet(job.run.path("oof_decided.parquet"))
    figures = results.rule_surface(surface, "threshold", "gate", "map", best, "mAP by gate")
    figures += results.rule_surface(surface, "threshold", "shrink", "map", best, "mAP by shrink")
    picked = pick_extremes(scored[positive].sort_values("score"))
    picked["Boxes on images without an opacity"] = scored[~positive & scored["score"].notna()][:4]
    shown = {name: box_gallery(job.images, found, rows, name, NAMES) for name, rows in picked.items() if len(rows)}
    worst = [shown.pop(name) for name in ("Worst", "Boxes on images without an opacity") if name in shown]
    listed = scored.sort_values("score")[["image_id", "fold", "target", "gate", "score"]]
    patients, cut = job.images.patients(scored["row"]), best["gate"] or 0.5
    gate = results.one_class(scored, "target", "gate", ("none", *NAMES), cut, patients)
    return [
        page.section("Decision", page.table(rules, "Rules, chosen on out-of-fold boxes"), page.grid(*figures)),
        page.section("Gate", *gate),
        results.worst_errors(listed, "gate: probability of an opacity, and the image's score.", *worst),
        page.section("Pictures", *shown.values()),
    ]


def hints(job, score, trainings):
    """Return a hint about a weak gate, see common.report.hints."""
    return results.gate_hints(score["gate_auroc"], "--decision.gate 0")


def submission(job, record):
    """Return the number of boxes in submission.csv, and pictures of the images with the highest scores."""
    return best_boxes(job, read_submission(job.run.path("submission.csv"))[0], NAMES)


def show_predictions(submission, folder=None, count=4):
    """Show the test images with the highest scores, with boxes; folder: other images to use instead."""
    display_boxes(KAGGLE, read_submission(submission)[0], ("",), count, SIDE, folder)
