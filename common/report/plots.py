"""Plots of the report: SVG bytes that take the page's fonts and its light or dark colours.

Every function returns None when there is nothing finite to draw yet, which `page.figure` turns into a note, and raises
InputError for wrong shapes and absent columns. Data colours are those of Okabe and Ito (Color Universal Design, 2008).
"""

import io
import re

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn import metrics as sklearn_metrics

from common.errors import InputError
from common.metrics import calibration

INK, RULE, BLUE = "#1d2732", "#dde3e9", "#0072b1"  # replaced by the page's own colours in the SVG
CELL, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
_COLOURS = [BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9"]
_LINES = [(colour, dash) for dash in ("-", "--", ":", "-.") for colour in _COLOURS] * 10
_MARK = {"color": ORANGE, "linewidth": 1.3, "linestyle": (0, (4, 3))}
_styled = matplotlib.rc_context(
    {
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "legend.fontsize": 9,
        "axes.titlelocation": "left",
        "svg.fonttype": "none",
    }
    | {"grid.linewidth": 0.6, "lines.linewidth": 1.8, "lines.markersize": 3.5}
    | dict.fromkeys(["text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"], INK)
    | dict.fromkeys(["axes.edgecolor", "grid.color", "xtick.color", "ytick.color"], RULE)
    | dict.fromkeys(["axes.grid", "axes.axisbelow"], True)
    | dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"], False)
)


def _axes(height=2.8, width=4.7, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(**options)


def _svg(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    for colour, name in ((INK, "ink"), (RULE, "rule"), (BLUE, "blue")):
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    return re.sub(r"(font(?:-family)?: [^;\"']*)'[^;\"]*", r"\1var(--font, sans-serif)", svg).encode()


def _columns(what, *columns):
    """The columns as floats with the rows that are not finite left out."""
    try:
        columns = [np.asarray(c, dtype=float) for c in columns]
    except (TypeError, ValueError):
        raise InputError(f"{what}: not numbers") from None
    if any(c.ndim != 1 or len(c) != len(columns[0]) for c in columns):
        raise InputError(f"{what}: shapes {[c.shape for c in columns]} where one dimension and one length are wanted")
    finite = np.logical_and.reduce([np.isfinite(c) for c in columns])
    return [c[finite] for c in columns]


def _legend_above(ax):
    longest = max(len(label) for label in ax.get_legend_handles_labels()[1])
    columns = max(1, min(3, 50 // (6 + longest)))  # about 50 characters fit above a plot
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=columns, handlelength=1.4, columnspacing=1.2)


def _bare(ax):
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


@_styled
def learning_curves(history, chosen=None):
    """Losses, validation figures and learning rate against the epoch, one panel each.

    `history`: a table with `epoch` and any of `lr`, `*loss*` and other numeric columns (`seconds` is passed over),
    one row an epoch; NaN leaves a gap. `chosen`: (first, last) epoch of the window whose weights were kept.
    """
    if len(history) == 0:
        return None
    if "epoch" not in history:
        raise InputError("history: no column 'epoch'")
    names = [n for n in history.select_dtypes("number").dropna(axis=1, how="all") if n not in ("epoch", "seconds")]
    panels = {"loss": [n for n in names if "loss" in n], "validation": [], "lr": [n for n in names if n == "lr"]}
    panels["validation"] = [n for n in names if n != "lr" and "loss" not in n]
    panels = {label: names for label, names in panels.items() if names}
    if not panels:
        return None
    heights = [0.8 if label == "lr" else 1.9 for label in panels]
    figure, axes = _axes(0.5 + sum(heights), nrows=len(panels), sharex=True, squeeze=False, height_ratios=heights)
    for ax, (label, names) in zip(axes[:, 0], panels.items(), strict=True):
        for name, (colour, dash) in zip(names, _LINES, strict=False):
            ax.plot(history["epoch"], history[name], dash, color=colour, marker="o", label=name)
        if chosen is not None:
            ax.axvspan(chosen[0] - 0.5, chosen[1] + 0.5, color=GREEN, alpha=0.18, linewidth=0, label="kept")
        ax.set_ylabel(label)
        if label == "lr":
            ax.yaxis.set(major_formatter="{x:g}", major_locator=MaxNLocator(2))
        else:
            _legend_above(ax)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure)


@_styled
def confusion_matrix(counts, labels):
    """Counts (C, C), row the truth, column the prediction; the shade, and for C ≤ 5 the percentage, is of the row."""
    counts, size = np.asarray(counts, dtype=float), len(labels)
    if counts.shape != (size, size):
        raise InputError(f"confusion matrix: shape {counts.shape} for {size} labels")
    if not np.isfinite(counts).all() or counts.sum() <= 0:
        return None
    few = size <= 5
    figure, ax = _axes(1 + (0.75 if few else 0.4) * size, max(4.7, 1.6 + 0.42 * size))
    for (row, column), share in np.ndenumerate(counts / np.maximum(counts.sum(1, keepdims=True), 1)):
        left, right, top, bottom = column - 0.48, column + 0.48, row - 0.47, row + 0.47
        ax.fill(
            [left, right, right, left], [top, top, bottom, bottom], color=CELL, alpha=0.07 + 0.93 * share, linewidth=0
        )
        text = f"{counts[row, column]:,.0f}" + (f"\n{share:.1%}" if few else "")
        font = {"size": 10 if few else 8, "color": "white" if share > 0.45 else INK, "linespacing": 1.5}
        ax.text(column, row, text, ha="center", va="center", **font)
    ax.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="predicted", ylabel="true")
    ax.set_xticks(range(size), labels, rotation=0 if size <= 3 else 45, ha="center" if size <= 3 else "right")
    ax.set_yticks(range(size), labels)
    _bare(ax)
    return _svg(figure)


@_styled
def score_with_interval(rows, label="score", reference=None, chosen=None):
    """Estimates with their intervals, one line each; `rows` are (name, estimate, low, high).

    A row without a finite estimate is left out, an interval that is not finite is not drawn. `reference`: a score to
    compare with, a dashed line. `chosen`: the name to mark. Raises InputError for a malformed row or interval.
    """
    try:
        rows = [(str(n), *map(float, (e, low, high))) for n, e, low, high in rows if np.isfinite(float(e))]
    except (TypeError, ValueError):
        raise InputError(f"{label}: a row is (name, estimate, low, high)") from None
    if not rows:
        return None
    figure, ax = _axes(0.7 + 0.34 * len(rows))
    for place, (name, estimate, low, high) in enumerate(rows):
        text, colour, weight = f"{estimate:.4f}", *((ORANGE, "bold") if name == chosen else (BLUE, "normal"))
        if np.isfinite([low, high]).all():
            if low > high:
                raise InputError(f"{label}: {name}: an interval from {low} to {high}")
            ax.plot([low, high], [place, place], color=colour, linewidth=2.4)
            text += f"  [{low:.4f}, {high:.4f}]"
        ax.plot(estimate, place, "o", color=colour, markersize=7)
        ax.text(1.02, place, text, transform=ax.get_yaxis_transform(), va="center", size=9, weight=weight)
    if reference is not None:
        ax.axvline(reference, **_MARK | {"color": INK})
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel=label)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(3))
    return _svg(figure)


