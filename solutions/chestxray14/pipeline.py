"""The recipe: one network a view, their fusion, and a table of 14 probabilities."""

import logging
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd

from common.config import file_hash, to_dict
from common.errors import InputError
from common.metrics.calibration import brier, expected_calibration_error, nested_youden
from common.metrics.classification import auroc, mean_of_defined
from common.metrics.statistics import Interval
from common.paths import read_json, read_parquet, write_json
from common.report.frame import write_report
from common.steps import (
    as_interval,
    check_predicted,
    copy_submission,
    fresh,
    keep_config,
    trained_weights,
    write_csv,
    write_table,
)
from common.submit.table import write_submission
from common.submit.validate import validate_probabilities
from common.train.loop import fit
from solutions.chestxray14 import report as page
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.data import open_prepared, prepare_competition
from solutions.chestxray14.leaks import check_run, origin
from solutions.chestxray14.models import build_fusion, build_network, load_fusion, load_network
from solutions.chestxray14.scoring import by_fold, class_table, epoch_chosen, undefined
from solutions.chestxray14.training import (
    figures,
    fusion_figures,
    fusion_loader,
    held_out_loader,
    pooled_features,
    predict_view,
    step,
    train_loader,
)

log = logging.getLogger(__name__)
FUSION = "fusion"
FIGURES = 2  # raised where `tune` comes to measure something else
TUNED = ("tuned.json", "operating_points.csv", "score.json", "classes.csv")


def prepare(context):
    """Competition files to the image table, the folds and the store; the lungs, where the recipe needs them."""
    prepare_competition(context)


# ---- training ------------------------------------------------------------------------------------------------------


def train(context):
    """Each fold's networks, one a view, then the layer that fuses them where the recipe has one."""
    data = open_prepared(context)
    check_run(context.config, data.table)
    for fold in context.config.folds:
        for stage in context.config.stages:
            train_view(context, data, fold, stage)
        if _is_fused(context.config):
            train_fusion(context, data, fold)
        keep_config(context)


def train_view(context, data, fold, stage):
    """The network of one fold and view, in the folder fold<k>/<stage>; returns what `fit` does."""
    config, held_out = getattr(context.config, stage), data.rows(folds=[fold])
    shown = held_out_loader(context, data, held_out, config, stage)
    folder = context.run.path(f"fold{fold}", stage)
    return fit(
        fresh(context, folder, fold, partial(build_network, config)),
        partial(step, device=context.device),
        train_loader(context, data, _others(context, data, fold), config, stage),
        partial(figures, loader=shown, data=data, rows=held_out, device=context.device),
        config,
        folder,
        device=context.device,
        seed=context.config.seed + fold,
        budget=context.budget,
        about=[data.key, fold, stage],
        trained_on=origin(context.config, data.table, fold),
    )


def train_fusion(context, data, fold):
    """SDFN's last layer over the frozen networks of one fold, in the folder fold<k>/fusion; returns what `fit` does."""
    config, held_out = context.config.fusion, data.rows(folds=[fold])
    folder, branches = context.run.path(f"fold{fold}", FUSION), _branches(context, fold)
    rows = _others(context, data, fold)
    widths = [model.width for model in branches.values()]
    if (folder / "final.safetensors").is_file():  # `fit` only looks whether it is this training
        features = [np.empty((len(part), 1, sum(widths)), np.float32) for part in (rows, held_out)]
    else:
        log.info(f"fold{fold}/{FUSION}: features of {len(rows) + len(held_out)} images from both frozen networks")
        features = [
            pooled_features(context, data, part, branches, context.config, flips, shared=True)
            for part, flips in ((rows, True), (held_out, False))
        ]
    return fit(
        fresh(context, folder, fold, lambda weights=None: build_fusion(*widths)),
        partial(step, device=context.device),
        fusion_loader(context, data, rows, features[0], config),
        partial(fusion_figures, features=features[1], data=data, rows=held_out, device=context.device),
        config,
        folder,
        device=context.device,
        seed=context.config.seed + fold,
        budget=context.budget,
        about=[data.key, fold, FUSION, [file_hash(trained_weights(context.run, fold, s)) for s in branches]],
        trained_on=origin(context.config, data.table, fold),
    )


def _others(context, data, fold):
    return data.rows(folds=[k for k in range(context.config.n_folds) if k != fold])


def _is_fused(config):
    return config.views == "both" and config.combine == "fusion"


