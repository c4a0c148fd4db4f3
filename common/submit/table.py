"""Reading of CSV tables as text, without type guessing, and writing of submissions."""

import csv
import gzip
import sys
import zlib
from pathlib import Path

import pandas as pd

from common.errors import InputError
from common.paths import atomic_path

LARGEST_TABLE, LONGEST_LINE = 2 * 10**9, 10**8  # bytes in memory, characters
CELL = 60  # bytes in memory of a cell without its text


def read_table(path, columns=None, exact=True):
    """Return a CSV file (or .csv.gz) as a frame of strings; row i of the frame is row i + 2 of the file.

    Blanks around header names and values are stripped (` EncodedPixels`, ` -1`); nothing becomes a number or missing,
    because pandas turns a column of `-1` and blanks into floats. columns: the expected names, in order, None for any;
    with exact=False the file may have others, which are dropped. Raises InputError naming file and row for a file that
    is missing, empty or not a CSV, for another header and for rows of another length.
    """
    header, *rows = _rows(Path(path))
    if len(set(header)) < len(header):
        raise InputError(f"{path}, row 1: a column name is repeated: {','.join(header)}")
    wanted = header if columns is None else list(columns)
    if wanted != header if exact else not set(wanted) <= set(header):
        raise InputError(
            f"{path}, row 1: the header must {'be' if exact else 'have'} {_short(wanted)}: {_short(header)}"
        )
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"{path}, row {i + 2}: {len(row)} values where the header has {len(header)} columns")
    return pd.DataFrame(rows, columns=header, dtype=str)[wanted]


def _short(names, limit=200):
    text = ",".join(names)
    return text if len(text) <= limit else text[:limit] + "…"


def _rows(path):
    """Return the rows of the file, header first, as lists of stripped strings, without blank lines at the end."""
    csv.field_size_limit(sys.maxsize)  # a run-length string can exceed the default of 131,072
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = [[value.strip() for value in row] for row in csv.reader(_lines(file, path), strict=True)]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InputError(f"{path}: not a CSV file ({error})") from None
    while rows and rows[-1] in ([], [""]):
        rows.pop()
    if not rows:
        raise InputError(f"{path}: empty file")
    if any("\0" in value for value in rows[0]):
        raise InputError(f"{path}: not a CSV file (its header holds NUL bytes)")
    return rows


def _lines(file, path):
    """Yield the lines of a file within a budget of memory, a fifth for compressed ones, which may hold any number."""
    budget = LARGEST_TABLE // (5 if path.suffix == ".gz" else 1)
    while line := file.readline(LONGEST_LINE):
        budget -= sys.getsizeof(line) + CELL * (line.count(",") + 1)
        if len(line) == LONGEST_LINE or budget < 0:
            raise InputError(f"{path}: too much text for a table")
        yield line


def write_submission(path, frame):
    """Write a frame as CSV atomically: UTF-8, LF line ends, no index; raise InputError for a missing value."""
    missing = frame.isna().to_numpy()
    if missing.any():
        row, column = (int(position[0]) for position in missing.nonzero())
        raise InputError(f"{path}, row {row + 2}: no value for {frame.columns[column]}")
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
