"""NIH's tables and lists as they are given: labels, the official split, boxes."""

import hashlib
import logging

import numpy as np
import pandas as pd

from common.config import file_hash
from common.data.tables import check_ids, parse_ages, plain_patients, read_list, some_rows
from common.errors import InputError
from common.paths import check_id, strip_suffix
from common.post.boxes import BOX, SLACK, find_normalised
from common.submit.table import read_rows
from solutions.chestxray14.config import BOX_SIDE, LABELS, NO_FINDING

log = logging.getLogger(__name__)
# NIH's label table as released in 2017, and its correction of 2020, in which 181 images have other labels.
TABLES = {"2020": "Data_Entry_2017_v2020.csv", "2017": "Data_Entry_2017.csv"}
BOXES = ("BBox_List_2017.csv", "BBox_List_2017_Official_NIH.csv")
# Names of the lists in NIH's and Kaggle's folders.
LISTS = {"train_val": ("train_val_list.txt", "train_val_list_NIH.txt"), "test": ("test_list.txt", "test_list_NIH.txt")}
# `names_digest` of the official lists, the same in two public copies.
DIGESTS = {
    "train_val": "f5ca42650c3529e46ba2b4399869027d2ff2ddac9a5e55b5fa64530fcb4dd4be",
    "test": "7519b7296cb0f58e5d2f4818372950411b04f1f243580c4132d001746535d931",
}
COLUMNS = {"Image Index": "file_name", "Finding Labels": "labels", "Follow-up #": "follow_up"}
COLUMNS |= {"Patient ID": "patient_id", "Patient Age": "age", "Patient Gender": "sex", "Patient Sex": "sex"}
COLUMNS |= {"View Position": "view"}
_BOX_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")
_BOX_NAMES = {"Infiltrate": "Infiltration"}  # of the box table alone


def read_labels(path):
    """Return the label table: image_id, file_name, patient_id, age, sex, view, follow_up and the 14 LABELS, int8 0/1.

    age in years (float, NaN where blank; 058Y, 013M and 025D are read too). Both versions are read. Raises InputError
    naming file and row: a missing column, an unusable or repeated image, no patient, an unknown label, "No Finding"
    beside a finding, an age or follow-up that is not a number.
    """
    table = some_rows(path).rename(columns=COLUMNS)
    for name in COLUMNS.values():
        if name not in table:
            wanted = " or ".join(column for column, ours in COLUMNS.items() if ours == name)
            raise InputError(f"{path}, row 1: no column {wanted}")
    table["image_id"] = stems(table["file_name"])
    for row, name in table["image_id"].items():
        check_id(name, f"{path}, row {row + 2}")
    marks, table["problem"] = parse_findings(table["labels"])
    years = parse_ages(table["age"])
    faults = [
        (table["image_id"].duplicated(), "this image is there twice"),
        (table["problem"] != "", "{problem}"),
        (table["patient_id"] == "", "no Patient ID"),
        ((table["age"] != "") & years.isna(), "the age {age!r} is not a number of years (or 013M, 025D)"),
        (~table["follow_up"].str.fullmatch(r"\d{1,9}"), "the follow-up {follow_up!r} is not a whole number"),
        (~table["sex"].isin(["M", "F", ""]), "the sex {sex!r} is neither M nor F"),
        (~table["view"].isin(["PA", "AP", ""]), "the view {view!r} is neither PA nor AP"),
    ]
    for wrong, text in faults:
        for row in np.flatnonzero(wrong)[:1]:
            raise InputError(f"{path}, row {row + 2} ({table['image_id'][row]}): {text.format(**table.loc[row])}")
    table["patient_id"] = plain_patients(table["patient_id"])
    table = table.assign(age=years).astype({"follow_up": "int64"})
    columns = ["image_id", "file_name", "patient_id", "age", "sex", "view", "follow_up"]
    return pd.concat([table[columns], pd.DataFrame(marks, columns=list(LABELS))], axis=1)


def stems(names):
    """Return names of image files (a Series of str) without folder and suffix."""
    return names.map(strip_suffix)


def patient_of(image_ids):
    """Return the patients of NIH's image ids (a Series such as 00000013_004), "" for other ids."""
    return plain_patients(image_ids.str.extract(r"^(\d{8})_\d{3}$")[0].fillna(""))


def parse_findings(texts):
    """Return what texts such as "Mass|Nodule" say, int8 (N, 14), and what is wrong with each, a Series of str."""
    codes, unique = pd.factorize(texts)
    marks, problems = np.zeros((len(unique), len(LABELS)), np.int8), []
    for row, text in enumerate(unique):
        names = text.split("|")
        unknown = [name for name in names if name not in LABELS and name != NO_FINDING]
        problem = f"{NO_FINDING!r} beside a finding: {text}" if NO_FINDING in names and len(set(names)) > 1 else ""
        if unknown:
            problem = f"{unknown[0]!r} is neither a finding of ChestX-ray14 nor {NO_FINDING!r}"
        marks[row], problems = [label in names for label in LABELS], [*problems, problem]
    return marks[codes], pd.Series(np.array(problems, object)[codes], dtype=object)


def find_lists(folder):
    """Return the paths of the official lists in a folder, by "train_val" and "test"; only those that exist."""
    paths = {part: [folder / name for name in names if (folder / name).is_file()] for part, names in LISTS.items()}
    return {part: found[0] for part, found in paths.items() if found}


