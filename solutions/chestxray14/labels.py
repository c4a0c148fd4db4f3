"""NIH's tables and lists as they are given: labels, the official split, boxes."""

import hashlib
import re

import numpy as np
import pandas as pd

from common.config import file_hash
from common.data.tables import some_rows
from common.errors import InputError
from common.paths import check_id
from common.post.boxes import BOX, SLACK
from solutions.chestxray14.config import BOX_SIDE, LABELS, NO_FINDING

TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")  # the benchmark's, and NIH's correction of it
BOXES = ("BBox_List_2017.csv", "BBox_List_2017_Official_NIH.csv")
# Names of the lists in NIH's and Kaggle's folders, and the official ones' numbers of images and patients.
LISTS = {
    "train_val": (("train_val_list.txt", "train_val_list_NIH.txt"), 86_524, 28_008),
    "test": (("test_list.txt", "test_list_NIH.txt"), 25_596, 2_797),
}
# `names_digest` of the official lists. Empty: no copy that could be trusted was at hand, so no list is called official.
DIGESTS = {"train_val": "", "test": ""}
COLUMNS = {
    "Image Index": "file_name",
    "Finding Labels": "labels",
    "Follow-up #": "follow_up",
    "Patient ID": "patient_id",
    "Patient Age": "age",
    "Patient Gender": "sex",
    "Patient Sex": "sex",
    "View Position": "view",
}
_BOX_COLUMNS = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")
_BOX_NAMES = {"Infiltrate": "Infiltration"}  # of the box table alone
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "D": 1 / 365.25}


def read_labels(path):
    """Return the label table: image_id, file_name, patient_id, age, sex, view, follow_up and the 14 LABELS, int8 0/1.

    image_id is the file's stem; age in years (float, NaN where blank; 058Y, 013M and 025D are read too), follow_up
    int64. Both versions are read: the sex is "Patient Gender" or "Patient Sex". Row i is row i + 2 of the file. Raises
    InputError naming file and row: a missing column, an unusable or repeated image, no patient, an unknown label, "No
    Finding" beside a finding, an age or follow-up that is not a number.
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
    age = table["age"].str.upper().str.extract(r"^(\d+(?:\.\d+)?)([YMD]?)$")
    faults = [
        (table["image_id"].duplicated(), "this image is there twice"),
        (table["problem"] != "", "{problem}"),
        (table["patient_id"] == "", "no Patient ID"),
        ((table["age"] != "") & age[0].isna(), "the age {age!r} is not a number of years (or 013M, 025D)"),
        (~table["follow_up"].str.fullmatch(r"\d{1,9}"), "the follow-up {follow_up!r} is not a whole number"),
        (~table["sex"].isin(["M", "F", ""]), "the sex {sex!r} is neither M nor F"),
        (~table["view"].isin(["PA", "AP", ""]), "the view {view!r} is neither PA nor AP"),
    ]
    for wrong, text in faults:
        for row in np.flatnonzero(wrong)[:1]:
            raise InputError(f"{path}, row {row + 2} ({table['image_id'][row]}): {text.format(**table.loc[row])}")
    table["patient_id"] = plain_patient(table["patient_id"])
    table["age"] = age[0].astype(float) * age[1].map(_YEARS).astype(float)
    table = table.astype({"follow_up": "int64"})
    columns = ["image_id", "file_name", "patient_id", "age", "sex", "view", "follow_up"]
    return pd.concat([table[columns], pd.DataFrame(marks, columns=list(LABELS))], axis=1)


def stems(names):
    """Return names of image files (a Series of str) without their suffix."""
    return names.str.replace(r"(?i)\.(png|jpe?g|dcm|dicom)$", "", regex=True)


def plain_patient(patients):
    """Return patients (a Series of str) without leading zeros where they are numbers."""
    return patients.str.replace(r"^0+(?=\d+$)", "", regex=True)


def patient_of(image_ids):
    """Return the patients of NIH's image ids (a Series such as 00000013_004), "" for other ids."""
    return plain_patient(image_ids.str.extract(r"^(\d{8})_\d{3}$")[0].fillna(""))


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
    paths = {
        part: [folder / name for name in names if (folder / name).is_file()] for part, (names, *_) in LISTS.items()
    }
    return {part: found[0] for part, found in paths.items() if found}


