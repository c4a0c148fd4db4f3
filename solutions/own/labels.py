"""Read a user's labels: a CSV of classes or boxes, a COCO file, or a folder of masks; and find the images they name.

Each reader returns `Labels` or raises InputError with one line that names file, row and value.
"""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from common import paths
from common.data.tables import some_rows
from common.errors import InputError
from common.paths import IMAGES, read_json, strip_suffix
from common.post.boxes import BOX

log = logging.getLogger(__name__)
DEFAULTS = ("labels.csv", "labels.json", "masks")
GROUPING = ["patient_id", "split", "fold"]
TAKEN = {"image_id", "row", "width", "height", "ok", "used", *GROUPING}  # columns of the image table
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Labels:
    """The labels as written.

    classes: names. images: one row per labelled image, with name (as the labels write it), where (file and row), and
    patient_id, split and fold, "" where not given. values: float32 (n, C) of 0, 1 and NaN for unknown, None for boxes
    and masks. marks: one row per box or mask, with image (a row of `images`), class_id, where, and x_min, y_min, x_max,
    y_max or `mask`: a file, polygons or a run-length mask as COCO has them.
    """

    path: Path
    task: str
    classes: tuple
    images: pd.DataFrame
    values: np.ndarray | None = None
    marks: pd.DataFrame = field(default_factory=pd.DataFrame)


# ---- files ---------------------------------------------------------------------------------------------------------


def find_labels(folder, given):
    """Return the path of the labels: `given`, also relative to the folder of the images, or one of DEFAULTS there."""
    if folder is None:
        raise InputError("name the folder of the images with --data")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (--data)")
    for path in [Path(given), folder / given] if given else [folder / name for name in DEFAULTS]:
        if path.exists():
            return path
    if given:
        raise InputError(f"{given}: no such file or folder (--labels)")
    raise InputError(f"{folder}: no {', '.join(DEFAULTS[:-1])} or folder {DEFAULTS[-1]} in it; --labels names them")


def list_images(folder, labels=None):
    """Return {id: path} of the images at any depth under `folder`, but for the subfolder of masks, and {name: id}.

    Ids are stems, or where two stems are equal the relative paths of all images. An image may be named by its stem, its
    file name or its relative path with or without suffix; a name of several images has the id None.
    """
    inside = labels is not None and labels.is_dir() and labels.resolve().is_relative_to(folder.resolve())
    masks = folder / labels.resolve().relative_to(folder.resolve()).parts[0] if inside else None
    found = paths.list_images(folder, skip=lambda path: path == masks)
    if not found:
        raise InputError(f"{folder}: no images in it ({', '.join(IMAGES)})")
    places = [path.relative_to(folder) for path in found]
    unique = len({strip_suffix(place.name) for place in places}) == len(places)
    files, names = {}, {}
    for path, place in zip(found, places, strict=True):
        stem = strip_suffix(place.name)
        image_id = stem if unique else place.as_posix()
        files[image_id] = path
        for name in {stem, place.name, place.as_posix(), place.with_name(stem).as_posix()}:
            names[name] = image_id if names.get(name, image_id) == image_id else None
    return files, names


def task_of(path):
    """Return the task that labels are made for: multilabel, multiclass, detection or segmentation."""
    if path.is_dir():
        return "segmentation"
    if path.suffix.lower() == ".json":
        found = _coco_part(path, read_json(path), "annotations")
        return "segmentation" if found and all(each.get("segmentation") for each in found) else "detection"
    columns = set(some_rows(path))
    return "detection" if set(BOX) <= columns else "multiclass" if "label" in columns else "multilabel"


def read_labels(path, task, classes=(), folder=None):
    """Return the Labels of a file or folder for a task; classes: those to use, () for all. folder: of the images."""
    kind = "folder" if path.is_dir() else "json" if path.suffix.lower() == ".json" else "csv"
    readers = {"multilabel": _read_classes, "multiclass": _read_classes, "detection": _read_boxes}
    readers = {"folder": {"segmentation": _read_masks}, "csv": readers}.get(
        kind, dict.fromkeys(("detection", "segmentation"), _read_coco)
    )
    if task not in readers:
        raise InputError(f"{path}: a {kind} cannot hold labels for the task {task} (--task)")
    found = readers[task](path, task, list(classes), folder)
    _check_names(found.classes, path)
    if len(found.classes) < 1 + (task == "multiclass"):
        raise InputError(f"{path}: {len(found.classes)} classes are too few for the task {task}")
    for column, allowed in (("split", "|".join(SPLITS)), ("fold", "[0-9]{1,3}")):
        given = found.images[column]
        wanted = (given != "").any() & (found.images["split"] != "test")
        for row in np.flatnonzero(wanted & ~given.str.fullmatch(allowed))[:1]:
            raise InputError(f"{found.images['where'][row]}: {column} is {given[row]!r}, not {allowed}")
    return found


