"""How much of a score is the images' origin: networks that see no lung, and where the run's networks look."""

import dataclasses
import logging

import numpy as np
import pandas as pd

from common.errors import InputError
from common.metrics.statistics import Interval, bootstrap
from common.paths import read_array, write_json
from common.steps import as_interval, keep_config, trained_weights, write_table
from solutions.covid19 import pipeline
from solutions.covid19.config import STAGE
from solutions.covid19.focus import heat_maps, lung_area, share_in_lungs
from solutions.covid19.models import load_network
from solutions.covid19.scoring import AUDITED, area, read_score

log = logging.getLogger(__name__)
FIGURES = 2  # raised where the audit comes to measure something else
HEALTHY = ("no finding", "normal", "")
LEAST = 10  # images of a collection under which no network can be asked to tell it apart
SAID = {
    "image": "a network that sees the whole image",
    "lungs": "a network that sees the lungs alone",
    "border": "a network that sees the margin of the image alone",
    "background": "a network that sees everything but the lungs",
    "origin": "a network that has to tell collections apart among images of one label",
}


def run_audit(context, data):
    """Train the networks of the audit, measure where networks look, write audit.json, audit.parquet, focus.parquet.

    audit.parquet: check, image_id, fold, label (of the check's own question), probability, out of fold. focus.parquet:
    view, image_id, fold, label, share (of the heat map in the lungs, NaN for an empty map), area (of the lungs).
    """
    run, config = context.run, context.config
    folds = _folds(config)
    fitted = dataclasses.replace(
        config.network,
        epochs=config.audit.epochs,
        averaging=("last",),
        keep="highest",
        schedule=_schedule(config.network),
    )
    key = [FIGURES, run.step("tune")["key"], dataclasses.asdict(config.audit), folds, dataclasses.asdict(fitted)]
    if run.is_done("audit", key, AUDITED):
        log.info("audit: up to date")
        return
    run.forget("audit")
    found, answers = {}, []
    for check in config.audit.checks:
        labels, rows, question = _question(data, _view(config, check))
        if rows is None:
            found[check] = {"auroc": None, "said": question}
            log.info(f"audit, {check}: {question}")
            continue
        table = _answers(context, data, check, folds, fitted, labels, rows)
        patients = data.patients(data.rows_of(table["image_id"]))
        auroc = area(table["label"], table["probability"], patients, config.seed)
        found[check] = {
            "auroc": as_interval(auroc),
            "said": question,
            "images": len(table),
            "positives": int(table["label"].sum()),
        }
        answers.append(table.assign(check=check))
        log.info(f"audit, {check}: {question}: AUROC {auroc}")
    focus, summary = _focus(context, data, folds, fitted)
    write_table(run.path("audit.parquet"), pd.concat(answers, ignore_index=True) if answers else _nothing())
    write_table(run.path("focus.parquet"), focus)
    verdict = judge(found, read_score(run), config.audit.high)
    write_json(
        run.path("audit.json"), {"checks": found, "focus": summary, "folds": folds, "epochs": fitted.epochs, **verdict}
    )
    keep_config(context)
    run.record("audit", key, of=run.step("tune")["key"], biased=verdict["biased"])
    log.info(verdict["said"])


def _folds(config):
    folds = [fold for fold in config.audit.folds if fold in config.folds]
    if not folds:
        raise InputError(f"--audit.folds {config.audit.folds}: none of them is held out by this run ({config.folds})")
    return folds


def _schedule(network):
    """Steps far beyond the last epoch, or a plateau without a validating fold, are no schedule here."""
    return "constant" if network.schedule == "plateau" else network.schedule


def _question(data, check):
    """Labels of a check or view (a function of rows), the rows it is asked of, and the question; rows are None where
    it cannot be asked."""
    if check != "origin":
        return data.labels, data.rows(role="main"), f"COVID-19 by {SAID[check]}"
    used = data.table[data.table["fold"] >= 0]
    for label, name in ((0, "without"), (1, "with")):
        part = used[used["label"] == label]
        counts = part["collection"].value_counts()
        if len(counts[counts >= LEAST]) < 2:
            continue
        homes = (
            part["home"]
            if label == 0 and part["home"].any() and not part["home"].all()
            else (part["collection"] == counts.index[0])
        )
        if min(homes.sum(), (~homes).sum()) < LEAST:
            continue
        target = pd.Series(homes.to_numpy(np.float32), index=part["row"].to_numpy())
        names = " and ".join(sorted(part.loc[homes, "collection"].unique()))
        question = f"{names} against the other collections, among images {name} COVID-19"
        ill = (~part["finding"].str.strip().str.casefold().isin(HEALTHY)).sum()
        if label == 0 and ill:  # then it is not the origin alone that differs
            question += f", {ill} of {len(part)} with another disease"
        return (lambda rows, target=target: target.loc[rows].to_numpy(np.float32)), part["row"].to_numpy(), question
    return None, None, f"not asked: no label has {LEAST} images each of two collections"


