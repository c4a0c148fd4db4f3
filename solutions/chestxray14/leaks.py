"""Weights that have seen the official test images, as far as files tell."""

import logging
import re
from pathlib import Path

from common.errors import InputError
from common.nn.weights import read_state
from common.paths import read_json, read_parquet

log = logging.getLogger(__name__)
_CHEXNET = ("public CheXNet code of its own split, which has 20,383 of the 25,596 official test images among its "
            "training images")  # fmt: skip
_XRV = "torchxrayvision's, trained on a random split of NIH's images (or RSNA's, which are taken from them)"
# Files and folders under which public weights are known, as a regular expression of one part of the path.
PUBLIC = (
    (r"m-25012018-123527.*", _CHEXNET),
    (r"(nih|kaggle)-densenet121-.*|nih-pc-chex-.*|pc-nih-rsna-siim-vin-.*", _XRV),
    (r"densenet121-res224-(all|nih|rsna)|resnet50-res512-all|.*torchxrayvision--(densenet121-res224-(all|nih|rsna)|"
     r"resnet50-res512-all)", _XRV),
)  # fmt: skip
_SIIM = "SIIM's images are NIH's: 3,833 of its 12,047 are in the official test list"


def check_weights(weights, split, test_ids=()):
    """Refuse weights that are known to have seen the test images of a run.

    weights: what a NetworkConfig says: imagenet, none or a file. split: the run's; with "all" only `test_ids` matter.
    test_ids: image ids of the run's test images, looked for among the training images of the run that the weights are
    of. Raises InputError for public CheXNet checkpoints and the torchxrayvision networks trained on NIH's images, for
    a run of split "all" or on SIIM's images, and for a run that trained on one of `test_ids`. Of a file about which
    nothing is known a line is logged.
    """
    if weights in ("imagenet", "none") or (split == "all" and not len(test_ids)):
        return
    path = Path(weights)
    folder, config = _run_of(path)
    solution = config.get("solution")
    if solution == "chestxray14" and (folder / "images.parquet").is_file() and len(test_ids):
        images = read_parquet(folder / "images.parquet")
        seen = images.loc[(images["split"] == "train") & images["image_id"].isin(test_ids), "image_id"]
        if len(seen):
            raise InputError(f"{path}: {folder} was trained on {len(seen)} of the test images, such as {seen.iloc[0]}")
    if split == "official":
        reason = _SIIM if solution == "siim_pneumothorax" else _public(path)
        if solution == "chestxray14" and config.get("split") == "all":
            reason = f"{folder} was trained with split all, which holds no test image back"
        if reason:
            raise InputError(f"{path}: these weights have seen official test images: {reason}")
    if solution != "chestxray14":
        log.info(f"{path}: it cannot be told whether these weights have seen the test images; make sure of it")


def _run_of(path):
    """Folder and configuration of the run in which a file lies; (None, {}) for others."""
    for folder in path.resolve().parents[:3]:
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            return folder, config if isinstance(config, dict) else {}
    return None, {}


def _public(path):
    """Why a file is known to have seen the official test images, "" if it is not."""
    for part in path.parts[-5:]:
        for pattern, reason in PUBLIC:
            if re.fullmatch(pattern, part):
                return reason
    try:
        state = read_state(path)
    except InputError:
        return ""  # said by whoever loads it
    for name, value in state.items():  # the layer of 14 sigmoids that this code puts into torchvision's DenseNet
        if re.fullmatch(r"(module\.)?densenet121\.classifier\.0\.weight", name) and len(value) == 14:
            return f"it has the form of {_CHEXNET}"
    return ""
