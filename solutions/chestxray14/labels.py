"""Read NIH's own files: label tables, the lists of the official split, and boxes."""

import hashlib

import numpy as np
import pandas as pd

from common.config import file_hash
from common.data.tables import check_ids, plain_patients, read_list, refuse_faults, some_rows
from common.errors import InputError, check, log
from common.paths import strip_suffix
from common.post.boxes import BOX, SLACK, find_normalised
from common.submit.table import read_rows
from solutions.chestxray14.config import BOX_SIDE, LABELS, NO_FINDING

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
COLUMNS = {"Image Index": "file_name", "Finding Labels": "labels", "Patient ID": "patient_id"}
GROUPS = ("sex", "age", "view")  # columns about patient and film, for subgroups
AGES = ["under 40", "40 to 59", "60 and over"]
_BOX_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")
_BOX_NAMES = {"Infiltrate": "Infiltration"}  # a spelling of the box table only


def read_labels(path, needs_patients=True):
    """Return the label table: image_id, file_name, patient_id, GROUPS and the 14 LABELS, int8 0/1.

    Reads both releases. GROUPS: F or M, one of AGES, AP or PA; "" where the table does not say. Raises InputError
    naming file and row for a missing column, an unusable or repeated image id, a missing patient, an unknown label, or
    "No Finding" beside a finding.
    """
    raw = some_rows(path)
    for name in COLUMNS if needs_patients else [*COLUMNS][:2]:
        check(name in raw, f"{path}, row 1: no column {name}")
    table = raw.filter([*COLUMNS]).rename(columns=COLUMNS)
    table.insert(0, "image_id", table["file_name"].map(strip_suffix))
    check_ids(table["image_id"], path)
    marks, problems = parse_findings(table["labels"])
    if "patient_id" in table:
        problems = problems.mask((problems == "") & (table["patient_id"] == ""), "no Patient ID")
        table["patient_id"] = plain_patients(table["patient_id"])
    for row in np.flatnonzero(problems != "")[:1]:
        raise InputError(f"{path}, row {row + 2} ({table['image_id'][row]}): {problems[row]}")
    years = pd.to_numeric(raw.get("Patient Age", blank := pd.Series("", raw.index)).str.extract(r"(\d+)")[0])
    ages = pd.cut(years, [0, 40, 60, 120], right=False, labels=AGES).astype(object).fillna("")
    sex = raw.get("Patient Gender", raw.get("Patient Sex", blank))  # the corrected table's name
    table = table.drop(columns="labels").assign(sex=sex, age=ages, view=raw.get("View Position", blank))
    return table.join(pd.DataFrame(marks, columns=list(LABELS)))


def patient_of(image_ids):
    """Return the patient of each NIH image id (a Series of ids such as 00000013_004), "" for other ids."""
    return plain_patients(image_ids.str.extract(r"^(\d{8})_\d{3}$")[0].fillna(""))


def parse_findings(texts):
    """Return labels, int8 (N, 14), of texts such as "Mass|Nodule", and each text's problem ("" if none), a Series."""
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
    """Return the list that each of `ids` is in, str (N,) of "train_val", "test" or "" (neither), and facts about both.

    The facts: official, whether both are the whole official lists by DIGESTS; said, one line of text. Raises InputError
    for a list that is missing, empty or not text, an unusable or repeated name, and an image that is in both lists.
    """
    paths, index, found, listed, texts = find_lists(folder), pd.Index(ids), np.full(len(ids), "", object), {}, []
    for part, names in LISTS.items():
        check(part in paths, f"{folder}: no {names[0]}; --split all trains without the official lists")
        path, listed[part] = paths[part], read_list(paths[part], known=index).iloc[:, 0].map(strip_suffix)
        check_ids(listed[part], path)
        place = index.get_indexer(listed[part])
        found[place[place >= 0]] = part
        if (place < 0).any():
            log.info(f"{path}: {(place < 0).sum():,} of its images are not in the label table")
        patients = listed[part].str.split("_").str[0].nunique()
        size = f"{len(place):,} images of {patients:,} patients"
        texts.append(f"{path.name} ({size}, sha256 {file_hash(path)[:12]})")
    both = listed["test"][listed["test"].isin(listed["train_val"])]
    if len(both):
        files = " and ".join(path.name for path in paths.values())
        raise InputError(f"{folder}: {len(both)} images are in both {files}, such as {both.iloc[0]}")
    official = all(names_digest(listed[part]) == DIGESTS[part] for part in LISTS)
    state = "the official lists, verified by the hash of their names"
    if not official:
        whole = "not the whole official lists (86,524 images of 28,008 patients and 25,596 of 2,797)"
        state = f"{whole}, so scores cannot be compared with the benchmark's"
    return found.astype(str), {"official": official, "said": f"{' and '.join(texts)}: {state}"}


