"""Pictures of the report: lungs and rejected images, what the audit's networks see, and where networks look."""

from functools import partial

import numpy as np
import torch

from common.config import digest
from common.paths import read_array
from common.report import page
from common.report.gallery import cached_arrays, heat_overlay, outline_overlay, to_jpeg
from common.step import cached_hash
from solutions.covid19.config import LABELS
from solutions.covid19.data import GATED
from solutions.covid19.lungs import MASKS
from solutions.covid19.models import apply_view, heat_maps
from solutions.covid19.scoring import HALF

SIDE = 240  # pixels of a picture in a strip
PER_KIND = 2  # images of each kind
MOST_REJECTED = 6
draw = partial(outline_overlay, size=SIDE)
SEEN = {"image": "the whole image", "lungs": "the lungs", "border": "the margin", "background": "all but the lungs"}


def make_strip(panels, gap=4):
    """Return pictures side by side with white gaps, uint8 RGB; panels: uint8 RGB of one height."""
    white = np.full((panels[0].shape[0], gap, 3), 255, np.uint8)
    return np.hstack([part for panel in panels for part in (panel, white)][:-1])


def _grid(strips, captions):
    return page.grid(*[page.figure(to_jpeg(rgb), text) for rgb, text in zip(strips, captions, strict=True)])


def lung_strips(images, selection):
    """Return strips of radiograph, outlined and cut-out lungs: a few per collection and label, and rejected images."""
    masks = read_array(images.arrays[MASKS])

    def strip(row):
        image, mask = images.store.images[row], masks[row]
        return make_strip([draw(image), draw(image, prediction=mask), draw(apply_view(image, mask, "lungs", None))])

    rows, captions = [], []
    used = images.table[images.table["fold"] >= 0]
    for _, part in used.groupby(["collection", "label"]):
        for row in part.iloc[:: max(1, len(part) // PER_KIND)].head(PER_KIND).itertuples():
            rows.append(row.row)
            name = f"{row.collection}, {LABELS[row.label]} · {row.image_id}"
            captions.append(f"{name}: {row.area:.1%} of the image")
    fragments = ["Used: the radiograph, its lungs outlined, and the lungs cut out.", _grid(map(strip, rows), captions)]
    gated = selection[selection["reason"].str.startswith(GATED)].head(MOST_REJECTED)
    if len(gated):
        reasons = gated["reason"].str.removeprefix(GATED)
        captions = gated["label"].map(LABELS) + " · " + gated["image_id"] + ": " + reasons
        fragments += ["Rejected by the area gate:", _grid(map(strip, images.rows_of(gated["image_id"])), captions)]
    return fragments


def view_strips(images, answers, margin):
    """Return strips of the audit's views of one image of each label; answers: as in `pick_answers`."""
    masks, strips, captions = read_array(images.arrays[MASKS]), [], []
    for label, part in answers.groupby("label", sort=False):
        row = part["row"].iloc[0]
        image, mask = np.asarray(images.store.images[row]), masks[row]
        strips.append(make_strip([draw(apply_view(image, mask, view, margin)) for view in SEEN]))
        captions.append(f"{LABELS[label]} · {part['image_id'].iloc[0]}")
    return _grid(strips, captions)


def pick_answers(answers):
    """Return each label's most confident correct predictions, and its most confident wrong one, if any."""
    ordered = answers.sort_values("probability", ascending=False, kind="stable")
    positive, negative = ordered[ordered["label"] == 1], ordered[ordered["label"] == 0][::-1]
    places = [*positive.index[:PER_KIND], *negative.index[:PER_KIND]]
    places += positive.index[positive["probability"] < 0.5][-1:].tolist()
    places += negative.index[negative["probability"] >= 0.5][-1:].tolist()
    return answers.loc[list(dict.fromkeys(places))]


def heat_strips(job, answers, networks):
    """Return strips of the radiograph with its lungs outlined and the heat map of each view's network."""
    images, maps, strips, captions = job.images, compute_heat_maps(job, answers, networks), [], []
    masks = read_array(images.arrays[MASKS])
    for k, row in enumerate(answers.itertuples()):
        image, mask = np.asarray(images.store.images[row.row]), masks[row.row]
        panels = [draw(image, prediction=mask)]
        for view in maps:
            heat = maps[view][k] / max(maps[view][k].max(), np.float32(1e-12))
            panels.append(heat_overlay((apply_view(image, mask, view, job.config.audit.margin), heat), size=SIDE))
        strips.append(make_strip(panels))
        captions.append(f"{LABELS[row.label]}, probability {row.probability:.3f} · {row.image_id}")
    return _grid(strips, captions)


def compute_heat_maps(job, answers, networks):
    """Return each view's heat maps of the run's answer, float32 (n, h, w), computed on the CPU and cached."""
    answers = answers.reset_index(drop=True)
    signs = np.where(answers["probability"] >= HALF, 1, -1)
    used = [(fold, view, each) for fold in sorted(set(answers["fold"])) for view, each in networks[fold].items()]

    def compute():
        maps = {}
        for fold, view, network in used:
            for sign in sorted(set(signs[answers["fold"] == fold])):
                part, title = answers[(answers["fold"] == fold) & (signs == sign)], f"{view}, fold {fold}"
                heat = heat_maps(job, network, part["row"].to_numpy(), torch.device("cpu"), title, sign)
                maps.setdefault(view, np.zeros((len(answers), *heat.shape[1:]), np.float32))[part.index] = heat
        return maps

    hashes = [[fold, view, cached_hash(network.weights(job.run))] for fold, view, network in used]
    key = digest(job.images.pixels_key, answers["image_id"].tolist(), signs.tolist(), hashes)
    return cached_arrays(job.run.path("heats.npz"), key, compute)
