"""On Kaggle: a few answers as pictures."""

from pathlib import Path

from common.kaggle.mounted import display, images_of
from common.submit.table import read_table
from solutions.chestxray14.config import KAGGLE, LABELS
from solutions.chestxray14.labels import LISTS


def show(submission, count=4):
    """Show the test images with the surest findings, and their probabilities."""
    table = read_table(submission)
    probs = table[list(LABELS)].astype(float)
    surest = probs.max(axis=1).sort_values(ascending=False, kind="stable").index[:count]
    names = table["Image Index"].map(lambda name: Path(name).stem)
    images = images_of(KAGGLE, names[surest], markers=(*KAGGLE.samples, *LISTS["test"][0]))
    items = []
    for row in surest:
        best = probs.loc[row].sort_values(ascending=False, kind="stable")[:3]
        said = ", ".join(f"{label} {value:.2f}" for label, value in best.items())
        items.append((images[names[row]], None, None, f"{names[row]}: {said}"))
    display(items)
