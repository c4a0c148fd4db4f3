import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest

from common.report import detection_plots, plots

NAN = float("nan")
SEARCH = pd.DataFrame(
    [
        (t, a, low, 0.8 - abs(t - 0.7) - a / 1e5 + low)
        for t in (0.6, 0.7, 0.8)
        for a in (500, 2000)
        for low in (0.01, 0.02)
    ],
    columns=["high", "area", "low", "dice"],
)


def _history(n=5):
    columns = {"epoch": range(n), "lr": 1e-4, "train_loss": np.linspace(1, 0.5, n), "dice": np.linspace(0.2, 0.8, n)}
    return pd.DataFrame(columns | {"seconds": 9.0, "left": 60.0, "note": "x"})


def _read(svg):
    """(width, height) in points and the texts of an SVG, after a strict parse."""
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    box = [float(n) for n in root.get("viewBox").split()]
    return tuple(box[2:]), ["".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text")]


def test_every_plot_parses_has_its_size_and_follows_the_page():
    made = {
        "curves": (plots.learning_curves(_history(), chosen=(2, 3)), 4.7, 0.5 + 1.9 + 1.9 + 0.8 + 0.8),
        "matrix": (plots.confusion_matrix([[3, 1], [0, 2]], ["a", "b"]), 4.7, 2.5),
        "forest": (plots.score_with_interval([("a", 0.5, 0.4, 0.6)]), 4.7, 1.14),
        "surface": (plots.threshold_surface(SEARCH, "high", "area", "dice", (0.7, 500)), 4.7, 3.1),
        "line": (plots.line_with_peak([1, 2, 3], [1, 3, 2], "x", "y"), 4.7, 2.8),
        "lr": (plots.lr_finder_plot(np.geomspace(1e-5, 1, 20), np.linspace(1, 0, 20), 1e-2), 4.7, 2.8),
        "histogram": (plots.histogram({"a": [1, 2], "b": [3]}, "x", threshold=2), 4.7, 2.8),
    }
    for name, (svg, width, height) in made.items():
        assert _read(svg)[0] == pytest.approx((72 * width, 72 * height)), name
        assert b"var(--ink, " in svg and b"var(--font, " in svg and b"DejaVu" not in svg, name


def test_plots_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    plots.line_with_peak([1, 2], [1, 3], "x", "y")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "svg",
    [
        plots.learning_curves(pd.DataFrame()),
        plots.learning_curves(pd.DataFrame({"epoch": [0, 1], "train_loss": [NAN, NAN]})),
        plots.mean_curves([_history(), _history()]),
        plots.confusion_matrix(np.zeros((2, 2)), ["a", "b"]),
        plots.score_with_interval([]),
        plots.threshold_surface(SEARCH.assign(dice=NAN), "high", "area", "dice", (0.7, 500)),
        plots.line_with_peak([], [], "x", "y"),
        plots.lr_finder_plot([1e-3, 1e-2], [NAN, NAN], 1e-2),
        plots.histogram({"a": [NAN]}, "x"),
    ],
)
def test_nothing_to_draw_is_none(svg):
    assert svg is None


def test_learning_curves_show_the_columns_that_have_values_from_the_first_epoch_on():
    texts = _read(plots.learning_curves(_history()))[1]
    assert {"loss", "train_loss", "validation", "Dice", "lr", "epoch"} <= set(texts)
    assert not {"left", "note", "kept", "MB"} & set(texts) and "seconds" in texts
    assert "MB" in _read(plots.learning_curves(_history().assign(memory_mb=512.0)))[1]
    assert "kept" in _read(plots.learning_curves(_history(1), chosen=(0, 0)))[1]
    gap = _history()
    gap.loc[2, "dice"] = NAN
    assert "Dice" in _read(plots.learning_curves(gap))[1]
    assert "validation" not in _read(plots.learning_curves(gap.assign(dice=NAN)))[1]


def test_mean_curves_have_a_panel_for_each_figure_that_is_measured_twice():
    one = _history().assign(train_dice=0.9, loss=0.7, train_loss=[1, 0.8, 0.6, 0.5, 0.4])
    other = one.assign(loss=0.5)
    (width, height), texts = _read(plots.mean_curves([one, other]))
    assert (width, height) == pytest.approx((72 * 6.8, 72 * 2.6))
    assert {"loss", "dice", "training", "validation", "epoch"} <= set(texts) and "lr" not in texts
    assert "loss" not in _read(plots.mean_curves([one, other.drop(columns="train_loss")]))[1]


