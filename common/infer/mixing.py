"""Predictions of several members mixed by weights (probabilities, maps, boxes), and the search for the weights.

Weights are tuples of numbers >= 0, one per member; parts are the folds, or halves, of images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from common.data.loaders import eval_loader
from common.infer.predict import write_masks
from common.post.fusion import fuse_table
from common.post.members import COLUMNS
from common.post.regions import resize_mask_probs
from common.tuning import release_pages

BLOCK = 16  # maps in memory at once, of each member
NEAR = 1e-6  # of 0 and 1: where probabilities are cut off before they become logits


@dataclass(frozen=True)
class Mixture:
    """What members predict of store rows (n,) together, scored by a Network's own validation figures.

    mixed(list of weights) -> iterable of predictions, one for each: arrays (n, …), or tables of boxes.
    """

    job: Any
    network: Any
    rows: np.ndarray
    mixed: Callable

    def score(self, pairs):
        """Return the solution's metric, higher is better, of pairs (predictions, bool (n,): the images to take)."""
        ids = self.job.images.ids(self.rows)
        found = [p[p["image_id"].isin(ids[at])] if isinstance(p, pd.DataFrame) else p[at] for p, at in pairs]
        found = pd.concat(found, ignore_index=True) if isinstance(found[0], pd.DataFrame) else np.concatenate(found)
        rows = np.concatenate([self.rows[at] for _, at in pairs])
        return float(self.network.figures(self.job, found, rows)[self.job.recipe.metric])

    def nested(self, weights, parts):
        """Return the score of all images, those of each part, (n,), under weights[part]."""
        distinct = list(dict.fromkeys(weights[part] for part in parts.tolist()))
        pairs = zip(distinct, self.mixed(distinct), strict=True)
        return self.score([(found, np.array([weights[p] == each for p in parts.tolist()])) for each, found in pairs])


