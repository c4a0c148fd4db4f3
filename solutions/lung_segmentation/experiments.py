"""Beside the recipe: the paper's ablation, training across datasets, range tests, and a network to give away."""

import dataclasses
import logging
import shutil
from functools import partial

import numpy as np
import pandas as pd
import torch

from common.config import file_hash, to_dict
from common.errors import InputError
from common.metrics.segmentation import dice
from common.metrics.statistics import paired_bootstrap
from common.paths import read_json
from common.runs import git_revision
from common.steps import write_csv
from common.train.lr_finder import find_learning_rate
from solutions.lung_segmentation.config import STRUCTURES
from solutions.lung_segmentation.data import open_prepared
from solutions.lung_segmentation.models import build_network, freeze_encoder, load_network, mask_loss
from solutions.lung_segmentation.pipeline import (
    STAGE,
    experiment_key,
    fold_weights,
    predict_rows,
    read_rule,
    score_key,
    train_network,
)
from solutions.lung_segmentation.scoring import MaskRule, figures, measure
from solutions.lung_segmentation.segmenter import save_segmenter
from solutions.lung_segmentation.training import step, train_loader

log = logging.getLogger(__name__)
SCRATCH = "experiments"  # folder of the run for probabilities that only these need
RULE = MaskRule()
# Berger et al., table 2, in percent: dice, precision, recall, accuracy
PUBLISHED = {"simple": (97.9, 97.0, 97.0, 98.4), "complex": (96.2, 96.7, 95.6, 98.0)}
METRICS = ("dice", "precision", "recall", "accuracy")


def run_ablation(context):
    """Train with simple and with complex augmentation and score both on the held-out folds; writes ablation.csv.

    Columns: augmentation; for each of dice, precision, recall and accuracy the estimate, low and high, as the mean over
    images (<metric>) and over the pooled pixels (<metric>_pooled); dice_change and p, complex against simple, paired;
    paper_<metric>. At the probability 0.5. Missing trainings are made, the run's own is used where it is one of them.
    """
    data, config = open_prepared(context), context.config
    rows = np.concatenate([data.rows(folds=[fold]) for fold in config.folds])
    about = _about(data, rows)
    results = {}
    for name in PUBLISHED:
        network, areas = dataclasses.replace(config.network, augmentation=name), []
        for fold in config.folds:
            folder = f"fold{fold}" if name == config.network.augmentation else f"{name}-fold{fold}"
            fitted = train_network(context, data, *data.parts(fold, config), folder, fold, network)
            areas.append(_areas(context, data, fitted, data.rows(folds=[fold]), f"{name}, fold {fold}"))
        results[name] = np.concatenate(areas)
    scores = {name: dice(_cells(areas)) for name, areas in results.items()}
    table = []
    for name, areas in results.items():
        found, _ = figures(about, areas, config.structures)
        row = {"augmentation": name, "images": len(rows), **_flat(found, METRICS)}
        if name == "complex":
            change, p = paired_bootstrap(scores[name], scores["simple"], about["patient_id"].to_numpy())
            row |= {"dice_change": change.estimate, "p": p}
        row |= {f"paper_{m}": value / 100 for m, value in zip(METRICS, PUBLISHED[name], strict=True)}
        table.append(row)
    _finish(context, data, "ablation", pd.DataFrame(table))


def run_cross(context):
    """Train on each dataset alone and score on all of them; writes cross.csv.

    Columns: trained, tested, images, then dice and iou, each also pooled, with low and high, and trained_on, the number
    of images. A dataset's own row scores its
    held-out first fold, which no network of the table has seen; the others score every image of the other dataset. The
    rows `all` are the run's own network, on the same held-out fold. At the probability 0.5.
    """
    data, config = open_prepared(context), context.config
    train = data.table[data.table["split"] == "train"]
    names = sorted(train["dataset"].unique())
    if len(names) < 2:
        raise InputError(f"cross needs two datasets, there is {names[0]} alone")
    fold = config.folds[0]
    of = dict(zip(train["row"], train["dataset"], strict=True))
    held_out = data.rows(folds=[fold])
    for name in names:
        validating, held = ([of[row] for row in rows].count(name) for rows in (data.parts(fold, config)[1], held_out))
        if validating < 1 or held < 2:
            raise InputError(
                f"cross needs an image to validate on and two held out of each dataset: {name} has {validating} and "
                f"{held} with fold {fold}; choose another fold, fewer n_folds or more validation"
            )
    table = []
    for trained in [*names, "all"]:
        parts = list(data.parts(fold, config))
        if trained == "all":
            fitted = train_network(context, data, *parts, f"fold{fold}", fold)
        else:
            parts = [rows[[of[row] == trained for row in rows]] for rows in parts]
            fitted = train_network(context, data, *parts, f"{trained}-fold{fold}", fold)
        for tested in names:
            rows = held_out if trained in (tested, "all") else train["row"].to_numpy()
            rows = rows[[of[row] == tested for row in rows]]
            areas = _areas(context, data, fitted, rows, f"{trained} to {tested}")
            found, _ = figures(_about(data, rows), areas, config.structures)
            row = {"trained": trained, "tested": tested, "images": len(rows), **_flat(found, ("dice", "iou"))}
            table.append(row | {"trained_on": len(parts[0])})
    _finish(context, data, "cross", pd.DataFrame(table))


