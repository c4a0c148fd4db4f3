"""Repeat the paper's comparisons, and those that it leaves to future work, on the out-of-fold images of a run."""

from dataclasses import replace

import numpy as np
import pandas as pd

from common.compare import groups_of
from common.config import to_dict
from common.errors import log
from common.metrics.classification import mean_of_defined
from common.metrics.detection import bootstrap_map, coco_scores, evaluate, paired_map
from common.metrics.detection_errors import error_breakdown
from common.paths import read_csv, write_csv
from common.post.fusion import fuse
from common.predictions import read_predictions
from common.step import Step
from solutions.vinbigdata.config import CLASSES, NO_FINDING
from solutions.vinbigdata.data import COCO_FINDINGS, VOC_FINDINGS, out_of_fold
from solutions.vinbigdata.lungs import locate_findings
from solutions.vinbigdata.postprocess import DecisionRule, apply_rule
from solutions.vinbigdata.tuning import tune_detection

# paper, table 1 and 3.2: mAP on the test set
PUBLISHED = {"base": 0.165, "WBF": 0.186, "WBF + 2CC": 0.242, "WBF + several 2CCs": 0.237}
PUBLISHED_SWEEP = ((0.087, 0.165), (0.127, 0.163))  # paper, 3.2: mAP ranges for its best and second-best model
SWEPT_IOU = tuple(k / 10 for k in range(1, 11))  # 1: not fused
ALWAYS = ("ablation.csv", "wbf_sweep.csv", "errors_2cc.csv", "figure1.csv", "figure1_classes.csv", "figure1_curves.csv")
LOCATIONS = "locations.csv"


def run_ablation(job):
    """Write the tables of the paper's comparisons; all choices for a part of the images are made on the other parts.

    ablation.csv is table 1. base: the best member's boxes; WBF: all members fused; 2CC, WBF + 2CC: both with the rule
    of the paper; WBF + several 2CCs: the mean of all 2CCs. base and WBF add No finding only to images without boxes.
    Columns: step, map, low, high, findings (mean AP), before and after (boxes before fusion, after the rule), skipped
    (share of images above alpha, which need no detector), gain over base (paired), gain_low, gain_high, p, paper.
    errors_2cc.csv: box errors, mAP gained by fixing them. Others: `sweep_fusion`, `compare_members`, `locate_findings`.
    """
    config, oof, (images, truth) = job.config, read_predictions(job, "oof"), out_of_fold(job)
    every, groups = oof.tables["_healthy"].set_index("image_id"), groups_of(images)
    first = every["first" if "first" in every else "healthy"]
    one, best = every.assign(healthy=first), replace(config.fusion, method="best", weights=(2.0,))
    steps = {
        "base": (best, "none", one),
        "WBF": (config.fusion, "none", one),
        "2CC": (best, "replace", one),
        "WBF + 2CC": (config.fusion, "replace", one),
        "WBF + several 2CCs": (config.fusion, "replace", every),
        "WBF + winners' rule": (config.fusion, "append", one),
    }
    if not config.healthy_more:
        del steps["WBF + several 2CCs"]
    tuned, rows = {}, []
    for step, (fusion, rule, health) in steps.items():
        decision = replace(config.decision, rule=(rule,))
        if rule == "none":  # no classifier, hence no scores scaled by its probabilities
            decision = replace(decision, gamma=(0.0,), delta=(0.0,))
        found = tune_detection(oof.table, truth, images, health, config.members, fusion, decision, seed=config.seed)
        tuned[step], probs = found, health["healthy"][images["image_id"]].to_numpy()
        row = {"step": step, "map": found.score.estimate, "low": found.score.low, "high": found.score.high}
        row["findings"] = mean_of_defined(found.result.classes["ap"].to_numpy()[:NO_FINDING])
        row["before"] = len(oof.table) if fusion is config.fusion else None
        row["after"] = int((found.detections["class_id"] != NO_FINDING).sum())
        row["skipped"] = np.mean(probs > [found.part_rules[part].alpha for part in found.parts.tolist()])
        if step != "base":
            gain, p = paired_map(found.result, tuned["base"].result, groups, seed=config.seed)
            row |= {"gain": gain.estimate, "gain_low": gain.low, "gain_high": gain.high, "p": p}
        rows.append(row | {"paper": PUBLISHED.get(step)})
    errors = [
        error_breakdown(tuned[step].detections, truth, images["image_id"], VOC_FINDINGS).summary.add_suffix(f"_{when}")
        for when, step in (("before", "WBF"), ("after", "WBF + 2CC"))
    ]
    tables = {
        "ablation.csv": pd.DataFrame(rows)[[*rows[1]]].astype({"before": "Int64"}),
        "errors_2cc.csv": pd.concat(errors, axis=1).reset_index(),
        "wbf_sweep.csv": sweep_fusion(oof.table, truth, images, tuned["base"].members),
        **compare_members(job, oof.table, truth, images),
    }
    if "masks" in job.images.arrays:
        tables[LOCATIONS] = locate_findings(job.images)
    for name, table in tables.items():
        write_csv(job.run.path(name), table)
        if name != "figure1_curves.csv":
            log.info(f"{name}\n{table.to_string(index=False)}")


