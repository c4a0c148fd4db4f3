"""Read the competition's labels, official split, boxes and the images of --test; find the lungs in every image."""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.config import digest, file_hash
from common.data.store import to_square
from common.data.tables import named_images, plain_patients, read_list
from common.errors import InputError, check, log
from common.listing import Listing, check_loose, check_named
from common.network import other_folds
from common.paths import find_images, strip_suffix
from common.post.boxes import BOX
from solutions.chestxray14 import labels as nih
from solutions.chestxray14.config import KAGGLE, LABELS
from solutions.chestxray14.leaks import check_run
from solutions.chestxray14.published import IMAGES, describe_labels
from solutions.lung_segmentation import find_lungs, lung_region, structures_of, weights_file

CLASSES = list(LABELS)
SAMPLE = ["Image Index", *CLASSES]
UNKNOWN = dict.fromkeys(["patient_id", "official", *nih.GROUPS], "") | dict.fromkeys(CLASSES, -1)
BOX_TABLE = "truth_boxes.parquet"  # NIH's boxes
FURTHER_BOXES = "further_boxes.parquet"  # boxes from --boxes
NO_BOXES = pd.DataFrame(columns=["image_id", "label", *BOX]).astype({"label": "int64"} | dict.fromkeys(BOX, float))
ALONE = "the segmenter has no heart: features are weighted by the lungs alone, in CXR-IRNet by lungs and heart"
LUNG_TABLE = "lungs.parquet"  # row k belongs to store row k
LUNG_COLUMNS = ["x_min", "y_min", "x_max", "y_max", "rule", "area"]
MARKERS = (*KAGGLE.samples, *nih.LISTS["test"])  # files that list the test images


def read_competition(job):
    """Return the Listing of the competition. Images of the label table without a file are left out and counted.

    Table: file_name (as in the label table), official (train_val, test, or "" for neither list), nih.GROUPS and the 14
    LABELS (0/1, -1 unknown). Further tables: truth_boxes.parquet with image_id, row, label (0 … 13) and BOX (pixels of
    NIH's 1024 × 1024 image); with --boxes, further_boxes.parquet with the same columns. about: facts about labels and
    lists, with said (one line), test_name (of the test images), structures (those that weight features, or None).
    """
    options, config = job.options, job.config
    names = [name for key, name in nih.TABLES.items() if config.label_table in (key, None)]
    path = KAGGLE.find_file(options.data, names)
    folder, files = path.parent, find_images(path.parent)
    for other in set(nih.TABLES.values()) - {path.name}:
        if (folder / other).is_file():
            log.info(f"{folder}: holds {other} too, in which some labels differ; {path.name} is read")
    labels, about = _read_labels(folder, path, config.split)
    here, known = labels["image_id"].isin(files), set(labels["image_id"])
    missing_test = int((~here & (labels["official"] == "test")).sum())
    about |= {"missing": int((~here).sum()), "missing_test": missing_test}
    check(here.any(), f"{folder}: none of the images of {path.name} is in it")
    if not here.all():
        first = labels.loc[~here, "file_name"].iloc[0]
        text = f"{(~here).sum():,} of {len(labels):,} images have no file and are left out, the first is {first}"
        tests = "" if config.split == "all" else f"; {missing_test:,} of them are in the test list"
        log.info(f"{path}: {text}{tests}")
    labels = labels[here]
    train, test, test_name = _split(labels, about, config.split)
    if options.test is not None:
        if len(test):
            log.info(f"--test replaces the {len(test):,} images of the test list")
        test, more = _named_test(options.test, labels, train, files, config.split)
        files, test_name = files | more, f"on the {len(test):,} images of --test"
    elif not len(test):
        reason = " (--split all holds none back)" if config.split == "all" else ""
        log.info(f"no test images: scores are out of fold, and nothing is submitted{reason}")
    check_loose(files, known, path.name, options)
    columns = ["image_id", "file_name", "patient_id", "split", "official", *nih.GROUPS, *CLASSES]
    table = pd.concat([train.assign(split="train"), test.assign(split="test")], ignore_index=True)[columns]
    table = table.astype(dict.fromkeys(CLASSES, "int8"))
    check_run(config, table)
    about |= {"said": _describe(about, config.split), "test_name": test_name, "structures": None}
    about["pixels"] = digest(test[CLASSES].to_numpy().tolist())  # test scores depend on the labels too
    log.info(about["said"])
    boxes = [folder / name for name in nih.BOXES if (folder / name).is_file()][:1]
    tables = {BOX_TABLE: place_boxes(nih.read_boxes(boxes[0]) if boxes else NO_BOXES, table)}
    codes = (train[CLASSES].to_numpy(np.int64) @ (1 << np.arange(len(CLASSES)))).tolist()
    if config.boxes:
        boxes.append(Path(config.boxes))
        tables[FURTHER_BOXES] = place_boxes(nih.read_boxes(boxes[-1]), table)
        codes.append(tables[FURTHER_BOXES].to_numpy().tolist())
    return Listing(
        folder,
        table,
        files,
        _sample(test["file_name"].to_numpy()),
        strata=train[CLASSES].to_numpy(),
        labels=codes,
        tables=tables,
        inputs=(path, *nih.find_lists(folder).values(), *boxes),
        about=about,
    )


