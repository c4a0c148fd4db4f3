"""Mixed predictions against hand-computed numbers, the search for weights, and the memory that maps take."""

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from common.infer import mixing
from common.infer.predict import write_masks
from common.paths import read_array
from common.post.boxes import BOX

PARTS = np.array([0, 0, 1, 1])


def mixture(values, truth):
    """A Mixture of members' numbers (members, n) whose score is 1 minus the mean absolute error."""
    values, truth = np.array(values, float), np.array(truth, float)
    images = SimpleNamespace(ids=lambda rows: np.array([f"i{row}" for row in rows]))
    figures = lambda job, found, rows: {"closeness": 1 - np.abs(found - truth[rows]).mean()}  # noqa: E731
    job = SimpleNamespace(images=images, recipe=SimpleNamespace(metric="closeness"))
    mixed = lambda many: (np.array(each) @ values / sum(each) for each in many)  # noqa: E731
    return mixing.Mixture(job, SimpleNamespace(figures=figures), np.arange(len(truth)), mixed)


def test_weights_are_those_that_reproduce_the_truth():
    found = mixing.search_weights(mixture([[0, 4, 0, 4], [3, 1, 3, 1]], [2, 2, 2, 2]), PARTS, 2)
    assert found == {0: (1, 2), 1: (1, 2), None: (1, 2)}  # (0 + 2 · 3) / 3 = (4 + 2 · 1) / 3 = 2


def test_each_part_is_weighted_by_the_others():
    # the first member is right on part 0, the second on part 1: each part gets the member that is right elsewhere
    tried = mixture([[1, 1, 0, 0], [0, 0, 1, 1]], [1, 1, 1, 1])
    found = mixing.search_weights(tried, PARTS, 2)
    assert found[0] == (0, 1) and found[1] == (1, 0)
    assert tried.nested(found, PARTS) == 0.0
    assert tried.nested({0: (1, 0), 1: (0, 1), None: (1, 1)}, PARTS) == 1.0


def test_the_earliest_of_equal_mixtures_is_taken():
    assert mixing.search_weights(mixture([[1, 1, 1, 1]] * 2, [1] * 4), PARTS, 2)[None] == (1, 0)


def test_weights_that_no_step_leads_to_are_tried_if_named():
    tried = mixture([[0.5] * 4, [30] * 4, [-30] * 4], [0] * 4)  # the first alone is best; the others together are right
    assert mixing.search_weights(tried, PARTS, 3)[None] == (1, 0, 0)
    assert mixing.search_weights(tried, PARTS, 3, also=[(0, 1, 1)]) == dict.fromkeys([0, 1, None], (0, 1, 1))
    assert mixing.search_weights(tried, PARTS, 3, also=[(1, 1, 0)])[None] == (1, 0, 0)


def test_what_members_cost():
    tried = mixture([[0, 4, 0, 4], [3, 1, 3, 1]], [2, 2, 2, 2])
    score, table = mixing.compare_members(tried, dict.fromkeys([0, 1, None], (1, 2)), PARTS, ["a", "b"])
    assert score == pytest.approx(1)
    expected = [["a", 1 / 3, -1, 0, 1], ["b", 2 / 3, 0, -1, 2]]
    pd.testing.assert_frame_equal(table, pd.DataFrame(expected, columns=table.columns), check_dtype=False)
    _, alone = mixing.compare_members(tried, dict.fromkeys([0, 1, None], (0, 1)), PARTS, ["a", "b"])
    assert alone["without"].tolist() == [0, -1]  # where the other has no weight, it gets one


@pytest.mark.parametrize("value", [math.nan, 0])
def test_scores_that_are_undefined_or_0_leave_equal_weights(value, caplog):
    caplog.set_level("INFO")
    assert mixing.search_weights(mixture([[value] * 4] * 2, [1] * 4), PARTS, 2) == dict.fromkeys([0, 1, None], (1, 1))
    assert "they get equal weights" in caplog.text


def test_tables_are_averaged_by_the_shares_of_each_image():
    one = pd.DataFrame({"image_id": ["a", "b"], "row": [3, 4], "fold": [0, 1], "p": [0.0, 1.0]})
    shares = mixing.shares_of({0: (3, 1), 1: (0, 2), None: (1, 1)}, [0, 1])
    assert shares.tolist() == [[0.75, 0.25], [0, 1]]
    mixed = mixing.mix_tables([one, one.assign(p=[0.8, 0.4], row=9)], shares)
    assert mixed.to_dict("list") == {"image_id": ["a", "b"], "row": [3, 4], "fold": [0, 1], "p": [0.2, 0.4]}


def test_ranks_among_the_reference():
    table, known = (pd.DataFrame({"fold": 0, "p": values}) for values in ([0.1, 0.2, 0.25, 0.9], [0.2, 0.1, 0.8, 0.2]))
    assert mixing.to_ranks(table, known)["p"].tolist() == [1 / 8, 4 / 8, 6 / 8, 1]


def test_maps_are_averaged_at_the_largest_size(tmp_path):
    large, small = np.zeros((3, 4, 4), np.uint8), np.full((3, 2, 2), 200, np.uint8)
    large[1], small[0] = 100, 40
    places, shares = np.array([[1, 0], [2, 0]]), np.array([[0.5, 0.5], [0.25, 0.75]])
    mixing.mix_maps(tmp_path / "m.b2nd", [large, small], places, shares)
    found = read_array(tmp_path / "m.b2nd")
    assert found.dtype == np.uint8 and found.shape == (2, 4, 4)
    assert (found[0] == 150).all() and (found[1] == 30).all()


