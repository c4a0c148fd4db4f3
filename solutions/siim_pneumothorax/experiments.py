"""Repeat the paper's comparisons, one change at a time."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd

from common.config import to_dict
from common.errors import InputError, log
from common.infer.predict import drain, write_masks
from common.infer.tta import views
from common.metrics.classification import confusion_counts, mcc
from common.metrics.segmentation import dice_from_areas
from common.metrics.statistics import as_interval, bootstrap, paired_bootstrap
from common.network import predict, train
from common.paths import write_csv
from common.predictions import read_predictions
from common.step import Step
from common.tuning import grid, nested_areas, rule_dice, summarise, tune_nested
from solutions.siim_pneumothorax.config import SIZE
from solutions.siim_pneumothorax.data import presence, read_masks

PIXEL = 0.5
SCRATCH = "ablation"  # folder in the run for temporary probabilities
# Paper, table 2: smallest region kept (pixels), side of the mask at which it is measured, private score.
REGIONS = ((3500, 1024, 0.8347), (4500, 1024, 0.8329), (750, 512, 0.8328), (1750, 1024, 0.8318), (250, 512, 0.8307))
WITHOUT_GATE, CLASSIC_SWA = 0.7012, 0.8322  # paper, 4.2 and table 1
ENRICHMENT = 0.8147  # paper, 4.1.1: 0.02 below the gate trained with augmentation


def run_ablation(job):
    """Score the paper's comparisons on the out-of-fold images of the trained folds and write ablation.csv.

    Each row changes one of the paper's choices. The gate's threshold is tuned in the first row, nested, and reused.
    Columns: comparison, setting, dice, low, high, change (from the first row, paired), p, mcc (of the gate at 0.5) and
    paper (the published private score). Comparisons that the image sizes do not allow are skipped and logged.
    """
    config, images = job.config, job.images
    segmenter = config.segmenter
    averages = {"window", "classic"} <= set(segmenter.averaging) and segmenter.keep_variants
    if config.presence != "classifier" or not averages:
        needs = "segmenter.averaging with window and classic, and segmenter.keep_variants"
        raise InputError(f"ablate needs presence 'classifier', {needs}")
    rows = np.concatenate([images.rows(folds=[fold]) for fold in config.folds])
    folds, patients, sizes = images.at(rows)["fold"].to_numpy(), images.patients(rows), config.segmenter.sizes
    truth = [read_masks(images)[row] for row in rows]

    def regions(maps, at_network=False):
        return summarise(maps, truth, (PIXEL,), connectivity=config.decision.connectivity, at_network=at_network)

    own = read_predictions(job, "oof").table["presence"].to_numpy(float)
    segmenters = _networks(job, "segmenter")
    maps = _predict_masks(job, segmenters)
    paper, at_network = regions(maps), regions(maps, True) if SIZE % sizes[-1] == 0 else None
    rules = grid(gate=config.decision.gate, pixel=(PIXEL,), min_area=(REGIONS[0][0],))
    tuned = tune_nested(rules, lambda rule: rule_dice(paper, rule, own), folds, patients, config.seed)

    def dice(found=paper, probs=own, **changes):
        changed = {part: replace(rule, **changes) for part, rule in tuned.fold_rules.items()}
        return dice_from_areas(*nested_areas(found, changed, tuned.parts, probs))

    settings = [
        ("none", "as the paper chose", tuned.dice, own, REGIONS[0][2]),
        ("gate", "without", dice(gate=0.0), None, WITHOUT_GATE),
        ("weights", "classic SWA", dice(regions(_predict_masks(job, segmenters, "classic"))), own, CLASSIC_SWA),
    ]
    for pixels, side, published in REGIONS[1:]:
        if side != SIZE and at_network is None:
            log.info(f"left out: regions of {pixels} px at {side}, since {sizes[-1]} px does not divide {SIZE}")
            continue
        small = {"min_area": round(pixels * (sizes[-1] / side) ** 2), "at_network": True}
        values = dice(min_area=pixels) if side == SIZE else dice(at_network, **small)
        settings.append(("regions", f"{pixels} px at {side}", values, own, published))
    gates = _networks(job, "classifier", "enrichment", classifier=replace(config.classifier, enrichment=True))
    enriched = _predict_gate(job, gates)
    settings.append(("gate's training", "enrichment", dice(probs=enriched), enriched, ENRICHMENT))
    changed = replace(segmenter, positives_only=True, positive_rate=())
    maps = _predict_masks(job, _networks(job, "segmenter", "positives", segmenter=changed))
    settings.append(("segmenter's training", "positives alone", dice(regions(maps)), own, None))
    if config.store_size >= 2 * sizes[-1]:
        changed = replace(segmenter, sizes=(*sizes[:-1], 2 * sizes[-1]))
        maps = _predict_masks(job, _networks(job, "segmenter", "larger", segmenter=changed))
        settings.append(("segmenter's size", f"{2 * sizes[-1]} px", dice(regions(maps)), own, None))
    else:
        log.info(f"left out: a segmenter at {2 * sizes[-1]} px, since the stored images have {config.store_size} px")
    table = _ablation_table(settings, presence(images, rows), images.groups(rows))
    write_csv(job.run.path("ablation.csv"), table)
    shutil.rmtree(job.run.path(SCRATCH))
    log.info(table.to_string(index=False, float_format="%.4f".__mod__))


def _ablation_table(settings, present, groups):
    base, rows = settings[0][2], []
    for comparison, setting, values, gate, published in settings:
        row = {"comparison": comparison, "setting": setting, **as_interval(bootstrap(values, groups))}
        if values is not base:
            change, p = paired_bootstrap(values, base, groups)
            row |= {"change": change.estimate, "p": p}
        if gate is not None:
            row["mcc"] = float(mcc(confusion_counts(present, gate, 0.5)))
        rows.append(row | {"paper": published})
    columns = ["comparison", "setting", "dice", "low", "high", "change", "p", "mcc", "paper"]
    return pd.DataFrame(rows).rename(columns={"estimate": "dice"})[columns]


def _networks(job, kind, name="", **changes):
    """Return each fold's last network of a kind; name: train it first, with `changes`, as stages of that prefix."""
    found, before = {}, None
    for network in job.recipe.networks(job.with_config(**changes)):
        if network.stage.startswith(kind):
            if name:
                start = before if network.starts_from else None
                network = replace(network, stage=f"{name}-{network.stage}", starts_from=start)
                train(job, network)
            before = found[network.fold] = network
    return list(found.values())


def _predict_gate(job, gates):
    """Return out-of-fold presence probabilities of each fold's gate."""
    parts = [(gate, job.images.rows(folds=[gate.fold]), f"fold {gate.fold}") for gate in gates]
    probs = [predict(job, [gate], rows, views(job.config.tta), title)[:, 0] for gate, rows, title in parts]
    return np.concatenate(probs).astype(float)


def _predict_masks(job, networks, variant="window"):
    """Return the out-of-fold mask probabilities of one variant of weight averaging, uint8 (n, h, w), stored on disk."""
    parts, n = [], 0
    for network in networks:
        rows, name = job.images.rows(folds=[network.fold]), f"fold{network.fold}-{network.stage}-{variant}"
        parts.append(job.run.path(SCRATCH, f"{name}.b2nd"))
        found = predict(job, [network], rows, views(job.config.tta), name, parts[-1], variant)
        found, n = found[0] if isinstance(found, tuple) else found, n + len(rows)
    return write_masks(job.run.path(SCRATCH, f"{network.stage}-{variant}.b2nd"), (n, *found.shape[1:]), drain(parts))


ABLATION = Step("ablate", run_ablation, ("predict",), reads=lambda job: to_dict(job.config), files=("ablation.csv",))
