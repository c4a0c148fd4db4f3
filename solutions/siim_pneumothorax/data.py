"""The competition's files to an image table, run-length masks and a store."""

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd

from common.config import digest
from common.data.folds import make_folds, quartile_strata, save_folds
from common.data.loaders import SampleDataset
from common.data.store import Store, prepare_store
from common.data.tables import named_images, read_ids, read_patients, some_rows
from common.errors import InputError
from common.infer.tools import find_test, test_store
from common.paths import atomic_path, check_id, competition_folder, find_images, read_parquet
from common.post.rle import area, paint, parse, to_string, union
from common.steps import check_prepared, keep_trainings, read_folds, store_folder, tell_leaks, trainings
from common.submit.table import write_submission
from solutions.siim_pneumothorax.config import KAGGLE, SIZE, SLUG

log = logging.getLogger(__name__)

# names of the label table and sample submission in the competition's two stages
MADE_WITH = ("n_folds", "seed", "store_size")  # settings that decide what `prepare` makes
COLUMNS = ["ImageId", "EncodedPixels"]
STAGES = (("stage_2_train.csv", "stage_2_sample_submission.csv"), ("train-rle.csv", "sample_submission.csv"))


@dataclass
class Prepared:
    """What `prepare` leaves for the other verbs: the image table, the masks, the folds and the open store.

    table: image_id, row, width, height, patient_id, split (train or test), present (0/1), area (pixels), rle, fold
    (-1 for test). `masks` maps a row to its runs.
    """

    table: pd.DataFrame
    store: Store
    key: str

    def __post_init__(self):
        train = self.table[self.table["split"] == "train"]
        self.masks = {row: parse(rle) for row, rle in zip(train["row"], train["rle"], strict=True)}

    def rows(self, split="train", folds=None):
        """Store rows of one split, or of the train images in `folds`, in order."""
        chosen = self.table["split"] == split
        if folds is not None:
            chosen &= self.table["fold"].isin(list(folds))
        return self.table.loc[chosen, "row"].to_numpy()

    def mask(self, row):
        """The mask of a train row, uint8 (1024, 1024) of 0/1."""
        return paint(self.masks[int(row)], (SIZE, SIZE), order="C")

    def has_mask(self, row):
        """1.0 where the row has a pneumothorax, else 0.0, as float32 (1,)."""
        return np.array([len(self.masks[int(row)]) > 0], np.float32)

    def dataset(self, rows, size, transform=None, targets=None, kinds=None):
        """A Dataset of these rows at `size`; `targets` is `self.mask`, `self.has_mask` or None."""
        return SampleDataset(self.store.images, targets, transform, size, rows=rows, kinds=kinds)


def read_labels(path):
    """Read the run-length table into {image_id: runs}; several rows of one image are united.

    Raises InputError naming file and row: unknown header, unusable id, a run-length string that does not fit 1024 ×
    1024 pixels, an image that is both empty and not.
    """
    table = some_rows(path, COLUMNS)
    rows, empty = {}, set()
    for number, (image_id, rle) in enumerate(table.itertuples(index=False), start=2):
        where = f"{path}, row {number}"
        runs = parse(rle, (SIZE, SIZE), where=where)
        rows.setdefault(check_id(image_id, where), []).append(runs)
        if not len(runs):
            empty.add(image_id)
        if image_id in empty and len(rows[image_id]) > 1:
            raise InputError(f"{where}: {image_id} has an empty row (-1) and another one")
    return {image_id: union(several) for image_id, several in rows.items()}


def prepare_competition(context):
    """Read, check and decode the competition into the run folder and the store; returns Prepared.

    Writes images.parquet, folds.csv and sample_submission.csv (the ids that a submission must have). Everything that
    is wrong with the tables is found before an image is decoded.
    """
    options, config, run = context.options, context.config, context.run
    folder, labels_path, sample_path = _find_tables(options.data)
    labels = read_labels(labels_path)
    files = find_images(folder)
    if options.test is None:
        test_ids = read_ids(sample_path, COLUMNS)
    else:
        test_ids, more = named_images(options.test)
        files = {**files, **more}
    _check_files(labels, test_ids, files, labels_path, options)

    id_map = options.id_map or next(iter(folder.glob("nih_id.csv")), None)
    train_ids = sorted(labels)
    patients = read_patients(id_map, train_ids) if id_map else None
    if patients is None:
        log.info("folds: no map from image to patient (--id-map): a patient may lie in two folds, scores may flatter")
    ids = train_ids + test_ids
    table = _labelled(labels, patients, train_ids, test_ids)
    train = table["split"] == "train"
    table.loc[train, "fold"] = _folds(table[train], patients, config, options)
    originals = digest([[i, files[i].name, files[i].stat().st_size] for i in train_ids])
    key = _key(table, config, originals)
    keep_trainings(run, key)

    store = prepare_store(
        {image_id: files[image_id] for image_id in ids},
        store_folder(context, folder, ids, config.store_size),
        config.store_size,
        workers=None if options.workers is None else max(options.workers, 1),
        on_bad_image=options.on_bad_image,
        placeholder_ids=frozenset(test_ids),
    )
    table = _with_sizes(table, store)
    save_folds(
        run.path("folds.csv"),
        train_ids,
        table.loc[train, "fold"].to_numpy(),
        patients,
        f"n_folds {config.n_folds}, seed {config.seed}",
    )
    with atomic_path(run.path("images.parquet")) as path:
        table.to_parquet(path, index=False)
    _write_sample(run, test_ids)
    inputs = [p for p in (labels_path, sample_path, id_map) if p is not None]
    run.describe(config.seed, inputs)
    if not trainings(run):
        run.write_config(context.solution, context.preset, config)
    about = {name: getattr(config, name) for name in MADE_WITH}
    about |= {"data": str(folder.resolve()), "test": options.test and str(options.test.resolve())}
    about |= {"originals": originals, "synthetic": (folder / "sample.json").is_file()}
    run.record("prepare", key, store=str(store.folder.resolve()), images=len(table), **about)
    positive = int(table["present"].sum())
    log.info(
        f"prepared {train.sum()} train images ({positive} with pneumothorax), {(~train).sum()} test images "
        f"at {config.store_size} px in {store.folder}"
    )
    return open_prepared(context)


