"""VinBigData: detectors of findings, the fusion of their boxes, and a classifier of healthy images (2CC).

"Paper" is Berger et al.; config.py has every number with its source.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from scipy.special import expit

from common import detection
from common.config import file_hash, from_dict
from common.data.box_augment import pipeline
from common.further import rows_with_further
from common.metrics.detection_errors import error_breakdown
from common.metrics.statistics import format_interval
from common.paths import read_parquet, write_table
from common.post.fusion import fuse_members
from common.recipe import Choice, Solution
from common.submit.validate import validate_boxes
from solutions.vinbigdata import data, experiments, lungs, postprocess, report, tuning
from solutions.vinbigdata.comparison import COMPARISON
from solutions.vinbigdata.config import CLASSES, KAGGLE, NO_FINDING, NOTHING, classes_of, member_parts
from solutions.vinbigdata.postprocess import DecisionRule


def made_with(config):
    """Return the settings that `prepare` depends on, the segmenter's hash included where a member needs lungs."""
    made = {name: getattr(config, name) for name in ("n_folds", "rater_aware", "seed", "store_size")}
    made |= {f"fusion.{name}": getattr(config.fusion, name) for name in ("raters", "raters_iou")}
    made |= {"boxes": list(config.boxes)} if config.boxes else {}
    return made | {"lungs": next(map(file_hash, lungs.assets(config).values()), None)}


def networks(job):
    """Return each fold's detectors, one per member, and its 2CCs, which may use a different split into folds."""
    config, trainings = job.config, []
    for fold in dict.fromkeys((*config.folds, *config.healthy_trained)):
        members = config.members if fold in config.folds else ()
        trainings += [detector_network(config, fold, member) for member in members]
        if fold in config.healthy_trained:
            trainings += [healthy_network(config, fold, backbone) for backbone in config.healthy_backbones]
    return trainings


def detector_network(config, fold, member):
    """Return the detector of an ensemble member (3.1)."""
    detector = config.detector_of(member)
    augmentation, size, classes = member_parts(member, detector)[1], detector.size, classes_of(member)

    def rows(job, fold):
        rows, held_out = rows_with_further(job, fold)
        names = [data.FINDINGS[number] for number in classes] or ["abnormal"]
        found = job.images.at(rows)[names].to_numpy().any(1)
        healthy = np.random.default_rng([job.config.seed, fold]).permutation(rows[~found])
        return np.sort([*rows[found], *healthy[: round(detector.healthy * found.sum())]]), held_out

    def taught(job, rows):
        """Return the rows with a teacher's box of the classes; rows without one must not count as healthy images."""
        return rows[np.isin(rows, [*detection.boxes_by_row(job.images, classes)])]

    network = detection.detector_network(
        fold,
        member,
        detector,
        NO_FINDING,
        lambda: pipeline(augmentation, size, detector.default_mapper),
        partial(data.detector_figures, classes=classes),
        rows,
        lungs.samples if detector.lung_channel else None,
        classes,
    )
    return replace(network, taught=taught)


def healthy_network(config, fold, backbone):
    """Return the 2CC of one of its own folds; each of these may combine several of the detectors' folds (3.2)."""
    classifier = replace(config.healthy, backbone=backbone)

    def rows(job, fold):
        parts = np.arange(config.n_folds) % config.healthy_modulus == fold
        return [job.images.rows(folds=np.flatnonzero(chosen)) for chosen in (~parts, parts)]

    stage = "healthy" if backbone == config.healthy.backbone else f"healthy-{backbone}"
    labels = data.health_labels if classifier.findings else data.healthy
    n_outputs = 1 + NO_FINDING * classifier.findings
    network = detection.gate_network(fold, stage, classifier, labels, rows, n_outputs=n_outputs)
    return replace(network, taught=None)  # its folds are not those of a teacher's boxes


def predict_rows(job, folds, rows, path, title):
    """Return the boxes of one fold's detectors, and for held-out rows the probabilities of a healthy image.

    For test rows it returns the logits of the fold's share of the 2CCs instead, which `pool` averages.
    """
    config, ids, (fold,) = job.config, job.images.ids(rows), folds
    detectors = [detector_network(config, fold, member) for member in config.members]
    held_out = (job.images.at(rows)["fold"] == fold).all()
    shares = np.array_split(config.healthy_trained, len(config.folds))
    folds_2cc = [fold % config.healthy_modulus] if held_out else shares[config.folds.index(fold)].tolist()
    classifiers = [[healthy_network(config, k, name) for k in folds_2cc] for name in config.healthy_backbones]
    logits = np.stack([detection.predict_logits(job, same, rows, title) for same in classifiers])
    columns = ["healthy", *postprocess.FINDING_COLUMNS][: logits.shape[2]]
    health = pd.DataFrame(logits.mean(0), columns=columns)
    if held_out:
        health = expit(health)
        if config.healthy_more:
            health["first"] = expit(logits[0, :, 0])  # of the first 2CC alone, for `ablate`
    health.insert(0, "image_id", np.tile(ids, len(folds_2cc)))
    boxes = detection.predict_members(job, detectors, rows, title)
    for member in filter(classes_of, config.members):
        boxes = boxes[(boxes["member"] != member) | boxes["class_id"].isin(classes_of(member))]
    return {"": boxes.reset_index(drop=True), "_healthy": health}


