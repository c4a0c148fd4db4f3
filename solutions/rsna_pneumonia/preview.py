"""Show predictions in a Kaggle notebook."""

from common.kaggle.session import display_boxes
from solutions.rsna_pneumonia.config import KAGGLE, SIDE
from solutions.rsna_pneumonia.postprocess import read_submission


def show_predictions(submission, folder=None, count=4):
    """Show the test images with the highest scores, with boxes; folder: of other images."""
    display_boxes(KAGGLE, read_submission(submission)[0], ("",), count, SIDE, folder)
