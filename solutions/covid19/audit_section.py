"""The section of the report on how much of the score reflects the images' origin, and where the networks look."""

import pandas as pd

from common.report import page, plots
from solutions.covid19.audit import focus_networks, read_audit
from solutions.covid19.config import COVID
from solutions.covid19.pictures import SEEN, heat_strips, pick_answers, view_strips


def audit_fragments(job, score, oof):
    """Return what `audit` found; score: of score.json; oof: the out-of-fold predictions with the truth."""
    found, _, focus = read_audit(job.run)
    config, checks, views = job.config, found["checks"], found["focus"]
    names = {check: _name(check, config.view) for check in checks}
    lines = [(f"this run: {SEEN[config.view]}", score["auroc"])]
    if score["same_source"]:
        lines.append(("this run, same collections", score["same_source"]["auroc"]))
    lines += [(names[check], part["auroc"]) for check, part in checks.items() if part["auroc"]]
    asked = [
        {
            "network": names[check],
            "question": part["said"],
            "images": part.get("images"),
            "AUROC": page.interval_text(*part["auroc"].values()) if part["auroc"] else None,
        }
        for check, part in checks.items()
    ]
    looks = [
        {
            "network sees": SEEN[view],
            "in the lungs": page.interval_text(*part["share"].values()),
            "chance": part["area"],
            "images": part["images"],
            "empty maps": part["flat"],
        }
        for view, part in views.items()
    ]
    groups = {SEEN[view]: 100 * focus.loc[focus["view"] == view, "share"] for view in views}
    groups["chance"] = 100 * focus.drop_duplicates("image_id")["area"]
    answers = pick_answers(oof[oof["fold"].isin(found["folds"]) & (oof["role"] == "main")])
    panels = ", ".join(["the radiograph with its lungs", *(f"the network that sees {SEEN[view]}" for view in views)])
    high = config.audit.high
    return [
        f"Trained for {found['epochs']} epochs, with the folds {', '.join(map(str, found['folds']))} held out in turn.",
        page.figure(
            plots.score_with_interval([(name, *interval.values()) for name, interval in lines], "AUROC", high),
            f"Margin, background and origin count against the run if their interval lies above {high:g}, the dashed "
            "line; the same collections, if the AUROC drops by an interval that excludes 0",
        ),
        page.table(pd.DataFrame(asked).astype({"images": "Int64"}), "What each network of the audit had to predict"),
        f"What the views show: {', '.join(SEEN.values())}.",
        view_strips(job.images, answers, config.audit.margin),
        page.table(
            pd.DataFrame(looks),
            "Where networks look: mean share of a heat map inside the lungs; chance: their share of the image",
        ),
        page.figure(
            plots.histogram(groups, "share of the heat map in the lungs, %", 25),
            "Share of each heat map in the lungs, and the area of the lungs",
        ),
        f"Grad-CAM, violet to yellow from the least to the strongest evidence for {COVID}: {panels}.",
        heat_strips(job, answers, {fold: focus_networks(config, fold) for fold in found["folds"]}),
    ]


def _name(check, view):
    """Return in a few words what the network of a check sees or does, given the view of the run."""
    if check == "origin":
        return "tells the collections apart"
    return SEEN["lungs" if check == "image" and view != "lungs" else check]
