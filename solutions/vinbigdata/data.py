"""The competition's files to an image table, boxes on which the raters agree, folds and a store."""

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd

from common.config import digest
from common.data.folds import make_folds, save_folds
from common.data.store import Store, prepare_store
from common.data.tables import named_images, read_ids, read_patients
from common.errors import InputError
from common.infer.tools import find_test, test_store
from common.paths import check_id, competition_folder, find_images, read_parquet
from common.post.boxes import BOX, scale
from common.post.fusion import fuse_raters
from common.post.suppression import first_boxes
from common.post.wbf import mean_boxes
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
from common.submit.table import read_table, write_submission
from solutions.vinbigdata.config import CLASSES, KAGGLE, NO_FINDING, SLUG
from solutions.vinbigdata.sizes import SIZES, read_sizes, tell_copies

log = logging.getLogger(__name__)
MADE_WITH = ("n_folds", "rater_aware", "seed", "store_size")  # settings that decide what `prepare` makes,
MADE_WITH_FUSION = ("raters", "raters_iou")  # and those of them in FusionConfig
TRAIN = ["image_id", "class_name", "class_id", "rad_id", *BOX]
SAMPLE = ["image_id", "PredictionString"]
NO_LABELS = pd.DataFrame({"image_id": [], "class_id": [], "rad_id": []}).astype(
    {"image_id": str, "class_id": "int64", "rad_id": str}
)
NO_LABELS[BOX] = np.zeros((0, 4))
FINDINGS = [f"c{number}" for number in range(NO_FINDING)]
JOIN = {"wbf": mean_boxes, "nms": first_boxes, "none": lambda boxes, starts, iou: (boxes, np.arange(len(boxes)))}
NO_BOX = (0.0, 0.0, 1.0, 1.0)  # what the competition has in the place of a box where nothing is found


@dataclass
class Prepared:
    """What `prepare` leaves: the image table, the fused boxes and the open store.

    table: image_id, row, width, height (pixels of the original), ok (False for a placeholder), patient_id ("" where
    unknown), split (train or test), fold (-1 for test), abnormal (0/1), c0 … c13 (0/1, by any rater), raters (how many
    read it). boxes: image_id, row, class_id (0 … 13), x_min, y_min, x_max, y_max (pixels of the original), votes
    (raters that marked it), by row.
    """

    table: pd.DataFrame
    boxes: pd.DataFrame
    store: Store
    key: str

    def __post_init__(self):
        self._starts = np.searchsorted(self.boxes["row"], np.arange(len(self.table) + 1))
        self._scales = self.store.images.shape[1] / self.table[["width", "height"]].to_numpy(float)
        self._corners, self._labels = self.boxes[BOX].to_numpy(float), self.boxes["class_id"].to_numpy(np.int64)

    def rows(self, split="train", folds=None):
        """Store rows of one split, or of the train images in `folds`, in order."""
        chosen = self.table["split"] == split
        if folds is not None:
            chosen &= self.table["fold"].isin(list(folds))
        return self.table.loc[chosen, "row"].to_numpy()

    def boxes_of(self, row):
        """Boxes of a train row in pixels of the stored square, float32 (n, 4), and their classes, int64 (n,)."""
        mine = slice(*self._starts[[row, row + 1]])
        return scale(self._corners[mine], *self._scales[row]).astype(np.float32), self._labels[mine].copy()

    def truth(self, rows):
        """The truth of train rows for the metric: image_id, class_id, x_min, y_min, x_max, y_max.

        In pixels of the original; an image without a finding has one row, class 14 with the box 0 0 1 1. Raises
        InputError for a test image, whose truth is not known.
        """
        chosen = self.table[self.table["row"].isin(rows)]
        for image_id in chosen.loc[chosen["split"] != "train", "image_id"][:1]:
            raise InputError(f"{image_id}: a test image, there is no truth for it")
        healthy = chosen.loc[chosen["abnormal"] == 0, ["image_id"]]
        healthy = healthy.assign(class_id=NO_FINDING, **dict(zip(BOX, NO_BOX, strict=True)))
        both = pd.concat([self.boxes[self.boxes["row"].isin(rows)], healthy], ignore_index=True)
        return both[["image_id", "class_id", *BOX]]

    def sizes(self):
        """image_id, width and height of every image, train and test, in pixels of the original."""
        return self.table[["image_id", "width", "height"]]


