"""ChestX-ray14: CXR-IRNet (Fang et al.), or one network per view and SDFN's fusion (Liu et al.); see config.py."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from common.errors import check
from common.infer import tta
from common.metrics.calibration import choose_thresholds
from common.metrics.statistics import as_json
from common.network import Network, predict
from common.nn.losses import bce
from common.predictions import mean_over_folds, read_predictions
from common.recipe import Choice, Solution
from solutions.chestxray14 import data, localise, models, report
from solutions.chestxray14.comparison import COMPARISON, epoch_chosen, results, score_part
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.data import CLASSES, add_lungs, labels_of, lung_settings, segmenter_file
from solutions.chestxray14.labels import TABLES
from solutions.chestxray14.leaks import check_run, origin

# Settings that `prepare` depends on, besides those of the lungs.
PREPARED = ("split", "n_folds", "seed", "store_size", "label_table", "boxes")
LUNGS = "lungs.safetensors"  # the exported segmenter


def fold_networks(config, fold):
    """Return the Networks of one fold: those of its views (CXR-IRNet, 3; SDFN, B.3), and SDFN's last layer (B.4)."""
    views = []
    for stage, own in zip(config.stages, config.branches, strict=True):
        dataset = partial(models.view_dataset, config=own, stage=stage)
        active = np.ones(len(LABELS), bool) if own.class_patience else None
        how = {"step": partial(models.training_loss, own, active=active)}
        # box and pairwise losses are not means over images, and mixup mixes images across the whole batch
        how["couples"] = max(own.box_loss, own.auc_loss, own.mixup) > 0
        if own.class_patience:
            how["before_epoch"] = partial(models.stop_classes, own.class_patience, active)
        network = _classifier(fold, stage, own, partial(models.build_network, own), dataset, **how)
        views.append(replace(network, dataset=partial(probe_dataset, network)) if own.frozen else network)
    if not config.is_fused:
        return views
    mirrored = any(view.config.augmentation != "none" for view in views)

    def features(job, rows, augment, targets):
        return models.feature_dataset(job, views, rows, augment and mirrored)

    build = partial(models.build_fusion, config)
    return [*views, _classifier(fold, "fusion", config.fusion, build, features, needs=tuple(views))]


def check_training(job):
    """Raise InputError for weights that have seen test or held-out images, and for a box loss without boxes."""
    check_run(job.config, job.images.table)
    data.check_boxes(job)


def probe_dataset(network, job, rows, augment, targets):
    """Return a frozen network's dataset: its features with labels, or without `targets` its images."""
    flips = augment and network.config.augmentation == "flip"
    how = (job, [network], rows, flips, False)
    return models.feature_dataset(*how) if targets else network.dataset(job, rows, augment, targets)


def _classifier(fold, stage, config, build, dataset, **more):
    by_class = getattr(config, "class_patience", 0) > 0
    return Network(
        fold,
        stage,
        config,
        build,
        dataset,
        loss=bce,
        measure=lambda logits, labels: logits.float(),
        figures=lambda job, logits, rows: models.auroc_and_loss(labels_of(job.images, rows), logits, by_class),
        trained_on=lambda job: origin(job.config, job.images.table, fold),
        **more,
    )


def suffixes(config):
    """Return the suffixes of the prediction tables: that of the answer and, with two views, of each view."""
    return ("", *(f"_{stage}" for stage in config.stages)) if config.views == "both" else ("",)


def predict_rows(job, folds, rows, path, title):
    """Return the probabilities of one fold's networks: a table of the answer and, with two views, one per view."""
    trained, flips = fold_networks(job.config, folds[0]), "flip" in job.config.tta
    found = {f"_{stage}": np.empty((0, len(LABELS))) for stage in job.config.stages}  # split all: no test images
    for network in trained[: len(found)] if len(rows) else ():
        found[f"_{network.stage}"] = predict(job, [network], rows, tta.views(job.config.tta), title).astype(np.float64)
    found[""] = np.mean(list(found.values()), axis=0)
    if job.config.is_fused:
        found[""] = trained[-1].load(job.run).probs(models.pooled_features(job, trained[:-1], rows, flips))
    ids = pd.DataFrame({"image_id": job.images.ids(rows)})
    return {name: ids.assign(**dict(zip(CLASSES, found[name].T, strict=True))) for name in suffixes(job.config)}


