"""The recipe: a gate that says whether, a network that says where, a rule that decides."""

import dataclasses
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import file_hash, from_dict, to_dict
from common.infer import tta
from common.infer.predict import predict_masks, predict_probs, write_masks
from common.metrics import segmentation
from common.metrics.statistics import bootstrap
from common.paths import atomic_path, read_array, read_json, read_parquet, write_json
from common.post.rle import area, overlap, parse
from common.steps import (
    as_interval,
    check_predicted,
    copy_submission,
    fresh,
    keep_config,
    read_predictions,
    read_tuned,
    trained_weights,
    used_up,
    write_table,
)
from common.submit.table import write_submission
from common.submit.validate import validate_masks
from common.train.loop import fit
from common.tuning import Rule, nested_areas, rule_dice, summarise, tune_nested
from solutions.siim_pneumothorax.config import SIZE
from solutions.siim_pneumothorax.data import open_prepared, prepare_competition, read_labels
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
from solutions.siim_pneumothorax.postprocess import rules, submission_rows
from solutions.siim_pneumothorax.report import write_report
from solutions.siim_pneumothorax.training import (
    classifier_loader,
    classifier_step,
    gate_figures,
    held_out_loader,
    mask_figures,
    predict_shared,
    presence_of,
    segmenter_loader,
    segmenter_step,
    with_some_negatives,
)

log = logging.getLogger(__name__)
PREDICTED = ("oof.parquet", "oof_probs.npy", "test.parquet", "test_probs.npy")
NEUTRAL = "-1"  # of a placeholder image
TUNED = ("tuned.json", "oof_dice.parquet", "surface.csv")


def prepare(context):
    """Competition files to the image table, the folds and the store."""
    prepare_competition(context)


# ---- training ------------------------------------------------------------------------------------------------------


def train(context):
    """Each fold's gate, then its segmenter at one size after the other."""
    data = open_prepared(context)
    for fold in context.config.folds:
        if context.config.presence == "classifier":
            train_classifier(context, data, fold, context.config.classifier, "classifier")
        train_segmenter(context, data, fold)
        keep_config(context)


def train_classifier(context, data, fold, config, stage):
    """The gate of one fold, in the folder `fold<k>/<stage>`; returns what `fit` does."""
    present, held_out = presence_of(data), data.rows(folds=[fold])
    shown = held_out_loader(context, data.dataset(held_out, config.size, targets=None), config.batch_size)
    folder = context.run.path(f"fold{fold}", stage)
    return fit(
        fresh(context, folder, fold, partial(build_classifier, config)),
        partial(classifier_step, device=context.device),
        classifier_loader(context, data, fold, config),
        lambda model: gate_figures(present[held_out], predict_shared(model, shown, len(held_out), context.device)),
        config,
        folder,
        device=context.device,
        seed=context.config.seed + fold,
        freeze=freeze_body,
        budget=context.budget,
        about=[data.key, fold],
    )


def train_segmenter(context, data, fold):
    """The segmenter of one fold; each size starts from the weights of the one before.

    Epochs are compared on held-out images in the mixture that it is trained on, as the paper's 20 % were.
    """
    whole, fitted = context.config.segmenter, None
    held_out = with_some_negatives(data, data.rows(folds=[fold]), whole.negatives, context.config.seed + fold)
    for position, size in enumerate(whole.sizes):
        config = whole if position == 0 else _finer(whole)
        shown = held_out_loader(context, data.dataset(held_out, size, targets=data.mask), config.batch_size)
        folder = context.run.path(f"fold{fold}", f"segmenter-{size}")
        model = fresh(context, folder, fold, partial(build_segmenter, config))
        if fitted is not None and not (folder / "final.safetensors").is_file():
            model = load_segmenter(config, fitted.folder / "final.safetensors")
        fitted = fit(
            model,
            partial(segmenter_step, loss=mask_loss(whole), device=context.device),
            segmenter_loader(context, data, fold, config, size),
            partial(mask_figures, loader=shown, n=len(held_out), device=context.device, size=size),
            config,
            folder,
            device=context.device,
            seed=context.config.seed + fold,
            freeze=freeze_half,
            budget=context.budget,
            about=[data.key, fold, size],
        )
    return fitted