def read_train(path):
    """Read the raters' table: image_id, class_id (int64), rad_id, x_min, y_min, x_max, y_max (float64, pixels).

    A class 14 row has NaN for its box. Rows that repeat another one whole are dropped and counted, other columns left
    out (data sets of resized copies have width and height); row i of the index is row i + 2 of the file. Raises
    InputError naming file, row and what is wrong: header, id, class out of range, a name that is not the class's, no
    rater, a box that is missing, no number, negative or without area, class 14 with a box, or a rater who marks a
    finding and no finding in one image.
    """
    table = read_table(path, TRAIN, exact=False)
    if not len(table):
        raise InputError(f"{path}: no rows under its header")
    for row, image_id in table["image_id"].drop_duplicates().items():
        check_id(image_id, f"{path}, row {row + 2}")
    known = table["class_id"].str.fullmatch("[0-9]|1[0-4]")
    class_id = table["class_id"].where(known, str(NO_FINDING)).astype("int64")
    healthy, names = class_id == NO_FINDING, np.array(CLASSES)[class_id]
    blank = table[BOX] == ""
    boxes = table[BOX].apply(pd.to_numeric, errors="coerce").astype(float)
    numbers = np.isfinite(boxes).all(axis=1)
    order = (boxes["x_min"] < boxes["x_max"]) & (boxes["y_min"] < boxes["y_max"])
    reads = [table["image_id"], table["rad_id"]]
    faults = [
        (~known, "class_id {class_id!r} is not a whole number from 0 to 14"),
        (table["class_name"] != names, "class_id {class_id} does not belong to class_name {class_name!r}"),
        (table["rad_id"] == "", "no rad_id"),
        (healthy & ~blank.all(axis=1), "class 14 (No finding) with the box {box}; it must be blank"),
        (~healthy & blank.any(axis=1), "a finding needs x_min, y_min, x_max and y_max, not {box}"),
        (~healthy & ~numbers, "the box {box} is not four finite numbers"),
        (~healthy & ~order, "the box {box} must have x_min < x_max and y_min < y_max"),
        (~healthy & (boxes.min(axis=1) < 0), "the box {box} begins outside the image"),
        (healthy & ~healthy.groupby(reads).transform("all"), "{rad_id} marks a finding and No finding in this image"),
    ]
    for wrong, said in faults:
        if wrong.any():
            found = table.loc[wrong.idxmax()]
            said = said.format(**found, box=" ".join(value or "(blank)" for value in found[BOX]))
            raise InputError(f"{path}, row {wrong.idxmax() + 2} ({found['image_id']}): {said}")
    table = pd.concat([table[["image_id"]], class_id, table[["rad_id"]], boxes], axis=1)
    repeated = table.duplicated()
    if repeated.any():
        log.info(f"{path}: {repeated.sum()} rows repeat another one, the first is row {repeated.idxmax() + 2}")
    return table[~repeated]


