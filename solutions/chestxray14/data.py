"""The competition's files: the label table and its official split, the images of --test, NIH's boxes."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from common.config import digest, file_hash
from common.data.tables import named_images, plain_patients, read_list
from common.errors import InputError
from common.listing import Listing, check_loose, check_named
from common.paths import find_images, strip_suffix
from common.post.boxes import BOX
from solutions.chestxray14.config import KAGGLE, LABELS
from solutions.chestxray14.labels import (
    BOXES,
    LISTS,
    TABLES,
    find_lists,
    patient_of,
    read_boxes,
    read_labels,
    read_lists,
)
from solutions.chestxray14.leaks import check_run
from solutions.chestxray14.published import IMAGES, describe_labels

log = logging.getLogger(__name__)
CLASSES = list(LABELS)
OLDEST = 120  # years; the first version of the table holds ages up to 414, which are typing errors
SAMPLE = ["Image Index", *CLASSES]
UNKNOWN = {"patient_id": "", "sex": "", "view": "", "follow_up": -1, "official": ""} | dict.fromkeys(CLASSES, -1)
BOX_TABLE = "truth_boxes.parquet"  # NIH's boxes
FURTHER_BOXES = "further_boxes.parquet"  # those of --boxes
MARKERS = (*KAGGLE.samples, *LISTS["test"])  # files that name the test images


def read_competition(job):
    """Return the Listing of the competition. Images of the label table without a file are left out and counted.

    Table: file_name (as in the label table), age (years or NaN), sex, view, follow_up (-1 unknown), official
    (train_val, test, or "" for neither list) and the 14 LABELS (0/1, -1 unknown). Further table truth_boxes.parquet:
    image_id, row, label (0 … 13), x_min, y_min, x_max, y_max (pixels of NIH's 1024 × 1024 image), and of --boxes
    further_boxes.parquet with the same columns. about: what is known of labels and lists, `said` in one line;
    test_name: what the test images are; structures: what weights the features, ["lungs"], ["lungs", "heart"] or None.
    """
    options, config = job.options, job.config
    folder, labels_path = _find_table(options.data, config.label_table)
    labels, about = _read_labels(folder, labels_path, config.split)
    files, known = find_images(folder), set(labels["image_id"])
    here = labels["image_id"].isin(files)
    missing_test = int((~here & (labels["official"] == "test")).sum())
    about |= {"missing": int((~here).sum()), "missing_test": missing_test}
    if not here.all():
        first = labels.loc[~here, "file_name"].iloc[0]
        text = f"{(~here).sum():,} of {len(labels):,} images have no file and are left out, the first is {first}"
        tests = "" if config.split == "all" else f"; {missing_test:,} of them are in the test list"
        log.info(f"{labels_path}: {text}{tests}")
    if not here.any():
        raise InputError(f"{folder}: none of the images of {labels_path.name} is in it")
    labels = labels[here]
    train, test, test_name = _split(labels, about, config.split)
    further = [Path(config.boxes)] if config.boxes else []
    if options.test is not None:
        if len(test):
            log.info(f"--test replaces the {len(test):,} images of the test list")
        test, more = _named_test(options.test, labels, train, files, config.split)
        files, test_name = files | more, f"on the {len(test):,} images of --test"
    elif not len(test):
        reason = " (--split all holds none back)" if config.split == "all" else ""
        log.info(f"no test images: scores are out of fold, and nothing is submitted{reason}")
    check_loose(files, known, labels_path.name, options)
    columns = ["image_id", "file_name", "patient_id", "age", "sex", "view", "follow_up", "split", "official", *CLASSES]
    table = pd.concat([train.assign(split="train"), test.assign(split="test")], ignore_index=True)[columns]
    table = table.astype(dict.fromkeys(CLASSES, "int8"))
    check_run(config, table)
    about |= {"said": _describe(about, config.split), "test_name": test_name, "structures": None}
    about["pixels"] = digest(test[CLASSES].to_numpy().tolist())  # test scores follow from the labels too
    log.info(about["said"])
    codes = (train[CLASSES].to_numpy(np.int64) @ (1 << np.arange(len(CLASSES)))).tolist()
    tables = {BOX_TABLE: place_boxes(_nih_boxes(folder), table)}
    for path in further:
        tables[FURTHER_BOXES] = place_boxes(read_boxes(path), table)
        codes.append(tables[FURTHER_BOXES].to_numpy().tolist())
    return Listing(
        folder,
        table,
        files,
        _sample(test["file_name"].to_numpy()),
        strata=train[CLASSES].to_numpy(),
        labels=codes,
        tables=tables,
        inputs=(labels_path, *find_lists(folder).values(), *_box_path(folder), *further),
        about=about,
    )


def read_test(job):
    """Return the Listing of the test images alone, without labels.

    They are those of --test, of sample_submission.csv in the folder, or of the official test list there, of which
    images without a file are left out and counted.
    """
    folder, named, files = _find_test(job.options)
    table = named[["image_id", "file_name"]].assign(**UNKNOWN, age=np.nan, split="test")
    return Listing(folder, table, files, _sample(table["file_name"].to_numpy()))


def labels_of(images, rows):
    """Return the labels of store rows, float32 (n, 14) of 0 and 1, NaN where they are not known."""
    labels = images.at(rows)[CLASSES].to_numpy(np.float32)
    return np.where(labels < 0, np.float32(np.nan), labels)


def boxes_of(images, rows):
    """Return the boxes that supervise these store rows, all known ones of findings that the image's labels name too.

    Columns as in truth_boxes.parquet. An annotator's finding that NIH's label denies would contradict it.
    """
    boxes = pd.concat([images.tables[name] for name in (BOX_TABLE, FURTHER_BOXES) if name in images.tables])
    boxes = boxes[boxes["row"].isin(rows)]
    named = images.at(boxes["row"])[CLASSES].to_numpy()[np.arange(len(boxes)), boxes["label"]]
    return boxes[named == 1]


def _sample(names):
    sample = pd.DataFrame(0, index=range(len(names)), columns=CLASSES)
    sample.insert(0, SAMPLE[0], names)
    return sample


def _find_table(data, version):
    path = KAGGLE.find_file(data, [name for key, name in TABLES.items() if version in (key, None)])
    for other in TABLES.values():
        if other != path.name and path.with_name(other).is_file():
            log.info(f"{path.parent}: holds {other} too, in which some labels differ; {path.name} is read")
    return path.parent, path


def _read_labels(folder, path, split):
    """Return the label table with the column official, in the order of the ids, and the facts about it."""
    labels = read_labels(path).sort_values("image_id", ignore_index=True)
    odd = labels["age"] > OLDEST
    labels["age"] = labels["age"].mask(odd)
    if odd.any():
        log.info(f"{path}: {odd.sum()} ages over {OLDEST} years count as unknown")
    about = {"labels": path.name, "sha256": file_hash(path), "images": len(labels), "release": describe_labels(labels)}
    labels["official"] = ""
    if not (labels[CLASSES] == 1).any(axis=None):
        raise InputError(f"{path}: no image has a finding")
    if split == "official" or len(find_lists(folder)) == len(LISTS):
        labels["official"], about["lists"] = read_lists(folder, labels["image_id"])
        absent = [about["lists"][part]["absent"] for part in LISTS]
        if any(absent):
            log.info(f"the lists name {absent[0]:,} and {absent[1]:,} images that {path.name} lacks")
    listed = labels[labels["official"] != ""].drop_duplicates(["patient_id", "official"])
    both = listed[listed["patient_id"].duplicated()]
    if split == "official" and len(both):
        patient = both["patient_id"].iloc[0]
        images = ", ".join(listed.loc[listed["patient_id"] == patient, "image_id"])
        raise InputError(f"{folder}: {len(both)} patients are in both lists, such as patient {patient} ({images})")
    return labels, about


def _describe(about, split):
    """Return the line about labels and lists that belongs to every score."""
    missing = f", {about['missing']:,} of them without a file" if about["missing"] else ""
    missing += f"; {about['release']}" if about["images"] == IMAGES else ""
    text = f"labels {about['labels']} (sha256 {about['sha256'][:12]}, {about['images']:,} images{missing})"
    if split == "all":
        return f"{text}; split all: every labelled image is trained on, those of the official test list too"
    return f"{text}; split by {about['lists']['said']}"


def _split(labels, about, split):
    """Return the train rows and the test rows of the label table, and what the test images are."""
    if split == "all":
        return labels, labels.iloc[:0], "on no images"
    train, test = (labels[labels["official"] == part] for part in LISTS)
    loose = int((labels["official"] == "").sum())
    if loose:
        log.info(f"left out {loose:,} labelled images that are in neither list")
    if not len(train):
        raise InputError(f"no image to train on: none of {about['lists']['train_val']['file']} is here")
    if not about["lists"]["official"]:
        return train, test, f"on {len(test):,} images of the test list, which is not the whole official one"
    part = f"{len(test):,} images of " if about["missing_test"] else ""
    return train, test, f"on {part}the official test list"


def _named_test(path, labels, train, files, split):
    """Return the rows of --test in its order, labels -1 where the label table lacks them, and the files of a folder."""
    named, more = test_names(path, files)
    ids = named["image_id"]
    why = " (--split all trains on every labelled image)" if split == "all" else ""
    check_named(ids, files | more, set(train["image_id"]), why)
    test = named.merge(labels.drop(columns="file_name"), on="image_id", how="left", validate="one_to_one")
    test = test.fillna(UNKNOWN | {"patient_id": test["patient"]}).astype({"follow_up": "int64"})[labels.columns]
    shared = int(test["patient_id"].isin(train["patient_id"]).sum())
    if shared:
        log.info(
            f"--test: {shared} of the {len(test)} images are of patients with training images; scores are inflated"
        )
    return test, more


def test_names(path, known=()):
    """Return the images of --test in its order (image_id, patient, file_name), and the files of a folder.

    known: ids of images that have a file, see `read_list`.
    """
    ids, files = named_images(path, known=known)
    named = pd.DataFrame({"image_id": ids})
    named["patient"] = patient_of(named["image_id"])
    if files:
        suffixes = [path.name.removeprefix(strip_suffix(path.name)) for path in map(files.get, ids)]
        named["file_name"] = named["image_id"] + suffixes
        return named, files
    table = read_list(path, known=known).reset_index(drop=True)
    named["file_name"] = table[table.columns[0]]
    if "Patient ID" in table:
        named["patient"] = plain_patients(table["Patient ID"])
    return named, files


def _box_path(folder):
    return [folder / name for name in BOXES if (folder / name).is_file()][:1]


def _nih_boxes(folder):
    boxes = pd.DataFrame({"image_id": pd.Series(dtype=str), "label": pd.Series(dtype="int64")})
    boxes[BOX] = np.zeros((0, 4))
    for path in _box_path(folder):
        boxes = read_boxes(path)
    return boxes


def place_boxes(boxes, table):
    """Return the boxes (of `read_boxes`) that lie on images of the table, with their row in it, in its order."""
    boxes = boxes.copy()
    rows = table["row"].to_numpy() if "row" in table else np.arange(len(table))  # a run's table may have gaps
    boxes["row"] = np.append(rows, -1)[pd.Index(table["image_id"]).get_indexer(boxes["image_id"])]
    absent = int((boxes["row"] < 0).sum())
    if absent:
        log.info(f"left out {absent} of {len(boxes)} boxes, whose images are not here")
    boxes = boxes[boxes["row"] >= 0].sort_values(["row", "label", *BOX], ignore_index=True)
    return boxes[["image_id", "row", "label", *BOX]]


def _find_test(options):
    """Return folder, names (image_id, file_name) and files of the images of `read_test`."""
    if options.test is not None and options.test.is_dir():
        return options.test, *test_names(options.test)
    path = options.test or KAGGLE.find_file(options.data, MARKERS)
    folder = path.parent if path is not options.test else options.data or KAGGLE.find_file(None, MARKERS).parent
    found = find_images(folder)
    if path is not options.test:
        log.info(f"test images from {path}")
    named = test_names(path, found)[0]
    if path is not options.test and path.suffix == ".txt":
        named = named.sort_values("image_id", ignore_index=True)  # the order in which a run has them
    here = named["image_id"].isin(found)
    if not here.all() and options.test is None and path.suffix == ".txt" and here.any():
        log.info(f"{path}: {(~here).sum():,} of {len(named):,} images have no file and are left out")
        named = named[here].reset_index(drop=True)
    elif not here.all():
        first = named.loc[~here, "image_id"].iloc[0]
        raise InputError(f"{(~here).sum()} test images have no file in {folder}, the first is {first}")
    return folder, named, {image_id: found[image_id] for image_id in named["image_id"]}
