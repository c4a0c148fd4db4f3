"""The images of a run: one table, one store, the folds, and the challenge's own columns.

A solution's `data.py` reads its tables into a Listing and reports their errors. Everything after that, from the folds
to the store and the files of the run, is done here for all solutions.
"""

import json
import os
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from common.config import digest
from common.data.dicom import read_image_and_header
from common.data.folds import load_folds, make_folds, save_folds, shared_groups
from common.data.grey import hash_pixels
from common.data.loaders import UNKNOWN, SampleDataset
from common.data.store import Store, prepare_store, to_square
from common.errors import InputError, check, log
from common.listing import FURTHER, leave_out_unreadable
from common.paths import read_array, read_parquet, write_csv, write_table
from common.post.regions import resize_mask_probs
from common.step import changed_settings, file_stamp
from common.submit.table import write_submission

RECORDED = dict.fromkeys(("store", "data", "tables_key", "images_key"), str) | {"normals": list, "tables": list}
RECORDED |= dict.fromkeys(("made_with", "arrays", "about", "made"), dict)
HALVED = "-halved"  # end of the name of a store of images decoded with --halve-jpeg2000
SAMPLE = "sample_submission.csv"  # lists the ids of a submission


@dataclass(eq=False)
class Images:
    """The prepared images of a run.

    table: image_id, row (of the store), width, height (of the original, pixels), ok (False for a placeholder),
    patient_id, split, fold (-1 for test and unused images) and the challenge's own columns. key: digest of everything
    that trainings depend on; pixels_key: digest of the pixels to predict. about: JSON that `prepare` recorded. tables,
    arrays: as in Listing; arrays are paths of .npy files. taught: for each row with a teacher's labels, the file of the
    teacher's maps or None, the position in it, and the share of the teacher's labels (see common.teaching).
    """

    table: pd.DataFrame
    store: Store
    key: str
    pixels_key: str
    about: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)
    arrays: dict = field(default_factory=dict)
    taught: dict = field(default_factory=dict)

    def __post_init__(self):
        self._by_row = self.table.set_index("row", drop=False)
        self._index = pd.Index(self.table["image_id"])

    def rows(self, split="train", folds=None, **equal):
        """Return the store rows of a split, optionally only those with certain folds and column values."""
        chosen = self.table["split"] == split
        if split == "train":
            chosen &= self.table["fold"] >= 0
        if folds is not None:
            chosen &= self.table["fold"].isin(list(folds))
        for name, value in equal.items():
            chosen &= self.table[name] == value
        return self.table.loc[chosen, "row"].to_numpy()

    def at(self, rows):
        """Return the table's rows for these store rows, in their order."""
        return self._by_row.loc[np.asarray(rows)]

    def rows_of(self, image_ids):
        """Return the store rows of images by id, in order. Raises InputError for an unknown image."""
        places = self._index.get_indexer(image_ids)
        for place in np.flatnonzero(places < 0)[:1]:
            raise InputError(f"{list(image_ids)[place]}: not an image of this run")
        return self.table["row"].to_numpy()[places]

    def named(self, rows):
        """Return a new table of image_id and row for these store rows, to add predictions to."""
        return self.at(rows)[["image_id", "row"]].reset_index(drop=True)

    def ids(self, rows):
        """Return the image ids of store rows, (n,) of str."""
        return self.at(rows)["image_id"].to_numpy()

    def patients(self, rows):
        """Return the patients of store rows, (n,) of str, or None if no patient is known."""
        return _patients(self.at(rows))

    def groups(self, rows):
        """Return the units that a bootstrap resamples: the patients of store rows, or the images if none is known."""
        patients = self.patients(rows)
        return np.arange(len(rows)) if patients is None else patients

    def are_copies(self, rows, held_out):
        """Return whether each of some store rows has the pixels or the patient of a held-out one, bool (n,).

        Pixels are not compared if the store holds only some of the images, as in `plan`.
        """
        patients = self.at(rows)["patient_id"].to_numpy()
        known = np.isin(patients, self.at(held_out)["patient_id"]) & (patients != "")
        if len(self.store.table) < len(self.table):
            return known
        content = self.store.table["content"].astype(str).to_numpy()
        return np.isin(content[rows], content[held_out]) | known

    def drawn(self, row, mask):
        """Return a store row's mask (…, h, w) after a teacher's changes: uint8 of 0 and 1, or float32 if mixed."""
        path, position, share = self.taught.get(int(row), (None, 0, 0))
        if path is None:
            return mask
        probs = _open_maps(path, os.getpid())[position]
        probs = [resize_mask_probs(each, mask.shape[-2:]) for each in probs.reshape(-1, *probs.shape[-2:])]
        probs = np.reshape(probs, mask.shape)
        if share == 1:
            return (probs >= 128).astype(np.uint8)
        mixed = (1 - share) * mask + np.float32(share / 255) * probs
        return np.where(mask == UNKNOWN, mask, mixed).astype(np.float32)

    def dataset(self, rows, size, transform=None, targets=None, kinds=None, crop=0):
        """Return a SampleDataset of these store rows at `size` pixels; `targets` maps a row to its target."""
        return SampleDataset(self.store.images, targets, transform, size, rows=rows, kinds=kinds, crop=crop)


