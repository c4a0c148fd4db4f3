"""The pictures of the report: lungs, the most confident predictions, and where the networks look."""

from dataclasses import replace

import cv2
import numpy as np
import torch

from common.config import digest
from common.paths import read_array, read_parquet
from common.post.boxes import BOX
from common.report import page
from common.report.gallery import box_overlay, cached_arrays, gallery, heat_overlay, outline_overlay
from solutions.chestxray14.config import BOX_SIDE, LABELS
from solutions.chestxray14.data import BOX_TABLE, labels_of
from solutions.chestxray14.lungs import LUNG_TABLE
from solutions.chestxray14.maps import class_maps

MOST = 8  # pictures of a gallery
HEAT_SIDE = 256  # of the cached maps


def labelled_predictions(run, images, name):
    """Return truth (n, 14), probabilities (n, 14) and the table of the labelled images in "oof" or "test"."""
    table = read_parquet(run.path(f"{name}.parquet"))
    truth = labels_of(images, images.rows_of(table["image_id"]))
    known = ~np.isnan(truth).any(axis=1)
    return truth[known], table.loc[known, list(LABELS)].to_numpy(), table[known]


def lung_galleries(images):
    """Return galleries of the mask that weights the features, and of the lungs' boxes with their crops."""
    pixels, names, galleries = images.store.images, images.table.set_index("row")["image_id"], []
    arrays, lungs = images.arrays, images.tables.get(LUNG_TABLE)
    if "masks" in arrays:
        items, masks = [], read_array(arrays["masks"])
        here = lungs["row"][lungs["row"].isin(names.index)].to_numpy()
        for row in here[:: max(1, len(here) // MOST)][:MOST]:
            mask = cv2.resize(masks[row], pixels.shape[1:], interpolation=cv2.INTER_LINEAR) >= 128
            items.append((pixels[row], None, mask, names[row]))
        structures = " and ".join(images.about["structures"])
        galleries.append(gallery(items, f"Region that weights the features: {structures}", overlay=outline_overlay))
    if "crops" in arrays:
        crops, items = read_array(arrays["crops"]), []
        per_rule = max(1, MOST // (2 * lungs["rule"].nunique()))
        for row in lungs[lungs["row"].isin(names.index)].groupby("rule", sort=False).head(per_rule)["row"]:
            image, found = pixels[row], lungs.loc[row]
            size = images.at([row])[["width", "height"]].to_numpy(float)[0]
            box = found[BOX].to_numpy(float) * np.tile(image.shape[::-1] / size, 2)
            items.append((image, None, [(box, "")], f"{names[row]}: {found['rule']}"))
            items.append((crops[row], None, None, "its crop"))
        title = "Boxes of the lungs, by how they were found, and the crops that the lung network sees"
        galleries.append(gallery(items, title, overlay=box_overlay))
    return galleries


def confident_galleries(images, truth, probs, table):
    """Return galleries of each label's most confident right and most confident wrong prediction."""
    chosen = {"Right": [], "Wrong": []}
    for k, label in enumerate(LABELS):
        order = np.argsort(-probs[:, k])
        for title, hits in (("Right", truth[order, k] > 0), ("Wrong", truth[order, k] == 0)):
            if hits.any():
                at = order[np.argmax(hits)]
                row = images.rows_of([table["image_id"].iloc[at]])[0]
                caption = f"{label} {probs[at, k]:.2f} · {images.ids([row])[0]}"
                chosen[title].append((images.store.images[row], _boxes(images, row, k), [], caption))
    return [gallery(items, title, overlay=box_overlay) for title, items in chosen.items()]


def map_gallery(job, truth, probs, table):
    """Return a gallery of class activation maps of `pick_pairs`, computed on the CPU and cached in overlays.npz."""
    images, pairs = job.images, pick_pairs(job.images, truth, probs, table)
    if not len(pairs):
        return page.note("No class activation maps: no image has a finding.")

    def compute():
        maps = class_maps(replace(job, device=torch.device("cpu")), pairs)
        heats = [cv2.resize(maps.heat(k), (HEAT_SIDE, HEAT_SIDE), interpolation=cv2.INTER_AREA) for k in pairs["map"]]
        return {"heats": np.round(255 * np.clip(heats, 0, 1)).astype(np.uint8)}

    key = digest(job.run.step("predict")["key"], pairs[["row", "label"]].to_numpy().tolist())
    heats = cached_arrays(job.run.path("overlays.npz"), key, compute)["heats"]
    items = []
    for pair, heat in zip(pairs.itertuples(), heats, strict=True):
        caption = f"{LABELS[pair.label]} {pair.prob:.2f} · {images.ids([pair.row])[0]}"
        picture = images.store.images[pair.row], heat.astype(np.float32) / 255
        items.append((picture, _boxes(images, pair.row, pair.label), [], caption))
    title = "Where the networks look for a finding that is present; violet to yellow: the map's lowest to highest value"
    return gallery(items, title, overlay=heat_overlay)


def pick_pairs(images, truth, probs, table):
    """Return the most probable image of each finding, if possible a boxed one: row, split, fold, label, prob, map."""
    rows = images.rows_of(table["image_id"])
    at, label = np.nonzero(truth > 0)
    pairs = (
        images.at(rows[at])[["row", "split", "fold"]].reset_index(drop=True).assign(label=label, prob=probs[at, label])
    )
    boxed = pairs.merge(images.tables[BOX_TABLE][["row", "label"]].drop_duplicates(), on=["row", "label"])
    pairs = (boxed if len(boxed) else pairs).sort_values("prob", ascending=False, kind="stable")
    pairs = pairs.drop_duplicates("label").head(MOST).sort_values("label").reset_index(drop=True)
    return pairs.assign(map=np.arange(len(pairs)))


def _boxes(images, row, label):
    boxes = images.tables[BOX_TABLE]
    mine = boxes[(boxes["row"] == row) & (boxes["label"] == label)]
    corners = mine[BOX].to_numpy(float) * (images.store.images.shape[1] / BOX_SIDE)
    return [(box, LABELS[label]) for box in corners]