def trained_stages(config):
    """Names of what a fold trains, in this order: the networks, then the layer that fuses them."""
    return [*config.stages, *[FUSION] * _is_fused(config)]


def _branches(context, fold):
    config = context.config
    return {
        stage: load_network(getattr(config, stage), trained_weights(context.run, fold, stage))
        for stage in config.stages
    }


# ---- prediction ----------------------------------------------------------------------------------------------------


def predicted_files(config):
    """Names of the tables that `predict` writes: the answers, and with two views those of each."""
    parts = ["", *(f"_{stage}" for stage in config.stages)] if config.views == "both" else [""]
    return tuple(f"{name}{part}.parquet" for name in ("oof", "test") for part in parts)


def predict(context):
    """Probabilities out of fold, and of the test images as the mean over the folds' networks."""
    data, run, config = open_prepared(context), context.run, context.config
    key, files = predict_key(context, data), predicted_files(config)
    if run.is_done("predict", key, files):
        log.info("predict: up to date")
        return
    for made in ("predict", "tune", "score", "submit"):  # these follow from it: no report of theirs in between
        run.forget(made)
    test = data.rows("test")
    tables = {file: [] for file in files}
    for fold in config.folds:
        rows = {"oof": data.rows(folds=[fold]), "test": test}
        for file, part in _fold_tables(context, data, key, fold, rows, files).items():
            tables[file].append(part)
    for file, parts in tables.items():
        table = pd.concat(parts, ignore_index=True)
        write_table(run.path(file), _mean_over_folds(table) if file.startswith("test") else table)
    keep_config(context)
    run.record("predict", key, images=len(test) + sum(len(data.rows(folds=[fold])) for fold in config.folds))
    for fold in config.folds:  # the parts have done their duty
        for file in files:
            run.path(f"fold{fold}", file).unlink(missing_ok=True)
    log.info(f"predicted {sum(map(len, tables['oof.parquet'])):,} images out of fold and {len(test):,} test images")


def predict_test(context, data):
    """Probabilities of the test images as the mean over the folds' networks: the table test.parquet.

    The folds' parts stay in the run; what is there already is not computed again.
    """
    key, rows = predict_key(context, data), {"test": data.rows("test")}
    parts = [_fold_tables(context, data, key, fold, rows, ["test.parquet"]) for fold in context.config.folds]
    return _mean_over_folds(pd.concat([part["test.parquet"] for part in parts], ignore_index=True))


def _fold_tables(context, data, key, fold, rows, files):
    """What one fold's networks say of `rows` (name → rows) as tables by file name, kept in the fold's folder."""
    run, parts = context.run, [f"fold{fold}/{file}" for file in files]
    if not run.is_done(f"predict fold{fold}", key, parts):
        for name, its in rows.items():
            for part, probs in predict_rows(context, data, fold, its, name).items():
                if f"{name}{part}.parquet" not in files:
                    continue
                table = pd.DataFrame(probs, columns=LABELS)
                table.insert(0, "fold", fold)
                table.insert(0, "image_id", data.ids(its))
                write_table(run.path(f"fold{fold}", f"{name}{part}.parquet"), table)
        run.record(f"predict fold{fold}", key)
    return {file: read_parquet(run.path(part)) for file, part in zip(files, parts, strict=True)}


def _mean_over_folds(table):
    table = table.groupby("image_id", sort=False, as_index=False)[list(LABELS)].mean()
    table.insert(1, "fold", -1)
    return table


def predict_rows(context, data, fold, rows, name):
    """Probabilities (n, 14) of `rows` by one fold's networks: the answer under "", each view's under "_<stage>"."""
    config, branches = context.config, _branches(context, fold)
    if not len(rows):  # split all holds no test images back
        return dict.fromkeys(["", *(f"_{stage}" for stage in config.stages)], np.empty((0, len(LABELS))))
    found = {
        f"_{stage}": predict_view(
            [model],
            data,
            rows,
            getattr(config, stage),
            stage,
            context.device,
            config.tta,
            context.workers,
            f"{name}, fold {fold}, {stage}",
        )
        for stage, model in branches.items()
    }
    if config.views != "both":
        return {"": next(iter(found.values()))}
    if not _is_fused(config):
        return {"": np.mean(list(found.values()), axis=0), **found}
    widths = [model.width for model in branches.values()]
    fusion = load_fusion(*widths, trained_weights(context.run, fold, FUSION))
    flips = "flip" in config.tta
    features = pooled_features(context, data, rows, branches, config, flips)
    return {"": fusion.probs(features, flips), **found}


