"""The Listing that a solution reads from its competition's files, and the checks that solutions share."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from common.data.dicom import read_image
from common.data.tables import named_images, read_ids, read_patients
from common.errors import InputError, log
from common.paths import find_images, list_images, name_images

FURTHER = "further"  # split of additional training images, see common.further


@dataclass(frozen=True)
class Listing:
    """The images and labels of a challenge, as read from its files.

    folder: the competition's folder. table: one row per image in the order of the store, with image_id, split (train or
    test), patient_id ("" if unknown) and the challenge's own columns. files: image id → path. sample: a submission with
    all ids and a neutral answer. strata: labels over which folds are balanced, (n,) or (n, k) for the train rows;
    None if only `refine` can compute them. labels: JSON that trainings depend on in addition to ids and folds. tables:
    further tables of the run, by file name. arrays: further arrays with one entry per store row, by name. inputs: files
    whose hashes the manifest records. about: JSON for later verbs. left_out: rows of left_out.csv (image_id, file,
    reason). placeholders: ids that --on-bad-image placeholder may replace, by default those of the test images. kinds:
    if strata is None, what the tables tell about them, for `plan` to choose and count images. If the table has a column
    `used`, strata and kinds are for its rows that are used.
    """

    folder: Path
    table: pd.DataFrame
    files: dict
    sample: pd.DataFrame
    strata: np.ndarray | None = None
    labels: object = None
    tables: dict = field(default_factory=dict)
    arrays: dict = field(default_factory=dict)
    inputs: tuple = ()
    about: dict = field(default_factory=dict)
    left_out: tuple = ()
    placeholders: frozenset | None = None
    kinds: np.ndarray | None = None


def choose_images(listing, n_train, n_test, seed):
    """Return the listing with at most so many training and test images; if possible, half of the former have labels.

    Labels take turns, so rare labels are included. The sample submission keeps all ids.
    """
    table, rng = listing.table, np.random.default_rng(seed)
    train, test = (np.flatnonzero(table["split"] == split) for split in ("train", "test"))
    train = train[table["used"].to_numpy()[train]] if "used" in table else train
    places = rng.permutation(len(train))
    known = listing.kinds if listing.strata is None else listing.strata
    if known is not None:
        labels = np.asarray(known).reshape(len(train), -1)[places] != 0
        turn = np.where(labels, labels.cumsum(0), len(train) + 1).min(1)  # 1: the first image of one of its labels
        some = places[np.argsort(turn, kind="stable")][: min(n_train // 2, int(labels.any(1).sum()))]
        places = np.concatenate([some, places[~np.isin(places, some)]])
    places = np.sort(places[:n_train])
    chosen = table.iloc[np.sort(np.concatenate([train[places], test[:n_test]]))].reset_index(drop=True)
    strata = None if listing.strata is None else listing.strata[places]
    gone = set(table["image_id"]) - set(chosen["image_id"])
    return replace(listing, table=chosen, strata=strata, tables=_without(listing.tables, gone))


def _without(tables, gone):
    """Return tables by name without the rows of the images `gone`."""

    def rest(table):
        return table if table is None or "image_id" not in table else table[~table["image_id"].isin(gone)]

    return {name: rest(table) for name, table in tables.items()}


def leave_out_unreadable(listing):
    """Return a listing (whose table has the column ok) without unreadable training and further images."""
    rows = unreadable(listing)
    if not rows:
        return listing
    gone = {image_id for image_id, *_ in rows}
    if not (set(listing.table.loc[listing.table["split"] == "train", "image_id"]) - gone):
        raise InputError(f"{listing.folder}: none of the training images can be read; {rows[0][1]}: {rows[0][2]}")
    table = listing.table[~listing.table["image_id"].isin(gone)]
    return replace(listing, table=table, tables=_without(listing.tables, gone), left_out=(*listing.left_out, *rows))


def unreadable(listing):
    """Return the rows of left_out.csv for a listing's training and further images that are not ok."""
    table = listing.table[~listing.table["ok"] & (listing.table["split"] != "test")]
    return [(name, str(listing.files[name]), read_problem(listing.files[name])) for name in table["image_id"]]