def prepare_competition(context):
    """Read, check and decode the competition into the run folder and the store; returns Prepared.

    Writes images.parquet, boxes.parquet, folds.csv and sample_submission.csv (the ids that a submission must have).
    Everything that is wrong with the tables is found before an image is decoded, save boxes outside their image.
    """
    options, config, run = context.options, context.config, context.run
    folder = competition_folder(options.data, SLUG, "train.csv")
    labels_path, sample_path = folder / "train.csv", folder / "sample_submission.csv"
    labels = read_train(labels_path).sort_values(["image_id", "class_id", "rad_id", *BOX])
    files = find_images(folder)
    if options.test is None:
        test_ids = read_ids(sample_path, SAMPLE)
    else:
        test_ids, more = named_images(options.test)
        files = {**files, **more}
    train_ids = labels["image_id"].unique().tolist()
    _check_files(train_ids, test_ids, files, labels_path, options)
    if (labels["class_id"] == NO_FINDING).all():
        raise InputError(f"{labels_path}: no image has a finding")

    patients = read_patients(options.id_map, train_ids) if options.id_map else None
    if patients is None:
        log.info("folds: no map from image to patient (--id-map): a patient may lie in two folds, scores may flatter")
    table = _image_table(labels, patients, train_ids, test_ids)
    train = table["split"] == "train"
    table.loc[train, "fold"] = _folds(table[train], labels, patients, config, options)
    about = {name: getattr(config, name) for name in MADE_WITH}
    about |= {name: getattr(config.fusion, name) for name in MADE_WITH_FUSION}
    originals = read_sizes(options.sizes, table["image_id"]) if options.sizes else None
    n, given = len(train_ids), [] if originals is None else originals.to_numpy().tolist()
    about["originals"] = digest([[i, files[i].name, files[i].stat().st_size] for i in train_ids], *given[:n])
    about["test_sizes"] = digest(given[n:])
    about["labels"] = digest(labels.to_numpy().tolist())
    key = _key(table, about)
    keep_trainings(run, key)

    store = prepare_store(
        {image_id: files[image_id] for image_id in table["image_id"]},
        store_folder(context, folder, table["image_id"], config.store_size),
        config.store_size,
        workers=None if options.workers is None else max(options.workers, 1),
        on_bad_image=options.on_bad_image,
        placeholder_ids=frozenset(test_ids),
    )
    table = _with_sizes(table, store, originals)
    boxes = _agreed(labels[labels["class_id"] != NO_FINDING], table, config.fusion, labels_path)
    if about["test_sizes"] != (run.step("prepare") or {}).get("test_sizes", digest([])):
        for step in ("predict", *(f"predict test {fold}" for fold in range(config.n_folds))):
            run.forget(step)  # boxes are kept in pixels of the originals
    run.forget("prepare")  # what follows must not be taken for whole where it is cut off
    write_table(run.path("images.parquet"), table)
    write_table(run.path("boxes.parquet"), boxes)
    save_folds(
        run.path("folds.csv"),
        train_ids,
        table.loc[train, "fold"].to_numpy(),
        patients,
        f"n_folds {config.n_folds}, seed {config.seed}",
    )
    _write_sample(run, test_ids)
    inputs = (labels_path, sample_path, options.id_map, *options.sizes)
    run.describe(config.seed, [p for p in inputs if p is not None and p.is_file()])
    if not trainings(run):
        keep_config(context)
    about |= {"data": str(folder.resolve()), "test": options.test and str(options.test.resolve())}
    about |= {"synthetic": (folder / "sample.json").is_file()}
    run.record("prepare", key, store=str(store.folder.resolve()), images=len(table), boxes=len(boxes), **about)
    marked = int((labels["class_id"] != NO_FINDING).sum())
    log.info(
        f"prepared {train.sum()} train images ({table['abnormal'].sum()} with findings: {marked} boxes of "
        f"{labels['rad_id'].nunique()} raters became {len(boxes)}) and {(~train).sum()} test images at "
        f"{config.store_size} px in {store.folder}"
    )
    return open_prepared(context)


def prepare_test(context):
    """Decode the test images alone, without labels or folds; returns their Prepared, which has no boxes.

    They are those of --test or of the sample submission; --sizes as in `prepare_competition`. Writes
    sample_submission.csv.
    """
    options = context.options
    folder, ids, files = find_test(options, KAGGLE, SAMPLE)
    table = _image_table(NO_LABELS, None, [], ids)
    originals = read_sizes(options.sizes, table["image_id"]) if options.sizes else None
    store = test_store(context, folder, files)
    table = _with_sizes(table, store, originals)
    _write_sample(context.run, ids)
    key = digest(table[SIZES].to_numpy().tolist())  # boxes are kept in pixels of the originals
    return Prepared(table, NO_LABELS.assign(row=0, votes=0), store, key)


def _with_sizes(table, store, originals):
    """The image table with width and height, of the files or, where they are known, of their originals, and ok."""
    for place, name in enumerate(("width", "height", "ok"), start=2):
        table.insert(place, name, store.table[name].to_numpy())
    if originals is not None:
        tell_copies(table, originals)
        table[SIZES] = originals[SIZES]
    return table


def _write_sample(run, test_ids):
    """The ids that a submission must have, as the competition gives them."""
    table = pd.DataFrame({"image_id": test_ids, "PredictionString": "14 1 0 0 1 1"})
    write_submission(run.path("sample_submission.csv"), table)


def open_prepared(context):
    """Read what `prepare` left; raises InputError when it has not been run, or with other options than now."""
    run, fusion = context.run, context.config.fusion
    record = check_prepared(context, MADE_WITH)
    for name in MADE_WITH_FUSION:
        if record[name] != getattr(fusion, name):
            option = f"--fusion.{name.replace('_', '-')} {record[name]}"
            raise InputError(f"{run.folder}: prepared with {option}; run `prepare` with the new value")
    table, boxes = read_parquet(run.path("images.parquet")), read_parquet(run.path("boxes.parquet"))
    return Prepared(table, boxes, Store.open(record["store"]), _key(table, record))