def read_test(job):
    """Return the Listing of the test images alone, without labels.

    They come from --test, or else from sample_submission.csv or the official test list in the data folder. Images of
    the official list without a file are left out and counted.
    """
    test, data = job.options.test, job.options.data
    if test is not None and test.is_dir():
        folder, (named, files) = test, test_names(test)
    else:
        path = test or KAGGLE.find_file(data, MARKERS)
        folder = path.parent if test is None else data or KAGGLE.find_file(None, MARKERS).parent
        files = find_images(folder)
        named, _ = test_names(path, files)
        here = named["image_id"].isin(files)
        absent = f"{(~here).sum():,} of {len(named):,} images have no file"
        if test is None:
            log.info(f"test images from {path}" + f"; {absent} and are left out" * (not here.all()))
        if test is None and path.suffix == ".txt" and here.any():
            named = named[here].sort_values("image_id", ignore_index=True)  # the order of a run's images
        elif not here.all():
            first = named.loc[~here, "image_id"].iloc[0]
            raise InputError(f"{(~here).sum()} test images have no file in {folder}, the first is {first}")
    table = named[["image_id", "file_name"]].assign(**UNKNOWN, split="test")
    files = {image_id: files[image_id] for image_id in named["image_id"]}
    return Listing(folder, table, files, _sample(table["file_name"].to_numpy()))


def labels_of(images, rows):
    """Return the labels of store rows, float32 (n, 14): 0 or 1, NaN where unknown."""
    labels = images.at(rows)[CLASSES].to_numpy(np.float32)
    return np.where(labels < 0, np.float32(np.nan), labels)


def boxes_of(images, rows):
    """Return the boxes that supervise these store rows: those whose finding is also among the image's labels.

    Columns as in truth_boxes.parquet. Boxes of other findings would contradict NIH's labels.
    """
    boxes = pd.concat([images.tables[name] for name in (BOX_TABLE, FURTHER_BOXES) if name in images.tables])
    boxes = boxes[boxes["row"].isin(rows)]
    named = images.at(boxes["row"])[CLASSES].to_numpy()[np.arange(len(boxes)), boxes["label"]]
    return boxes[named == 1]


def check_boxes(job):
    """Raise InputError if a fold has no box for its box loss. (`plan` decodes too few images to check this.)"""
    for stage, fold in itertools.product(job.config.stages, job.config.folds):
        if getattr(job.config, stage).box_loss and not len(boxes_of(job.images, other_folds(job, fold)[0])):
            raise InputError(
                f"{stage}.box_loss: no training image of fold {fold} has a box of a finding that its labels name; "
                "NIH's boxes are all on the official test list, so name others with --boxes"
            )