def prepare_test(context):
    """Decode the test images alone, without labels or folds; returns their Prepared.

    They are those of --test or of the sample submission. Writes sample_submission.csv.
    """
    folder, ids, files = find_test(context.options, KAGGLE, COLUMNS)
    store = test_store(context, folder, files)
    _write_sample(context.run, ids)
    return Prepared(_with_sizes(_labelled({}, None, [], ids), store), store, "")


def _write_sample(run, test_ids):
    """The ids that a submission must have, as the competition gives them."""
    write_submission(run.path("sample_submission.csv"), pd.DataFrame({"ImageId": test_ids, "EncodedPixels": "-1"}))


def open_prepared(context):
    """Read what `prepare` left; raises InputError when it has not been run, or with other options than now."""
    record = check_prepared(context, MADE_WITH)
    table = read_parquet(context.run.path("images.parquet"))
    return Prepared(table, Store.open(record["store"]), _key(table, context.config, record["originals"]))


def _key(table, config, originals):
    """What the trainings follow from: the images' originals, masks and folds."""
    train = table[table["split"] == "train"]
    return digest(
        train["image_id"].tolist(), train["rle"].tolist(), train["fold"].tolist(), config.store_size, originals
    )


def _find_tables(data):
    tried = None
    for labels, sample in STAGES:
        try:
            folder = competition_folder(data, SLUG, labels)
        except InputError as error:
            tried = error
            continue
        sample_path = folder / sample
        if not sample_path.is_file() and (folder / "sample_submission.csv").is_file():
            sample_path = folder / "sample_submission.csv"
        log.info(f"labels from {folder / labels}, test images from {sample_path.name}")
        return folder, folder / labels, sample_path
    raise tried


def _check_files(labels, test_ids, files, labels_path, options):
    missing = [image_id for image_id in labels if image_id not in files]
    if missing:
        raise InputError(f"{labels_path}: {len(missing)} images have no file, the first is {missing[0]}")
    absent = [image_id for image_id in test_ids if image_id not in files]
    if absent:
        raise InputError(f"{len(absent)} test images have no file, the first is {absent[0]}")
    both = set(labels) & set(test_ids)
    if both and options.test is None:
        raise InputError(f"{labels_path}: {len(both)} images are in the test set too, such as {min(both)}")
    if both:
        raise InputError(f"--test: {len(both)} of the images are training images, such as {min(both)}")
    loose = sorted(set(files) - set(labels) - set(test_ids)) if options.test is None else []
    if loose and options.on_unlabelled == "error":
        raise InputError(
            f"{files[loose[0]]}: one of {len(loose)} images without a row in {labels_path.name} or the sample "
            "submission; --on-unlabelled skip leaves them out"
        )
    if loose:
        log.info(f"left out {len(loose)} images without a row in {labels_path.name} or the sample submission")


def _labelled(labels, patients, train_ids, test_ids):
    """The image table without what only the store knows; every fold is -1."""
    masks = [labels[image_id] for image_id in train_ids]
    unknown = [""] * len(test_ids)
    table = pd.DataFrame({"image_id": train_ids + test_ids, "row": range(len(train_ids) + len(test_ids))})
    table["patient_id"] = [*(patients if patients is not None else [""] * len(train_ids)), *unknown]
    table["split"] = ["train"] * len(train_ids) + ["test"] * len(test_ids)
    table["area"] = [*map(area, masks), *[0] * len(test_ids)]
    table["present"] = (table["area"] > 0).astype(int)
    table["rle"] = [*map(to_string, masks), *unknown]
    table["fold"] = -1
    return table


def _with_sizes(table, store):
    odd = store.table[store.table["width"] != store.table["height"]]
    if len(odd):
        first = odd.iloc[0]
        raise InputError(f"{first.image_id}: {first.width} × {first.height} pixels; masks of this challenge are square")
    sizes = store.table[["width", "height", "ok"]].reset_index(drop=True)
    return pd.concat([table[["image_id", "row"]], sizes, table.drop(columns=["image_id", "row"])], axis=1)


def _folds(train, patients, config, options):
    """Folds stratified by presence and mask-size quartile, grouped by patient where that is known."""
    ids = train["image_id"].tolist()
    if options.fold_table:
        folds = read_folds(options.fold_table, ids, config.n_folds)
    else:
        strata = quartile_strata(train["present"].to_numpy() > 0, train["area"].to_numpy())
        folds = make_folds(strata, config.n_folds, patients, config.seed)
    tell_leaks(folds, patients, options.fold_table)
    return folds
