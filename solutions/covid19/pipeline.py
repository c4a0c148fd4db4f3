"""The recipe: a network a fold that sees the lungs alone, its probabilities, and how far they can be trusted."""

import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from common.config import file_hash
from common.errors import InputError
from common.metrics.classification import auroc
from common.paths import read_parquet, write_json
from common.report.frame import write_report
from common.steps import check_predicted, copy_submission, fresh, keep_config, trained_weights, write_csv, write_table
from common.submit.table import read_table, write_submission
from common.submit.validate import validate_probabilities
from common.train.loop import fit
from solutions.covid19 import report as page
from solutions.covid19.config import STAGE
from solutions.covid19.data import SAMPLE, open_prepared, prepare_competition, read_selection, rejected_shares
from solutions.covid19.models import build_network, load_network
from solutions.covid19.scoring import AUDITED, HALF, fold_table, nested_thresholds, read_score, scored, summary
from solutions.covid19.training import figures, held_out_loader, step, train_loader
from solutions.covid19.training import predict as predict_rows

log = logging.getLogger(__name__)
FIGURES = 3  # raised where `tune` comes to measure something else
PREDICTED = ("oof.parquet", "test.parquet")
TUNED = ("tuned.json", "per_fold.csv", "score.json")


def prepare(context):
    """Collections to the image table and its selection, the folds, the store and the lungs."""
    prepare_competition(context)


# ---- training ------------------------------------------------------------------------------------------------------


def train(context):
    """The network of each fold."""
    data, config = open_prepared(context), context.config
    for fold in config.folds:
        rows = _parts(context, data, fold)
        train_network(context, data, fold, STAGE, config.view, config.network, rows, data.labels)
        keep_config(context)


def train_network(context, data, fold, stage, view, config, rows, labels):
    """One network in the folder fold<k>/<stage>; returns what `fit` does.

    view: what it sees (config.VIEWS); config: a NetworkConfig; rows: (training, validating) store rows; labels: from
    rows to their float32 (n,) of 0 and 1.
    """
    learn, judge = rows
    shown = held_out_loader(context, data, judge, config, view)
    folder = context.run.path(f"fold{fold}", stage)
    seen = [view, context.config.audit.margin if view == "border" else None]
    return fit(
        fresh(context, folder, fold, partial(build_network, config)),
        partial(step, device=context.device),
        train_loader(context, data, learn, labels(learn), config, view),
        partial(figures, loader=shown, labels=labels(judge), device=context.device),
        config,
        folder,
        device=context.device,
        seed=context.config.seed + fold,
        budget=context.budget,
        about=[data.key, fold, stage, *seen, learn.tolist(), judge.tolist()],
        trained_on={"solution": context.solution, "fold": fold, "images": len(learn)},
    )


def _parts(context, data, fold):
    """Store rows that a fold's network learns from, and those that compare its epochs.

    Where something is chosen by them they are the next fold, which is then not learnt from; the held-out fold chooses
    nothing in any case.
    """
    config = context.config
    apart = {fold} | ({(fold + 1) % config.n_folds} if config.network.chooses else set())
    judging = apart - {fold} if config.network.chooses else apart
    learn = data.rows(folds=[k for k in range(config.n_folds) if k not in apart], role="main")
    judge = data.rows(folds=judging, role="main")
    for rows, what in ((learn, "to train on"), (judge, "to validate on")):
        kinds = {0.0: "without COVID-19", 1.0: "with COVID-19"}
        for label in kinds.keys() - set(data.labels(rows).tolist()):
            raise InputError(f"fold {fold}: no image {kinds[label]} {what}; choose another n_folds")
    return learn, judge


# ---- prediction ----------------------------------------------------------------------------------------------------


