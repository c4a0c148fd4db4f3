import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from common.errors import InputError
from common.post.regions import quantise, resize_mask_probs
from common.post.rle import runs_of
from common.tuning import LEVELS, Rule, grid, rule_dice, summarise, tune_nested


def cases(seed, n=8, side=12, size=24):
    """Smooth blobs as probabilities, shifted ones as truth; some maps and some truths are empty."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.random((n, size, size)), (0, 2, 2))
    fields = (fields - fields.min()) / np.ptp(fields)
    probs = np.round(255 * fields[:, :: size // side, :: size // side]).astype(np.uint8)
    truth = np.roll(fields, 2, axis=1) > 0.6
    probs[::4], truth[1::4] = 0, False
    return probs, truth.astype(np.uint8), rng.random(n)


def test_the_rule_of_expected_dice_takes_the_best_mask_or_none():
    probs, truth, _ = cases(1)
    present = np.linspace(0.05, 0.95, len(probs))
    regions = summarise(probs, [runs_of(t) for t in truth], LEVELS, (24, 24))
    for rule in grid(expected=(0.5, 2.0), pixel=LEVELS[:1], min_area=(0, 9)):
        dice, empty = rule_dice(regions, rule, present), 0
        for i, image in enumerate(probs):
            values = resize_mask_probs(image, (24, 24)) / 255
            counted = np.where(values >= 0.1, values, 0)
            masks = [values >= level for level in LEVELS]
            hopes = [2 * counted[mask].sum() / max(1, mask.sum() + counted.sum()) for mask in masks]
            keeps = present[i] * max(hopes) >= rule.expected * (1 - present[i])
            wanted = replace(rule, pixel=LEVELS[int(np.argmax(hopes))], expected=0.0)
            mask = wanted.apply(image, present[i], (24, 24)) if keeps else np.zeros((24, 24))
            np.testing.assert_array_equal(rule.apply(image, present[i], (24, 24)), mask)
            total, empty = mask.sum() + truth[i].sum(), empty + (not keeps)
            assert dice[i] == pytest.approx(1.0 if total == 0 else 2 * (mask * truth[i]).sum() / total)
        assert 0 < empty < len(probs)
    for without in (lambda: rule_dice(regions, rule), lambda: rule.apply(probs[0])):
        with pytest.raises(InputError, match="needs the probability of a mask"):
            without()


def full_mask_dice(rule, probs, truth, gate_prob, connectivity):
    """The rule by its definition: on whole masks, labelled by scipy."""
    size = truth.shape
    values = (probs if rule.at_network else resize_mask_probs(probs, size)) / 255
    mask = values >= rule.pixel
    labels, n = ndimage.label(mask, np.ones((3, 3)) if connectivity == 8 else None)
    for k in range(1, n + 1):
        if (labels == k).sum() < rule.min_area:
            mask[labels == k] = False
    if gate_prob < rule.gate or (values >= rule.top).sum() < rule.min_pixels:
        mask[:] = False
    mask = np.kron(mask, np.ones((size[0] // mask.shape[0], size[1] // mask.shape[1]))) > 0
    total = mask.sum() + truth.sum()
    return (1.0 if total == 0 else 2 * (mask & (truth > 0)).sum() / total), mask


@pytest.mark.parametrize(("at_network", "connectivity"), [(False, 8), (True, 8), (False, 4), (True, 4)])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), small=st.sampled_from([(12, 12), (24, 24), (8, 12)]))
def test_every_rule_equals_the_computation_on_whole_masks(at_network, connectivity, seed, small):
    probs, truth, gate_probs = cases(seed)
    probs = np.stack([resize_mask_probs(image, small) for image in probs])
    pixels = (0.35, 0.5, 0.7)
    regions = summarise(probs, [runs_of(t) for t in truth], pixels, (24, 24), None, connectivity, at_network)
    rules = grid(pixel=pixels, min_area=(0, 7, 30), gate=(0, 0.4), top=(0, 0.6, 0.8), min_pixels=(0, 5, 20))
    for rule in (replace(rule, at_network=at_network) for rule in rules):
        dice = rule_dice(regions, rule, gate_probs)
        for i in range(len(probs)):
            expected, mask = full_mask_dice(rule, probs[i], truth[i], gate_probs[i], connectivity)
            assert dice[i] == pytest.approx(expected, abs=1e-12), (rule, i)
            if i < 3:
                np.testing.assert_array_equal(rule.apply(probs[i], gate_probs[i], (24, 24), connectivity), mask)


def test_corners_connect_unless_connectivity_is_4():
    probs = np.array([[[255, 255, 0, 0], [0, 0, 255, 0]]], np.uint8)  # two pixels and, at their corner, a third
    truth = np.array([[1, 1, 0, 0], [0, 0, 1, 0]], np.uint8)
    for connectivity, area in ((8, 3), (4, 0)):
        regions = summarise(probs, [runs_of(truth)], [0.5], (2, 4), connectivity=connectivity)
        assert rule_dice(regions, Rule(0.5, min_area=3)).tolist() == [float(area == 3)]
        assert Rule(0.5, min_area=3).apply(probs[0], size=(2, 4), connectivity=connectivity).sum() == area


def test_hand_worked_areas():
    # Regions of 4 (two of them true) and 1 pixel; the truth has 3 pixels. A third pixel at 0.5 sits apart.
    probs = np.zeros((1, 4, 6), np.uint8)
    probs[0, 0:2, 0:2], probs[0, 3, 5], probs[0, 3, 2] = 204, 230, 128
    truth = np.zeros((4, 6), np.uint8)
    truth[0, 0:2] = truth[2, 0] = 1
    regions = summarise(probs, [runs_of(truth)], [0.5, 0.8], size=(4, 6))
    for rule, dice in [
        (Rule(0.5), 2 * 2 / (6 + 3)),
        (Rule(0.8), 2 * 2 / (5 + 3)),
        (Rule(0.8, min_area=4), 2 * 2 / (4 + 3)),
        (Rule(0.8, min_area=5), 0),
        (Rule(0.5, top=0.9, min_pixels=1), 4 / 9),
        (Rule(0.5, top=0.9, min_pixels=2), 0),
    ]:
        assert rule_dice(regions, rule) == pytest.approx([dice]), rule
    assert rule_dice(regions, Rule(0.5, gate=0.3), np.array([0.3])) == pytest.approx([4 / 9])
    assert rule_dice(regions, Rule(0.5, gate=0.3), np.array([0.29])) == pytest.approx([0])


def test_empty_truth_and_empty_prediction_score_one_and_one_of_them_zero():
    probs = np.zeros((2, 4, 4), np.uint8)
    probs[1, 0, 0] = 255
    regions = summarise(probs, [runs_of(np.zeros((4, 4), np.uint8))] * 2, [0.5], size=(4, 4))
    assert rule_dice(regions, Rule(0.5)).tolist() == [1, 0]
    assert rule_dice(regions, Rule(0.5, min_area=2)).tolist() == [1, 1]


def test_rows_choose_images_and_workers_change_nothing():
    probs, truth, _ = cases(3)
    runs = [runs_of(t) for t in truth]
    rows = np.array([6, 1, 3])
    one = summarise(probs, runs, [0.5], size=(24, 24))
    some = summarise(probs, runs, [0.5], size=(24, 24), rows=rows)
    assert rule_dice(some, Rule(0.5, 5)).tolist() == rule_dice(one, Rule(0.5, 5))[rows].tolist()


def test_memory_map_is_read_image_by_image(tmp_path):
    probs, truth, _ = cases(4)
    np.save(tmp_path / "oof_probs.npy", probs)
    mapped = np.load(tmp_path / "oof_probs.npy", mmap_mode="r")
    regions = summarise(mapped, [runs_of(t) for t in truth], [0.5], (24, 24))
    assert len(probs) == len(rule_dice(regions, Rule(0.5)))


# Two folds of two images; rule A is best on fold 0, B on fold 1, C never.
A, B, C = Rule(0.3), Rule(0.5), Rule(0.7)
TABLE = {A: [0.9, 0.9, 0.5, 0.5], B: [0.6, 0.6, 0.7, 0.7], C: [0.1, 0.1, 0.2, 0.2]}


def test_nested_choice_by_hand():
    tuned = tune_nested([A, B, C], lambda rule: np.array(TABLE[rule]), [0, 0, 1, 1])
    assert tuned.fold_rules == {0: B, 1: A}  # each fold takes what the other prefers
    assert tuned.dice.tolist() == [0.6, 0.6, 0.5, 0.5]
    assert (tuned.rule, tuned.halves) == (A, False)
    assert (tuned.score, tuned.naive) == (pytest.approx(0.55), pytest.approx(0.7))


def test_noise_is_not_sold_as_skill():
    # Every rule is pure chance around 0.5: the naive score climbs with the number of rules, the nested does not.
    rules, outcomes = grid(pixel=(0.5,), min_area=range(300)), []
    for seed in range(10):
        table = dict(zip(rules, np.random.default_rng(seed).random((300, 200)), strict=True))
        outcomes.append(tune_nested(rules, table.get, np.arange(200) % 5))
    assert np.mean([tuned.naive for tuned in outcomes]) > 0.54
    assert abs(np.mean([tuned.score for tuned in outcomes]) - 0.5) < 0.02


def test_one_fold_is_split_into_halves_of_patients():
    patients = np.repeat(np.arange(10), 3)
    rng = np.random.default_rng(1)
    table = {A: rng.random(30), B: rng.random(30)}
    tuned = tune_nested([A, B], table.get, np.zeros(30), patients)
    assert tuned.halves and sorted(tuned.fold_rules) == [0, 1]
    assert all(len(set(tuned.parts[patients == p])) == 1 for p in range(10))
    assert len(set(patients[tuned.parts == 0])) == 5
    for half in (0, 1):
        other = max((A, B), key=lambda rule: table[rule][tuned.parts != half].mean())
        np.testing.assert_array_equal(tuned.dice[tuned.parts == half], table[other][tuned.parts == half])
    assert tune_nested([A, B], table.get, np.zeros(30), patients).parts.tolist() == tuned.parts.tolist()


def test_ties_go_to_the_middle_of_the_plateau_then_to_the_first():
    rules = grid(pixel=(0.3, 0.5, 0.7), min_area=(0, 100, 1000, 1001, 9999))
    good = {r for r in rules if (r.pixel == 0.5 and r.min_area >= 100) or r.min_area == 1000}
    tuned = tune_nested(rules, lambda rule: np.full(4, 0.8 if rule in good else 0.4), [0, 0, 1, 1])
    assert tuned.rule == Rule(0.5, 1000)
    pair = [Rule(0.7), Rule(0.3)]
    assert tune_nested(pair, lambda rule: np.full(4, 0.1), [0, 0, 1, 1]).rule == Rule(0.7)


def test_the_rule_survives_json():
    values = {"min_area": np.array([3500]), "gate": (0.4,), "top": np.array([0.75]), "min_pixels": (2000,)}
    rules = [A, *grid(pixel=(0.5,), **values, at_network=(True,))]
    tuned = tune_nested(rules, lambda rule: np.full(2, rule.pixel), [0, 1])
    stored = json.loads(json.dumps(tuned.as_dict()))
    assert Rule(**stored["rule"]) == tuned.rule == Rule(0.5, 3500, 0.4, 0.75, 2000, True)
    assert set(stored["fold_rules"]) == {"0", "1"} and stored["score"] == 0.5


def test_grid_leaves_out_triplets_whose_top_lies_under_the_bottom():
    pairs = [(rule.top, rule.pixel) for rule in grid(top=(0, 0.5), pixel=(0.3, 0.5, 0.6))]
    assert pairs == [(0, 0.3), (0, 0.5), (0, 0.6), (0.5, 0.3), (0.5, 0.5)]  # equal ones stay


def test_wrong_input_is_refused():
    probs, truth, _ = cases(6)
    runs = [runs_of(t) for t in truth]
    regions = summarise(probs, runs, [0.5], size=(24, 24))
    for call, message in [
        (lambda: Rule(0.0), "pixel must lie"),
        (lambda: Rule(float("nan")), "pixel must be float"),
        (lambda: Rule("0.5"), "pixel must be float"),
        (lambda: Rule(0.5, min_area=2.5), "min_area must be int"),
        (lambda: Rule(0.5, min_area=-1), "min_area"),
        (lambda: grid(pixel=(0.5,), top=(0.2,)), "contains no valid rule"),
        (lambda: summarise(probs, runs, []), "at least one pixel threshold"),
        (lambda: summarise(probs, runs, [0.5], size=(30, 24), at_network=True), "divides"),
        (lambda: rule_dice(regions, Rule(0.6)), "not summarised"),
        (lambda: rule_dice(regions, Rule(0.5, at_network=True)), "not summarised"),
        (lambda: rule_dice(regions, Rule(0.5, gate=0.5)), "gate"),
        (lambda: rule_dice(regions, Rule(0.5, gate=0.5), np.full(8, np.nan)), "gate"),
        (lambda: Rule(0.5, gate=0.5).apply(probs[0]), "gate"),
        (lambda: tune_nested([A], TABLE.get, [0, 0], ["p", "p"]), "nothing can be held out"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_the_triplet_at_its_boundaries():
    probs = np.array([[192, 192, 77, 76, 0]], np.uint8)  # 0.75 is 191.25, 0.3 is 76.5
    assert Rule(0.3, top=0.75, min_pixels=2).apply(probs, size=(1, 5)).tolist() == [[1, 1, 1, 0, 0]]
    assert Rule(0.3, top=0.75, min_pixels=3).apply(probs, size=(1, 5)).sum() == 0
    assert Rule(0.3, top=0.76, min_pixels=2).apply(probs, size=(1, 5)).sum() == 0


def test_at_the_networks_size_an_oblong_image_grows_by_its_own_factors():
    probs = np.zeros((2, 3), np.uint8)
    probs[0, 0] = 200
    rule = Rule(0.5, at_network=True)
    mask = rule.apply(probs, size=(4, 9))
    assert mask.shape == (4, 9) and mask[:2, :3].all() and mask.sum() == 6
    truth = [runs_of(mask)]
    found = summarise(probs[None], truth, [0.5], size=(4, 9), at_network=True)
    assert found.scale == 6 and found.regions[quantise(0.5)].tolist() == [[1], [6]] and found.truth.tolist() == [6]


def test_limits_of_a_rule():
    assert Rule(0.5).apply(np.zeros((4, 4), np.uint8)).shape == (1024, 1024)
    assert Rule(1.0, gate=1.0, top=1.0).gate == 1.0
    for wrong in ({"min_area": -1}, {"min_pixels": -1}, {"gate": 1.01}, {"top": -0.01}):
        with pytest.raises(InputError):
            Rule(0.5, **wrong)
