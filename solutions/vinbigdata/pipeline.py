"""The recipe: detectors that find boxes, their fusion, and a classifier that says which images are healthy."""

import itertools
import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from common.config import file_hash, from_dict, to_dict
from common.errors import InputError
from common.infer import tta
from common.infer.predict import predict_probs
from common.metrics import classification
from common.metrics.detection import evaluate
from common.metrics.detection_errors import error_breakdown
from common.paths import read_json, read_parquet, write_json
from common.report.frame import write_report
from common.steps import (
    as_interval,
    check_predicted,
    copy_submission,
    fresh,
    keep_config,
    read_tuned,
    trained_weights,
    write_csv,
    write_table,
)
from common.submit.table import write_submission
from common.submit.validate import validate_boxes
from common.train.loop import fit
from solutions.vinbigdata import report as page
from solutions.vinbigdata.config import CLASSES, NO_FINDING
from solutions.vinbigdata.data import open_prepared, prepare_competition, read_train
from solutions.vinbigdata.models import build_detector, build_healthy, load_detector, load_healthy
from solutions.vinbigdata.postprocess import DecisionRule, apply_rule, fuse_members, prediction_strings
from solutions.vinbigdata.training import (
    detector_figures,
    detector_loader,
    detector_rows,
    detector_step,
    healthy_figures,
    healthy_loader,
    healthy_rows,
    healthy_step,
    held_out_loader,
    predict_boxes,
)
from solutions.vinbigdata.tuning import tune_detection

log = logging.getLogger(__name__)
PREDICTED = ("oof.parquet", "oof_healthy.parquet", "test.parquet", "test_healthy.parquet")
CHOSEN = ("surface.csv", "sweep.csv", "members.csv", "classes.csv", "errors.csv")
TUNED = ("tuned.json", "oof_decided.parquet", *CHOSEN, "score.json")


def prepare(context):
    """Competition files to the image table, the agreed boxes, the folds and the store."""
    prepare_competition(context)


# ---- training ------------------------------------------------------------------------------------------------------


def train(context):
    """Each fold's detectors, one a member, and the 2CC of each of its folds."""
    data, config = open_prepared(context), context.config
    for fold in sorted({*config.folds, *config.healthy_trained}):
        for member in config.members if fold in config.folds else ():
            train_detector(context, data, fold, member)
        if fold in config.healthy_trained:
            train_healthy(context, data, fold)
        keep_config(context)


def train_detector(context, data, fold, member):
    """The detector of one fold and member, in the folder fold<k>/<member>; returns what `fit` does."""
    config, held_out = context.config.detector_of(member), data.rows(folds=[fold])
    folder = context.run.path(f"fold{fold}", member)
    rows = detector_rows(context, data, fold, config.abnormal_only)
    shown = held_out_loader(context, data, held_out, config)
    return fit(
        fresh(context, folder, fold, partial(build_detector, config)),
        partial(detector_step, device=context.device),
        detector_loader(context, data, rows, config, member),
        partial(detector_figures, loader=shown, data=data, rows=held_out, config=config, device=context.device),
        config,
        folder,
        device=context.device,
        seed=context.config.seed + fold,
        budget=context.budget,
        about=[data.key, fold, member],
    )


def train_healthy(context, data, fold):
    """The 2CC of one of its folds, in the folder fold<k>/healthy; returns what `fit` does."""
    config, (rows, held_out) = context.config.healthy, healthy_rows(context, data, fold)
    folder = context.run.path(f"fold{fold}", "healthy")
    shown = held_out_loader(context, data, held_out, config)
    return fit(
        fresh(context, folder, fold, partial(build_healthy, config)),
        partial(healthy_step, device=context.device),
        healthy_loader(context, data, rows, config),
        partial(healthy_figures, loader=shown, data=data, rows=held_out, device=context.device),
        config,
        folder,
        device=context.device,
        seed=context.config.seed + fold,
        budget=context.budget,
        about=[data.key, fold],
    )


# ---- prediction ----------------------------------------------------------------------------------------------------


