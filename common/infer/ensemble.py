"""Averages of stored predictions: tables of probabilities and files of masks."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from common.errors import InputError
from common.infer.predict import write_masks


def mean_tables(tables, weights=None, by_rank=False):
    """Return one table of probabilities from several: `image_id, fold` and one column a class.

    tables: data frames over the same images, in any row order; the result keeps the first one's rows and columns.
    weights: one number a table, not negative; equal by default. by_rank: average (rank − ½) / n within each column,
    ties sharing their mean rank, where models differ in calibration; only the order of the result then has a meaning.
    `fold` stays where all agree, else it is −1. Raises InputError when ids or columns disagree.
    """
    tables = list(tables)
    weights, first = _weights(weights, len(tables)), tables[0]
    columns = [name for name in first.columns if name not in ("image_id", "fold")]
    total = np.zeros((len(first), len(columns)))
    fold = first["fold"].to_numpy() if "fold" in first else None
    for number, (table, weight) in enumerate(zip(tables, weights, strict=True), 1):
        if "image_id" not in table or set(table.columns) != set(first.columns):
            raise InputError(f"table {number}: columns {list(table.columns)}, the first has {list(first.columns)}")
        if table["image_id"].duplicated().any():
            raise InputError(
                f"table {number}: image {table['image_id'][table['image_id'].duplicated()].iloc[0]!r} twice"
            )
        odd = set(table["image_id"]) ^ set(first["image_id"])
        if odd:
            raise InputError(f"table {number}: image {min(odd)!r} is in only one of this table and the first")
        table = table.set_index("image_id").loc[first["image_id"]]
        values = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
        if not np.isfinite(values).all():
            raise InputError(
                f"table {number}: image {table.index[~np.isfinite(values).all(1)][0]!r} has a cell without a number"
            )
        total += weight * ((rankdata(values, axis=0) - 0.5) / len(values) if by_rank else values)
        if fold is not None:
            fold = np.where(fold == table["fold"].to_numpy(), fold, -1)
    out = first[["image_id"]].reset_index(drop=True)
    if fold is not None:
        out["fold"] = fold
    return pd.concat([out, pd.DataFrame(total, columns=columns)], axis=1)


def mean_masks(masks, ids, out_path, weights=None, chunk=8):
    """Write the weighted mean of mask files to the `.npy` file `out_path` and return it memory-mapped, uint8.

    masks: uint8 (n, h, w) arrays or paths of `.npy` files. ids: the image ids of each, which must agree in order too.
    Halves round up. `chunk` images are in memory at a time. Raises InputError for ids or shapes that disagree.
    """
    masks, ids = [_open(m) if isinstance(m, str | Path) else m for m in masks], [list(names) for names in ids]
    weights, first = _weights(weights, len(masks)), masks[0]
    for number, (mask, names) in enumerate(zip(masks, ids, strict=True), 1):
        if mask.dtype != np.uint8 or mask.shape != first.shape or len(names) != len(mask):
            raise InputError(f"masks {number}: {mask.dtype} {mask.shape} of {len(names)} ids, not uint8 {first.shape}")
        if names != ids[0]:
            row = next(i for i, pair in enumerate(zip(names, ids[0], strict=True)) if pair[0] != pair[1])
            raise InputError(f"masks {number}: row {row} is {names[row]!r}, in the first it is {ids[0][row]!r}")

    def blocks():
        for start in range(0, len(first), chunk):
            parts = (w * mask[start : start + chunk] for w, mask in zip(weights, masks, strict=True))
            yield np.floor(sum(parts) + (0.5 + 1e-9)).astype(np.uint8)  # 1e-9: a half may be computed slightly too low

    return write_masks(out_path, first.shape, blocks())


def _open(path):
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable .npy file ({error})") from None


def _weights(weights, n):
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if n == 0 or weights.shape != (n,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum():
        raise InputError(f"weights {weights.tolist()} for {n} inputs: one each, not negative, not all zero")
    return weights / weights.sum()
