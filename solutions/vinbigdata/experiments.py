"""Repeat the paper's comparisons on the out-of-fold images of a run."""

import logging
from dataclasses import replace

import pandas as pd

from common.config import to_dict
from common.metrics.classification import mean_of_defined
from common.metrics.detection import bootstrap_map, coco_scores, evaluate, paired_map
from common.paths import write_csv
from common.recipe import read_predictions
from common.step import Step
from solutions.vinbigdata.config import NO_FINDING
from solutions.vinbigdata.data import out_of_fold
from solutions.vinbigdata.models import COCO_FINDINGS, VOC_FINDINGS
from solutions.vinbigdata.tuning import patients_of, tune_detection

log = logging.getLogger(__name__)
PUBLISHED = {"base": 0.165, "WBF": 0.186, "WBF + 2CC": 0.242}  # paper, table 1: mAP on the test set


def run_ablation(job):
    """Score the steps of the paper's table 1 and the members of its figure 1; writes ablation.csv and figure1.csv.

    base: the boxes of the best member; WBF: all members fused; 2CC and WBF + 2CC: the same two with the paper's rule;
    WBF + winners' rule: with the winners' rule. All choices, including the best member, are made for each part
    of the images on the others. In the first two steps only images without boxes get No finding, as in the paper.
    Columns of ablation.csv: step, map, low, high, findings (their mean AP), gain over the base with gain_low, gain_high
    and p (paired, by patient), paper. figure1.csv: member, map with low and high (findings only, over all images) and
    map_coco, the paper's validation metric.
    """
    config, oof, (images, truth) = job.config, read_predictions(job, "oof"), out_of_fold(job)
    healthy, groups = oof.tables["_healthy"].set_index("image_id")["healthy"], patients_of(images)
    best = replace(config.fusion, method="best", weights=(2.0,))
    steps = {
        "base": (best, "none"),
        "WBF": (config.fusion, "none"),
        "2CC": (best, "replace"),
        "WBF + 2CC": (config.fusion, "replace"),
        "WBF + winners' rule": (config.fusion, "append"),
    }
    base, rows = None, []
    for step, (fusion, rule) in steps.items():
        decision = replace(config.decision, rule=(rule,))
        found = tune_detection(oof.table, truth, images, healthy, config.members, fusion, decision, seed=config.seed)
        findings = mean_of_defined(found.result.classes["ap"].to_numpy()[:NO_FINDING])
        row = {"step": step, **_with_interval(found.score), "findings": findings}
        if base is None:
            base = found
        else:
            gain, p = paired_map(found.result, base.result, groups, seed=config.seed)
            row |= {"gain": gain.estimate, "gain_low": gain.low, "gain_high": gain.high, "p": p}
        rows.append(row | {"paper": PUBLISHED.get(step)})
    columns = ["step", "map", "low", "high", "findings", "gain", "gain_low", "gain_high", "p", "paper"]
    table, members = pd.DataFrame(rows)[columns], []
    for member in config.members:
        boxes = oof.table[oof.table["member"] == member]
        result = evaluate(boxes, truth, images["image_id"], VOC_FINDINGS)
        coco = coco_scores(boxes, truth, images["image_id"], COCO_FINDINGS)[0]["ap"]
        score = bootstrap_map(result, groups, seed=config.seed)[1]
        members.append({"member": member, **_with_interval(score), "map_coco": coco})
    members = pd.DataFrame(members)
    write_csv(job.run.path("ablation.csv"), table)
    write_csv(job.run.path("figure1.csv"), members)
    for line in [*table.to_string(index=False).splitlines(), *members.to_string(index=False).splitlines()]:
        log.info(line)


def _with_interval(score):
    return {"map": score.estimate, "low": score.low, "high": score.high}


ABLATION = Step(
    "ablate",
    run_ablation,
    needs=("predict",),
    reads=lambda job: [to_dict(job.config.fusion), to_dict(job.config.decision), job.config.seed],
    files=("ablation.csv", "figure1.csv"),
)