def predict(context):
    """Probabilities out of fold, and of the test images as the mean over the folds' networks."""
    data, run, config = open_prepared(context), context.run, context.config
    key = predict_key(context, data)
    if run.is_done("predict", key, PREDICTED):
        log.info("predict: up to date")
        return
    for made in ("predict", "tune", "score", "submit"):  # these follow from it: no report of theirs in between
        run.forget(made)
    test, models = _test_rows(data, config), []
    oof = []
    for fold in config.folds:
        rows = data.rows(folds=[fold])
        model = load_network(config.network, trained_weights(run, fold, STAGE))
        probs = predict_view(context, data, [model], rows, config.view, f"out of fold {fold}")
        oof.append(pd.DataFrame({"image_id": data.ids(rows), "fold": fold, "probability": probs}))
        models.append(model)
    write_table(run.path("oof.parquet"), pd.concat(oof, ignore_index=True))
    probs = predict_view(context, data, models, test, config.view, "test images")
    write_table(run.path("test.parquet"), pd.DataFrame({"image_id": data.ids(test), "fold": -1, "probability": probs}))
    keep_config(context)
    run.record("predict", key, images=len(test) + sum(map(len, oof)))
    log.info(f"predicted {sum(map(len, oof)):,} images out of fold and {len(test):,} test images")


def predict_view(context, data, models, rows, view, title, config=None):
    """Probabilities float64 (n,) of store rows as networks that look at `view` see them; the mean over networks."""
    config = config or context.config.network
    return predict_rows(
        models,
        data,
        rows,
        config,
        view,
        context.device,
        context.config.tta,
        context.workers,
        title,
        context.config.audit.margin,
    )


def _test_rows(data, config):
    """Test images that can be judged: radiographs, and where the lungs alone are seen, with lungs that pass."""
    rows = data.rows("test")
    return rows[data.table["usable" if config.view == "lungs" else "ok"].to_numpy()[rows]]


def predict_key(context, data):
    """What the predictions follow from: weights, view, and the very pixels (a bad image may have been replaced)."""
    config = context.config
    weights = [file_hash(trained_weights(context.run, fold, STAGE)) for fold in config.folds]
    return [
        data.key,
        weights,
        list(config.tta),
        config.view,
        config.network.precision,
        data.pixels_key,
        data.ids(data.rows("test")).tolist(),
    ]


# ---- scores --------------------------------------------------------------------------------------------------------


def tune(context):
    """The threshold of COVID-19, each fold's chosen on the others, and the tables of the score."""
    data, run = open_prepared(context), context.run
    key = _tune_key(context, data)
    if run.is_done("tune", key, TUNED):
        log.info("tune: up to date")
        return
    for made in ("tune", "score", "submit"):
        run.forget(made)
    oof = scored(run, data)
    main = oof[oof["role"] == "main"]
    chosen, cuts = nested_thresholds(main, context.config.seed)
    by_fold = {str(fold): sorted(set(cuts[main["fold"] == fold])) for fold in main["fold"].unique()}
    write_json(run.path("tuned.json"), {"threshold": chosen, "by_fold": by_fold})  # of one fold its halves' two
    rules = {"0.5": np.full(len(main), HALF), "tuned": cuts}
    tables = [fold_table(main, thresholds).assign(rule=name) for name, thresholds in rules.items()]
    per_fold = pd.concat(tables, ignore_index=True)
    write_csv(run.path("per_fold.csv"), per_fold[["rule", *per_fold.columns.drop("rule")]])
    write_json(run.path("score.json"), summary(oof, cuts, rejected_shares(read_selection(run)), context.config.seed))
    keep_config(context)
    run.record("tune", key, score=read_score(run)["auroc"]["estimate"])
    log.info(f"threshold {chosen:.3f} by Youden's index, nested by fold")


def _tune_key(context, data):
    check_predicted(context.run, predict_key(context, data), PREDICTED)
    return [FIGURES, context.config.seed, context.run.step("predict")["key"]]


def is_tuned(context, data):
    """True where the figures in the run are those of its present networks and settings."""
    try:
        return context.run.is_done("tune", _tune_key(context, data), TUNED)
    except InputError:  # no predictions, or those of other networks
        return False


