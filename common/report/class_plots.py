"""ROC curves and calibration with one panel per class; see `plots`."""

import itertools

import numpy as np
from matplotlib.ticker import MaxNLocator
from sklearn import metrics

from common.metrics import calibration
from common.report import plots

PANELS_PER_ROW = 4


@plots.styled
def roc_panels(truth, scores, names):
    """Plot ROC curves in one panel per class, with one line per run and its area under the curve.

    truth: (N, C) of 0 and 1; scores: a dict from a run's name to (N, C); names: of the C classes. Rows with NaN are
    left out class by class. Classes without positives or without negatives are left out.
    """
    curves = {}
    for (c, name), (run, values) in itertools.product(enumerate(names), scores.items()):
        labels, found = plots.finite_rows(truth[:, c], values[:, c])
        if len(np.unique(labels)) > 1:
            false, true, _ = metrics.roc_curve(labels, found)
            curves.setdefault(name, {})[run] = metrics.auc(false, true), false, true
    if not curves:
        return None
    figure, panels = _make_panels(curves, "false positive rate", "true positive rate")
    for ax, (name, lines) in zip(panels, curves.items(), strict=True):
        ax.plot([0, 1], [0, 1], color=plots.RULE, linewidth=1)
        for place, (run, (area, false, true)) in enumerate(lines.items()):
            colour, dash = plots.LINES[list(scores).index(run)]
            ax.plot(false, true, dash, color=colour, linewidth=1.4, label=plots.legend_name(run))
            height = 0.04 + 0.12 * (len(lines) - 1 - place)
            ax.text(0.97, height, f"{area:.3f}", color=colour, ha="right", weight="bold", transform=ax.transAxes)
        ax.set(title=name, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect=1)
    plots.add_legend_outside(figure, panels[0])
    return plots.to_svg(figure)


@plots.styled
def reliability_panels(truth, probs, names, n_bins=15):
    """Plot reliability curves in one panel per class, with the expected calibration error.

    truth: (N, C) of 0 and 1; probs: (N, C) in [0, 1]; names: of the C classes. Rows with NaN are left out class by
    class. A panel's axes end where its curve ends, since most findings are rare.
    """
    columns = {name: plots.finite_rows(truth[:, c], probs[:, c]) for c, name in enumerate(names)}
    curves = {name: calibration.reliability(y, p, n_bins) for name, (y, p) in columns.items() if len(y)}
    if not curves:
        return None
    figure, panels = _make_panels(curves, "mean probability", "share of positives")
    for ax, (name, (mean, share, images)) in zip(panels, curves.items(), strict=True):
        end = 1.08 * max(mean.max(), share.max(), 0.01)
        error = np.average(np.abs(mean - share), weights=images)
        ax.plot([0, end], [0, end], color=plots.RULE, linewidth=1)
        ax.plot(mean, share, "-o", color=plots.BLUE, linewidth=1.2)
        ax.text(0.97, 0.04, f"{error:.3f}", ha="right", weight="bold", transform=ax.transAxes)
        ax.set(title=name, xlim=(-0.04 * end, end), ylim=(-0.04 * end, end), aspect=1)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set(major_locator=MaxNLocator(2), major_formatter="{x:g}")
    return plots.to_svg(figure)


def _make_panels(items, x_label, y_label):
    """Return a figure with one square panel per item; axis labels are at the figure's edges."""
    columns = min(PANELS_PER_ROW, len(items))
    rows, side = -(-len(items) // columns), 1.62 if len(items) > 1 else 2.8
    height, width = 0.6 + (side + 0.13) * rows, 0.5 + side * columns
    figure, axes = plots.make_axes(height, width, nrows=rows, ncols=columns, squeeze=False)
    for ax in axes.flat[len(items) :]:
        ax.remove()
    figure.supxlabel(x_label, size=9.5)
    figure.supylabel(y_label, size=9.5)
    return figure, list(axes.flat[: len(items)])
