"""Plots of several runs over several classes: ROC curves in panels, areas with intervals, calibration in panels.

As in `plots`: SVG bytes in the page's fonts and colours, None when there is nothing finite to draw, InputError for
wrong shapes.
"""

import numpy as np
from matplotlib.ticker import MaxNLocator
from sklearn import metrics as sklearn_metrics

from common.errors import InputError
from common.metrics import calibration
from common.report.plots import _LINES, BLUE, RULE, _axes, _columns, _styled, _svg

ACROSS = 4  # panels beside each other


@_styled
def roc_panels(truth, scores, names):
    """ROC curves of each class in a panel of its own, a line a run, with the areas; empty panels are left out.

    truth: (N, C) of 0 and 1; scores: a dict from a run's name to (N, C); names: of the C classes. Rows with NaN are
    left out class by class, and so are classes that lack one of the two outcomes.
    """
    truth, scores = _matrices(truth, scores, names)
    curves = {}
    for c, name in enumerate(names):
        for run, values in scores.items():
            y, score = _columns(name, truth[:, c], values[:, c])
            if len(np.unique(y)) == 2:
                false, true, _ = sklearn_metrics.roc_curve(y, score)
                curves.setdefault(name, {})[run] = false, true, sklearn_metrics.auc(false, true)
    if not curves:
        return None
    figure, panels = _panels(curves, "false positive rate", "true positive rate")
    for ax, (name, lines) in zip(panels, curves.items(), strict=True):
        ax.plot([0, 1], [0, 1], color=RULE, linewidth=1)
        for place, (run, (false, true, area)) in enumerate(lines.items()):
            colour, dash = _LINES[list(scores).index(run)]
            ax.plot(false, true, dash, color=colour, linewidth=1.4, label=run)
            height = 0.04 + 0.12 * (len(lines) - 1 - place)
            ax.text(0.97, height, f"{area:.3f}", color=colour, ha="right", weight="bold", transform=ax.transAxes)
        ax.set(title=name, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect=1)
    _legend(figure, panels[0], scores)
    return _svg(figure)


@_styled
def reliability_panels(truth, probs, names, n_bins=15):
    """The reliability curve of each class in a panel of its own, with its expected calibration error.

    truth: (N, C) of 0 and 1; probs: (N, C) in [0, 1]; names: of the C classes. A panel ends where its curve ends, since
    most findings are rare. Rows with NaN are left out class by class.
    """
    truth, scores = _matrices(truth, {"": probs}, names)
    curves = {}
    for name, y, prob in zip(names, truth.T, scores[""].T, strict=True):
        y, prob = _columns(name, y, prob)
        if len(y):
            curves[name] = calibration.reliability(y, prob, n_bins)
    if not curves:
        return None
    figure, panels = _panels(curves, "mean probability", "share of positives")
    for ax, (name, (mean, share, images)) in zip(panels, curves.items(), strict=True):
        end = 1.08 * max(mean.max(), share.max(), 0.01)
        error = np.average(np.abs(mean - share), weights=images)
        ax.plot([0, end], [0, end], color=RULE, linewidth=1)
        ax.plot(mean, share, "-o", color=BLUE, linewidth=1.2)
        ax.text(0.97, 0.04, f"{error:.3f}", ha="right", weight="bold", transform=ax.transAxes)
        ax.set(title=name, xlim=(-0.04 * end, end), ylim=(-0.04 * end, end), aspect=1)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set(major_locator=MaxNLocator(2), major_formatter="{x:g}")
    return _svg(figure)


@_styled
def forest(found, names, label="AUROC", reference=None):
    """Estimates with their intervals, one line a class and in it a dot a run.

    found: a dict from a run's name to (C, 3) of estimate, low and high; names: of the C classes (or C − 1 classes and
    their mean). An estimate that is not finite is left out, an interval that is not finite not drawn. reference: a
    dashed line. Raises InputError for other shapes and a low above its high.
    """
    found = {run: np.asarray(values, float) for run, values in found.items()}
    for run, values in found.items():
        if values.shape != (len(names), 3):
            raise InputError(f"{label} of {run}: shape {values.shape} for {len(names)} names, need ({len(names)}, 3)")
        for c in np.flatnonzero(values[:, 1] > values[:, 2])[:1]:
            raise InputError(f"{label} of {run}: {names[c]}: an interval from {values[c, 1]} to {values[c, 2]}")
    if not any(np.isfinite(values[:, 0]).any() for values in found.values()):
        return None
    step = 0.8 / len(found)
    figure, ax = _axes(0.8 + len(names) * max(0.26, 0.15 * len(found)), 6.4)
    for k, (run, values) in enumerate(found.items()):
        colour, _ = _LINES[k]
        places = np.arange(len(names)) - 0.4 + (k + 0.5) * step
        ax.hlines(places, values[:, 1], values[:, 2], color=colour, linewidth=1.8)
        ax.plot(values[:, 0], places, "o", color=colour, markersize=4.5, label=run)
    for place in range(1, len(names)):
        ax.axhline(place - 0.5, color=RULE, linewidth=0.6)
    if reference is not None:
        ax.axvline(reference, color=RULE, linestyle=(0, (4, 3)))
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel=label)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    _legend(figure, ax, found)
    return _svg(figure)


def _matrices(truth, scores, names):
    truth, scores = np.asarray(truth, float), {run: np.asarray(values, float) for run, values in scores.items()}
    for run, values in scores.items():
        if truth.ndim != 2 or values.shape != truth.shape or truth.shape[1] != len(names):
            raise InputError(
                f"{run or 'classes'}: truth {truth.shape} and scores {values.shape} for {len(names)} names"
            )
    return truth, scores


def _panels(items, x_label, y_label):
    """A figure and as many square panels as there are items, labelled at its edges."""
    across = min(ACROSS, len(items))
    down = -(-len(items) // across)
    figure, axes = _axes(0.6 + 1.75 * down, 0.5 + 1.62 * across, nrows=down, ncols=across, squeeze=False)
    for ax in axes.flat[len(items) :]:
        ax.remove()
    figure.supxlabel(x_label, size=9.5)
    figure.supylabel(y_label, size=9.5)
    return figure, list(axes.flat[: len(items)])


def _legend(figure, ax, runs):
    if len(runs) > 1:
        lines, labels = ax.get_legend_handles_labels()
        longest = max(map(len, labels))
        across = max(1, min(len(labels), 75 // (6 + longest)))
        figure.legend(lines, labels, loc="outside upper left", ncols=across, handlelength=1.4, columnspacing=1.2)
