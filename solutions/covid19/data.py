"""Collections of radiographs to one image table, its selection, folds, a store and the lungs."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from common.config import digest
from common.data.folds import make_folds, save_folds
from common.data.store import Store, prepare_store
from common.errors import InputError
from common.paths import read_json, read_parquet
from common.steps import (
    check_prepared,
    keep_config,
    keep_trainings,
    read_folds,
    store_folder,
    tell_leaks,
    trainings,
    write_csv,
    write_table,
)
from common.submit.table import read_table, write_submission
from solutions.covid19.collections import read_collections, read_test
from solutions.covid19.duplicates import drop_duplicates, find_duplicates
from solutions.covid19.lungs import find_lungs, lungs_made, open_lungs
from solutions.covid19.selection import select

log = logging.getLogger(__name__)
MADE_WITH = ("same_source", "negatives", "n_folds", "seed", "store_size")  # settings that decide what `prepare` makes
TABLE = [
    "image_id",
    "file_name",
    "row",
    "width",
    "height",
    "ok",
    "collection",
    "home",
    "patient_id",
    "age",
    "sex",
    "view",
    "finding",
    "label",
    "split",
    "role",
    "fold",
    "area",
    "usable",
]
SELECTION = [
    "collection",
    "file_name",
    "image_id",
    "patient_id",
    "age",
    "view_said",
    "finding",
    "label",
    "kept",
    "reason",
]
SAMPLE = ["filename", "probability"]


@dataclass
class Prepared:
    """What `prepare` leaves: the image table, the open store, the masks of the lungs.

    table: image_id, file_name, row, width, height (pixels of the file), ok (False for a placeholder), collection, home
    (a collection that has COVID-19 images), patient_id, age (years or NaN), sex, view, finding, label (1 COVID-19, 0
    none, -1 unknown), split (train or test), role (main: trained on and scored; same_source: predicted out of fold
    alone; "": not used, or test), fold (-1 for those), area (share of the image that is lung), usable (the gate is
    passed). masks: path of uint8 (N, S, S) of 0 and 1. key: what trainings follow from; pixels_key: the very pixels.
    """

    table: pd.DataFrame
    store: Store
    masks: Path
    key: str
    pixels_key: str

    def __post_init__(self):
        self._index = pd.Index(self.table["image_id"])

    def rows(self, split="train", folds=None, role=None):
        """Store rows of the test images, or of the used train images in `folds` (all) that have this role (any)."""
        chosen = self.table["split"] == split
        if split == "train":
            chosen &= self.table["fold"] >= 0
        if folds is not None:
            chosen &= self.table["fold"].isin(list(folds))
        if role is not None:
            chosen &= self.table["role"] == role
        return self.table.loc[chosen, "row"].to_numpy()

    def rows_of(self, image_ids):
        """Store rows of images by their ids, in their order; InputError for an image that is not there."""
        rows = self._index.get_indexer(image_ids)
        for place in np.flatnonzero(rows < 0)[:1]:
            raise InputError(f"{list(image_ids)[place]}: not an image of this run")
        return rows

    def ids(self, rows):
        """Image ids of rows, str (n,)."""
        return self.table["image_id"].to_numpy(str)[rows]

    def labels(self, rows):
        """Labels of rows, float32 (n,) of 0 and 1, NaN where unknown."""
        labels = self.table["label"].to_numpy(np.float32)[rows]
        return np.where(labels < 0, np.float32(np.nan), labels)

    def patients(self, rows):
        """Patients of rows, str (n,)."""
        return self.table["patient_id"].to_numpy(str)[rows]


def prepare_competition(context):
    """Read the collections, select, decode, find lungs, part into folds; returns Prepared.

    Writes images.parquet, selection.csv (every row of every table, and why it is not used), folds.csv and
    sample_submission.csv. Everything that is wrong with the tables is found before an image is decoded.
    """
    options, config, run = context.options, context.config, context.run
    if options.id_map:
        raise InputError("--id-map: the collections' tables name the patients; leave it out")
    if options.data is None:
        raise InputError("name the folder of the images with --data")
    folders = [options.data, *options.normals]
    everything = select(read_collections(folders), config.selection, config.seed)
    test = _with_files(read_test([options.data], options.test, everything["image_id"]))
    if options.test is None:  # the list lies beside the tables, and numbers patients as they do
        everything = _without_patients(everything, test)
    table = _apart(everything, test)
    about = {name: getattr(config, name) for name in MADE_WITH}
    about |= {"selection": digest(config.selection), "lungs": lungs_made(config)}
    store = prepare_store(
        dict(zip(table["image_id"], table["path"], strict=True)),
        store_folder(context, folders[0], table["image_id"], config.store_size),
        config.store_size,
        workers=None if options.workers is None else max(options.workers, 1),
        on_bad_image=options.on_bad_image,
        placeholder_ids=frozenset(test["image_id"]),
    )
    for name in ("width", "height", "ok"):
        table[name] = store.table[name].to_numpy()
    everything, table = _without_duplicates(everything, table, store, config)
    lungs = find_lungs(context, store)
    everything, table = _gated(everything, table, open_lungs(lungs).table)
    everything, table = _roles(everything, table, config)
    table["fold"] = _folds(table, config, options)
    table = table[TABLE].astype({"label": "int8"})

    key = _key(table, about)
    keep_trainings(run, key)
    run.forget("prepare")  # what follows must not be taken for whole where it is cut off
    write_table(run.path("images.parquet"), table)
    write_csv(run.path("selection.csv"), everything[SELECTION])
    used = table[table["fold"] >= 0]
    save_folds(
        run.path("folds.csv"),
        used["image_id"].tolist(),
        used["fold"].to_numpy(),
        used["patient_id"].to_numpy(),
        f"n_folds {config.n_folds}, seed {config.seed}",
    )
    names = table.loc[table["split"] == "test", "file_name"]
    write_submission(run.path("sample_submission.csv"), pd.DataFrame({SAMPLE[0]: names, SAMPLE[1]: 0.5}))
    tables = sorted({*everything["table"]})
    run.describe(config.seed, [path for path in [*tables, options.test, options.fold_table] if path and path.is_file()])
    if not trainings(run):
        keep_config(context)
    about |= {"data": str(folders[0].resolve()), "test": options.test and str(options.test.resolve())}
    about |= {"normals": [str(path.resolve()) for path in options.normals], "lungs_folder": str(lungs.resolve())}
    about["synthetic"] = (folders[0] / "sample.json").is_file()
    run.record("prepare", key, store=str(store.folder.resolve()), images=len(table), **about)
    _tell(everything, table, store, config)
    return open_prepared(context)


def open_prepared(context):
    """Read what `prepare` left; raises InputError when it has not been run, or with other options than now."""
    run, config = context.run, context.config
    record = check_prepared(context, MADE_WITH)
    if digest(config.selection) != record["selection"]:
        raise InputError(f"{run.folder}: prepared with another selection; run `prepare` with the new settings")
    if lungs_made(config) != record["lungs"]:
        raise InputError(f"{run.folder}: prepared with other lungs; run `prepare` with the new settings")
    normals = [str(path.resolve()) for path in context.options.normals]
    if normals and normals != record["normals"]:
        raise InputError(f"{run.folder}: prepared with other --normals; run `prepare` with the new ones (or `run`)")
    table, store = read_parquet(run.path("images.parquet")), Store.open(record["store"])
    lungs = open_lungs(record["lungs_folder"])
    pixels = digest(read_json(store.folder / "store.json")["key"], record["lungs"])
    return Prepared(table, store, lungs.masks, _key(table, record), pixels)


def _without_patients(everything, test):
    """The rows of the collections without those of patients who are to be predicted."""
    listed = set(test["patient_id"]) - {""}
    own = [patient.removeprefix(f"{name} ") for patient, name in everything[["patient_id", "collection"]].to_numpy()]
    seen = everything["kept"] & everything["home"] & pd.Series(own, everything.index).isin(listed)
    if seen.any():
        log.info(f"{seen.sum()} images are of patients who are to be predicted too: left out of training")
    reason = "a patient who is to be predicted"
    return everything.assign(kept=everything["kept"] & ~seen, reason=everything["reason"].mask(seen, reason))


def _with_files(test):
    absent = test["path"].isna()
    if absent.any():
        raise InputError(
            f"{absent.sum()} of {len(test)} images to predict have no file, the first is "
            f"{test.loc[absent, 'file_name'].iloc[0]}"
        )
    return test


def _apart(everything, test):
    """What is kept and the test images in one table; InputError where nothing is left to train on."""
    train = everything[everything["kept"]]
    if not len(train):
        raise InputError(f"the selection leaves no image to train on{_reasons(everything)}")
    test = test.assign(label=-1, home=False, age=np.nan, sex="", view="", finding="", kept=True, reason="")
    table = pd.concat([train.assign(split="train"), test.assign(split="test")], ignore_index=True)
    table["row"] = np.arange(len(table))
    return table


def _left_out(everything, table, ids, reasons):
    """Both tables with the reason why these images are not used."""
    why = dict(zip(ids, reasons, strict=True))
    found = everything["image_id"].map(why)
    here = found.notna() & everything["kept"]
    everything = everything.assign(kept=everything["kept"] & ~here, reason=everything["reason"].mask(here, found))
    return everything, table.assign(kept=table["kept"] & ~table["image_id"].isin(why))


def _without_duplicates(everything, table, store, config):
    """Both tables without the same image twice, and without patients of whom a test image is.

    Patients whom a shared image shows to be one are united.
    """
    pairs = find_duplicates(store.images, config.selection.duplicates)
    train = table["split"] == "train"
    inside = pairs[pairs["a"].map(train) & pairs["b"].map(train)]
    cleaned = drop_duplicates(table, inside)
    gone = table["kept"] & ~cleaned["kept"]
    everything, table = _left_out(everything, table, cleaned.loc[gone, "image_id"], cleaned.loc[gone, "reason"])
    table["patient_id"] = cleaned["patient_id"]
    across = pairs[pairs["a"].map(train) != pairs["b"].map(train)]
    for a, b in across[["a", "b"]].itertuples(index=False):
        seen, predicted = (a, b) if train[a] else (b, a)
        name, patient = table["file_name"][predicted], table["patient_id"][seen]
        log.info(f"test image {name} is the same as {table['image_id'][seen]}: its patient is left out of training")
        ids = table.loc[table["kept"] & train & (table["patient_id"] == patient), "image_id"]
        everything, table = _left_out(everything, table, ids, [f"the patient of the test image {name}"] * len(ids))
    return everything, table


def _gated(everything, table, lungs):
    """Both tables without the images whose lungs are not found, or are too small."""
    table = table.assign(area=lungs["area"].to_numpy(), usable=lungs["usable"].to_numpy())
    gone = table["kept"] & ~table["usable"] & (table["split"] == "train")
    reasons = "lungs: " + lungs["reason"].set_axis(table.index)[gone]
    return _left_out(everything, table, table.loc[gone, "image_id"], reasons)


def _roles(everything, table, config):
    """Both tables after the negatives are drawn, with the column `role`; InputError where a label is missing."""
    train = table["kept"] & (table["split"] == "train")
    with_covid = set(table.loc[train & (table["label"] == 1), "collection"])
    same = train & (table["label"] == 0) & table["collection"].isin(with_covid)
    table = table.assign(home=table["collection"].isin(with_covid), role="")
    table.loc[train, "role"] = "main"
    if config.same_source == "score":
        table.loc[same, "role"] = "same_source"
    negatives = table[(table["role"] == "main") & (table["label"] == 0)]
    if config.negatives and len(negatives) > config.negatives:
        drawn = _even_draw(negatives["collection"].to_numpy(), config.negatives, config.seed)
        gone = negatives.index[~drawn]
        table.loc[gone, "role"] = ""
        reason = f"not drawn: negatives {config.negatives}"
        everything, table = _left_out(everything, table, table.loc[gone, "image_id"], [reason] * len(gone))
    counts = table.loc[table["role"] == "main", "label"].value_counts()
    if not counts.get(1):
        raise InputError(f"no image with COVID-19 to train on{_reasons(everything[everything['label'] == 1])}")
    if not counts.get(0):
        hint = " or take those of the same collections (--same-source train)" if same.any() else ""
        raise InputError(
            "no image without COVID-19 to train on: name a folder of normals by --normals"
            f"{hint}{_reasons(everything[everything['label'] == 0])}"
        )
    return everything, table


def _even_draw(collections, count, seed):
    """Which of N images are drawn, bool (N,): as many from each collection as it has, up to equal shares of `count`."""
    rng, drawn = np.random.default_rng([seed, 3]), np.zeros(len(collections), bool)
    names, sizes = np.unique(collections, return_counts=True)
    for place, k in enumerate(np.argsort(sizes, kind="stable")):  # the small ones first: what they lack others give
        share = (count - drawn.sum()) // (len(names) - place)
        drawn[rng.permutation(np.flatnonzero(collections == names[k]))[:share]] = True
    return drawn


def _folds(table, config, options):
    """Folds (N,) of the used images by patient, with equal shares of labels and collections; -1 for the others."""
    used = table["role"] != ""
    folds, part = np.full(len(table), -1), table[used]
    patients = part["patient_id"].to_numpy()
    if options.fold_table:
        folds[used] = read_folds(options.fold_table, part["image_id"].tolist(), config.n_folds)
    else:
        kinds = pd.get_dummies(part["collection"] + part["label"].astype(str) + part["role"]).to_numpy(np.int8)
        folds[used] = make_folds(kinds, config.n_folds, patients, config.seed)
    tell_leaks(folds[used], patients, options.fold_table)
    return folds


def _key(table, about):
    """What the trainings follow from: the images, their labels, folds and roles, the store's side and the lungs."""
    train = table[table["fold"] >= 0]
    return digest(
        train["image_id"].tolist(),
        train["label"].tolist(),
        train["fold"].tolist(),
        train["role"].tolist(),
        train["area"].round(6).tolist(),
        about["store_size"],
        about["lungs"],
    )