@cache
def _open_maps(path, process):
    return read_array(path)


# ---- prepare -----------------------------------------------------------------------------------------------------


def prepare_images(job, recipe, announce=None):
    """Read, check and decode a challenge into the run and its store, and return its Images.

    All checks of the tables and announce(job, Listing) precede the decoding of the first image.
    Writes images.parquet, folds.csv, sample_submission.csv, left_out.csv if images were left out, and the Listing's own
    tables.
    """
    options, config, run = job.options, job.config, job.run
    listing = recipe.read(job)
    has_strata, tables_key = listing.strata is not None, None
    if has_strata:
        listing = with_folds(job, listing)
        tables_key = _tables_key(job, listing)
        _check_trainings(job, "tables_key", tables_key)
    _check_decoding(job, listing)
    if announce is not None and job.run.step("prepare") is None:
        announce(job, listing)
    store = decode(job, listing)
    listing = _with_sizes(listing, store)
    listing = recipe.refine(job, leave_out_unreadable(listing) if has_strata else listing, store)
    if not has_strata:
        listing = with_folds(job, listing)
        tables_key = _tables_key(job, listing)
    key = _images_key(tables_key, listing.table, store)
    _check_trainings(job, "images_key", key)

    inputs = [*listing.inputs, options.id_map, options.test, options.fold_table]
    run.describe(config.seed, [path for path in inputs if path is not None and path.is_file()])
    run.forget("prepare")  # the files below are incomplete until the step is recorded
    table, train = listing.table, listing.table[listing.table["fold"] >= 0]
    write_table(run.path("images.parquet"), table)
    for name, extra in listing.tables.items():
        (write_csv if name.endswith(".csv") else write_table)(run.path(name), extra)
    patients, note = _patients(train), f"n_folds {config.n_folds}, seed {config.seed}"
    save_folds(run.path("folds.csv"), train["image_id"].tolist(), train["fold"].to_numpy(), patients, note)
    write_submission(run.path(SAMPLE), listing.sample)
    _report_left_out(job, listing.left_out)
    if not trainings(run):
        job.keep_config()
    run.record(
        "prepare",
        key,
        store=str(store.folder.resolve()),
        images=len(table),
        made_with=recipe.made_with(config),
        data=str(Path(listing.folder).resolve()),
        test=options.test and str(options.test.resolve()),
        normals=[str(path.resolve()) for path in options.normals],
        synthetic=(Path(listing.folder) / "sample.json").is_file(),
        tables=list(listing.tables),
        arrays={name: str(Path(path).resolve()) for name, path in listing.arrays.items()},
        about=listing.about,
        tables_key=tables_key,
        images_key=key,
        made={name: file_stamp(run.path(name)) for name in ("images.parquet", *listing.tables)},
    )
    job.__dict__.pop("images", None)
    return job.images


def prepare_test(job):
    """Decode only the test images, without labels or folds; return their Images, which become the job's.

    Their `about` is added to that of the run's Images, which is part of an export (`job.facts`).
    """
    recipe = job.recipe
    listing = recipe.read_test(job)
    store = decode(job, listing)
    listing = _with_sizes(replace(listing, table=listing.table.assign(split="test", fold=-1)), store)
    listing = (recipe.refine_test or recipe.refine)(job, listing, store)
    _report_left_out(job, listing.left_out)
    write_submission(job.run.path(SAMPLE), listing.sample)
    pixels = _pixels_key(store, listing.table, listing.about.get("pixels"))
    job.images = Images(listing.table, store, "", pixels, job.facts | listing.about, listing.tables, listing.arrays)
    return job.images


