"""submissions/log.csv: every file sent to Kaggle, with its offline score and the leaderboard's."""

import contextlib
from pathlib import Path

import pandas as pd

from common.paths import atomic_path, escape_formulas, lock
from common.submit.table import read_table

LOG = Path("submissions/log.csv")
NUMBERS = ("rows", "cv", "cv_low", "cv_high", "public", "private")
COLUMNS = ("date", "solution", "run", "git", "sha256", *NUMBERS, "message")
FAILED = "error"  # replaces the public score if Kaggle could not compute it


def read_log(path=LOG):
    """Return the log as a table of strings, empty if there is none; raise InputError for any other file."""
    return read_table(path, COLUMNS) if Path(path).is_file() else pd.DataFrame(columns=COLUMNS, dtype=str)


def append_row(row, path=LOG):
    """Append a row (a dict by COLUMNS) to the log, safely beside other processes."""
    with _locked_log(path) as table:
        table.loc[len(table)] = [str(row[name]) for name in COLUMNS]


def set_scores(date, sha256, public, private, path=LOG):
    """Write the scores of the last row with this date and hash."""
    with _locked_log(path) as table:
        matches = table.index[(table["date"] == date) & (table["sha256"] == sha256)]
        table.loc[matches[-1:], ["public", "private"]] = [str(public), str(private)]


@contextlib.contextmanager
def _locked_log(path):
    """Yield the log's table and write it back afterwards, locked against other processes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as handle:  # not the log itself, which each write replaces
        lock(handle, path, "writing", wait=True)
        table = read_log(path)
        yield table
        with atomic_path(path) as temporary:
            escape_formulas(table).to_csv(temporary, index=False, lineterminator="\n")
