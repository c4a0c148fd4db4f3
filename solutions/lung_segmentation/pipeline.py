"""The recipe: one network that outlines the lungs, a rule that makes masks of its probabilities."""

import dataclasses
import logging
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import file_hash, from_dict, to_dict
from common.errors import InputError
from common.infer.predict import predict_masks, write_masks
from common.metrics.segmentation import dice_from_areas
from common.paths import atomic_path, read_array, read_json, write_json
from common.post.rle import ABSOLUTE, encode
from common.steps import (
    check_predicted,
    copy_submission,
    fresh,
    keep_config,
    read_predictions,
    read_tuned,
    trained_weights,
    used_up,
    write_csv,
    write_table,
)
from common.submit.validate import validate_shaped_masks
from common.train import distributed
from common.train.loop import fit
from common.tuning import tune_nested
from solutions.lung_segmentation.config import STRUCTURES
from solutions.lung_segmentation.data import open_prepared, prepare_competition
from solutions.lung_segmentation.models import build_network, freeze_encoder, load_network, mask_loss, views
from solutions.lung_segmentation.pairs import read_mask
from solutions.lung_segmentation.postprocess import clean_up, judge
from solutions.lung_segmentation.report import write_report
from solutions.lung_segmentation.scoring import MaskRule, figures, measure, rules
from solutions.lung_segmentation.training import held_out_loader, mask_figures, step, train_loader

log = logging.getLogger(__name__)
STAGE = "network"
PREDICTED = ("oof.parquet", "oof_probs.npy", "test.parquet", "test_probs.npy")
TUNED = ("tuned.json", "oof_areas.npy", "surface.csv")
COLUMNS = ["image_id", "width", "height", "rle"]


def prepare(context):
    """Images and masks to the image table, the folds and the store."""
    prepare_competition(context)


# ---- training ------------------------------------------------------------------------------------------------------


def train(context):
    """The network of each held-out fold."""
    data = open_prepared(context)
    if context.config.finder and distributed.world() == 1:
        find_learning_rate_once(context, data)
    elif context.config.finder:
        log.info("the range test is left out: it runs in one process (`find_lr`)")
    for fold in context.config.folds:
        train_network(context, data, *data.parts(fold, context.config), f"fold{fold}", fold)
        keep_config(context)


def train_network(context, data, rows, validation, name, fold=0, config=None):
    """Train on `rows`, compare epochs on `validation`, in the folder <name>/network; returns what `fit` does."""
    config = config or context.config.network
    channels, loss = len(STRUCTURES[context.config.structures]), mask_loss(config.loss)
    folder = context.run.path(name, STAGE)
    if len(validation) < distributed.world():
        found = f"{len(validation)} images to validate on for {distributed.world()} processes"
        raise InputError(f"{found}: raise --validation")
    return fit(
        fresh(context, folder, fold, partial(build_network, config, channels)),
        partial(step, loss=loss, device=context.device),
        train_loader(context, data, rows, config),
        partial(
            mask_figures,
            loader=held_out_loader(context, data, validation, config),
            n=len(validation),
            device=context.device,
            loss=loss,
        ),
        config,
        folder,
        device=context.device,
        seed=context.config.seed + fold,
        freeze=freeze_encoder,
        budget=context.budget,
        about=[data.key, name, len(rows)],
    )


def find_learning_rate_once(context, data):
    """The paper's range test of the frozen network, unless the run has its curve."""
    from solutions.lung_segmentation.experiments import find_learning_rates

    if not context.run.is_done("find_lr", experiment_key(context, data), [f"lr_{STAGE}.csv"]):
        find_learning_rates(context, data)


def experiment_key(context, data):
    """What the tables of `ablate`, `cross` and `find_lr` follow from."""
    config = context.config
    return [data.key, to_dict(config.network), list(config.folds), config.validation, list(config.tta), config.seed]


# ---- prediction ----------------------------------------------------------------------------------------------------


def predict(context):
    """Out-of-fold probabilities of the trained folds, and the test set's as the mean over them."""
    data, run = open_prepared(context), context.run
    key = _predict_key(context, data)
    if run.is_done("predict", key, PREDICTED):
        log.info("predict: up to date")
        return
    for made in ("predict", "tune", "score", "submit"):  # these follow from it: no report of theirs in between
        run.forget(made)
    folds, tables, paths = context.config.folds, [], []
    for fold in folds:
        rows = data.rows(folds=[fold])
        paths.append(run.path(f"fold{fold}", "oof_probs.npy"))
        tables.append(_rows_table(data, rows, fold))
        if not run.is_done(f"predict fold{fold}", key, [paths[-1]]):
            predict_rows(context, data, [fold_weights(run, fold)], rows, paths[-1], f"fold {fold}")
            run.record(f"predict fold{fold}", key, images=len(rows))
    shape = (sum(map(len, tables)), *read_array(paths[0]).shape[1:])
    write_masks(run.path("oof_probs.npy"), shape, used_up(paths))
    write_table(run.path("oof.parquet"), pd.concat(tables, ignore_index=True))
    test = data.rows("test")
    predict_rows(context, data, [fold_weights(run, fold) for fold in folds], test, run.path("test_probs.npy"), "test")
    write_table(run.path("test.parquet"), _rows_table(data, test, -1))
    keep_config(context)
    run.record("predict", key, images=shape[0] + len(test))
    log.info(f"predicted {shape[0]} out-of-fold and {len(test)} test images")


