"""Audit how much of a score reflects the images' origin, with networks that see no lungs and with heat maps."""

from dataclasses import asdict, replace
from functools import partial

import cv2
import numpy as np
import pandas as pd

from common import processes
from common.errors import InputError, log
from common.infer.tta import views
from common.metrics.statistics import as_interval, bootstrap, format_interval
from common.network import predict
from common.paths import read_array, read_json, read_parquet, write_json, write_table
from common.recipe import read_score, train_all
from solutions.covid19.comparison import auroc_interval, with_rates
from solutions.covid19.data import MASKS, labels_of, read_selection
from solutions.covid19.models import covid_network, fold_rows, heat_maps

FILES = ("audit.json", "audit.parquet", "focus.parquet")
PREFIX = "audit-"  # of the stage names of the audit's networks
HEALTHY = ("no finding", "normal", "")
LEAST = 10  # minimum number of images in each of the two classes that a network has to distinguish
NAMES = {
    "image": "a network that sees the whole image",
    "lungs": "a network that sees only the lungs",
    "border": "a network that sees only the margin of the image",
    "background": "a network that sees everything but the lungs",
    "origin": "a network that has to distinguish collections among images of one label",
    "view": "a network that has to distinguish AP from PA, by the views that the tables give",
}


def audit_key(job):
    """Return the settings that an audit depends on in addition to the scores, as JSON."""
    fitting = [asdict(audit_fitting(job.config, check)) for check in ("image", "border")]
    return [asdict(job.config.audit), audited_folds(job.config), fitting]


def run_audit(job):
    """Train the audit's networks and measure heat maps; write audit.json, audit.parquet and focus.parquet.

    audit.parquet: check, image_id, fold, label (for the check), out-of-fold probability. focus.parquet: view, image_id,
    fold, label, share (of the heat map that lies in the lungs, NaN for an empty map), area (of the lungs).
    """
    run, config, images = job.run, job.config, job.images
    found, answers = {}, [pd.DataFrame(columns=["image_id", "fold", "label", "probability", "check"])]
    questions, folds = {check: find_question(job, check) for check in config.audit.checks}, audited_folds(config)
    asked = [(check, fold) for check in questions for fold in folds if questions[check][1] is not None]
    networks = {(check, fold): network_of(config, fold, check, *questions[check][:2]) for check, fold in asked}
    train_all(job, [*networks.values()])
    for check, (labels, rows, question) in questions.items():
        if rows is None:
            found[check] = {"auroc": None, "said": question}
            log.info(f"audit, {check}: {question}")
            continue
        parts = []
        for fold in folds:
            held_out = rows[images.at(rows)["fold"].to_numpy() == fold]  # `image` may validate on another fold
            probs = predict(job, [networks[check, fold]], held_out, views(config.tta), f"fold {fold}")[:, 0]
            table = {"image_id": images.ids(held_out), "fold": fold, "label": labels(job, held_out).astype(int)}
            parts.append(pd.DataFrame(table | {"probability": probs.astype(float)}))
        table = pd.concat(parts, ignore_index=True)
        patients = images.patients(images.rows_of(table["image_id"]))
        auroc = auroc_interval(table["label"], table["probability"], patients, config.seed)
        accuracy, positives = with_rates(table)["accuracy"].mean(), int(table["label"].sum())
        found[check] = {"auroc": as_interval(auroc), "said": question, "accuracy": accuracy, "images": len(table)}
        found[check] |= {"positives": positives, "epochs": audit_fitting(config, check).epochs}
        answers.append(table.assign(check=check))
        log.info(f"audit, {check}: {question}: AUROC {auroc}, accuracy {accuracy:.4f}")
    focus, summary = _measure_focus(job)
    verdict = reach_verdict(found, read_score(job), config.audit.high)
    if not processes.is_main():
        return None
    write_table(run.path("audit.parquet"), pd.concat(answers[1:] or answers, ignore_index=True))
    write_table(run.path("focus.parquet"), focus)
    write_json(run.path("audit.json"), {"checks": found, "focus": summary, "folds": folds, **verdict})
    log.info(verdict["said"])
    return {"biased": verdict["biased"]}