def read_problem(path):
    """Return the reason why an image cannot be read, as text."""
    try:
        read_image(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    return "could not be read when the store was made; delete the store to decode it again"


def find_files(folder, options, read_test_ids):
    """Return the image files (id → path) of the competition and --test, and the ids of --test or read_test_ids()."""
    files = find_images(folder)
    if options.test is None:
        return files, read_test_ids()
    test_ids, more = named_images(options.test, known=files, folder=folder)
    return {**files, **more}, test_ids


def check_files(train_ids, test_ids, files, labels_path, options):
    """Raise InputError for missing files, test images in training, and unlisted files unless --on-unlabelled skip."""
    _check_present(train_ids, files, "images", f"{labels_path}: ")
    _check_present(test_ids, files, "test images")
    if both := set(train_ids) & set(test_ids):
        which = f"--test: {len(both)} of the images are training images"
        if options.test is None:
            which = f"{labels_path}: {len(both)} images are in the test set too"
        raise InputError(f"{which}, such as {min(both)}")
    check_loose(files, {*train_ids, *test_ids}, f"{labels_path.name} or the sample submission", options)


def _check_present(ids, files, kind, where=""):
    absent = [image_id for image_id in ids if image_id not in files]
    if absent:
        raise InputError(f"{where}{len(absent)} {kind} have no file, the first is {absent[0]}")


def match_files(labels_path, train_ids, sample_path, columns, options):
    """Return the image files (id → path) of the competition and --test, and the test ids; errors as in `check_files`.

    The test ids are those of --test, or else those in the sample submission, which has these columns.
    """
    files, test_ids = find_files(labels_path.parent, options, lambda: read_ids(sample_path, columns))
    check_files(train_ids, test_ids, files, labels_path, options)
    return files, test_ids


def check_loose(files, known, tables, options):
    """Raise InputError for files that are not `known` from `tables`, unless --on-unlabelled skip or --test is given."""
    loose = sorted(set(files) - set(known)) if options.test is None else []
    if loose and options.on_unlabelled == "error":
        which = f"one of {len(loose)} images without a row in {tables}"
        raise InputError(f"{files[loose[0]]}: {which}; --on-unlabelled skip leaves them out, --test predicts them")
    if loose:
        log.info(f"left out {len(loose)} images without a row in {tables}")


def check_named(ids, files, train_ids=(), why=""):
    """Raise InputError for images of --test that are training images (`why` explains it) or have no file."""
    both = [image_id for image_id in ids if image_id in train_ids]
    if both:
        raise InputError(f"--test: {len(both)} of the images are training images{why}, such as {both[0]}")
    _check_present(ids, files, "images", "--test: ")


def list_test(options, source, columns):
    """Return folder, ordered ids and files (id → path) of the images to predict, without needing a label table.

    The images are those of --test (a folder, or a CSV of names in --data) or else of the sample submission (of the
    Source, with these columns). Raises InputError for images without a file.
    """
    if options.test is not None and options.test.is_dir():
        return options.test, *named_images(options.test)
    if options.test is not None:
        folder = options.data or source.find_file().parent
        files = name_images(list_images(folder), folder)
        ids, _ = named_images(options.test, known=files, folder=folder)
    else:
        sample = source.find_file(options.data)
        folder, ids, files = sample.parent, read_ids(sample, columns), find_images(sample.parent)
        log.info(f"test images from {sample}")
    _check_present(ids, files, "test images")
    return folder, ids, {image_id: files[image_id] for image_id in ids}


def image_table(train_ids, test_ids, id_map=None):
    """Return the table of image_id, patient_id ("" if unknown) and split; id_map: see `read_patients`."""
    patients = read_patients(id_map, train_ids) if id_map else [""] * len(train_ids)
    train, test = ({"image_id": ids, "split": split} for ids, split in ((train_ids, "train"), (test_ids, "test")))
    parts = pd.DataFrame(train | {"patient_id": patients}), pd.DataFrame(test | {"patient_id": ""})
    return pd.concat(parts, ignore_index=True)[["image_id", "patient_id", "split"]].astype(str)


def neutral_answers(ids, columns, neutral):
    """Return a sample submission: the columns of ids and of answers, which are all `neutral`."""
    return pd.DataFrame({columns[0]: ids, columns[1]: neutral}, dtype=str)


def check_square(listing, why):
    """Raise InputError, which ends in `why`, for an image (after decoding) that is not square."""
    for first in listing.table[listing.table["width"] != listing.table["height"]].itertuples():
        raise InputError(f"{first.image_id}: {first.width} × {first.height} pixels; {why}")