def _key(table, about):
    """What the trainings follow from: the images' originals, the raters' table, its fusion and the folds."""
    train = table[table["split"] == "train"]
    made = [about[name] for name in (*MADE_WITH_FUSION, "store_size", "originals", "labels")]
    return digest(train["image_id"].tolist(), train["fold"].tolist(), made)


def _check_files(train_ids, test_ids, files, labels_path, options):
    for ids, whose in ((train_ids, f"{labels_path}: "), (test_ids, "test: ")):
        absent = [image_id for image_id in ids if image_id not in files]
        if absent:
            raise InputError(f"{whose}{len(absent)} images have no file, the first is {absent[0]}")
    both = set(train_ids) & set(test_ids)
    if both:
        whose = f"{labels_path}: {len(both)} images are in the test set too"
        whose = whose if options.test is None else f"--test: {len(both)} of the images are training images"
        raise InputError(f"{whose}, such as {min(both)}")
    loose = sorted(set(files) - set(train_ids) - set(test_ids)) if options.test is None else []
    without = f"without a row in {labels_path.name} or the sample submission"
    if loose and options.on_unlabelled == "error":
        raise InputError(
            f"{files[loose[0]]}: one of {len(loose)} images {without}; --on-unlabelled skip leaves them out"
        )
    if loose:
        log.info(f"left out {len(loose)} images {without}")


def _image_table(labels, patients, train_ids, test_ids):
    """The image table without what only the store knows; every fold is -1."""
    ids, more = train_ids + test_ids, len(test_ids)
    table = pd.DataFrame({"image_id": ids, "row": range(len(ids))})
    table["patient_id"] = [*([""] * len(train_ids) if patients is None else patients), *[""] * more]
    table["split"] = ["train"] * len(train_ids) + ["test"] * more
    table["fold"] = -1
    marked = np.zeros((len(ids), len(CLASSES)), np.int64)
    marked[pd.Index(ids).get_indexer(labels["image_id"]), labels["class_id"]] = 1
    table["abnormal"] = marked[:, :NO_FINDING].max(axis=1)
    table[FINDINGS] = marked[:, :NO_FINDING]
    table["raters"] = table["image_id"].map(labels.groupby("image_id")["rad_id"].nunique()).fillna(0).astype(int)
    return table


def _folds(train, labels, patients, config, options):
    """Folds stratified by the classes, No finding among them, and the raters where asked; grouped by patient."""
    ids = train["image_id"].tolist()
    if options.fold_table:
        folds = read_folds(options.fold_table, ids, config.n_folds)
    else:
        columns = [train[FINDINGS].to_numpy(), 1 - train[["abnormal"]].to_numpy()]
        if config.rater_aware:
            columns.append(pd.crosstab(labels["image_id"], labels["rad_id"]).loc[ids].to_numpy().clip(max=1))
        folds = make_folds(np.hstack(columns), config.n_folds, patients, config.seed)
    tell_leaks(folds, patients, options.fold_table)
    return folds


def _agreed(marked, table, fusion, path):
    """The raters' boxes, cut at the edge of their image and fused within a class, as boxes.parquet has them."""
    index = pd.Index(table["image_id"])
    place = index.get_indexer(marked["image_id"])
    sizes = table[["width", "height"]].to_numpy(float)[place]
    limits = np.hstack([sizes, sizes])
    inside = np.minimum(marked[BOX].to_numpy(), limits)
    beyond = (inside < marked[BOX].to_numpy()).any(axis=1)
    lost = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    if beyond.any():
        number = int(np.argmax(lost if lost.any() else beyond))
        width, height = sizes[number].astype(int)
        where = f"{path}, row {marked.index[number] + 2} ({marked['image_id'].iloc[number]})"
        if lost.any():
            raise InputError(
                f"{where}: the box lies outside its image of {width} × {height} pixels; of a resized copy, tell the "
                "original's by --sizes"
            )
        log.info(f"{beyond.sum()} boxes were cut at the edge of their image, the first: {where}, {width} × {height}")
    fused = fuse_raters(marked.assign(**dict(zip(BOX, inside.T, strict=True))), fusion.raters_iou, JOIN[fusion.raters])
    fused["row"] = index.get_indexer(fused["image_id"])
    return fused[["image_id", "row", "class_id", *BOX, "votes"]]
