"""Read and check the competition's tables: the raters' boxes, and the sizes of the original images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import digest
from common.data.dicom import read_header
from common.data.tables import check_ids, refuse_faults, some_rows
from common.detection import true_boxes
from common.errors import InputError, check, log
from common.further import add_images, place_boxes
from common.listing import FURTHER, Listing, image_table, list_test, match_files, neutral_answers
from common.metrics.detection import COCO, VOC2010, coco_scores, evaluate
from common.paths import competition_file, find_images, read_parquet
from common.post.boxes import BOX, find_normalised
from common.post.fusion import fuse_raters
from common.post.suppression import first_boxes
from common.post.wbf import mean_boxes
from common.submit.table import read_table
from solutions.vinbigdata.config import CHESTX_DET, CLASS_NUMBERS, CLASSES, KAGGLE, NO_FINDING, NOTHING, SAMPLE, SLUG

TRAIN = ["image_id", "class_name", "class_id", "rad_id", *BOX]
SIZES = ["image_id", "width", "height"]
SHAPE = ["image_id", "dim1", "dim0"]  # the equivalent in tables of resized copies: the shape of the pixel array
COUNTED = {"counted": tuple(range(NO_FINDING))}  # without class 14
VOC_FINDINGS, COCO_FINDINGS = replace(VOC2010, **COUNTED), replace(COCO, **COUNTED)
FINDINGS = [f"c{number}" for number in range(NO_FINDING)]
JOIN = {"wbf": mean_boxes, "nms": first_boxes, "none": lambda boxes, starts, iou: (boxes, np.arange(len(boxes)))}


def read_competition(job):
    """Return the Listing of the competition, with the tables "labels" and "originals" for `fuse_boxes`.

    The image table adds abnormal (0/1), c0 … c13 (0/1, marked by any rater) and the number of raters.
    """
    options = job.options
    folder = competition_file(options.data, SLUG, ["train.csv"]).parent
    labels_path, sample_path = folder / "train.csv", folder / "sample_submission.csv"
    labels = read_train(labels_path).sort_values(["image_id", "class_id", "rad_id", *BOX])
    train_ids = labels["image_id"].unique().tolist()
    files, test_ids = match_files(labels_path, train_ids, sample_path, SAMPLE, options)
    check((labels["class_id"] != NO_FINDING).any(), f"{labels_path}: no image has a finding")
    table, n = make_image_table(labels, image_table(train_ids, test_ids, options.id_map)), len(train_ids)
    originals, sizes = _read_originals(options, table["image_id"])
    listing = Listing(
        folder,
        table,
        files,
        neutral_answers(test_ids, SAMPLE, NOTHING),
        strata=make_strata(table[:n], labels, job.config.rater_aware),
        labels=[labels.to_numpy().tolist(), sizes[:n]],
        tables={"labels": labels, "originals": originals},
        inputs=(labels_path, sample_path, *options.sizes),
        about={"pixels": digest(sizes[n:])},  # boxes are in pixels of the originals
    )
    names = {name: number for name, number in CLASS_NUMBERS.items() if number != NO_FINDING}
    names |= {theirs: names[ours] for theirs, ours in CHESTX_DET.items()}
    listing = add_images(listing, [*map(Path, job.config.boxes)], names)
    if FURTHER in listing.tables:
        _mark(listing.table, listing.tables[FURTHER])
    return listing


def fuse_boxes(job, listing, store):
    """Return the listing with the sizes of the originals, and with boxes clipped to their images and fused.

    boxes.parquet: image_id, row, class_id (0 … 13), x_min, y_min, x_max, y_max (pixels of the original), votes (number
    of raters who marked the box), ordered by row.
    """
    table, labels = with_originals(job, listing, store).table, listing.tables["labels"]
    marked = labels[labels["class_id"] != NO_FINDING]
    boxes = fuse_marks(marked, table, job.config.fusion, listing.inputs[0])
    counts = f"{len(marked)} boxes of {labels['rad_id'].nunique()} raters became {len(boxes)}"
    log.info(f"{marked['image_id'].nunique()} images with findings: {counts}")
    boxes = place_boxes(boxes, listing.tables.get(FURTHER), table, votes=1)
    return replace(listing, table=table, tables={"boxes.parquet": boxes})


def read_test(job):
    """Return the Listing of the test images only: those given by --test, or else listed in the sample submission."""
    folder, ids, files = list_test(job.options, KAGGLE, SAMPLE)
    originals, sizes = _read_originals(job.options, ids)
    known = {"tables": {"originals": originals}, "about": {"pixels": digest(sizes)}}
    return Listing(folder, image_table([], ids), files, neutral_answers(ids, SAMPLE, NOTHING), **known)


def read_train(path):
    """Return the raters' table: image_id, class_id (int64), rad_id, x_min, y_min, x_max, y_max (float64, pixels).

    The box of a class 14 row is NaN. Repeated rows are dropped and counted, other columns ignored; index i is row i + 2
    of the file. Raises InputError naming file and row for a wrong header, an unusable id, a class out of range or with
    another name, a missing rater, a box that is missing, not numeric, negative or without area, class 14 with a box,
    and a rater who marks both a finding and No finding in one image.
    """
    table = read_table(path, TRAIN, exact=False)
    check(len(table), f"{path}: no rows under its header")
    check_ids(table["image_id"].drop_duplicates(), path)
    known = table["class_id"].str.fullmatch("[0-9]|1[0-4]")
    class_id = table["class_id"].where(known, str(NO_FINDING)).astype("int64")
    healthy, names = class_id == NO_FINDING, np.array(CLASSES)[class_id]
    blank = table[BOX] == ""
    boxes = table[BOX].apply(pd.to_numeric, errors="coerce").astype(float)
    numbers = np.isfinite(boxes).all(axis=1)
    small = boxes.index.isin(boxes.index[~healthy][find_normalised(boxes[~healthy])])
    order = (boxes["x_min"] < boxes["x_max"]) & (boxes["y_min"] < boxes["y_max"])
    reads = [table["image_id"], table["rad_id"]]
    faults = [
        (~known, "class_id {class_id!r} is not a whole number from 0 to 14"),
        (table["class_name"] != names, "class_id {class_id} does not belong to class_name {class_name!r}"),
        (table["rad_id"] == "", "no rad_id"),
        (healthy & ~blank.all(axis=1), "class 14 (No finding) with the box {box}; it must be blank"),
        (~healthy & blank.any(axis=1), "a finding needs x_min, y_min, x_max and y_max, not {box}"),
        (~healthy & ~numbers, "the box {box} is not four finite numbers"),
        (small, "the box {box} lies in 0 to 1, but must be in pixels"),
        (~healthy & ~order, "the box {box} must have x_min < x_max and y_min < y_max"),
        (~healthy & (boxes.min(axis=1) < 0), "the box {box} starts outside the image"),
        (healthy & ~healthy.groupby(reads).transform("all"), "{rad_id} marks a finding and No finding in this image"),
    ]
    refuse_faults(path, table, faults, box=BOX)
    table = pd.concat([table[["image_id"]], class_id, table[["rad_id"]], boxes], axis=1)
    repeated = table.duplicated()
    if repeated.any():
        log.info(f"{path}: {repeated.sum()} rows repeat another one, the first is row {repeated.idxmax() + 2}")
    return table[~repeated]


def make_image_table(labels, table):
    """Return the table of image_id, patient_id and split with the columns abnormal, c0 … c13 and raters."""
    table[["abnormal", *FINDINGS]] = 0
    _mark(table, labels[labels["class_id"] != NO_FINDING])
    table["raters"] = table["image_id"].map(labels.groupby("image_id")["rad_id"].nunique()).fillna(0).astype(int)
    return table


def _mark(table, found):
    """Set abnormal and c0 … c13 of an image table from findings, a table of image_id and class_id."""
    places, names = pd.Index(table["image_id"]).get_indexer(found["image_id"]), ["abnormal", *FINDINGS]
    marked = table[names].to_numpy()
    marked[places, 0] = marked[places, 1 + found["class_id"].to_numpy()] = 1
    table[names] = marked


def make_strata(train, labels, rater_aware):
    """Return the labels for balancing the folds, 0/1 (n, k): the 15 classes and, if `rater_aware`, the raters."""
    columns = [train[FINDINGS].to_numpy(), 1 - train[["abnormal"]].to_numpy()]
    if rater_aware:
        columns.append(pd.crosstab(labels["image_id"], labels["rad_id"]).loc[train["image_id"]].to_numpy().clip(max=1))
    return np.hstack(columns)


def fuse_marks(marked, table, fusion, path):
    """Return the raters' boxes clipped to their images and fused class by class, in the form of boxes.parquet."""
    index = pd.Index(table["image_id"])
    sizes = table[["width", "height"]].to_numpy(float)[index.get_indexer(marked["image_id"])]
    inside = np.minimum(marked[BOX].to_numpy(), np.hstack([sizes, sizes]))
    beyond = (inside < marked[BOX].to_numpy()).any(axis=1)
    lost = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    if beyond.any():
        number = int(np.argmax(lost if lost.any() else beyond))
        width, height = sizes[number].astype(int)
        where = f"{path}, row {marked.index[number] + 2} ({marked['image_id'].iloc[number]})"
        if lost.any():
            raise InputError(
                f"{where}: the box lies outside its image of {width} × {height} pixels; if the image is a resized "
                "copy, give the size of the original with --sizes"
            )
        log.info(f"{beyond.sum()} boxes were clipped to their image, the first: {where}, {width} × {height}")
    fused = fuse_raters(marked.assign(**dict(zip(BOX, inside.T, strict=True))), fusion.raters_iou, JOIN[fusion.raters])
    fused["row"] = table["row"].to_numpy()[index.get_indexer(fused["image_id"])]
    return fused[["image_id", "row", "class_id", *BOX, "votes"]]