def _areas(context, data, fitted, rows, title):
    """Pixel counts (N, S, 4) of one network on `rows`, at the probability 0.5."""
    path = context.run.path(SCRATCH, "probs.npy")
    probs = predict_rows(context, data, [fitted.folder / "final.safetensors"], rows, path, title)
    return measure(data, rows, probs, [RULE], context.config.structures)[:, 0]


def _about(data, rows):
    return data.table.set_index("row").loc[rows].reset_index()


def _cells(areas):
    both, predicted, true, pixels = areas[:, 0].T
    return np.stack([both, predicted - both, true - both, pixels - predicted - true + both], 1)


def _flat(found, metrics):
    values = {}
    for name in [f"{metric}{form}" for metric in metrics for form in ("", "_pooled")]:
        interval = found[name]
        values |= {name: interval["estimate"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
    return values


def _finish(context, data, name, table):
    write_csv(context.run.path(f"{name}.csv"), table)
    context.run.record(name, experiment_key(context, data))
    shutil.rmtree(context.run.path(SCRATCH), ignore_errors=True)
    shown = [c for c in table.columns if not c.startswith(("precision", "recall", "accuracy", "iou", "paper"))]
    for line in table[shown].to_string(index=False, float_format=lambda v: f"{v:.4f}").splitlines():
        log.info(line)


def find_learning_rates(context, data, steps=100):
    """Range test of the network on the first fold's batches, frozen as in its first epoch; writes lr_network.csv."""
    config, fold = context.config.network, context.config.folds[0]
    torch.manual_seed(context.config.seed)
    model = build_network(config, len(STRUCTURES[context.config.structures])).to(context.device)
    freeze_encoder(model, config.frozen_epochs > 0)
    loader = train_loader(context, data, data.parts(fold, context.config)[0], config)
    loader.batch_sampler.set_epoch(0, config.epochs)
    one = partial(step, loss=mask_loss(config.loss), device=context.device)
    rates, losses, found = find_learning_rate(model, one, loader, steps=steps, weight_decay=config.weight_decay)
    table = pd.DataFrame({"lr": rates, "loss": losses, "suggestion": found})
    write_csv(context.run.path(f"lr_{STAGE}.csv"), table)
    context.run.record("find_lr", experiment_key(context, data))
    used = config.frozen_lr if config.frozen_epochs else config.lr
    log.info(f"{STAGE}: the loss falls fastest at {found:.2e}; the configuration has {used:.2e}")


def export_network(context):
    """Write lungs.safetensors into the run: the first fold's network in half precision, its rule and its figures."""
    run, config = context.run, context.config
    rule, weights = read_rule(context), fold_weights(run, config.folds[0])
    if not run.is_done("score", score_key(run), ["score.json"]):
        raise InputError(f"{run.folder}: no score of this rule yet; run the verb `score` before `export`")
    score = read_json(run.path("score.json"))
    model = load_network(config.network, len(STRUCTURES[config.structures]), weights)
    train = open_prepared(context).table.query("split == 'train'")
    about = {
        "network": to_dict(config.network),
        "structures": config.structures,
        "pixel": rule.pixel,
        "regions": rule.regions,
        "command": f"python -m solutions lung_segmentation run {context.preset}",
        "config": to_dict(config),
        "exported_by": git_revision(),
        "weights_of_run": file_hash(weights),
        "held_out_folds": list(config.folds),
        "images": train["dataset"].value_counts().to_dict(),
        "dice": {name: part["dice"] for name, part in {"all": score, **score["datasets"]}.items()},
    }
    path = run.path("lungs.safetensors")
    save_segmenter(path, model, about)
    log.info(f"{path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {file_hash(path)}")
