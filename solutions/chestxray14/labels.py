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
OLDEST = 120  # years; the first version of the table holds ages up to 414, which are typing errors
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
    """Read the label table: image_id, file_name, patient_id, age, sex, view, follow_up, then the 14 LABELS as int8 0/1.

    image_id is the file's stem, file_name the table's own "Image Index"; age in years (float, NaN where blank; 058Y,
    013M and 025D are read too), follow_up int64. Both versions are read: the sex is "Patient Gender" or "Patient Sex".
    Ages over 120 years are kept as they are: see `possible_age`. Row i is row i + 2 of the file. Raises InputError
    naming file and row: a column that is missing, an unusable or repeated image, no patient, a text that is no known
    label, "No Finding" beside a finding, an age or follow-up that is no number.
    """
    raw = some_rows(path)
    table = raw.rename(columns=COLUMNS)
    for name in ("file_name", "labels", "patient_id", "age", "sex", "view", "follow_up"):
        if name not in table:
            wanted = " or ".join(column for column, ours in COLUMNS.items() if ours == name)
            raise InputError(f"{path}, row 1: no column {wanted}")
    image_id = stems(table["file_name"])
    for row, name in image_id.items():
        check_id(name, f"{path}, row {row + 2}")
    marks, problems = parse_findings(table["labels"])
    age = table["age"].str.upper().str.extract(r"^(\d+(?:\.\d+)?)([YMD]?)$")
    faults = [
        (image_id.duplicated(), "this image is there twice"),
        (problems != "", None),
        (table["patient_id"] == "", "no Patient ID"),
        ((table["age"] != "") & age[0].isna(), "the age {age!r} is no number of years (or 013M, 025D)"),
        (~table["follow_up"].str.fullmatch(r"\d{1,9}"), "the follow-up {follow_up!r} is no whole number"),
        (~table["sex"].isin(["M", "F", ""]), "the sex {sex!r} is neither M nor F"),
        (~table["view"].isin(["PA", "AP", ""]), "the view {view!r} is neither PA nor AP"),
    ]
    for wrong, words in faults:
        if wrong.any():
            row = int(wrong.idxmax())
            words = problems[row] if words is None else words.format(**table.loc[row])
            raise InputError(f"{path}, row {row + 2} ({image_id[row]}): {words}")
    about = pd.DataFrame(
        {
            "image_id": image_id,
            "file_name": table["file_name"],
            "patient_id": plain_patient(table["patient_id"]),
            "age": age[0].astype(float) * age[1].map(_YEARS).astype(float),
            "sex": table["sex"],
            "view": table["view"],
            "follow_up": table["follow_up"].astype("int64"),
        }
    )
    return pd.concat([about, pd.DataFrame(marks, columns=list(LABELS))], axis=1)


def possible_age(age):
    """Ages (years) without those over 120, which become NaN; returns them and the number of those."""
    odd = age > OLDEST
    return age.mask(odd), int(odd.sum())


def stems(names):
    """Names of image files (a Series of str) without their suffix, where they have one."""
    return names.str.replace(r"(?i)\.(png|jpe?g|dcm|dicom)$", "", regex=True)


def plain_patient(patients):
    """Patients' numbers (a Series of str) without zeros in front; other texts stay as they are."""
    return patients.str.replace(r"^0+(?=\d+$)", "", regex=True)


def patient_of(image_ids):
    """The patient in NIH's image names (a Series of ids such as 00000013_004), "" in others."""
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
    """Paths of the two official lists in a folder by "train_val" and "test"; those that are there."""
    found = {}
    for part, (names, _, _) in LISTS.items():
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is not None:
            found[part] = path
    return found


def read_lists(folder, ids):
    """Read the official lists: for each of `ids` "train_val", "test" or "" (in neither), and what the lists are.

    Returns str (N,) and a dict: train_val and test, each with file, sha256, names (`names_digest`), images, patients
    and absent (names that `ids` lacks); whole, True where both have the official numbers of images and patients, which
    other lists can have too; official, True where DIGESTS has the names of both; said, that in one line.
    Raises InputError for a list that is missing, empty or no text, for an unusable or repeated name, and for an image
    in both.
    """
    paths, about, found = find_lists(folder), {}, np.full(len(ids), "", object)
    index, named = pd.Index(ids), {}
    for part, (names, _, _) in LISTS.items():
        if part not in paths:
            raise InputError(f"{folder}: no {names[0]}; --split all trains without the official lists")
        named[part] = listed = stems(read_names(paths[part]))
        place = index.get_indexer(listed)
        found[place[place >= 0]] = part
        patients = int(listed.str.split("_").str[0].nunique())
        about[part] = {
            "file": paths[part].name,
            "sha256": file_hash(paths[part]),
            "names": names_digest(listed),
            "images": len(listed),
            "patients": patients,
            "absent": int((place < 0).sum()),
        }
    both = named["test"][named["test"].isin(named["train_val"])]
    if len(both):
        files = " and ".join(path.name for path in paths.values())
        raise InputError(f"{folder}: {len(both)} images are in both {files}, such as {both.iloc[0]}")
    about["whole"] = all(
        (about[part]["images"], about[part]["patients"]) == (images, patients)
        for part, (_, images, patients) in LISTS.items()
    )
    about["official"] = about["whole"] and all(about[part]["names"] == DIGESTS[part] for part in LISTS)
    if about["official"]:
        standing = "the official lists, verified by the hash of their names"
    elif about["whole"]:
        standing = "of the official size, " + (
            "but with other names than the official lists" if all(DIGESTS.values()) else "not verified by a hash"
        )
    else:
        standing = (
            "not the whole official lists (86,524 images of 28,008 patients and 25,596 of 2,797); scores are "
            "not the benchmark's"
        )
    shown = [
        f"{each['file']} ({each['images']:,} images of {each['patients']:,} patients, sha256 {each['sha256'][:12]})"
        for each in map(about.get, LISTS)
    ]
    about["said"] = f"{' and '.join(shown)}: {standing}"
    return found.astype(str), about


def names_digest(image_ids):
    """SHA-256, as hex, of image ids in sorted order, one a line: what files of any order or suffix have in common."""
    return hashlib.sha256("\n".join(sorted(image_ids)).encode()).hexdigest()


def read_names(path):
    """Names of images in a list, one a line, as they stand there, a Series of str.

    Raises InputError naming file and line: no text, no image, an unusable or repeated one.
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
    """Read the box table: image_id, label (0 … 13), x_min, y_min, x_max, y_max (pixels of the 1024 × 1024 image).

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
