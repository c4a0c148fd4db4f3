"""Beside the recipe: the paper's comparisons, one change at a time, and learning-rate range tests."""

import dataclasses
import logging
import shutil
from functools import partial

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from common.errors import InputError
from common.infer.predict import predict_masks, predict_probs, write_masks
from common.metrics.classification import confusion_counts, mcc
from common.metrics.statistics import bootstrap, paired_bootstrap
from common.paths import atomic_path
from common.steps import used_up
from common.train.lr_finder import find_learning_rate
from common.tuning import grid, rule_dice, summarise, tune_nested
from solutions.siim_pneumothorax.config import SIZE
from solutions.siim_pneumothorax.data import open_prepared
from solutions.siim_pneumothorax.models import (
    build_classifier,
    build_segmenter,
    freeze_body,
    freeze_half,
    load_classifier,
    load_segmenter,
    mask_loss,
    views,
)
from solutions.siim_pneumothorax.pipeline import prediction_batch, train_classifier
from solutions.siim_pneumothorax.training import (
    classifier_loader,
    classifier_step,
    presence_of,
    segmenter_loader,
    segmenter_step,
)

log = logging.getLogger(__name__)
PIXEL = 0.5
SCRATCH = "ablation"  # folder of the run for probabilities that only the ablation needs
# Paper, table 2: smallest region, at 1024 × 1024 or at the segmenter's 512 × 512, and the private score.
REGIONS = ((3500, 1024, 0.8347), (4500, 1024, 0.8329), (750, 512, 0.8328), (1750, 1024, 0.8318), (250, 512, 0.8307))
WITHOUT_GATE, CLASSIC_SWA = 0.7012, 0.8322  # paper, 4.2 and table 1


def run_ablation(context):
    """Score every comparison of the paper on the out-of-fold images of the trained folds; writes ablation.csv.

    Compared with the paper's choice (gate, windowed SWA, regions under 3,500 pixels at 1024 removed, augmentation) are
    classic SWA, no gate, the other region sizes, and the gate trained by enrichment. The gate's threshold is chosen
    nested in each case. Columns: comparison, setting, dice, low, high, change (to the paper's choice, paired), p, mcc
    (of the gate at 0.5) and paper (its private score). Missing trainings are made, finished ones reused. Removal at the
    network's size needs one that divides 1024; for another those two lines are left out, and that is said.
    """
    config = context.config
    if config.presence != "classifier" or not {"window", "classic"} <= set(config.segmenter.averaging):
        raise InputError("ablate needs presence 'classifier' and segmenter.averaging with window and classic")
    data = open_prepared(context)
    rows = np.concatenate([data.rows(folds=[fold]) for fold in config.folds])
    folds = data.table.set_index("row")["fold"][rows].to_numpy()
    patients = data.table.set_index("row")["patient_id"][rows].to_numpy()
    patients = None if (patients == "").all() else patients
    truth = [data.masks[row] for row in rows]
    network = config.segmenter.sizes[-1]
    sides = (False, True) if SIZE % network == 0 else (False,)
    if len(sides) == 1:
        log.info(f"regions are compared at {SIZE} only: the segmenter's {network} px do not divide it")

    gates = {kind: _gate_probs(context, data, kind) for kind in ("augmentation", "enrichment")}
    summaries = {}
    for variant in ("window", "classic"):
        probs = _mask_probs(context, data, variant)
        for at_network in sides if variant == "window" else (False,):
            progress = partial(tqdm, total=len(rows), desc=f"regions, {variant}", leave=False)
            summaries[variant, at_network] = summarise(
                probs,
                truth,
                (PIXEL,),
                connectivity=config.decision.connectivity,
                at_network=at_network,
                progress=progress,
            )

    def dice(min_area, side=SIZE, variant="window", gate="augmentation"):
        at_network = side != SIZE
        scale = (network / side) ** 2 if at_network else 1
        cuts = config.decision.gate if gate else (0.0,)
        rules = grid(gate=cuts, pixel=(PIXEL,), min_area=(round(min_area * scale),), at_network=(at_network,))
        probs = gates[gate] if gate else np.ones(len(rows))
        regions = summaries[variant, at_network]
        return tune_nested(rules, lambda rule: rule_dice(regions, rule, probs), folds, patients, config.seed).dice

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
    table = _ablation_table(settings, presence_of(data)[rows], np.arange(len(rows)) if patients is None else patients)
    with atomic_path(context.run.path("ablation.csv")) as path:
        table.to_csv(path, index=False)
    shutil.rmtree(context.run.path(SCRATCH))
    for line in table.to_string(index=False, float_format=lambda v: f"{v:.4f}").splitlines():
        log.info(line)


