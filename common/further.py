"""Additional training images with boxes from COCO files; they are in every fold's training rows, never held out."""

from dataclasses import replace

import numpy as np
import pandas as pd

from common.data.coco import read_boxes
from common.errors import InputError, log
from common.listing import FURTHER
from common.network import other_folds
from common.paths import check_id, find_images
from common.post.boxes import BOX


def add_images(listing, paths, classes):
    """Return the listing with the images of COCO files that have a box; the images lie next to their file.

    Their split is FURTHER, and so is the name of the table of their boxes, whose corners are fractions of the sides.
    paths: a list of Path; classes: {name: number}. Other columns of the table are 0 or "". Images whose id the
    competition uses are left out. Raises InputError like `common.data.coco.read_boxes`, and for an image without a file
    or size.
    """
    table, parts, rows, files = listing.table, [], [], {}
    for path in paths:
        boxes, images = read_boxes(path, classes, scored=False)
        images = images[images["image_id"].isin(boxes["image_id"])]
        known = images["image_id"].isin([*table["image_id"], *files])
        images, found = images[~known], find_images(path.parent)
        for row in images.itertuples():
            check_id(row.image_id, row.where)
            if row.image_id not in found or not row.width * row.height > 0:
                raise InputError(f"{row.where}: {row.name} needs a file in {path.parent}, width and height")
        boxes = boxes[boxes["image_id"].isin(images["image_id"])]
        sizes = images.set_index("image_id").loc[boxes["image_id"], ["width", "height"] * 2].to_numpy()
        parts.append(boxes.assign(**dict(zip(BOX, (boxes[BOX].to_numpy() / sizes).T, strict=True))))
        rows.append(images[["image_id", "patient_id"]])
        files |= {image_id: found[image_id] for image_id in images["image_id"]}
        log.info(f"{path}: {len(boxes)} boxes on {len(images)} further images; {known.sum()} known ones left out")
    if not files:
        return listing
    more = pd.concat(rows).assign(split=FURTHER).reindex(columns=table.columns)
    more = more.fillna({name: 0 if pd.api.types.is_numeric_dtype(table[name]) else "" for name in table})
    boxes, table = (pd.concat(each, ignore_index=True) for each in (parts, [table, more.astype(table.dtypes)]))
    known = {"labels": [listing.labels, boxes.to_numpy().tolist()], "tables": listing.tables | {FURTHER: boxes}}
    return replace(listing, table=table, files=listing.files | files, inputs=(*listing.inputs, *paths), **known)


def place_boxes(boxes, more, table, **columns):
    """Return the table boxes.parquet by row, with the boxes of the table FURTHER (if any), which get `columns`."""
    if more is None or not len(more):
        return boxes
    about = table.set_index("image_id").loc[more["image_id"]]
    corners = more[BOX].to_numpy(float) * about[["width", "height"] * 2].to_numpy()
    more = more.assign(row=about["row"].to_numpy(), **dict(zip(BOX, corners.T, strict=True)), **columns)
    both = pd.concat([boxes, more[boxes.columns].astype(boxes.dtypes)])
    return both.sort_values("row", kind="stable", ignore_index=True)


def rows_with_further(job, fold):
    """Return the store rows of all other folds and of further images, and those of the fold itself.

    Images that share their pixels or their patient with an image that the fold holds out are left out.
    """
    (rows, held_out), more = other_folds(job, fold), job.images.rows(FURTHER, ok=True)
    return np.concatenate([rows, more[~job.images.are_copies(more, held_out)]]), held_out