def read_selection(run):
    """What selection.csv says: SELECTION's columns as text, `kept` a bool and `label` an int."""
    path = run.path("selection.csv")
    table = read_table(path, SELECTION)
    for row in np.flatnonzero(~table["label"].isin(["1", "0", "-1"]))[:1]:
        raise InputError(f"{path}, row {row + 2}: the label {table['label'][row]!r} is none; run `prepare` again")
    return table.assign(kept=table["kept"] == "True", label=table["label"].astype(int))


def _reasons(everything):
    """How many of these images are left out for which reason, the commonest six, in words; "" where all are used."""
    kinds = everything.loc[~everything["kept"], "reason"].str.split(r"[:(\d]| as |(?<=test image) ").str[0].str.strip()
    counts = kinds.value_counts()
    shown = ", ".join(f"{n:,} {reason}" for reason, n in counts.head(6).items())
    return f"; left out: {shown}" + " …" * (len(counts) > 6) if len(counts) else ""


def _tell(everything, table, store, config):
    used = table[table["role"] == "main"]
    counts = used["label"].value_counts()
    log.info(f"selection.csv: {len(everything):,} rows, {everything['kept'].sum():,} used{_reasons(everything)}")
    same = (table["role"] == "same_source").sum()
    log.info(
        f"prepared {counts.get(1, 0):,} images with COVID-19 and {counts.get(0, 0):,} without"
        + (f", {same:,} more of the same collections that are only scored" if same else "")
        + f", of {used['patient_id'].nunique():,} patients; {(table['split'] == 'test').sum():,} test images; "
        f"{config.store_size} px in {store.folder}"
    )
    rejected = rejected_shares(everything)
    log.info("the gate rejected " + ", ".join(f"{share:.1%} of {n:,} {name}" for name, (share, n) in rejected.items()))


def rejected_shares(everything):
    """Share of images that the area gate rejected, of those that came so far, and their number: label → (share, n)."""
    lungs = everything["reason"].str.startswith("lungs: ")
    came = everything["kept"] | lungs | everything["reason"].str.startswith("not drawn: negatives")
    names = {1: "with COVID-19", 0: "without"}
    parts = {name: lungs[came & (everything["label"] == label)] for label, name in names.items()}
    return {name: (float(part.mean()), len(part)) for name, part in parts.items() if len(part)}
