"""Turn mask probabilities into the rows of a submission."""

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.post.rle import encode
from common.tuning import LEVELS, grid, summarise
from solutions.siim_pneumothorax.data import read_masks


def rules(decision):
    """Return every common.tuning.Rule that a DecisionConfig allows."""
    if decision.rule == "gate":
        return grid(gate=decision.gate, pixel=decision.pixel, min_area=decision.min_area)
    if decision.rule == "expected":
        return grid(expected=decision.weight, pixel=LEVELS[:1], min_area=decision.min_area)
    return grid(gate=decision.gate, top=decision.top, min_pixels=decision.top_pixels, pixel=decision.bottom)


def oof_regions(job, oof):
    """Return the OofRegions of the out-of-fold maps at the pixel thresholds to try."""
    decision = job.config.decision
    pixels = {"gate": decision.pixel, "triplet": decision.bottom, "expected": LEVELS}[decision.rule]
    truth = [read_masks(job.images)[row] for row in oof.table["row"]]
    return summarise(oof.maps, truth, pixels, connectivity=decision.connectivity)


def submission_rows(image_ids, probs, presence, rule, connectivity=8):
    """Return the submission, ImageId and EncodedPixels (`-1`: empty), for probs uint8 (n, h, w) read one by one."""
    rows = []
    for position, image_id in enumerate(tqdm(image_ids, desc="masks", leave=False)):
        mask = rule.apply(np.asarray(probs[position]), presence[position], connectivity=connectivity)
        rows.append((image_id, encode(mask)))
    return pd.DataFrame(rows, columns=["ImageId", "EncodedPixels"], dtype=str)
