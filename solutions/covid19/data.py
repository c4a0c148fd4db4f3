"""Turn the collections of radiographs into a Listing: selection, duplicates, lungs, roles and checks."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from common.config import file_hash
from common.errors import InputError, check, log
from common.listing import Listing, unreadable
from common.submit.table import read_table
from solutions import lung_segmentation
from solutions.covid19.collections import read_collections, read_exclusions, read_test_images
from solutions.covid19.selection import drop_duplicates, find_duplicates, select
from solutions.lung_segmentation import apply_gate, clean_up

SELECTION_TABLE = "selection.csv"
SELECTION = ["collection", "file_name", "image_id", "patient_id", "age", "view_said", "finding", "label"]
SELECTION += ["kept", "reason"]
KEPT = ["image_id", "file_name", "row", "width", "height", "ok", "collection", "home", "patient_id", "age", "view"]
KEPT += ["finding", "label", "split", "role", "fold", "area", "usable", "used"]  # columns of images.parquet
SAMPLE = ["filename", "probability"]
MASKS = "masks"  # name of the array in a run, uint8 (N, S, S) of 0 and 1
UNREADABLE, COLOURED = "cannot be read", "a colour picture"
GATED = "lungs: "  # prefix of the area gate's reasons
NOT_DRAWN = "not drawn: negatives"


def made_with(config):
    """Return the settings that the output of `prepare` depends on, as JSON by option."""
    values = {name: getattr(config, name) for name in ("same_source", "negatives", "n_folds", "seed", "store_size")}
    values |= {"exclude": config.exclude} if config.exclude else {}
    values |= {f"selection.{name}": value for name, value in asdict(config.selection).items()}
    return values | {f"lungs.{name}": value for name, value in lungs_key(config).items()}


def read_competition(job):
    """Return the Listing of the selected images and of those to predict.

    The table adds file_name, collection, home (a collection with COVID-19 images), age (years or NaN), view,
    finding, label (1 COVID-19, 0 none, -1 unknown). `refine` adds role (main: trained on and scored; same_source:
    only predicted out of fold; "": unused or test), area (share of the image that is lung), usable (passes the gate).
    """
    options, config = job.options, job.config
    check(options.data is not None, "name the folder of the images with --data")
    table = read_collections([options.data, *options.normals])
    excluded = read_exclusions(Path(config.exclude), table) if config.exclude else ""
    selection = select(table, config.selection, config.seed, excluded)
    test = read_test_images(options.data, options.test, selection["image_id"])
    if options.test is None:  # the list lies beside the tables and uses their patient numbers
        listed = set(test["patient_id"]) - {""}
        own = [patient.removeprefix(f"{name} ") for patient, name in selection[["patient_id", "collection"]].to_numpy()]
        seen = (selection["reason"] == "") & selection["home"] & pd.Series(own, selection.index).isin(listed)
        if seen.any():
            log.info(f"{seen.sum()} images of test patients are left out of training")
        selection["reason"] = selection["reason"].mask(seen, "a test patient")
    train = selection[selection["reason"] == ""].assign(split="train")
    check(len(train), f"the selection leaves no image to train on{describe_reasons(selection)}")
    inputs = sorted({*selection["table"], *[Path(config.exclude)] * (config.exclude != "")})
    listing = _make_listing(options.data, test, train)
    table = assign_roles(listing.table, config)  # again in `refine`, which leaves images out
    _check_labels(table, selection, config)
    table = listing.table.assign(role=table["role"], used=table["role"] != "")
    more = {"tables": {SELECTION_TABLE: selection}, "kinds": _strata(table[table["used"]])}
    return replace(listing, table=table, inputs=tuple(inputs), **more)


def read_test(job):
    """Return the Listing of only the images to predict: those of --test or of the test list in --data."""
    data, test = job.options.data, job.options.test
    images = read_test_images(data, test)
    check(len(images), f"{data}: no images to predict (it has no unlabelled_test.csv); name them with --test")
    return _make_listing(data if data is not None else test, images)


def _make_listing(folder, test, *train):
    unknown = {"label": -1, "home": False, "age": np.nan, "view": "", "finding": "", "reason": ""}
    table = pd.concat([*train, test.assign(split="test", **unknown)], ignore_index=True)
    files = dict(zip(table["image_id"], table["path"], strict=True))
    return Listing(folder, table, files, pd.DataFrame({SAMPLE[0]: test["file_name"], SAMPLE[1]: 0.5}))


# ---- lungs ---------------------------------------------------------------------------------------------------------


def weights_file(config):
    """Return the path of the lung segmenter's weights. Raises InputError if there is no such file."""
    return lung_segmentation.weights_file(config.lungs.weights, "--lungs.weights")


