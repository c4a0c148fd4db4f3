"""`log`: print all submissions, and write a page that plots offline scores against leaderboard scores."""

from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import check, log
from common.kaggle.upload import LOG, NUMBERS, read_log
from common.report import page
from common.report.plots import BLUE, INK, ORANGE, add_legend_above, make_axes, styled, to_svg

PAGE = LOG.with_suffix(".html")
ORDER = ["date", "run", "cv", "public", "private", "message", "rows", "git", "sha256"]  # the most important first
FEW = 3  # minimum number of submissions with both scores to speak of agreement


def log_tool(*, out: Path = PAGE):
    """Print the log of submissions and write it as a page, with the offline score against the leaderboard's.

    Args:
        out: The page.
    """
    table = read_log()
    check(not table.empty, f"{LOG}: no submissions yet; `upload` writes it")
    log.info(format_log(table).to_string(index=False))
    waiting = int((table["public"] == "").sum())
    if waiting:
        log.info(f"{waiting} without a score yet: the same `upload` again fetches it")
    parts = []
    for solution, rows in table.groupby("solution", sort=True):
        numbers = rows[list(NUMBERS)].apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
        caption = "Offline score with its interval against the leaderboard's; on the dashed line they are equal."
        picture = page.figure(plot_cv_against_lb(numbers), f"{caption} {describe_agreement(numbers)}")
        parts.append(page.section(solution, picture, page.table(format_log(rows)[ORDER].iloc[::-1], "newest first")))
    page.write_page(out, "Submissions", f"{len(table):,} sent to Kaggle", parts)
    log.info(str(out))
    return 0


def format_log(table):
    """Return the log (a table of strings) in readable form: cv and interval in one column, shortened hashes."""

    def short(text):
        value = pd.to_numeric(text, errors="coerce")
        return text if np.isnan(value) else f"{value:.4f}"

    some, cv = table.copy(), pd.to_numeric(table["cv"], errors="coerce")
    interval = " [" + table["cv_low"].map(short) + ", " + table["cv_high"].map(short) + "]"
    some["cv"] = np.where(cv.isna(), "–", table["cv"].map(short) + np.where(table["cv_low"] == "", "", interval))
    some[["public", "private"]] = table[["public", "private"]].replace("", "–")
    some["sha256"] = table["sha256"].str[:8]
    return some.drop(columns=["cv_low", "cv_high"])


def describe_agreement(numbers):
    """Return a sentence on how many pairs of submissions cv and public score rank alike (Kendall's pairs)."""
    both = numbers[["cv", "public"]].dropna().to_numpy()
    if len(both) < FEW:
        return f"{len(both)} with both scores: too few to compare."
    first, second = np.triu_indices(len(both), 1)
    cv, public = (both[first] - both[second]).T
    agree, differ = int((cv * public > 0).sum()), int((cv * public != 0).sum())
    return f"In {agree} of {differ} pairs that differ in both scores, the higher cv has the higher public score."


@styled
def plot_cv_against_lb(numbers):
    """Return a scatter plot (SVG) of cv, with interval, against leaderboard scores; None if there are no pairs."""
    known = numbers[numbers["cv"].notna() & (numbers["public"].notna() | numbers["private"].notna())]
    if known.empty:
        return None
    figure, ax = make_axes(3.6)
    low, high = known[["cv", "cv_low"]].min(axis=1), known[["cv", "cv_high"]].max(axis=1)
    values = pd.concat([low, high, known["public"], known["private"]]).dropna()
    edge = 0.05 * (values.max() - values.min()) or 0.01
    diagonal = [values.min() - edge, values.max() + edge]
    ax.plot(diagonal, diagonal, "--", color=INK, alpha=0.45, linewidth=1)
    style = {"xerr": [known["cv"] - low, high - known["cv"]], "markersize": 5, "elinewidth": 0.8, "alpha": 0.85}
    for name, colour, mark in (("public", BLUE, "o"), ("private", ORANGE, "s")):
        if known[name].notna().any():
            ax.errorbar(known["cv"], known[name], fmt=mark, color=colour, label=f"{name} leaderboard", **style)
    ax.set(xlabel="cv, with its 95 % interval", ylabel="leaderboard")
    add_legend_above(ax)
    return to_svg(figure)