def _ablation_table(settings, present, groups):
    base, rows = settings[0][2], []
    for comparison, setting, values, gate, published in settings:
        interval = bootstrap(values, groups)
        row = {
            "comparison": comparison,
            "setting": setting,
            "dice": interval.estimate,
            "low": interval.low,
            "high": interval.high,
        }
        if values is not base:
            change, p = paired_bootstrap(values, base, groups)
            row |= {"change": change.estimate, "p": p}
        if gate is not None:
            row["mcc"] = float(mcc(confusion_counts(present, gate, 0.5)))
        rows.append(row | {"paper": published})
    return pd.DataFrame(rows)[["comparison", "setting", "dice", "low", "high", "change", "p", "mcc", "paper"]]


def _gate_probs(context, data, kind):
    """Out-of-fold presence probabilities of the gate trained by `kind`; the run's own gate is not trained again."""
    wanted = kind == "enrichment"
    config = context.config.classifier
    stage = "classifier" if config.enrichment == wanted else f"classifier-{kind}"
    config, probs = dataclasses.replace(config, enrichment=wanted), []
    for fold in context.config.folds:
        fitted = train_classifier(context, data, fold, config, stage)
        model = load_classifier(config, fitted.folder / "final.safetensors")
        probs.append(
            predict_probs(
                [model],
                data.store.images,
                data.rows(folds=[fold]),
                config.size,
                2 * config.batch_size,
                device=context.device,
                views=views(context.config.tta),
                amp=config.precision,
                progress=f"gate by {kind}, fold {fold}",
                workers=context.workers,
            )[:, 0]
        )
    return np.concatenate(probs).astype(float)


def _mask_probs(context, data, variant):
    """Out-of-fold mask probabilities of one averaging variant's weights, uint8 (n, h, w), memory-mapped."""
    config, size, parts = context.config.segmenter, context.config.segmenter.sizes[-1], []
    for fold in context.config.folds:
        folder = context.run.path(f"fold{fold}", f"segmenter-{size}", "variants")
        model = load_segmenter(config, folder / f"{variant}.safetensors")
        parts.append(context.run.path(SCRATCH, f"fold{fold}-{variant}.npy"))
        predicted = predict_masks(
            [model],
            data.store.images,
            data.rows(folds=[fold]),
            parts[-1],
            size,
            prediction_batch(config),
            device=context.device,
            views=views(context.config.tta),
            amp=config.precision,
            progress=f"{variant}, fold {fold}",
            workers=context.workers,
        )
    shape = (sum(len(data.rows(folds=[fold])) for fold in context.config.folds), *predicted.shape[1:])
    return write_masks(context.run.path(SCRATCH, f"{variant}.npy"), shape, used_up(parts))


def find_learning_rates(context, steps=100):
    """Range tests of the gate and the segmenter on the first fold's batches; writes lr_<network>.csv and logs both.

    Both are tested as their first epoch trains them, frozen parts frozen.
    """
    data, fold = open_prepared(context), context.config.folds[0]
    gate, masks = context.config.classifier, context.config.segmenter
    tests = [
        (
            "segmenter",
            masks,
            build_segmenter,
            freeze_half,
            partial(segmenter_step, loss=mask_loss(masks), device=context.device),
            segmenter_loader(context, data, fold, masks, masks.sizes[0]),
        )
    ]
    if context.config.presence == "classifier":
        tests.insert(
            0,
            (
                "classifier",
                gate,
                build_classifier,
                freeze_body,
                partial(classifier_step, device=context.device),
                classifier_loader(context, data, fold, gate),
            ),
        )
    for name, config, build, freeze, step, loader in tests:
        torch.manual_seed(context.config.seed)
        model = build(config).to(context.device)
        freeze(model, config.frozen_epochs > 0)
        loader.batch_sampler.set_epoch(0, config.epochs)
        rates, losses, found = find_learning_rate(model, step, loader, steps=steps, weight_decay=config.weight_decay)
        with atomic_path(context.run.path(f"lr_{name}.csv")) as path:
            pd.DataFrame({"lr": rates, "loss": losses, "suggestion": found}).to_csv(path, index=False)
        used = config.frozen_lr if config.frozen_epochs else config.lr
        log.info(f"{name}: the loss falls fastest at {found:.2e}; the configuration has {used:.2e}")
