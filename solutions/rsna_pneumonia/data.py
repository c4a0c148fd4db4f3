"""Read and check the challenge's tables: boxes of opacities, and classes of images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from common.data.tables import check_ids, refuse_faults, some_rows
from common.errors import InputError, check, log
from common.further import add_images, place_boxes
from common.listing import FURTHER, Listing, check_square, image_table, list_test, match_files, neutral_answers
from common.paths import competition_file
from common.post.boxes import BOX
from solutions.rsna_pneumonia.config import CLASS_INFO, CLASSES, KAGGLE, LABELS, SAMPLE, SAMPLE_FILE, SIDE, SLUG

SIDES = ["x", "y", "width", "height"]


def read_competition(job):
    """Return the challenge's Listing: target (0/1) and class_name of each image, and the table boxes.parquet."""
    options = job.options
    folder = competition_file(options.data, SLUG, [LABELS]).parent
    labels, classes, sample = (folder / name for name in (LABELS, CLASS_INFO, SAMPLE_FILE))
    boxes, targets = read_labels(labels)
    names = read_classes(classes, targets)
    ids = sorted(targets)
    files, test_ids = match_files(labels, ids, sample, SAMPLE, options)
    table, strata = image_table(ids, test_ids, options.id_map), np.array([CLASSES.index(names[i]) for i in ids])
    table["target"], table["class_name"] = (table["image_id"].map(each.get) for each in (targets, names))
    table = table.fillna({"target": 0, "class_name": ""}).astype({"target": int})
    known = strata, [boxes.to_numpy().tolist(), strata.tolist()], {"boxes.parquet": boxes}
    neutral = neutral_answers(test_ids, SAMPLE, "")
    listing = Listing(folder, table, files, neutral, *known, inputs=(labels, classes, sample))
    return add_images(listing, [*map(Path, job.config.boxes)], {CLASSES[2]: 0})


def read_test(job):
    """Return the Listing of the test images only: those given by --test, or else listed in the sample submission."""
    folder, ids, files = list_test(job.options, KAGGLE, SAMPLE)
    return Listing(folder, image_table([], ids), files, neutral_answers(ids, SAMPLE, ""))


def set_sizes(job, listing, store):
    """Return the listing with the challenge's image size, whatever that of the files, and each box's store row."""
    check_square(listing, "all images must be square")
    table, rows = listing.table.assign(width=SIDE, height=SIDE), listing.table.set_index("image_id")["row"]
    tables = {name: boxes.assign(row=boxes["image_id"].map(rows)) for name, boxes in listing.tables.items()}
    if FURTHER in tables:
        tables = {"boxes.parquet": place_boxes(tables["boxes.parquet"], tables[FURTHER], table)}
    return replace(listing, table=table, tables=tables)


def read_labels(path):
    """Return the table of boxes (image_id, class_id 0, x_min, y_min, x_max, y_max) and {image_id: target}.

    Boxes are clipped to their image and repeated ones dropped; both are logged. Raises InputError naming file and row
    for a wrong header, an unusable id, a Target other than 0 and 1, Target 1 without a box or 0 with one, a box that
    has no area, begins outside its image or is not in pixels, no boxes at all, and an image with both targets.
    """
    table = some_rows(path, ["patientId", *SIDES, "Target"])
    check_ids(table["patientId"].drop_duplicates(), path)
    target, some = table["Target"], (table["Target"] == "1").to_numpy()
    x, y, width, height = sides = table[SIDES].apply(pd.to_numeric, errors="coerce").to_numpy(float).T
    faults = [
        (~target.isin(["0", "1"]), "Target {Target!r} is neither 0 nor 1"),
        (~some & (table[SIDES] != "").any(axis=1), "Target 0 with the box {box}; it must be blank"),
        (some & ~np.isfinite(sides).all(axis=0), "Target 1 needs four numbers as its box, not {box}"),
        (some & ~((width > 0) & (height > 0)), "the box {box} must have a width and a height above 0"),
        (some & ((np.minimum(x, y) < 0) | (np.maximum(x, y) >= SIDE)), "the box {box} begins outside the image"),
        (some & (sides.max(axis=0) <= 1), "the box {box} lies in 0 to 1, but must be in pixels"),
        (np.full(len(table), not some.any()), "no image has an opacity"),
        (target.groupby(table["patientId"]).transform("nunique") > 1, "this image has both targets, 0 and 1"),
    ]
    refuse_faults(path, table, faults, "patientId", SIDES)
    corners = np.stack([x, y, x + width, y + height], axis=1)
    boxes = pd.DataFrame({"image_id": table["patientId"], "class_id": 0})
    boxes[BOX] = corners.clip(max=SIDE)
    repeated = boxes.duplicated().to_numpy()
    for rows, what in ((some & (corners > SIDE).any(axis=1), "boxes were clipped"), (repeated, "rows repeat others")):
        if rows.any():
            log.info(f"{path}: {rows.sum()} {what}, the first is row {rows.argmax() + 2}")
    kept = boxes[some & ~repeated].sort_values(["image_id", *BOX], ignore_index=True)
    return kept, dict(zip(table["patientId"], some.astype(int).tolist(), strict=True))


def read_classes(path, targets):
    """Return {image_id: class name}. Raises InputError for unknown, missing and contradictory classes."""
    classes = {}
    for row, (image_id, name) in enumerate(some_rows(path, ["patientId", "class"]).itertuples(index=False), start=2):
        where, target = f"{path}, row {row} ({image_id}): class {name!r}", targets.get(image_id)
        check(name in CLASSES, f"{where} is not one of {', '.join(CLASSES)}")
        if classes.setdefault(image_id, name) != name or (target is not None and target != (name == CLASSES[2])):
            raise InputError(f"{where}, but {classes[image_id]!r} in an earlier row, Target {target} in {LABELS}")
    for image_id in sorted(set(targets) - set(classes))[:1]:
        raise InputError(f"{path}: no class of {image_id}")
    return classes