def predict(context):
    """Boxes and probabilities of health: out of fold, and of the test images by every fold's networks."""
    data, run = open_prepared(context), context.run
    key = predict_key(context, data)
    if run.is_done("predict", key, PREDICTED):
        log.info("predict: up to date")
        return
    for made in ("predict", "tune", "score", "submit"):  # these follow from it: no report of theirs in between
        run.forget(made)
    test, config = data.rows("test"), context.config
    boxes, healthy = [], []
    for fold in config.folds:
        held_out = data.rows(folds=[fold])
        boxes.append(_boxes_part(context, data, key, fold, held_out, "oof"))
        part = _healthy_part(context, data, key, fold % config.healthy_modulus, held_out, f"oof of fold {fold}")
        healthy.append(part.assign(fold=fold))
    tables = pd.concat(boxes, ignore_index=True), _probabilities(pd.concat(healthy, ignore_index=True))
    for name, table in zip(PREDICTED, (*tables, *predict_test(context, data)), strict=True):
        write_table(run.path(name), table)
    keep_config(context)
    run.record("predict", key, images=len(test) + sum(len(data.rows(folds=[fold])) for fold in config.folds))
    for part in run.folder.glob("fold*/predicted*.parquet"):  # the parts have done their duty
        part.unlink()
    log.info(
        f"predicted {len(pd.read_parquet(run.path('oof.parquet'))):,} boxes out of fold, "
        f"{len(pd.read_parquet(run.path('test.parquet'))):,} on {len(test)} test images"
    )


def predict_test(context, data):
    """Boxes and health of the test images by every fold's networks: the tables test.parquet and test_healthy.parquet.

    The folds' parts stay in the run; what is there already is not computed again.
    """
    key, rows, config = predict_key(context, data), data.rows("test"), context.config
    boxes = [_boxes_part(context, data, key, fold, rows, "test") for fold in config.folds]
    healthy = [_healthy_part(context, data, key, fold, rows, "test") for fold in config.healthy_trained]
    # of logits: a mean of probabilities would seldom pass a high alpha
    mean = pd.concat(healthy, ignore_index=True).groupby("image_id", sort=False, as_index=False)["logit"].mean()
    return pd.concat(boxes, ignore_index=True), _probabilities(mean.assign(fold=-1))


def _probabilities(table):
    return table.drop(columns="logit").assign(healthy=1 / (1 + np.exp(-table["logit"])))


def _boxes_part(context, data, key, fold, rows, name):
    """Boxes of every member of one fold, kept in the fold's folder until all parts are there."""
    run, config, file = context.run, context.config, f"fold{fold}/predicted_{name}.parquet"
    if not run.is_done(f"predict {name} {fold}", key, [file]):
        boxes = []
        for member in config.members:
            detector = config.detector_of(member)
            model = load_detector(detector, trained_weights(run, fold, member))
            found = predict_boxes(
                model,
                data,
                rows,
                detector,
                context.device,
                config.tta,
                context.workers,
                f"{name}, fold {fold}, {member}",
            )
            boxes.append(found.assign(member=member, fold=fold))
        write_table(run.path(file), pd.concat(boxes, ignore_index=True))
        run.record(f"predict {name} {fold}", key)
    return read_parquet(run.path(file))


def _healthy_part(context, data, key, fold, rows, name):
    """image_id and logit of health by the 2CC of one of its folds, kept like the boxes.

    Computed in float32: the few digits of bf16 would make ties of the surest images.
    """
    run, config, file = context.run, context.config, f"fold{fold}/predicted_healthy_{name.replace(' ', '_')}.parquet"
    if not run.is_done(f"predict healthy {name} {fold}", key, [file]):
        model = load_healthy(config.healthy, trained_weights(run, fold, "healthy"))
        views = [tta.IDENTITY, *[tta.FLIP] * ("flip" in config.tta)]
        logits = predict_probs(
            [model],
            data.store.images,
            rows,
            config.healthy.size,
            2 * config.healthy.batch_size,
            device=context.device,
            views=views,
            amp="fp32",
            activation=torch.Tensor.float,
            progress=f"2CC, {name}, fold {fold}",
            workers=context.workers,
        )[:, 0]
        ids = data.table.set_index("row")["image_id"][rows].to_numpy()
        write_table(run.path(file), pd.DataFrame({"image_id": ids, "fold": fold, "logit": logits.astype(float)}))
        run.record(f"predict healthy {name} {fold}", key)
    return read_parquet(run.path(file))


def trained_parts(config):
    """What is trained, as (fold, stage): a detector a fold and member, and the 2CC of each of its folds."""
    return [*itertools.product(config.folds, config.members), *((k, "healthy") for k in config.healthy_trained)]


def predict_key(context, data):
    """What the predictions follow from: weights, views, and the very pixels (a bad image may have been replaced)."""
    config = context.config
    weights = [file_hash(trained_weights(context.run, fold, stage)) for fold, stage in trained_parts(config)]
    made = [[part.size, part.precision] for part in (config.detector, config.healthy)]
    made += [list(config.members), config.detector.nms, config.detector.per_image]
    return [data.key, weights, list(config.tta), made, read_json(data.store.folder / "store.json")["key"]]


