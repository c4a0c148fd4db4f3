"""RSNA pneumonia: detectors find opacities, a gate finds images without any, and a rule turns both into boxes."""

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd
from scipy.special import expit

from common import detection
from common.config import from_dict
from common.data.box_augment import pipeline
from common.further import rows_with_further
from common.metrics.classification import auroc
from common.metrics.detection_counts import image_scores, match_boxes, mean_score
from common.metrics.statistics import as_interval, bootstrap, format_interval
from common.recipe import Choice, Solution
from common.tuning import tune_nested
from solutions.rsna_pneumonia import data, postprocess, report
from solutions.rsna_pneumonia.comparison import COMPARISON
from solutions.rsna_pneumonia.config import CLASS_NUMBERS
from solutions.rsna_pneumonia.postprocess import BoxRule, apply_rule, fuse_boxes

PREPARED = ("n_folds", "seed", "store_size")  # settings that `prepare` depends on; so does `boxes`, if given


def fold_networks(config, fold):
    """Return one fold's detectors and its gate; epochs are compared by the mAP of boxes scored at least 0.2 (ours)."""

    def figures(images, found, rows):
        truth = detection.true_boxes(images, rows)
        return {"map": mean_score(image_scores(match_boxes(found, truth, images.ids(rows)), 0.2))}

    def target(images, rows):
        return images.at(rows)["target"]

    transform, trainings = partial(pipeline, config.detector.augmentation, config.detector.size), []
    for member in config.members:
        detector = replace(config.detector, architecture=member)
        trainings.append(detection.detector_network(fold, member, detector, 1, transform, figures, rows_with_further))
    return [*trainings, detection.gate_network(fold, "gate", config.gate, target)]


def predict_rows(job, folds, rows, path, title):
    """Return the boxes of one fold's detectors, and the logits of its gate."""
    *detectors, gate = fold_networks(job.config, *folds)
    logits = detection.predict_logits(job, [gate], rows, title)[:, 0]
    table = pd.DataFrame({"image_id": job.images.ids(rows), "logit": logits})
    return {"": detection.predict_members(job, detectors, rows, title), "_gate": table}


def choose(job, oof):
    """Choose the rule with the best out-of-fold mean score; score it nested over folds, or halves of a single fold."""
    config, gate = job.config, expit(oof.tables["_gate"].set_index("image_id")["logit"])
    rows = np.concatenate([job.images.rows(folds=[fold]) for fold in config.folds])
    images, ids = job.images.at(rows), job.images.ids(rows)
    truth = detection.true_boxes(job.images, rows)
    probs, target = gate[ids].to_numpy(), images["target"].to_numpy()
    fused = cache(lambda iou: fuse_boxes(oof.table, images, config.members, iou))
    matched = cache(lambda iou, factor: match_boxes(postprocess.shrink_boxes(fused(iou), factor), truth, ids))

    def score(rule):
        return image_scores(matched(rule.iou, rule.shrink), rule.threshold, probs >= rule.gate)

    rules = postprocess.list_rules(config.decision)
    tuned = tune_nested(rules, score, images["fold"], job.images.patients(rows), config.seed)
    under = [(gate[ids[tuned.parts == part]], rule) for part, rule in tuned.fold_rules.items()]
    figures = {
        "map": as_interval(bootstrap(tuned.dice, job.images.groups(rows), skip_nan=True)),
        "map_not_nested": tuned.naive,
        "images": len(images),
        "positive": int(target.sum()),
        "counted": int(np.isfinite(tuned.dice).sum()),
        "gate_auroc": float(auroc(target, probs)),
        "nested_by": "halves of the patients" if tuned.halves else "folds",
    }
    tables = {
        "surface.csv": tuned.surface("map"),
        "oof_scores.parquet": pd.DataFrame({"image_id": ids, "score": tuned.dice, "gate": probs}),
        "oof_decided.parquet": pd.concat([apply_rule(fused(rule.iou), part, rule) for part, rule in under]),
    }
    return Choice(tuned.as_dict(), tuned.score, figures, tables)


def describe(figures):
    """Return the lines that report the score."""
    counts = f"{figures['counted']} of {figures['images']} images count; AUROC of the gate {figures['gate_auroc']:.4f}"
    return [f"out-of-fold mAP {format_interval(figures['map'])}, nested by {figures['nested_by']}; {counts}"]


def answer(job, test, rule, neutral):
    """Return the submission; rows of unreadable images are blank."""
    rule, table = from_dict(BoxRule, rule.get("rule"), "tuned.json: rule"), job.images.table
    images = table[table["split"] == "test"]
    gate = expit(test.tables["_gate"].set_index("image_id")["logit"])[images.loc[images["ok"], "image_id"]]
    decided = apply_rule(fuse_boxes(test.table, images, job.config.members, rule.iou), gate, rule)
    return postprocess.prediction_strings(decided, images["image_id"])


SOLUTION = Solution(
    "rsna_pneumonia",
    "map",
    made_with=lambda config: {name: getattr(config, name) for name in (*PREPARED, *["boxes"] * bool(config.boxes))},
    read=data.read_competition,
    refine=data.set_sizes,
    read_test=data.read_test,
    networks=lambda job: [network for fold in job.config.folds for network in fold_networks(job.config, fold)],
    predict=predict_rows,
    suffixes=lambda config: ("", "_gate"),
    pool=detection.pool_tables,
    soft_labels=lambda found: found.tables["_gate"].assign(target=lambda table: expit(table["logit"])),
    choose=choose,
    chosen=("surface.csv", "oof_scores.parquet", "oof_decided.parquet"),
    describe=describe,
    answer=answer,
    check=lambda path, job: data.KAGGLE.check(path, job.sample_path),
    boxes=lambda job: (postprocess.read_submission(job.run.path("submission.csv"))[0], list(CLASS_NUMBERS)),
    comparison=COMPARISON,
    hidden="hidden/truth.csv",
    report=report,
)
