"""Build the run's table from labels and folders: match names to image files, and report whatever has no match."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.data.folds import make_folds
from common.data.loaders import SampleDataset
from common.data.store import to_square
from common.data.tables import read_list, read_patients
from common.errors import InputError, check, log
from common.listing import Listing
from solutions.lung_segmentation import find_lungs, lung_region, weights_file
from solutions.own.labels import MASKS, find_labels, list_images, read_labels, refuse

SAMPLE = "sample_submission.csv"  # optional: its first column names the images to predict
VIEW = "view"  # name of the array of network inputs that replaces the stored images
MADE_WITH = ("task", "classes", "boxes", "mask_size", "lungs", "n_folds", "seed", "store_size")


def read(job):
    """Return the Listing of the labelled images and the images to predict, and the table "marks" of boxes or masks.

    The image table adds a column per class: 0, 1 or NaN for unknown.
    """
    config, options = job.config, job.options
    path = find_labels(options.data, config.labels)
    labels = read_labels(path, config.task, config.classes, options.data)
    files, names = list_images(options.data, path)
    left_out, about, classes = [], labels.images, labels.classes
    about["image_id"] = about["name"].map(lambda name: _identify(name, names, str(path)))
    lost = about["image_id"].isna()
    _skip(left_out, about[lost], config.on_missing, "on-missing", f"without a file in {options.data}")
    refuse(about, ~lost & about["image_id"].duplicated(), "a second name of the image {image_id}")
    known = about[classes].notna().any(axis=1) | (about["split"] == "test")
    _skip(left_out, about[~lost & ~known], options.on_unlabelled, "on-unlabelled", "without any label")
    about = about[~lost & known]
    more, more_files = _find_tests(options, files, names)
    test = list(about.loc[about["split"] == "test", "image_id"]) if options.test is None else []
    test, train = list(dict.fromkeys([*test, *more])), about[about["split"] != "test"]
    for image_id in sorted(set(train["image_id"]) & set(test))[:1]:
        raise InputError(f"{image_id}: a labelled image that is to be predicted too (--test, {SAMPLE})")
    loose = sorted(set(files) - set(labels.images["image_id"]) - set(test)) if options.test is None else []
    loose = pd.DataFrame({"image_id": loose, "name": loose, "where": [str(files[each]) for each in loose]})
    _skip(left_out, loose, options.on_unlabelled, "on-unlabelled", f"without a label in {path}")
    train, classes = _drop_rare(config, path, train, classes, left_out)
    if options.id_map:
        train = train.assign(patient_id=read_patients(options.id_map, train["image_id"]))
    if (train["patient_id"] != "").any():  # an image without a patient counts as its own patient
        alone = train["patient_id"] == ""
        train = train.assign(patient_id=train["patient_id"].mask(alone, "image " + train["image_id"]))
    parts = train.assign(split="train"), pd.DataFrame({"image_id": test, "split": "test", "patient_id": ""})
    table = pd.concat(parts, ignore_index=True)[["image_id", "split", "patient_id", *classes]]
    table.insert(2, "file", _places(options, files | more_files, table["image_id"]))
    table = _with_given_folds(config, path, train, table)
    groups = train["patient_id"].nunique() if (train["patient_id"] != "").any() else len(train)
    if groups < max(2, config.n_folds):
        what = f"images of {groups} patients" if groups < len(train) else "images"
        raise InputError(f"{path}: {len(train)} {what} are too few for n_folds {config.n_folds}")
    marks, values = labels.marks, train[classes]
    if len(marks):
        ids = train.set_index("name")["image_id"]
        marks = marks[marks["name"].isin(ids.index) & marks["class"].isin(classes)]
        numbers = pd.Index(classes).get_indexer(marks["class"])
        marks = marks.assign(image_id=ids[marks["name"]].to_numpy(), class_id=numbers)
    about = {"task": config.task, "classes": classes}
    return Listing(
        options.data,
        table,
        files | more_files,
        sample(test, about),
        strata=None if len(marks) else values.fillna(0).to_numpy(int),
        kinds=values.fillna(0).to_numpy(int),
        labels=[classes, values.to_numpy().tolist()],
        tables={"marks": marks},
        inputs=(path,),
        about=about | folds_of(labels.images),
        left_out=tuple(left_out),
    )


def read_test(job):
    """Return the Listing of the images to predict: those of --test or sample_submission.csv, else all in --data."""
    options = job.options
    if options.data is None and (options.test is None or not options.test.is_dir()):
        raise InputError("name the folder of the images with --data")
    files, names, given = {}, {}, job.config.labels or MASKS
    if options.data is not None:  # masks are not images to predict
        files, names = list_images(options.data, next(filter(Path.exists, (options.data / given, Path(given))), None))
    ids, more = _find_tests(options, files, names)
    files = files | more
    ids = ids or list(files)
    table = pd.DataFrame({"image_id": ids, "patient_id": "", "split": "test", "file": _places(options, files, ids)})
    return Listing(options.data or options.test, table, files, sample(ids, job.facts))


def count_classes(job):
    """Return the number of classes; 1 before `prepare`, when the networks are only asked for their weights."""
    prepared = "images" in job.__dict__ or job.run.step("prepare") is not None
    return len(job.images.about["classes"]) if prepared else 1


def parts_of(job, rows):
    """Return the fold of each store row, (n,), or its half of the patients if there is a single fold."""
    if len(job.config.folds) > 1:
        return job.images.at(rows)["fold"].to_numpy()
    labels = np.nan_to_num(job.images.at(rows)[job.images.about["classes"]].to_numpy(float)).astype(int)
    return make_folds(labels, 2, job.images.groups(rows), job.config.seed)


def counts(job, rows):
    """Return the number of images, that of patients (None if unknown), and what thresholds are nested by."""
    patients, nested = job.images.patients(rows), "folds" if len(job.config.folds) > 1 else "halves of the patients"
    return {"images": len(rows), "patients": None if patients is None else len(set(patients)), "nested_by": nested}


def size_text(figures):
    """Return the numbers of images and, where known, patients of a score."""
    patients = "" if figures["patients"] is None else f", {figures['patients']:,} patients"
    return f"{figures['images']:,} images{patients}"


def sample(ids, about):
    """Return a submission of neutral answers; about: the task and its classes."""
    neutral = "-1" if about["task"] == "segmentation" else 0.5
    return pd.DataFrame({"image_id": ids, **dict.fromkeys(about["classes"], neutral)})


def add_view(job, listing, store):
    """Return the listing with an array of network inputs if --lungs asks for it: lung crops or masked images."""
    kind, side = job.config.lungs, job.config.store_size
    if kind == "none":
        return listing
    describe, settings = partial(_describe, kind, side), {"own": kind, "side": side}
    weights, files = weights_file("shipped", "--lungs"), listing.files if kind == "crop" else None
    table, arrays = find_lungs(job, store, weights, settings, {VIEW: side}, ["found"], describe, files)
    missing = int((~table["found"].astype(bool)).sum())
    if missing:
        log.info(f"no lungs found in {missing} images, which count as a whole")
    return replace(listing, arrays={**listing.arrays, **arrays})


def _describe(kind, side, segmenter, image, probs, about):
    lungs = np.zeros_like(image) if probs is None else segmenter.lungs(probs, image.shape)
    region = lung_region(lungs)
    if region is None:
        return [to_square(image, side)], [False]
    left, top, right, bottom = region.box
    seen = image[top:bottom, left:right] if kind == "crop" else np.where(lungs, image, np.uint8(0))
    return [to_square(np.ascontiguousarray(seen), side)], [True]


def dataset(images, rows, size, transform=None, targets=None):
    """Return the SampleDataset of store rows, with the network inputs of `add_view` if there are any."""
    return SampleDataset(images.arrays.get(VIEW, images.store.images), targets, transform, size, rows=rows)


def _places(options, files, ids):
    """Return the images' paths relative to --test or --data, for the output files that list images."""
    roots = [root for root in (options.test, options.data) if root is not None]
    paths = (files[image_id] for image_id in ids)
    return [next(path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root)) for path in paths]