def variants_bar(scores, chosen=None, label="validation score"):
    """The score of each averaging variant, `chosen` marked; `scores` maps a name to a score.

    Dots and not bars, because the differences are small beside the scores and a cut bar would lie.
    """
    if chosen is not None and chosen not in scores:
        raise InputError(f"variants: {chosen!r} is not among {', '.join(map(str, scores))}")
    return score_with_interval([(n, s, np.nan, np.nan) for n, s in scores.items()], label, chosen=chosen)


@_styled
def threshold_surface(grid, x, y, value, chosen=None):
    """Heat map of the searched settings: columns `x` and `y` of the table `grid` span it, `value` colours it.

    Where the table has further columns, a cell shows the best value over them. `chosen`: the (x, y) to mark, by
    default the best cell. Settings are evenly spaced on the axes, whatever their values.
    """
    absent = [name for name in (x, y, value) if name not in grid]
    if absent:
        raise InputError(f"threshold surface: no column {absent[0]!r}")
    grid = grid[np.isfinite(grid[value].astype(float))]
    if len(grid) == 0:
        return None
    surface = grid.pivot_table(index=y, columns=x, values=value, aggfunc="max")
    at = tuple(grid.loc[grid[value].idxmax(), [x, y]]) if chosen is None else tuple(chosen)
    if at[0] not in surface.columns or at[1] not in surface.index:
        raise InputError(f"threshold surface: {at} was not searched")
    figure, ax = _axes(3.1)
    image = ax.imshow(surface, cmap="cividis", aspect="auto", origin="lower", interpolation="none")
    for colour, width in (("white", 4), ("black", 1.6)):
        place = surface.columns.get_loc(at[0]), surface.index.get_loc(at[1])
        ax.plot(*place, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width)
    for axis, names in ((ax.xaxis, surface.columns), (ax.yaxis, surface.index)):
        step = 1 + (len(names) - 1) // 10
        axis.set_ticks(range(0, len(names), step), [f"{name:,.6g}" for name in names[::step]])
    ax.set(xlabel=x, ylabel=y, title=f"{surface.at[at[1], at[0]]:.4f} at {x} {at[0]:,.6g}, {y} {at[1]:,.6g}")
    _bare(ax)
    figure.colorbar(image, ax=ax, label=value).outline.set_visible(False)
    return _svg(figure)


@_styled
def line_with_peak(x, y, x_label, y_label, peak=None):
    """A figure against a setting, (N,) each, with the searched setting nearest `peak`, or the highest, marked."""
    x, y = _columns(y_label, x, y)
    if len(x) == 0:
        return None
    x, y = x[np.argsort(x)], y[np.argsort(x)]
    at = np.argmax(y) if peak is None else np.argmin(np.abs(x - peak))
    figure, ax = _axes()
    ax.plot(x, y, color=BLUE, marker="o")
    ax.axvline(x[at], **_MARK)
    ax.plot(x[at], y[at], "o", color=ORANGE, markersize=8)
    ax.set(xlabel=x_label, ylabel=y_label, title=f"{y[at]:.4f} at {x[at]:,.6g}")
    return _svg(figure)