def predict_key(context, data):
    """What the predictions follow from: weights, views, and the very pixels (a bad image may have been replaced)."""
    config = context.config
    stages = trained_stages(config)
    weights = [file_hash(trained_weights(context.run, fold, stage)) for fold in config.folds for stage in stages]
    made = [
        [getattr(config, stage).resize, getattr(config, stage).size, getattr(config, stage).precision]
        for stage in config.stages
    ]
    return [
        data.key,
        weights,
        list(config.tta),
        config.views,
        config.combine,
        made,
        data.pixels_key,
        data.rows("test").tolist(),
    ]


# ---- scores --------------------------------------------------------------------------------------------------------


def tune(context):
    """Operating points, each fold's chosen on the others, and the tables of the score."""
    data, run, config = open_prepared(context), context.run, context.config
    key = _tune_key(context, data)
    if run.is_done("tune", key, TUNED):
        log.info("tune: up to date")
        return
    for made in ("tune", "score", "submit"):
        run.forget(made)
    oof = read_parquet(run.path("oof.parquet"))
    rows = data.rows_of(oof["image_id"])
    truth, probs = data.labels(rows), oof[list(LABELS)].to_numpy()
    points = nested_youden(truth, probs, oof["fold"].to_numpy(), data.patients(rows), config.seed)
    table = pd.DataFrame(
        {
            "label": LABELS,
            "threshold": points.thresholds,
            "sensitivity": points.sensitivity,
            "specificity": points.specificity,
            "brier": brier(truth, probs),
            "calibration_error": expected_calibration_error(truth, probs),
        }
    )
    write_csv(run.path("operating_points.csv"), table)
    thresholds = [None if np.isnan(value) else value for value in points.thresholds.tolist()]  # labels of one kind
    write_json(run.path("tuned.json"), {"thresholds": dict(zip(LABELS, thresholds, strict=True))})
    parts = {
        "oof": score_part(data, oof, config.seed),
        "test": score_part(data, _known_test(context, data), config.seed),
    }
    if parts["oof"] is None:
        raise InputError(f"{run.folder}: a score needs out-of-fold images of at least two patients")
    within = by_fold(truth, probs, oof["fold"].to_numpy())
    within["mean"] = None if np.isnan(within["mean"]) else within["mean"]  # JSON has no NaN
    parts["oof"][1].update(by_fold=within, epoch_chosen_on_these=epoch_chosen(config))
    classes = [part[0].assign(split=name) for name, part in parts.items() if part]
    classes = pd.concat(classes, ignore_index=True)
    write_csv(run.path("classes.csv"), classes[["split", *classes.columns.drop("split")]])
    write_json(
        run.path("score.json"),
        {
            "auroc": parts["oof"][1]["mean"],
            **{name: part and part[1] for name, part in parts.items()},
            "official": data.official,
        },
    )
    keep_config(context)
    run.record("tune", key, score=parts["oof"][1]["mean"]["estimate"])
    log.info(f"operating points of {len(LABELS)} classes, nested by {points.nested_by}")


def _known_test(context, data):
    """The test predictions of the images whose labels are known."""
    test = read_parquet(context.run.path("test.parquet"))
    known = ~np.isnan(data.labels(data.rows_of(test["image_id"]))).any(axis=1)
    return test[known]


def score_part(data, table, seed, n_resamples=1000):
    """Per-class figures and the summary of predictions with known labels; None where there are too few.

    Classes whose labels are all of one kind have no AUROC and are left out of the mean. Intervals: bootstrap by
    patient, and DeLong's, which takes images for independent.
    """
    rows = data.rows_of(table["image_id"])
    patients = data.patients(rows)
    if len(set(patients)) < 2:
        return None
    classes = class_table(data.labels(rows), table[list(LABELS)].to_numpy(), patients, LABELS, n_resamples, seed)
    mean = Interval(*(float(value) for value in classes.iloc[-1][["auroc", "low", "high"]]))
    scored = len(LABELS) - len(undefined(classes))
    return classes[:-1], {
        "mean": as_interval(mean),
        "images": len(rows),
        "patients": len(set(patients)),
        "classes": scored,
    }


def _tune_key(context, data):
    check_predicted(context.run, predict_key(context, data), predicted_files(context.config))
    return [FIGURES, context.config.seed, context.run.step("predict")["key"]]


def is_tuned(context, data):
    """True where the figures in the run are those of its present networks and settings."""
    try:
        return context.run.is_done("tune", _tune_key(context, data), TUNED)
    except InputError:  # no predictions, or those of other networks
        return False


