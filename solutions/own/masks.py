"""Segmentation of the user's own images: one network per fold, with one channel and one tuned rule per structure."""

import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import digest, from_dict
from common.data.coco import to_coco
from common.data.loaders import UNKNOWN
from common.data.store import to_square
from common.errors import InputError
from common.infer import tta
from common.infer.predict import draw_masks
from common.listing import leave_out_unreadable
from common.metrics.classification import mean_of_defined
from common.metrics.segmentation import counts_from_areas, iou
from common.metrics.statistics import as_interval, bootstrap, format_interval
from common.network import predict
from common.nn.models import segmenter
from common.paths import read_array, write_json
from common.post.rle import ABSOLUTE, area, encode, parse, runs_of
from common.recipe import Choice
from common.step import file_stamp
from common.submit.table import read_table
from common.submit.validate import Summary, id_problems, refuse_rows
from common.tuning import Rule, grid, nested_areas, rule_dice, summarise, tune_nested
from solutions.lung_segmentation import fit_mask, mask_network, read_mask
from solutions.own import coco, data
from solutions.own.classify import augmentation

SHAPE, MARK = ["image_id", "width", "height"], ["mask", "where"]
UNTUNED = {"pixel": 0.5, "min_area": 0.0}  # the rule of a structure that has no other patient to tune it on


def refine(job, listing, store):
    """Return the listing with the array `masks`, uint8 (N, C, S, S) of 0 and 1, or UNKNOWN; written beside the store.

    Raises InputError naming file or annotation for a mask that is not black and white or not of its image's size, an
    outline outside its image, and a structure that is empty in all masks.
    """
    listing, side, classes = leave_out_unreadable(listing), job.config.store_size, listing.about["classes"]
    marks, table, shape = listing.tables["marks"], listing.table, (len(classes), side, side)
    of_image, files = dict(list(marks.groupby("image_id"))), bool(len(marks)) and isinstance(marks["mask"].iloc[0], str)

    rows = dict(zip(table["row"], table.itertuples(), strict=True))

    def draw(number):
        row = rows.get(number)
        if row is None or row.split == "test":
            return np.zeros(shape, np.uint8)
        found = np.full(shape, UNKNOWN if files else 0, np.uint8)
        for k, parts in of_image.get(row.image_id, marks[:0]).groupby("class_id"):
            drawn = [read_mark(*mark, (row.height, row.width), job.config.mask_size) for mark in parts[MARK].to_numpy()]
            found[k] = to_square(np.any(drawn, axis=0) * np.uint8(255), side) >= 128
        return found

    stamps = [[file_stamp(Path(mark)) if files else mark for mark in marks["mask"]], marks["where"].tolist()]
    key = digest(job.config.mask_size, classes, table["image_id"].tolist(), stamps)
    folder = store.folder.with_name(f"{store.folder.name}-masks-{key[:8]}")
    if not (folder / "masks.npy").is_file():
        draw_masks(folder / "masks.npy", len(store.images), shape, draw)
    masks = read_array(folder / "masks.npy")
    train = table.loc[table["split"] == "train", "row"]
    seen = np.array([[np.nan if m[0, 0] == UNKNOWN else m.any() for m in masks[row]] for row in train], float)
    for k in np.flatnonzero(~(seen == 1).any(axis=0))[:1]:
        raise InputError(f"{listing.inputs[0]}: no mask shows anything of the structure {classes[k]!r}")
    table = table.copy()
    table.loc[table["split"] == "train", classes] = seen
    labels = [classes, [zlib.crc32(masks[row]) for row in train]]
    arrays, strata = {"masks": folder / "masks.npy"}, (seen == 1).astype(int)
    listing = replace(listing, table=table, tables={}, arrays=arrays, strata=strata, labels=labels)
    return data.add_view(job, listing, store)


def read_mark(mark, where, shape, mask_size="same"):
    """Return the mask of a file or a COCO annotation, bool (height, width); shape: height and width of the image."""
    if not isinstance(mark, str):
        outline, declared = mark
        own = outline["size"] if isinstance(outline, dict) else shape  # run-lengths know their size
        return fit_mask(coco.draw(outline, declared or tuple(own), where), shape, where)[0]
    mask = read_mask(mark, may_be_empty=True)
    if mask.shape == tuple(shape):
        return mask
    if mask_size == "same":
        sizes = f"{mask.shape[1]} × {mask.shape[0]} pixels, but its image has {shape[1]} × {shape[0]}"
        raise InputError(f"{mark}: {sizes}; --mask-size any stretches it")
    return cv2.resize(mask.astype(np.uint8) * 255, shape[::-1], interpolation=cv2.INTER_LINEAR) >= 128


def network(job, fold):
    """Return the network of one fold."""
    config, channels = job.config.segmenter, data.count_classes(job)

    def dataset(job, rows, augment, targets):
        images, masks = job.images, None
        if targets:  # images that an exported network predicts have none
            stored = read_array(images.arrays["masks"])
            masks = lambda row: images.drawn(row, stored[row])  # noqa: E731
        transform = augmentation(config.augmentation, job.config.flip) if augment else None
        return data.dataset(images, rows, config.size, transform, masks)

    def build(weights):
        return segmenter(config.architecture, config.encoder, weights or config.weights, channels)

    return mask_network(fold, "segmenter", config, build, dataset, channels, key=[job.config.flip])


def predict_rows(job, folds, rows, path, title):
    """Write the probabilities of store rows to `path` and return a table of the rows."""
    predict(job, [network(job, fold) for fold in folds], rows, tta.views(job.config.tta), title, path)
    return {"": job.images.named(rows)}


