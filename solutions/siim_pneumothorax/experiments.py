"""Repeat the paper's comparisons, one change at a time."""

import logging
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import to_dict
from common.errors import InputError
from common.infer.predict import write_masks
from common.infer.tta import views
from common.metrics.classification import confusion_counts, mcc
from common.metrics.statistics import bootstrap, paired_bootstrap
from common.network import predict, train
from common.paths import write_csv
from common.recipe import drain
from common.step import Step
from common.tuning import grid, rule_dice, summarise, tune_nested
from solutions.siim_pneumothorax.config import SIZE
from solutions.siim_pneumothorax.data import presence, read_masks

log = logging.getLogger(__name__)
PIXEL = 0.5
SCRATCH = "ablation"  # folder in the run for temporary probabilities
# Paper, table 2: smallest region, at 1024 × 1024 or at the segmenter's 512 × 512, and the private score.
REGIONS = ((3500, 1024, 0.8347), (4500, 1024, 0.8329), (750, 512, 0.8328), (1750, 1024, 0.8318), (250, 512, 0.8307))
WITHOUT_GATE, CLASSIC_SWA = 0.7012, 0.8322  # paper, 4.2 and table 1


def run_ablation(job):
    """Score every comparison of the paper on the out-of-fold images of the trained folds; writes ablation.csv.

    The paper's choice (gate, windowed SWA, regions under 3,500 pixels at 1024 removed, augmentation) is compared with
    classic SWA, no gate, other region sizes, and a gate trained by enrichment, each with a nested gate threshold.
    Columns: comparison, setting, dice, low, high, change from the paper's choice (paired), p, mcc (of the gate at 0.5),
    paper (its private score). Finished trainings are reused. The two comparisons at the network's size are left out,
    with a log message, if that size does not divide 1024.
    """
    config, images = job.config, job.images
    if config.presence != "classifier" or not {"window", "classic"} <= set(config.segmenter.averaging):
        raise InputError("ablate needs presence 'classifier' and segmenter.averaging with window and classic")
    rows = np.concatenate([images.rows(folds=[fold]) for fold in config.folds])
    folds, patients = images.at(rows)["fold"].to_numpy(), images.patients(rows)
    truth = [read_masks(images)[row] for row in rows]
    network = config.segmenter.sizes[-1]
    sides = (False, True) if SIZE % network == 0 else (False,)
    if len(sides) == 1:
        log.info(f"regions are compared at {SIZE} px only, which is not a multiple of the segmenter's {network} px")

    gates = {kind: _gate_probs(job, kind) for kind in ("augmentation", "enrichment")}
    regions = {}
    for variant in ("window", "classic"):
        probs = _mask_probs(job, variant)
        for at_network in sides if variant == "window" else (False,):
            progress = partial(tqdm, total=len(rows), desc=f"regions, {variant}", leave=False)
            options = {"connectivity": config.decision.connectivity, "at_network": at_network, "progress": progress}
            regions[variant, at_network] = summarise(probs, truth, (PIXEL,), **options)

    def dice(min_area, side=SIZE, variant="window", gate="augmentation"):
        at_network = side != SIZE
        scale = (network / side) ** 2 if at_network else 1
        cuts = config.decision.gate if gate else (0.0,)
        rules = grid(gate=cuts, pixel=(PIXEL,), min_area=(round(min_area * scale),), at_network=(at_network,))
        probs = gates[gate] if gate else np.ones(len(rows))
        of_rule = partial(rule_dice, regions[variant, at_network], gate_probs=probs)
        return tune_nested(rules, of_rule, folds, patients, config.seed).dice

    own, other = gates["augmentation"], gates["enrichment"]
    settings = [
        ("none", "as the paper chose", dice(3500), own, REGIONS[0][2]),
        ("gate", "without", dice(3500, gate=None), None, WITHOUT_GATE),
        ("weights", "classic SWA", dice(3500, variant="classic"), own, CLASSIC_SWA),
        *(
            ("regions", f"{pixels} px at {side}", dice(pixels, side), own, published)
            for pixels, side, published in REGIONS[1:]
            if side == SIZE or len(sides) > 1
        ),
        ("gate's training", "enrichment", dice(3500, gate="enrichment"), other, None),
    ]
    table = _ablation_table(settings, presence(images, rows), images.groups(rows))
    write_csv(job.run.path("ablation.csv"), table)
    shutil.rmtree(job.run.path(SCRATCH))
    for line in table.to_string(index=False, float_format=lambda v: f"{v:.4f}").splitlines():
        log.info(line)


def _ablation_table(settings, present, groups):
    base, rows = settings[0][2], []
    for comparison, setting, values, gate, published in settings:
        interval = bootstrap(values, groups)
        row = {"comparison": comparison, "setting": setting, "dice": interval.estimate}
        row |= {"low": interval.low, "high": interval.high}
        if values is not base:
            change, p = paired_bootstrap(values, base, groups)
            row |= {"change": change.estimate, "p": p}
        if gate is not None:
            row["mcc"] = float(mcc(confusion_counts(present, gate, 0.5)))
        rows.append(row | {"paper": published})
    return pd.DataFrame(rows)[["comparison", "setting", "dice", "low", "high", "change", "p", "mcc", "paper"]]


def _gate_probs(job, kind):
    """Return out-of-fold presence probabilities of the gate trained by `kind`; the run's own gate is reused."""
    own, probs = job.config.classifier, []
    wanted = replace(own, enrichment=kind == "enrichment")
    for gate in job.recipe.networks(job.with_config(classifier=wanted)):
        if gate.stage == "classifier":
            gate = gate if wanted == own else replace(gate, stage=f"classifier-{kind}")
            train(job, gate)
            rows, title = job.images.rows(folds=[gate.fold]), f"gate by {kind}, fold {gate.fold}"
            probs.append(predict(job, [gate], rows, views(job.config.tta), title)[:, 0])
    return np.concatenate(probs).astype(float)


def _mask_probs(job, variant):
    """Return out-of-fold mask probabilities of one averaging variant, uint8 (n, h, w), memory-mapped."""
    last, parts, n = f"segmenter-{job.config.segmenter.sizes[-1]}", [], 0
    for network in job.recipe.networks(job):
        if network.stage == last:
            rows = job.images.rows(folds=[network.fold])
            parts.append(job.run.path(SCRATCH, f"fold{network.fold}-{variant}.npy"))
            title = f"{variant}, fold {network.fold}"
            found = predict(job, [network], rows, views(job.config.tta), title, parts[-1], variant)
            found, n = found[0] if isinstance(found, tuple) else found, n + len(rows)
    return write_masks(job.run.path(SCRATCH, f"{variant}.npy"), (n, *found.shape[1:]), drain(parts))


ABLATION = Step(
    "ablate", run_ablation, needs=("predict",), reads=lambda job: to_dict(job.config), files=("ablation.csv",)
)