def _finer(config):
    return dataclasses.replace(
        config,
        epochs=config.finer_epochs or config.epochs,
        frozen_epochs=0,
        lr=config.finer_lr,
        batch_size=config.finer_batch_size,
    )


def predict(context):
    """Out-of-fold probabilities of the trained folds, and the test set's as the mean over them."""
    data, run = open_prepared(context), context.run
    key = _predict_key(context, data)
    if run.is_done("predict", key, PREDICTED):
        log.info("predict: up to date")
        return
    run.forget("predict")
    folds = context.config.folds
    tables = [_predict_part(context, data, key, f"fold{k}/oof", [k], data.rows(folds=[k]), k) for k in folds]
    test = predict_test(context, data)
    paths = [run.path(f"fold{fold}", "oof_probs.npy") for fold in folds]
    shape = (sum(map(len, tables)), *read_array(paths[0]).shape[1:])
    write_masks(run.path("oof_probs.npy"), shape, used_up(paths))
    write_table(run.path("oof.parquet"), pd.concat(tables, ignore_index=True))
    keep_config(context)
    run.record("predict", key, images=shape[0] + len(test))
    log.info(f"predicted {shape[0]} out-of-fold and {len(test)} test images")


def predict_test(context, data):
    """Predict the test images as the mean over the folds' networks; returns the table test.parquet.

    It lies in the run beside the probabilities, test_probs.npy; what is there already is not computed again.
    """
    key = _predict_key(context, data)
    return _predict_part(context, data, key, "test", context.config.folds, data.rows("test"), -1)


def _predict_part(context, data, key, name, folds, rows, fold):
    """Predict `rows` by the networks of `folds` into <name>_probs.npy and <name>.parquet, unless that is done."""
    run, outputs = context.run, [f"{name}_probs.npy", f"{name}.parquet"]
    if not run.is_done(f"predict {name}", key, outputs):
        run.forget(f"predict {name}")
        presence = _predict_rows(context, data, folds, rows, run.path(outputs[0]), name)
        write_table(run.path(outputs[1]), _prediction_table(data, rows, presence, fold))
        run.record(f"predict {name}", key, images=len(rows))
    return read_parquet(run.path(outputs[1]))


def _predict_key(context, data):
    """What the predictions follow from: weights, views, and the very pixels (a bad image may have been replaced)."""
    weights = [file_hash(path) for fold in context.config.folds for path in weight_files(context, fold)]
    return [data.key, weights, list(context.config.tta), read_json(data.store.folder / "store.json")["key"]]


def weight_files(context, fold):
    """The finished weights of one fold: the segmenter's, then the gate's where there is one."""
    config = context.config
    stages = [f"segmenter-{config.segmenter.sizes[-1]}"] + ["classifier"] * (config.presence == "classifier")
    return [trained_weights(context.run, fold, stage) for stage in stages]


def _predict_rows(context, data, folds, rows, path, title):
    """Write mask probabilities of `rows`, mean over the networks of `folds`; returns presence (n,) or None."""
    config, common = context.config, {"device": context.device, "workers": context.workers}
    files = [weight_files(context, fold) for fold in folds]
    masks = [load_segmenter(config.segmenter, of_fold[0]) for of_fold in files]
    size, batch = config.segmenter.sizes[-1], prediction_batch(config.segmenter)
    activation = tta.sigmoid_and_presence if config.presence == "head" else tta.sigmoid
    predicted = predict_masks(
        masks,
        data.store.images,
        rows,
        path,
        size,
        batch,
        views=views(config.tta),
        activation=activation,
        amp=config.segmenter.precision,
        progress=f"masks, {title}",
        **common,
    )
    if config.presence != "classifier":
        return predicted[1] if config.presence == "head" else None
    gates = [load_classifier(config.classifier, of_fold[1]) for of_fold in files]
    size, batch = config.classifier.size, 2 * config.classifier.batch_size
    return predict_probs(
        gates,
        data.store.images,
        rows,
        size,
        batch,
        views=views(config.tta),
        amp=config.classifier.precision,
        progress=f"gate, {title}",
        **common,
    )[:, 0]