def test_names_are_taken_literally():
    evil = "$\\frac{$ <script>alert(1)</script> & "
    for svg in (
        plots.learning_curves(_history().rename(columns={"dice": evil, "train_loss": "loss $x^2"})),
        plots.score_with_interval([(evil, 0.5, 0.4, 0.6)]),
        plots.histogram({evil: [1, 2]}, evil),
        plots.confusion_matrix([[1, 0], [0, 1]], [evil, "b"]),
    ):
        assert b"<script" not in svg
        assert any(evil.strip() in text for text in _read(svg)[1])
    for svg in (  # matplotlib hides such names
        plots.histogram({"_hidden": [1, 2]}, "x"),
        plots.forest({"_hidden": [(0.5, 0.4, 0.6)], "b": [(0.5, 0.4, 0.6)]}, ["c"]),
        detection_plots.curves({"_hidden": ([0, 1], [0, 1])}, "x", "y"),
    ):
        assert any("_hidden" in text for text in _read(svg)[1])


def test_confusion_matrix_writes_counts_and_shares_of_the_row():
    texts = _read(plots.confusion_matrix([[8912, 466], [347, 2322]], ["no", "yes"]))[1]
    assert {"8,912", "95.0%", "466", "5.0%", "13.0%", "87.0%", "no", "yes"} <= {
        part for t in texts for part in t.split()
    }
    assert plots.confusion_matrix([[0, 0], [1, 1]], ["a", "b"]) is not None  # a class that does not occur


def test_intervals_are_printed_and_those_that_are_not_finite_left_out():
    rows = [("fold 0", 0.8441, 0.8241, 0.8621), ("fold 1", 0.83, None, None), ("fold 2", NAN, NAN, NAN)]
    texts = [" ".join(t.split()) for t in _read(plots.score_with_interval(rows, "Dice", reference=0.8347))[1]]
    assert "0.8441 [0.8241, 0.8621]" in texts and "0.8300" in texts and "fold 2" not in texts


def test_threshold_surface_marks_the_chosen_cell():
    # Best over low: 0.8 − |0.7 − 0.7| − 500/100,000 + 0.02 = 0.815; at (0.6, 2000) 0.8 − 0.1 − 0.02 + 0.02 = 0.7.
    best = plots.threshold_surface(SEARCH, "high", "area", "dice", (0.7, 500))
    assert "0.8150 at high 0.7, area 500" in _read(best)[1]
    chosen = plots.threshold_surface(SEARCH, "high", "area", "dice", (0.6, 2000))
    assert "0.7000 at high 0.6, area 2,000" in _read(chosen)[1]


def test_settings_with_long_names_get_fewer_ticks():
    values = [0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.997, 1]
    grid = pd.DataFrame([(a, b, a + b) for a in values for b in values], columns=["alpha", "beta", "map"])
    texts = _read(plots.threshold_surface(grid, "alpha", "beta", "map", (0.9, 0.5)))[1]
    assert texts.count("0.99") == 1 and texts.count("0.95") == 2  # on the vertical axis they do not collide


def test_peak_is_the_highest_finite_value_or_the_one_asked_for():
    x, y = [3500, 250, 750, 4500, 1750], [0.8347, 0.8307, 0.8328, 0.8329, NAN]
    assert "0.8347 at 3,500" in _read(plots.line_with_peak(x, y, "px", "Dice"))[1]
    assert "0.8328 at 750" in _read(plots.line_with_peak(x, y, "px", "Dice", peak=700))[1]
    texts = _read(plots.lr_finder_plot([1e-4, 1e-3, 1e-2], [1.0, 0.5, NAN], 1e-3))[1]
    assert "suggested 0.001" in texts and not any("mathdefault" in t for t in texts)


def test_histogram_counts_what_is_finite():
    texts = _read(plots.histogram({"ill": [0.2, 0.9, NAN], "well": np.zeros(1500)}, "probability", threshold=0.5))[1]
    assert {"ill (n = 2)", "well (n = 1,500)", "probability"} <= set(texts)
