"""`export` and `infer`: test images predicted by what a finished run has learnt, without the run."""

import logging
from dataclasses import replace

import numpy as np
import pandas as pd

from common.config import digest
from common.errors import InputError
from common.infer.tools import export_tool, files_of, infer_tool, test_store
from common.paths import find_images, read_json
from common.post.boxes import BOX
from common.steps import trained_weights
from common.trained import Learnt
from solutions.chestxray14.config import KAGGLE, LABELS, Config
from solutions.chestxray14.data import UNKNOWN, Prepared, open_prepared, test_names, write_sample
from solutions.chestxray14.labels import LISTS, read_names, stems
from solutions.chestxray14.lungs import find_lungs, lungs_made, mask_structures, open_lungs, segmenter_file
from solutions.chestxray14.pipeline import (
    experiment_key,
    is_tuned,
    neutral_probs,
    predict_test,
    trained_stages,
    write_answer,
)

log = logging.getLogger(__name__)
NAME = "chestxray14"
LUNGS = "lungs.safetensors"  # the segmenter that finds them


def learnt(context):
    """The Learnt of a finished run; InputError where a step is missing, or follows from other networks."""
    config, run, data = context.config, context.run, open_prepared(context)
    experiment_key(context, data)  # refuses networks that the predictions are not of
    if not is_tuned(context, data):
        raise InputError(f"{run.folder}: no figures of these predictions; run the verb `tune` (or `run` for all)")
    weights = [trained_weights(run, fold, stage) for fold in config.folds for stage in trained_stages(config)]
    others = {LUNGS: segmenter_file(config)} if config.needs_lungs else {}
    score = read_json(run.path("score.json"))["auroc"]
    return Learnt(weights, read_json(run.path("tuned.json")), "auroc", score, neutral_probs(run), others)


def prepare(context, trained):
    """Decode the test images alone, without labels, and find their lungs where needed; returns their Prepared.

    They are those of --test, or of sample_submission.csv in the folder, or of the official test list there, of which
    images without a file are left out and counted. Writes sample_submission.csv.
    """
    config = context.config
    if config.needs_lungs:  # by the segmenter that the run had
        config = replace(config, segmenter=replace(config.segmenter, weights=str(trained.path(LUNGS))))
        context.config = config
    folder, named, files = _find_test(context.options)
    store = test_store(context, folder, {image_id: files[image_id] for image_id in named["image_id"]})
    table = named[["image_id", "file_name"]].assign(
        row=np.arange(len(named)),
        **UNKNOWN,
        age=np.nan,
        split="test",
        fold=-1,
        **{name: store.table[name].to_numpy() for name in ("width", "height", "ok")},
    )
    write_sample(context.run, table["file_name"].to_numpy())
    made = lungs_made(config) if config.needs_lungs else None
    pixels = digest(read_json(store.folder / "store.json")["key"], made)
    boxes = pd.DataFrame(columns=["image_id", "row", "label", *BOX])
    data = Prepared(table, boxes, store, "", pixels, {"structures": mask_structures(config)}, "")
    if made:
        found = open_lungs(find_lungs(context, store, files), made)
        data.lungs, data.masks, data.crops = found.table, found.masks, found.crops
    return data


def _find_test(options):
    """Folder, names (image_id, file_name) and files of the images that `prepare` is about."""
    if options.test is not None:
        named, files = test_names(options.test)
        if files:
            return options.test, named, files
        folder = options.data or _listing(None).parent
    else:
        listing = _listing(options.data)
        folder, named = listing.parent, _listed(listing) if listing.suffix == ".txt" else test_names(listing)[0]
        log.info(f"test images from {listing}")
    found = find_images(folder)
    if options.test is None and listing.suffix == ".txt":
        here = named["image_id"].isin(found)
        if not here.any():
            raise InputError(f"{listing}: none of its {len(named):,} images is in {folder}")
        if not here.all():
            log.info(f"{listing}: {(~here).sum():,} of {len(named):,} images have no file and are left out")
        named = named[here].reset_index(drop=True)
    return folder, named, files_of(named["image_id"], found)


def _listing(data):
    """The file that names the test images: a sample submission, or, as in NIH's own folder, the official list."""
    return KAGGLE.find_file(data, (*KAGGLE.samples, *LISTS["test"][0]))


def _listed(path):
    """Images of a list as `test_names` has them, in the order in which a run has them."""
    names = read_names(path)
    named = pd.DataFrame({"image_id": stems(names), "file_name": names})
    return named.sort_values("image_id", ignore_index=True)


def answer(context, data, trained, out):
    """Predict the test images and write the submission `out`; returns its Summary."""
    neutral = trained.neutral
    if not isinstance(neutral, dict) or not all(isinstance(neutral.get(label), float) for label in LABELS):
        raise InputError(f"{trained.about}: neutral must have a probability of each of the {len(LABELS)} classes")
    return write_answer(context, data, predict_test(context, data), neutral, out)


TOOLS = {"export": export_tool(NAME, Config, learnt), "infer": infer_tool(NAME, Config, prepare, answer)}