def _answers(context, data, check, folds, fitted, labels, rows):
    """Out-of-fold answers of the networks of one check: image_id, fold, label, probability."""
    view = context.config.view if check == "origin" else _view(context.config, check)
    table, parts = data.table, []
    fold_of = pd.Series(table["fold"].to_numpy(), index=table["row"].to_numpy())
    for fold in folds:
        here = fold_of.loc[rows].to_numpy() == fold
        learn, held_out = rows[~here], rows[here]
        if len(set(labels(learn).tolist())) < 2 or not len(held_out):
            raise InputError(f"audit, {check}: fold {fold} leaves images of one kind alone to learn from")
        stage = f"audit-{check}"
        pipeline.train_network(context, data, fold, stage, view, fitted, (learn, held_out), labels)
        model = load_network(fitted, trained_weights(context.run, fold, stage))
        probs = pipeline.predict_view(context, data, [model], held_out, view, f"{check}, fold {fold}", fitted)
        parts.append(
            pd.DataFrame(
                {
                    "image_id": data.ids(held_out),
                    "fold": fold,
                    "label": labels(held_out).astype(int),
                    "probability": probs,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def _view(config, check):
    """What a check's network sees; "image" is whichever of the whole image and the lungs the run does not see."""
    if check == "image":
        return "lungs" if config.view == "image" else "image"
    return check


def _nothing():
    return pd.DataFrame({"image_id": [], "fold": [], "label": [], "probability": [], "check": []})


def _focus(context, data, folds, fitted):
    """Where the run's networks look in images with COVID-19, and those that see the other of image and lungs.

    Returns the table and figures by view. Images without COVID-19 show little: there the map is mostly empty.
    """
    config, masks, parts = context.config, read_array(data.masks), []
    networks = {config.view: (STAGE, config.network)}
    if "image" in config.audit.checks:
        networks[_view(config, "image")] = ("audit-image", fitted)
    for view, (stage, network) in networks.items():
        for fold in folds:
            rows = data.rows(folds=[fold], role="main")
            rows = rows[data.labels(rows) == 1]
            if not len(rows):
                continue
            model = load_network(network, trained_weights(context.run, fold, stage))
            heats = heat_maps(model, data, rows, network, view, context.device, context.workers, f"{view}, fold {fold}")
            parts.append(
                pd.DataFrame(
                    {
                        "view": view,
                        "image_id": data.ids(rows),
                        "fold": fold,
                        "label": data.labels(rows).astype(int),
                        "share": [share_in_lungs(heat, masks[row]) for heat, row in zip(heats, rows, strict=True)],
                        "area": [lung_area(masks[row]) for row in rows],
                    }
                )
            )
    table = pd.concat(parts, ignore_index=True)
    figures = {}
    for view, part in table.groupby("view", sort=False):
        patients = data.patients(data.rows_of(part["image_id"]))
        share = _mean_share(part["share"].to_numpy(), patients, config.seed)
        figures[view] = {
            "share": as_interval(share),
            "area": float(part["area"].mean()),
            "images": len(part),
            "flat": int(part["share"].isna().sum()),
        }
        where = f"{share.estimate:.1%} of them lies in the lungs, which cover {figures[view]['area']:.1%} of the image"
        said = "all are empty" if np.isnan(share.estimate) else where
        log.info(f"heat maps of {len(part)} images with COVID-19, {view}: {said}")
    return table, figures


def _mean_share(shares, patients, seed):
    """The mean of shares as an Interval by patient; without its ends for one patient, NaN where all maps are empty."""
    if np.isnan(shares).all() or len(set(patients.tolist())) < 2:
        known = shares[~np.isnan(shares)]
        return Interval(known.mean() if len(known) else np.nan, np.nan, np.nan)
    return bootstrap(shares, patients, seed=seed, skip_nan=True)


def judge(found, score, high):
    """The verdict in words: {"biased": bool, "said": first line of the page, "evidence": lines}.

    found: check → {"auroc": {estimate, low, high} or None}; score: score.json; high: AUROC that the lower end of an
    interval has to pass. Counted against the run are a margin, a background or an origin that is recognised so well,
    and a headline AUROC that is above the one against the same collections by an interval without 0. The latter two
    alone can also come from other diseases, which images of the same collections show and normals do not.
    """
    areas = {check: (found.get(check) or {}).get("auroc") for check in ("border", "background", "origin")}
    asked = [check for check, auroc in areas.items() if auroc and auroc["low"] is not None]
    told = [check for check in asked if areas[check]["low"] > high]
    evidence = [f"{SAID[check]} reaches an AUROC of {_interval(areas[check])}" for check in told]
    same = score["same_source"]
    fall = same and same["fall"]
    if fall and fall["low"] is not None and fall["low"] > 0:
        evidence.append(
            f"against images of the same collections the AUROC falls from {_interval(score['auroc'])} to "
            f"{_interval(same['auroc'])}, by {_interval(fall)}"
        )
    if {"border", "background"} & set(told):
        said = "The score is not to be believed: the images' origin gives the answer away. " + _sentences(evidence)
    elif evidence:
        said = (
            "The score may not be COVID-19's: the images' origin, or other diseases, explain it as well. "
            + _sentences(evidence)
        )
    else:
        asked += ["the same collections"] if fall and fall["low"] is not None else []
        said = (
            f"No sign that the images' origin gives the answer away ({', '.join(asked)})."
            if asked
            else ("Whether the images' origin gives the answer away could not be told from these images.")
        )
    return {"biased": bool(evidence), "said": said, "evidence": evidence}


def _interval(values):
    return "{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**values)


def _sentences(lines):
    return " ".join(line[0].upper() + line[1:] + "." for line in lines)