def pool(suffix, tables):
    """Return all boxes of the test images, or their probabilities of being healthy."""
    table = detection.pool_tables(suffix, tables)
    # from the mean of logits, since a mean of probabilities would rarely exceed a high alpha
    return table.assign(**expit(table.drop(columns=["image_id", "fold"]))) if suffix else table


def choose(job, oof):
    """Choose the fusion rule with the best out-of-fold mean AP; score it nested over folds, or halves of one fold."""
    config, (images, truth) = job.config, data.out_of_fold(job)
    health = oof.tables["_healthy"].set_index("image_id")
    options = {"members": config.members, "fusion": config.fusion, "decision": config.decision, "seed": config.seed}
    tuned = tuning.tune_detection(oof.table, truth, images, health, **options)
    classes, aps = tuned.result.classes.reset_index(), tuned.class_scores
    classes.insert(1, "name", [CLASSES[number] for number in classes["class_id"]])
    tables = {
        "surface.csv": tuned.surface,
        "sweep.csv": tuned.sweep,
        "members.csv": tuned.members,
        "classes.csv": classes.assign(low=[each.low for each in aps], high=[each.high for each in aps]),
        "errors.csv": error_breakdown(tuned.detections, truth, images["image_id"]).summary.reset_index(),
        "oof_decided.parquet": tuned.detections,
    }
    tested = read_parquet(job.run.path("test_healthy.parquet"))["healthy"]  # read without the millions of boxes
    figures = tuning.score_figures(tuned, truth, images, health["healthy"], tested)
    return Choice(tuned.as_dict(), tuned.score.estimate, figures, tables)


def describe(figures):
    """Return the lines that report the score."""
    return [
        f"out-of-fold mAP@0.4 {format_interval(figures['map'])} over {figures['images']} images (without boxes "
        f"{figures['map_no_finding']:.4f}), nested by {figures['nested_by']}; 2CC accuracy "
        f"{figures['healthy']['accuracy']:.4f}"
    ]


def answer(job, test, rule, neutral):
    """Return the submission, with No finding for unreadable images; writes test_decided.parquet."""
    config, table = job.config, job.images.table
    rule = from_dict(DecisionRule, rule.get("rule"), "tuned.json: rule")
    images = table[table["split"] == "test"]
    readable = images.loc[images["ok"], "image_id"]
    boxes = test.table if len(readable) == len(images) else test.table[test.table["image_id"].isin(readable)]
    fused = fuse_members(boxes, table, config.members, rule, config.fusion.method)
    decided = postprocess.apply_rule(fused, readable, test.tables["_healthy"].set_index("image_id"), rule)
    write_table(job.run.path("test_decided.parquet"), decided)
    return postprocess.prediction_strings(decided, images["image_id"], table)


def check(path, job):
    """Return the Summary of a submission of the run's test images."""
    sizes = {row.image_id: (row.width, row.height) for row in job.images.at(job.images.rows("test")).itertuples()}
    return validate_boxes(path, job.sample_path, sizes=sizes, ordered=True)


SOLUTION = Solution(
    "vinbigdata",
    KAGGLE.score,
    made_with=made_with,
    read=data.read_competition,
    refine=lungs.with_lungs(data.fuse_boxes),
    read_test=data.read_test,
    refine_test=lungs.with_lungs(data.with_originals),
    networks=networks,
    predict=predict_rows,
    suffixes=lambda config: ("", "_healthy"),
    pool=pool,
    choose=choose,
    chosen=("surface.csv", "sweep.csv", "members.csv", "classes.csv", "errors.csv", "oof_decided.parquet"),
    describe=describe,
    neutral=lambda job: NOTHING,
    answer=answer,
    answered=("test_decided.parquet",),
    check=check,
    boxes=lambda job: (read_parquet(job.run.path("test_decided.parquet")), CLASSES),
    comparison=COMPARISON,
    hidden="hidden/truth.csv",
    report=report,
    further_steps=(experiments.ABLATION,),
    assets=lungs.assets,
    use_assets=lambda config, files: replace(config, lungs=str(files.get(lungs.FILE, config.lungs))),
)
