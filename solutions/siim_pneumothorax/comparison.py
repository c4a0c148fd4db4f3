"""Metrics of the tools `table` and `score_predictions`: Dice, for submissions measured against train-rle.csv."""

import numpy as np
import pandas as pd

from common.compare import Comparison, means_of
from common.paths import read_parquet
from solutions.siim_pneumothorax.data import dice_of, read_labels


def results(job, split):
    """Return the Dice of each out-of-fold image, under a rule chosen without it."""
    table = read_parquet(job.run.path("oof_dice.parquet"))
    known = job.images.at(table["row"]).reset_index(drop=True)
    positive = table["dice"].where(table["present"] > 0)
    return {"": table.assign(patient_id=known["patient_id"], truth=known["rle"], positive=positive)}


def read_masks(path):
    """Return the runs of each image in a table of run-length masks, such as a submission or train-rle.csv."""
    return pd.Series(read_labels(path), name="runs").to_frame()


def join(predictions, labels):
    """Return the Dice of each image."""
    dice, true = dice_of(zip(predictions["runs"], labels["runs"], strict=True))
    return pd.DataFrame({"dice": dice, "positive": np.where(true > 0, dice, np.nan)}, predictions.index)


MEASURE = means_of({"dice": "dice", "dice with pneumothorax": "positive"})
COMPARISON = Comparison(results, MEASURE, read_masks, read_masks, "dice", "tune", join=join)
