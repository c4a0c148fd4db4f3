"""Metrics of the tools `table` and `score_predictions`: the challenge's score, against its label table."""

import pandas as pd

from common.compare import Comparison, means_of
from common.data import coco
from common.metrics.detection_counts import image_scores, match_boxes
from common.paths import read_parquet
from common.post.boxes import pack_boxes, unpack_boxes
from solutions.rsna_pneumonia.config import CLASS_NUMBERS
from solutions.rsna_pneumonia.data import read_labels
from solutions.rsna_pneumonia.postprocess import read_submission


def results(job, split):
    """Return the score of each out-of-fold image, under a rule chosen without it; NaN: the image does not count."""
    table, truth = read_parquet(job.run.path("oof_scores.parquet")), job.images.tables["boxes.parquet"]
    known = job.images.table.set_index("image_id").loc[table["image_id"], ["patient_id", "fold"]]
    return {"": table.assign(truth=pack_boxes(truth, table["image_id"])).join(known, on="image_id")}


def read_boxes(path, name="found", read=read_submission):
    """Return the boxes of each image of a submission, or of a COCO file; read(path) -> boxes, ids."""
    if path.suffix == ".json":
        boxes, images = coco.read_boxes(path, CLASS_NUMBERS)
        ids = images["image_id"]
    else:
        boxes, ids = read(path)
    return pd.DataFrame({name: pack_boxes(boxes, ids)}, list(ids))


def join(predictions, labels):
    """Return the score of each image."""
    ids = predictions.index
    found, truth = unpack_boxes(predictions["found"], ids), unpack_boxes(labels.loc[ids, "truth"], ids)
    return pd.DataFrame({"score": image_scores(match_boxes(found, truth, ids))}, ids)


def read_truth(path):
    """Return the true boxes of each image of the label table."""
    return read_boxes(path, "truth", read_labels)


COMPARISON = Comparison(results, means_of({"mAP": "score"}), read_boxes, read_truth, "mAP", "tune", join=join)