def _check_names(names, path):
    """Raise InputError for class names that are taken, or that differ only in case or blanks."""
    seen = {}
    for name in names:
        if not name or name in TAKEN:
            raise InputError(f"{path}: {name!r} cannot be the name of a class")
        plain = re.sub(r"[\s_]+", " ", name).strip().casefold()
        if plain in seen:
            raise InputError(f"{path}: the classes {seen[plain]!r} and {name!r} differ only in case or blanks")
        seen[plain] = name


def _chosen(found, classes, path):
    """Return the classes to use: those asked for, which must exist, or all that were found."""
    for name in classes:
        if name not in found:
            raise InputError(f"{path}: no class {name!r}: {', '.join(map(str, found))}"[:300])
    return classes or list(found)


# ---- tables --------------------------------------------------------------------------------------------------------


def _read_table(path):
    """Return a CSV as text, the names of its images, and one row per image as in `Labels`."""
    raw = some_rows(path)
    names = raw["image_id" if "image_id" in raw else raw.columns[0]]
    for row in np.flatnonzero(names == "")[:1]:
        raise InputError(f"{path}, row {row + 2}: no image is named")
    about = pd.DataFrame({name: raw.get(name, "") for name in GROUPING}, raw.index).assign(name=names)
    about["where"] = [f"{path}, row {row + 2}" for row in raw.index]
    return raw, names, about


def _read_classes(path, task, classes, folder):
    """Read a column of 0, 1 and blank per class, or the column `label`."""
    raw, names, about = _read_table(path)
    for row in np.flatnonzero(about["name"].duplicated())[:1]:
        raise InputError(f"{about['where'][row]}: the image {about['name'][row]!r} has an earlier row")
    if task == "multiclass":
        if "label" not in raw:
            raise InputError(f"{path}, row 1: the task multiclass needs a column label")
        label = raw["label"]
        columns = _chosen(sorted(set(label) - {""}), classes, path)
        for row in np.flatnonzero(~label.isin([*columns, ""]))[:1]:
            raise InputError(f"{path}, row {row + 2}: the label {label[row]!r} is not among --classes")
        values = np.stack([label == name for name in columns], axis=1).astype(np.float32)
        values[label == ""] = np.nan
        return Labels(path, task, tuple(columns), about, values)
    columns = _chosen([name for name in raw.columns[raw.columns != names.name] if name not in GROUPING], classes, path)
    if not columns:
        raise InputError(f"{path}, row 1: no column for a class beside {names.name}")
    text = raw[columns]
    values = text.apply(pd.to_numeric, errors="coerce")
    for row, column in np.argwhere(~(values.isin([0, 1]) | (text == "")).to_numpy())[:1]:
        shown = f"{path}, row {row + 2}, column {columns[column]}: {text.iat[row, column]!r}"
        raise InputError(f"{shown} is neither 0, 1 nor blank (--classes names the columns to use)")
    return Labels(path, task, tuple(columns), about, values.to_numpy(np.float32))


def _read_boxes(path, task, classes, folder):
    """Read a box per row; a row without a box says that its image has none."""
    raw, names, about = _read_table(path)
    column = next((name for name in ("class", "class_name", "label") if name in raw), None)
    if column is None or not set(BOX) <= set(raw):
        raise InputError(f"{path}, row 1: boxes need the columns class, {', '.join(BOX)}")
    text = raw[BOX]
    empty = (text == "").all(axis=1)
    corners = text.apply(pd.to_numeric, errors="coerce").to_numpy(float)
    for row in np.flatnonzero(~np.isfinite(corners).all(axis=1) & ~empty)[:1]:
        raise InputError(f"{path}, row {row + 2}: a box needs four numbers, not {', '.join(text.iloc[row])}")
    chosen = _chosen(sorted(set(raw.loc[~empty, column])), classes, path)
    codes, kept = pd.Index(chosen).get_indexer(raw[column]), ~empty.to_numpy()
    kept &= codes >= 0
    numbers, _ = pd.factorize(names)
    for name in GROUPING:
        several = about.groupby(numbers)[name].nunique() > 1
        for number in np.flatnonzero(several)[:1]:
            row = np.flatnonzero(numbers == number)[-1]
            raise InputError(f"{about['where'][row]}: {name} differs from that in an earlier row of the image")
    marks = pd.DataFrame(corners[kept], columns=BOX).assign(image=numbers[kept], class_id=codes[kept])
    marks["where"] = about["where"].to_numpy()[kept]
    return Labels(path, task, tuple(chosen), about[~names.duplicated()].reset_index(drop=True), marks=marks)