# ---- decision ------------------------------------------------------------------------------------------------------


def tune(context):
    """Choose fusion and decision on out-of-fold boxes by the leaderboard's metric, each part scored by the others."""
    run, config, key = context.run, context.config, _tune_key(context)
    if run.is_done("tune", key, TUNED):
        log.info("tune: up to date")
        return
    for made in ("tune", "score", "submit"):
        run.forget(made)
    data = open_prepared(context)
    rows = np.concatenate([data.rows(folds=[fold]) for fold in config.folds])
    images = data.table.set_index("row").loc[rows].reset_index()
    truth = data.truth(rows)
    healthy = read_parquet(run.path("oof_healthy.parquet")).set_index("image_id")["healthy"]
    tuned = tune_detection(
        read_parquet(run.path("oof.parquet")),
        truth,
        images,
        healthy,
        config.members,
        config.fusion,
        config.decision,
        seed=config.seed,
    )
    write_table(run.path("oof_decided.parquet"), tuned.detections)
    write_csv(run.path("surface.csv"), tuned.surface)
    write_csv(run.path("sweep.csv"), tuned.sweep)
    write_csv(run.path("members.csv"), tuned.members)
    classes = tuned.result.classes.reset_index()
    intervals = [as_interval(interval) for interval in tuned.class_scores]
    for end in ("low", "high"):
        classes[end] = [interval[end] for interval in intervals]
    classes.insert(1, "name", [CLASSES[number] for number in classes["class_id"]])
    write_csv(run.path("classes.csv"), classes)
    write_csv(
        run.path("errors.csv"), error_breakdown(tuned.detections, truth, images["image_id"]).summary.reset_index()
    )
    write_json(run.path("tuned.json"), tuned.as_dict())
    nothing = evaluate(_no_boxes(tuned.detections, images["image_id"]), truth, images["image_id"]).mean_ap
    tested = read_parquet(run.path("test_healthy.parquet"))["healthy"]
    write_json(run.path("score.json"), _figures(tuned, images, healthy, tested, nothing))
    keep_config(context)
    run.record("tune", key, score=tuned.score.estimate)
    how = "halves of its patients" if tuned.halves else "folds"
    log.info(f"tuned over {len(tuned.surface)} rules, nested by {how}: {tuned.rule}")


def _no_boxes(decided, ids):
    return apply_rule(decided.iloc[:0], ids, None, DecisionRule((1.0,), 0.4))


def _figures(tuned, images, healthy, tested, nothing):
    true = (images["abnormal"] == 0).to_numpy().astype(int)
    probs = healthy.reindex(images["image_id"]).to_numpy()
    counts = classification.confusion_counts(true, probs, 0.5)
    auroc = classification.auroc(true, probs, undefined=np.nan)
    aps, rule = tuned.result.classes["ap"], tuned.rule

    def shares(values):
        return {"alpha": float((values > rule.alpha).mean()), "beta": float((values > rule.beta).mean())}

    return {
        "map": as_interval(tuned.score),
        "map_findings": None if aps[:NO_FINDING].isna().all() else float(aps[:NO_FINDING].mean()),
        "ap_no_finding": None if np.isnan(aps[NO_FINDING]) else float(aps[NO_FINDING]),
        "classes": int(aps.notna().sum()),
        "map_not_nested": tuned.naive,
        "map_no_finding": float(nothing),
        "images": len(images),
        "abnormal": int((true == 0).sum()),
        "nested_by": "halves of the patients" if tuned.halves else "folds",
        "healthy": {
            "auroc": None if np.isnan(auroc) else float(auroc),
            "accuracy": float(classification.accuracy(counts)),
            "share_above": {"oof": shares(probs), "test": shares(tested) if len(tested) else None},
        },
    }


def _tune_key(context):
    """What the rule follows from; InputError where the predictions are not those of the present networks."""
    data, run, config = open_prepared(context), context.run, context.config
    check_predicted(run, predict_key(context, data), PREDICTED)
    return [to_dict(config.fusion), to_dict(config.decision), config.seed, run.step("predict")["key"]]


def is_tuned(context):
    """True where the rule and the score in the run are those of its predictions and these settings."""
    try:
        return context.run.is_done("tune", _tune_key(context), TUNED)
    except InputError:  # no predictions, or those of other networks
        return False


def experiment_key(context):
    """What the tables of `ablate` follow from; None where there are no predictions."""
    predicted, config = context.run.step("predict"), context.config
    return predicted and [predicted["key"], to_dict(config.fusion), to_dict(config.decision), config.seed]


