"""The rules to try, regions of out-of-fold maps and rows of a submission, by hand on masks of 8 × 8 pixels."""

from functools import partial, partialmethod
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from common.tuning import Rule, summarise
from solutions.siim_pneumothorax import postprocess
from solutions.siim_pneumothorax.config import DecisionConfig

MAPS = np.zeros((2, 8, 8), np.uint8)  # two pixels that touch at a corner: one region, or two by edges alone
MAPS[:, [0, 1], [0, 1]] = 255


def test_the_grid_of_each_rule():
    gate = DecisionConfig(gate=(0.2, 0.3), pixel=(0.5, 0.6), min_area=(7,))
    assert postprocess.rules(gate) == [Rule(p, 7, g) for g in (0.2, 0.3) for p in (0.5, 0.6)]
    triplet = DecisionConfig("triplet", gate=(0.2,), top=(0.7,), top_pixels=(5, 6), bottom=(0.3,), pixel=(0.9,))
    assert postprocess.rules(triplet) == [Rule(0.3, 0, 0.2, 0.7, 5), Rule(0.3, 0, 0.2, 0.7, 6)]


@pytest.mark.parametrize(
    ("options", "kept"), [({}, "0 1 8 1"), ({"connectivity": 8}, "0 1 8 1"), ({"connectivity": 4}, "-1")]
)
def test_each_image_has_its_own_gate_and_the_connectivity_is_passed_on(options, kept, monkeypatch):
    monkeypatch.setattr(Rule, "apply", partialmethod(Rule.apply, size=(8, 8)))
    rule = Rule(0.5, min_area=2, gate=0.5)
    rows = postprocess.submission_rows(["a", "b"], MAPS, np.array([0.4, 0.5]), rule, **options)
    assert rows.columns.tolist() == ["ImageId", "EncodedPixels"]
    assert rows.to_numpy().tolist() == [["a", "-1"], ["b", kept]]


@pytest.mark.parametrize(("rule", "q"), [("gate", 128), ("triplet", 77)])  # ceil(0.5 × 255), ceil(0.3 × 255)
@pytest.mark.parametrize(("connectivity", "areas", "overlaps"), [(8, [2, 2], [0, 1]), (4, [1] * 4, [0, 0, 1, 0])])
def test_regions_of_the_out_of_fold_maps(rule, q, connectivity, areas, overlaps, monkeypatch):
    class Images:  # hashable, as their masks are kept in a cache
        table = pd.DataFrame({"split": ["train", "test", "train"], "row": [0, 1, 2], "rle": ["0 1", "", "-1"]})

    monkeypatch.setattr(postprocess, "summarise", partial(summarise, size=(8, 8)))
    decision = DecisionConfig(rule, pixel=(0.5,), bottom=(0.3,), connectivity=connectivity)
    job = SimpleNamespace(config=SimpleNamespace(decision=decision), images=Images())
    found = postprocess.oof_regions(job, SimpleNamespace(table=pd.DataFrame({"row": [2, 0]}), maps=MAPS))
    assert list(found.regions) == [q] and found.truth.tolist() == [0, 1]
    assert found.regions[q].tolist() == [areas, overlaps]
