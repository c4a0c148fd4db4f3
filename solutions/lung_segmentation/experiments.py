"""Further verbs: the paper's ablation, training across datasets, and the export of one network."""

import logging
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from common.config import file_hash, to_dict
from common.errors import InputError
from common.infer.tta import views
from common.metrics.segmentation import counts_from_areas, dice
from common.metrics.statistics import paired_bootstrap
from common.network import predict, train, with_rate
from common.paths import write_csv
from common.recipe import read_rule, read_score
from common.runs import git_revision
from solutions.lung_segmentation.data import true_masks
from solutions.lung_segmentation.postprocess import MaskRule, figures, measure
from solutions.lung_segmentation.segmenter import save_segmenter

log = logging.getLogger(__name__)
SCRATCH = "experiments"  # folder in the run for temporary probabilities
RULE = MaskRule()
# Berger et al., table 2, in percent: dice, precision, recall, accuracy
PUBLISHED = {"simple": (97.9, 97.0, 97.0, 98.4), "complex": (96.2, 96.7, 95.6, 98.0)}
# SGD takes steps of the gradient's size, Adam of the rate's, so that the same rate would not be comparable.
SGD_RATE = 100  # times Adam's
METRICS = ("dice", "precision", "recall", "accuracy")


def experiment_key(job):
    """Return what the results of `ablate` and `cross` depend on."""
    config = job.config
    return [job.images.key, to_dict(config.network), config.folds, config.validation, config.tta, config.seed]


def run_ablation(job):
    """Train with simple and with complex augmentation, and with SGD; score on the held-out folds: ablation.csv.

    Columns: augmentation; dice, precision, recall and accuracy with _low and _high, as means over images and over the
    pooled pixels (_pooled); dice_change and p, against simple, paired; paper_<metric>. All at the probability 0.5.
    """
    config, images, results = job.config, job.images, {}
    rows = np.concatenate([images.rows(folds=[fold]) for fold in config.folds])
    about, base = images.at(rows), with_rate(job, job.recipe.networks(job)[0]).config
    simple = replace(base, augmentation="simple")
    rates = {"lr": SGD_RATE * base.lr, "frozen_lr": SGD_RATE * base.frozen_lr}
    variants = {"simple": simple, "complex": replace(base, augmentation="complex")}
    for name, network in (variants | {"simple, sgd": replace(simple, optimizer="sgd", **rates)}).items():
        areas = []
        for one in job.recipe.networks(job.with_config(network=network)):
            one = one if network == base else replace(one, stage=f"network-{name.replace(', ', '-')}")
            areas.append(_areas(job, one, images.rows(folds=[one.fold]), f"fold {one.fold}"))
        results[name] = np.concatenate(areas)
    scores = {name: dice(counts_from_areas(*areas[:, 0].T)) for name, areas in results.items()}
    table = []
    for name, areas in results.items():
        found, _ = figures(about, areas, config.structures)
        row = {"augmentation": name, "images": len(rows), **_flatten(found, METRICS)}
        if name != "simple":
            change, p = paired_bootstrap(scores[name], scores["simple"], about["patient_id"].to_numpy())
            row |= {"dice_change": change.estimate, "p": p}
        row |= {f"paper_{m}": value / 100 for m, value in zip(METRICS, PUBLISHED.get(name, ()), strict=False)}
        table.append(row)
    _finish(job, "ablation.csv", pd.DataFrame(table))


def run_cross(job):
    """Train on each dataset alone and score on all of them; writes cross.csv.

    Columns: trained, tested, images, dice and iou, each also pooled, with low and high, and trained_on, a number of
    images. A network is scored on its own dataset's held-out images, and on all of the others'.
    """
    config, images = job.config, job.images
    every = images.rows()
    names = sorted(images.at(every)["dataset"].unique())
    if len(names) < 2:
        raise InputError(f"cross needs two datasets, but there is only {names[0]}")

    def of(name, rows):
        return rows[(images.at(rows)["dataset"] == name).to_numpy()]

    own = with_rate(job, job.recipe.networks(job)[0])
    rows, validation = own.rows(job, own.fold)
    held_out = images.rows(folds=[own.fold])
    for name in names:
        validating, held = len(of(name, validation)), len(of(name, held_out))
        if validating < 1 or held < 2:
            raise InputError(
                f"cross needs an image to validate on and two held out of each dataset: {name} has {validating} and "
                f"{held} with fold {own.fold}; choose another fold, fewer n_folds or more validation"
            )
    table = []
    for trained in [*names, "all"]:
        parts, network = (rows, validation), own
        if trained != "all":
            parts = of(trained, rows), of(trained, validation)
            network = replace(own, stage=f"network-{trained}", rows=lambda job, fold, parts=parts: parts)
        for tested in names:
            tests = of(tested, held_out if trained in (tested, "all") else every)
            areas = _areas(job, network, tests, f"on {tested}")
            found, _ = figures(images.at(tests), areas, config.structures)
            row = {"trained": trained, "tested": tested, "images": len(tests), **_flatten(found, ("dice", "iou"))}
            table.append(row | {"trained_on": len(parts[0])})
    _finish(job, "cross.csv", pd.DataFrame(table))


def _areas(job, network, rows, title):
    """Return the pixel counts (N, S, 4) of a network on store rows at the probability 0.5; trains it if necessary."""
    train(job, network)
    seen = views(job.config.tta, job.config.structures != "lungs")
    probs = predict(job, [network], rows, seen, title, job.run.path(SCRATCH, "probs.npy"))
    return measure(partial(true_masks, job.images), rows, probs, [RULE], job.config.structures)[:, 0]


def _flatten(found, metrics):
    values = {}
    for name in [f"{metric}{form}" for metric in metrics for form in ("", "_pooled")]:
        interval = found[name]
        values |= {name: interval["estimate"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
    return values


def _finish(job, name, table):
    write_csv(job.run.path(name), table)
    shutil.rmtree(job.run.path(SCRATCH), ignore_errors=True)
    columns = [c for c in table.columns if not c.startswith(("precision", "recall", "accuracy", "iou", "paper"))]
    for line in table[columns].to_string(index=False, float_format=lambda v: f"{v:.4f}").splitlines():
        log.info(line)


def export_segmenter(job):
    """Write lungs.safetensors into the run: the first fold's network in half precision, the rule and its score."""
    run, config = job.run, job.config
    rule, score, network = read_rule(job)["rule"], read_score(job), job.recipe.networks(job)[0]
    train = job.images.at(job.images.rows())
    about = {
        "network": to_dict(config.network),
        "structures": config.structures,
        "pixel": rule["pixel"],
        "regions": rule["regions"],
        "command": f"cxr lung_segmentation run {job.preset}",
        "config": to_dict(config),
        "exported_by": git_revision(),
        "weights_of_run": file_hash(network.weights(run)),
        "held_out_folds": list(config.folds),
        "images": train["dataset"].value_counts().to_dict(),
        "dice": {name: part["dice"] for name, part in {"all": score, **score["datasets"]}.items()},
    }
    path = run.path("lungs.safetensors")
    save_segmenter(path, network.load(run), about)
    log.info(f"{path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {file_hash(path)}")