def search_weights(mixture, parts, n_members, steps=10):
    """Return {part: weights chosen on the images of the other parts}, and under None those chosen on all images.

    Forward selection with replacement (Caruana et al. 2004): in each step the member that helps most joins the mean,
    again if need be; the best mean of any step is taken, the earliest of equal ones.
    """
    chosen = {part: parts != part for part in np.unique(parts).tolist()} | {None: np.ones(len(parts), bool)}
    counts = {part: np.zeros(n_members, int) for part in chosen}
    best, known = dict.fromkeys(chosen, (-math.inf, (1,) * n_members)), {}
    for _ in range(steps):
        sums = {part: before + np.eye(n_members, dtype=int) for part, before in counts.items()}
        tried = {part: [tuple((w // np.gcd.reduce(w)).tolist()) for w in many] for part, many in sums.items()}
        new = list(dict.fromkeys(each for many in tried.values() for each in many if each not in known))
        for weights, found in zip(new, mixture.mixed(new), strict=True):
            scores = {part: mixture.score([(found, at)]) for part, at in chosen.items()}
            known[weights] = {part: -math.inf if math.isnan(score) else score for part, score in scores.items()}
        for part, many in tried.items():
            scores = [known[weights][part] for weights in many]
            counts[part][np.argmax(scores)] += 1
            if max(scores) > best[part][0] + 1e-12:
                best[part] = max(scores), many[np.argmax(scores)]
    return {part: weights for part, (_, weights) in best.items()}


def compare_members(mixture, weights, parts, names):
    """Return the nested score of the mixture, and a table of its members.

    Columns: member; weight, its share in the submission; score alone; without, the nested score of the others at the
    same weights (equal ones where theirs are 0); cost, what leaving the member out costs.
    """
    units, score, rest = np.eye(len(names), dtype=int), mixture.nested(weights, parts), []
    alone = [mixture.nested(dict.fromkeys(weights, tuple(unit)), parts) for unit in units]
    for unit in units:
        others = {part: np.array(each) * (1 - unit) for part, each in weights.items()}
        others = {part: tuple(each if each.any() else 1 - unit) for part, each in others.items()}
        rest.append(mixture.nested(others, parts))
    columns = {"member": names, "weight": shares_of(weights, [None])[0], "score": alone, "without": rest}
    return score, pd.DataFrame(columns).assign(cost=score - np.array(rest))


def shares_of(weights, parts):
    """Return the members' shares of images, float64 (n, members), by the part of each; each row sums to 1."""
    found = np.array([weights[part] for part in parts], float).reshape(len(parts), len(weights[None]))
    return found / found.sum(axis=1, keepdims=True)


def mixed_values(network, blocks, many):
    """Return what the Network measures of means of probabilities under each of many weights, arrays (n, …).

    blocks() -> pairs of probabilities of all members, (members, images, …), and the targets of the images or None.
    """
    found = [[] for _ in many]
    for values, target in blocks():
        for measured, weights in zip(found, many, strict=True):
            mean = torch.from_numpy(np.tensordot(np.array(weights, np.float32) / sum(weights), values, 1))
            measured.append(np.asarray(network.measure(torch.logit(mean, NEAR).float(), target)))
    return [np.concatenate(each) for each in found]


def value_columns(table):
    """Return the names of a table's columns of predictions."""
    return [name for name in table.select_dtypes("number") if name not in ("row", "fold")]


def mix_tables(tables, shares):
    """Return the first of several aligned tables with the weighted means of its columns of predictions."""
    values = np.stack([table[value_columns(tables[0])].to_numpy(float) for table in tables])
    means = np.einsum("nm,mnc->cn", shares, values)
    return tables[0].assign(**dict(zip(value_columns(tables[0]), means, strict=True)))


def to_ranks(table, reference):
    """Return a table with the share of the reference table's values below each of its own; equal ones count half."""
    ranks = {}
    for name in value_columns(table):
        known = np.sort(reference[name].to_numpy())
        ranks[name] = sum(np.searchsorted(known, table[name], side) for side in ("left", "right")) / (2 * len(known))
    return table.assign(**ranks)


def read_maps(maps, places, size):
    """Return the maps at some places of memory-mapped files, float32 (members, n, channels, *size) of 0 to 255."""
    found = []
    for each, at in zip(maps, places, strict=True):
        block = each[at].reshape(-1, *each.shape[-2:])
        block = np.stack([one if one.shape == tuple(size) else resize_mask_probs(one, size) for one in block])
        found.append(block.reshape(len(at), -1, *size))
        release_pages(each)
    return np.stack(found).astype(np.float32)


def map_blocks(dataset, maps, places):
    """Yield the blocks of `mixed_values` of members' maps; places: (members, n), those of the images of `dataset`."""
    for number, (_, target) in enumerate(eval_loader(dataset, BLOCK)):
        yield read_maps(maps, places[:, number * BLOCK :][:, :BLOCK], dataset.size) / 255, target


def mix_maps(path, maps, places, shares):
    """Write the weighted means of members' maps to a .npy file, in blocks, at the size of the largest.

    maps: memory-mapped uint8 (…, h, w); places: (members, n), the position of each image in them; shares: (n, members).
    """
    shape = max((each.shape[1:] for each in maps), key=lambda shape: shape[-2] * shape[-1])

    def blocks():
        for begin in range(0, len(shares), BLOCK):
            part = slice(begin, begin + BLOCK)
            values = read_maps(maps, places[:, part], shape[-2:])
            mean = np.einsum("nm,mn...->n...", shares[part].astype(np.float32), values)
            yield (mean + 0.5).astype(np.uint8).reshape(-1, *shape)

    write_masks(path, (len(shares), *shape), blocks())


def fuse_folds(table, images, iou):
    """Return the boxes of one detector; where several folds' networks predicted the same images, they are fused."""
    if len(table[["image_id", "fold"]].drop_duplicates()) == table["image_id"].nunique():
        return table[COLUMNS]
    folds = [part for _, part in table.groupby("fold")]
    return next(mixed_boxes(images, folds, iou, [(1,) * len(folds)]))


def mixed_boxes(images, tables, iou, many):
    """Yield members' boxes under each of many weights, by weighted boxes fusion of overlaps above `iou`.

    images: image_id, width, height. Scores are cut off at 1, which several boxes of one heavy member may exceed.
    """
    for weights in many:
        kept = [(table[table["score"] > 0], w) for table, w in zip(tables, weights, strict=True) if w > 0]
        if len(kept) == 1:
            yield kept[0][0][COLUMNS]
        else:
            used, shares = zip(*kept, strict=True)
            fused = fuse_table(list(used), images, np.array(shares) / sum(shares), iou_thr=iou, no_finding=None)
            yield fused.assign(score=fused["score"].clip(upper=1.0))
