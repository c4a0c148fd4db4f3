"""What the tests of lung segmentation share."""

import numpy as np

from common.paths import read_json


def stored_masks(run):
    """The masks of a run's images at the store's size, by store row."""
    return np.load(read_json(run / "manifest.json")["steps"]["prepare"]["arrays"]["masks"])
