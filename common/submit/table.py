"""Read CSV tables as text, without type inference, and write submissions."""

import csv
import gzip
import io
import sys
import zlib
from pathlib import Path

import pandas as pd

from common.errors import InputError, check
from common.paths import atomic_path

LARGEST_TABLE, LONGEST_LINE = 2 * 10**9, 10**8  # bytes in memory, characters
CELL = 60  # bytes in memory per cell, without its text
_OTHER_KINDS = {
    b"pk\x03\x04": "a ZIP archive or an Excel file; unpack it, or save the table as CSV",
    b"\x1f\x8b": "a gzip file; unpack it, or let its name end in .csv.gz",
    (b"<!doctype html", b"<html"): "a web page, perhaps one that asks to log in; download the table again",
    (b"\xff\xfe", b"\xfe\xff"): "UTF-16 text; save it as UTF-8",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file with git lfs pull",
}


def read_table(path, columns=None, exact=True):
    """Return a CSV file (or .csv.gz) as a DataFrame of str; its row i is row i + 2 of the file.

    Blanks around values are stripped; no value becomes a number or missing, since pandas would turn a column of `-1`
    and blanks into floats. columns: expected names, in order; exact=False drops others. InputError names file and row.
    """
    header, *rows = read_rows(path)
    check(len(set(header)) >= len(header), f"{path}, row 1: a column name is repeated: {','.join(header)}")
    wanted = header if columns is None else list(columns)
    if wanted != header if exact else not set(wanted) <= set(header):
        texts = [text if len(text) <= 200 else text[:200] + "…" for text in map(",".join, (wanted, header))]
        raise InputError(f"{path}, row 1: the header must {'be' if exact else 'have'} {': '.join(texts)}")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"{path}, row {i + 2}: {len(row)} values where the header has {len(header)} columns")
    return pd.DataFrame(rows, columns=header, dtype=str)[wanted]


def read_rows(path):
    """Return the rows of a CSV file as lists of stripped strings, header first; InputError if it is something else."""
    path = Path(path)
    csv.field_size_limit(sys.maxsize)  # run-length strings can exceed the default of 131,072
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as binary:
            head = binary.peek(1 << 10).lstrip()[:200].lower()
            for beginning, kind in _OTHER_KINDS.items():
                check(not head.startswith(beginning), f"{path}: not a CSV file but {kind}")
            file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            rows = [[value.strip() for value in row] for row in csv.reader(_lines(file, path), strict=True)]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, not a CSV file") from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InputError(f"{path}: not a CSV file ({error})") from None
    while rows and not any(rows[-1]):
        rows.pop()
    check(rows, f"{path}: empty file")
    if not any(rows[0]):
        first = next(number for number, row in enumerate(rows, 1) if any(row))
        raise InputError(f"{path}: blank lines before row {first}; delete them, so that the table begins in row 1")
    check(not any("\0" in value for value in rows[0]), f"{path}: not a CSV file (its header holds NUL bytes)")
    return rows


def _lines(file, path):
    """Yield the lines of a file within a memory limit, a fifth if compressed, since it may expand to any length."""
    budget = LARGEST_TABLE // (5 if path.suffix == ".gz" else 1)
    while line := file.readline(LONGEST_LINE):
        budget -= sys.getsizeof(line) + CELL * (line.count(",") + 1)
        check(len(line) < LONGEST_LINE and budget >= 0, f"{path}: too much text for a table")
        yield line


def write_submission(path, frame):
    """Write a DataFrame as CSV atomically: UTF-8, LF, no index. Raises InputError for a missing value."""
    missing = frame.isna().to_numpy()
    if missing.any():
        row, column = (int(position[0]) for position in missing.nonzero())
        raise InputError(f"{path}, row {row + 2}: no value for {frame.columns[column]}")
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