def read_lists(folder, ids):
    """Return the official list of each of `ids`, "train_val", "test" or "" (neither), str (N,), and facts of the lists.

    Facts: train_val and test, each with file, sha256, names (`names_digest`), images, patients and absent (names that
    `ids` lacks); whole, whether both have the official numbers of images and patients, which other lists can have too;
    official, whether DIGESTS has the names of both; said, that in one line. Raises InputError for a list that is
    missing, empty or not text, for an unusable or repeated name, and for an image in both.
    """
    paths, about, found = find_lists(folder), {}, np.full(len(ids), "", object)
    index, listed = pd.Index(ids), {}
    for part, (names, _, _) in LISTS.items():
        if part not in paths:
            raise InputError(f"{folder}: no {names[0]}; --split all trains without the official lists")
        listed[part] = stems(read_names(paths[part]))
        place = index.get_indexer(listed[part])
        found[place[place >= 0]] = part
        about[part] = {
            "file": paths[part].name,
            "sha256": file_hash(paths[part]),
            "names": names_digest(listed[part]),
            "images": len(listed[part]),
            "patients": int(listed[part].str.split("_").str[0].nunique()),
            "absent": int((place < 0).sum()),
        }
    both = listed["test"][listed["test"].isin(listed["train_val"])]
    if len(both):
        files = " and ".join(path.name for path in paths.values())
        raise InputError(f"{folder}: {len(both)} images are in both {files}, such as {both.iloc[0]}")
    sizes = {part: (about[part]["images"], about[part]["patients"]) for part in LISTS}
    about["whole"] = all(sizes[part] == (images, patients) for part, (_, images, patients) in LISTS.items())
    about["official"] = about["whole"] and all(about[part]["names"] == DIGESTS[part] for part in LISTS)
    if about["official"]:
        state = "the official lists, verified by the hash of their names"
    elif about["whole"] and all(DIGESTS.values()):
        state = "of the official size, but with other names than the official lists"
    elif about["whole"]:
        state = "of the official size, not verified by a hash"
    else:
        state = (
            "not the whole official lists (86,524 images of 28,008 patients and 25,596 of 2,797); scores are not the "
        )
        state += "benchmark's"
    texts = [
        f"{each['file']} ({each['images']:,} images of {each['patients']:,} patients, sha256 {each['sha256'][:12]})"
        for each in map(about.get, LISTS)
    ]
    about["said"] = f"{' and '.join(texts)}: {state}"
    return found.astype(str), about


def names_digest(image_ids):
    """Return the SHA-256, in hex, of image ids in sorted order, one per line: the same for any order or suffix."""
    return hashlib.sha256("\n".join(sorted(image_ids)).encode()).hexdigest()


def read_names(path):
    """Return the names of images in a list, one per line, a Series of str.

    Raises InputError naming file and line: not text, no image, an unusable or repeated one.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable list ({error})") from None
    names = pd.Series(lines, dtype=str).str.strip()
    names = names[names != ""]
    if not len(names):
        raise InputError(f"{path}: no image in it")
    ids = stems(names)
    for row, name in ids.items():
        check_id(name, f"{path}, line {row + 1}")
    twice = ids.duplicated()
    if twice.any():
        raise InputError(f"{path}, line {twice.idxmax() + 1}: {ids[twice.idxmax()]} is there twice")
    return names


def read_boxes(path):
    """Return the box table: image_id, label (0 … 13), x_min, y_min, x_max, y_max (pixels of the 1024 × 1024 image).

    The header may end in empty columns. Raises InputError naming file and row: another header, no row, an unusable
    image, a label that is none of the 14, a box that is not four finite numbers, has no area or leaves the image.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable CSV ({' '.join(str(error).split())})") from None
    header = [name.strip() for name in table.columns]
    if header[:6] != list(_BOX_COLUMNS) or any(not re.fullmatch(r"(Unnamed: \d+)?", name) for name in header[6:]):
        raise InputError(f"{path}, row 1: the header must be {','.join(_BOX_COLUMNS)}: {','.join(header)[:200]}")
    if not len(table):
        raise InputError(f"{path}: no rows under its header")
    table = table.iloc[:, :6].set_axis(["image", "name", "x", "y", "w", "h"], axis=1).apply(lambda c: c.str.strip())
    ids = stems(table["image"])
    for row, image_id in ids.items():
        check_id(image_id, f"{path}, row {row + 2}")
    names = table["name"].replace(_BOX_NAMES)
    x, y, w, h = table[["x", "y", "w", "h"]].apply(pd.to_numeric, errors="coerce").to_numpy(float).T
    box = np.stack([x, y, x + w, y + h], axis=1)
    finite = np.isfinite(box).all(axis=1)
    faults = [
        (~names.isin(LABELS).to_numpy(), "{name!r} is none of the 14 findings"),
        (~finite, "the box {x} {y} {w} {h} is not four finite numbers"),
        (finite & ~((w > 0) & (h > 0)), "the box {x} {y} {w} {h} has no area"),
        (
            finite & ((box.min(axis=1) < 0) | (box.max(axis=1) > BOX_SIDE * (1 + SLACK))),
            f"the box {{x}} {{y}} {{w}} {{h}} leaves the image of {BOX_SIDE} × {BOX_SIDE} pixels",
        ),
    ]
    for wrong, words in faults:
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(f"{path}, row {row + 2} ({ids[row]}): {words.format(**table.loc[row])}")
    boxes = pd.DataFrame({"image_id": ids, "label": names.map(LABELS.index)})
    boxes[BOX] = np.minimum(box, BOX_SIDE)
    return boxes
