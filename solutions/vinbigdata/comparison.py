"""Metrics of the tools `table` and `score_predictions`: mean AP at IoU > 0.4, for submissions against train.csv."""

import pandas as pd

from common.compare import Comparison, measure_boxes
from common.metrics.detection import VOC2010
from common.paths import read_parquet
from common.post.boxes import pack_boxes
from common.post.fusion import fuse_raters
from solutions.vinbigdata.config import CLASSES, PRESETS
from solutions.vinbigdata.data import JOIN, out_of_fold, read_train
from solutions.vinbigdata.postprocess import list_images, parse_predictions


def results(job, split):
    """Return the true boxes of each out-of-fold image, and its predicted ones under a rule chosen without it."""
    images, truth = out_of_fold(job)
    ids, found = images["image_id"], read_parquet(job.run.path("oof_decided.parquet"))
    return {"": images.assign(found=pack_boxes(found, ids), truth=pack_boxes(truth, ids))}


def read_submission(path):
    """Return the boxes of each image of a submission (image_id, PredictionString) or of a COCO file."""
    ids = list_images(path)
    return pd.DataFrame({"found": pack_boxes(parse_predictions(path), ids)}, ids)


def read_labels(path):
    """Return the true boxes of each image of train.csv, fused over its raters as in the preset `paper`."""
    fusion = PRESETS["paper"].fusion
    boxes = fuse_raters(read_train(path), fusion.raters_iou, JOIN[fusion.raters])
    ids = boxes["image_id"].unique()
    return pd.DataFrame({"truth": pack_boxes(boxes, ids)}, ids)


def measure(table, *how):
    """Return the mean AP at IoU > 0.4, and the AP of each class with a true box."""
    return measure_boxes(table, CLASSES, VOC2010, *how)


COMPARISON = Comparison(results, measure, read_submission, read_labels, "mAP", "tune")
