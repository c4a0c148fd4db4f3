"""Width and height of the originals, in whose pixels boxes are given: from tables, runs or the images themselves."""

import logging

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.data.dicom import read_header
from common.data.tables import some_rows
from common.errors import InputError
from common.paths import find_images, read_parquet

log = logging.getLogger(__name__)
SIZES = ["image_id", "width", "height"]
_SHAPE = ["image_id", "dim1", "dim0"]  # as tables of resized copies have it: the shape of the pixel array


def read_sizes(paths, ids):
    """Return image_id, width and height (int64, pixels) of `ids`, in their order.

    paths: CSV files, folders of runs, or folders of images. A CSV has image_id, width and height, or image_id, dim0
    (height) and dim1 (width), and may have other columns; an image may occur in several rows if they agree. Raises
    InputError naming file and row for other columns, sizes that are no whole positive numbers, rows that disagree,
    and images without a size.
    """
    table = pd.concat([_read(path, ids).assign(path=str(path)) for path in paths], ignore_index=True)
    first = table.drop_duplicates("image_id").set_index("image_id")
    before = first.loc[table["image_id"], SIZES[1:]].to_numpy()
    for k in np.flatnonzero((before != table[SIZES[1:]].to_numpy()).any(axis=1))[:1]:
        row = table.loc[k]
        now, then = f"{row['width']} × {row['height']}", " × ".join(map(str, before[k]))
        raise InputError(f"{row['path']}, {row['where']}: {now} pixels, where another row of this image says {then}")
    for image_id in pd.Index(ids).difference(first.index, sort=False)[:1]:
        places = ", ".join(map(str, paths))
        raise InputError(f"{places}: no width and height, in pixels, of image {image_id}")
    return first.loc[list(ids), SIZES[1:]].reset_index(names="image_id")


def tell_copies(own, originals):
    """Say how many files hold other pixels than their original had; both tables have image_id, width and height."""
    mine, full = (table[SIZES[1:]].to_numpy(np.float64) for table in (own, originals))
    copies = np.flatnonzero((mine != full).any(axis=1))
    # a copy that keeps the proportions has at least one side rounded to a whole pixel
    kept = (abs(mine[copies, ::-1] * full[copies] / full[copies, ::-1] - mine[copies]) <= 1).any(axis=1)
    if len(copies):
        k = copies[0]
        (width, height), (w, h) = full[k].astype(int), mine[k].astype(int)
        log.info(
            f"--sizes: {len(copies)} of {len(own)} images are copies of other pixels than the originals, "
            f"{(~kept).sum()} of them in other proportions (taken as stretched, not cut or padded); the first: "
            f"{own['image_id'].iloc[k]}, {w} × {h} for {width} × {height}"
        )


def _read(path, ids):
    """What one of the paths knows: SIZES and `where`, the words that name a row."""
    if not path.is_dir():
        return _read_csv(path)
    if (path / "images.parquet").is_file():
        table = read_parquet(path / "images.parquet")
        if not set(SIZES) <= set(table.columns):
            raise InputError(f"{path}: its images.parquet has no sizes; is it a run of another solution?")
        table = table[SIZES]
    else:
        files = find_images(path)
        with tqdm([files[name] for name in ids if name in files], desc="sizes", unit="image", leave=False) as bar:
            table = pd.DataFrame([read_header(file) | {"image_id": file.stem} for file in bar], columns=SIZES)
    return table.assign(where="image " + table["image_id"].astype(str))


def _read_csv(path):
    table = some_rows(path)
    columns = next((names for names in (SIZES, _SHAPE) if set(names) <= set(table.columns)), None)
    if columns is None:
        found = ",".join(table.columns)[:200]
        raise InputError(f"{path}, row 1: the header must have {','.join(SIZES)} or image_id,dim0,dim1: {found}")
    if columns == _SHAPE:
        log.info(f"{path}: dim0 is read as the height, dim1 as the width")
    table = table[columns].set_axis(SIZES, axis=1)
    where = [f"row {row} ({image_id})" for row, image_id in enumerate(table["image_id"], start=2)]
    sides = table[SIZES[1:]].apply(pd.to_numeric, errors="coerce").astype(float)
    usable = ((sides % 1 == 0) & (sides > 0) & (sides < 1e6)).all(axis=1)
    for k in np.flatnonzero(~usable)[:1]:
        said = " and ".join(f"{name} {table[name][k]!r}" for name in SIZES[1:])
        raise InputError(f"{path}, {where[k]}: {said} must be whole numbers of pixels")
    return pd.concat([table["image_id"], sides.astype(np.int64)], axis=1).assign(where=where)