@_styled
def lr_finder_plot(lrs, losses, suggestion=None):
    """Loss against a rising learning rate > 0, (N,) each, with the `suggestion`; the final blow-up is cut off."""
    lrs, losses = _columns("learning rate finder", lrs, losses)
    if len(lrs) == 0:
        return None
    if lrs.min() <= 0:
        raise InputError(f"learning rate finder: rates must be positive, not {lrs.min():g}")
    figure, ax = _axes()
    ax.plot(lrs, losses, color=BLUE)
    ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
    ax.xaxis.set_major_formatter("{x:.0e}")
    ax.xaxis.set_minor_formatter("")
    low, first = losses.min(), losses[: 1 + len(losses) // 10].max()
    if first > low:
        ax.set_ylim(low - 0.1 * (first - low), first + 0.5 * (first - low))
    if suggestion is not None:
        ax.axvline(suggestion, **_MARK)
        ax.set_title(f"suggested {suggestion:.2g}")
    return _svg(figure)


@_styled
def roc_curve(truth, probs, names=("AUC",)):
    """ROC curves with their areas; `truth` (N,) or (N, C) of 0 and 1, `probs` alike, `names` of the C classes.

    Rows with NaN are left out class by class, and so are classes that lack one of the two outcomes.
    """
    truth, probs = np.asarray(truth, dtype=float), np.asarray(probs, dtype=float)
    if truth.shape != probs.shape or truth.size != len(truth) * len(names):
        raise InputError(f"ROC: truth {truth.shape} and probabilities {probs.shape} for {len(names)} names")
    curves = []
    for name, t, p in zip(names, truth.reshape(-1, len(names)).T, probs.reshape(-1, len(names)).T, strict=True):
        t, p = _columns(name, t, p)
        if len(np.unique(t)) == 2:
            false, true, _ = sklearn_metrics.roc_curve(t, p)
            curves.append((sklearn_metrics.auc(false, true), false, true, name))
    if not curves:
        return None
    few = len(curves) <= 4
    figure, ax = _axes(3.2 if few else 3.6, 4.7 if few else 6)
    ax.plot([0, 1], [0, 1], color=RULE, linewidth=1)
    for (area, false, true, name), (colour, dash) in zip(sorted(curves, key=lambda c: -c[0]), _LINES, strict=False):
        ax.plot(false, true, dash, color=colour, linewidth=1.6, label=f"{name} {area:.3f}")
    ax.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01))
    ax.legend(**{"loc": "lower right"} if few else {"loc": "center left", "bbox_to_anchor": (1, 0.5)})
    return _svg(figure)


@_styled
def histogram(groups, label, bins=40, threshold=None):
    """Shares of the values of each group, (N,) each, on common bins; `groups` maps a name to values, NaN left out.

    Each group sums to 100 %, so that rare and frequent ones compare. `threshold` is drawn as a dashed line.
    """
    groups = {name: _columns(f"histogram of {name}", values)[0] for name, values in groups.items()}
    groups = {name: values for name, values in groups.items() if len(values)}
    if not groups:
        return None
    figure, ax = _axes()
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins)
    for (name, values), (colour, _) in zip(groups.items(), _LINES, strict=False):
        shares = np.histogram(values, edges)[0] * (100 / len(values))
        ax.stairs(shares, edges, fill=True, color=colour, alpha=0.28)
        ax.stairs(shares, edges, color=colour, linewidth=1.5, label=f"{name} (n = {len(values):,})")
    if threshold is not None:
        ax.axvline(threshold, **_MARK | {"color": INK})
    ax.set(xlabel=label, ylabel="share of the group, %")
    _legend_above(ax)
    return _svg(figure)


@_styled
def reliability(truth, probs, n_bins=15):
    """The share of positives against the mean probability in bins of equal mass; `truth` 0 or 1 and `probs`, (N,) each.

    The title gives the expected calibration error; rows with NaN are left out.
    """
    truth, probs = _columns("reliability", truth, probs)
    if len(truth) == 0:
        return None
    mean, share, images = calibration.reliability(truth, probs, n_bins)
    end = 1.08 * max(mean.max(), share.max(), 0.01)
    figure, ax = _axes(3.2, 3.8)
    ax.plot([0, end], [0, end], color=RULE, linewidth=1)
    ax.plot(mean, share, "-o", color=BLUE, linewidth=1.2, markersize=5)
    error = np.average(np.abs(mean - share), weights=images)
    ax.set(xlabel="mean probability", ylabel="share of positives", xlim=(-0.02 * end, end), ylim=(-0.02 * end, end))
    ax.set_title(f"calibration error {error:.4f}, {len(mean)} bins of {len(truth):,} values")
    return _svg(figure)