def _sample(names):
    sample = pd.DataFrame(0, index=range(len(names)), columns=CLASSES)
    sample.insert(0, SAMPLE[0], names)
    return sample


def _read_labels(folder, path, split):
    """Return the label table, sorted by image id and with the column official, and facts about it."""
    labels = nih.read_labels(path).sort_values("image_id", ignore_index=True)
    about = {"labels": path.name, "sha256": file_hash(path), "images": len(labels), "release": describe_labels(labels)}
    labels["official"] = ""
    check((labels[CLASSES] == 1).any(axis=None), f"{path}: no image has a finding")
    if split == "official" or len(nih.find_lists(folder)) == len(nih.LISTS):
        labels["official"], about["lists"] = nih.read_lists(folder, labels["image_id"])
    listed = labels[labels["official"] != ""].drop_duplicates(["patient_id", "official"])
    both = listed[listed["patient_id"].duplicated()]
    if split == "official" and len(both):
        patient = both["patient_id"].iloc[0]
        images = ", ".join(listed.loc[listed["patient_id"] == patient, "image_id"])
        raise InputError(f"{folder}: {len(both)} patients are in both lists, such as patient {patient} ({images})")
    return labels, about


def _describe(about, split):
    """Return the line about labels and lists that accompanies every score."""
    more = f", {about['missing']:,} of them without a file" if about["missing"] else ""
    more += f"; {about['release']}" if about["images"] == IMAGES else ""
    how = "all: every labelled image is trained on, those of the official test list too"
    how = how if split == "all" else f"by {about['lists']['said']}"
    return f"labels {about['labels']} (sha256 {about['sha256'][:12]}, {about['images']:,} images{more}); split {how}"


def _split(labels, about, split):
    """Return the train rows and the test rows of the label table, and a description of the test images."""
    if split == "all":
        return labels, labels.iloc[:0], "on no images"
    train, test = (labels[labels["official"] == part] for part in nih.LISTS)
    loose = int((labels["official"] == "").sum())
    if loose:
        log.info(f"left out {loose:,} labelled images that are in neither list")
    check(len(train), "no image to train on: none of the train and validation list is here")
    if not about["lists"]["official"]:
        return train, test, f"on {len(test):,} images of the test list, which is not the whole official one"
    part = f"{len(test):,} images of " if about["missing_test"] else ""
    return train, test, f"on {part}the official test list"


def _named_test(path, labels, train, files, split):
    """Return the rows of --test in its order, with labels -1 where unknown, and the image files if it is a folder."""
    named, more = test_names(path, files)
    ids = named["image_id"]
    why = " (--split all trains on every labelled image)" if split == "all" else ""
    check_named(ids, files | more, set(train["image_id"]), why)
    test = named.merge(labels.drop(columns="file_name"), on="image_id", how="left", validate="one_to_one")
    test = test.fillna(UNKNOWN | {"patient_id": test["patient"]})[labels.columns]
    shared = int(test["patient_id"].isin(train["patient_id"]).sum())
    if shared:
        how = "of patients with training images, which inflates scores"
        log.info(f"--test: {shared} of the {len(test)} images are {how}")
    return test, more


def test_names(path, known=()):
    """Return the images of --test in its order (image_id, patient, file_name), and the image files if it is a folder.

    known: ids of the images that have a file, see `read_list`.
    """
    ids, files = named_images(path, known=known)
    named = pd.DataFrame({"image_id": ids})
    named["patient"] = nih.patient_of(named["image_id"])
    if files:
        suffixes = [path.name.removeprefix(strip_suffix(path.name)) for path in map(files.get, ids)]
        named["file_name"] = named["image_id"] + suffixes
        return named, files
    table = read_list(path, known=known).reset_index(drop=True)
    named["file_name"] = table[table.columns[0]]
    if "Patient ID" in table:
        named["patient"] = plain_patients(table["Patient ID"])
    return named, files