def score(context):
    """Say the honest offline score, and beside it that on images of the same collections."""
    run, data = context.run, open_prepared(context)
    if not run.is_done("tune", _tune_key(context, data), TUNED):
        tune(context)
    found = read_score(run)
    run.record("score", [run.step("tune")["key"]], auroc=found["auroc"]["estimate"])
    rates = ", ".join(f"{name} {_shown(found[name])}" for name in ("accuracy", "sensitivity", "specificity"))
    log.info(
        f"out of fold, {found['images']:,} images of {found['patients']:,} patients: AUROC "
        f"{_shown(found['auroc'])}; {rates} at 0.5"
    )
    same = found["same_source"]
    if same is None:
        log.info(
            "no image without COVID-19 comes from the collections of the COVID-19 images: how much of this score "
            "is the images' origin, this run cannot tell"
        )
    else:
        log.info(
            f"against the {same['negatives']:,} images without COVID-19 of the same collections: AUROC "
            f"{_shown(same['auroc'])}, specificity {_shown(same['specificity'])}"
        )


def _shown(interval):
    if interval["estimate"] is None:
        return "not defined"
    return "{estimate:.4f} [{low:.4f}, {high:.4f}]".format(**interval)


# ---- submission ----------------------------------------------------------------------------------------------------


def submit(context):
    """Write submission.csv, one row a test image, validate it, copy it under submissions/."""
    data, run = open_prepared(context), context.run
    check_predicted(run, predict_key(context, data), PREDICTED)
    rows = data.rows("test")
    if not len(rows):
        log.info("submit: no test images; --test names some")
        run.record("submit", [], rows=0, hidden=None)
        return
    images, test = data.table.iloc[rows], read_parquet(run.path("test.parquet")).set_index("image_id")["probability"]
    neutral = read_parquet(run.path("oof.parquet"))["probability"].mean()
    probs = test.reindex(images["image_id"])
    absent = images.loc[probs.isna().to_numpy(), "file_name"].tolist()
    if absent:
        log.info(
            f"{len(absent)} test images show no lungs that can be judged and get the mean probability "
            f"{neutral:.3f}: {', '.join(absent)}"
        )
    table = pd.DataFrame({SAMPLE[0]: images["file_name"].to_numpy(), SAMPLE[1]: probs.fillna(neutral).to_numpy()})
    table[SAMPLE[1]] = table[SAMPLE[1]].map(lambda value: f"{value:.6g}")
    path = run.path("submission.csv")
    write_submission(path, table)
    found = validate_probabilities(path, run.path("sample_submission.csv"), ordered=True)
    copy = copy_submission(context, path)
    run.record("submit", [file_hash(path)], rows=found.rows, hidden=_hidden_score(context, table), neutral=len(absent))
    log.info(f"valid submission: {found}; copy in {copy}")


def _hidden_score(context, table):
    """For the embedded sample: the AUROC on its test images, whose labels lie in hidden_test.csv."""
    prepared = context.run.step("prepare")
    if not prepared["synthetic"]:
        return None
    path = Path(prepared["data"]) / "hidden_test.csv"
    if not path.is_file():
        return None
    truth = read_table(path, ["filename", "label"], exact=False).set_index("filename")["label"].astype(int)
    if not table[SAMPLE[0]].isin(truth.index).all():
        return None
    value = auroc(truth[table[SAMPLE[0]]].to_numpy(), table[SAMPLE[1]].astype(float).to_numpy(), np.nan)
    return {"metric": "auroc", "value": float(value), "nothing": 0.5}


def report(context):
    """Write report.html from whatever the run has so far."""
    run, images = context.run, open_prepared(context)

    def is_current(step):
        if not is_tuned(context, images) or run.step(step) is None:
            return False  # `predict` and `tune` forget the steps behind them
        files = all(run.path(name).is_file() for name in AUDITED)
        return step != "audit" or (files and run.step("audit")["of"] == run.step("tune")["key"])

    job = SimpleNamespace(run=run, config=context.config, preset=context.preset, images=images, is_current=is_current)
    write_report(job, page)


def audit(context):
    """How much of the score is the images' origin: further networks, where the run's look, and a verdict."""
    from solutions.covid19.audit import run_audit  # late: it trains by this module

    data = open_prepared(context)
    if not is_tuned(context, data):
        raise InputError(f"{context.run.folder}: no score of these networks to audit; run the verb `run` first")
    run_audit(context, data)
    report(context)


VERBS = {
    "prepare": prepare,
    "train": train,
    "predict": predict,
    "tune": tune,
    "score": score,
    "submit": submit,
    "report": report,
    "audit": audit,
}