def _identify(name, names, where):
    """Return the id of the image with this name, NaN if there is none; raise InputError if several have it."""
    found = names.get(name, np.nan)
    if found is None:
        raise InputError(f"{where}: several images are named {name!r}; write their paths in the folder of the images")
    return found


def _skip(left_out, rows, choice, option, what):
    """Add rows to left_out, or raise InputError if the user's choice for them is `error`."""
    if len(rows) and choice == "error":
        first = rows.iloc[0]
        which = f"{first['name']!r} is one of {len(rows)} images {what}"
        raise InputError(f"{first['where']}: {which}; --{option} skip leaves them out")
    left_out += [(row.name, row.where, what) for row in rows[["name", "where"]].itertuples(index=False)]


def _find_tests(options, files, names):
    """Return the ids named by --test or sample_submission.csv, and {id: path} of the files in a folder --test."""
    if options.test is not None and options.test.is_dir():
        more, _ = list_images(options.test)
        return list(more), more
    listed = options.test or (options.data / SAMPLE if (options.data / SAMPLE).is_file() else None)
    if listed is None:
        return [], {}
    ids = [_identify(name, names, listed) for name in read_list(listed).iloc[:, 0]]
    for place, image_id in enumerate(ids):
        check(image_id is not np.nan, f"{listed}, row {place + 2}: no such image in {options.data}")
    return list(dict.fromkeys(ids)), {}


