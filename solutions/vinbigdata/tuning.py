"""Tune the decision rule for several networks on the leaderboard's metric, nested over the folds."""

import itertools
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd

from common.compare import groups_of
from common.config import to_dict
from common.data.folds import make_folds
from common.detection import gate_figures
from common.metrics.classification import mean_of_defined
from common.metrics.detection import Result, ap_of, bootstrap_map, class_aps, evaluate
from common.metrics.statistics import Interval, as_interval, as_json
from common.post.fusion import join_members, own_boxes
from solutions.vinbigdata import postprocess
from solutions.vinbigdata.config import NO_FINDING
from solutions.vinbigdata.data import VOC_FINDINGS, no_findings
from solutions.vinbigdata.postprocess import DecisionRule, list_rules

SWEEP = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.997, 1.0)  # values of alpha and beta in the report's figure


@dataclass(frozen=True, eq=False)
class Tuned:
    """The result of `tune_detection`.

    rule: the best on all images; naive: its mean AP there. parts: (n,), each image's fold, or its half of the patients
    if there is one fold (`halves`). part_rules: {part: the rule chosen on the other parts}. detections: boxes under the
    rule of their image's part; result, score, class_scores: their evaluation with intervals. surface: all rules tried,
    sweep: `rule` with other alpha and beta, on all images. members: member, weight and map (of its own findings).
    """

    rule: DecisionRule
    part_rules: dict
    parts: np.ndarray
    halves: bool
    detections: pd.DataFrame
    result: Result
    score: Interval
    class_scores: list
    naive: float
    surface: pd.DataFrame
    sweep: pd.DataFrame
    members: pd.DataFrame

    def as_dict(self):
        """Return the content of tuned.json; common.config.from_dict(DecisionRule, d["rule"]) restores the rule."""
        return {
            "rule": to_dict(self.rule),
            "part_rules": {str(part): to_dict(rule) for part, rule in self.part_rules.items()},
            "members": self.members["member"].tolist(),
            "score": as_interval(self.score),
            "naive": self.naive,
            "halves": self.halves,
        }


def tune_detection(oof, truth, images, health, members, fusion, decision, seed=0, n_resamples=1000):
    """Return the Tuned with the best rule of a FusionConfig and a DecisionConfig by the leaderboard's mean AP.

    oof: each image's boxes by the networks not trained on it; truth: true boxes, one row of class 14 for an image
    without a finding; images: the held-out ones, with fold and patient_id ("" if unknown); health: as in `apply_rule`.
    Mean AP is not a mean over images, so each part of the images gets the rule chosen on the other parts, and then all
    images are scored as one set. fusion.weights go to the members in order of their boxes' mean AP, best first; then
    each value of fusion.try_weights is tried for one member after another. fusion.method may also be "best", which uses
    only the boxes of the member with the highest weight. Of tied rules, the middle one wins.
    """
    ids, groups, parts = images["image_id"].to_numpy(), groups_of(images), images["fold"].to_numpy()
    halves = images["fold"].nunique() < 2
    if halves:
        labels = pd.crosstab(truth["image_id"], truth["class_id"]).reindex(ids, fill_value=0) > 0
        parts = make_folds(labels.to_numpy().astype(int), 2, groups, seed)
    names = np.unique(parts)
    shares = np.stack([np.ones(len(ids)), *(parts != name for name in names)])  # all images, then all but each part
    trials = _Trials(oof, truth, images, health, members, fusion.method, shares)
    best, *others = (trials.choose(share, fusion, decision) for share in range(len(shares)))
    part_rules = dict(zip(names.tolist(), others, strict=True))
    under = (trials.decide(rule, ids[parts == name]) for name, rule in part_rules.items())
    detections = pd.concat(under, ignore_index=True)
    result = evaluate(detections, truth, ids)
    class_scores, score = bootstrap_map(result, groups, n_resamples, seed)
    surface = trials.table(list_rules(fusion, decision, best.weights)).drop(columns="weights")
    pairs = [(a, b) for a, b in itertools.product(SWEEP, (-1.0, *SWEEP)) if b <= a]
    sweep = trials.table(replace(best, alpha=a, beta=b) for a, b in pairs)[["alpha", "beta", "map"]]
    alone = pd.DataFrame({"member": list(members), "weight": best.weights, "map": trials.own[:, 0]})
    naive = float(trials.scores(best)[0])
    vars(trials).clear()  # its caches refer to it, so all boxes would stay in memory until the garbage collector runs
    return Tuned(best, part_rules, parts, halves, detections, result, score, class_scores, naive, surface, sweep, alone)


def score_figures(tuned, truth, images, healthy, tested):
    """Return the content of score.json; healthy, tested: out-of-fold and test probabilities of being healthy."""
    true, probs = 1 - images["abnormal"].to_numpy(), healthy.reindex(images["image_id"]).to_numpy()
    aps, rule, of_2cc = tuned.result.classes["ap"], tuned.rule, gate_figures(true, probs)
    nothing = no_findings(images[["image_id"]].assign(score=1.0))

    def shares(values):
        return {"alpha": float((values > rule.alpha).mean()), "beta": float((values > rule.beta).mean())}

    return {
        "map": as_interval(tuned.score),
        "map_findings": as_json(aps[:NO_FINDING].mean()),
        "ap_no_finding": as_json(aps[NO_FINDING]),
        "classes": int(aps.notna().sum()),
        "map_not_nested": tuned.naive,
        "map_no_finding": float(evaluate(nothing, truth, images["image_id"]).mean_ap),
        "images": len(images),
        "abnormal": int((true == 0).sum()),
        "nested_by": "halves of the patients" if tuned.halves else "folds",
        "healthy": {
            "auroc": as_json(of_2cc["auroc"]),
            "accuracy": float(of_2cc["accuracy"]),
            "share_above": {"oof": shares(probs), "test": shares(tested) if len(tested) else None},
        },
    }


