"""Masks by a rule and their figures, against numbers worked out by hand and against numpy on the files of a run."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from common.paths import read_array, read_json
from solutions.lung_segmentation.config import DecisionConfig
from solutions.lung_segmentation.postprocess import MaskRule, figures, measure, rules

EIGHT = np.ones((3, 3), int)


def by_hand(probs, shape, rule):
    """The mask of one map: resized, cut at the least of 255 steps that reaches the threshold, largest regions."""
    mask = cv2.resize(probs, shape[::-1], interpolation=cv2.INTER_LINEAR) / 255 >= rule["pixel"] - 1e-9
    if rule["regions"]:
        labels, count = ndimage.label(mask, EIGHT)
        areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        kept = np.argsort(-areas, kind="stable")[: rule["regions"]] + 1
        mask = ndimage.binary_fill_holes(np.isin(labels, kept))
    return mask


def dice_of(mask, true):
    return 2 * (mask & true).sum() / (mask.sum() + true.sum())


# ---- rules ---------------------------------------------------------------------------------------------------------


def test_a_rule_keeps_regions_of_each_structure():
    probs = np.zeros((2, 20, 20), np.uint8)
    probs[0, 2:12, 1:6] = 200  # one lung
    probs[0, 15:18, 1:4] = 200  # and a speck of it
    probs[1, 2:12, 12:18] = 130
    probs[1, 5:7, 14:15] = 0  # a hole
    pixels = [int(part.sum()) for part in MaskRule(0.5, 0).parts(probs, (20, 20), "left_right")]
    assert pixels == [50 + 9, 60 - 2]
    pixels = [int(part.sum()) for part in MaskRule(0.5, 2).parts(probs, (20, 20), "left_right")]
    assert pixels == [50, 60]  # one region a side, its hole filled
    assert MaskRule(0.5, 2).lungs(probs, (20, 20), "left_right").sum() == 110
    both = probs.max(0)
    assert MaskRule(0.5, 2).lungs(both, (20, 20), "lungs").sum() == 110
    assert MaskRule(0.5, 3).lungs(both, (20, 20), "lungs").sum() == 119
    assert MaskRule(0.6, 0).lungs(both, (20, 20), "lungs").sum() == 59  # 130 / 255 is 0.51


def test_the_heart_is_no_lung():
    probs = np.zeros((3, 8, 8), np.uint8)
    probs[0, :4, :4], probs[1, 4:, :4], probs[2, :, 4:] = 255, 255, 255
    assert MaskRule().lungs(probs, (8, 8), "lungs_heart").sum() == 32
    assert MaskRule().parts(probs, (8, 8), "lungs_heart")[2].sum() == 32


def test_every_combination_is_a_rule():
    tried = rules(DecisionConfig(pixel=(0.4, 0.5), regions=(0, 2)))
    assert tried == [MaskRule(0.4, 0), MaskRule(0.4, 2), MaskRule(0.5, 0), MaskRule(0.5, 2)]


# ---- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 9, 40])
def test_counts_of_many_images_keep_their_order(count):
    rng = np.random.default_rng(0)
    true = rng.random((count, 3, 12, 10)) < 0.4
    probs = rng.integers(0, 256, (count, 3, 12, 10), np.uint8)
    tried = [MaskRule(0.3), MaskRule(0.7)]
    areas = measure(lambda row: true[row - 5], np.arange(5, 5 + count), probs, tried, "lungs_heart")
    assert areas.shape == (count, 2, 4, 4) and areas.dtype == np.int64
    for n in range(count):
        for r, rule in enumerate(tried):
            mask = probs[n] / 255 >= rule.pixel
            pairs = [(mask[:2].any(0), true[n, :2].any(0)), *zip(mask, true[n], strict=True)]
            assert areas[n, r].tolist() == [[(m & t).sum(), m.sum(), t.sum(), 120] for m, t in pairs]


# ---- figures -------------------------------------------------------------------------------------------------------


def test_pooled_pixels_are_not_the_mean_over_images():
    table = pd.DataFrame({"dataset": ["a", "a", "b"], "patient_id": ["1", "2", "3"]})
    # overlap, predicted, true, all: a large image that is half right, two small ones
    areas = np.array([[[500, 1000, 1000, 4000]], [[10, 10, 10, 100]], [[10, 10, 30, 100]]])
    found, rows = figures(table, areas, "lungs")
    assert rows["dice"].tolist() == pytest.approx([0.5, 1, 0.5]) and rows["iou"].tolist() == pytest.approx(
        [1 / 3, 1, 1 / 3]
    )
    estimates = {
        name: part["estimate"] for name, part in found.items() if isinstance(part, dict) and "estimate" in part
    }
    assert estimates == pytest.approx(
        {
            "dice": 2 / 3,
            "dice_pooled": 1040 / 2060,
            "iou": 5 / 9,
            "iou_pooled": 520 / 1540,
            "precision": (0.5 + 1 + 1) / 3,
            "precision_pooled": 520 / 1020,
            "recall": (0.5 + 1 + 1 / 3) / 3,
            "recall_pooled": 520 / 1040,
            "accuracy": (0.75 + 1 + 0.8) / 3,
            "accuracy_pooled": (4200 - 500 - 520) / 4200,
        }
    )
    assert (found["images"], found["patients"]) == (3, 3) and found["structures"] == {}
    assert list(found["datasets"]) == ["a"]  # of one patient no interval can be given
    assert found["datasets"]["a"]["dice"]["estimate"] == pytest.approx(0.75)
    assert found["datasets"]["a"]["dice_pooled"]["estimate"] == pytest.approx(1020 / 2020)
    for part in (found["dice"], found["dice_pooled"], found["datasets"]["a"]["dice"]):
        assert part["low"] <= part["estimate"] <= part["high"] and part["low"] < part["high"]


def test_images_of_one_patient_stand_and_fall_together():
    areas = np.array([[[value, 100, 100, 400]] for value in (50, 60, 70, 80, 85, 90, 95, 100)])
    table = pd.DataFrame({"dataset": "a", "patient_id": list("aabbccdd")})
    together, _ = figures(table, areas, "lungs")
    apart, _ = figures(table.assign(patient_id=list("abcdefgh")), areas, "lungs")
    assert together["patients"] == 4 and together["dice"]["estimate"] == pytest.approx(apart["dice"]["estimate"])
    width = [part["dice"]["high"] - part["dice"]["low"] for part in (together, apart)]
    assert width[0] > width[1]


def test_an_empty_prediction_has_figures():
    table = pd.DataFrame({"dataset": "a", "patient_id": ["1", "2"]})
    found, rows = figures(table, np.array([[[0, 0, 50, 100]], [[0, 0, 50, 100]]]), "lungs")
    assert rows["dice"].tolist() == [0, 0]
    for name in ("dice", "dice_pooled", "precision", "precision_pooled", "recall_pooled"):
        assert found[name] == {"estimate": 0, "low": 0, "high": 0}
    assert found["accuracy"]["estimate"] == 0.5


def test_structures_have_figures_of_their_own():
    table = pd.DataFrame({"dataset": "a", "patient_id": ["1", "2"]})
    one = [[90, 100, 100, 400], [40, 50, 50, 400], [45, 50, 50, 400], [10, 20, 20, 400]]
    found, _ = figures(table, np.array([one, one]), "lungs_heart")
    estimates = {name: part["dice"]["estimate"] for name, part in found["structures"].items()}
    assert estimates == pytest.approx({"left": 0.8, "right": 0.9, "heart": 0.5})
    assert found["dice"]["estimate"] == pytest.approx(0.9)


# ---- a whole run, counted again ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(runs):
    """Rows of the out-of-fold images: id, fold, dataset, map, true mask at its own size."""
    run = runs.finished("lung_segmentation") / "run"
    table = pd.read_parquet(run / "images.parquet").set_index("image_id")
    oof, probs = pd.read_parquet(run / "oof.parquet"), read_array(run / "oof_probs.b2nd")[:]
    assert (
        len(oof) == 12
        and probs.shape == (12, 32, 32)
        and (oof["fold"] == table.loc[oof["image_id"], "fold"].values).all()
    )
    rows = []
    for n, row in enumerate(oof.itertuples()):
        about = table.loc[row.image_id]
        true = np.any([np.asarray(Image.open(p)) > 0 for p in json.loads(about["masks"])[0]], axis=0)
        assert true.shape == (about["height"], about["width"])
        rows.append((row.image_id, row.fold, about["dataset"], probs[n], true))
    return rows


def test_scores_are_those_of_masks_counted_by_hand(counted, finished):
    run = finished / "run"
    tuned, score = read_json(run / "tuned.json"), read_json(run / "score.json")
    masks = [by_hand(probs, true.shape, tuned["fold_rules"][str(fold)]) for _, fold, _, probs, true in counted]
    dice = np.array([dice_of(mask, row[-1]) for mask, row in zip(masks, counted, strict=True)])
    kept = pd.read_parquet(run / "oof_dice.parquet").set_index("image_id")["dice"]
    np.testing.assert_allclose(kept[[row[0] for row in counted]], dice, atol=1e-12)
    assert score["dice"]["estimate"] == pytest.approx(dice.mean()) and tuned["score"] == pytest.approx(dice.mean())
    both, ours, theirs, pixels = np.sum(
        [((m & r[-1]).sum(), m.sum(), r[-1].sum(), m.size) for m, r in zip(masks, counted, strict=True)], axis=0
    )
    assert score["dice_pooled"]["estimate"] == pytest.approx(2 * both / (ours + theirs))
    assert score["recall_pooled"]["estimate"] == pytest.approx(both / theirs)
    assert score["accuracy_pooled"]["estimate"] == pytest.approx((pixels - ours - theirs + 2 * both) / pixels)
    assert score["dice"]["estimate"] != pytest.approx(score["dice_pooled"]["estimate"])
    for name in ("Montgomery", "Shenzhen"):
        chosen = [row[2] == name for row in counted]
        assert score["datasets"][name]["dice"]["estimate"] == pytest.approx(dice[chosen].mean())


def test_each_fold_is_scored_by_the_choice_of_the_other(counted, finished):
    run = finished / "run"
    tuned, surface = read_json(run / "tuned.json"), pd.read_csv(run / "surface.csv")
    assert len(surface) == 10
    means = {0: [], 1: []}
    for rule in surface.to_dict("records"):
        dice = [
            (fold, dice_of(by_hand(p, t.shape, {**rule, "regions": int(rule["regions"])}), t))
            for _, fold, _, p, t in counted
        ]
        assert rule["dice"] == pytest.approx(np.mean([d for _, d in dice]))
        for part, of_rules in means.items():
            of_rules.append(np.mean([d for fold, d in dice if fold == part]))
    for part in (0, 1):
        chosen = tuned["fold_rules"][str(part)]
        place = surface[(surface["pixel"] == chosen["pixel"]) & (surface["regions"] == chosen["regions"])].index[0]
        assert means[1 - part][place] == pytest.approx(max(means[1 - part]))  # the best of the other fold
    assert tuned["naive"] == pytest.approx(surface["dice"].max()) and tuned["score"] <= tuned["naive"] + 1e-9
