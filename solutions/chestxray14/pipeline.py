"""ChestX-ray14: one network per view, SDFN's (Liu et al.) fusion of both; CXR-IRNet (Fang et al.); see config.py."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from common.errors import InputError
from common.infer import tta
from common.metrics.calibration import brier, expected_calibration_error, nested_youden
from common.network import Network, predict
from common.nn.losses import bce
from common.recipe import Choice, Solution, read_predictions
from common.submit.validate import validate_probabilities
from solutions.chestxray14 import data, localise, report
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.data import CLASSES, labels_of
from solutions.chestxray14.leaks import check_run, origin
from solutions.chestxray14.lungs import add_lungs, lung_settings, segmenter_file
from solutions.chestxray14.models import auroc_and_loss, boxed_step, build_fusion, build_network
from solutions.chestxray14.scoring import by_fold, epoch_chosen, score_part
from solutions.chestxray14.views import FeatureDataset, pooled_features, view_dataset

log = logging.getLogger(__name__)
# Settings, beside those of the lungs, that `prepare` follows.
PREPARED = ("split", "n_folds", "seed", "store_size", "label_table", "boxes")
LUNGS = "lungs.safetensors"  # the exported segmenter


def networks(job):
    """Return each fold's networks, one per view, and then the layer that fuses them where the recipe has one."""
    return [network for fold in job.config.folds for network in fold_networks(job.config, fold)]


def fold_networks(config, fold):
    """Return the Networks of one fold."""
    views = [view_network(own, fold, stage) for stage, own in zip(config.stages, config.branches, strict=True)]
    return [*views, fusion_network(config, fold, views)] if config.is_fused else views


def view_network(config, fold, stage):
    """Return the network of a view, whole or lungs, by its NetworkConfig (CXR-IRNet, 3; SDFN, B.3)."""

    def dataset(job, rows, augment, targets):
        return view_dataset(job.images, rows, config, stage, augment, targets)

    step = partial(boxed_step, config.box_loss) if config.box_loss else None
    return _classifier(fold, stage, config, partial(build_network, config), dataset, step=step)


def fusion_network(config, fold, branches):
    """Return SDFN's last layer over the features of both networks, which stay as they are (B.4)."""
    mirrored = any(branch.config.augmentation != "none" for branch in branches)

    def dataset(job, rows, augment, targets):
        log.info(f"fold{fold}/fusion: features of {len(rows):,} images from both frozen networks")
        features = pooled_features(job, branches, rows, augment and mirrored)
        return FeatureDataset(features, labels_of(job.images, rows))

    return _classifier(fold, "fusion", config.fusion, partial(build_fusion, config), dataset, needs=tuple(branches))


def _classifier(fold, stage, config, build, dataset, needs=(), step=None):
    return Network(
        fold,
        stage,
        config,
        build,
        dataset,
        loss=bce,
        measure=lambda logits, labels: logits.float(),
        figures=lambda job, logits, rows: auroc_and_loss(labels_of(job.images, rows), logits),
        step=step,
        needs=needs,
        trained_on=lambda job: origin(job.config, job.images.table, fold),
    )


def suffixes(config):
    """Return the suffixes of the tables of predictions: the answer's and, with two views, each view's."""
    return ("", *(f"_{stage}" for stage in config.stages)) if config.views == "both" else ("",)


def prediction_key(config):
    """Return what predictions follow from besides weights and pixels."""
    return [config.tta, config.views, config.combine, [(one.resize, one.size) for one in config.branches]]


def predict_rows(job, folds, rows, path, title):
    """Return the tables of probabilities of one fold's networks: the answer and, with two views, each view."""
    trained, flips = fold_networks(job.config, folds[0]), "flip" in job.config.tta
    found = {f"_{stage}": np.empty((0, len(LABELS))) for stage in job.config.stages}  # split all: no test images
    for network in trained[: len(found)] if len(rows) else ():
        views = [tta.IDENTITY, *[tta.FLIP] * flips]
        found[f"_{network.stage}"] = predict(job, [network], rows, views, title).astype(np.float64)
    found[""] = np.mean(list(found.values()), axis=0)
    if job.config.is_fused:
        features = pooled_features(job, trained[:-1], rows, flips)
        found[""] = trained[-1].load(job.run).probs(features)
    ids = pd.DataFrame({"image_id": job.images.ids(rows)})
    return {name: ids.assign(**dict(zip(CLASSES, found[name].T, strict=True))) for name in suffixes(job.config)}


def mean_over_folds(suffix, tables):
    """Return the mean of the folds' probabilities of the test images."""
    table = pd.concat(tables, ignore_index=True).groupby("image_id", sort=False, as_index=False)[CLASSES].mean()
    table.insert(1, "fold", -1)
    return table


