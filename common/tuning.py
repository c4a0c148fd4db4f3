"""Decision rules for segmentation, tuned on out-of-fold probabilities.

`summarise` labels the regions of each image once per pixel threshold. From their areas and overlaps with the truth, the
exact Dice of every rule follows in well under a millisecond. `tune_nested` scores each fold with the rule chosen on the
other folds.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields, replace

import numpy as np
import pandas as pd
from tqdm import tqdm

from common import processes
from common.errors import InputError, check
from common.metrics.segmentation import dice_from_areas
from common.post.regions import quantise, region_overlaps, remove_small, resize_mask_probs
from common.post.rle import paint

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # pixel thresholds to choose from by expected Dice


@dataclass(frozen=True)
class Rule:
    """A rule from probabilities to a mask: chosen on out-of-fold images, applied unchanged to test images.

    The mask is empty unless the classifier's probability is >= `gate` and at least `min_pixels` pixels are >= `top`;
    otherwise it has the pixels >= `pixel`, without connected regions of fewer than `min_area`. Areas are counted at
    the submission's size or, with `at_network`, at the network's, before enlarging it by repeating pixels. (pixel,
    min_area, gate) is the rule of the SIIM paper, (top, min_pixels, pixel) the winner's triplet. With `expected` above
    0, each image gets the pixel threshold of the highest expected Dice, or an empty mask, see `best_levels`.
    """

    pixel: float
    min_area: int = 0
    gate: float = 0.0
    top: float = 0.0
    min_pixels: int = 0
    at_network: bool = False
    expected: float = 0.0

    def __post_init__(self):
        for field in fields(self):  # to plain Python numbers for JSON, since grids come from numpy
            value = getattr(self, field.name)
            if isinstance(value, str) or value != field.type(value):
                raise InputError(f"{field.name} must be {field.type.__name__}, not {value!r}")
            object.__setattr__(self, field.name, field.type(value))
        shares = 0 < self.pixel <= 1 and 0 <= self.gate <= 1 and 0 <= self.top <= 1
        check(shares, f"pixel must lie in (0, 1], gate and top in [0, 1]: {self}")
        least = min(self.min_area, self.min_pixels, self.expected)
        check(least >= 0, f"min_area, min_pixels and expected must be 0 or more: {self}")

    def apply(self, probs, gate_prob=None, size=(1024, 1024), connectivity=8):
        """Return the mask of one image, uint8 `size` (height, width) of 0 and 1, from uint8 probabilities (h, w)."""
        if not _gate_passes(self, gate_prob):
            return np.zeros(size, np.uint8)
        factors = _factors(probs.shape, size) if self.at_network else (1, 1)
        grid = probs if self.at_network else resize_mask_probs(probs, size)
        if self.expected:
            counts = np.bincount(grid.reshape(-1), minlength=256)[None]
            level = best_levels(counts, None if gate_prob is None else np.array([gate_prob]), self.expected)[0]
            if level < 0:
                return np.zeros(size, np.uint8)
            return replace(self, pixel=LEVELS[level], expected=0.0).apply(probs, gate_prob, size, connectivity)
        if np.count_nonzero(grid >= quantise(self.top)) < self.min_pixels:
            return np.zeros(size, np.uint8)
        return _enlarge(remove_small(grid, self.min_area, connectivity, quantise(self.pixel)), factors)


def best_levels(histogram, present, weight):
    """Return the index in LEVELS of each image's threshold with the highest expected Dice, −1 for an empty mask, (N,).

    histogram: (N, 256), pixels by p × 255; present: (N,), the probability that the true mask is not empty. Given that,
    the mask above t has an expected Dice of about 2 · Σp over the mask / (its size + Σp over all pixels of at least
    LEVELS[0]). An empty mask has Dice 1 with the probability 1 − present, which counts `weight` times.
    """
    if present is None or not np.isfinite(present).all():
        raise InputError("a rule of expected Dice needs the probability of a mask of every image")
    probs = np.arange(256) / 255 * (np.arange(256) >= quantise(LEVELS[0]))
    above = np.stack([np.arange(256) >= quantise(level) for level in LEVELS], 1)
    sums, sizes, total = (histogram * probs) @ above, histogram @ above, (histogram @ probs)[:, None]
    dice = 2 * sums / np.maximum(sizes + total, 1)
    return np.where(present * dice.max(1) >= weight * (1 - present), dice.argmax(1), -1)


def grid(**values):
    """Return the Rules of all combinations of values, the last name varying fastest, without 0 < top < pixel."""
    rules = [Rule(**dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]
    rules = [rule for rule in rules if rule.top == 0 or rule.top >= rule.pixel]
    check(rules, f"the grid {values} contains no valid rule")
    return rules


@dataclass(frozen=True)
class OofRegions:
    """Areas in N images from which every rule can be scored; see `summarise`.

    regions: quantised threshold q → int32 (2, R), areas of all regions and overlaps with the truth; image i has the
    columns offsets[q][i] : offsets[q][i + 1]. histogram: int32 (N, 256); truth: true areas, int64 (N,); scale:
    pixels of the submission per counted pixel.
    """

    pixels: tuple
    regions: dict
    offsets: dict
    histogram: np.ndarray
    truth: np.ndarray
    scale: int
    at_network: bool


def summarise(probs, truth_runs, pixels, size=(1024, 1024), rows=None, connectivity=8, at_network=False, channel=0):
    """Return the OofRegions of uint8 probabilities (N, h, w) at several pixel thresholds in (0, 1].

    probs: read image by image, so they can stay on disk; of (N, C, h, w), one channel is used. truth_runs: N arrays
    of runs (`common.post.rle`) on `size` (height, width); rows: the images to use. With `at_network` regions are
    counted on (h, w), which must divide `size`.
    """
    rows = np.arange(len(probs))[slice(None) if rows is None else rows]
    rules = [Rule(pixel) for pixel in pixels]
    check(rules and len(rows), "tuning needs at least one pixel threshold and one image")
    thresholds = sorted({quantise(rule.pixel) for rule in rules})
    factors = _factors(probs.shape[-2:], size) if at_network else (1, 1)
    scale = factors[0] * factors[1]

    def measure(row):
        grid = np.ascontiguousarray(probs[row].reshape(-1, *probs.shape[-2:])[channel])
        grid = grid if at_network else resize_mask_probs(grid, size)
        counts = np.bincount(grid.reshape(-1), minlength=256).astype(np.int32)
        truth = paint(truth_runs[row], size, order="C") if len(truth_runs[row]) else None
        grid, found = _enlarge(grid, factors), [np.zeros((2, 0), np.int32)] * len(thresholds)
        for t, q in enumerate(thresholds):
            if counts[q:].any():
                areas, overlaps = region_overlaps(grid, truth, connectivity, q)
                found[t] = np.stack([areas // scale, overlaps]).astype(np.int32)
        return counts, 0 if truth is None else np.count_nonzero(truth), found

    with ThreadPoolExecutor(processes.cores()) as pool:
        bar = tqdm(pool.map(measure, rows), "regions", len(rows), leave=False)
        counts, truth, found = zip(*bar, strict=True)
    regions = {q: np.concatenate(of_q, axis=1) for q, of_q in zip(thresholds, zip(*found, strict=True), strict=True)}
    offsets = {q: np.cumsum([0, *(image[t].shape[1] for image in found)]) for t, q in enumerate(thresholds)}
    pixels = tuple(rule.pixel for rule in rules)
    return OofRegions(pixels, regions, offsets, np.stack(counts), np.array(truth), scale, at_network)


def rule_areas(oof, rule, gate_probs=None):
    """Return the overlap with the truth, predicted area and true area of each image, int64 (N,), as from `rule.apply`.

    Raises InputError for a rule that was not summarised, and for a gate without the classifier's probabilities (N,).
    """
    if rule.expected:
        levels = best_levels(oof.histogram, gate_probs, rule.expected)  # −1, of an empty mask, gets no rule
        rules = {level: replace(rule, pixel=pixel, expected=0.0) for level, pixel in enumerate(LEVELS)}
        return *nested_areas(oof, rules, levels, gate_probs)[:2], oof.truth
    q = quantise(rule.pixel)
    if q not in oof.regions or rule.at_network != oof.at_network:
        raise InputError(f"not summarised for {rule}: only pixel {oof.pixels}, at_network {oof.at_network}")
    passes = np.broadcast_to(_gate_passes(rule, gate_probs), oof.truth.shape)
    if rule.min_pixels:
        passes = passes & (oof.histogram[:, quantise(rule.top) :].sum(axis=1) >= rule.min_pixels)
    kept = np.where(oof.regions[q][0] >= rule.min_area, oof.regions[q], 0)
    sums = np.pad(np.cumsum(kept, axis=1, dtype=np.int64), ((0, 0), (1, 0)))
    predicted, common = np.diff(sums[:, oof.offsets[q]], axis=1) * passes
    return common, predicted * oof.scale, oof.truth


def nested_areas(oof, tuned_rules, parts, gate_probs=None):
    """Return `rule_areas` with the rule of each image's part, 0 without one; parts: (N,), keys of `tuned_rules`."""
    areas = np.zeros((3, len(parts)), np.int64)
    for part, rule in tuned_rules.items():
        areas[:, parts == part] = np.stack(rule_areas(oof, rule, gate_probs))[:, parts == part]
    return tuple(areas)


