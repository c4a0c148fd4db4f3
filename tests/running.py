"""Helpers of the tests of whole runs: the command as a user gives it, and the files that it wrote."""

import hashlib
import re
from types import SimpleNamespace

import numpy as np
import torch

from solutions.__main__ import main

MOVES = re.compile(r"\x1b\[[A-Z]")  # of the cursor, by nested progress bars
VARYING = ("manifest.json", "history.csv", "report.html", "overlays.npz")  # hold times, or are made by `report`
BAR = re.compile(r"\d+%\||\d+it \[|it/s|s/it|image/s")


def run_command(capsys, *words):
    """Run `python -m solutions <words>`; return its status, printed text, and lines of standard error."""
    capsys.readouterr()
    status = main(list(map(str, words)))
    torch.set_grad_enabled(True)  # a stop may interrupt the end of no_grad(); the user's process ends with it
    said = capsys.readouterr()
    lines = re.split(r"[\r\n]+|(?=error: )", MOVES.sub("", said.err))
    errors = [line.strip() for line in lines if line.strip() and not BAR.search(line)]
    return SimpleNamespace(status=status, out=said.out, errors=errors)


def hash_files(run, but=()):
    """Return the SHA-256 of every file of a run by its path, but of its log and the files named `but`."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name not in ("log.txt", ".lock", *but))
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prevalence_deviation(labels, folds):
    """Return the largest |prevalence in a fold / prevalence overall − 1| over folds and classes, (N, C) of 0 and 1."""
    labels = np.asarray(labels)
    labels = np.hstack([labels, ~labels.any(1, keepdims=True)])  # no label at all is one more class
    labels = labels[:, labels.any(0)]
    shares = np.array([labels[folds == fold].mean(0) for fold in np.unique(folds)])
    return np.abs(shares / labels.mean(0) - 1).max()


def write_times(run, *patterns):
    """Return when each file of these patterns was written, in ns."""
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in sorted(run.glob(pattern))}