def choose(job, oof):
    """Return each class's operating point, scored on the folds that did not choose it, and the AUROCs."""
    config, images = job.config, job.images
    rows, folds = images.rows_of(oof.table["image_id"]), oof.table["fold"].to_numpy()
    truth, probs = labels_of(images, rows), oof.table[CLASSES].to_numpy()
    cuts, sensitivity, specificity = nested_youden(truth, probs, folds, images.patients(rows), config.seed)
    table = {"label": LABELS, "threshold": cuts, "sensitivity": sensitivity, "specificity": specificity}
    table = pd.DataFrame(table).assign(brier=brier(truth, probs))
    table["calibration_error"] = expected_calibration_error(truth, probs)
    thresholds = [None if np.isnan(value) else value for value in cuts.tolist()]  # labels of one kind
    parts = [("oof", oof.table), ("test", known_test(job))]
    parts = {name: score_part(images, part, config.seed) for name, part in parts}
    if parts["oof"] is None:
        raise InputError(f"{job.run.folder}: a score needs out-of-fold images of at least two patients")
    within = by_fold(truth, probs, folds)
    within |= {"mean": None} if np.isnan(within["mean"]) else {}  # JSON has no NaN
    parts["oof"][1].update(by_fold=within, epoch_chosen_on_these=epoch_chosen(config))
    classes = pd.concat([part[0].assign(split=name) for name, part in parts.items() if part], ignore_index=True)
    figures = {"auroc": parts["oof"][1]["mean"], **{name: part and part[1] for name, part in parts.items()}}
    figures["official"] = {name: value for name, value in images.about.items() if name != "pixels"}
    tables = {"operating_points.csv": table, "classes.csv": classes[["split", *classes.columns.drop("split")]]}
    rule = {"thresholds": dict(zip(LABELS, thresholds, strict=True))}
    return Choice(rule, figures["auroc"]["estimate"], figures, tables)


def known_test(job):
    """Return the predictions of the test images whose labels are known."""
    test = read_predictions(job, "test").table
    return test[~np.isnan(labels_of(job.images, job.images.rows_of(test["image_id"]))).any(axis=1)]


def describe(figures):
    """Return the lines that say the scores, out of fold and of the test images whose labels are known."""
    lines, text = [], "mean AUROC {} {estimate:.4f} [{low:.4f}, {high:.4f}] over"
    for name, where in (("oof", "out of fold"), ("test", figures["official"]["test_name"])):
        if part := figures[name]:
            size = f"{part['classes']} classes, {part['images']:,} images of {part['patients']:,} patients"
            lines.append(f"{text.format(where, **part['mean'])} {size}")
    within = figures["oof"]["by_fold"]
    if within["folds"] > 1 and within["mean"] is not None:
        lines[0] += f"; mean within each of the {within['folds']} folds {within['mean']:.4f}"
    if figures["oof"]["epoch_chosen_on_these"]:
        lines[0] += "; the epochs were chosen on these images, which inflates it"
    return lines


def hidden_score(job, submission):
    """Return the mean AUROC of the sample's test list, whose labels are in its table."""
    part = score_part(job.images, known_test(job), job.config.seed, n_resamples=1)
    return part and {"metric": "auroc", "value": part[1]["mean"]["estimate"], "nothing": 0.5}


def answer(job, test, rule, neutral):
    """Return the submission: Image Index and 14 probabilities, neutral ones for images that could not be read."""
    images = job.images.at(job.images.rows("test"))
    found = test.table.set_index("image_id")[CLASSES].reindex(images["image_id"]).to_numpy(copy=True)
    found[~images["ok"].to_numpy()] = [neutral[label] for label in LABELS]
    names = pd.DataFrame({data.SAMPLE[0]: images["file_name"].to_numpy()})
    return names.join(pd.DataFrame(found, columns=CLASSES).map(lambda value: f"{value:.6g}"))


def use_segmenter(config, files):
    """Return the configuration with the exported segmenter, where one belongs to the export."""
    weights = str(files.get(LUNGS, config.segmenter.weights))
    return replace(config, segmenter=replace(config.segmenter, weights=weights))


SOLUTION = Solution(
    "chestxray14",
    "auroc",
    made_with=lambda config: {k: v for k in PREPARED if (v := getattr(config, k)) is not None} | lung_settings(config),
    read=data.read_competition,
    refine=add_lungs,
    read_test=data.read_test,
    refine_test=add_lungs,
    networks=networks,
    before_training=lambda job: check_run(job.config, job.images.table),
    predict=predict_rows,
    suffixes=suffixes,
    pool=mean_over_folds,
    prediction_key=prediction_key,
    choose=choose,
    chosen=("operating_points.csv", "classes.csv"),
    decision_key=lambda config: None,
    describe=describe,
    neutral=lambda job: read_predictions(job, "oof").table[CLASSES].mean().to_dict(),
    answer=answer,
    check=lambda path, job: validate_probabilities(path, job.sample_path, ordered=True),
    hidden=hidden_score,
    report=report,
    further_steps=(localise.STEP,),
    assets=lambda config: {LUNGS: segmenter_file(config)} if config.needs_lungs else {},
    use_assets=use_segmenter,
)
