"""Find the lungs of every stored image, dilate and close them as in the paper, and apply the area gate."""

from dataclasses import asdict

import numpy as np

from common.config import file_hash
from solutions import lung_segmentation
from solutions.lung_segmentation import apply_gate, clean_up

MASKS = "masks"  # name of the array in a run, uint8 (N, S, S) of 0 and 1
UNREADABLE, COLOURED = "cannot be read", "a colour picture"


def weights_file(config):
    """Return the path of the lung segmenter's weights. Raises InputError if there is no such file."""
    return lung_segmentation.weights_file(config.lungs.weights, "--lungs.weights")


def lungs_key(config):
    """Return what masks and verdicts depend on besides the images, as JSON; weights: the file's SHA-256."""
    return asdict(config.lungs) | {"weights": file_hash(weights_file(config))}


def find_lungs(job, store):
    """Return the StoreLungs: masks, and a table of image_id, row, area (share that is lung), usable and reason."""
    config, size = job.config.lungs, job.config.store_size

    def describe(segmenter, image, probs):
        mask = clean_up(segmenter.lungs(probs, image.shape), config.dilations, config.closings)
        verdict = apply_gate(mask, config.gate)
        return [mask], [float(verdict.area), bool(verdict.ok), verdict.reason]

    def skip(image, about):
        return [np.zeros((size, size), np.uint8)], [0.0, False, COLOURED if about["ok"] else UNREADABLE]

    settings = {"dilations": config.dilations, "closings": config.closings, "gate": config.gate}
    weights, columns = weights_file(job.config), ("area", "usable", "reason")
    return lung_segmentation.find_lungs(job, store, weights, settings, {MASKS: size}, columns, describe, skip)
