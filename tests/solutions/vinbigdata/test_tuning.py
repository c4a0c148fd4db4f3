"""The nested search for the fusion and the rule, against plain loops over rules and images."""

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from common.config import from_dict
from common.metrics.detection import evaluate
from common.post.fusion import fuse_members
from solutions.vinbigdata.config import DecisionConfig, FusionConfig
from solutions.vinbigdata.data import VOC_FINDINGS
from solutions.vinbigdata.postprocess import DecisionRule, apply_rule, list_rules
from solutions.vinbigdata.tuning import rank_weights, search_weights, tune_detection
from tests.solutions.vinbigdata.tables import rows_of, some_boxes, true


@pytest.fixture(scope="module")
def case():
    """Boxes of two members, truth, images in three folds, and probabilities of health."""
    found, truth = some_boxes(seed=3, n=120)
    rng, healthy = np.random.default_rng(1), [f"h{k}" for k in range(40)]
    images = pd.DataFrame({"image_id": sorted({f"i{k}" for k in range(60)} & set(truth["image_id"])) + healthy})
    images = images.assign(width=3000, height=1000, fold=rng.integers(0, 3, len(images)))
    images["patient_id"] = [f"p{k // 2}" for k in range(len(images))]
    false = found.sample(50, random_state=0).assign(image_id=rng.choice(healthy, 50))
    found = pd.concat([found, false], ignore_index=True)
    found["fold"] = images.set_index("image_id")["fold"][found["image_id"]].to_numpy()
    truth = pd.concat([truth, true(*((name, 14, 0, 0, 1, 1) for name in healthy))], ignore_index=True)
    level = images["image_id"].str.startswith("h") * 0.4 + rng.uniform(0.05, 0.6, len(images))
    return found, truth, images, pd.DataFrame({"healthy": level.to_numpy()}, images["image_id"])


FUSION = FusionConfig(weights=(2.0,), iou=(0.3, 0.6), skip=(0.0, 0.2))
DECISION = DecisionConfig(alpha=(0.6, 0.8, 0.95), beta=(0.3, 0.5))


def tune(found, truth, images, healthy, fusion=FUSION, decision=DECISION):
    return tune_detection(found, truth, images, healthy, ["x", "y"], fusion, decision, n_resamples=10)


def test_the_boxes_are_freed_with_the_search(case):
    found, truth, images, healthy = case
    found = found.copy()
    left = weakref.ref(found)
    gc.disable()  # which may not run for long
    try:
        tune(found, truth, images, healthy)
        del found
        assert left() is None
    finally:
        gc.enable()


def of(frame, ids):
    return frame[frame["image_id"].isin(ids)]


def test_each_part_has_the_rule_that_the_others_chose(case):
    found, truth, images, healthy = case
    tuned = tune(found, truth, images, healthy)
    shares = {None: images["image_id"]} | {k: images.loc[images["fold"] != k, "image_id"] for k in range(3)}
    pieces = []
    for part, ids in shares.items():
        own = [evaluate(of(found[found["member"] == m], ids), of(truth, ids), ids) for m in ("x", "y")]
        own = [result.classes["ap"][:14].mean() for result in own]
        grid = list_rules(FUSION, DECISION, (2, 1) if own[0] >= own[1] else (1, 2))
        scores = {}
        for rule in grid:  # without weights of images, memory or sharing
            fused = fuse_members(found, images, ["x", "y"], rule)
            scores[rule] = evaluate(apply_rule(of(fused, ids), ids, healthy, rule), of(truth, ids), ids).mean_ap
        chosen = tuned.rule if part is None else tuned.part_rules[part]
        assert scores[chosen] == pytest.approx(max(scores.values()), abs=1e-9)
        if part is None:
            assert tuned.naive == pytest.approx(scores[chosen]) and min(scores.values()) < tuned.naive
            assert tuned.surface["map"].tolist() == pytest.approx(list(scores.values()))
            assert tuned.members["map"].tolist() == pytest.approx(own)
        else:
            here = images.loc[images["fold"] == part, "image_id"]
            fused = of(fuse_members(found, images, ["x", "y"], chosen), here)
            pieces.append(apply_rule(fused, here, healthy, chosen))
    nested = pd.concat(pieces)
    assert sorted(rows_of(nested)) == sorted(rows_of(tuned.detections))
    assert tuned.score.estimate == pytest.approx(evaluate(nested, truth, images["image_id"]).mean_ap)
    assert tuned.score.low < tuned.score.estimate < tuned.score.high and not tuned.halves
    assert len(tuned.class_scores) == 15 and (tuned.parts == images["fold"]).all()
    saved = json.loads(json.dumps(tuned.as_dict()))
    assert from_dict(DecisionRule, saved["rule"]) == tuned.rule and set(saved["part_rules"]) == {"0", "1", "2"}


