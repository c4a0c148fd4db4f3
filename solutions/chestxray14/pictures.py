"""The pictures on a run's page: lungs, the surest answers, and where the networks look."""

from dataclasses import replace

import cv2
import numpy as np
import torch

from common.config import digest
from common.paths import atomic_path, read_array, read_parquet
from common.post.boxes import BOX
from common.report import page
from common.report.gallery import box_overlay, gallery, heat_overlay, outline_overlay
from solutions.chestxray14.config import BOX_SIDE, LABELS
from solutions.chestxray14.maps import class_maps

SHOWN = 8  # pictures of a gallery
HEAT_SIDE = 256  # of the kept maps


def scored(run, data, name):
    """The predictions of one table ("oof", "test") whose labels are known: truth (n, 14), probabilities, the table."""
    table = read_parquet(run.path(f"{name}.parquet"))
    truth = data.labels(data.rows_of(table["image_id"]))
    known = ~np.isnan(truth).any(axis=1)
    return truth[known], table.loc[known, list(LABELS)].to_numpy(), table[known]


def shown_answers(run, data):
    """`scored` of the labelled test images, which NIH's boxes lie on, or else out of fold; and what to call them."""
    test = scored(run, data, "test")
    return (*test, data.test_name) if len(test[2]) else (*scored(run, data, "oof"), "out of fold")


def lungs(data):
    """The mask that weights the features, and the lungs' boxes with their crops, some of each rule."""
    images, names, found = data.store.images, data.table["image_id"], []
    if data.masks is not None:
        items, masks = [], read_array(data.masks)
        for row in data.lungs["row"].to_numpy()[:: max(1, len(data.lungs) // SHOWN)][:SHOWN]:
            mask = cv2.resize(masks[row], images.shape[1:], interpolation=cv2.INTER_LINEAR) >= 128
            items.append((np.asarray(images[row]), None, mask, names[row]))
        what = " and ".join(data.structures or ["lungs"])
        found.append(gallery(items, f"The region that counts: {what}", overlay=outline_overlay))
    if data.crops is not None:
        crops, items = read_array(data.crops), []
        each = max(1, SHOWN // (2 * data.lungs["rule"].nunique()))
        for row in data.lungs.groupby("rule", sort=False).head(each)["row"]:
            image, place = np.asarray(images[row]), data.lungs.loc[row]
            size = data.table.loc[row, ["width", "height"]].to_numpy(float)
            box = place[BOX].to_numpy(float) * np.tile(image.shape[::-1] / size, 2)
            items.append((image, None, [(box, "")], f"{names[row]}: {place['rule']}"))
            items.append((np.asarray(crops[row]), None, None, "its crop"))
        title = "The lungs' boxes, by how they were found, and what the lungs' network sees"
        found.append(gallery(items, title, overlay=box_overlay))
    return found


def surest(data, truth, probs, table):
    """Galleries of the surest right answer of each label and of the surest wrong one."""
    chosen = {"Right": [], "Wrong": []}
    for k, label in enumerate(LABELS):
        order = np.argsort(-probs[:, k])
        for title, hits in (("Right", truth[order, k] > 0), ("Wrong", truth[order, k] == 0)):
            if hits.any():
                at = order[np.argmax(hits)]
                row = data.rows_of([table["image_id"].iloc[at]])[0]
                chosen[title].append(
                    (
                        np.asarray(data.store.images[row]),
                        _boxes(data, row, k),
                        [],
                        f"{label} {probs[at, k]:.2f} · {data.ids(row)}",
                    )
                )
    return [gallery(items, title, overlay=box_overlay) for title, items in chosen.items()]


def overlays(context, data, truth, probs, table):
    """A gallery of class activation maps: of boxed findings the surest of each label, or else of right answers.

    The maps are computed on the CPU, which a page can always have, and kept in overlays.npz for the next page.
    """
    pairs = surest_pairs(data, truth, probs, table)
    if not len(pairs):
        return page.note("No picture of a map: no image has a finding.")
    key = digest(context.run.step("predict")["key"], pairs[["row", "label"]].to_numpy().tolist())
    path = context.run.path("overlays.npz")
    heats = _kept(path, key)
    if heats is None:
        maps = class_maps(replace(context, device=torch.device("cpu")), data, pairs)
        heats = [cv2.resize(maps.heat(k), (HEAT_SIDE, HEAT_SIDE), interpolation=cv2.INTER_AREA) for k in pairs["map"]]
        heats = np.round(255 * np.clip(heats, 0, 1)).astype(np.uint8)
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, key=key, heats=heats)
    items = []
    for pair, heat in zip(pairs.itertuples(), heats, strict=True):
        image = np.asarray(data.store.images[pair.row]), heat.astype(np.float32) / 255
        boxes = _boxes(data, pair.row, pair.label)
        items.append((image, boxes, [], f"{LABELS[pair.label]} {pair.prob:.2f} · {data.ids(pair.row)}"))
    title = (
        "Where the networks look for a finding that is there: violet to yellow, from the map's lowest to its highest"
    )
    return gallery(items, title, overlay=heat_overlay)


def surest_pairs(data, truth, probs, table):
    """At most SHOWN pairs (row, label, prob, split, fold, map) of images and findings that they have.

    For each label the pair of the highest probability among those that NIH boxed; without a box among them, of all.
    """
    rows = data.rows_of(table["image_id"])
    at, label = np.nonzero(truth > 0)
    pairs = data.table.loc[rows[at], ["row", "split", "fold"]].assign(label=label, prob=probs[at, label])
    boxed = pairs.merge(data.boxes[["row", "label"]].drop_duplicates(), on=["row", "label"])
    pairs = (boxed if len(boxed) else pairs).sort_values("prob", ascending=False, kind="stable")
    pairs = pairs.drop_duplicates("label").head(SHOWN).sort_values("label").reset_index(drop=True)
    return pairs.assign(map=np.arange(len(pairs)))


def _kept(path, key):
    try:
        with np.load(path) as kept:
            return kept["heats"] if str(kept["key"]) == key else None
    except (OSError, ValueError, KeyError):  # none yet, or damaged: they are made again
        return None


def _boxes(data, row, label):
    mine = data.boxes[(data.boxes["row"] == row) & (data.boxes["label"] == label)]
    corners = mine[BOX].to_numpy(float) * (data.store.images.shape[1] / BOX_SIDE)
    return [(box, LABELS[label]) for box in corners]