def _drop_rare(config, path, train, classes, left_out):
    """Return images and classes; with --on-rare drop, without classes that have fewer than two images."""
    counts = train[classes].sum().astype(int)
    rare = counts.index[counts < 2].tolist()
    if rare and (config.on_rare == "error" or (0 in counts.to_numpy() and config.on_rare == "keep")):
        few = f"{rare[0]!r} has {counts[rare[0]]} images to train on"
        raise InputError(f"{path}: the class {few} (of {len(rare)} such classes); --on-rare drop leaves it out")
    if not rare or config.on_rare == "keep":
        return train, classes
    log.info(f"left out {len(rare)} classes with fewer than two images: {', '.join(rare)}")
    kept = [name for name in classes if name not in rare]
    check(len(kept) >= 1 + (config.task == "multiclass"), f"{path}: too few classes with two images or more")
    inside = train[kept].sum(axis=1) > 0 if config.task == "multiclass" else train[kept].notna().any(axis=1)
    _skip(left_out, train[~inside], "skip", "", "of a class that is left out")
    return train[inside], kept


def folds_of(images):
    """Return a dict of n_folds and folds as set by the labels' columns fold or split; {} without these columns."""
    train = images[images["split"] != "test"]
    if (train["fold"] != "").any():
        n = int(train["fold"].astype(int).max()) + 1
        return {"n_folds": n, "folds": list(range(n))}
    return {"n_folds": 2, "folds": [0]} if (train["split"] == "val").any() else {}


def _with_given_folds(config, path, train, table):
    """Return the table with the folds that the labels give, if any; val is fold 0."""
    if not folds_of(train):
        return table
    folds = train["fold"].astype(int) if (train["fold"] != "").any() else (train["split"] != "val").astype(int)
    if sorted(set(folds)) != list(range(config.n_folds)):
        raise InputError(f"{path}: has the folds {sorted(set(folds))}, not all of the n_folds {config.n_folds}")
    table = table.assign(fold=-1)
    table.loc[table["split"] == "train", "fold"] = folds.to_numpy()
    leaking = table[table["patient_id"] != ""].groupby("patient_id")["fold"].nunique() > 1
    if leaking.any():
        log.info(f"folds: {int(leaking.sum())} patients are in several folds of {path}; scores are optimistic")
    return table