def rank_weights(weights, own):
    """Return the members' weights, a tuple (m,): `weights`, then 1, in order of their scores `own`, best first."""
    given = np.empty(len(own))
    given[np.argsort(-np.asarray(own), kind="stable")] = [*weights, *[1.0] * len(own)][: len(own)]
    return tuple(given.tolist())


def search_weights(score_of, start, values, rounds=3):
    """Return the weights found by trying `values` for one member after another while score_of(weights) improves."""
    best, top = tuple(start), score_of(tuple(start))
    for _ in range(rounds):
        before = best
        for member, value in itertools.product(range(len(best)), values):
            tried = (*best[:member], float(value), *best[member + 1 :])
            score = score_of(tried)
            if score > top:
                best, top = tried, score
        if best == before:
            break
    return best


class _Trials:
    """Cached scores of rules on k subsets of the n images; shares: (k, n), 1 for the images of a subset, else 0."""

    def __init__(self, oof, truth, images, health, members, method, shares):
        self.oof, self.members, self.truth, self.images, self.shares = oof, members, truth, images, shares
        self.health, self.method = health, method
        self.known, self.fuse, self.match = {}, lru_cache(1)(self._fuse), lru_cache(1)(self._match)
        self.own_boxes, self.scale = lru_cache(1)(self._own_boxes), lru_cache(1)(self._scale)
        self.probs, self.present = postprocess.split_health(health, images["image_id"])
        own = (oof[oof["member"] == member] for member in members)
        own = (evaluate(table, truth, images["image_id"], VOC_FINDINGS) for table in own)  # one at a time in memory
        self.own = np.stack([mean_of_defined(ap_of(result, shares)) for result in own])  # (members, k)

    def choose(self, share, fusion, decision):
        weights = rank_weights(fusion.weights, self.own[:, share])
        grid = list_rules(fusion, decision, weights)
        if fusion.try_weights:
            middle = grid[(len(grid) - 1) // 2]
            weights = search_weights(
                lambda tried: self.scores(replace(middle, weights=tried))[share], weights, fusion.try_weights
            )
            grid = list_rules(fusion, decision, weights)
        scores = np.array([self.scores(rule)[share] for rule in grid])
        tied = np.flatnonzero(scores >= scores.max() - 1e-12)
        return grid[tied[(len(tied) - 1) // 2]]

    def table(self, rules):
        """Return the rules, one per row, with their mean AP on all images."""
        return pd.DataFrame([asdict(rule) | {"map": self.scores(rule)[0]} for rule in rules])

    def _own_boxes(self, skip, nms, limit):
        rule = DecisionRule((1.0,) * len(self.members), 0.0, skip, nms, limit)
        return own_boxes(self.oof, self.images, self.members, rule)

    def _fuse(self, rule):
        tables = self.own_boxes(rule.skip, rule.nms, rule.limit)
        if self.method == "best":
            top = int(np.argmax(rule.weights))
            return join_members({top: [*tables.values()][top]}, self.images, replace(rule, weights=(1.0,)))
        return join_members(tables, self.images, rule, self.method)

    def decide(self, rule, ids):
        boxes = self.fuse(rule.fusion)
        boxes = boxes if len(ids) == len(self.images) else boxes[boxes["image_id"].isin(ids)]
        return postprocess.apply_rule(boxes, ids, self.health, rule)

    def _match(self, rule):
        return evaluate(self.fuse(rule), self.truth, self.images["image_id"])

    def _scale(self, rule):
        found = self.match(rule.fusion)
        if rule == rule.fusion:
            return found
        class_of = np.repeat(np.arange(len(found.starts) - 1), np.diff(found.starts))
        boxes = pd.DataFrame({"score": found.score, "class_id": class_of})
        scaled = postprocess.scale_scores(boxes, found.image, self.probs, self.present, rule)
        ranked = np.lexsort((-scaled, class_of))
        return replace(found, score=scaled[ranked], image=found.image[ranked], found=found.found[ranked])

    def scores(self, rule):
        """Return the mean AP of a rule on each subset, the same as from `evaluate` on the boxes of `decide`.

        Rules with the same fusion share one matching, since they treat all boxes of an image and class alike.
        """
        if rule not in self.known:
            found = self.scale(replace(rule, alpha=1.0, beta=1.0))
            dropped, boxed = self.probs > rule.alpha, self.probs > rule.beta
            empty = dropped | (np.bincount(found.image, minlength=len(dropped)) == 0)
            added = np.flatnonzero(boxed | empty)
            score = np.where(boxed & ~dropped, self.probs, 1.0)[added]
            order = np.argsort(-score, kind="stable")
            healthy = np.bincount(found.truth_image[found.truth_class == NO_FINDING], minlength=len(dropped)) > 0
            # No finding is the last class; its rows count whether or not the image's boxes were dropped
            parts = (found.score, score[order]), (found.found, healthy[added][order])
            scores, hits = (np.concatenate(part) for part in parts)
            image = np.concatenate([found.image, len(dropped) + added[order]])
            starts = np.append(found.starts[:-1], len(scores))
            n, of_truth = len(starts) - 1, self.shares[:, found.truth_image]
            totals = np.stack([np.bincount(found.truth_class, share, n) for share in of_truth])
            weights = np.hstack([self.shares * ~dropped, self.shares])
            aps = class_aps(starts, scores, hits, image, weights, totals, found.rule)
            self.known[rule] = mean_of_defined(aps)
        return self.known[rule]
