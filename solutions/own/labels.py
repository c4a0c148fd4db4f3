"""Read a user's labels: a CSV of classes or boxes, a COCO file, or a folder of masks; and find the images they name.

Each reader returns `Labels` or raises InputError with one line that names file, row and value.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from common import paths
from common.data.coco import list_part, read_coco
from common.data.guard import max_pixels
from common.data.tables import some_rows
from common.errors import InputError, check
from common.paths import IMAGES, read_json, strip_suffix
from common.post.boxes import BOX

MASKS = "masks"
DEFAULTS = ("labels.csv", "labels.json", MASKS)
GROUPING = ["patient_id", "split", "fold"]
TRUE_CLASS = "true class"  # a column of confusion.csv
TAKEN = {"image_id", "row", "width", "height", "ok", "used", "name", "where", "file", TRUE_CLASS, *GROUPING}
TAKEN |= {"truth", "found", "mean", "dice", "iou"}  # columns and rows of comparisons
SIZE = ["height", "width"]
SPLITS = ("train", "val", "test")
MISSING = ("nan", "na", "null", "<na>")  # and None, but a class may be called none


@dataclass(frozen=True)
class Labels:
    """Labels as the user wrote them.

    classes: names. images: one row per labelled image, with name (as the labels write it), where (file and row),
    patient_id, split and fold, "" where not given, and a column per class: 0, 1 and NaN for unknown. marks: one row per
    box or mask, with the image's name, class, where, and x_min, y_min, x_max, y_max or `mask`: a file, or COCO's
    polygons or run-length mask with the image's height and width in COCO, or None. COCO's boxes have width and height.
    """

    classes: list
    images: pd.DataFrame
    marks: pd.DataFrame = field(default_factory=pd.DataFrame)


def find_labels(folder, given):
    """Return the path of the labels: `given`, also looked for in the images' folder, or one of DEFAULTS in there."""
    check(folder is not None, "name the folder of the images with --data")
    check(folder.is_dir(), f"{folder}: no such folder (--data)")
    for path in [Path(given), folder / given] if given else [folder / name for name in DEFAULTS]:
        if path.exists():
            above = path.is_dir() and folder.resolve().is_relative_to(path.resolve())
            check(not above, f"{path}: the images themselves lie in this folder (--labels)")
            return path
    check(not given, f"{given}: no such file or folder (--labels)")
    raise InputError(f"{folder}: no {', '.join(DEFAULTS[:-1])} or folder {DEFAULTS[-1]} in it; --labels names them")


def list_images(folder, labels=None):
    """Return {id: path} of the images at any depth under `folder`, and {name: id}.

    If `labels` is a folder, its files are left out, as are those of a folder in which it lies with other masks: one
    named `masks`, or one outside which there is an image for each of the masks, and no folder `images` in it.
    Ids are stems, or relative paths if any two images have the same stem. An image may be named by its stem, its file
    name or its relative path with or without suffix; a name shared by several images has the id None.
    """
    above, masks = folder.resolve(), labels.resolve() if labels is not None and labels.is_dir() else None
    found = paths.list_images(folder)
    if masks is not None:
        inside = [place for place in reversed(masks.parents) if above in place.parents]
        where = {path: path.parent.resolve() / path.name for path in found}
        masks = next((place for place in inside if place.name == MASKS or _holds_masks(place, masks, where)), masks)
        found = [path for path in found if masks not in where[path].parents]
    places = {path.relative_to(folder): path for path in found}
    check(places, f"{folder}: no images in it ({', '.join(IMAGES)})")
    unique = len({strip_suffix(place.name) for place in places}) == len(places)
    files, names = {}, {}
    for place, path in places.items():
        stem = strip_suffix(place.name)
        image_id = stem if unique else place.as_posix()
        files[image_id] = path
        for name in {stem, place.name, place.as_posix(), place.with_name(stem).as_posix()}:
            names[name] = image_id if names.get(name, image_id) == image_id else None
    return files, names


def _holds_masks(place, masks, files):
    """Return whether a folder around the folder `masks` has only masks, judging by the files inside and outside it."""
    within = [path for path in files.values() if place in path.parents]
    outside = {strip_suffix(path.name) for path in files.values() if place not in path.parents}
    named = {strip_suffix(path.name) for path in within if masks in path.parents}
    among_images = any("images" in path.relative_to(place).parts for path in within)
    return bool(named) and named <= outside and not among_images


def task_of(path):
    """Return the task that the labels fit: multilabel, multiclass, detection or segmentation."""
    if path.is_dir():
        return "segmentation"
    if path.suffix.lower() == ".json":
        found = list_part(path, read_json(path), "annotations")
        return "segmentation" if found and all(each.get("segmentation") for each in found) else "detection"
    columns = set(some_rows(path))
    return "detection" if set(BOX) <= columns else "multiclass" if "label" in columns else "multilabel"