def _read_originals(options, ids):
    """Return the table that --sizes gives for `ids`, and its rows as lists; None and [] without that option."""
    originals = read_sizes(options.sizes, ids) if options.sizes else None
    return originals, [] if originals is None else originals.to_numpy().tolist()


def with_originals(job, listing, store):
    """Return the listing without its tables, and with the originals' widths and heights if --sizes gave them."""
    table, originals = listing.table, listing.tables["originals"]
    if originals is not None:
        log_copies(table[: len(originals)], originals)  # images from elsewhere come last
        for name in SIZES[1:]:
            table = table.assign(**{name: np.append(originals[name], table[name][len(originals) :])})
    return replace(listing, table=table, tables={})


def truth_of(images, rows):
    """Return the true boxes of training rows: image_id, class_id, x_min, y_min, x_max, y_max (original pixels).

    An image without a finding has one row, class 14 with the box 0 0 1 1.
    """
    chosen = images.table[images.table["row"].isin(rows)]
    healthy = no_findings(chosen.loc[chosen["abnormal"] == 0, ["image_id"]])
    return pd.concat([true_boxes(images, rows), healthy], ignore_index=True)


def detector_figures(images, table, rows, classes=()):
    """Return the mean APs of a detection table over the findings that occur in rows; classes: count only these, if any.

    map: the competition's AP, VOC 2010 at IoU > 0.4; map_coco: COCO's, the paper's validation metric.
    """
    truth, ids = truth_of(images, rows), images.ids(rows)
    voc, coco = (replace(rule, counted=classes or rule.counted) for rule in (VOC_FINDINGS, COCO_FINDINGS))
    if not truth["class_id"].isin(voc.counted).any():
        return {"map": 0.0, "map_coco": 0.0}  # a rare class that no image of the fold has
    return {"map": evaluate(table, truth, ids, voc).mean_ap, "map_coco": coco_scores(table, truth, ids, coco)[0]["ap"]}