def choose(job, oof):
    """Return the AUROCs and each class's threshold by Youden's index. (The page tunes each fold's on the others.)"""
    config, images = job.config, job.images
    truth = labels_of(images, images.rows_of(oof.table["image_id"]))
    cuts = choose_thresholds(truth, oof.table[CLASSES].to_numpy())
    parts = {name: score_part(results(job, name)[""], config.seed) for name in ("oof", "test")}
    check(parts["oof"] is not None, f"{job.run.folder}: a score needs out-of-fold images of at least two patients")
    parts["oof"][1]["epoch_chosen_on_these"] = epoch_chosen(config)
    classes = pd.concat([part[0].assign(split=name) for name, part in parts.items() if part], ignore_index=True)
    figures = {"auroc": parts["oof"][1]["mean"], **{name: part and part[1] for name, part in parts.items()}}
    figures["official"] = {name: value for name, value in images.about.items() if name != "pixels"}
    tables = {"classes.csv": classes[["split", *classes.columns.drop("split")]]}
    rule = {"thresholds": {label: as_json(cut) for label, cut in zip(LABELS, cuts, strict=True)}}
    return Choice(rule, figures["auroc"]["estimate"], figures, tables)


def describe(figures):
    """Return lines of text with the scores, out of fold and on the labelled test images."""
    lines, text = [], "mean AUROC {} {estimate:.4f} [{low:.4f}, {high:.4f}] over"
    for name, where in (("oof", "out of fold"), ("test", figures["official"]["test_name"])):
        if part := figures[name]:
            size = f"{part['classes']} classes, {part['images']:,} images of {part['patients']:,} patients"
            lines.append(f"{text.format(where, **part['mean'])} {size}")
    if figures["oof"]["epoch_chosen_on_these"]:
        lines[0] += "; the epochs were chosen on these images, which inflates it"
    return lines


def answer(job, test, rule, neutral):
    """Return the submission: Image Index and 14 probabilities, neutral ones for images that could not be read."""
    images = job.images.at(job.images.rows("test"))
    found = test.table.set_index("image_id")[CLASSES].reindex(images["image_id"]).to_numpy(copy=True)
    found[~images["ok"].to_numpy()] = [neutral[label] for label in LABELS]
    names = pd.DataFrame({data.SAMPLE[0]: images["file_name"].to_numpy()})
    return names.join(pd.DataFrame(found, columns=CLASSES).map(lambda value: f"{value:.6g}"))


def use_segmenter(config, files):
    """Return the configuration with the exported segmenter if the export contains one."""
    weights = str(files.get(LUNGS, config.segmenter.weights))
    return replace(config, segmenter=replace(config.segmenter, weights=weights))


SOLUTION = Solution(
    "chestxray14",
    "auroc",
    made_with=lambda config: {k: v for k in PREPARED if (v := getattr(config, k)) is not None} | lung_settings(config),
    read=data.read_competition,
    refine=add_lungs,
    read_test=data.read_test,
    networks=lambda job: [network for fold in job.config.folds for network in fold_networks(job.config, fold)],
    before_training=check_training,
    predict=predict_rows,
    suffixes=suffixes,
    pool=mean_over_folds,
    choose=choose,
    chosen=("classes.csv",),
    describe=describe,
    neutral=lambda job: read_predictions(job, "oof").table[CLASSES].mean().to_dict(),
    answer=answer,
    comparison=COMPARISON,
    hidden=TABLES["2017"],
    report=report,
    further_steps=(localise.STEP,),
    assets=lambda config: {LUNGS: segmenter_file(config)} if config.needs_lungs else {},
    use_assets=use_segmenter,
)
