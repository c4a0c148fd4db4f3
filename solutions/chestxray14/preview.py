"""Predictions shown in a notebook on Kaggle."""

from pathlib import Path

from common.kaggle.session import display_gallery, read_images
from common.submit.table import read_table
from solutions.chestxray14.config import KAGGLE, LABELS
from solutions.chestxray14.labels import LISTS


def show_predictions(submission, folder=None, count=4):
    """Show the images with the most certain findings and their three highest probabilities; folder: of other images."""
    table = read_table(submission)
    probs = table[list(LABELS)].astype(float)
    best = probs.max(axis=1).sort_values(ascending=False, kind="stable").index[:count]
    names = table["Image Index"].map(lambda name: Path(name).stem)
    images = read_images(KAGGLE, names[best], None, (*KAGGLE.samples, *LISTS["test"]), folder)
    items = []
    for row in best:
        highest = probs.loc[row].sort_values(ascending=False, kind="stable")[:3]
        text = ", ".join(f"{label} {value:.2f}" for label, value in highest.items())
        items.append((images[names[row]], None, None, f"{names[row]}: {text}"))
    display_gallery(items)