def healthy(images, rows):
    """Return 1 for each row without a finding, else 0, int64 (n,)."""
    return 1 - images.at(rows)["abnormal"].to_numpy(np.int64)


def health_labels(images, rows):
    """Return whether each row is healthy and whether it has each finding, int64 (n, 15) of 0 and 1."""
    return np.column_stack([healthy(images, rows), images.at(rows)[FINDINGS].to_numpy(np.int64)])


def no_findings(images):
    """Return a table of images with the class and box of No finding."""
    return images.assign(class_id=NO_FINDING, x_min=0.0, y_min=0.0, x_max=1.0, y_max=1.0)


def out_of_fold(job):
    """Return the table and the true boxes (`truth_of`) of the held-out images, fold by fold."""
    rows = np.concatenate([job.images.rows(folds=[fold]) for fold in job.config.folds])
    return job.images.at(rows).reset_index(drop=True), truth_of(job.images, rows)


def read_sizes(paths, ids):
    """Return image_id, width and height (int64, pixels) of `ids`, in their order.

    paths: CSV files of image_id, width and height, or image_id, dim0 (height) and dim1 (width), folders of runs, or
    folders of images. Raises InputError naming file and row or image for missing columns, sizes that are not positive
    whole numbers, contradictory rows, and images without a size.
    """
    table, places = pd.concat([_read_sizes(path, ids) for path in paths]).drop_duplicates(), ", ".join(map(str, paths))
    for image_id in table.loc[table["image_id"].duplicated(), "image_id"][:1]:
        found = table.loc[table["image_id"] == image_id, SIZES[1:]].to_numpy().tolist()
        several = " and ".join(f"{width} × {height}" for width, height in found)
        raise InputError(f"{places}: image {image_id} has different sizes, {several}")
    for image_id in pd.Index(ids).difference(table["image_id"], sort=False)[:1]:
        raise InputError(f"{places}: no width and height, in pixels, of image {image_id}")
    return table.set_index("image_id").loc[list(ids)].reset_index()