def score(context):
    """Say the honest offline score, and that on the test images whose labels are known."""
    run, data = context.run, open_prepared(context)
    if not run.is_done("tune", _tune_key(context, data), TUNED):
        tune(context)
    found = read_json(run.path("score.json"))
    run.record("score", [run.step("tune")["key"]], auroc=found["auroc"]["estimate"])
    for name, said in (("oof", "out of fold"), ("test", data.test_name)):
        if found[name]:
            mean, part = found[name]["mean"], found[name]
            log.info(
                f"mean AUROC {said} {mean['estimate']:.4f} [{mean['low']:.4f}, {mean['high']:.4f}] over "
                f"{part['classes']} classes, {part['images']:,} images of {part['patients']:,} patients"
                + (_oof_words(part) if name == "oof" else "")
            )


def _oof_words(part):
    """What a pooled score of several networks hides, and whether it is flattered."""
    within, said = part["by_fold"], ""
    if within["folds"] > 1 and within["mean"] is not None:
        said = f"; ranked within each of the {within['folds']} folds {within['mean']:.4f} in the mean"
    return said + ("; the kept epochs were chosen on these images, which flatters it" * part["epoch_chosen_on_these"])


# ---- submission ----------------------------------------------------------------------------------------------------


def submit(context):
    """Write submission.csv, one row a test image, validate it, copy it under submissions/."""
    data, run = open_prepared(context), context.run
    check_predicted(run, predict_key(context, data), predicted_files(context.config))
    images = data.table[data.table["split"] == "test"]
    if not len(images):
        log.info("submit: no test images (split all holds none back); --test names some")
        run.record("submit", [], rows=0, hidden=None)
        return
    path, probs = run.path("submission.csv"), read_parquet(run.path("test.parquet"))
    summary = write_answer(context, data, probs, neutral_probs(run), path)
    copy = copy_submission(context, path)
    hidden = _hidden_score(context, data)
    run.record("submit", [file_hash(path)], rows=summary.rows, hidden=hidden)
    log.info(f"valid submission: {summary}; copy in {copy}")


def neutral_probs(run):
    """What an image that cannot be read gets: the means of the out-of-fold probabilities, a dict by label."""
    return read_parquet(run.path("oof.parquet"))[list(LABELS)].mean().to_dict()


def write_answer(context, data, probs, neutral, path):
    """Write the submission of the predicted test images and validate it; returns its Summary.

    probs: the table test.parquet; neutral: as of `neutral_probs`.
    """
    images = data.table[data.table["split"] == "test"]
    found = probs.set_index("image_id")[list(LABELS)].reindex(images["image_id"]).to_numpy(copy=True)
    found[~images["ok"].to_numpy()] = [neutral[label] for label in LABELS]
    table = pd.DataFrame(found, columns=LABELS).map(lambda value: f"{value:.6g}")
    table.insert(0, "Image Index", images["file_name"].to_numpy())
    write_submission(path, table)
    return validate_probabilities(path, context.run.path("sample_submission.csv"), ordered=True)


def _hidden_score(context, data):
    """For the embedded sample: the mean AUROC on the test list, whose labels are in its table."""
    if not context.run.step("prepare")["synthetic"]:
        return None
    test = _known_test(context, data)
    if not len(test):
        return None
    value = mean_of_defined(auroc(data.labels(data.rows_of(test["image_id"])), test[list(LABELS)].to_numpy(), np.nan))
    return {"metric": "auroc", "value": float(value), "nothing": 0.5}


def report(context):
    """Write report.html from whatever the run has so far."""
    run, images = context.run, open_prepared(context)

    def is_current(step):
        if not is_tuned(context, images):
            return False
        if step == "localise":
            return run.is_done(step, experiment_key(context, images), ["localisation.html"])
        return run.step(step) is not None  # `predict` and `tune` forget the steps behind them

    job = SimpleNamespace(run=run, config=context.config, preset=context.preset, images=images, is_current=is_current)
    write_report(job, page)


def experiment_key(context, data):
    """What `localise` follows from; InputError where there are no predictions of the present networks."""
    check_predicted(context.run, predict_key(context, data), predicted_files(context.config))
    return [context.run.step("predict")["key"], to_dict(context.config)]


VERBS = {
    "prepare": prepare,
    "train": train,
    "predict": predict,
    "tune": tune,
    "score": score,
    "submit": submit,
    "report": report,
}
