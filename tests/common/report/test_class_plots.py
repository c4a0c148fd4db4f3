"""common.report.class_plots: what the panels say."""

import xml.etree.ElementTree as ElementTree

import numpy as np
from sklearn.metrics import roc_auc_score

from common.metrics.calibration import expected_calibration_error
from common.report import class_plots, plots

NAN = float("nan")
NAMES = ["Mass", "Nodule", "Hernia"]


def findings():
    rng = np.random.default_rng(0)
    truth = rng.random((300, 3)) < [0.5, 0.2, 0]
    return truth, np.clip(0.3 * rng.random((300, 3)) + 0.1 * truth, 0, 1)


def texts(svg):
    root = ElementTree.fromstring(svg)
    return ["".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text")]


def test_roc_panels_give_each_run_its_area_in_each_class():
    truth, score = findings()
    runs = {"densenet121": score, "sdfn": score**2 + 0.02 * truth}
    said = texts(class_plots.roc_panels(truth, runs, NAMES))
    wanted = [f"{roc_auc_score(truth[:, c], run[:, c]):.3f}" for run in runs.values() for c in range(2)]
    assert {"Mass", "Nodule", "densenet121", "sdfn", *wanted} <= set(said)
    assert "Hernia" not in said  # it does not occur, so it has no curve
    assert "densenet121" not in texts(class_plots.roc_panels(truth, {"densenet121": score}, NAMES))


def test_roc_panels_leave_out_rows_that_are_not_known():
    truth, score = findings()
    score[:50, 0] = NAN
    wanted = f"{roc_auc_score(truth[50:, 0], score[50:, 0]):.3f}"
    assert wanted in texts(class_plots.roc_panels(truth, {"a": score}, NAMES))


def test_reliability_panels_give_the_calibration_error():
    truth, score = findings()
    said = texts(class_plots.reliability_panels(truth, score, NAMES, 10))
    wanted = [f"{error:.3f}" for error in expected_calibration_error(truth, score, 10)]
    assert {*NAMES, *wanted, "mean probability", "share of positives"} <= set(said)
    assert wanted[0] in texts(class_plots.reliability_panels(truth[:, :1], score[:, :1], [""], 10))


def test_forest_has_a_line_a_class_and_a_colour_a_run():
    found = {"a": [[0.8, 0.7, 0.9], [0.6, NAN, NAN], [NAN] * 3], "b": [[0.7, 0.6, 0.8]] * 3}
    svg = plots.forest(found, NAMES, reference=0.5)
    assert {*NAMES, "a", "b", "AUROC"} <= set(texts(svg))
    assert plots.ORANGE in svg.decode() and "var(--blue" in svg.decode()
    assert plots.ORANGE not in plots.forest({"a": found["a"]}, NAMES).decode()


def test_nothing_to_draw_is_none():
    truth, score = findings()
    assert class_plots.roc_panels(truth[:, 2:], {"a": score[:, 2:]}, ["Hernia"]) is None
    assert class_plots.reliability_panels(truth, np.full_like(score, NAN), NAMES) is None
    assert plots.forest({"a": np.full((3, 3), NAN)}, NAMES) is None