def log_copies(own, originals):
    """Log how many files differ in size from their original; both tables have image_id, width and height."""
    mine, full = (table[SIZES[1:]].to_numpy(np.float64) for table in (own, originals))
    copies = np.flatnonzero((mine != full).any(axis=1))
    # a copy with the same proportions is exact to the pixel on at least one side
    kept = (abs(mine[copies, ::-1] * full[copies] / full[copies, ::-1] - mine[copies]) <= 1).any(axis=1)
    if len(copies):
        k = copies[0]
        log.info(
            f"--sizes: {len(copies)} of {len(own)} images differ in size from their originals, "
            f"{(~kept).sum()} of them in aspect ratio (assumed stretched, not cropped or padded); the first: "
            "{}, {:.0f} × {:.0f} for {:.0f} × {:.0f}".format(own["image_id"].iloc[k], *mine[k], *full[k])
        )


def _read_sizes(path, ids):
    """Return image_id, width and height from one path."""
    if (path / "images.parquet").is_file():
        table = read_parquet(path / "images.parquet")
        if not set(SIZES) <= set(table.columns):
            raise InputError(f"{path}: images.parquet has no sizes; is this a run of another solution?")
        return table[SIZES]
    if path.is_dir():
        files = find_images(path)
        with tqdm([files[name] for name in ids if name in files], desc="sizes", unit="image", leave=False) as bar:
            return pd.DataFrame([read_header(file) | {"image_id": file.stem} for file in bar], columns=SIZES)
    table = some_rows(path)
    columns = next((names for names in (SIZES, SHAPE) if set(names) <= set(table.columns)), None)
    if columns is None:
        found = ",".join(table.columns)[:200]
        raise InputError(f"{path}, row 1: the header must have {','.join(SIZES)} or image_id,dim0,dim1: {found}")
    if columns == SHAPE:
        log.info(f"{path}: dim0 is read as the height, dim1 as the width")
    table = table[columns].set_axis(SIZES, axis=1)
    sides = table[SIZES[1:]].apply(pd.to_numeric, errors="coerce").astype(float)
    usable = ((sides % 1 == 0) & (sides > 0) & (sides < 1e6)).all(axis=1)
    refuse_faults(path, table, [(~usable, "width {width!r} and height {height!r} must be whole numbers of pixels")])
    return pd.concat([table["image_id"], sides.astype(np.int64)], axis=1)