def read_labels(path, task, classes=(), folder=None):
    """Return the Labels of a file or folder for a task; classes: to use, () for all; folder: the images' folder."""
    kind = "folder" if path.is_dir() else "json" if path.suffix.lower() == ".json" else "csv"
    check(task in READERS[kind], f"{path}: a {kind} cannot hold labels for the task {task} (--task)")
    found = READERS[kind][task](path, task, list(classes), folder)
    seen = {}
    for name in found.classes:
        plain = re.sub(r"[\s_]+", " ", name).strip().casefold()
        check(name and name not in TAKEN, f"{path}: {name!r} cannot be the name of a class")
        if plain in seen:
            raise InputError(f"{path}: the classes {seen[plain]!r} and {name!r} differ only in case or blanks")
        seen[plain] = name
    if len(found.classes) < 1 + (task == "multiclass"):
        raise InputError(f"{path}: {len(found.classes)} classes are too few for the task {task}")
    images, split = found.images, found.images["split"]
    for column in GROUPING:
        _refuse_missing(images, column)
    for column, allowed in (("split", "|".join(SPLITS)), ("fold", "[0-9]{1,3}")):
        given = images[column]
        for row in np.flatnonzero((given != "").any() & (split != "test") & ~given.str.fullmatch(allowed))[:1]:
            raise InputError(f"{images['where'][row]}: {column} is {given[row]!r}, not {allowed}")
    held_out = (split == "val") & (images["fold"] != "")
    refuse(images, held_out, "split is 'val', but the column fold says what is held out")
    return found


def refuse(table, wrong, reason):
    """Raise InputError for the first row that is wrong, bool (n,): its `where`, then the reason with {column} in it."""
    for row in np.flatnonzero(wrong)[:1]:
        values = table.iloc[row].to_dict()
        raise InputError(f"{values['where']}: {reason.format_map(values)}")


def _refuse_missing(table, column):
    missing = table[column].str.casefold().isin(MISSING) | (table[column] == "None")
    said = "which may mean a missing value; leave it blank or write another name"
    refuse(table, missing, f"{column} is {{{column}!r}}, {said}")


def _chosen(found, classes, path):
    """Return the classes to use: those asked for, which must exist, or all that were found."""
    for name in classes:
        check(name in found, f"{path}: no class {name!r}: {', '.join(map(str, found))}"[:300])
    return classes or list(found)


def _labels(classes, images, marks, absent=0):
    """Return the Labels of a table of marks; absent: the value of a class without a mark in an image."""
    counts = pd.crosstab(marks["name"], marks["class"]).reindex(images["name"], fill_value=0)
    counts = counts.reindex(columns=classes, fill_value=0).to_numpy()
    values = pd.DataFrame(np.where(counts > 0, 1.0, absent), images.index, classes)
    return Labels(classes, pd.concat([images, values], axis=1), marks)


def _read_table(path):
    """Return a CSV as text, the image name in each of its rows, and its rows in the form of `Labels.images`."""
    raw = some_rows(path)
    names = raw["image_id" if "image_id" in raw else raw.columns[0]]
    about = pd.DataFrame({name: raw.get(name, "") for name in GROUPING}, raw.index).assign(name=names)
    about["where"] = [f"{path}, row {row + 2}" for row in raw.index]
    refuse(about, names == "", "no image is named")
    return raw, names, about


def _read_classes(path, task, classes, folder):
    """Read one column of 0, 1 and blank per class (multilabel), or the column `label` (multiclass)."""
    raw, names, about = _read_table(path)
    refuse(about, names.duplicated(), "the image {name!r} has an earlier row")
    if task == "multiclass":
        check("label" in raw, f"{path}, row 1: the task multiclass needs a column label")
        label, labelled = raw["label"], about.assign(label=raw["label"])
        _refuse_missing(labelled, "label")
        columns = _chosen(sorted(set(label) - {""}), classes, path)
        refuse(labelled, ~label.isin([*columns, ""]), "the label {label!r} is not among --classes")
        values = pd.DataFrame({name: (label == name).where(label != "").astype(float) for name in columns})
    else:
        found = [name for name in raw.columns[raw.columns != names.name] if name not in GROUPING]
        columns = _chosen(found, classes, path)
        check(columns, f"{path}, row 1: no column for a class beside {names.name}")
        values = raw[columns].apply(pd.to_numeric, errors="coerce")
        for row, column in np.argwhere(~(values.isin([0, 1]) | (raw[columns] == "")).to_numpy())[:1]:
            shown = f"{path}, row {row + 2}, column {columns[column]}: {raw[columns].iat[row, column]!r}"
            raise InputError(f"{shown} is neither 0, 1 nor blank (--classes names the columns to use)")
    return Labels(columns, pd.concat([about, values], axis=1))