def names_digest(image_ids):
    """Return the SHA-256, in hex, of image ids, one per line and sorted, so that their order does not matter."""
    return hashlib.sha256("\n".join(sorted(image_ids)).encode()).hexdigest()


def read_boxes(path):
    """Return a box table: image_id, label (0 … 13), x_min, y_min, x_max, y_max (pixels of the 1024 × 1024 image).

    NIH's header may end in empty columns. Tables with image_id, class, x_min, y_min, x_max and y_max (ChestX-Det) are
    read too; their rows for other findings are left out and counted. Raises InputError naming file and row.
    """
    header, *rows = read_rows(path)
    corners = {"image_id", "class", *BOX} <= set(header)
    if not corners and (header[:6] != list(_BOX_COLUMNS) or any(header[6:])):
        raise InputError(f"{path}, row 1: the header must be {','.join(_BOX_COLUMNS)}: {','.join(header)[:200]}")
    check(rows, f"{path}: no rows under its header")
    places = [header.index(name) for name in ["image_id", "class", *BOX]] if corners else range(6)
    for number, row in enumerate(rows, 2):
        if len(row) <= max(places):
            raise InputError(f"{path}, row {number}: {len(row)} values where the header has {len(header)} columns")
    cells = [[row[place] for place in places] for row in rows]
    table = pd.DataFrame(cells, columns=["image", "name", "x", "y", "w", "h"], dtype=str)
    if corners:
        table["name"] = table["name"].str.replace(" ", "_")
        known = table["name"].isin(LABELS)
        log.info(f"{path}: left out {(~known).sum():,} of {len(table):,} rows, which are of none of the 14 findings")
        table = table[known]
    table, names = table.assign(image=table["image"].map(strip_suffix)), table["name"].replace(_BOX_NAMES)
    check_ids(table["image"].drop_duplicates(), path)
    box = table[["x", "y", "w", "h"]].apply(pd.to_numeric, errors="coerce").to_numpy(float, copy=True)
    box[:, 2:] += 0 if corners else box[:, :2]
    finite = np.isfinite(box).all(axis=1)
    beyond = (box.min(axis=1) < 0) | (box.max(axis=1) > BOX_SIDE * (1 + SLACK))
    faults = [
        (~names.isin(LABELS).to_numpy(), "{name!r} is none of the 14 findings"),
        (~finite, "the box {box} is not four finite numbers"),
        (np.isin(np.arange(len(box)), find_normalised(box)), "the box {box} lies in 0 to 1, not in pixels"),
        (finite & ~(box[:, 2:] > box[:, :2]).all(axis=1), "the box {box} has no area"),
        (finite & beyond, f"the box {{box}} leaves the image of {BOX_SIDE} × {BOX_SIDE} pixels"),
    ]
    refuse_faults(path, table, faults, "image", ["x", "y", "w", "h"])
    boxes = pd.DataFrame({"image_id": table["image"], "label": names.map(LABELS.index)})
    boxes[BOX] = np.minimum(box, BOX_SIDE)
    return boxes
