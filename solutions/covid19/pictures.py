"""The pictures on a run's page: lungs and rejected images, what the audit's networks see, and where networks look."""

import zipfile

import numpy as np
import torch

from common.config import digest, file_hash
from common.paths import atomic_path, read_array
from common.report import page
from common.report.gallery import heat_overlay, jpeg, outline_overlay
from common.steps import trained_weights
from solutions.covid19.config import COVID
from solutions.covid19.focus import heat_maps
from solutions.covid19.models import load_network
from solutions.covid19.training import shown

SIDE = 240  # pixels of a picture; several stand in a strip
EACH = 2  # images of each kind that are shown
REJECTED = 6
GATED = "lungs: "  # how the reasons of the area gate begin
SEEN = {"image": "the whole image", "lungs": "the lungs", "border": "the margin", "background": "all but the lungs"}


def strip(panels, gap=4):
    """Pictures beside each other with white between them, uint8 RGB; panels: uint8 RGB of one height."""
    white = np.full((panels[0].shape[0], gap, 3), 255, np.uint8)
    return np.hstack([part for panel in panels for part in (panel, white)][:-1])


def picture(image, mask=None):
    """A stored image, uint8 (S, S), as RGB of SIDE pixels, with the outline of `mask` where there is one."""
    return outline_overlay(np.asarray(image), prediction=mask, size=SIDE)


def said(label):
    """The name of a label, 1 or 0."""
    return COVID if label == 1 else f"no {COVID}"


def lungs(data, selection):
    """Strips of radiograph, lungs and lung-only image: a few of each collection and label, and rejected ones with why.

    selection: what `data.read_selection` gives.
    """
    masks, names = read_array(data.masks), data.table["image_id"]
    used = data.table[data.table["fold"] >= 0]
    kinds = [part.iloc[:: max(1, len(part) // EACH)].head(EACH) for _, part in used.groupby(["collection", "label"])]
    captions = [
        f"{row.collection}, {said(row.label)} · {row.image_id}: {row.area:.1%} of the image"
        for part in kinds
        for row in part.itertuples()
    ]
    rows = [row for part in kinds for row in part["row"]]
    gated = selection[selection["reason"].str.startswith(GATED) & selection["image_id"].isin(names)].head(REJECTED)
    rejected = data.rows_of(gated["image_id"])
    why = [
        f"{said(label)} · {name}: {reason.removeprefix(GATED)}"
        for label, name, reason in gated[["label", "image_id", "reason"]].itertuples(index=False)
    ]

    def drawn(row):
        image, mask = np.asarray(data.store.images[row]), np.asarray(masks[row])
        return strip([picture(image), picture(image, mask), picture(shown(image, mask, "lungs"))])

    found = ["Used: the radiograph, its lungs outlined, and the lungs alone.", _grid(map(drawn, rows), captions)]
    if len(rejected):
        found += ["Rejected by the area gate:", _grid(map(drawn, rejected), why)]
    return found


def _grid(pictures, captions):
    return page.grid(*[page.figure(jpeg(rgb), text) for rgb, text in zip(pictures, captions, strict=True)])


def views(data, answers, margin):
    """Strips of what the views of the audit let through, of an image of each label; answers: as in `telling`."""
    masks, strips, captions = read_array(data.masks), [], []
    for label, part in answers.groupby("label", sort=False):
        row = part["row"].iloc[0]
        image, mask = np.asarray(data.store.images[row]), np.asarray(masks[row])
        strips.append(strip([picture(shown(image, mask, view, margin)) for view in SEEN]))
        captions.append(f"{said(label)} · {part['image_id'].iloc[0]}")
    return _grid(strips, captions)


def telling(answers):
    """The surest right answers of each label and the surest wrong one of each, without repetition.

    answers: label, probability and whatever else; wrong is what lies on the other side of 0.5.
    """
    ordered = answers.sort_values("probability", ascending=False, kind="stable")
    with_it, without = ordered[ordered["label"] == 1], ordered[ordered["label"] == 0][::-1]
    places = [*with_it.index[:EACH], *without.index[:EACH]]
    places += with_it[with_it["probability"] < 0.5].index[-1:].tolist()
    places += without[without["probability"] >= 0.5].index[-1:].tolist()
    return answers.loc[list(dict.fromkeys(places))]


def heats(context, data, answers, stages):
    """Strips of where networks look: the radiograph with its lungs outlined, then the heat map of each view's network.

    answers: image_id, row, fold, label, probability of the images to show. stages: view → stage of the training. Maps
    are computed on the CPU, which a page can always have, and kept in heats.npz for the next page.
    """
    masks, config = read_array(data.masks), context.config
    maps = _heat_maps(context, data, answers, stages)
    strips, captions = [], []
    for k, row in enumerate(answers.itertuples()):
        image, mask = np.asarray(data.store.images[row.row]), np.asarray(masks[row.row])
        panels = [picture(image, mask)]
        for view in stages:
            heat = maps[view][k]
            looked_at = shown(image, mask, view, config.audit.margin)
            panels.append(heat_overlay((looked_at, heat / max(heat.max(), np.float32(1e-12))), size=SIDE))
        strips.append(strip(panels))
        captions.append(f"{said(row.label)}, probability {row.probability:.3f} · {row.image_id}")
    return _grid(strips, captions)


def _heat_maps(context, data, answers, stages):
    """float32 (n, h, w) of each view, from heats.npz where it holds these."""
    config, run = context.config.network, context.run
    weights = {
        (stage, fold): trained_weights(run, fold, stage)
        for stage in stages.values()
        for fold in sorted(set(answers["fold"]))
    }
    hashes = [[*place, file_hash(path)] for place, path in weights.items()]
    key = digest(data.pixels_key, answers["image_id"].tolist(), list(stages), hashes)
    path = run.path("heats.npz")
    kept = _kept(path, key, stages)
    if kept is not None:
        return kept
    found = {}
    for view, stage in stages.items():
        for fold, part in answers.reset_index(drop=True).groupby("fold"):
            model = load_network(config, weights[stage, fold])
            heat = heat_maps(model, data, part["row"].to_numpy(), config, view, torch.device("cpu"), progress=False)
            found.setdefault(view, np.zeros((len(answers), *heat.shape[1:]), np.float32))[part.index] = heat
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, key=key, **found)
    return found


def _kept(path, key, stages):
    try:
        with np.load(path) as file:
            return {view: file[view] for view in stages} if file["key"] == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent or torn
        return None
