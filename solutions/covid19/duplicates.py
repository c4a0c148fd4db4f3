"""Images that are in the collections twice, found by a perceptual hash."""

import imagehash
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.errors import InputError

SIDE = 16  # of the hash: 256 bits
BLOCK = 1024  # images compared with all others at a time


def find_duplicates(images, share, rows=None):
    """Pairs of images whose hashes differ in at most `share` of the bits: a frame of a, b and distance (share of bits).

    images: uint8 squares, (N, S, S) or an iterable of (S, S). rows: the whole numbers they go by; None: 0 … N - 1. The
    hash is `imagehash.phash`, which keeps whether each of the lowest 16 × 16 frequencies is above their median.
    Raises InputError where rows and images differ in number.
    """
    bits = [imagehash.phash(Image.fromarray(np.asarray(image)), SIDE).hash.ravel() for image in images]
    rows = np.arange(len(bits)) if rows is None else np.asarray(rows)
    if len(rows) != len(bits):
        raise InputError(f"{len(rows)} rows for {len(bits)} images")
    signs = 1 - 2 * np.array(bits, np.float32).reshape(-1, SIDE**2)
    found = [np.zeros((0, 3))]
    for start in range(0, len(signs), BLOCK):
        distance = (1 - signs[start : start + BLOCK] @ signs.T / SIDE**2) / 2  # exact: sums of up to 256 ones
        a, b = np.nonzero(distance <= share)
        later = a + start < b
        a, b = a[later], b[later]
        found.append(np.stack([rows[a + start], rows[b], distance[a, b]], axis=1))
    pairs = pd.DataFrame(np.concatenate(found), columns=["a", "b", "distance"])
    return pairs.astype({"a": "int64", "b": "int64"})


def drop_duplicates(table, pairs):
    """A copy of `select`'s table without the images that are there twice, given pairs of its index (a, b).

    Of each group of linked images the first stays, in the table's order but home collections before others; a group
    whose images disagree about COVID-19 goes whole. The patients of a group become one, in all their rows: the first
    of their patient_ids in alphabetical order. Raises InputError for a pair that is not in the table.
    """
    table = table.copy()
    pairs = pairs[["a", "b"]]
    for row in pairs.to_numpy().ravel():
        if row not in table.index:
            raise InputError(f"row {row} of a pair is not in the table")
    for group in _groups(pairs["a"], pairs["b"]):
        rows = table.loc[table.index.isin(group)].sort_values("home", ascending=False, kind="stable")
        rows = rows[rows["kept"]]
        if rows["label"].nunique() > 1:
            dropped, reason = rows.index, "same image with another label"
        else:
            dropped, first = rows.index[1:], rows.iloc[:1]
            reason = "".join(f"same image as {row.image_id} ({row.collection})" for row in first.itertuples())
        table.loc[dropped, "reason"], table.loc[dropped, "kept"] = reason, False
    patients = table["patient_id"]
    linked = _groups(patients.loc[pairs["a"]], patients.loc[pairs["b"]])
    table["patient_id"] = patients.replace({name: min(group) for group in linked for name in group})
    return table


def _groups(a, b):
    """Lists of what is linked, each with two or more members, given both ends of each link."""
    if not len(a):
        return []
    codes, names = pd.factorize(np.concatenate([np.asarray(a), np.asarray(b)]))
    first, second = codes[: len(a)], codes[len(a) :]
    links = coo_array((np.ones(len(first)), (first, second)), shape=(len(names), len(names)))
    of = connected_components(links, directed=False)[1]
    groups = [names[of == number].tolist() for number in range(of.max() + 1)]
    return [group for group in groups if len(group) > 1]
