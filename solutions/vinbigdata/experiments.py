"""Beside the recipe: the paper's comparisons, on the out-of-fold images of a run."""

import dataclasses
import logging

import numpy as np
import pandas as pd

from common.metrics.classification import mean_of_defined
from common.metrics.detection import COCO, VOC2010, bootstrap_map, coco_scores, evaluate, paired_map
from common.paths import read_parquet
from common.steps import check_predicted, write_csv
from solutions.vinbigdata.data import open_prepared
from solutions.vinbigdata.pipeline import PREDICTED, experiment_key, predict_key
from solutions.vinbigdata.training import FINDINGS
from solutions.vinbigdata.tuning import patients_of, tune_detection

log = logging.getLogger(__name__)
TABLES = ("ablation.csv", "figure1.csv")
PUBLISHED = {"base": 0.165, "+ WBF": 0.186, "+ WBF + 2CC": 0.242}  # paper, table 1: mAP on the test set


def run_ablation(context):
    """Score the steps of the paper's table 1 and the members of its figure 1; writes ablation.csv and figure1.csv.

    base: the boxes of the best member alone; + WBF: all members fused; + 2CC and + WBF + 2CC: the same two under the
    paper's rule, and + WBF + winners' rule under the other. Everything chosen, the best member too, is chosen for each
    part of the images by the others. In the first two an image without boxes says No finding and nothing else does, as
    in the paper. Columns of ablation.csv: step, map, low, high, findings (mean AP of these alone), gain over the base
    with gain_low, gain_high and p (paired, by patient), paper. figure1.csv: member, map with low and high (findings
    alone, over all images) and map_coco, the paper's validation figure.
    """
    run, config, data = context.run, context.config, open_prepared(context)
    check_predicted(run, predict_key(context, data), PREDICTED)
    key = experiment_key(context)
    if run.is_done("ablate", key, TABLES):
        log.info("ablate: up to date")
        return
    run.forget("ablate")
    rows = np.concatenate([data.rows(folds=[fold]) for fold in config.folds])
    images, truth = data.table.set_index("row").loc[rows].reset_index(), data.truth(rows)
    oof = read_parquet(run.path("oof.parquet"))
    healthy = read_parquet(run.path("oof_healthy.parquet")).set_index("image_id")["healthy"]

    def tuned(method, rule):
        fusion = dataclasses.replace(config.fusion, method=method, weights=(2.0,) if method == "best" else weights)
        decision = dataclasses.replace(config.decision, rule=(rule,))
        return tune_detection(oof, truth, images, healthy, config.members, fusion, decision, seed=config.seed)

    weights, whole = config.fusion.weights, config.fusion.method
    steps = {
        "base": tuned("best", "none"),
        "+ WBF": tuned(whole, "none"),
        "+ 2CC": tuned("best", "replace"),
        "+ WBF + 2CC": tuned(whole, "replace"),
        "+ WBF + winners' rule": tuned(whole, "append"),
    }
    groups = patients_of(images)
    table = []
    for name, found in steps.items():
        gain, p = paired_map(found.result, steps["base"].result, groups, seed=config.seed)
        table.append(
            {
                "step": name,
                "map": found.score.estimate,
                "low": found.score.low,
                "high": found.score.high,
                "findings": mean_of_defined(found.result.classes["ap"].to_numpy()[list(FINDINGS)]),
                "gain": gain.estimate,
                "gain_low": gain.low,
                "gain_high": gain.high,
                "p": p,
                "paper": PUBLISHED.get(name),
            }
        )
    table[0] |= dict.fromkeys(("gain", "gain_low", "gain_high", "p"))
    table = pd.DataFrame(table)
    write_csv(run.path("ablation.csv"), table)
    alone, coco = (dataclasses.replace(rule, counted=FINDINGS) for rule in (VOC2010, COCO))
    members = []
    for member in config.members:
        mine = oof[oof["member"] == member]
        _, score = bootstrap_map(evaluate(mine, truth, images["image_id"], alone), groups, seed=config.seed)
        members.append(
            {
                "member": member,
                "map": score.estimate,
                "low": score.low,
                "high": score.high,
                "map_coco": coco_scores(mine, truth, images["image_id"], coco)[0]["ap"],
            }
        )
    members = pd.DataFrame(members)
    write_csv(run.path("figure1.csv"), members)
    run.record("ablate", key)
    for line in [*table.to_string(index=False).splitlines(), *members.to_string(index=False).splitlines()]:
        log.info(line)
