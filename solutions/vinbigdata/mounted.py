"""On Kaggle: a few answers as pictures."""

from common.kaggle.mounted import display, images_of
from common.report.gallery import box_overlay
from common.submit.boxes import read_entries
from common.submit.table import read_table
from solutions.vinbigdata.config import CLASSES, KAGGLE, NO_FINDING

SHOWN = 6  # boxes of an image


def show(submission, count=4):
    """Show the test images with the surest findings, and where they are."""
    table = read_table(submission)
    entries = read_entries(table["PredictionString"])
    findings = {}
    for place in (entries.class_id != NO_FINDING).nonzero()[0]:
        text = f"{CLASSES[int(entries.class_id[place])]} {entries.score[place]:.2f}"
        image_id = table["image_id"][entries.row[place]]
        findings.setdefault(image_id, []).append((entries.score[place], entries.boxes[place], text))
    surest = sorted(findings, key=lambda image_id: -max(score for score, *_ in findings[image_id]))[:count]
    images = images_of(KAGGLE, surest)
    items = []
    for image_id in surest:
        best = sorted(findings[image_id], key=lambda finding: -finding[0])[:SHOWN]
        items.append((images[image_id], None, [(box, text) for _, box, text in best], f"{image_id}: {best[0][2]}"))
    display(items, box_overlay)