def test_suppression_combination_and_scaling_are_searched_too(case):
    found, truth, images, health = case
    rng = np.random.default_rng(0)
    health = health.assign(**{str(k): rng.random(len(health)) for k in range(14)})
    fusion = FusionConfig(nms=(0.5, 1.0), limit=(1, 0), conf_type=("avg", "max"))
    decision = DecisionConfig(("append", "none"), gamma=(0.0, 1.0), delta=(0.0, 0.5))
    tuned = tune(found, truth, images, health, fusion, decision)
    rules = list_rules(fusion, decision, tuned.rule.weights)
    assert len(rules) == len(tuned.surface) == 64 and tuned.surface["map"].nunique() > 20
    for rule, score in list(zip(rules, tuned.surface["map"], strict=True))[::7]:  # without sharing matches
        decided = apply_rule(fuse_members(found, images, ["x", "y"], rule), images["image_id"], health, rule)
        assert score == pytest.approx(evaluate(decided, truth, images["image_id"]).mean_ap)


def test_one_fold_is_halved_by_patient(case):
    found, truth, images, healthy = case
    found, images = found.assign(fold=0), images.assign(fold=0)
    tuned = tune(found, truth, images, healthy)
    assert tuned.halves and set(tuned.parts) == set(tuned.part_rules) == {0, 1}
    assert pd.Series(tuned.parts).groupby(images["patient_id"]).nunique().max() == 1
    shuffled = tune(*(table.sample(frac=1, random_state=0) for table in (found, truth)), images, healthy)
    first, second = shuffled.as_dict(), tuned.as_dict()
    assert first.pop("score") == pytest.approx(second.pop("score")) and first == second


def test_of_equal_rules_the_middle_one_wins(case):
    found, truth, images, healthy = case
    above = DecisionConfig(alpha=(0.991, 0.992, 0.995, 0.997, 0.999), beta=(0.5,))  # no image lies between them
    tuned = tune(found, truth, images, healthy, FusionConfig(), above)
    assert tuned.rule.alpha == 0.995


def test_weights_may_be_searched(case):
    found, truth, images, healthy = case
    configs = [FusionConfig(weights=(1.0,), try_weights=values) for values in ((), (1.0, 3.0))]
    fixed, tried = (tune(found, truth, images, healthy, config) for config in configs)
    assert set(tried.rule.weights) <= {1.0, 3.0} and tried.naive >= fixed.naive
    assert tried.members["weight"].tolist() == list(tried.rule.weights) and fixed.rule.weights == (1, 1)


def test_the_best_member_alone_is_chosen_part_by_part(case):
    found, truth, images, healthy = case
    config = FusionConfig(weights=(2.0,), method="best")
    tuned = tune(found, truth, images, healthy, config, DecisionConfig(("none",)))
    for part, rule in tuned.part_rules.items():
        ids = images.loc[images["fold"] != part, "image_id"]
        own = [evaluate(of(found[found["member"] == m], ids), of(truth, ids), ids, VOC_FINDINGS) for m in ("x", "y")]
        best = ("x", "y")[int(np.argmax([result.mean_ap for result in own]))]
        assert rule.weights == ((2, 1) if best == "x" else (1, 2))
        here = images.loc[images["fold"] == part, "image_id"]
        alone = apply_rule(of(found[found["member"] == best], here), here, healthy, rule)
        assert sorted(rows_of(of(tuned.detections, here))) == sorted(rows_of(alone))


def test_the_sweep_shows_the_fusion_of_the_rule_under_wide_ranges(case):
    found, truth, images, healthy = case
    tuned = tune(found, truth, images, healthy)
    row = tuned.sweep[(tuned.sweep["alpha"] == 0.9) & (tuned.sweep["beta"] == 0.5)].iloc[0]
    fused = fuse_members(found, images, ["x", "y"], tuned.rule)
    decided = apply_rule(fused, images["image_id"], healthy, replace(tuned.rule, alpha=0.9, beta=0.5))
    assert row["map"] == pytest.approx(evaluate(decided, truth, images["image_id"]).mean_ap)
    assert (tuned.sweep["beta"] <= tuned.sweep["alpha"]).all() and tuned.sweep["beta"].min() == -1


def test_weights_go_to_the_best_first():
    assert rank_weights((5, 2), [0.1, 0.4, 0.3, 0.2]) == (1, 5, 2, 1)
    assert rank_weights((5, 2, 1), [0.2, 0.3]) == (2, 5)
    assert rank_weights((5, 2), [0.2, 0.2]) == (5, 2)
    asked = []

    def score_of(weights):
        asked.append(weights)
        return -abs(weights[0] - 3 * weights[1])  # best at 3 : 1, or 6 : 2

    assert search_weights(score_of, (1, 1), (1, 2, 3)) == (3, 1) and len(asked) == 1 + 2 * 6