def read_audit(run):
    """Return the contents of audit.json, audit.parquet and focus.parquet."""
    return read_json(run.path(FILES[0])), *(read_parquet(run.path(name)) for name in FILES[1:])


def audited_folds(config):
    """Return the held-out folds of the audit. Raises InputError if the run holds out none of them."""
    folds = [fold for fold in config.audit.folds if fold in config.folds]
    if not folds:
        raise InputError(f"--audit.folds {config.audit.folds}: this run holds out none of them, but {config.folds}")
    return folds


def audit_fitting(config, check):
    """Return the NetworkConfig of a check: the run's for "image", otherwise with fewer epochs, the last one kept."""
    if check == "image":
        return config.network
    schedule = "constant" if config.network.schedule == "plateau" else config.network.schedule
    return replace(config.network, epochs=config.audit.epochs, averaging=("last",), keep="highest", schedule=schedule)


def view_of(config, check):
    """Return the view of a check's network; for "image", whichever of image and lungs the run does not use."""
    if check == "image":
        return "lungs" if config.view == "image" else "image"
    return {"origin": config.view, "view": "image"}.get(check, check)


def network_of(config, fold, check, labels=labels_of, rows=None):
    """Return the Network of a check for one fold; rows: the store rows of the check."""

    def split(job, fold):
        held_out = job.images.at(rows)["fold"].to_numpy() == fold
        parts = rows[~held_out], rows[held_out]
        if len(set(labels(job, parts[0]).tolist())) < 2 or not len(parts[1]):
            raise InputError(f"audit, {check}: fold {fold} leaves only images of one class to train on")
        return parts

    fitting = audit_fitting(config, check)
    own = fold_rows if check == "image" else split
    return covid_network(config, fold, PREFIX + check, view_of(config, check), fitting, labels, own)


def focus_networks(config, fold):
    """Return the networks whose heat maps are compared, by view: the run's and the one of the check "image"."""
    networks = {config.view: covid_network(config, fold)}
    if "image" in config.audit.checks:
        networks[view_of(config, "image")] = network_of(config, fold, "image")
    return networks


def find_question(job, check):
    """Return a check's labels(job, rows), store rows and question; if it is impossible, None, None and the reason."""
    if check not in ("origin", "view"):
        name = NAMES[view_of(job.config, check)]
        return labels_of, job.images.rows(role="main"), f"COVID-19 by {name}"
    used = job.images.table[job.images.table["fold"] >= 0].set_index("row", drop=False)
    if check == "view":
        said = read_selection(job.run).set_index("image_id")["view_said"].reindex(used["image_id"]).str.casefold()
        ap, pa = (said.str.contains(rf"\b{name}s?\b", regex=True).to_numpy() for name in ("ap", "pa"))
        target = pd.Series(ap, used.index)[ap != pa]
        if min(target.sum(), (~target).sum()) < LEAST:
            return None, None, f"skipped: the tables give fewer than {LEAST} AP or PA views"
        return partial(_given, target), target.index.to_numpy(), f"AP against PA by {NAMES['image']}"
    for label, name in ((0, "without"), (1, "with")):
        part = used[used["label"] == label]
        counts, homes = part["collection"].value_counts(), part["home"]
        if (counts >= LEAST).sum() < 2:
            continue
        if label == 1 or homes.all() or not homes.any():
            homes = part["collection"] == counts.index[0]
        if min(homes.sum(), (~homes).sum()) < LEAST:
            continue
        names = " and ".join(sorted(part.loc[homes, "collection"].unique()))
        question = f"{names} against the other collections, among images {name} COVID-19"
        ill = (~part["finding"].str.strip().str.casefold().isin(HEALTHY)).sum()
        if label == 0 and ill:  # then the two groups differ in more than their origin
            question += f", {ill} of {len(part)} with another disease"
        return partial(_given, homes), homes.index.to_numpy(), question
    return None, None, f"skipped: no label has {LEAST} images each from two collections"