def prediction_batch(config):
    """Images a batch when the segmenter predicts: twice those of its last training, as no gradients are kept."""
    return 2 * (config.batch_size if len(config.sizes) == 1 else config.finer_batch_size)


def _prediction_table(data, rows, presence, fold):
    ids = data.table.set_index("row")["image_id"][rows].to_numpy()
    presence = np.ones(len(rows), np.float32) if presence is None else presence
    return pd.DataFrame({"image_id": ids, "row": rows, "fold": fold, "presence": presence})


def tune(context):
    """Choose the decision rule on out-of-fold predictions, each fold scored by the choice of the others."""
    run, decision = context.run, context.config.decision
    key = _tune_key(context)
    if run.is_done("tune", key, TUNED):
        log.info("tune: up to date")
        return
    run.forget("tune")
    oof, regions, patients = oof_regions(context)
    gate = oof["presence"].to_numpy(float)
    tuned = tune_nested(
        rules(decision),
        lambda rule: rule_dice(regions, rule, gate),
        oof["fold"].to_numpy(),
        patients,
        context.config.seed,
    )
    with atomic_path(run.path("oof_dice.parquet")) as path:
        present = (regions.truth > 0).astype(int)
        oof.assign(dice=tuned.dice, part=tuned.parts, present=present).to_parquet(path, index=False)
    tried = [{**dataclasses.asdict(rule), "dice": rule_dice(regions, rule, gate).mean()} for rule in rules(decision)]
    with atomic_path(run.path("surface.csv")) as path:
        pd.DataFrame(tried).to_csv(path, index=False)
    write_json(run.path("tuned.json"), tuned.as_dict())
    keep_config(context)
    run.record("tune", key, score=tuned.score)
    how = "halves of its patients" if tuned.halves else "folds"
    log.info(f"tuned over {len(rules(decision))} rules, nested by {how}: {tuned.rule}")


def _tune_key(context):
    """What the rule follows from; InputError where the predictions are not those of the present networks."""
    data, run = open_prepared(context), context.run
    check_predicted(run, _predict_key(context, data), PREDICTED)
    return [
        to_dict(context.config.decision),
        context.config.seed,
        run.step("predict")["key"],
        data.table["patient_id"].tolist(),
    ]


def oof_regions(context):
    """The out-of-fold table, the OofRegions of its maps at the rule's pixel thresholds, and the patients (n,)."""
    data, run = open_prepared(context), context.run
    oof, probs = read_predictions(run, "oof")
    decision = context.config.decision
    pixels = decision.pixel if decision.rule == "gate" else decision.bottom
    truth = [data.masks[row] for row in oof["row"]]
    progress = partial(tqdm, total=len(oof), desc="regions", leave=False)
    regions = summarise(probs, truth, pixels, connectivity=decision.connectivity, progress=progress)
    patients = data.table.set_index("row")["patient_id"][oof["row"]].to_numpy()
    return oof, regions, None if (patients == "").all() else patients


def read_rule(context):
    """The rule in tuned.json and all that stands there; InputError where it follows from other predictions."""
    saved = read_tuned(context.run, _tune_key(context), TUNED)
    return from_dict(Rule, saved["rule"], str(context.run.path("tuned.json"))), saved


