"""Plots of the report: SVG bytes in the page's fonts and its light or dark colours.

Every plot function returns None if there is nothing finite to draw, which `page.figure` turns into a note. Data colours
are those of Okabe and Ito (Color Universal Design, 2008).
"""

import io
import math
import re

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.report.page import METRICS, interval_text

INK, RULE, BLUE = "#1d2732", "#dde3e9", "#0072b1"  # replaced by the page's own colours in the SVG
CELL, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
_COLOURS = [BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9"]
LINES = [(colour, dash) for dash in ("-", "--", ":", "-.") for colour in _COLOURS] * 10
FEW = "intervals of classes with fewer than about 25 positive patients are too narrow"
_MARK = {"color": ORANGE, "linewidth": 1.3, "linestyle": (0, (4, 3))}
styled = matplotlib.rc_context(
    {"font.size": 9.5, "axes.titlesize": 9.5, "legend.fontsize": 9, "axes.titlelocation": "left"}
    | {"grid.linewidth": 0.6, "lines.linewidth": 1.8, "lines.markersize": 3.5, "svg.fonttype": "none"}
    | dict.fromkeys(["text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"], INK)
    | dict.fromkeys(["axes.edgecolor", "grid.color", "xtick.color", "ytick.color"], RULE)
    | dict.fromkeys(["axes.grid", "axes.axisbelow"], True)
    | dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"], False)
)


def make_axes(height=2.8, width=4.7, **options):
    """Return a figure of `width` × `height` inches and its axes; `options` are those of `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(**options)


def to_svg(figure):
    """Return the figure as SVG bytes whose fonts and neutral colours are CSS variables of the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    for colour, name in ((INK, "ink"), (RULE, "rule"), (BLUE, "blue")):
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    return re.sub(r"(font(?:-family)?: [^;\"']*)'[^;\"]*", r"\1var(--font, sans-serif)", svg).encode()


def finite_rows(*columns):
    """Return the columns, (N,) each, as floats, without rows in which any value is not finite."""
    columns = np.array(columns, float)
    return columns[:, np.isfinite(columns).all(0)]


def legend_name(name):
    """Return a name as a label for a legend, which hides labels that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def add_legend_above(ax):
    """Put the legend above the axes, in as many columns as fit."""
    longest = max(len(label) for label in ax.get_legend_handles_labels()[1])
    columns = max(1, min(3, 50 // (6 + longest)))  # about 50 characters fit above a plot
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=columns, handlelength=1.4, columnspacing=1.2)


def remove_frame(ax):
    """Remove grid, spines and tick marks."""
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def add_legend_outside(figure, ax):
    """Put a legend of several lines above the figure, in as many columns as fit."""
    lines, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        columns = max(1, min(len(labels), 75 // (6 + max(map(len, labels)))))
        figure.legend(lines, labels, loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2)


@styled
def learning_curves(history, chosen=None):
    """Plot losses, validation metrics, learning rate, time and memory by epoch, one panel each.

    `history`: one row per epoch with `epoch` and any of `*loss*`, `lr`, `seconds`, `memory_mb` and other numbers (not
    `left`); NaN leaves a gap. `chosen`: (first, last) epoch of the window whose weights were kept.
    """
    names = [n for n in history.select_dtypes("number").dropna(axis=1, how="all") if n not in ("epoch", "left")]
    small = {"lr": "lr", "seconds": "seconds", "memory_mb": "MB"}
    panels = {"loss": [n for n in names if "loss" in n]}
    panels["validation"] = [n for n in names if n not in small and "loss" not in n]
    panels |= {small[n]: [n] for n in names if n in small}
    panels = {label: names for label, names in panels.items() if names}
    if not panels:
        return None
    heights = [0.8 if label in small.values() else 1.9 for label in panels]
    figure, axes = make_axes(0.5 + sum(heights), nrows=len(panels), sharex=True, squeeze=False, height_ratios=heights)
    for ax, (label, names) in zip(axes[:, 0], panels.items(), strict=True):
        for name, (colour, dash) in zip(names, LINES, strict=False):
            ax.plot(history["epoch"], history[name], dash, color=colour, marker="o", label=METRICS.get(name, name))
        if chosen is not None:
            ax.axvspan(chosen[0] - 0.5, chosen[1] + 0.5, color=GREEN, alpha=0.18, linewidth=0, label="kept")
        ax.set_ylabel(label)
        if label in small.values():
            ax.yaxis.set(major_formatter="{x:g}", major_locator=MaxNLocator(2))
        else:
            add_legend_above(ax)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return to_svg(figure)


@styled
def mean_curves(histories):
    """Plot mean ± standard deviation over histories (equally long tables) of metrics with a train_<name> in all."""
    names = [name for name in histories[0] if all({name, f"train_{name}"} <= {*each} for each in histories)]
    if not names:
        return None
    figure, axes = make_axes(2.6, 3.4 * len(names), ncols=len(names), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        for column, label, (colour, dash) in ((f"train_{name}", "training", LINES[0]), (name, "validation", LINES[1])):
            values = np.stack([history[column] for history in histories])
            mean, sd, epochs = values.mean(0), values.std(0, ddof=1), histories[0]["epoch"]
            ax.plot(epochs, mean, dash, color=colour, label=label)
            ax.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)
        ax.set(xlabel="epoch", ylabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        add_legend_above(ax)
    return to_svg(figure)


@styled
def confusion_matrix(counts, labels):
    """Plot counts (2, 2), rows by truth and columns by prediction; shade and percentage are shares of the row."""
    counts = np.asarray(counts, float)
    if not counts.sum() > 0:
        return None
    figure, ax = make_axes(2.5)
    for (row, column), share in np.ndenumerate(counts / np.maximum(counts.sum(1, keepdims=True), 1)):
        x, y = column + np.array([-0.48, 0.48, 0.48, -0.48]), row + np.array([-0.47, -0.47, 0.47, 0.47])
        ax.fill(x, y, color=CELL, alpha=0.07 + 0.93 * share, linewidth=0)
        font = {"size": 10, "color": "white" if share > 0.6 else INK, "linespacing": 1.5}
        ax.text(column, row, f"{counts[row, column]:,.0f}\n{share:.1%}", ha="center", va="center", **font)
    ax.set(xlim=(-0.5, 1.5), ylim=(1.5, -0.5), xlabel="predicted", ylabel="true")
    ax.set_xticks(range(2), labels)
    ax.set_yticks(range(2), labels)
    remove_frame(ax)
    return to_svg(figure)


def score_with_interval(rows, label="score", reference=None):
    """Plot estimates with their intervals, one line each with its values; `rows` are (name, estimate, low, high).

    A row without a finite estimate is left out. Otherwise like `forest`.
    """
    rows = [(name, np.array(values, float)) for name, *values in rows]  # None becomes NaN
    rows = [row for row in rows if np.isfinite(row[1][0])]
    return forest({"": [values for _, values in rows]}, [name for name, _ in rows], label, reference)


@styled
def forest(runs, names, label="AUROC", reference=None):
    """Plot estimates with their intervals, one line per name and one dot per run; a single run also gets numbers.

    runs: a dict from a run's name to (N, 3) of estimate, low and high; names: of the N lines. Values that are not
    finite are not drawn. reference: a score to compare with, drawn as a dashed line.
    """
    runs = {run: np.array(values, float).reshape(-1, 3) for run, values in runs.items()}
    if not any(np.isfinite(values[:, 0]).any() for values in runs.values()):
        return None
    one, step = len(runs) == 1, 0.8 / len(runs)
    figure, ax = make_axes(0.8 + len(names) * max(0.34, 0.15 * len(runs)), 4.7 if one else 6.4)
    for k, (run, values) in enumerate(runs.items()):
        places, (estimates, low, high) = np.arange(len(names)) - 0.4 + (k + 0.5) * step, values.T
        ax.hlines(places, low, high, color=LINES[k][0], linewidth=1.8)
        ax.plot(estimates, places, "o", color=LINES[k][0], markersize=4.5, label=legend_name(run))
    for place, (estimate, low, high) in enumerate(values if one else ()):
        text = interval_text(estimate, low, high) or ""
        ax.text(1.02, place, text, transform=ax.get_yaxis_transform(), va="center", size=9)
    for place in range(1, 1 if one else len(names)):
        ax.axhline(place - 0.5, color=RULE, linewidth=0.6)
    if reference is not None:
        ax.axvline(reference, **_MARK | {"color": INK})
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel=label)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(3 if one else None))
    add_legend_outside(figure, ax)
    return to_svg(figure)


@styled
def threshold_surface(grid, x, y, value, chosen):
    """Plot a heat map of searched settings: columns `x` and `y` of the table `grid` are its axes, `value` its colour.

    A cell shows the best value over any further columns. `chosen`: the (x, y) to mark. Settings are spaced evenly.
    """
    grid = grid[np.isfinite(grid[value].astype(float))]
    if len(grid) == 0:
        return None
    surface = grid.pivot_table(index=y, columns=x, values=value, aggfunc="max")
    figure, ax = make_axes(3.1)
    image = ax.imshow(surface, cmap="cividis", aspect="auto", origin="lower", interpolation="none")
    place = surface.columns.get_loc(chosen[0]), surface.index.get_loc(chosen[1])
    for colour, width in (("white", 4), ("black", 1.6)):
        ax.plot(*place, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width)
    for axis, names, letters in ((ax.xaxis, surface.columns, 36), (ax.yaxis, surface.index, 1e9)):
        texts = [f"{name:,.6g}" for name in names]
        step = max(1 + (len(names) - 1) // 10, math.ceil(sum(len(text) + 2 for text in texts) / letters))
        axis.set_ticks(range(0, len(names), step), texts[::step])
    best = f"{surface.at[chosen[1], chosen[0]]:.4f} at {x} {chosen[0]:,.6g}, {y} {chosen[1]:,.6g}"
    ax.set(xlabel=x, ylabel=y, title=best)
    remove_frame(ax)
    figure.colorbar(image, ax=ax, label=METRICS.get(value, value)).outline.set_visible(False)
    return to_svg(figure)


@styled
def line_with_peak(x, y, x_label, y_label, peak=None):
    """Plot a score by setting, (N,) each, and mark the setting nearest to `peak` (default: the best one)."""
    x, y = finite_rows(x, y)
    if len(x) == 0:
        return None
    x, y = x[np.argsort(x)], y[np.argsort(x)]
    at = np.argmax(y) if peak is None else np.argmin(np.abs(x - peak))
    figure, ax = make_axes()
    ax.plot(x, y, color=BLUE, marker="o")
    ax.axvline(x[at], **_MARK)
    ax.plot(x[at], y[at], "o", color=ORANGE, markersize=8)
    ax.set(xlabel=x_label, ylabel=y_label, title=f"{y[at]:.4f} at {x[at]:,.6g}")
    return to_svg(figure)


@styled
def lr_finder_plot(lrs, losses, suggestion):
    """Plot loss by learning rate, (N,) each, and the `suggestion`; the final divergence is cut off."""
    lrs, losses = finite_rows(lrs, losses)
    if len(lrs) == 0:
        return None
    figure, ax = make_axes()
    ax.plot(lrs, losses, color=BLUE)
    ax.set(xscale="log", xlabel="learning rate", ylabel="loss", title=f"suggested {suggestion:.2g}")
    ax.xaxis.set(major_formatter="{x:.0e}", minor_formatter="")
    low, first = losses.min(), losses[: 1 + len(losses) // 10].max()
    if first > low:
        ax.set_ylim(low - 0.1 * (first - low), first + 0.5 * (first - low))
    ax.axvline(suggestion, **_MARK)
    return to_svg(figure)


@styled
def histogram(groups, label, bins=40, threshold=None):
    """Plot the distribution of each group over common bins; `groups` maps names to values (N,), NaN left out.

    Each group sums to 100 %, so that groups of different sizes are comparable. `threshold` is drawn as a dashed line.
    """
    groups = {name: finite_rows(values)[0] for name, values in groups.items()}
    groups = {name: values for name, values in groups.items() if len(values)}
    if not groups:
        return None
    figure, ax = make_axes()
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins)
    for (name, values), (colour, _) in zip(groups.items(), LINES, strict=False):
        shares = np.histogram(values, edges)[0] * (100 / len(values))
        ax.stairs(shares, edges, fill=True, color=colour, alpha=0.28)
        ax.stairs(shares, edges, color=colour, linewidth=1.5, label=legend_name(f"{name} (n = {len(values):,})"))
    if threshold is not None:
        ax.axvline(threshold, **_MARK | {"color": INK})
    ax.set(xlabel=label, ylabel="share of the group, %")
    add_legend_above(ax)
    return to_svg(figure)