def _read_boxes(path, task, classes, folder):
    """Read one box per row; a row without a box names an image that has none."""
    raw, names, about = _read_table(path)
    column = next((name for name in ("class", "class_name", "label") if name in raw), None)
    check(column is not None and set(BOX) <= set(raw), f"{path}, row 1: boxes need the columns class, {', '.join(BOX)}")
    boxed, corners = (raw[BOX] != "").any(axis=1), raw[BOX].apply(pd.to_numeric, errors="coerce").astype(float)
    rows = about[["where"]].join(raw[[*BOX, column]])
    numbers = np.isfinite(corners).all(axis=1)
    refuse(rows, boxed & ~numbers, "a box needs four numbers, not {x_min}, {y_min}, {x_max}, {y_max}")
    _refuse_missing(rows[boxed], column)
    for name in GROUPING:
        for row in np.flatnonzero(about.groupby("name")[name].transform("nunique") > 1)[:1]:
            last = about.index[names == names[row]][-1]
            raise InputError(f"{about['where'][last]}: {name} differs from that in an earlier row of the image")
    chosen = _chosen(sorted(set(raw.loc[boxed, column])), classes, path)
    kept = boxed & raw[column].isin(chosen)
    marks = corners.assign(**{"name": names, "class": raw[column], "where": about["where"]})[kept]
    return _labels(chosen, about[~names.duplicated()].reset_index(drop=True), marks)


def _read_coco(path, task, classes, folder):
    about, marks, names = read_coco(path)
    check(len(marks), f"{path}: no annotations in it")
    refuse(about, about["name"].duplicated(), "the image {name!r} has an earlier row")
    chosen, sizes = _chosen([name for name in names.values() if name], classes, path), about[SIZE].fillna(1)
    whole = ((sizes >= 1) & (sizes % 1 == 0)).all(axis=1) & (sizes.prod(axis=1) <= max_pixels())
    refuse(about, ~whole, "width and height are not those of an image")
    marks = marks.merge(about[["name", *SIZE]], "left", "name")
    if task == "detection":
        refuse(marks, ~np.isfinite(marks[BOX]).all(axis=1), "a box needs four numbers")
    else:
        sizes = [tuple(map(int, size)) if all(size > 0) else None for size in marks[SIZE].to_numpy()]
        outlines = map(_check_outline, marks["segmentation"], marks["where"])
        marks = marks.assign(mask=list(zip(outlines, sizes, strict=True)))
    about, marks = about.drop(columns=SIZE), marks.drop(columns=["score", "segmentation"])
    return _labels(chosen, about, marks[marks["class"].isin(chosen)])


def _check_outline(outline, where):
    """Return COCO's polygons or run-length mask. Raises InputError for anything else and for fewer than 3 points."""
    size, counts = (outline.get(name) if isinstance(outline, dict) else None for name in ("size", "counts"))
    if _are_numbers(size, int) and len(size) == 2 and (isinstance(counts, str) or _are_numbers(counts, int)):
        return outline
    if not isinstance(outline, list) or not outline:
        raise InputError(f"{where}: segmentation is neither polygons nor a run-length mask")
    for polygon in outline:
        if not _are_numbers(polygon) or len(polygon) % 2:
            raise InputError(f"{where}: a polygon must be a list of x, y, x, y, …")
        check(len(polygon) >= 6, f"{where}: a polygon of {len(polygon) // 2} points; it needs three")
    return outline


def _are_numbers(values, kinds=int | float):
    return isinstance(values, list) and all(isinstance(value, kinds) and abs(value) < 1e9 for value in values)


def _read_masks(path, task, classes, folder):
    """Read a folder of masks, or a folder with a subfolder of masks for each structure.

    Subfolders are structures unless the images' folder has subfolders of the same names.
    """
    parts = sorted(part for part in path.iterdir() if part.is_dir() and not part.name.startswith("."))
    nested = folder is not None and parts and all((folder / part.name).is_dir() for part in parts)
    structures = {part.name: part for part in parts} if parts and not nested else {path.name: path}
    rows, chosen = [], _chosen(list(structures), classes, path)
    for name in chosen:
        for file in paths.walk_files(structures[name]):
            if file.suffix.lower() in IMAGES:
                stem = file.relative_to(structures[name]).with_suffix("").as_posix()
                rows.append((stem, name, str(file), str(file)))
    check(rows, f"{path}: no masks in it ({', '.join(IMAGES)})")
    marks = pd.DataFrame(rows, columns=["name", "class", "mask", "where"])
    refuse(marks, marks.duplicated(["name", "class"]), "a second mask of {name!r}")
    about = marks.drop_duplicates("name")[["name", "where"]].assign(**dict.fromkeys(GROUPING, ""))
    about = about.reset_index(drop=True)
    return _labels(chosen, about, marks, np.nan)  # without a file, a structure is unknown, not absent


READERS = {
    "csv": {"multilabel": _read_classes, "multiclass": _read_classes, "detection": _read_boxes},
    "json": {"detection": _read_coco, "segmentation": _read_coco},
    "folder": {"segmentation": _read_masks},
}