def test_mixed_maps_are_measured_against_the_masks():
    maps = [np.array([[[0, 0], [200, 200]]], np.uint8), np.array([[[250, 0], [0, 250]]], np.uint8)]
    mask = torch.tensor([[[[1, 0], [0, 1]]]])
    network = SimpleNamespace(measure=lambda logits, target: ((logits > 0) == (target > 0)).flatten(1).sum(1))
    blocks = lambda: zip(mixing.map_blocks(maps, np.array([[0], [0]]), (2, 2)), [mask], strict=True)  # noqa: E731
    found = mixing.mixed_values(network, blocks, [(1, 0), (0, 1), (1, 1)])
    assert [each.tolist() for each in found] == [[2], [4], [3]]  # the mean: 125, 0, 100 and 225 of 255


def boxes(*rows):
    return pd.DataFrame(rows, columns=["image_id", "class_id", "score", *BOX, "member", "fold"])


def test_boxes_are_fused_and_a_weight_of_0_leaves_a_member_out():
    images = pd.DataFrame({"image_id": ["a"], "width": 100, "height": 100})
    one, two = ["a", 14, 0.9, 0, 0, 10, 10, "x", 0], ["a", 14, 0.6, 0, 0, 10, 12, "y", 0]
    table = boxes(one, two, ["a", 2, 0.4, 50, 50, 60, 60, "y", 0])
    fused, alone = mixing.mixed_boxes(table, images, ["x", "y"], 0.5, [(1, 1), (1, 0)])
    assert fused["score"].tolist() == pytest.approx([0.75, 0.2])  # the second box is one of two members'
    assert fused["y_max"].tolist() == pytest.approx([(0.9 * 10 + 0.6 * 12) / 1.5, 60], abs=1e-4)
    assert alone.to_numpy().tolist() == [one[:-2]]


def test_a_specialist_votes_on_its_classes_alone():
    images = pd.DataFrame({"image_id": ["a"], "width": 100, "height": 100})
    both, rare = (["a", k, 0.8, 0, 0, 10, 10, "x=1: fcos", 0] for k in (3, 5))
    table = boxes(both, rare, ["a", 3, 0.4, 0, 0, 10, 10, "y: three=fcos", 0])
    for weights, expected in (((1, 1), {3: 0.6, 5: 0.8}), ((0, 1), {3: 0.4}), ((1, 3), {3: 0.5, 5: 0.8})):
        (found,) = mixing.mixed_boxes(table, images, ["x=1: fcos", "y: three=fcos"], 0.5, [weights])
        assert dict(zip(found["class_id"], found["score"], strict=True)) == pytest.approx(expected)
    (found,) = mixing.mixed_boxes(table[:0], images, ["y: three=fcos"], 0.5, [(1,)])
    assert not len(found)


def test_the_folds_of_a_detector_are_fused_where_they_predicted_the_same_images():
    images = pd.DataFrame({"image_id": ["a", "b"], "width": 100, "height": 100})
    held_out = boxes(["a", 1, 0.9, 0, 0, 9, 9, "x", 0], ["b", 1, 0.5, 0, 0, 9, 9, "x", 1])
    (found,) = mixing.mixed_boxes(held_out, images, ["x"], 0.5, [(2,)])
    assert found["score"].tolist() == [0.9, 0.5]
    (found,) = mixing.mixed_boxes(held_out.assign(image_id="a"), images, ["x"], 0.5, [(2,)])
    assert found["score"].tolist() == pytest.approx([0.7])


PEAK = """
import resource, sys
import numpy as np
from common.infer.mixing import mix_maps
from common.paths import read_array
n = int(sys.argv[1])
maps, places = [read_array(f"{k}.b2nd") for k in (0, 1)], np.stack([np.arange(n)] * 2)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mix_maps("mixed.b2nd", maps, places, np.full((n, 2), 0.5))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""


@pytest.mark.long
def test_the_memory_for_maps_does_not_grow_with_their_number(tmp_path):
    peaks = {}
    for n in (64, 1024):
        for k in (0, 1):
            blocks = (np.zeros((32, 1024, 1024), np.uint8) for _ in range(n // 32))
            write_masks(tmp_path / f"{k}.b2nd", (n, 1024, 1024), blocks)
        done = subprocess.run([sys.executable, "-c", PEAK, str(n)], cwd=tmp_path, capture_output=True, text=True)
        peaks[n] = int(done.stdout)
    assert peaks[1024] < 600 and peaks[1024] < peaks[64] + 64, peaks  # MiB


def test_masks_of_anyone_are_read_one_at_a_time_at_the_size_of_the_maps():
    wide = np.zeros((2, 4), bool)
    wide[:, :2] = True
    maps = mixing.DrawnMaps([lambda: wide, np.array([[0, 1024 * 512]])], (2, 4, 4))
    for position in (0, 1):  # SIIM's runs go down the columns
        assert maps[position].tolist() == [[255, 255, 0, 0]] * 4
    found = np.stack(list(mixing.map_blocks([maps], np.array([[1, 0]]), (4, 4))))
    assert found.shape == (2, 1, 1, 1, 4, 4) and found.max() == 1