def rule_dice(oof, rule, gate_probs=None):
    """Return the Dice of every image, float64 (N,), under one rule; arguments and errors as in `rule_areas`."""
    return dice_from_areas(*rule_areas(oof, rule, gate_probs))


@dataclass(frozen=True)
class Tuned:
    """The result of `tune_nested`.

    rule: the best rule on all images, for the submission; naive: its mean Dice on them. fold_rules: part → rule chosen
    on the other parts; dice: (N,), each image with its part's rule; score: the mean of dice, to be reported. parts:
    (N,), the folds, or two halves of the patients if there is one fold (`halves`). tried: all rules, means: theirs.
    """

    rule: Rule
    fold_rules: dict
    dice: np.ndarray
    parts: np.ndarray
    score: float
    naive: float
    halves: bool
    tried: list
    means: np.ndarray

    def surface(self, metric):
        """Return the table of all rules tried, with their means on all images in the column `metric`."""
        return pd.DataFrame(list(map(asdict, self.tried))).assign(**{metric: self.means})

    def as_dict(self):
        """Return the content of tuned.json; Rule(**d["rule"]) restores the rule."""
        fold_rules = {str(part): asdict(rule) for part, rule in self.fold_rules.items()}
        figures = {"score": self.score, "naive": self.naive, "halves": self.halves}
        return {"rule": asdict(self.rule), "fold_rules": fold_rules, **figures}


