"""Show predictions in a Kaggle notebook."""

from common.kaggle.session import display_boxes
from solutions.vinbigdata.config import CLASSES, KAGGLE, NO_FINDING
from solutions.vinbigdata.postprocess import parse_predictions


def show_predictions(submission, folder=None, count=4):
    """Show the test images with the highest scores, with boxes; folder: of other images."""
    found = parse_predictions(submission)
    display_boxes(KAGGLE, found[found["class_id"] != NO_FINDING], CLASSES, count, folder=folder)
