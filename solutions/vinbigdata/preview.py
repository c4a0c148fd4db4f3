"""Show predictions in a Kaggle notebook."""

import pandas as pd

from common.kaggle.session import display_boxes
from common.post.boxes import BOX
from common.submit.boxes import read_entries
from common.submit.table import read_table
from solutions.vinbigdata.config import CLASSES, KAGGLE, NO_FINDING


def show_predictions(submission, folder=None, count=4):
    """Show the test images with the highest scores, with boxes; folder: of other images."""
    table = read_table(submission)
    entries = read_entries(table["PredictionString"])
    columns = {"image_id": table["image_id"].to_numpy()[entries.row], "class_id": entries.class_id.astype(int)}
    found = pd.DataFrame(columns | {"score": entries.score} | dict(zip(BOX, entries.boxes.T, strict=True)))
    display_boxes(KAGGLE, found[found["class_id"] != NO_FINDING], CLASSES, count, folder=folder)
