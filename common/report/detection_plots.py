"""Plots of detections, by the conventions of common.report.plots."""

import numpy as np

from common.errors import InputError
from common.report.plots import _LINES, BLUE, _axes, _bare, _columns, _styled, _svg


@_styled
def pr_curves(curves):
    """Precision against recall, one line a class; `curves` maps a name to (recall, precision, AP)."""
    drawn = [(ap, name, *_columns(name, recall, precision)) for name, (recall, precision, ap) in curves.items()]
    drawn = [curve for curve in drawn if len(curve[2])]
    if not drawn:
        return None
    figure, ax = _axes(3.6, 6)
    for (ap, name, recall, precision), (colour, dash) in zip(sorted(drawn, key=lambda c: -c[0]), _LINES, strict=False):
        recall, precision = np.append(0, recall), np.append(precision[0], precision)
        ax.step(recall, precision, dash, where="pre", color=colour, linewidth=1.5, label=f"{name} {ap:.3f}")
    ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


@_styled
def bars(values, label):
    """One horizontal bar for each name of `values`, a dict to numbers, in its order."""
    finite = {name: float(value) for name, value in values.items() if np.isfinite(value)}
    if not finite:
        return None
    figure, ax = _axes(0.7 + 0.3 * len(finite))
    places = np.arange(len(finite))[::-1]
    ax.barh(places, list(finite.values()), color=BLUE, height=0.65)
    for place, value in zip(places, finite.values(), strict=True):
        ax.text(value, place, f" {value:,.4g}", va="center", fontsize=8.5)
    ax.set_yticks(places, list(finite))
    ax.set(xlabel=label)
    ax.margins(x=0.15)
    ax.grid(axis="y", visible=False)
    return _svg(figure)


@_styled
def location_maps(boxes, columns=5, cells=48):
    """Where the boxes of each class lie: for each pixel of the image, how many cover it.

    `boxes` maps a name to float (n, 4), x_min, y_min, x_max, y_max as fractions of the image's width and height.
    """
    boxes = {name: np.asarray(part, float) for name, part in boxes.items() if len(part)}
    for name, part in boxes.items():
        if part.ndim != 2 or part.shape[1] != 4 or not ((part >= 0) & (part <= 1)).all():
            raise InputError(f"location map of {name}: boxes must be (n, 4) with fractions from 0 to 1")
    if not boxes:
        return None
    rows = -(-len(boxes) // columns)
    figure, axes = _axes(1.75 * rows, 1.55 * columns, nrows=rows, ncols=columns, squeeze=False)
    centres = (np.arange(cells) + 0.5) / cells
    for ax, (name, part) in zip(axes.flat, boxes.items(), strict=False):
        inside_x = (centres[None] >= part[:, :1]) & (centres[None] <= part[:, 2:3])
        inside_y = (centres[None] >= part[:, 1:2]) & (centres[None] <= part[:, 3:])
        ax.imshow(inside_y.T.astype(float) @ inside_x, cmap="cividis", interpolation="none")
        ax.set_title(f"{name}\n{len(part):,}", fontsize=8.5)
    for ax in axes.flat:
        _bare(ax)
        ax.set(xticks=[], yticks=[])
    for ax in list(axes.flat)[len(boxes) :]:
        ax.set_visible(False)
    return _svg(figure)
