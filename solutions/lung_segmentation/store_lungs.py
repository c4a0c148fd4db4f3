"""Find the lungs of all images of a store once, and keep them in a folder beside it for every run on that store."""

import json
import logging
import os
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import digest, file_hash
from common.data.dicom import COLOUR_LIMIT
from common.errors import InputError
from common.paths import lock_folder, read_array, read_json, read_parquet, write_table
from common.train.checkpoint import load_weights

from .config import STRUCTURES
from .segmenter import SHIPPED, load_segmenter, read_radiograph

log = logging.getLogger(__name__)
BATCH = 4  # images that one thread of the segmenter takes at once
BLOCK = 64  # images between two checkpoints; a multiple of BATCH, or batches would differ after a restart


@dataclass(frozen=True)
class StoreLungs:
    """The lungs of a store. table: image_id, row and the caller's columns, one row per image; arrays: paths of the
    caller's uint8 .npy files (N, side, side) by name."""

    table: pd.DataFrame
    arrays: dict


def weights_file(weights, option):
    """Return the path of a segmenter's weights: a file, or "shipped". Raises InputError naming the option."""
    path = SHIPPED if weights == "shipped" else Path(weights)
    if not path.is_file():
        raise InputError(f"{path}: no such file ({option})")
    return path


def structures_of(weights):
    """Return the structures that a segmenter file segments, such as ("left", "right", "heart"); () if unknown."""
    return STRUCTURES.get(load_weights(weights)[1].get("structures"), ())


def find_lungs(job, store, weights, settings, sides, columns, describe, skip, files=None):
    """Return the StoreLungs of a store, found by the segmenter in the file `weights`, or read if found earlier.

    settings: JSON that the results depend on, besides pixels and weights. sides: array name → side in pixels.
    describe(segmenter, image, probs) -> (uint8 arrays (side, side) in the order of `sides`, JSON values of `columns`),
    called in a thread. skip(image, about): the same for a placeholder or a colour picture. files: image id → original,
    to read instead of the stored image.
    A killed run loses at most BLOCK images and continues to the same bytes. Raises InputError for a segmenter that
    cannot be used, an original that can no longer be read, and if another process is doing the same work.
    """
    key = digest(read_json(store.folder / "store.json")["key"], {"segmenter": file_hash(weights), **settings})
    folder = store.folder.with_name(f"{store.folder.name}-lungs-{key[:8]}")
    if (folder / "lungs.parquet").is_file():
        log.info(f"lungs: up to date in {folder}")
    else:
        segmenter = load_segmenter(None if weights == SHIPPED else weights, job.device, batch_size=BATCH)
        workers = None if job.options.workers is None else max(job.options.workers, 1)
        partial = folder.with_name(folder.name + ".partial")
        with lock_folder(partial, "finding these lungs"):
            work = _Work(partial, store.table, key, sides)
            found = _each(store, work, files, segmenter, describe, skip, workers)
            table = pd.DataFrame(work.write(found), columns=list(columns))
            names = store.table[["image_id", "row"]].reset_index(drop=True)
            write_table(partial / "lungs.parquet", pd.concat([names, table], axis=1))
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(partial, folder)
            (folder / "journal").unlink()  # last, so that a run killed before this finds every row done
    arrays = {name: folder / f"{name}.npy" for name in sides}
    if any(len(read_array(path)) != len(store.table) for path in arrays.values()):
        raise InputError(f"{folder}: damaged lungs (array and table disagree); delete the folder and prepare again")
    return StoreLungs(read_parquet(folder / "lungs.parquet"), arrays)


def _each(store, work, files, segmenter, describe, skip, workers):
    """Yield (whether it was segmented, arrays, table row) of each remaining image."""
    table, begin = store.table, work.done
    radiograph = (table["ok"] & ~(table["colour"] > COLOUR_LIMIT)).to_numpy()
    rows = [row for row in np.flatnonzero(radiograph) if row >= begin]
    if files is None:
        sources, load = {row: row for row in rows}, lambda row: np.asarray(store.images[row])
    else:
        sources, load = {table["image_id"][row]: files[table["image_id"][row]] for row in rows}, read_radiograph
    found = segmenter.each(sources, lambda _, image, probs: describe(segmenter, image, probs), workers, load)
    try:
        for row in range(begin, len(table)):
            if not radiograph[row]:
                yield False, *skip(np.asarray(store.images[row]), table.iloc[row])
                continue
            _, result, problem = next(found)
            if problem:
                raise InputError(problem)
            yield True, *result
    finally:
        found.close()


class _Work:
    """Arrays that grow row by row in a temporary folder, and a journal of their finished rows."""

    def __init__(self, folder, table, key, sides):
        self.folder, self.n = folder, len(table)
        self.shapes = {folder / f"{name}.npy": (self.n, side, side) for name, side in sides.items()}
        self.rows = self._read_journal(key)
        self.done = len(self.rows)
        if self.done:
            log.info(f"lungs: continuing, {self.done} of {self.n} images are done")

    def write(self, found):
        """Write what `found` yields block by block, and return the table rows of all images."""
        pending, segmented = [], 0
        with ExitStack() as stack:
            stack.callback(found.close)
            arrays = [stack.enter_context(_rows_file(*each, self.done)) for each in self.shapes.items()]
            journal = stack.enter_context(open(self.folder / "journal", "a", encoding="utf-8"))
            progress = tqdm(found, "lungs", self.n, initial=self.done, unit="image")
            for row, (was_segmented, parts, about) in enumerate(progress, self.done):
                pending.append((parts, about))
                segmented += was_segmented
                if row != self.n - 1 and (len(pending) < BLOCK or segmented % BATCH):
                    continue
                for number, file in enumerate(arrays):
                    file.write(np.stack([parts[number] for parts, _ in pending]).data)
                    _sync(file)
                block = [about for _, about in pending]
                journal.write(json.dumps(block) + "\n")
                _sync(journal)
                self.rows += block
                pending = []
        return self.rows

    def _read_journal(self, key):
        """Return the rows that an earlier run finished; an unrelated journal is replaced by an empty one."""
        path = self.folder / "journal"
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # a kill may cut off the last line
        if not lines or lines[0] != key.encode() or not all(file.is_file() for file in self.shapes):
            path.write_text(key + "\n", encoding="utf-8")
            return []
        os.truncate(path, sum(len(line) + 1 for line in lines))
        return [row for line in lines[1:] for row in json.loads(line)]


@contextmanager
def _rows_file(path, shape, done):
    """Open an array file for writing after its first `done` rows; anything after them is cut off."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with open(path, "r+b" if done else "wb") as file:
        file.write(header.getvalue())
        file.truncate(len(header.getvalue()) + done * shape[1] * shape[2])
        file.seek(0, os.SEEK_END)
        yield file


def _sync(file):
    file.flush()
    os.fsync(file.fileno())
