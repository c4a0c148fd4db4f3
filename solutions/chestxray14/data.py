"""The competition's files to an image table, boxes, folds, a store and the lungs."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from common.config import digest, file_hash
from common.data.folds import make_folds, save_folds
from common.data.store import Store, prepare_store
from common.data.tables import named_images, some_rows
from common.errors import InputError
from common.paths import IMAGES, competition_folder, find_images, read_json, read_parquet
from common.post.boxes import BOX
from common.steps import (
    check_prepared,
    keep_config,
    keep_trainings,
    read_folds,
    store_folder,
    tell_leaks,
    trainings,
    write_table,
)
from common.submit.table import write_submission
from solutions.chestxray14.config import LABELS, SLUG
from solutions.chestxray14.labels import (
    BOXES,
    LISTS,
    TABLES,
    find_lists,
    patient_of,
    plain_patient,
    possible_age,
    read_boxes,
    read_labels,
    read_lists,
)
from solutions.chestxray14.leaks import check_run
from solutions.chestxray14.lungs import ALONE, find_lungs, lungs_made, mask_structures, open_lungs

log = logging.getLogger(__name__)
MADE_WITH = ("split", "n_folds", "seed", "store_size")  # settings that decide what `prepare` makes
CLASSES = list(LABELS)
TOLD_BYTES = 1e9  # what is expected on disk above this is said beforehand
SAMPLE = ["Image Index", *CLASSES]
UNKNOWN = {"patient_id": "", "sex": "", "view": "", "follow_up": -1, "official": ""} | dict.fromkeys(CLASSES, -1)


@dataclass
class Prepared:
    """What `prepare` leaves: the image table, the true boxes, the open store, the lungs where the recipe needs them.

    table: image_id, file_name (as the label table has it), row, width, height (pixels of the file), ok (False for a
    placeholder), patient_id, age (years or NaN), sex, view, follow_up (-1 unknown), split (train or test), official
    (train_val, test or "" for neither list), fold (-1 for test), the 14 LABELS (0/1, -1 unknown). boxes: image_id, row,
    label (0 … 13), x_min, y_min, x_max, y_max (pixels of NIH's 1024 × 1024 image). lungs: the table of
    `lungs.Lungs`, masks and crops its paths; None where the recipe has no use for them. key: what trainings follow
    from; pixels_key: the very pixels. official: what is to be known of labels, lists and `structures`, `said` in one
    line; test_name: what the test images are.
    """

    table: pd.DataFrame
    boxes: pd.DataFrame
    store: Store
    key: str
    pixels_key: str
    official: dict
    test_name: str
    lungs: pd.DataFrame | None = None
    masks: Path | None = None
    crops: Path | None = None

    def __post_init__(self):
        labels = self.table[CLASSES].to_numpy(np.float32)
        self._labels = np.where(labels < 0, np.float32(np.nan), labels)
        self._ids, self._index = self.table["image_id"].to_numpy(str), pd.Index(self.table["image_id"])
        self._patients = self.table["patient_id"].to_numpy(str)

    @property
    def structures(self):
        """What weights the features: ["lungs"] or ["lungs", "heart"]; None without weighting."""
        return self.official.get("structures")

    def rows(self, split="train", folds=None):
        """Store rows of one split, or of the train images in `folds`, in order."""
        chosen = self.table["split"] == split
        if folds is not None:
            chosen &= self.table["fold"].isin(list(folds))
        return self.table.loc[chosen, "row"].to_numpy()

    def rows_of(self, image_ids):
        """Store rows of images by their ids, in their order; InputError for an image that is not there."""
        rows = self._index.get_indexer(image_ids)
        for place in np.flatnonzero(rows < 0)[:1]:
            raise InputError(f"{list(image_ids)[place]}: not an image of this run")
        return rows

    def ids(self, rows):
        """Image ids of rows, str (n,)."""
        return self._ids[rows]

    def labels(self, rows):
        """Labels of rows, float32 (n, 14) of 0 and 1, NaN where they are not known."""
        return self._labels[rows]

    def patients(self, rows):
        """Patients of rows, str (n,), "" where unknown."""
        return self._patients[rows]


def prepare_competition(context):
    """Read, check and decode the competition into the run folder, the store and the lungs; returns Prepared.

    Writes images.parquet, truth_boxes.parquet, folds.csv, sample_submission.csv (the images that a submission must
    have) and, where the recipe needs it, lungs.parquet. Everything that is wrong with the tables is found before an
    image is decoded. Images of the label table without a file are left out and counted: few download all of it.
    """
    options, config, run = context.options, context.config, context.run
    if options.id_map:
        raise InputError("--id-map: the label table names the patients; leave it out")
    folder, labels_path = _find_table(options.data)
    labels, official = _read(folder, labels_path, config)
    files = find_images(folder)
    here = labels["image_id"].isin(files)
    official |= {"missing": int((~here).sum()), "missing_test": int((~here & (labels["official"] == "test")).sum())}
    if not here.all():
        log.info(
            f"{labels_path}: {official['missing']:,} of {len(labels):,} images have no file and are left out, the "
            f"first is {labels.loc[~here, 'file_name'].iloc[0]}"
            + ("" if config.split == "all" else f"; {official['missing_test']:,} of them are in the test list")
        )
    if not here.any():
        raise InputError(f"{folder}: none of the images of {labels_path.name} is in it")
    train, test, more, test_name = _split(labels[here], files, official, options, config)
    _check_loose(labels, {**files, **more}, labels_path, options)
    files |= more
    table = _image_table(train, test, config, options)
    check_run(config, table)
    official["said"] = _said(official, config.split)
    log.info(official["said"])
    boxes = _boxes(folder, table)

    train = table["split"] == "train"
    about = {name: getattr(config, name) for name in MADE_WITH}
    about["lungs"] = lungs_made(config) if config.needs_lungs else None
    about["originals"] = digest([[i, files[i].name, files[i].stat().st_size] for i in table.loc[train, "image_id"]])
    key = _key(table, about)
    keep_trainings(run, key)
    sizes = disk_use(len(table), config.store_size, about["lungs"])
    if sum(sizes.values()) > TOLD_BYTES:
        shown = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in sizes.items())
        log.info(f"{len(table):,} images take {sum(sizes.values()) / 1e9:.1f} GB on disk: {shown}")
    store = prepare_store(
        {image_id: files[image_id] for image_id in table["image_id"]},
        store_folder(context, folder, table["image_id"], config.store_size),
        config.store_size,
        workers=None if options.workers is None else max(options.workers, 1),
        on_bad_image=options.on_bad_image,
        placeholder_ids=frozenset(table.loc[~train, "image_id"]),
    )
    for place, name in enumerate(("width", "height", "ok"), start=3):
        table.insert(place, name, store.table[name].to_numpy())
    lungs = find_lungs(context, store, files) if config.needs_lungs else None
    official["structures"] = mask_structures(config)
    if official["structures"] == ["lungs"]:
        official["said"] += f"; {ALONE}"

    run.forget("prepare")  # what follows must not be taken for whole where it is cut off
    write_table(run.path("images.parquet"), table)
    write_table(run.path("truth_boxes.parquet"), boxes)
    if lungs:
        write_table(run.path("lungs.parquet"), open_lungs(lungs, about["lungs"]).table)
    save_folds(
        run.path("folds.csv"),
        table.loc[train, "image_id"].tolist(),
        table.loc[train, "fold"].to_numpy(),
        table.loc[train, "patient_id"].to_numpy(),
        f"n_folds {config.n_folds}, seed {config.seed}",
    )
    write_sample(run, table.loc[~train, "file_name"].to_numpy())
    inputs = [labels_path, *find_lists(folder).values(), *_box_path(folder), options.test, options.fold_table]
    run.describe(config.seed, [path for path in inputs if path is not None and path.is_file()])
    if not trainings(run):
        keep_config(context)
    about |= {"data": str(folder.resolve()), "test": options.test and str(options.test.resolve())}
    about |= {"synthetic": (folder / "sample.json").is_file(), "official": official, "test_name": test_name}
    about["lungs_folder"] = lungs and str(lungs.resolve())
    run.record("prepare", key, store=str(store.folder.resolve()), images=len(table), boxes=len(boxes), **about)
    healthy = (table.loc[train, CLASSES].sum(axis=1) == 0).sum()
    log.info(
        f"prepared {train.sum():,} train images of {table.loc[train, 'patient_id'].nunique():,} patients ({healthy:,} "
        f"without a finding) and {(~train).sum():,} test images at {config.store_size} px in {store.folder}"
    )
    return open_prepared(context)


def write_sample(run, names):
    """The images that a submission must have, by their file names, all probabilities 0."""
    sample = pd.DataFrame(0, index=range(len(names)), columns=CLASSES)
    sample.insert(0, SAMPLE[0], names)
    write_submission(run.path("sample_submission.csv"), sample)


def open_prepared(context):
    """Read what `prepare` left; raises InputError when it has not been run, or with other options than now."""
    run, config = context.run, context.config
    record = check_prepared(context, MADE_WITH)
    wanted = lungs_made(config) if config.needs_lungs else None
    if wanted and wanted != record["lungs"]:
        what = "without lungs" if record["lungs"] is None else "with another segmenter, mask_size or crop_size"
        raise InputError(f"{run.folder}: prepared {what}; run `prepare` with the new settings")
    table, boxes = read_parquet(run.path("images.parquet")), read_parquet(run.path("truth_boxes.parquet"))
    store = Store.open(record["store"])
    pixels = digest(read_json(store.folder / "store.json")["key"], wanted)
    data = Prepared(
        table, boxes, store, _key(table, record | {"lungs": wanted}), pixels, record["official"], record["test_name"]
    )
    if wanted:
        found = open_lungs(record["lungs_folder"], wanted)
        data.lungs, data.masks, data.crops = found.table, found.masks, found.crops
    return data


def disk_use(images, store_size, lungs):
    """Bytes that the store and the lungs' masks and crops take, by what they are; lungs: `lungs_made` or None."""
    sides = {"store": store_size}
    if lungs:
        sides |= {"masks of the lungs": lungs["mask_size"], "crops of the lungs": lungs["crop_size"]}
    return {name: images * side**2 for name, side in sides.items() if side}


def _key(table, about):
    """What the trainings follow from: the images' originals, labels, folds and lungs."""
    train = table[table["split"] == "train"]
    labels = train[CLASSES].to_numpy(np.int64) @ (1 << np.arange(len(CLASSES)))
    return digest(
        train["image_id"].tolist(),
        labels.tolist(),
        train["fold"].tolist(),
        about["store_size"],
        about["originals"],
        about["lungs"],
    )


def _find_table(data):
    tried = None
    for name in TABLES:
        try:
            folder = competition_folder(data, SLUG, name)
        except InputError as error:
            tried = tried or error
            continue
        for other in TABLES:
            if other != name and (folder / other).is_file():
                log.info(f"{folder}: holds {other} too, in which some labels differ; {name} is read")
        return folder, folder / name
    raise InputError(str(tried).replace(TABLES[0], " or ".join(TABLES), 1))


def _read(folder, path, config):
    """The label table with the column official, in the order of the ids, and what is to be known of it."""
    labels = read_labels(path).sort_values("image_id", ignore_index=True)
    labels["age"], odd = possible_age(labels["age"])
    if odd:
        log.info(f"{path}: {odd} ages over 120 years are taken for unknown")
    about = {"labels": path.name, "sha256": file_hash(path), "images": len(labels)}
    labels["official"] = ""
    if not (labels[CLASSES] == 1).any(axis=None):
        raise InputError(f"{path}: no image has a finding")
    if config.split == "official" or len(find_lists(folder)) == len(LISTS):
        labels["official"], about["lists"] = read_lists(folder, labels["image_id"])
        absent = [about["lists"][part]["absent"] for part in LISTS]
        if any(absent):
            log.info(f"the lists name {absent[0]:,} and {absent[1]:,} images that {path.name} lacks")
    listed = labels[labels["official"] != ""].drop_duplicates(["patient_id", "official"])
    both = listed[listed["patient_id"].duplicated()]
    if config.split == "official" and len(both):
        patient = both["patient_id"].iloc[0]
        images = listed.loc[listed["patient_id"] == patient, "image_id"]
        raise InputError(
            f"{folder}: {len(both)} patients have images in both lists, such as patient {patient} ({', '.join(images)})"
        )
    return labels, about


def _said(about, split):
    """The line that a reader of scores needs: which labels, which lists, how much of them."""
    missing = f", {about['missing']:,} of them without a file" if about["missing"] else ""
    said = f"labels {about['labels']} (sha256 {about['sha256'][:12]}, {about['images']:,} images{missing})"
    if split == "all":
        return f"{said}; split all: every labelled image is trained on, those of the official test list too"
    return f"{said}; split by {about['lists']['said']}"


def _split(labels, files, official, options, config):
    """Train rows and test rows of the label table, the files of `--test`, and what the test images are."""
    if config.split == "all":
        train, test = labels, labels.iloc[:0]
        test_name = "on no images"
    else:
        train, test = (labels[labels["official"] == part] for part in LISTS)
        lists = official["lists"]
        n = f"{len(test):,} images of the test list"
        test_name = f"on {n}, which is not the whole official one"
        if lists["whole"] and official["missing_test"]:
            test_name = f"on {n}"
        elif lists["whole"]:
            test_name = (
                "on the official test list"
                if lists["official"]
                else (f"on {n}, which is of the official size but not verified by its hash")
            )
        loose = int((labels["official"] == "").sum())
        if loose:
            log.info(f"left out {loose:,} labelled images that are in neither list")
    if not len(train):
        raise InputError(f"no image to train on: none of {official['lists']['train_val']['file']} is here")
    if options.test is None:
        if not len(test):
            log.info(
                "no test images: scores are out of fold, and nothing is submitted"
                + (" (--split all holds none back)" if config.split == "all" else "")
            )
        return train, test, {}, test_name
    if len(test):
        log.info(f"--test takes the place of the {len(test):,} images of the test list")
    test, more = _named(options.test, labels)
    both = test["image_id"].isin(train["image_id"])
    if both.any():
        why = " (--split all trains on every labelled image)" if config.split == "all" else ""
        raise InputError(
            f"--test: {both.sum()} of the images are training images{why}, such as {test.loc[both, 'image_id'].iloc[0]}"
        )
    absent = ~test["image_id"].isin(files) & ~test["image_id"].isin(more)
    if absent.any():
        raise InputError(
            f"--test: {absent.sum()} images have no file, the first is {test.loc[absent, 'image_id'].iloc[0]}"
        )
    shared = int(test["patient_id"].isin(train["patient_id"]).sum())
    if shared:
        log.info(f"--test: {shared} of the {len(test)} images are of patients with training images; scores may flatter")
    return train, test, more, f"on the {len(test):,} images of --test"


def _named(path, labels):
    """The rows of `--test` in its order, labels -1 where the label table lacks them, and the files of a folder."""
    named, files = test_names(path)
    test = named.merge(labels.drop(columns="file_name"), on="image_id", how="left", validate="one_to_one")
    test = test.fillna({"patient_id": test["patient"], **{k: v for k, v in UNKNOWN.items() if k != "patient_id"}})
    return test.astype({"follow_up": "int64"})[labels.columns], files


def test_names(path):
    """Images of `--test` in its order (image_id, patient, file_name), and the files of a folder."""
    ids, files = named_images(path)
    named = pd.DataFrame({"image_id": ids})
    named["patient"] = patient_of(named["image_id"])
    if files:
        named["file_name"] = [files[image_id].name for image_id in ids]
        return named, files
    table = some_rows(path)
    if table.columns[0].lower().endswith(IMAGES):  # such as test_list.txt
        raise InputError(f"{path}, row 1: {table.columns[0]} is an image; a header is wanted above it (--test)")
    named["file_name"] = table[table.columns[0]]
    if "Patient ID" in table:
        named["patient"] = plain_patient(table["Patient ID"])
    return named, files


def _check_loose(labels, files, labels_path, options):
    loose = sorted(set(files) - set(labels["image_id"])) if options.test is None else []
    without = f"without a row in {labels_path.name}"
    if loose and options.on_unlabelled == "error":
        raise InputError(
            f"{files[loose[0]]}: one of {len(loose)} images {without}; --on-unlabelled skip leaves them "
            "out, --test predicts them"
        )
    if loose:
        log.info(f"left out {len(loose)} images {without}")


def _image_table(train, test, config, options):
    """The image table without what only the store knows."""
    table = pd.concat([train.assign(split="train"), test.assign(split="test")], ignore_index=True)
    table["row"], table["fold"] = np.arange(len(table)), np.full(len(table), -1)
    table.loc[table["split"] == "train", "fold"] = _folds(train, config, options)
    first = [
        "image_id",
        "file_name",
        "row",
        "patient_id",
        "age",
        "sex",
        "view",
        "follow_up",
        "split",
        "official",
        "fold",
    ]
    return table[[*first, *CLASSES]].astype(dict.fromkeys(CLASSES, "int8"))


def _folds(train, config, options):
    """Folds stratified by the 14 labels and their absence, grouped by patient."""
    patients = train["patient_id"].to_numpy()
    if options.fold_table:
        folds = read_folds(options.fold_table, train["image_id"].tolist(), config.n_folds)
    else:
        folds = make_folds(train[CLASSES].to_numpy(), config.n_folds, patients, config.seed)
    tell_leaks(folds, patients, options.fold_table)
    return folds


def _box_path(folder):
    return [folder / name for name in BOXES if (folder / name).is_file()][:1]


def _boxes(folder, table):
    """The boxes of the images in the table, as truth_boxes.parquet has them."""
    boxes = pd.DataFrame({"image_id": pd.Series(dtype=str), "label": pd.Series(dtype="int64")})
    boxes[BOX] = np.zeros((0, 4))
    for path in _box_path(folder):
        boxes = read_boxes(path)
    boxes["row"] = pd.Index(table["image_id"]).get_indexer(boxes["image_id"])
    absent = int((boxes["row"] < 0).sum())
    if absent:
        log.info(f"left out {absent} of {len(boxes)} boxes, whose images are not here")
    boxes = boxes[boxes["row"] >= 0].sort_values(["row", "label", *BOX], ignore_index=True)
    return boxes[["image_id", "row", "label", *BOX]]
