"""submissions/log.csv: what was sent to Kaggle, with the offline score before it and the leaderboard's after it."""

import contextlib
import fcntl
import logging
from pathlib import Path

import numpy as np
import pandas as pd

from common.errors import InputError
from common.paths import atomic_path
from common.submit.table import read_table

log = logging.getLogger(__name__)
LOG = Path("submissions/log.csv")
PAGE = LOG.with_suffix(".html")
COLUMNS = (
    "date",
    "solution",
    "run",
    "git",
    "sha256",
    "rows",
    "cv",
    "cv_low",
    "cv_high",
    "public",
    "private",
    "message",
)
NUMBERS = ("rows", "cv", "cv_low", "cv_high", "public", "private")
FAILED = "error"  # in place of the public score: Kaggle could not score it


def read(path=LOG):
    """The log as a table of strings, empty where there is none; InputError where the file is another."""
    return read_table(path, COLUMNS) if Path(path).is_file() else pd.DataFrame(columns=COLUMNS, dtype=str)


def rows_of(sha256, solution, path=LOG):
    """The rows of one file of a solution, oldest first."""
    table = read(path)
    return table[(table["sha256"] == sha256) & (table["solution"] == solution)]


def append(row, path=LOG):
    """Add a row (a dict by COLUMNS); rows that other processes add meanwhile stay."""
    with _locked(path):
        table = read(path)
        table.loc[len(table)] = [str(row[name]) for name in COLUMNS]
        _write(table, path)


def set_scores(date, sha256, public, private, path=LOG):
    """Put the scores of a row that is there, found by its date and hash; of two within one second the later one's."""
    with _locked(path):
        table = read(path)
        mine = table.index[(table["date"] == date) & (table["sha256"] == sha256)]
        table.loc[mine[-1:], ["public", "private"]] = [str(public), str(private)]
        _write(table, path)


@contextlib.contextmanager
def _locked(path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as handle:  # not the log: each writing replaces that
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write(table, path):
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def show(*, out: Path = PAGE):
    """Print the log of submissions and write it as a page, with the offline score against the leaderboard's.

    Args:
        out: The page.
    """
    from common.kaggle.log_page import write_log_page  # late: plots take a while to import

    table = read()
    if table.empty:
        raise InputError(f"{LOG}: no submissions yet; `upload` writes it")
    log.info(shown(table).to_string(index=False))
    waiting = int((table["public"] == "").sum())
    if waiting:
        log.info(f"{waiting} without a score yet: the same `upload` again fetches it")
    write_log_page(out, table)
    log.info(str(out))
    return 0


def shown(table):
    """The log as a reader wants it: cv with its interval in one column, hashes cut, numbers as they were given."""
    some = table.copy()
    cv = pd.to_numeric(table["cv"], errors="coerce")
    interval = " [" + table["cv_low"].map(_short) + ", " + table["cv_high"].map(_short) + "]"
    some["cv"] = np.where(cv.isna(), "–", table["cv"].map(_short) + np.where(table["cv_low"] == "", "", interval))
    for name in ("public", "private"):
        some[name] = table[name].replace("", "–")
    some["sha256"] = table["sha256"].str[:8]
    return some.drop(columns=["cv_low", "cv_high"])


def _short(text):
    value = pd.to_numeric(text, errors="coerce")
    return text if np.isnan(value) else f"{value:.4f}"