def open_images(job):
    """Return the Images of `prepare`. Raises InputError if it has not been run, or with other settings."""
    run, options = job.run, job.options
    record = run.step("prepare")
    if record is None or not run.path("images.parquet").is_file():
        raise InputError(f"{run.folder}: not prepared; run the verb `prepare` first (or `run` for all)")
    if any(not isinstance(record.get(name), kind) for name, kind in RECORDED.items()):
        raise InputError(f"{run.folder}: prepared by another version; run `prepare` again")
    for name, stamp in record["made"].items():
        check(file_stamp(run.path(name)) == stamp, f"{run.path(name)}: missing or damaged; run `prepare` again")
    present = json.loads(json.dumps(job.recipe.made_with(job.config)))
    for name in {**present, **record["made_with"]}:  # an optional setting may be in only one of them
        before, now = record["made_with"].get(name), present.get(name)
        if before != now:
            how = f"prepared with --{name.replace('_', '-')} {before}, not {now}"
            raise InputError(f"{run.folder}: {how}; run `prepare` with the new value")
    for name in ("data", "test"):
        now = getattr(options, name)
        if now is not None and not Path(record[name] or "").is_relative_to(now.resolve()):
            raise InputError(f"{run.folder}: prepared with another --{name}, {record[name]}; run `prepare` with {now}")
    if options.normals and [str(path.resolve()) for path in options.normals] != record["normals"]:
        how = f"prepared with other --normals, {record['normals']}"
        raise InputError(f"{run.folder}: {how}; run `prepare` with the new ones")
    if not Path(record["store"]).is_dir():
        moved = f"its decoded images, {record['store']}, no longer exist; the data were in {record['data']}"
        raise InputError(f"{run.folder}: {moved}: run `prepare --data FOLDER` to decode them again")
    store = Store.open(record["store"])
    table, about = read_parquet(run.path("images.parquet")), record["about"]
    if _images_key(record["tables_key"], table, store) != record["images_key"]:
        raise InputError(f"{run.folder}: training images have changed since `prepare`; run it again")
    tables = {name: read_parquet(run.path(name)) for name in record["tables"] if name.endswith(".parquet")}
    arrays = {name: Path(path) for name, path in record["arrays"].items()}
    pixels = _pixels_key(store, table, about.get("pixels"))
    return Images(table, store, record["images_key"], pixels, about, tables, arrays)


def decode(job, listing):
    """Return the Store of a listing's images, shared by all runs on the same data."""
    options, size, ids = job.options, job.config.store_size, listing.table["image_id"].tolist()
    root = options.store or job.run.folder.resolve().parent / "stores"
    folder = root / f"{job.solution}-{size}px-{digest(str(Path(listing.folder).resolve()), ids)[:8]}"
    folder = folder.with_name(folder.name + HALVED * options.halve_jpeg2000)
    placeholders = listing.placeholders
    if placeholders is None:
        replaced = (listing.table["split"] == "test") | (options.on_bad_image == "skip")
        placeholders = frozenset(listing.table.loc[replaced, "image_id"])
    return prepare_store(
        {image_id: listing.files[image_id] for image_id in ids},
        folder,
        size,
        workers=None if options.workers is None else max(options.workers, 1),
        on_bad_image="error" if listing.placeholders is None and options.on_bad_image == "error" else "placeholder",
        placeholder_ids=placeholders,
        halve=options.halve_jpeg2000,
    )


def trainings(run):
    """Return the folders of all trainings in the run, including unfinished ones."""
    names = ("last.ckpt", "final.safetensors")
    return sorted({path.parent for name in names for path in run.folder.glob(f"*/*/{name}")})


def refuse_trainings(job, how):
    """Raise InputError if the run has a training, even an unfinished one, which was then trained `how`."""
    for begun in trainings(job.run)[:1]:
        remedy = "give the run another --out, or delete the trainings in it"
        raise InputError(f"{begun}: was trained {how}{changed_settings(job)}; {remedy}")


def _check_trainings(job, name, key, what="other images, labels, folds or settings of `prepare`"):
    record = job.run.step("prepare")
    if record and record.get(name) != key:
        refuse_trainings(job, f"on {what}")


