"""Where the lungs are in every image: masks that weight the features, crops for the lungs' network."""

import logging
from dataclasses import replace

import numpy as np

from common.config import file_hash
from common.data.store import to_square
from solutions.lung_segmentation import find_lungs, lung_region, structures_of, weights_file

log = logging.getLogger(__name__)
ALONE = "the segmenter has no heart: features are weighted by the lungs alone, in CXR-IRNet by lungs and heart"
LUNG_TABLE = "lungs.parquet"  # row k is store row k
COLUMNS = ["x_min", "y_min", "x_max", "y_max", "rule", "area"]


def segmenter_file(config):
    """Return the path of the segmenter's weights. Raises InputError where there is no such file."""
    return weights_file(config.segmenter.weights, "--segmenter.weights")


def lung_settings(config):
    """Return what the lungs follow from, by option; only the weighting needs masks, only the lungs' network crops."""
    return {
        "segmenter.weights": file_hash(segmenter_file(config)) if config.needs_lungs else None,
        "segmenter.mask_size": config.segmenter.mask_size if config.weights_features else None,
        "segmenter.crop_size": config.segmenter.crop_size if config.views != "whole" else None,
    }


def add_lungs(job, listing, store):
    """Return the listing with the lungs of all images, where the recipe needs them.

    Adds the table lungs.parquet: image_id, row, x_min, y_min, x_max, y_max (pixels of the file, open end), rule (of
    `LungRegion`, or none), area (share of the image that is lung); and the arrays masks, uint8 (N, S, S), 255 times the
    share of each cell that is lung (or heart), and crops, uint8 (N, C, C), cut out of the originals.
    """
    config = job.config
    if not config.needs_lungs:
        return listing
    weights = segmenter_file(config)
    mask_size, crop_size = (size or 0 for size in list(lung_settings(config).values())[1:])
    sides = {name: side for name, side in (("masks", mask_size), ("crops", crop_size)) if side}

    def describe(segmenter, image, probs):
        return mask_and_crop(segmenter, image, probs, mask_size, crop_size)

    def skip(image, about):
        return whole_image(image, (about["width"], about["height"]), mask_size, crop_size)

    own = {"mask_size": mask_size, "crop_size": crop_size}
    found = find_lungs(job, store, weights, own, sides, COLUMNS, describe, skip, listing.files)
    missing = found.table.loc[found.table["rule"] == "none", "image_id"]
    if len(missing):
        log.info(f"no lungs found in {len(missing)} images, which count as a whole; the first is {missing.iloc[0]}")
    about = dict(listing.about)
    if config.weights_features:
        about["structures"] = ["lungs", *["heart"] * ("heart" in structures_of(weights))]
        if about["structures"] == ["lungs"]:
            about |= {"said": f"{about['said']}; {ALONE}"} if "said" in about else {}
            log.info(f"{ALONE}; --segmenter.weights takes a segmenter that has it")
    tables = {**listing.tables, LUNG_TABLE: found.table}
    return replace(listing, tables=tables, arrays=found.arrays, about=about)


def mask_and_crop(segmenter, image, probs, mask_size, crop_size):
    """Return ([mask (S, S) with the heart, crop (C, C)], [box…, rule, area]), without arrays of side 0."""
    parts = segmenter.parts(probs, image.shape)
    heart = parts.pop("heart", None)
    lungs = np.max(list(parts.values()), axis=0)
    region, area = lung_region(lungs), np.count_nonzero(lungs) / lungs.size
    if region is None:
        return whole_image(image, image.shape[::-1], mask_size, crop_size, area)
    left, top, right, bottom = region.box
    mask = lungs if heart is None else lungs | heart
    arrays = [to_square(mask * np.uint8(255), mask_size)] if mask_size else []
    arrays += [to_square(np.ascontiguousarray(image[top:bottom, left:right]), crop_size)] if crop_size else []
    return arrays, [*region.box, region.rule, area]


def whole_image(image, size, mask_size, crop_size, area=0.0):
    """Return what `mask_and_crop` does for an image without lungs: all of it; size: (width, height) of its file."""
    arrays = [np.full((mask_size, mask_size), 255, np.uint8)] if mask_size else []
    arrays += [to_square(image, crop_size)] if crop_size else []
    return arrays, [0, 0, *map(int, size), "none", area]
