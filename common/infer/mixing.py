"""Weighted mixing of several members' predictions (probabilities, maps, boxes), and the search for the weights.

Weights are tuples of numbers >= 0, one per member; parts are the folds of the images, or two halves.
"""

import ctypes
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from common.data.loaders import eval_loader
from common.data.store import to_square
from common.errors import log
from common.infer.predict import write_masks
from common.metrics.statistics import share_below
from common.post.fusion import FusionRule, join_members, own_boxes
from common.post.regions import resize_mask_probs
from common.post.rle import paint

BLOCK = 1  # maps of each member in memory at once
NEAR = 1e-6  # probabilities are clipped this far from 0 and 1 before they become logits


@dataclass(frozen=True)
class Mixture:
    """Joint predictions of several members for store rows (n,), scored by a Network's validation metrics.

    mixed(list of weights) -> iterable of one prediction per weights: arrays (n, …), or tables of boxes.
    """

    job: Any
    network: Any
    rows: np.ndarray
    mixed: Callable

    def score(self, pairs):
        """Return the solution's metric, higher is better, for pairs (predictions, bool (n,): the images to use)."""
        ids = self.job.images.ids(self.rows)
        found = [p[p["image_id"].isin(ids[at])] if isinstance(p, pd.DataFrame) else p[at] for p, at in pairs]
        found = pd.concat(found, ignore_index=True) if isinstance(found[0], pd.DataFrame) else np.concatenate(found)
        rows = np.concatenate([self.rows[at] for _, at in pairs])
        return float(self.network.figures(self.job, found, rows)[self.job.recipe.metric])

    def nested(self, weights, parts):
        """Return the score of all images, each part, of (n,), being mixed with weights[part]."""
        distinct = list(dict.fromkeys(weights[part] for part in parts.tolist()))
        pairs = zip(distinct, self.mixed(distinct), strict=True)
        return self.score([(found, np.array([weights[p] == each for p in parts.tolist()])) for each, found in pairs])