def place_boxes(boxes, table):
    """Return the boxes (of `read_boxes`) on images of the table, with the image's row, sorted by row."""
    boxes = boxes.copy()
    rows = table["row"].to_numpy() if "row" in table else np.arange(len(table))  # a run's table may have gaps
    boxes["row"] = np.append(rows, -1)[pd.Index(table["image_id"]).get_indexer(boxes["image_id"])]
    absent = int((boxes["row"] < 0).sum())
    if absent:
        log.info(f"left out {absent} of {len(boxes)} boxes, whose images are not here")
    boxes = boxes[boxes["row"] >= 0].sort_values(["row", "label", *BOX], ignore_index=True)
    return boxes[["image_id", "row", "label", *BOX]]


def segmenter_file(config):
    """Return the path of the segmenter's weights. Raises InputError if there is no such file."""
    return weights_file(config.segmenter.weights, "--segmenter.weights")


def lung_settings(config):
    """Return the options that determine the lungs; masks serve only feature weighting, crops only the lung network."""
    return {
        "segmenter.weights": file_hash(segmenter_file(config)) if config.needs_lungs else None,
        "segmenter.mask_size": config.segmenter.mask_size if config.weights_features else None,
        "segmenter.crop_size": config.segmenter.crop_size if config.views != "whole" else None,
    }


def add_lungs(job, listing, store):
    """Return the listing with the lungs of all images, where the recipe needs them.

    Adds the table lungs.parquet: image_id, row, x_min, y_min, x_max, y_max (pixels of the file, open end), rule (of
    `LungRegion`, or none), area (share of the image that is lung); and the arrays masks, uint8 (N, S, S), 255 times the
    share of each cell that is lung (or heart), and crops, uint8 (N, C, C), cut out of the originals.
    """
    config = job.config
    if not config.needs_lungs:
        return listing
    weights = segmenter_file(config)
    own = {"mask_size": config.segmenter.mask_size if config.weights_features else 0}
    own["crop_size"] = config.segmenter.crop_size if config.views != "whole" else 0
    sides = {name: side for name, side in zip(("masks", "crops"), own.values(), strict=True) if side}
    describe = partial(mask_and_crop, **own)
    table, arrays = find_lungs(job, store, weights, own, sides, LUNG_COLUMNS, describe, listing.files)
    missing = table.loc[table["rule"] == "none", "image_id"]
    if len(missing):
        log.info(f"no lungs found in {len(missing)} images, which count as a whole; the first is {missing.iloc[0]}")
    about = dict(listing.about)
    if config.weights_features:
        about["structures"] = ["lungs", *["heart"] * ("heart" in structures_of(weights))]
        if about["structures"] == ["lungs"]:
            about |= {"said": f"{about['said']}; {ALONE}"} if "said" in about else {}
            log.info(f"{ALONE}; --segmenter.weights takes a segmenter that has it")
    return replace(listing, tables={**listing.tables, LUNG_TABLE: table}, arrays=arrays, about=about)


def mask_and_crop(segmenter, image, probs, about, mask_size, crop_size):
    """Return ([mask (S, S) of lungs and heart, crop (C, C)], [box…, rule, area]), omitting arrays whose side is 0.

    Without lungs or without `probs`, mask and crop cover the whole image, and the box that of its file (`about`).
    """
    region, area = None, 0.0
    if probs is not None:
        parts = segmenter.parts(probs, image.shape)
        lungs = np.max([part for name, part in parts.items() if name != "heart"], axis=0)
        region, area = lung_region(lungs), np.count_nonzero(lungs) / lungs.size
    if region is None:
        mask, crop, box = np.ones_like(image), image, (0, 0, int(about["width"]), int(about["height"]))
    else:
        left, top, right, bottom = box = region.box
        mask, crop = np.max(list(parts.values()), axis=0), np.ascontiguousarray(image[top:bottom, left:right])
    arrays = [to_square(mask * np.uint8(255), mask_size)] if mask_size else []
    arrays += [to_square(crop, crop_size)] if crop_size else []
    return arrays, [*box, region.rule if region else "none", area]