def predict_rows(context, data, weights, rows, path, title, config=None):
    """Write the probabilities of `rows`, mean over the networks in the files `weights`; returns them mapped."""
    config, channels = config or context.config.network, len(STRUCTURES[context.config.structures])
    models = [load_network(config, channels, file) for file in weights]
    return predict_masks(
        models,
        data.store.images,
        rows,
        path,
        config.size,
        2 * config.batch_size,
        device=context.device,
        views=views(context.config.tta),
        amp=config.precision,
        progress=f"masks, {title}",
        workers=context.workers,
        channels=channels,
    )


def fold_weights(run, fold):
    """Path of the finished network of a fold."""
    return trained_weights(run, fold, STAGE)


def _predict_key(context, data):
    """What the predictions follow from: weights, views, and the very pixels (a bad image may have been replaced)."""
    weights = [file_hash(fold_weights(context.run, fold)) for fold in context.config.folds]
    store, network = read_json(data.store.folder / "store.json")["key"], context.config.network
    made = [list(context.config.tta), network.size, network.precision]
    return [data.key, weights, made, store, data.rows("test").tolist()]


def _rows_table(data, rows, fold):
    ids = data.table.set_index("row")["image_id"][rows].to_numpy()
    return pd.DataFrame({"image_id": ids, "row": rows, "fold": fold})


# ---- decision ------------------------------------------------------------------------------------------------------


def tune(context):
    """Choose pixel threshold and regions on out-of-fold predictions, each part scored by the choice of the others."""
    run, key = context.run, _tune_key(context)
    if run.is_done("tune", key, TUNED):
        log.info("tune: up to date")
        return
    for made in ("tune", "score", "submit"):
        run.forget(made)
    data, tried = open_prepared(context), rules(context.config.decision)
    oof, probs = read_predictions(run, "oof")
    areas = measure(data, oof["row"], probs, tried, context.config.structures)
    dice = dice_from_areas(*areas[:, :, 0].transpose(2, 1, 0)[:3])  # (rules, images), of the lungs
    position = {rule: number for number, rule in enumerate(tried)}
    patients = data.table.set_index("row")["patient_id"][oof["row"]].to_numpy()
    tuned = tune_nested(tried, lambda rule: dice[position[rule]], oof["fold"].to_numpy(), patients, context.config.seed)
    chosen = [position[tuned.fold_rules[part]] for part in tuned.parts]
    with atomic_path(run.path("oof_areas.npy")) as path:
        np.save(path, areas[np.arange(len(oof)), chosen])
    tried = [{**dataclasses.asdict(rule), "dice": dice[number].mean()} for rule, number in position.items()]
    write_csv(run.path("surface.csv"), pd.DataFrame(tried))
    write_json(run.path("tuned.json"), tuned.as_dict())
    keep_config(context)
    run.record("tune", key, score=tuned.score)
    how = "halves of its patients" if tuned.halves else "folds"
    log.info(f"tuned over {len(position)} rules, nested by {how}: {tuned.rule}")


def _tune_key(context):
    """What the rule follows from; InputError where the predictions are not those of the present networks."""
    data, run = open_prepared(context), context.run
    check_predicted(run, _predict_key(context, data), PREDICTED)
    return [to_dict(context.config.decision), context.config.seed, run.step("predict")["key"]]


def read_rule(context):
    """The rule in tuned.json; InputError where it follows from other predictions."""
    saved = read_tuned(context.run, _tune_key(context), TUNED)
    return from_dict(MaskRule, saved["rule"], str(context.run.path("tuned.json")))