def read_rule(context):
    """The rule in tuned.json; InputError where it follows from other predictions."""
    saved = read_tuned(context.run, _tune_key(context), TUNED)
    return from_dict(DecisionRule, saved["rule"], str(context.run.path("tuned.json")))


def score(context):
    """Say the honest offline score; score.json and the per-class table were written with the rule."""
    run = context.run
    read_rule(context)
    found = read_json(run.path("score.json"))
    shown = found["map"]
    run.record("score", [run.step("tune")["key"]], map=shown["estimate"])
    log.info(
        f"out-of-fold mAP@0.4 {shown['estimate']:.4f} [{shown['low']:.4f}, {shown['high']:.4f}] over {found['images']} "
        f"images (no boxes at all: {found['map_no_finding']:.4f}); 2CC accuracy {found['healthy']['accuracy']:.4f}"
    )


# ---- submission ----------------------------------------------------------------------------------------------------


def submit(context):
    """Write submission.csv, validate it against the ids it must have, copy it under submissions/."""
    data, run, rule = open_prepared(context), context.run, read_rule(context)
    images = data.table[data.table["split"] == "test"]
    boxes, healthy = read_parquet(run.path("test.parquet")), read_parquet(run.path("test_healthy.parquet"))
    path = run.path("submission.csv")
    decided, summary = write_answer(context, data, rule, boxes, healthy, path)
    write_table(run.path("test_decided.parquet"), decided)
    copy = copy_submission(context, path)
    hidden = _hidden_score(run.step("prepare"), decided, images)
    run.record("submit", [file_hash(path)], rows=summary.rows, hidden=hidden)
    log.info(f"valid submission: {summary}; copy in {copy}")
    if hidden:
        log.info(f"mAP@0.4 on the sample's hidden labels {hidden['value']:.4f} (no boxes {hidden['nothing']:.4f})")


def write_answer(context, data, rule, boxes, healthy, path):
    """Write the submission of the predicted test images and validate it; returns the detections and its Summary.

    boxes, healthy: the tables test.parquet and test_healthy.parquet.
    """
    config, images = context.config, data.table[data.table["split"] == "test"]
    readable = images.loc[images["ok"], "image_id"]
    boxes = boxes[boxes["image_id"].isin(readable)]  # a placeholder image gets the neutral prediction
    fused = fuse_members(boxes, data.sizes(), config.members, rule, config.fusion.method)
    decided = apply_rule(fused, readable, healthy.set_index("image_id")["healthy"], rule)
    write_submission(path, prediction_strings(decided, images["image_id"], data.sizes()))
    sizes = {row.image_id: (row.width, row.height) for row in images.itertuples()}
    return decided, validate_boxes(path, context.run.path("sample_submission.csv"), sizes=sizes, ordered=True)


def _hidden_score(prepared, decided, images):
    """What the leaderboard would say, for the embedded sample, whose test labels are known; None for others."""
    path = Path(prepared["data"], "hidden", "truth.csv")
    if not (prepared["synthetic"] and path.is_file()):
        return None
    truth = read_train(path)
    if set(images["image_id"]) != set(truth["image_id"]):
        return None  # other images than the sample's are predicted
    nothing = truth["class_id"] == NO_FINDING
    truth.loc[nothing, ["x_min", "y_min", "x_max", "y_max"]] = [0.0, 0.0, 1.0, 1.0]
    truth = truth[["image_id", "class_id", "x_min", "y_min", "x_max", "y_max"]]
    ids = images["image_id"]
    value, none = (evaluate(table, truth, ids).mean_ap for table in (decided, _no_boxes(decided, ids)))
    return {"metric": "map", "value": float(value), "nothing": float(none)}


def report(context):
    """Write report.html from whatever the run has so far."""
    run = context.run

    def is_current(step):
        if step == "ablate":
            return run.is_done(step, experiment_key(context), ["ablation.csv", "figure1.csv"])
        # `predict` and `tune` forget the steps behind them
        return is_tuned(context) and run.step(step) is not None

    images = open_prepared(context)
    job = SimpleNamespace(run=run, config=context.config, preset=context.preset, images=images, is_current=is_current)
    write_report(job, page)


def ablate(context):
    """The paper's table 1 and figure 1 on this run's out-of-fold images; writes ablation.csv and the report."""
    from solutions.vinbigdata.experiments import run_ablation  # it imports this module

    run_ablation(context)
    report(context)


VERBS = {
    "prepare": prepare,
    "train": train,
    "predict": predict,
    "tune": tune,
    "score": score,
    "submit": submit,
    "report": report,
    "ablate": ablate,
}
