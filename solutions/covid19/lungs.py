"""The lungs of every stored image, widened and closed as the paper does, and whether they are enough."""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.config import digest, file_hash
from common.data.dicom import COLOUR_LIMIT
from common.errors import InputError
from common.paths import lock_folder, read_array, read_json, read_parquet
from common.steps import write_table
from solutions.lung_segmentation import clean_up, judge, load_segmenter
from solutions.lung_segmentation.segmenter import SHIPPED

log = logging.getLogger(__name__)
UNREADABLE, COLOURED = "cannot be read", "a colour picture"


@dataclass
class Lungs:
    """table: image_id, row, area (share of the image that is lung after cleaning up), usable (the gate is passed),
    reason ("" where usable). masks: path of uint8 (N, S, S) of 0 and 1, S the store's side; empty where there is no
    radiograph."""

    table: pd.DataFrame
    masks: Path


def lungs_made(config):
    """What the masks and verdicts follow from beside the images; InputError where the segmenter's file is missing."""
    return {
        "segmenter": file_hash(_weights(config)),
        "dilations": config.lungs.dilations,
        "closings": config.lungs.closings,
        "gate": config.lungs.gate,
    }


def _weights(config):
    weights = SHIPPED if config.lungs.weights == "shipped" else Path(config.lungs.weights)
    if not weights.is_file():
        raise InputError(f"{weights}: no such file (--lungs.weights)")
    return weights


def find_lungs(context, store):
    """Find the lungs in every image of a store; returns the folder of Lungs, which lies beside the store.

    Runs on the same images share it; work that was cut off begins again, which takes minutes. Placeholders and colour
    pictures have no lungs. Raises InputError for a segmenter that cannot be used, and where another process is at it.
    """
    made = lungs_made(context.config)
    key = digest(read_json(store.folder / "store.json")["key"], made)
    folder = store.folder.with_name(f"{store.folder.name}-lungs-{key[:8]}")
    if (folder / "lungs.parquet").is_file():
        log.info(f"lungs: up to date in {folder}")
        return folder
    segmenter = load_segmenter(_weights(context.config), context.device)
    partial = folder.with_name(folder.name + ".partial")
    with lock_folder(partial, "finding these lungs"):
        table = _fill(partial / "masks.npy", store, segmenter, context.config.lungs)
        write_table(partial / "lungs.parquet", table)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(partial, folder)
    return folder


def _fill(path, store, segmenter, config):
    """Write the masks into the .npy at `path`; returns the table of Lungs."""
    problems = _problems(store.table)
    masks = np.lib.format.open_memmap(path, "w+", np.uint8, store.images.shape)
    found = segmenter.masks(np.asarray(store.images[row]) for row in np.flatnonzero(problems == ""))
    verdicts = []
    for row, problem in enumerate(tqdm(problems, "lungs", unit="image")):
        if problem:
            verdicts.append((0.0, False, problem))
            continue
        masks[row] = mask = clean_up(next(found), config.dilations, config.closings)
        verdict = judge(mask, config.gate)
        verdicts.append((verdict.area, verdict.ok, verdict.reason))
    masks.flush()
    about = pd.DataFrame(verdicts, columns=["area", "usable", "reason"])
    return pd.concat([store.table[["image_id", "row"]].reset_index(drop=True), about], axis=1)


def _problems(table):
    """Why an image of a store's table is no radiograph, str (N,), "" where it is one."""
    problems = np.full(len(table), "", object)
    problems[(table["colour"] > COLOUR_LIMIT).to_numpy()] = COLOURED
    problems[~table["ok"].to_numpy()] = UNREADABLE
    return problems


def open_lungs(folder):
    """The Lungs in a folder that `find_lungs` gave; InputError where they are missing or damaged."""
    table, masks = read_parquet(Path(folder) / "lungs.parquet"), Path(folder) / "masks.npy"
    if len(read_array(masks)) != len(table):
        raise InputError(f"{folder}: damaged lungs (array and table disagree); delete the folder and prepare again")
    return Lungs(table, masks)
