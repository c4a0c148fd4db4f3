"""Folds that share no patient and in which every label has the same share."""

import re

import numpy as np
import pandas as pd

from common.errors import InputError, check
from common.paths import atomic_path, escape_formula
from common.submit.table import read_rows

_SIZE_WEIGHT = 2.0  # weight of a fold's size relative to a label: a wrong size shifts every prevalence


def make_folds(labels, n_folds, groups=None, seed=0):
    """Return the fold of each image, int64 (N,) in 0 … n_folds-1, keeping groups together and labels balanced.

    labels: (N,) integer classes, or (N, C) of 0 and 1 for several labels per image; rows without any label count as
    an additional class. groups: (N,) hashable values such as patient ids, or None if every image is its own group.
    No fold is empty, and the order of the rows does not matter. Raises InputError for groups of another shape or with
    missing values, and for fewer groups than folds. Method: groups are sorted by falling share of all labels, so rare
    labels come first, and each group goes to the fold that lacks its labels most (after Sechidis et al. 2011).

    >>> make_folds([0, 0, 1, 1, 0, 0], 2, groups=["a", "a", "b", "c", "d", "e"]).tolist()
    [1, 1, 1, 0, 0, 0]
    """
    return _assign_folds(labels, np.full(n_folds, 1 / n_folds), groups, seed)


def holdout(labels, fraction, groups=None, seed=0):
    """Return bool (N,), True for about `fraction` (0 to 1) of the images, never none or all of them.

    Arguments, guarantees and errors are those of `make_folds`.
    """
    check(0 < fraction < 1, f"fraction must lie between 0 and 1, not {fraction}")
    return _assign_folds(labels, np.array([1 - fraction, fraction]), groups, seed) == 1


def quartile_strata(present, area):
    """Return int64 (N,): 0 for images without a finding, else 1 … 4, the quartile of the area among the others.

    present: bool (N,); area: (N,) in any unit. An area equal to a quartile belongs to the lower stratum.
    """
    quartiles = np.quantile(area[present], [0.25, 0.5, 0.75]) if present.any() else []
    return np.where(present, 1 + np.searchsorted(quartiles, area, side="left"), 0)


def shared_groups(folds, groups):
    """Return the number of images whose group also occurs in another fold.

    folds: (N,) fold numbers, or bool for a holdout; groups: (N,) as in `make_folds`.
    """
    return int(pd.Series(folds).groupby(group_codes(groups, len(folds))).transform("nunique").gt(1).sum())


def save_folds(path, image_ids, folds, groups=None, note=""):
    """Write the CSV `image_id,fold` (and `group`, where given) that `load_folds` reads, atomically.

    note: a comment for the first line, such as the method. Raises InputError on repeated ids.
    """
    table = pd.DataFrame({"image_id": _check_unique(image_ids, path), "fold": folds})
    if groups is not None:
        table["group"] = [escape_formula(group) for group in groups]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(f"# {' '.join(note.split())}\n" if note else "")
        table.to_csv(file, index=False, lineterminator="\n")


def load_folds(path, image_ids):
    """Return the folds of `image_ids`, int64 (N,) in their order, from a CSV written by `save_folds`.

    Raises InputError naming the file and the first id that is missing, unknown, repeated or without a valid fold.
    """
    rows = [[*row, "", ""][:2] for row in read_rows(path)]
    rows = rows[rows[0][0].startswith("#") :]
    check(rows[:1] == [["image_id", "fold"]], f"{path}: the header must begin with image_id,fold")
    table = pd.DataFrame(rows[1:], columns=rows[0], dtype=str)
    known, wanted = _check_unique(table["image_id"], path), _check_unique(image_ids, "the images to load folds for")
    bad = known[~table["fold"].astype(object).map(lambda fold: bool(re.fullmatch("[0-9]{1,9}", str(fold))))]
    missing, extra = wanted[~wanted.isin(known)], known[~known.isin(wanted)]
    for ids, what in ((bad, "without a valid fold"), (missing, "missing"), (extra, "not in the image table")):
        if len(ids):
            raise InputError(f"{path}: {len(ids)} images {what}, the first is {ids[0]!r}")
    return table["fold"].astype("int64").to_numpy()[known.get_indexer(wanted)]


def group_codes(groups, n):
    """Return int64 (n,) that numbers the distinct values of `groups` in the order of their text.

    groups: (n,) hashable values, none missing, or None for n groups of one image. Raises InputError otherwise.
    """
    if groups is None:
        return np.arange(n)
    try:
        codes, values = pd.factorize(pd.Series(groups if hasattr(groups, "dtype") else list(groups)))
    except (TypeError, ValueError) as error:
        raise InputError(f"groups are not usable ({error})") from None
    check(len(codes) == n, f"{len(codes)} groups for {n} images")
    if (codes < 0).any():
        raise InputError(f"row {np.flatnonzero(codes < 0)[0]}: the group is missing")
    return np.argsort(np.argsort([repr(value) for value in values.tolist()]))[codes]


def _label_columns(labels):
    """Return uint8 (N, classes + 1): a 0/1 column for each class that occurs, and a column of ones for the size."""
    labels = np.asarray(labels)
    if labels.ndim == 1:
        columns = labels[:, None] == np.unique(labels)
    else:
        columns = labels.astype(bool)
        columns = np.column_stack([columns, ~columns.any(axis=1)])
        columns = columns[:, columns.any(axis=0)]
    return np.column_stack([columns, np.ones(len(labels), bool)]).astype(np.uint8)


def _assign_folds(labels, shares, groups, seed):
    columns = _label_columns(labels)
    codes = group_codes(groups, len(columns))
    if groups is None:  # images with equal labels are interchangeable: sort, so that the table's order is irrelevant
        codes = np.empty(len(columns), np.int64)
        codes[np.lexsort(columns.T)] = np.arange(len(columns))
    n_groups = codes.max() + 1
    check(n_groups >= len(shares), f"{len(shares)} folds need as many groups, there are {n_groups}")
    vectors = pd.DataFrame(columns).groupby(codes).sum().to_numpy() / columns.sum(axis=0)
    order = np.random.default_rng(seed).permutation(n_groups)
    weight = (vectors**2).sum(axis=1)
    if groups is not None:  # compare powers of two: exact weights rarely tie, so all seeds would give the same order
        weight = np.frexp(weight)[1]
    order = order[np.argsort(-weight[order], kind="stable")]
    vectors[:, -1] *= _SIZE_WEIGHT
    return _place_groups(vectors, order, shares)[codes]


def _place_groups(vectors, order, shares):
    """Assign groups one by one to the fold where Σ (filled − share)² / share grows least; `filled` sums to 1."""
    folds, filled = np.empty(len(vectors), np.int64), np.zeros((len(shares), vectors.shape[1]))
    used = np.zeros(len(shares), bool)
    for place, g in enumerate(order):
        # summed from left to right, as in earlier versions, so that seeds keep their folds
        cost = np.cumsum(vectors[g] * (2 * filled + vectors[g]) / shares[:, None], axis=1)[:, -1]
        if len(order) - place <= np.count_nonzero(~used):
            cost[used] = np.inf  # each empty fold needs one of the groups left
        folds[g] = best = cost.argmin()
        used[best] = True
        filled[best] += vectors[g]
    return folds


def _check_unique(image_ids, where):
    ids = pd.Index([str(image_id) for image_id in image_ids], dtype=object)
    if ids.has_duplicates:
        raise InputError(f"{where}: image {ids[ids.duplicated()][0]!r} appears twice")
    return ids