def score(context):
    """The honest offline score with its interval, and the figures of both networks; writes score.json."""
    run = context.run
    _, saved = read_rule(context)
    key = run.step("tune")["key"]
    if run.is_done("score", key, ["score.json"]):
        shown = read_json(run.path("score.json"))["dice"]
        log.info(f"score: up to date, out-of-fold dice {shown['estimate']:.4f}")
        return
    run.forget("score")
    nested = read_parquet(run.path("oof_dice.parquet"))
    oof, regions, patients = oof_regions(context)
    gate, present = oof["presence"].to_numpy(float), regions.truth > 0
    fold_rules = {int(part): Rule(**values) for part, values in saved["fold_rules"].items()}
    both, predicted, true = nested_areas(regions, fold_rules, nested["part"].to_numpy(), gate)
    cells = segmentation.counts_from_areas(both, predicted, true, SIZE * SIZE)
    groups = np.arange(len(oof)) if patients is None else patients
    positive = bootstrap(np.where(present, nested["dice"], np.nan), groups, skip_nan=True) if present.any() else None
    figures = {
        "dice": as_interval(bootstrap(nested["dice"].to_numpy(), groups)),
        "dice_positive": None if positive is None else as_interval(positive),
        "dice_not_nested": saved["naive"],
        "dice_all_empty": float((~present).mean()),
        "iou": segmentation.iou(cells, reduce="image"),
        "f1": segmentation.f_beta(cells, 1, reduce="image"),
        "f2": segmentation.f_beta(cells, 2, reduce="image"),
        "images": len(oof),
        "positive": int(present.sum()),
        "folds": list(context.config.folds),
        "patients": None if patients is None else len(set(patients)),
        "nested_by": "halves of the patients" if saved["halves"] else "folds",
    }
    if context.config.presence != "none":
        at = gate_figures(present.astype(int), gate)
        figures["presence"] = {name: None if np.isnan(value) else float(value) for name, value in at.items()}
    write_json(run.path("score.json"), figures)
    run.record("score", key, dice=figures["dice"]["estimate"])
    shown = figures["dice"]
    log.info(
        f"out-of-fold dice {shown['estimate']:.4f} [{shown['low']:.4f}, {shown['high']:.4f}] over {len(oof)} images "
        f"(all-empty {figures['dice_all_empty']:.4f})"
    )


def submit(context):
    """Write submission.csv, validate it against the ids it must have, copy it under submissions/."""
    data, run = open_prepared(context), context.run
    rule, _ = read_rule(context)
    path = run.path("submission.csv")
    rows, summary = write_answer(context, data, rule, path)
    copy = copy_submission(context, path)
    hidden = _hidden_score(Path(run.step("prepare")["data"]) / "hidden" / "truth.csv", rows)
    run.record("submit", [file_hash(path)], rows=summary.rows, hidden=hidden)
    log.info(f"valid submission: {summary}; copy in {copy}")
    if hidden:
        log.info(f"dice on the sample's hidden labels {hidden['value']:.4f} (empty masks {hidden['nothing']:.4f})")


def write_answer(context, data, rule, path):
    """Write the submission of the predicted test images and validate it; returns its rows and its Summary."""
    test, probs = read_predictions(context.run, "test")
    presence = test["presence"].to_numpy(float).copy()
    readable = data.store.table.set_index("row")["ok"][test["row"]].to_numpy()
    rows = submission_rows(test["image_id"], probs, presence, rule, context.config.decision.connectivity)
    rows.loc[~readable, "EncodedPixels"] = NEUTRAL
    write_submission(path, rows)
    return rows, validate_masks(path, context.run.path("sample_submission.csv"), ordered=True)


def _hidden_score(path, rows):
    """What the leaderboard would say, for the embedded sample, whose test labels are known; None for others."""
    if not path.is_file():
        return None
    truth = read_labels(path)
    if not set(rows["ImageId"]) <= set(truth):
        return None  # other images than the sample's are predicted
    areas = []
    for image_id, rle in rows.itertuples(index=False):
        predicted = parse(rle)
        areas.append((overlap(predicted, truth[image_id]), area(predicted), area(truth[image_id])))
    both, predicted, true = np.array(areas).T
    dice = segmentation.dice_from_areas(both, predicted, true)
    return {"metric": "dice", "value": float(dice.mean()), "nothing": float((true == 0).mean())}


def report(context):
    """Write report.html from whatever the run has so far."""
    write_report(context, open_prepared(context))


def ablate(context):
    """Repeat the paper's comparisons on this run's out-of-fold images; writes ablation.csv and the report."""
    from solutions.siim_pneumothorax.experiments import run_ablation  # it imports this module

    run_ablation(context)
    report(context)


def find_lr(context):
    """Learning-rate range tests of both networks; writes lr_<network>.csv and the report."""
    from solutions.siim_pneumothorax.experiments import find_learning_rates

    find_learning_rates(context)
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
    "find_lr": find_lr,
}
