"""What `table` and `score_predictions` measure: the challenge's score, of submissions against its label table."""

import pandas as pd

from common.compare import Comparison, means_of
from common.metrics.detection_counts import image_scores, match_boxes
from common.paths import read_parquet
from common.post.boxes import BOX
from common.post.tables import pack_boxes, unpack_boxes
from common.submit.table import read_table
from solutions.rsna_pneumonia.config import SAMPLE
from solutions.rsna_pneumonia.data import read_labels
from solutions.rsna_pneumonia.postprocess import read_submission

TRUTH, FOUND = ["class_id", *BOX], ["class_id", *BOX, "score"]


def results(job, split):
    """Return the nested score of each out-of-fold image, NaN where it does not count."""
    table = read_parquet(job.run.path("oof_scores.parquet"))
    known = job.images.at(job.images.rows_of(table["image_id"])).reset_index(drop=True)
    truth = pack_boxes(job.images.tables["boxes.parquet"], table["image_id"], TRUTH)
    return {"": table.assign(patient_id=known["patient_id"], fold=known["fold"], truth=truth)}


def read_boxes(path):
    """Return the boxes of each image of a submission."""
    ids = read_table(path, SAMPLE)[SAMPLE[0]]
    return pd.DataFrame({"found": pack_boxes(read_submission(path), ids, FOUND)}, ids.to_numpy())


def read_truth(path):
    """Return the boxes of each image of the label table."""
    boxes, targets = read_labels(path)
    return pd.DataFrame({"truth": pack_boxes(boxes, targets, TRUTH)}, list(targets))


def join(predictions, labels):
    """Return the score of each image."""
    table = predictions.join(labels).rename_axis("image_id").reset_index()
    boxes = unpack_boxes(table, "found", FOUND), unpack_boxes(table, "truth", TRUTH)
    return pd.DataFrame({"score": image_scores(match_boxes(*boxes, table["image_id"]))}, predictions.index)


COMPARISON = Comparison(results, means_of({"mAP": "score"}), read_boxes, read_truth, "tune", join=join)