# ---- COCO and masks ------------------------------------------------------------------------------------------------


def _coco_part(path, coco, name):
    part = coco.get(name) if isinstance(coco, dict) else None
    if not isinstance(part, list) or not all(isinstance(each, dict) for each in part):
        raise InputError(f"{path}: not a COCO file (no list of {name})")
    return part


def _read_coco(path, task, classes, folder):
    coco = read_json(path)
    images, found, kinds = (_coco_part(path, coco, name) for name in ("images", "annotations", "categories"))
    try:
        places = {image["id"]: number for number, image in enumerate(images)}
        about = pd.DataFrame({"name": [str(image["file_name"]) for image in images]})
        names = {kind["id"]: str(kind["name"]) for kind in kinds}
        chosen = _chosen([name for name in names.values() if name], classes, path)
        rows = []
        for each in found:
            where = f"{path}, annotation {each.get('id', len(rows))}"
            if each["image_id"] not in places or each["category_id"] not in names:
                raise InputError(f"{where}: unknown image_id or category_id")
            if names[each["category_id"]] in chosen:
                row = {"image": places[each["image_id"]], "class_id": chosen.index(names[each["category_id"]])}
                if task == "detection":
                    x, y, width, height = map(float, each["bbox"])
                    row |= dict(zip(BOX, (x, y, x + width, y + height), strict=True))
                else:
                    row |= {"mask": _check_outline(each.get("segmentation"), where)}
                rows.append(row | {"where": where})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a COCO file ({type(error).__name__}: {error})") from None
    for name in GROUPING:
        about[name] = [str(image.get(name, "")) for image in images]
    about["where"] = [f"{path}, image {image['id']}" for image in images]
    for row in np.flatnonzero(about["name"].duplicated())[:1]:
        raise InputError(f"{about['where'][row]}: the image {about['name'][row]!r} has an earlier entry")
    columns = ["image", "class_id", "where", *(BOX if task == "detection" else ["mask"])]
    return Labels(path, task, tuple(chosen), about, marks=pd.DataFrame(rows, columns=columns))


def _check_outline(outline, where):
    """Return COCO's polygons or run-length mask. Raises InputError for anything else and for fewer than 3 points."""
    if isinstance(outline, dict) and {"counts", "size"} <= set(outline):
        return outline
    if not isinstance(outline, list) or not outline:
        raise InputError(f"{where}: segmentation is neither polygons nor a run-length mask")
    for polygon in outline:
        if not isinstance(polygon, list) or len(polygon) % 2 or not np.isfinite(np.asarray(polygon, float)).all():
            raise InputError(f"{where}: a polygon must be a list of x, y, x, y, …")
        if len(polygon) < 6:
            raise InputError(f"{where}: a polygon of {len(polygon) // 2} points; it needs three")
    return outline


def _read_masks(path, task, classes, folder):
    """Read a folder of masks, or of one such folder per structure.

    Subfolders are structures unless the images lie in subfolders of the same names.
    """
    parts = sorted(part for part in path.iterdir() if part.is_dir() and not part.name.startswith("."))
    nested = folder is not None and parts and all((folder / part.name).is_dir() for part in parts)
    structures = {part.name: part for part in parts} if parts and not nested else {path.name: path}
    rows, chosen = [], _chosen(list(structures), classes, path)
    for number, name in enumerate(chosen):
        for file in paths.walk_files(structures[name]):
            if file.suffix.lower() in IMAGES:
                stem = file.relative_to(structures[name]).with_suffix("").as_posix()
                rows.append((stem, number, str(file), str(file)))
    if not rows:
        raise InputError(f"{path}: no masks in it ({', '.join(IMAGES)})")
    marks = pd.DataFrame(rows, columns=["name", "class_id", "mask", "where"])
    for row in np.flatnonzero(marks.duplicated(["name", "class_id"]))[:1]:
        raise InputError(f"{marks['mask'][row]}: a second mask of {marks['name'][row]!r}")
    numbers, names = pd.factorize(marks["name"])
    about = pd.DataFrame({"name": names, **dict.fromkeys(GROUPING, "")})
    about["where"] = marks["where"].groupby(numbers).first().to_numpy()
    return Labels(path, task, tuple(chosen), about, marks=marks.drop(columns="name").assign(image=numbers))
