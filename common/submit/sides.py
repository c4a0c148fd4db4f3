"""Submissions of repeated `score x y width height`, blank for an image without boxes."""

import numpy as np
import pandas as pd

from common.post.boxes import BOX, find_normalised
from common.submit.boxes import NUMBER, SCORE_SLACK, fault_text
from common.submit.table import read_table
from common.submit.validate import Summary, id_problems, refuse_rows, row_problems


def write_sides(detections, ids, columns, side):
    """Return the submission: `confidence x y width height` …, best first, in tenths of a pixel; blank without boxes."""
    texts = {image_id: [] for image_id in ids}
    for row in detections.sort_values("score", ascending=False, kind="stable").itertuples():
        x, y, right, bottom = (round(min(max(getattr(row, name), 0), side), 1) for name in BOX)
        if right > x and bottom > y:
            texts[row.image_id].append(f"{row.score:.6f} {x:.1f} {y:.1f} {right - x:.1f} {bottom - y:.1f}")
    return pd.DataFrame({columns[0]: ids, columns[1]: [" ".join(texts[image_id]) for image_id in ids]}, dtype=str)


def read_sides(path, columns, side, ids=None):
    """Return the detections and the ids of a submission with these two columns on square images of `side` pixels.

    Raises InputError naming the first wrong row and counting the others. ids: the ids that it must have, if given.
    """
    table = read_table(path, columns)
    (found, faults), own = parse_sides(table, side), table[columns[0]]
    refuse_rows(path, id_problems(own, own if ids is None else ids) + row_problems(own, faults))
    return found, own


def validate_sides(path, sample, columns, side):
    """Return the Summary of a submission. Raises InputError unless it is valid for the images of the file `sample`."""
    found, ids = read_sides(path, columns, side, read_table(sample, columns)[columns[0]])
    return Summary(str(path), len(ids), found["image_id"].nunique(), len(found), "boxes")


def parse_sides(table, side):
    """Return the detections of strings `score x y width height` repeated, and a dict from row to its first fault.

    table: DataFrame of an id and a string per row; side: of all images, in pixels. All class_id are 0.
    """
    faults, found = {}, []
    for row, (image_id, text) in enumerate(table.itertuples(index=False)):
        tokens = text.split()
        numbers = [float(token) if NUMBER.fullmatch(token) else np.nan for token in tokens + [""] * (-len(tokens) % 5)]
        score, x, y, width, height = np.reshape(numbers, (-1, 5)).T
        boxes = np.stack([x, y, x + width, y + height])
        inside = (boxes.min(0) >= 0) & (boxes.max(0) <= side + SCORE_SLACK) & (width > 0) & (height > 0)
        for k in np.flatnonzero(~((score >= 0) & (score <= 1) & inside))[:1]:
            wanted = f"a score from 0 to 1, then x y width height of a box within {side} x {side} pixels"
            faults[row] = fault_text(k + 1, tokens[5 * k : 5 * k + 5], f"must be five numbers, {wanted}")
        found += [(image_id, 0, *entry) for entry in np.vstack([score, boxes]).T.tolist()]
    columns = ["image_id", "class_id", "score", *BOX]
    found = pd.DataFrame(found, columns=columns).astype(dict.fromkeys(columns[2:], float))
    for image_id in found["image_id"].iloc[find_normalised(found[BOX])[:1]]:
        faults.setdefault(table.iloc[:, 0].tolist().index(image_id), "the boxes lie in 0 to 1, but must be in pixels")
    return found, faults
