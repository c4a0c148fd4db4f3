"""The part of a run's page that says how much of the score is the images' origin, and where the networks look."""

import numpy as np
import pandas as pd

from common.report import page, plots
from solutions.covid19 import pictures
from solutions.covid19.config import COVID
from solutions.covid19.pictures import SEEN
from solutions.covid19.scoring import read_score


def audit_section(context, data, oof, audit):
    """What `audit` found as a section of the page; None without an audit.

    oof: the predictions out of fold with what is known of each image; audit: what `audit.read_audit` gives.
    """
    from solutions.covid19.pipeline import STAGE  # it imports this module

    if audit is None:
        return None
    found, _, focus = audit
    config, checks = context.config, found["checks"]
    names = {check: _name(check, config.view) for check in checks}
    score = read_score(context.run)
    lines = [(f"this run: {SEEN[config.view]}", score["auroc"])]
    if score["same_source"]:
        lines.append(("this run, same collections", score["same_source"]["auroc"]))
    lines += [(names[check], part["auroc"]) for check, part in checks.items() if part["auroc"]]
    lines = [(name, *numbers(interval)) for name, interval in lines]
    asked = pd.DataFrame(
        [
            {
                "network": names[check],
                "question": part["said"],
                "images": part.get("images"),
                "AUROC": with_interval(*numbers(part["auroc"])) if part["auroc"] else None,
            }
            for check, part in checks.items()
        ]
    ).astype({"images": "Int64"})
    held_out = oof[oof["fold"].isin(found["folds"]) & (oof["role"] == "main")]
    shown = pictures.telling(held_out)
    stages = {view: STAGE if view == config.view else "audit-image" for view in found["focus"]}
    panels = ", ".join(["the radiograph with its lungs", *(f"the network of {SEEN[view]}" for view in stages)])
    high = f"{config.audit.high:g}"
    return page.section(
        "Audit",
        f"Networks of {found['epochs']} epochs, each fold of {', '.join(map(str, found['folds']))} held out once.",
        page.figure(
            plots.score_with_interval(lines, "AUROC", config.audit.high),
            f"Margin, background and origin count against the run where their interval lies above {high}, "
            "the dashed line; the same collections where "
            "the AUROC falls by an interval without 0",
        ),
        page.table(asked, "What each network of the audit was asked"),
        f"What the views let through: {', '.join(SEEN.values())}.",
        pictures.views(data, shown, config.audit.margin),
        page.table(
            _focus_rows(found["focus"]),
            "Where networks look: the share of a heat map that lies in the lungs, "
            "in the mean; chance is the share of the image that they cover",
        ),
        page.figure(_shares(focus, found["focus"]), "The share of each heat map, and the area of the lungs"),
        f"Grad-CAM, violet to yellow from the least to the most that speaks for {COVID}: {panels}.",
        pictures.heats(context, data, shown, stages),
    )


def _name(check, view):
    """What the network of a check sees or does, in a few words."""
    if check == "origin":
        return "tells the collections apart"
    return SEEN[check if check != "image" or view == "lungs" else "lungs"]


def _shares(focus, views):
    groups = {SEEN[view]: 100 * focus.loc[focus["view"] == view, "share"] for view in views}
    area = 100 * focus.drop_duplicates("image_id")["area"]
    return plots.histogram(groups | {"chance": area}, "share of the heat map in the lungs, %", 25)


def _focus_rows(views):
    return pd.DataFrame(
        [
            {
                "network sees": SEEN[view],
                "in the lungs": with_interval(*numbers(part["share"])),
                "chance": f"{part['area']:.4f}",
                "images": part["images"],
                "empty maps": part["flat"],
            }
            for view, part in views.items()
        ]
    )


def numbers(interval):
    """estimate, low and high of an interval as JSON holds it, NaN where it has None."""
    return [np.nan if value is None else value for value in interval.values()]


def with_interval(estimate, low, high):
    """The text of a figure with its interval, which is not broken into lines; None where it is not defined."""
    if np.isnan(estimate):
        return None
    return f"{estimate:.4f}" if np.isnan(low) else f"{estimate:.4f} [{low:.4f},\u00a0{high:.4f}]"