def tune_nested(rules, dice_of, folds, groups=None, seed=0):
    """Return the Tuned with the best of `rules` by the mean of `dice_of(rule)`, float (N,), nested over the folds.

    Any score per image works in place of Dice; NaN leaves an image out.
    folds: (N,). A single fold is split into random halves that share no group (patients; None: images). Among tied
    rules, the one nearest the middle wins. Raises InputError if no group can be held out.
    """
    parts = np.asarray(folds)
    halves = len(np.unique(parts)) < 2
    if halves:
        parts = halve(np.arange(len(parts)) if groups is None else np.asarray(groups), len(parts), seed)
    labels, part = np.unique(parts, return_inverse=True)
    sums = np.array([_sums_and_counts(dice_of(rule), part, len(labels)) for rule in rules])
    means = _means(sums)
    best = _best(rules, means)
    dice, fold_rules = np.empty(len(parts)), {}
    for k, label in enumerate(labels.tolist()):
        chosen = _best(rules, _means(np.delete(sums, k, axis=2)))
        fold_rules[label] = chosen
        dice[part == k] = dice_of(chosen)[part == k]
    score, naive = (float(_means(_sums_and_counts(values, part, len(labels)))) for values in (dice, dice_of(best)))
    return Tuned(best, fold_rules, dice, parts, score, naive, halves, rules, means)


def _sums_and_counts(values, part, n):
    """Return the sums and the counts of the parts' values, ignoring NaN, float64 (2, n)."""
    known = ~np.isnan(values)
    return np.stack([np.bincount(part[known], each, n) for each in (values[known], None)])


def _means(sums):
    """Return the means (…,) of sums and counts (…, 2, n), 0 if nothing is counted."""
    totals, counts = np.moveaxis(sums.sum(axis=-1), -1, 0)
    return totals / np.maximum(counts, 1)


def _best(rules, scores):
    tied = np.flatnonzero(scores >= scores.max() - 1e-12)  # float sums differ in the last digits
    values = np.array([astuple(rules[i]) for i in tied], dtype=float)
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in values.T], axis=1)
    return rules[tied[np.argmin(np.round(((ranks - ranks.mean(axis=0)) ** 2).sum(axis=1), 9))]]


def halve(groups, n, seed):
    """Return a random half (0 or 1) for each of n images, keeping groups together, int (n,)."""
    names, group = np.unique(groups, return_inverse=True)
    if len(groups) != n or len(names) < 2:
        raise InputError(f"{n} images of one fold and {len(names)} patients: nothing can be held out while tuning")
    return np.random.default_rng(seed).permutation(np.arange(len(names)) % 2)[group]


def _gate_passes(rule, gate_probs):
    if rule.gate == 0:
        return True
    if gate_probs is None or not np.isfinite(gate_probs).all():
        raise InputError(f"a gate of {rule.gate} needs the classifier's probability of every image")
    return np.asarray(gate_probs) >= rule.gate


def _factors(shape, size):
    if any(big % small for big, small in zip(size, shape, strict=True)):
        raise InputError(f"removal at network size needs a size that divides {tuple(size)}, not {tuple(shape)}")
    return tuple(big // small for big, small in zip(size, shape, strict=True))


def _enlarge(mask, factors):
    return mask if factors == (1, 1) else mask.repeat(factors[0], axis=0).repeat(factors[1], axis=1)
