"""The log of submissions as a page, and the plot of cv against the leaderboard."""

import numpy as np
import pandas as pd

from common.kaggle.log import NUMBERS, shown
from common.report import page
from common.report.plots import BLUE, INK, ORANGE, _axes, _legend_above, _styled, _svg

ORDER = ["date", "run", "cv", "public", "private", "message", "rows", "git", "sha256"]  # what matters comes first
FEW = 3  # submissions with both scores, below which a correlation says nothing


def write_log_page(path, table):
    """Write the log (a table of strings, see common.kaggle.log) as one HTML file, a section for each solution."""
    parts = []
    for solution, rows in table.groupby("solution", sort=True):
        numbers = rows[list(NUMBERS)].apply(pd.to_numeric, errors="coerce")
        caption = "Offline score with its interval against the leaderboard's; on the dashed line they are equal."
        picture = page.figure(cv_against_lb(numbers), f"{caption} {agreement(numbers)}")
        parts.append(page.section(solution, picture, page.table(shown(rows)[ORDER].iloc[::-1], "newest first")))
    page.write_page(path, "Submissions", f"{len(table):,} sent to Kaggle", parts)


def agreement(numbers):
    """In words: how often a higher cv went with a higher score on the public leaderboard (Kendall's pairs)."""
    both = numbers[["cv", "public"]].dropna().to_numpy()
    if len(both) < FEW:
        return f"{len(both)} with both scores: too few to say whether the one follows the other."
    first, second = np.triu_indices(len(both), 1)
    cv, public = (both[first] - both[second]).T
    agree, differ = int((cv * public > 0).sum()), int((cv * public != 0).sum())
    return (
        f"Of {differ} pairs of submissions that differ in both, {agree} have the higher cv and the higher public score."
    )


@_styled
def cv_against_lb(numbers):
    """Scatter of cv (with interval) against public and private score; numbers: columns of NUMBERS, float, NaN unknown.

    Returns SVG bytes, None where no submission has both scores.
    """
    known = numbers[numbers["cv"].notna() & (numbers["public"].notna() | numbers["private"].notna())]
    if known.empty:
        return None
    figure, ax = _axes(3.6)
    reach = (known[["cv", "cv_low"]].min(axis=1), known[["cv", "cv_high"]].max(axis=1))
    spread = [known["cv"] - reach[0], reach[1] - known["cv"]]
    ends = pd.concat([*reach, known["public"], known["private"]]).dropna()
    low, high = ends.min(), ends.max()
    edge = 0.05 * (high - low) or 0.01
    ax.plot([low - edge, high + edge], [low - edge, high + edge], "--", color=INK, alpha=0.45, linewidth=1)
    for name, colour, mark in (("public", BLUE, "o"), ("private", ORANGE, "s")):
        if known[name].notna().any():
            ax.errorbar(
                known["cv"],
                known[name],
                xerr=spread,
                fmt=mark,
                color=colour,
                markersize=5,
                elinewidth=0.8,
                alpha=0.85,
                label=f"{name} leaderboard",
            )
    ax.set(xlabel="cv, with its 95 % interval", ylabel="leaderboard")
    _legend_above(ax)
    return _svg(figure)
