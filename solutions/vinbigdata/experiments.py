"""Beside the recipe: the paper's comparisons, on the out-of-fold images of a run."""

import dataclasses
import logging

import numpy as np
import pandas as pd

from common.metrics.detection import COCO, coco_scores
from common.paths import read_parquet
from common.steps import check_predicted, write_csv
from solutions.vinbigdata.data import open_prepared
from solutions.vinbigdata.pipeline import PREDICTED, experiment_key, predict_key
from solutions.vinbigdata.training import FINDINGS
from solutions.vinbigdata.tuning import tune_detection

log = logging.getLogger(__name__)
TABLES = ("ablation.csv", "figure1.csv")
PUBLISHED = {"base": 0.165, "+ WBF": 0.186, "+ WBF + 2CC": 0.242}  # paper, table 1: mAP on the test set


def run_ablation(context):
    """Score the steps of the paper's table 1 and the members of its figure 1; writes ablation.csv and figure1.csv.

    base: the boxes of the best member alone, by the choice of the other parts; + WBF: all members fused; + WBF + 2CC:
    with the decision rule of the configuration; + 2CC: the best member under the rule. In the first two an image
    without boxes says No finding and nothing else does, as in the paper. Columns of ablation.csv: step, map, low, high,
    paper. figure1.csv: member, map (the findings alone) and map_coco, the paper's validation figure.
    """
    run, config, data = context.run, context.config, open_prepared(context)
    check_predicted(run, predict_key(context, data), PREDICTED)
    key = experiment_key(context)
    if run.is_done("ablation", key, TABLES):
        log.info("ablate: up to date")
        return
    run.forget("ablation")
    rows = np.concatenate([data.rows(folds=[fold]) for fold in config.folds])
    images, truth = data.table.set_index("row").loc[rows].reset_index(), data.truth(rows)
    oof = read_parquet(run.path("oof.parquet"))
    healthy = read_parquet(run.path("oof_healthy.parquet")).set_index("image_id")["healthy"]

    def tuned(boxes, members, method, rule):
        fusion = dataclasses.replace(config.fusion, method=method, weights=config.fusion.weights[: len(members)])
        decision = dataclasses.replace(config.decision, rule=rule)
        return tune_detection(boxes, truth, images, healthy, members, fusion, decision, seed=config.seed)

    whole = tuned(oof, config.members, config.fusion.method, "none")
    best = whole.members.sort_values("map", ascending=False)["member"].iloc[0]
    alone = oof[oof["member"] == best]
    rule = config.decision.rule
    steps = {
        "base": tuned(alone, (best,), "none", "none"),
        "+ WBF": whole,
        "+ 2CC": tuned(alone, (best,), "none", rule),
        "+ WBF + 2CC": tuned(oof, config.members, config.fusion.method, rule),
    }
    table = [
        {"step": name, "map": found.score.estimate, "low": found.score.low, "high": found.score.high,
         "paper": PUBLISHED.get(name)}
        for name, found in steps.items()
    ]  # fmt: skip
    table = pd.DataFrame(table)
    write_csv(run.path("ablation.csv"), table)
    counted = dataclasses.replace(COCO, counted=FINDINGS)
    coco = {member: coco_scores(oof[oof["member"] == member], truth, images["image_id"], counted)[0]["ap"]
            for member in config.members}  # fmt: skip
    members = whole.members.assign(map_coco=whole.members["member"].map(coco)).drop(columns="weight")
    write_csv(run.path("figure1.csv"), members)
    run.record("ablation", key)
    for line in [*table.to_string(index=False).splitlines(), *members.to_string(index=False).splitlines()]:
        log.info(line)