def score(context):
    """The honest offline score of the held-out images with its interval, per dataset and structure."""
    run = context.run
    read_rule(context)
    key = score_key(run)
    if not run.is_done("score", key, ["score.json", "oof_dice.parquet"]):
        run.forget("score")
        data = open_prepared(context)
        oof, _ = read_predictions(run, "oof")
        about = oof.merge(data.table.drop(columns=["fold", "image_id"]), on="row", how="left", validate="one_to_one")
        areas = read_array(run.path("oof_areas.npy"))
        found, table = figures(about, np.asarray(areas), context.config.structures)
        found |= {"folds": list(context.config.folds), "n_folds": context.config.n_folds, "seed": context.config.seed}
        write_table(run.path("oof_dice.parquet"), table)
        write_json(run.path("score.json"), found)
        run.record("score", key, dice=found["dice"]["estimate"])
    found = read_json(run.path("score.json"))
    for name, part in {"all": found, **found["datasets"]}.items():
        log.info(
            f"{name}: dice {_shown(part['dice'])} (mean over {part['images']} images), {_shown(part['dice_pooled'])} "
            f"(pooled pixels), precision {part['precision']['estimate']:.4f}, recall {part['recall']['estimate']:.4f}, "
            f"accuracy {part['accuracy']['estimate']:.4f}"
        )


def score_key(run):
    """What the score follows from: the rule and the pixels counted under it."""
    return [run.step("tune")["key"], file_hash(run.path("oof_areas.npy"))]


def _shown(interval):
    return f"{interval['estimate']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


# ---- submission ----------------------------------------------------------------------------------------------------


def submit(context):
    """Write masks/<image_id>.png at the original sizes and submission.csv with their run-lengths, and check it."""
    data, run = open_prepared(context), context.run
    rule = read_rule(context)
    test, probs = read_predictions(run, "test")
    about = data.table.set_index("row").loc[test["row"]]
    rows, rejected, dice = [], [], []
    record = run.step("prepare")
    for found, probability in zip(tqdm(about.itertuples(), "masks", len(about), leave=False), probs, strict=True):
        mask = rule.lungs(np.asarray(probability), (found.height, found.width), context.config.structures)
        mask = mask * np.uint8(found.ok)  # a placeholder image gets the neutral prediction
        path = run.path("masks", f"{found.image_id}.png")
        with atomic_path(path) as temporary:
            temporary.write_bytes(cv2.imencode(".png", mask * np.uint8(255))[1])  # imwrite is silent on a full disk
        rows.append((found.image_id, found.width, found.height, encode(mask, ABSOLUTE)))
        verdict = judge(clean_up(mask))
        if not verdict.ok:
            rejected.append({"image_id": found.image_id, "reason": verdict.reason})
        truth = Path(record["data"], "hidden", f"{found.image_id}.png")
        if record["synthetic"] and truth.is_file() and (true := read_mask(truth)).shape == mask.shape:
            dice.append(float(dice_from_areas((mask & true).sum(), mask.sum(), true.sum())))
    for stale in set(run.path("masks").glob("*.png")) - {run.path("masks", f"{row[0]}.png") for row in rows}:
        stale.unlink()
    path = run.path("submission.csv")
    write_csv(path, pd.DataFrame(rows, columns=COLUMNS))
    if not rows:
        log.info("no images without a mask, and none named by --test: nothing to submit")
        run.record("submit", [file_hash(path)], rows=0, hidden=None, rejected=[])
        return
    summary = validate_shaped_masks(path, about[["image_id", "width", "height"]], ABSOLUTE)
    copy = copy_submission(context, path)
    known = {"metric": "dice", "value": float(np.mean(dice)), "nothing": 0.0} if len(dice) == len(rows) else None
    run.record("submit", [file_hash(path)], rows=len(rows), hidden=known, rejected=rejected)
    log.info(f"valid submission: {summary}; masks in {run.path('masks')}, copy of the table in {copy}")
    if rejected:
        log.info(f"the area gate would reject {len(rejected)} of {len(rows)} masks")
    if known:
        log.info(f"dice on the sample's hidden masks {known['value']:.4f}")


def report(context):
    """Write report.html from whatever the run has so far."""
    write_report(context, open_prepared(context))


def ablate(context):
    """Berger et al.'s Table 2: simple against complex augmentation; writes ablation.csv and the report."""
    from solutions.lung_segmentation.experiments import run_ablation  # it imports this module

    run_ablation(context)
    report(context)


def cross(context):
    """Train on one dataset, score on each other; writes cross.csv and the report."""
    from solutions.lung_segmentation.experiments import run_cross

    run_cross(context)
    report(context)


def find_lr(context):
    """Learning-rate range test on the first fold's batches; writes lr_network.csv and the report."""
    from solutions.lung_segmentation.experiments import find_learning_rates

    find_learning_rates(context, open_prepared(context))
    report(context)


def export(context):
    """Write the first fold's network and rule as one file, lungs.safetensors, which `masks` and others can use."""
    from solutions.lung_segmentation.experiments import export_network

    export_network(context)


VERBS = {
    "prepare": prepare,
    "train": train,
    "predict": predict,
    "tune": tune,
    "score": score,
    "submit": submit,
    "report": report,
    "ablate": ablate,
    "cross": cross,
    "find_lr": find_lr,
    "export": export,
}