def _check_decoding(job, listing):
    """Raise InputError if trainings have begun and all images would be decoded in vain, as the first one tells."""
    record, halve = job.run.step("prepare"), job.options.halve_jpeg2000
    if record is None or not {"made_with", "store"} <= record.keys():
        return
    _check_trainings(job, "made_with", json.loads(json.dumps(job.recipe.made_with(job.config))))
    halved = record["store"].endswith(HALVED)
    now = record["store"] if halved == halve else ""
    _check_trainings(job, "store", now, f"images decoded with{'out' * halve} --halve-jpeg2000")
    try:
        used = read_parquet(job.run.path("images.parquet")).query("fold >= 0")
        first, row = used[["image_id", "row"]].iloc[0]
        known = Store.open(record["store"]).table["content"][row]
        image = read_image_and_header(listing.files[first], job.config.store_size * halve)[0]
    except (InputError, KeyError):  # `decode` and the other checks name what is wrong
        return
    now = record["store"] if hash_pixels(to_square(image, job.config.store_size)) == known else ""
    _check_trainings(job, "store", now, f"other pixels of {first}")


def with_folds(job, listing):
    """Return the listing with a column `fold`: its own, from --fold-table, or balanced by strata."""
    options, config, table = job.options, job.config, listing.table
    if "fold" in table:  # the labels define the folds
        return listing
    used = (table["split"] == "train").to_numpy()
    if "used" in table:
        used = used & table["used"].to_numpy()
    ids, patients = table.loc[used, "image_id"].tolist(), _patients(table[used])
    if options.fold_table is not None:
        folds = load_folds(options.fold_table, ids)
        if set(folds) != set(range(config.n_folds)):
            found = ", ".join(map(str, sorted(set(folds))))
            raise InputError(f"{options.fold_table}: has the folds {found}, not all of the n_folds {config.n_folds}")
        leaking = shared_groups(folds, patients) if patients is not None else 0
        if leaking:
            which = f"{leaking} images have a patient in another fold ({options.fold_table})"
            log.info(f"folds: {which}; scores are optimistic")
    else:
        folds = make_folds(listing.strata, config.n_folds, patients, config.seed)
    if patients is None:
        log.info("folds: no patients known (--id-map); a patient may be in two folds, which would inflate the scores")
    table = table.drop(columns="used", errors="ignore").assign(fold=-1)
    table.loc[used, "fold"] = folds
    return replace(listing, table=table)


def _with_sizes(listing, store):
    """Return the listing with the columns row, width, height and ok from the store."""
    first = ["image_id", "row", "width", "height", "ok"]
    table = listing.table.assign(**{name: store.table[name].to_numpy() for name in first[1:]})
    return replace(listing, table=table[[*first, *table.columns.drop(first)]])


def _tables_key(job, listing):
    """Return the digest of the trainings' inputs known before decoding: ids, labels, folds and settings."""
    train = listing.table[listing.table["fold"] >= 0]
    ids, folds = train["image_id"].tolist(), train["fold"].tolist()
    return digest(ids, folds, listing.labels, job.recipe.made_with(job.config))


def _images_key(tables_key, table, store):
    """Return the digest of everything that trainings depend on, including their images' pixels."""
    return digest(tables_key, _contents(store, table[(table["fold"] >= 0) | (table["split"] == FURTHER)]))


def _pixels_key(store, table, more):
    """Return the digest of the pixels to predict; a bad image may have been replaced since training."""
    tests = table[table["split"] == "test"]
    return digest(store.images.shape[1:], tests["image_id"].tolist(), _contents(store, tests), more)


def _contents(store, table):
    return store.table[["width", "height", "content"]].astype(str).reindex(table["row"]).to_numpy().tolist()


def _patients(table):
    patients = table["patient_id"].to_numpy()
    return None if (patients == "").all() else patients


def _report_left_out(job, rows):
    path, job.left_out = job.run.path("left_out.csv"), len(rows)
    path.unlink(missing_ok=True)
    for image_id, file, reason in rows[:20]:
        log.info(f"left out {image_id}: {reason} ({file})")
    if rows:
        write_csv(path, pd.DataFrame(rows, columns=["image_id", "file", "reason"]))
        log.info(f"all images that cannot be used: {path}")
