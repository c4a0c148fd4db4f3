"""Detect weights that have seen a run's test images or held-out images, as far as their files tell."""

import re
from pathlib import Path

from common.errors import InputError, check, log
from common.nn.weights import read_state
from common.paths import read_json, read_parquet
from common.teaching import read_lessons
from common.train.checkpoint import load_weights
from solutions.chestxray14.labels import names_digest

SOLUTION = "chestxray14"
_CHEXNET = "public CheXNet code of its own split, which trains on 20,383 of the 25,596 official test images"
_XRV = "torchxrayvision's, trained on a random split of NIH's images (or RSNA's, which are taken from them)"
# Public weights by their usual file or folder name: a regular expression for one part of the path, and the reason.
PUBLIC = (
    (r"m-25012018-123527.*", _CHEXNET),
    (r"(nih|kaggle)-densenet121-.*|nih-pc-chex-.*|pc-nih-rsna-siim-vin-.*", _XRV),
    (r"(.*torchxrayvision--)?(densenet121-res224-(all|nih|rsna)|resnet50-res512-all)", _XRV),
)
# Names of RAD-DINO, RayDINO and EVA-X, which were trained on NIH's images among others, but without labels.
UNLABELLED = r".*(rad|ray)[-_]?dino.*|.*eva[-_]?x.*|.*merged520k.*|backbone_compatible\.safetensors"
_SIIM = "SIIM's images are NIH's: 3,833 of its 12,047 are in the official test list"


def origin(config, table, fold):
    """Return the record saved with one fold's weights: solution, split, fold, number of images and `names_digest`."""
    ids = _trained(table, fold)
    return {"solution": SOLUTION, "split": config.split, "fold": fold, "images": len(ids), "names": names_digest(ids)}


def seen_unlabelled(config, run=None):
    """Return a line about each network of a Config whose weights have seen NIH's images, though not their labels.

    With a Run, adds a line if it was trained on its own test images with a teacher's labels (common.teaching).
    """
    taught = ["trained on its test images, with a teacher's labels"] * bool(run and "pseudo" in read_lessons(run))
    paths = sorted({each.weights for each in config.branches if _is_unlabelled(Path(each.weights))})
    line = "these weights have seen NIH's images, perhaps of the test list, but no labels"
    return [*(f"{path}: {line}" for path in paths), *taught]


def check_run(config, table):
    """Apply `check_weights` to all networks, for test and held-out images; refuse `seen_unlabelled` unless allowed."""
    for line in seen_unlabelled(config):
        check(config.seen_unlabelled == "allow", f"{line}; --seen-unlabelled allow takes them, and the page says so")
        log.info(line)
    train = table[table["split"] == "train"]
    unseen, own = {"test images": table.loc[table["split"] == "test", "image_id"]}, None
    if "fold" in table:
        unseen |= {f"images that fold {k} holds out": train.loc[train["fold"] == k, "image_id"] for k in config.folds}
        own = {names_digest(_trained(table, fold)) for fold in config.folds}
    for stage in config.stages:
        check_weights(getattr(config, stage).weights, config.split, unseen, own)


def check_weights(weights, split, unseen=None, own=None):
    """Raise InputError for weights that are known to have seen images that the run tests on or holds out.

    weights: as in a NetworkConfig. split: the run's; with "all" only `unseen` matters. unseen: group name → image ids.
    own: the set of `names_digest` of each fold's training images in this run, None before there are folds.
    Refuses public CheXNet checkpoints, torchxrayvision's weights trained on NIH's images, weights of runs with split
    "all", on SIIM's images or on any of `unseen`, and copied weights whose training images cannot be looked up. Weights
    about which nothing is known are only logged.
    """
    unseen = {name: ids for name, ids in (unseen or {}).items() if len(ids)}
    if weights in ("imagenet", "none") or (split == "all" and not unseen):
        return
    path = Path(weights)
    recorded, (folder, run, ids) = _recorded(path), _run_of(path)
    if recorded and (ids is None or names_digest(ids) != recorded.get("names")):  # a copy of another run's file
        run, ids = recorded, None
    for name, wanted in unseen.items():
        seen = sorted(set(wanted) & set(() if ids is None else ids))
        if seen:
            raise InputError(f"{path}: {folder} was trained on {len(seen)} of the {name}, such as {seen[0]}")
    if split == "official":
        reason = _SIIM if run.get("solution") == "siim_pneumothorax" else _public(path)
        if run.get("solution") == SOLUTION and run.get("split") == "all":
            where = "their run" if ids is None else folder
            reason = f"{where} was trained with split all, which holds no test image back"
        check(not reason, f"{path}: these weights have seen official test images: {reason}")
    if recorded and ids is None and unseen and own is not None and own != {recorded.get("names")}:
        n = f"{recorded.get('images')} images of ChestX-ray14 other than those of this run"
        raise InputError(f"{path}: trained on {n}; only the folder of their run shows which: name the file in there")
    if (run.get("solution") != SOLUTION or (unseen and ids is None and not recorded)) and not _is_unlabelled(path):
        log.info(f"{path}: whether these weights have seen the test images is unknown; make sure that they have not")


def _trained(table, fold):
    """Return the ids of one fold's training images; with fold None, of all train images."""
    return table.loc[(table["split"] == "train") & (table["fold"] != fold), "image_id"]


def _run_of(path):
    """Return folder, configuration and training image ids of the run that holds a file; (None, {}, None) if none."""
    folder = next((parent for parent in path.resolve().parents[:4] if (parent / "config.json").is_file()), None)
    config = {} if folder is None else read_json(folder / "config.json")
    if config.get("solution") != SOLUTION or not (folder / "images.parquet").is_file():
        return folder, config, None
    fold = re.fullmatch(r"fold(\d+)", path.resolve().relative_to(folder).parts[0])
    return folder, config, _trained(read_parquet(folder / "images.parquet"), fold and int(fold[1]))


def _recorded(path):
    """Return the record of training images in weights of this solution (see `origin`); {} for other files."""
    try:
        about = load_weights(path)[1] if path.suffix == ".safetensors" else {}
    except InputError:  # raised again by the caller that loads it
        return {}
    recorded = about.get("trained_on")
    return recorded if isinstance(recorded, dict) and recorded.get("solution") == SOLUTION else {}


def _is_unlabelled(path):
    named = any(re.fullmatch(UNLABELLED, part, re.IGNORECASE) for part in path.parts[-5:])
    return named or "pseudo" in _recorded(path).get("taught", {})


def _public(path):
    """Return why a file is known to have seen the official test images, "" if it is not."""
    for part in path.parts[-5:]:
        for pattern, reason in PUBLIC:
            if re.fullmatch(pattern, part):
                return reason
    try:
        state = read_state(path)
    except InputError:
        return ""  # raised again by the caller that loads it
    for name, value in state.items():  # the 14-sigmoid layer that the CheXNet code adds to DenseNet
        if re.fullmatch(r"(module\.)?densenet121\.classifier\.0\.weight", name) and len(value) == 14:
            return f"it has the form of {_CHEXNET}"
    return ""
