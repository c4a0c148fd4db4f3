"""Which runs may not be blended: those whose networks saw the patients, and those of other images or labels."""

import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from common.blend import Member, blend_tool, check_folds, check_same, overlap_of
from common.errors import InputError
from solutions.__main__ import NAMES

IDS = ["a", "b", "c", "d", "t"]


def member(name, classes=("x",), maps=None, **columns):
    table = {"image_id": IDS, "row": range(5), "patient_id": ["p", "p", "q", "q", ""], "fold": [0, 0, 1, 1, -1]}
    table = pd.DataFrame(table | {"label": [0.0, 1, 1, 0, np.nan]}).assign(**columns)
    tests = table.loc[table["fold"] < 0, "image_id"].to_numpy()
    about = {"classes": list(classes)}
    images = SimpleNamespace(table=table, ids=lambda rows: tests, rows=lambda split: None, about=about)
    run, recipe = SimpleNamespace(folder=Path("runs", name)), SimpleNamespace(metric="auroc")
    predicted = {"oof": SimpleNamespace(tables={"": table}, table=table, maps=maps)}
    ids = table.loc[table["fold"] >= 0, "image_id"].tolist()
    return Member(name, SimpleNamespace(images=images, run=run, recipe=recipe), predicted, ids)


def test_runs_with_other_folds_and_rows_may_be_blended():
    one, other = member("one"), member("other", fold=[1, 1, 0, 0, -1], row=[4, 3, 2, 1, 0])
    assert check_same(one, other) is None
    assert check_folds([one, other, member("unknown", patient_id="")]) is None


def test_a_patient_in_two_folds_is_refused_even_if_only_another_run_knows_the_patient():
    leaking = {"fold": [0, 1, 1, 1, -1]}
    with pytest.raises(InputError, match=r"runs/other: networks saw .* p is in the folds \[0, 1\]; train it with"):
        check_folds([member("one"), member("other", **leaking)])
    with pytest.raises(InputError, match=r"runs/other: .* p is in the folds \[0, 1\]"):
        check_folds([member("one"), member("other", patient_id="", **leaking)])
    with pytest.raises(InputError, match=r"runs/one: .* p is in the folds \[0, 1\]"):
        check_folds([member("one", patient_id="", **leaking), member("other")])
    check_folds([member("one", patient_id="", **leaking), member("other", patient_id="", **leaking)])  # none is known


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": [0.0, 1, 0, 0, np.nan]}, "another label of c than runs/one"),
        (
            {"image_id": ["a", "b", "c", "e", "t"]},
            "2 training images are predicted by it or by runs/one alone, such as d",
        ),
        ({"image_id": ["a", "b", "c", "d", "u"]}, "2 test images are predicted by it or by runs/one alone, such as t"),
        ({"classes": ("x", "y")}, "predicts something else than runs/one"),
        ({"maps": np.zeros((4, 2, 8, 8))}, "predicts something else than runs/one"),
    ],
)
def test_other_preparations_are_refused(changes, reason):
    with pytest.raises(InputError, match=f"runs/other: .*{reason}"):
        check_same(member("one"), member("other", **changes))


@pytest.mark.parametrize("weights", [(1,), (0, 1), (1, -1), (1, math.nan), (1, math.inf)])
def test_unusable_weights_are_refused(weights, tmp_path):
    with pytest.raises(InputError, match="needs one per run, none negative, the first above 0"):
        blend_tool(None, None, None)((tmp_path / "a", tmp_path / "b"), out=tmp_path / "c", weights=weights)


def test_boxes_are_fused_at_the_first_overlap_of_the_run():
    assert overlap_of(SimpleNamespace(fusion=SimpleNamespace(iou=(0.4, 0.3)))) == 0.4
    assert overlap_of(SimpleNamespace(iou=(0.1, 0.3))) == 0.5  # RSNA's own, which `tune` chooses afterwards
    for name in NAMES:
        for config in import_module(f"solutions.{name}.config").PRESETS.values():
            assert 0 < overlap_of(config) < 1  # `fusion` is something else in some solutions