def read_lists(folder, ids):
    """Return the official list of each of `ids`, "train_val", "test" or "" (neither), str (N,), and facts of the lists.

    Facts: train_val and test, each with file, sha256, names (`names_digest`), images, patients and absent (names that
    `ids` lacks); official, whether DIGESTS has the names of both; said, that in one line. Raises InputError for a list
    that is missing, empty or not text, for an unusable or repeated name, and for an image in both.
    """
    paths, about, found = find_lists(folder), {}, np.full(len(ids), "", object)
    index, listed = pd.Index(ids), {}
    for part, names in LISTS.items():
        if part not in paths:
            raise InputError(f"{folder}: no {names[0]}; --split all trains without the official lists")
        listed[part] = stems(read_names(paths[part], index))
        place = index.get_indexer(listed[part])
        found[place[place >= 0]] = part
        about[part] = {"file": paths[part].name, "sha256": file_hash(paths[part]), "names": names_digest(listed[part])}
        patients = listed[part].str.split("_").str[0].nunique()
        about[part] |= {"images": len(listed[part]), "patients": int(patients), "absent": int((place < 0).sum())}
    both = listed["test"][listed["test"].isin(listed["train_val"])]
    if len(both):
        files = " and ".join(path.name for path in paths.values())
        raise InputError(f"{folder}: {len(both)} images are in both {files}, such as {both.iloc[0]}")
    about["official"] = all(about[part]["names"] == DIGESTS[part] for part in LISTS)
    state = "the official lists, verified by the hash of their names"
    if not about["official"]:
        state = "not the whole official lists (86,524 images of 28,008 patients and 25,596 of 2,797); scores are not "
        state += "the benchmark's"
    texts = [
        f"{each['file']} ({each['images']:,} images of {each['patients']:,} patients, sha256 {each['sha256'][:12]})"
        for each in map(about.get, LISTS)
    ]
    about["said"] = f"{' and '.join(texts)}: {state}"
    return found.astype(str), about


def names_digest(image_ids):
    """Return the SHA-256, in hex, of image ids in sorted order, one per line: the same for any order or suffix."""
    return hashlib.sha256("\n".join(sorted(image_ids)).encode()).hexdigest()


def read_names(path, known=()):
    """Return the names of images in a list, see `read_list`, a Series of str; raise InputError naming the row."""
    names = read_list(path, known=known).iloc[:, 0]
    check_ids(stems(names), path)
    return names


def read_boxes(path):
    """Return a box table: image_id, label (0 … 13), x_min, y_min, x_max, y_max (pixels of the 1024 × 1024 image).

    NIH's header may end in empty columns. A table with image_id, class, x_min, y_min, x_max and y_max (ChestX-Det's) is
    read too; its rows of other findings are left out and counted. Raises InputError naming file and row.
    """
    header, *rows = read_rows(path)
    corners = {"image_id", "class", *BOX} <= set(header)
    nih = header[:6] == list(_BOX_COLUMNS) and not any(header[6:])
    if not nih and not corners:
        raise InputError(f"{path}, row 1: the header must be {','.join(_BOX_COLUMNS)}: {','.join(header)[:200]}")
    if not rows:
        raise InputError(f"{path}: no rows under its header")
    places = [header.index(name) for name in ["image_id", "class", *BOX]] if corners else range(6)
    for number, row in enumerate(rows, 2):
        if len(row) <= max(places):
            raise InputError(f"{path}, row {number}: {len(row)} values where the header has {len(header)} columns")
    columns = ["image", "name", "x", "y", "w", "h"]
    table = pd.DataFrame([[row[place] for place in places] for row in rows], columns=columns, dtype=str)
    if corners:
        table["name"] = table["name"].str.replace(" ", "_")
        known = table["name"].isin(LABELS)
        log.info(f"{path}: left out {(~known).sum():,} of {len(table):,} rows, which are of none of the 14 findings")
        table = table[known]
    ids = stems(table["image"])
    for row, image_id in ids.items():
        check_id(image_id, f"{path}, row {row + 2}")
    names = table["name"].replace(_BOX_NAMES)
    x, y, w, h = table[["x", "y", "w", "h"]].apply(pd.to_numeric, errors="coerce").to_numpy(float).T
    box = np.stack([x, y, w, h] if corners else [x, y, x + w, y + h], axis=1)
    finite = np.isfinite(box).all(axis=1)
    beyond = (box.min(axis=1) < 0) | (box.max(axis=1) > BOX_SIDE * (1 + SLACK))
    faults = [
        (~names.isin(LABELS).to_numpy(), "{name!r} is none of the 14 findings"),
        (~finite, "the box {x} {y} {w} {h} is not four finite numbers"),
        (np.isin(np.arange(len(box)), find_normalised(box)), "the box {x} {y} {w} {h} lies in 0 to 1, not in pixels"),
        (finite & ~(box[:, 2:] > box[:, :2]).all(axis=1), "the box {x} {y} {w} {h} has no area"),
        (finite & beyond, f"the box {{x}} {{y}} {{w}} {{h}} leaves the image of {BOX_SIDE} × {BOX_SIDE} pixels"),
    ]
    for wrong, words in faults:
        if wrong.any():
            row = table.index[np.argmax(wrong)]
            raise InputError(f"{path}, row {row + 2} ({ids[row]}): {words.format(**table.loc[row])}")
    boxes = pd.DataFrame({"image_id": ids, "label": names.map(LABELS.index)})
    boxes[BOX] = np.minimum(box, BOX_SIDE)
    return boxes
