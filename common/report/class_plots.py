"""Plots by class: ROC curves and calibration in panels, AUROCs of several runs with intervals; see `plots`."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from common.metrics import calibration
from common.report.plots import BLUE, DASHES, LINES, RULE, finite_rows, label_rows, make_axes, roc, styled, to_svg

PANELS_PER_ROW = 4


@styled
def roc_panels(truth, scores, names):
    """ROC curves of each class in a panel of its own, one line per run, with their areas.

    truth: (N, C) of 0 and 1; scores: a dict from a run's name to (N, C); names: of the C classes. Rows with NaN are
    left out class by class, and so are classes in which one of the outcomes does not occur.
    """
    curves = {
        name: {run: curve for run, values in scores.items() if (curve := roc(truth[:, c], values[:, c]))}
        for c, name in enumerate(names)
    }
    curves = {name: lines for name, lines in curves.items() if lines}
    if not curves:
        return None
    figure, panels = _make_panels(curves, "false positive rate", "true positive rate")
    for ax, (name, lines) in zip(panels, curves.items(), strict=True):
        ax.plot([0, 1], [0, 1], color=RULE, linewidth=1)
        for place, (run, (area, false, true)) in enumerate(lines.items()):
            colour, dash = LINES[list(scores).index(run)]
            ax.plot(false, true, dash, color=colour, linewidth=1.4, label=run)
            height = 0.04 + 0.12 * (len(lines) - 1 - place)
            ax.text(0.97, height, f"{area:.3f}", color=colour, ha="right", weight="bold", transform=ax.transAxes)
        ax.set(title=name, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect=1)
    _add_legend(figure, panels[0], scores)
    return to_svg(figure)


@styled
def reliability_panels(truth, probs, names, n_bins=15):
    """Reliability curve of each class in a panel of its own, with the expected calibration error.

    truth: (N, C) of 0 and 1; probs: (N, C) in [0, 1]; names: of the C classes. Rows with NaN are left out class by
    class. A panel ends where its curve ends, since most findings are rare.
    """
    columns = {name: finite_rows(truth[:, c], probs[:, c]) for c, name in enumerate(names)}
    curves = {name: calibration.reliability(y, p, n_bins) for name, (y, p) in columns.items() if len(y)}
    if not curves:
        return None
    figure, panels = _make_panels(curves, "mean probability", "share of positives")
    for ax, (name, (mean, share, images)) in zip(panels, curves.items(), strict=True):
        end = 1.08 * max(mean.max(), share.max(), 0.01)
        error = np.average(np.abs(mean - share), weights=images)
        ax.plot([0, end], [0, end], color=RULE, linewidth=1)
        ax.plot(mean, share, "-o", color=BLUE, linewidth=1.2)
        ax.text(0.97, 0.04, f"{error:.3f}", ha="right", weight="bold", transform=ax.transAxes)
        ax.set(title=name, xlim=(-0.04 * end, end), ylim=(-0.04 * end, end), aspect=1)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set(major_locator=MaxNLocator(2), major_formatter="{x:g}")
    return to_svg(figure)


@styled
def forest(runs, names, label="AUROC", reference=None):
    """Estimates with their intervals, one line per class and in it one dot per run.

    runs: a dict from a run's name to (C, 3) of estimate, low and high; names: of the C classes. An estimate that is not
    finite is left out, an interval that is not finite is not drawn. reference: drawn as a dashed line.
    """
    runs = {run: np.array(values, float) for run, values in runs.items()}
    if not any(np.isfinite(values[:, 0]).any() for values in runs.values()):
        return None
    step = 0.8 / len(runs)
    figure, ax = make_axes(0.8 + len(names) * max(0.26, 0.15 * len(runs)), 6.4)
    for k, (run, values) in enumerate(runs.items()):
        places = np.arange(len(names)) - 0.4 + (k + 0.5) * step
        ax.hlines(places, values[:, 1], values[:, 2], color=LINES[k][0], linewidth=1.8)
        ax.plot(values[:, 0], places, "o", color=LINES[k][0], markersize=4.5, label=run)
    for place in range(1, len(names)):
        ax.axhline(place - 0.5, color=RULE, linewidth=0.6)
    if reference is not None:
        ax.axvline(reference, color=RULE, linestyle=DASHES)
    label_rows(ax, names)
    ax.set_xlabel(label)
    _add_legend(figure, ax, runs)
    return to_svg(figure)


def _make_panels(items, x_label, y_label):
    """Return a figure and a square panel per item, labelled at the figure's edges."""
    columns = min(PANELS_PER_ROW, len(items))
    rows, side = -(-len(items) // columns), 1.62 if len(items) > 1 else 2.8
    figure, axes = make_axes(0.6 + (side + 0.13) * rows, 0.5 + side * columns, nrows=rows, ncols=columns, squeeze=False)
    for ax in axes.flat[len(items) :]:
        ax.remove()
    figure.supxlabel(x_label, size=9.5)
    figure.supylabel(y_label, size=9.5)
    return figure, list(axes.flat[: len(items)])


def _add_legend(figure, ax, runs):
    if len(runs) > 1:
        lines, labels = ax.get_legend_handles_labels()
        columns = max(1, min(len(labels), 75 // (6 + max(map(len, labels)))))
        figure.legend(lines, labels, loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2)