def _given(target, job, rows):
    return target.loc[rows].to_numpy(np.float32)


def _measure_focus(job):
    """Return a table with each heat map's share in the lungs, for images with COVID-19, and a summary by view."""
    images, masks, parts = job.images, read_array(job.images.arrays[MASKS]), []
    for fold in audited_folds(job.config):
        rows = images.rows(folds=[fold], role="main", label=1)
        for view, network in focus_networks(job.config, fold).items() if len(rows) else ():
            heats = heat_maps(job, network, rows, job.device, f"{view}, fold {fold}")
            shares = [share_in_lungs(heat, masks[row]) for heat, row in zip(heats, rows, strict=True)]
            table = {"view": view, "image_id": images.ids(rows), "fold": fold, "label": 1, "share": shares}
            parts.append(pd.DataFrame({**table, "area": images.at(rows)["area"].to_numpy()}))
    table = pd.concat(parts, ignore_index=True)
    table = table.sort_values("view", key=lambda view: view != job.config.view, kind="stable", ignore_index=True)
    figures = {}
    for view, part in table.groupby("view", sort=False):
        patients, area = images.patients(images.rows_of(part["image_id"])), float(part["area"].mean())
        share = bootstrap(part["share"], patients, seed=job.config.seed, skip_nan=True)
        empty = int(part["share"].isna().sum())
        figures[view] = {"share": as_interval(share), "area": area, "images": len(part), "flat": empty}
        said = f"{share.estimate:.1%} in the lungs, which cover {area:.1%} of the image; {empty} are empty"
        log.info(f"heat maps of {len(part)} images with COVID-19, {view}: {said}")
    return table, figures


def share_in_lungs(heat, mask):
    """Return the share of a heat map (h, w) >= 0 in the lungs of a mask (H, W), in [0, 1]; NaN for an empty map."""
    if not heat.any():
        return np.nan
    heat = np.ascontiguousarray(heat, np.float32)
    heat = cv2.resize(heat / heat.max(), mask.shape[::-1], interpolation=cv2.INTER_LINEAR).astype(np.float64)
    return float(heat[mask != 0].sum() / heat.sum())


def reach_verdict(found, score, high):
    """Return the verdict: {"biased": bool, "said": the first line of the page, "evidence": lines}.

    Evidence of bias: the interval of the AUROC of border, background or origin lies above `high`, or the AUROC drops
    on images from the same collections. Origin and the drop can also reflect other diseases.
    """
    areas = {check: (found.get(check) or {}).get("auroc") for check in ("border", "background", "origin")}
    asked = [check for check, auroc in areas.items() if auroc and auroc["low"] is not None]
    recognised = [check for check in asked if areas[check]["low"] > high]
    evidence = [f"{NAMES[check]} reaches an AUROC of {format_interval(areas[check], 3)}" for check in recognised]
    same = score["same_source"]
    fall = same and same["fall"]
    if fall and fall["low"] is not None:
        asked.append("the same collections")
        if fall["low"] > 0:
            before, after, by = (format_interval(value, 3) for value in (score["auroc"], same["auroc"], fall))
            evidence.append(f"on images from the same collections the AUROC drops from {before} to {after}, by {by}")
    sentences = " ".join(line[0].upper() + line[1:] + "." for line in evidence)
    if {"border", "background"} & set(recognised):
        said = f"Do not trust the score: the images' origin gives the answer away. {sentences}"
    elif evidence:
        said = f"The score may not reflect COVID-19, but the images' origin or other diseases. {sentences}"
    elif asked:
        said = f"No sign that the images' origin gives the answer away (checked: {', '.join(asked)})."
    else:
        said = "Whether the images' origin gives the answer away could not be determined from these images."
    return {"biased": bool(evidence), "said": said, "evidence": evidence}
