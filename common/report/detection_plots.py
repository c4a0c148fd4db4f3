"""Plots of detections; see `plots`."""

import numpy as np

from common.report.plots import BLUE, LINES, legend_name, make_axes, remove_frame, styled, to_svg


def pr_curves(found):
    """Plot precision by recall, one line per class, best AP first; `found` maps names to (recall, precision, AP)."""
    drawn = sorted(((-ap, name, r, p) for name, (r, p, ap) in found.items() if len(r)), key=lambda curve: curve[:2])
    series = {f"{name} {-ap:.3f}": (np.append(0, r), np.append(p[0], p)) for ap, name, r, p in drawn}
    return curves(series, "recall", "precision", drawstyle="steps-pre")


@styled
def curves(series, x_label, y_label, ranges=(), **style):
    """Plot several lines in one panel: `series` maps names to (x, y); ranges: (name, low, high) of y, shaded."""
    if not series:
        return None
    figure, ax = make_axes(3.6, 6)
    for (name, (x, y)), (colour, dash) in zip(series.items(), LINES, strict=False):
        ax.plot(x, y, dash, color=colour, linewidth=1.5, label=legend_name(name), **style)
    for (name, low, high), (colour, _) in zip(ranges, LINES, strict=False):
        ax.axhspan(low, high, color=colour, alpha=0.12, linewidth=0, label=name)
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return to_svg(figure)


@styled
def bars(names, values, label):
    """Plot one horizontal bar per name, (N,) each, from top to bottom."""
    figure, ax = make_axes(0.7 + 0.3 * len(names))
    places = np.arange(len(names))[::-1]
    ax.bar_label(ax.barh(places, values, color=BLUE, height=0.65), fmt=" {:,.4g}", fontsize=8.5)
    ax.set_yticks(places, names)
    ax.set_xlabel(label)
    ax.margins(x=0.15)
    ax.grid(axis="y", visible=False)
    return to_svg(figure)


@styled
def location_maps(boxes, columns=5, cells=48):
    """Plot one heat map per class: how many boxes cover each of `cells` × `cells` points of the image.

    `boxes` maps names to float (n, 4), x_min, y_min, x_max, y_max as fractions of the image's width and height.
    """
    boxes = {name: part for name, part in boxes.items() if len(part)}
    if not boxes:
        return None
    rows = -(-len(boxes) // columns)
    figure, axes = make_axes(1.75 * rows, 1.55 * columns, nrows=rows, ncols=columns, squeeze=False)
    centres = (np.arange(cells) + 0.5) / cells
    for ax, (name, part) in zip(axes.flat, boxes.items(), strict=False):
        inside_x = (centres[None] >= part[:, :1]) & (centres[None] <= part[:, 2:3])
        inside_y = (centres[None] >= part[:, 1:2]) & (centres[None] <= part[:, 3:])
        ax.imshow(inside_y.T.astype(float) @ inside_x, cmap="cividis", interpolation="none")
        ax.set_title(f"{name}\n{len(part):,}", fontsize=8.5)
        ax.set(xticks=[], yticks=[])
        remove_frame(ax)
    for ax in list(axes.flat)[len(boxes) :]:
        ax.remove()
    return to_svg(figure)
