"""What is measured of the networks, and the logits of the classifiers of healthy images (2CC)."""

from dataclasses import replace

import numpy as np

from common.infer import tta
from common.metrics.detection import COCO, VOC2010, coco_scores, evaluate
from common.network import predict
from solutions.vinbigdata.config import NO_FINDING
from solutions.vinbigdata.data import truth_of

FINDINGS = tuple(range(NO_FINDING))
VOC_FINDINGS, COCO_FINDINGS = (replace(rule, counted=FINDINGS) for rule in (VOC2010, COCO))  # without class 14


def detector_figures(images, table, rows):
    """Return the mean APs of a detection table on rows, over the findings that occur there.

    map: the competition's AP, VOC 2010 at IoU > 0.4; map_coco: COCO's, the paper's validation metric.
    """
    truth, ids = truth_of(images, rows), images.ids(rows)
    return {
        "map": evaluate(table, truth, ids, VOC_FINDINGS).mean_ap,
        "map_coco": coco_scores(table, truth, ids, COCO_FINDINGS)[0]["ap"],
    }


def predict_logits(job, networks, rows, title=""):
    """Return the logits of store rows by each of several 2CCs, one after the other, float64 (k · n,)."""
    logits = [np.zeros(0)]
    for each in networks:
        exact = replace(each, config=replace(each.config, precision="fp32"))  # in bf16, confident images would tie
        logits.append(predict(job, [exact], rows, tta.views(job.config.tta), f"{title}, 2CC {each.fold}")[:, 0])
    return np.concatenate(logits)