def choose(job, oof):
    """Choose each structure's rule by mean Dice; score it nested over folds, or halves of a single fold.

    Masks are compared at the size of the stored square images, which preserves the ratios of areas. A structure of a
    single patient gets the rule UNTUNED and no score. Raises InputError if this applies to all structures.
    """
    config, classes, rows, decision = job.config, job.images.about["classes"], oof.table["row"], job.config.decision
    masks, groups = read_array(job.images.arrays["masks"]), job.images.groups(rows)
    side, rules, tables = config.store_size, {}, []
    tried = grid(pixel=decision.pixel, min_area=sorted({round(share * side**2) for share in decision.min_area}))
    of_image = {name: np.full((len(rows), len(classes)), np.nan) for name in ("dice", "iou")}
    for k, name in enumerate(classes):
        known = np.flatnonzero([masks[row, k, 0, 0] != UNKNOWN for row in rows])
        truth = {at: runs_of(masks[rows.iloc[at], k]) for at in known}
        folds, people = oof.table["fold"].to_numpy()[known], groups[known]
        present = np.array([len(runs) > 0 for runs in truth.values()], bool)
        row = {"structure": name, "images": len(known), "present": int(present.sum())}
        if len(set(folds.tolist())) < 2 and len(set(people.tolist())) < 2:  # nothing can be held out
            rules[name] = UNTUNED
            tables.append(row | UNTUNED)
            continue
        regions = summarise(oof.maps, truth, decision.pixel, (side, side), rows=known, channel=k)
        tuned = tune_nested(tried, partial(rule_dice, regions), folds, people, config.seed)
        areas = nested_areas(regions, tuned.fold_rules, tuned.parts)
        of_image["dice"][known, k], of_image["iou"][known, k] = tuned.dice, iou(counts_from_areas(*areas, side**2))
        rules[name] = {"pixel": tuned.rule.pixel, "min_area": tuned.rule.min_area / side**2}
        row |= rules[name]
        for metric in ("dice", "iou"):
            found = as_interval(bootstrap(of_image[metric][known, k], people, seed=config.seed))
            row |= {metric: found["estimate"], f"{metric}_low": found["low"], f"{metric}_high": found["high"]}
        row["dice_present"] = float(tuned.dice[present].mean()) if present.any() else np.nan
        tables.append(row)
    if np.isnan(of_image["dice"]).all():
        raise InputError("no structure has masks of two patients: no score can be computed")
    means = {name: mean_of_defined(values) for name, values in of_image.items()}
    scores = {name: bootstrap(values, groups, seed=config.seed, skip_nan=True) for name, values in means.items()}
    figures = {name: as_interval(score) for name, score in scores.items()}
    figures |= {"structures": {row["structure"]: row.get("dice") for row in tables}} | data.counts(job, rows)
    scored = oof.table.assign(dice=means["dice"], iou=means["iou"])
    tables = {"structures.csv": pd.DataFrame(tables), "oof_dice.parquet": scored}
    return Choice({"rules": rules}, figures["dice"]["estimate"], figures, tables)


def describe(figures):
    """Return the lines that report the score."""
    structures = figures["structures"].items()
    each = ", ".join(f"{name} {'no score' if value is None else f'{value:.4f}'}" for name, value in structures)
    scores = f"mean Dice {format_interval(figures['dice'])}, IoU {format_interval(figures['iou'])}"
    size = data.size_text(figures)
    return [f"out of fold, {size}: {scores} (Dice by structure: {each}), nested by {figures['nested_by']}"]


def answer(job, test, rule, neutral):
    """Return image_id, width, height and a run-length mask per structure, at the images' original sizes."""
    rows, images, classes = [], job.images.at(test.table["row"]), job.images.about["classes"]
    for at, image in enumerate(tqdm(images.itertuples(), "masks", len(images), leave=False)):
        maps, shape, texts = np.asarray(test.maps[at]), (image.height, image.width), []
        for name, probs in zip(classes, maps.reshape(len(classes), *maps.shape[-2:]), strict=True):
            values = rule["rules"][name]
            pixels = values | {"min_area": round(values["min_area"] * shape[0] * shape[1])}
            mask = from_dict(Rule, pixels, "tuned.json: rules").apply(probs, None, shape)
            texts.append(encode(mask, ABSOLUTE, neutral) if image.ok else neutral)
        rows.append((image.image_id, image.width, image.height, *texts))
    return pd.DataFrame(rows, columns=[*SHAPE, *classes])


def check(path, job):
    """Return the Summary of a submission, and write it as COCO JSON beside it."""
    classes, images = job.images.about["classes"], job.images.at(job.images.rows("test"))
    table, found = read_table(path, [*SHAPE, *classes]), []
    refuse_rows(path, id_problems(table["image_id"], images["image_id"]))
    for row, (image_id, width, height, *texts) in enumerate(table.itertuples(index=False), start=2):
        for k, text in enumerate(texts):
            runs = parse(text, (int(height), int(width)), ABSOLUTE, f"{path}, row {row} ({image_id})")
            found += [(row - 2, k, runs)] if len(runs) else []
    answers = [(image, k, coco.mask_fields(runs, images.iloc[image])) for image, k, runs in found]
    write_json(path.with_suffix(".coco.json"), to_coco(images, classes, answers))
    pixels, rows = sum(area(runs) for *_, runs in found), len({image for image, *_ in found})
    return Summary(str(path), len(table), rows, pixels, "pixels")


FURTHER = {"maps": True, "neutral": lambda job: "-1", "check": check, "answered": ("submission.coco.json",)}