def search_weights(mixture, parts, n_members, steps=10, also=()):
    """Return {part: weights chosen on the images of the other parts}, and under None the weights chosen on all images.

    Forward selection with replacement (Caruana et al. 2004): each step adds the member that helps most to the mean,
    possibly again; the result is the best mean of any step, the earliest if several are equal, or equal weights if none
    scores above 0. also: further weights to try that the selection may miss, such as equal weights.
    """
    chosen = {part: parts != part for part in np.unique(parts).tolist()} | {None: np.ones(len(parts), bool)}
    counts = {part: np.zeros(n_members, int) for part in chosen}
    best, known = dict.fromkeys(chosen, (0.0, (1,) * n_members)), {}
    for _ in range(steps):
        sums = {part: before + np.eye(n_members, dtype=int) for part, before in counts.items()}
        tried = {part: [tuple((w // np.gcd.reduce(w)).tolist()) for w in many] for part, many in sums.items()}
        new = list(dict.fromkeys(each for many in (*tried.values(), also) for each in many if each not in known))
        for weights, found in zip(new, mixture.mixed(new), strict=True):
            scores = {part: mixture.score([(found, at)]) for part, at in chosen.items()}
            known[weights] = {part: np.nan_to_num(score, nan=-math.inf) for part, score in scores.items()}
        for part, many in tried.items():
            scores = [known[weights][part] for weights in many]
            counts[part][np.argmax(scores)] += 1
            if max(scores) > best[part][0] + 1e-12:
                best[part] = max(scores), many[np.argmax(scores)]
    for part in best:
        scores = [known[weights][part] for weights in also]
        if max(scores, default=-math.inf) > best[part][0] + 1e-12:
            best[part] = max(scores), also[np.argmax(scores)]
    if best[None][0] == 0:
        log.info("no member and no mixture scores above 0 out of fold: they get equal weights")
    return {part: weights for part, (_, weights) in best.items()}


def compare_members(mixture, weights, parts, names):
    """Return the nested score of the mixture, and a table of its members.

    Columns: member; weight, its share in the submission; score alone; without, the nested score of the other members
    with the same weights (equal weights if all of theirs are 0); cost, the loss from leaving the member out.
    """
    units, score, rest = np.eye(len(names), dtype=int), mixture.nested(weights, parts), []
    alone = [mixture.nested(dict.fromkeys(weights, tuple(unit)), parts) for unit in units]
    for unit in units if len(names) > 1 else ():
        others = {part: np.array(each) * (1 - unit) for part, each in weights.items()}
        others = {part: tuple(each if each.any() else 1 - unit) for part, each in others.items()}
        rest.append(mixture.nested(others, parts))
    rest = np.array(rest or [np.nan])
    columns = {"member": names, "weight": shares_of(weights, [None])[0], "score": alone, "without": rest}
    return score, pd.DataFrame(columns).assign(cost=score - rest)


def shares_of(weights, parts):
    """Return the members' shares for each image by its part, float64 (n, members); each row sums to 1."""
    found = np.array([weights[part] for part in parts], float).reshape(len(parts), len(weights[None]))
    return found / found.sum(axis=1, keepdims=True)


def mixed_values(network, blocks, many):
    """Return, for each of many weights, the Network's `measure` of the weighted mean probabilities, arrays (n, …).

    blocks() -> pairs of probabilities of all members, (members, images, …), and the targets of the images or None.
    """
    found = [[] for _ in many]
    for number, (values, target) in enumerate(blocks()):
        if number % 16 == 0:  # small results between large freed arrays would keep that memory from the system
            with suppress(AttributeError, OSError):
                ctypes.CDLL(None).malloc_trim(0)
        for measured, weights in zip(found, many, strict=True):
            mean = torch.from_numpy(np.tensordot(np.array(weights, np.float32) / sum(weights), values, 1))
            measured.append(np.asarray(network.measure(torch.logit(mean, NEAR).float(), target)))
    return [np.concatenate(each) for each in found]


def value_columns(table):
    """Return the names of a table's columns of predictions."""
    return [name for name in table.select_dtypes("number") if name not in ("row", "fold")]


def mix_tables(tables, shares):
    """Return the first of several aligned tables with its prediction columns replaced by weighted means."""
    values = np.stack([table[value_columns(tables[0])].to_numpy(float) for table in tables])
    means = np.einsum("nm,mnc->cn", shares, values)
    return tables[0].assign(**dict(zip(value_columns(tables[0]), means, strict=True)))


def to_ranks(table, reference):
    """Return a table with each value replaced by the share of the reference's values below it; ties count half."""
    return table.assign(**{name: share_below(table[name], reference[name]) for name in value_columns(table)})


@dataclass(frozen=True)
class DrawnMaps:
    """Anyone's masks used as maps, read one at a time: uint8 (n, h, w), 0 and 255 with edges blurred by resizing.

    masks: for each image, a function that returns a mask (height, width), or SIIM's run-lengths.
    """

    masks: list
    shape: tuple

    def __getitem__(self, position):
        found = self.masks[position]
        found = found() if callable(found) else paint(found, order="C")
        return to_square((np.asarray(found) != 0) * np.uint8(255), self.shape[-1])


def map_blocks(maps, places, size):
    """Yield members' maps as probabilities, float32 (members, block of images, channels, *size).

    maps: uint8 (n, …, h, w), on disk; places: (members, n), the position of each image in each member's maps.
    """
    for begin in range(0, places.shape[1], BLOCK):
        found = []
        for each, at in zip(maps, places[:, begin : begin + BLOCK], strict=True):
            flat = [one for position in at for one in each[position].reshape(-1, *each.shape[-2:])]
            flat = [one if one.shape == tuple(size) else resize_mask_probs(one, size) for one in flat]
            found.append(np.stack(flat).reshape(len(at), -1, *size))
        yield np.divide(found, 255, dtype=np.float32)


def target_blocks(dataset, maps, places):
    """Return pairs of a block of members' maps at the dataset's size and its targets, for `mixed_values`."""
    targets = (target for _, target in eval_loader(dataset, BLOCK))
    return zip(map_blocks(maps, places, dataset.size), targets, strict=True)


def mix_maps(path, maps, places, shares):
    """Write the means of members' maps (see `map_blocks`), weighted by shares (n, members), at the largest size."""
    shape = max((each.shape[1:] for each in maps), key=lambda shape: shape[-2] * shape[-1])
    parts = np.split(shares.astype(np.float32), range(BLOCK, len(shares), BLOCK))
    pairs = zip(parts, map_blocks(maps, places, shape[-2:]), strict=False)  # without images, there are no blocks
    means = (255 * np.einsum("nm,mn...->n...", *pair) + 0.5 for pair in pairs)
    write_masks(path, (len(shares), *shape), (mean.astype(np.uint8).reshape(-1, *shape) for mean in means))


def mixed_boxes(table, images, names, iou, many):
    """Yield, for each of many weights, the members' (`names`) boxes, fused over members and folds by `fuse_members`.

    images: image_id, width, height. Members with weight 0 are left out. A specialist, `run: class=detector`, does not
    vote on classes of which it finds no box, since that would lower their scores.
    """
    found = {n: {*own["class_id"]} for n, own in table.groupby("member") if "=" in n.rpartition(": ")[2]}
    silent = {k: tuple(n for n in found if k not in found[n]) for k in table["class_id"].unique().tolist()}
    for weights in many:
        used = {name: weight for name, weight in zip(names, weights, strict=True) if weight > 0}
        rule = FusionRule(tuple(used.values()), iou, skip=NEAR)  # scores of 0 have no weighted mean
        own, parts = own_boxes(table, images, list(used), rule, no_finding=None), []
        for absent in dict.fromkeys(silent.values()) or [()]:
            classes = [k for k, each in silent.items() if each == absent]
            voters = {n: each[each["class_id"].isin(classes)] for n, each in own.items() if n not in absent}
            rule = replace(rule, weights=tuple(used[name] for name in voters) or (1,))
            parts.append(join_members(voters or {"": table[:0]}, images, rule, no_finding=None))
        yield pd.concat(parts, ignore_index=True)
