"""Show predictions in a Kaggle notebook."""

from common.kaggle.session import display_gallery, read_images
from common.report.gallery import box_overlay
from common.submit.boxes import read_entries
from common.submit.table import read_table
from solutions.vinbigdata.config import CLASSES, KAGGLE, NO_FINDING

MAX_BOXES = 6  # per image


def show_predictions(submission, count=4):
    """Show the test images with the highest scores, with boxes."""
    table = read_table(submission)
    entries = read_entries(table["PredictionString"])
    findings = {}
    for k in (entries.class_id != NO_FINDING).nonzero()[0]:
        text = f"{CLASSES[int(entries.class_id[k])]} {entries.score[k]:.2f}"
        findings.setdefault(table["image_id"][entries.row[k]], []).append((entries.score[k], entries.boxes[k], text))
    for image_id in findings:
        findings[image_id].sort(key=lambda finding: -finding[0])
    best = sorted(findings, key=lambda image_id: -findings[image_id][0][0])[:count]
    images, items = read_images(KAGGLE, best), []
    for image_id in best:
        boxes = [(box, text) for _, box, text in findings[image_id][:MAX_BOXES]]
        items.append((images[image_id], None, boxes, f"{image_id}: {boxes[0][1]}"))
    display_gallery(items, box_overlay)