def lungs_key(config):
    """Return the settings that masks and the area gate depend on, as JSON; weights: the file's SHA-256."""
    return asdict(config.lungs) | {"weights": file_hash(weights_file(config))}


def find_lungs(job, store):
    """Return a table of image_id, row, area (share of lung), usable and reason, and {MASKS: path of the masks}."""
    config, size = job.config.lungs, job.config.store_size
    settings = {"dilations": config.dilations, "closings": config.closings, "gate": config.gate}
    weights, columns = weights_file(job.config), ("area", "usable", "reason")
    describe = partial(_describe_lungs, config)
    return lung_segmentation.find_lungs(job, store, weights, settings, {MASKS: size}, columns, describe)


def _describe_lungs(config, segmenter, image, probs, about):
    if probs is None:
        return [np.zeros_like(image)], [0.0, False, COLOURED if about["ok"] else UNREADABLE]
    mask = clean_up(segmenter.lungs(probs, image.shape), config.dilations, config.closings)
    verdict = apply_gate(mask, config.gate)
    return [mask], [float(verdict.area), bool(verdict.ok), verdict.reason]


# ---- after the images are decoded ----------------------------------------------------------------------------------


def refine(job, listing, store):
    """Return the Listing after removing duplicates, gating lungs and drawing negatives, with strata for the folds."""
    config, bad, table = job.config, unreadable(listing), listing.table
    table = table.assign(reason=table["reason"].mask(table["image_id"].isin([row[0] for row in bad]), UNREADABLE))
    pairs, ok = find_duplicates(store.images, config.selection.duplicates), table["ok"]
    table = _drop_copies(table, pairs[pairs["a"].map(ok) & pairs["b"].map(ok)])  # placeholders look alike
    listing = add_lungs(job, replace(listing, table=table), store)
    table = listing.table
    rejected = (table["split"] == "train") & (table["reason"] == "") & ~table["usable"]
    table = assign_roles(table.assign(reason=table["reason"].mask(rejected, GATED + table["lung_reason"])), config)
    selection, used = listing.tables[SELECTION_TABLE], table["role"] != ""
    found = selection["image_id"].map(table.set_index("image_id")["reason"])
    selection["reason"] = selection["reason"].mask(selection["reason"] == "", found)
    selection["kept"] = selection["reason"] == ""
    _check_labels(table, selection, config)
    _log_summary(table, selection)
    part = table[used]
    return replace(
        listing,
        table=_images_table(table.assign(used=used)),
        strata=_strata(part),
        labels=[part["label"].tolist(), part["role"].tolist(), part["area"].round(6).tolist()],
        tables={SELECTION_TABLE: selection[SELECTION]},
        left_out=[*listing.left_out, *bad],
    )


def refine_test(job, listing, store):
    """Return the Listing of test images with their lungs."""
    listing = add_lungs(job, listing, store)
    return replace(listing, table=_images_table(listing.table))


def _strata(table):
    return pd.get_dummies(table["collection"] + table["label"].astype(str) + table["role"]).to_numpy(np.int8)


def _images_table(table):
    return table[[name for name in KEPT if name in table]].astype({"label": "int8"})


def add_lungs(job, listing, store):
    """Return the Listing with area, usable and lung_reason of each image, masks, and test images left out."""
    lungs, masks = find_lungs(job, store)
    about = lungs.set_axis(listing.table.index)
    table = listing.table.assign(area=about["area"], usable=about["usable"], lung_reason=about["reason"])
    neutral = table[(table["split"] == "test") & ~can_predict(table, job.config)]
    left_out = [(r.image_id, r.file_name, f"{r.lung_reason}; gets the mean probability") for r in neutral.itertuples()]
    about = {"pixels": lungs_key(job.config)}
    return replace(listing, table=table, arrays=masks, left_out=left_out, about=about)


def can_predict(table, config):
    """Return which images can be predicted, bool (N,): those with usable lungs, or readable ones for whole images."""
    return table["usable" if config.view == "lungs" else "ok"].to_numpy(bool)


def _drop_copies(table, pairs):
    """Return the table with reasons for duplicates and patients of test images; merge patients who share an image."""
    train = table["split"] == "train"
    table = drop_duplicates(table, pairs[pairs["a"].map(train) & pairs["b"].map(train)])
    across = pairs[pairs["a"].map(train) != pairs["b"].map(train)]
    for a, b in across[["a", "b"]].itertuples(index=False):
        seen, predicted = (a, b) if train[a] else (b, a)
        name, patient = table["file_name"][predicted], table["patient_id"][seen]
        log.info(f"test image {name} is a copy of {table['image_id'][seen]}: its patient is left out of training")
        rows = train & (table["reason"] == "") & (table["patient_id"] == patient)
        table.loc[rows, "reason"] = f"the patient of the test image {name}"
    return table