def sweep_fusion(boxes, truth, images, members):
    """Return the mAP when WBF fuses only the best member's boxes, and only the second-best member's (paper, 3.2).

    members: DataFrame of member and map. Columns: rank, member, iou (1: not fused), map, boxes, and the paper's range.
    Images without boxes get No finding.
    """
    rows = []
    ranked = members.sort_values("map", ascending=False, kind="stable")["member"]
    for rank, (member, published) in enumerate(zip(ranked, PUBLISHED_SWEEP, strict=False), 1):
        own = {member: boxes[boxes["member"] == member]}
        for iou in SWEPT_IOU:
            fused = fuse(own, images, [1.0], iou, method="wbf" if iou < 1 else "none")
            decided = apply_rule(fused, images["image_id"], None, DecisionRule((1.0,), iou))
            score = evaluate(decided, truth, images["image_id"]).mean_ap
            rows.append([rank, member, iou, score, len(fused), *published])
    return pd.DataFrame(rows, columns=["rank", "member", "iou", "map", "boxes", "paper_low", "paper_high"])


def compare_members(job, boxes, truth, images):
    """Return the tables of the paper's figure 1.

    figure1.csv: member, map with low and high (findings only, over all images) and map_coco, the paper's validation
    metric. figure1_classes.csv: COCO's AP of each class by member. figure1_curves.csv: member, epoch, iteration and
    map_coco at the end of each epoch, averaged over the folds.
    """
    config, members, classes, curves = job.config, [], {}, []
    networks = {(network.fold, network.stage): network for network in job.recipe.networks(job)}
    for member in config.members:
        own, detector = boxes[boxes["member"] == member], config.detector_of(member)
        result = evaluate(own, truth, images["image_id"], VOC_FINDINGS)
        score = bootstrap_map(result, groups_of(images), seed=config.seed)[1]
        coco, by_class = coco_scores(own, truth, images["image_id"], COCO_FINDINGS)
        figures = {"map": score.estimate, "low": score.low, "high": score.high, "map_coco": coco["ap"]}
        members.append({"member": member, **figures})
        classes[member] = by_class["ap"].to_numpy()
        for fold in config.folds:
            used = networks[fold, member].rows(job, fold)[0]
            curve = read_csv(job.run.path(f"fold{fold}", member, "history.csv"), ["epoch", "map_coco"])
            curve = curve.assign(member=member, iteration=(curve["epoch"] + 1) * (len(used) // detector.batch_size))
            curves.append(curve[["member", "epoch", "iteration", "map_coco"]])
    boxes = result.classes["n_truth"].to_numpy()
    classes = pd.DataFrame({"class": CLASSES[:NO_FINDING], "boxes": boxes, **classes})
    curves = pd.concat(curves).groupby(["member", "epoch"], sort=False).mean().reset_index()
    return {"figure1.csv": pd.DataFrame(members), "figure1_classes.csv": classes, "figure1_curves.csv": curves}


ABLATION = Step(
    "ablate",
    run_ablation,
    needs=("predict",),
    reads=lambda job: [to_dict(job.config.fusion), to_dict(job.config.decision), job.config.seed],
    files=lambda job: (*ALWAYS, *[LOCATIONS] * job.config.needs_lungs),
)
