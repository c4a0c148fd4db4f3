"""Further verbs: the paper's ablation, training across datasets, and the export of one network."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from common.config import file_hash, to_dict
from common.errors import InputError, check, log
from common.infer.tta import views
from common.metrics.statistics import paired_bootstrap
from common.network import predict, train, with_rate
from common.paths import write_csv
from common.recipe import read_rule, read_score
from common.runs import git_revision
from common.step import Step
from solutions.lung_segmentation.data import true_masks
from solutions.lung_segmentation.postprocess import MaskRule, figures, measure
from solutions.lung_segmentation.segmenter import save_segmenter

SCRATCH = "experiments"  # folder in the run for temporary probabilities
RULE = MaskRule()
# Berger et al., table 2, in percent: dice, precision, recall, accuracy
PUBLISHED = {"simple": (97.9, 97.0, 97.0, 98.4), "complex": (96.2, 96.7, 95.6, 98.0)}
# SGD's steps scale with the gradient, Adam's with the learning rate alone, so equal rates would not be comparable.
SGD_RATE = 100  # times Adam's rate
METRICS = ("dice", "precision", "recall", "accuracy")


def experiment_key(job):
    """Return the settings and inputs that the results of `ablate` and `cross` depend on."""
    config = job.config
    return [job.images.key, to_dict(config.network), config.folds, config.validation, config.tta, config.seed]


def run_ablation(job):
    """Train with simple and with complex augmentation, and with SGD; score on the held-out folds: ablation.csv.

    Columns: augmentation; dice, precision, recall and accuracy with _low and _high, as means over images and over
    pooled pixels (_pooled); dice_change and p, paired against simple; paper_<metric>. All at a threshold of 0.5.
    """
    config, images, table, simple = job.config, job.images, [], None
    about = images.at(np.concatenate([images.rows(folds=[fold]) for fold in config.folds]))
    base = with_rate(job, job.recipe.networks(job)[0]).config
    rates = {"lr": SGD_RATE * base.lr, "frozen_lr": SGD_RATE * base.frozen_lr}
    variants = {"simple": {}, "complex": {"augmentation": "complex"}, "simple, sgd": {"optimizer": "sgd", **rates}}
    for name, changes in variants.items():
        network, areas = replace(base, **{"augmentation": "simple"} | changes), []
        for one in job.recipe.networks(job.with_config(network=network)):
            one = one if network == base else replace(one, stage=f"network-{name.replace(', ', '-')}")
            areas.append(_areas(job, one, images.rows(folds=[one.fold]), f"fold {one.fold}"))
        row, dice = _row(about, np.concatenate(areas), config.structures, METRICS)
        simple = dice if simple is None else simple
        if simple is not dice:
            change, p = paired_bootstrap(dice, simple, about["patient_id"].to_numpy())
            row |= {"dice_change": change.estimate, "p": p}
        row |= {f"paper_{m}": value / 100 for m, value in zip(METRICS, PUBLISHED.get(name, ()), strict=False)}
        table.append({"augmentation": name} | row)
    _finish(job, "ablation.csv", table)


def run_cross(job):
    """Train on each dataset alone and on all together, score each network on every dataset, and write cross.csv.

    Columns: trained, tested, images; dice and iou, each also pooled, with _low and _high; trained_on (number of
    images). A network is scored on the held-out images of a dataset it was trained on, and on all images of another.
    """
    images, table, every = job.images, [], job.images.rows()
    names = sorted(images.at(every)["dataset"].unique())
    check(len(names) >= 2, f"cross needs two datasets, but there is only {names[0]}")

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
    for trained in [*names, "all"]:
        parts, network = (rows, validation), own
        if trained != "all":
            parts = of(trained, rows), of(trained, validation)
            network = replace(own, stage=f"network-{trained}", rows=lambda job, fold, parts=parts: parts)
        for tested in names:
            tests = of(tested, held_out if trained in (tested, "all") else every)
            areas = _areas(job, network, tests, f"on {tested}")
            row, _ = _row(images.at(tests), areas, job.config.structures, ("dice", "iou"))
            table.append({"trained": trained, "tested": tested} | row | {"trained_on": len(parts[0])})
    _finish(job, "cross.csv", table)


def _areas(job, network, rows, title):
    """Return a network's pixel counts (N, S, 4) for store rows at a threshold of 0.5; train it if necessary."""
    train(job, network)
    seen = views(job.config.tta, job.config.structures != "lungs")
    probs = predict(job, [network], rows, seen, title, job.run.path(SCRATCH, "probs.b2nd"))
    return measure(partial(true_masks, job.images), rows, probs, [RULE], job.config.structures)[:, 0]


def _row(about, areas, structures, metrics):
    """Return the metrics of images as a flat dict, and each image's Dice, (N,)."""
    (found, scored), row = figures(about, areas, structures), {"images": len(about)}
    for name in [f"{metric}{form}" for metric in metrics for form in ("", "_pooled")]:
        estimate, low, high = found[name].values()
        row |= {name: estimate, f"{name}_low": low, f"{name}_high": high}
    return row, scored["dice"].to_numpy()


def _finish(job, name, rows):
    table = pd.DataFrame(rows)
    write_csv(job.run.path(name), table)
    shutil.rmtree(job.run.path(SCRATCH), ignore_errors=True)
    columns = [c for c in table.columns if not c.startswith(("precision", "recall", "accuracy", "iou", "paper"))]
    log.info(table[columns].to_string(index=False, float_format="%.4f".__mod__))


ABLATION = Step("ablate", run_ablation, reads=experiment_key, files=("ablation.csv",))
CROSS = Step("cross", run_cross, reads=experiment_key, files=("cross.csv",))


def export_segmenter(job):
    """Write lungs.safetensors into the run: the first fold's network in half precision, the rule and its score.

    Networks of further folds are written to lungs_fold<k>.safetensors.
    """
    run, config = job.run, job.config
    rule, score, (first, *more) = read_rule(job)["rule"], read_score(job), job.recipe.networks(job)
    about = {
        "network": to_dict(config.network),
        "structures": config.structures,
        "pixel": rule["pixel"],
        "regions": rule["regions"],
        "command": f"cxr lung_segmentation run {job.preset}",
        "config": to_dict(config),
        "exported_by": git_revision(),
        "held_out_folds": list(config.folds),
        "images": job.images.at(job.images.rows())["dataset"].value_counts().to_dict(),
        "dice": {name: part["dice"] for name, part in {"all": score, **score["datasets"]}.items()},
    }
    for name, network in (("lungs", first), *((f"lungs_fold{network.fold}", network) for network in more)):
        path = run.path(f"{name}.safetensors")
        save_segmenter(path, network.load(run), about | {"weights_of_run": file_hash(network.weights(run))})
        log.info(f"{path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {file_hash(path)}")