def assign_roles(table, config):
    """Return the table with `role` and `home`, and a reason for each negative that is not drawn."""
    train = (table["split"] == "train") & (table["reason"] == "")
    home = table["collection"].isin(set(table.loc[train & (table["label"] == 1), "collection"]))
    role = pd.Series("", table.index).mask(train, "main")
    if config.same_source == "score":
        role = role.mask(train & (table["label"] == 0) & home, "same_source")
    negatives, reason = table[(role == "main") & (table["label"] == 0)], table["reason"]
    if config.negatives and len(negatives) > config.negatives:
        drawn = draw_evenly(negatives["collection"].to_numpy(), config.negatives, config.seed)
        gone = table.index.isin(negatives.index[~drawn])
        role, reason = role.mask(gone, ""), reason.mask(gone, f"{NOT_DRAWN} {config.negatives}")
    return table.assign(home=home, role=role, reason=reason)


def draw_evenly(collections, count, seed):
    """Draw `count` of N images, equally many per collection as far as it has them; return a mask, bool (N,)."""
    rng, drawn = np.random.default_rng([seed, 3]), np.zeros(len(collections), bool)
    names, sizes = np.unique(collections, return_counts=True)
    for place, k in enumerate(np.argsort(sizes, kind="stable")):  # small ones first, since larger ones make up for them
        share = (count - drawn.sum()) // (len(names) - place)
        drawn[rng.permutation(np.flatnonzero(collections == names[k]))[:share]] = True
    return drawn


def _check_labels(table, selection, config):
    roles = table["role"]
    hint = " or use those of the same collections (--same-source train)" if (roles == "same_source").any() else ""
    advice = {1: "", 0: f": name a folder of normals with --normals{hint}"}
    for label, name in ((1, "with"), (0, "without")):
        if not ((roles == "main") & (table["label"] == label)).any():
            left_out = describe_reasons(selection[selection["label"] == label])
            raise InputError(f"no images {name} COVID-19 to train on{advice[label]}{left_out}")


# ---- labels and reasons --------------------------------------------------------------------------------------------


def labels_of(job, rows):
    """Return the labels of store rows, float32 (n,): 1 with COVID-19, 0 without."""
    return job.images.at(rows)["label"].to_numpy(np.float32)


def read_selection(run):
    """Return selection.csv with the columns SELECTION: strings, except `kept` (bool) and `label` (int)."""
    table = read_table(run.path(SELECTION_TABLE), SELECTION)
    return table.assign(kept=table["kept"] == "True", label=table["label"].astype(int))


def describe_reasons(selection):
    """Return the six most common reasons for unused images with their counts as text, "" if all are used."""
    counts = reason_kinds(selection.loc[selection["reason"] != "", "reason"]).value_counts()
    said = ", ".join(f"{n:,} {reason}" for reason, n in counts.head(6).items())
    return f"; left out: {said}" + " …" * (len(counts) > 6) if len(counts) else ""


def reason_kinds(reasons):
    """Return reasons without the numbers and names that differ between images."""
    return reasons.str.split(r"[:(\d]| as |(?<=test image) ").str[0].str.strip()


def rejected_shares(selection):
    """Return by label the share of images that the area gate rejected and how many it checked: name → (share, n)."""
    rejected = selection["reason"].str.startswith(GATED)
    came = (selection["reason"] == "") | rejected | selection["reason"].str.startswith(NOT_DRAWN)
    names = {1: "with COVID-19", 0: "without"}
    parts = {name: rejected[came & (selection["label"] == label)] for label, name in names.items()}
    return {name: (float(part.mean()), len(part)) for name, part in parts.items() if len(part)}


def _log_summary(table, selection):
    main, same = table[table["role"] == "main"], (table["role"] == "same_source").sum()
    counts = main["label"].value_counts()
    used = f"{len(selection):,} rows, {selection['kept'].sum():,} used{describe_reasons(selection)}"
    more = f", {same:,} more of the same collections that are only scored" if same else ""
    patients, tests = main["patient_id"].nunique(), (table["split"] == "test").sum()
    images = f"{counts.get(1, 0):,} images with COVID-19 and {counts.get(0, 0):,} without{more}"
    shares = [f"{share:.1%} of {n:,} {name}" for name, (share, n) in rejected_shares(selection).items()]
    log.info(f"{SELECTION_TABLE}: {used}")
    log.info(f"prepared {images}, of {patients:,} patients; {tests:,} test images")
    log.info(f"the gate rejected {', '.join(shares)}")
