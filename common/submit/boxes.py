"""Prediction strings, `class score x_min y_min x_max y_max` repeated: parsing, repairs and checks."""

import re
from array import array
from dataclasses import dataclass, replace

import numpy as np

from common.post.boxes import find_normalised

EDGE = 1.0  # pixels by which rounding can move a box outside its image
FARTHEST = 1e6  # pixels: larger than any image
SCORE_SLACK = 1e-6  # by how much rounding to float32 can raise a score above 1
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_IN_NUMBERS = b"0123456789+-.eE"  # float() also accepts nan, inf and 1_0


@dataclass(frozen=True, eq=False)
class Entries:
    """The n entries of a column of prediction strings, in order.

    row: int64, position of the string in the column; number: int64, from 1 within the string; class_id: float64; plain:
    bool, whether the class has digits only; score: float64; boxes: float64 (n, 4). texts: the strings; unread: dict
    from the row of an unreadable string, which has no entries here, to the reason.
    """

    texts: list
    unread: dict
    row: np.ndarray
    number: np.ndarray
    class_id: np.ndarray
    plain: np.ndarray
    score: np.ndarray
    boxes: np.ndarray

    def fault(self, k, reason):
        """Return the text of an error about entry k."""
        begin = 6 * (self.number[k] - 1)
        return fault_text(self.number[k], self.texts[self.row[k]].split()[begin : begin + 6], reason)


def read_entries(texts):
    """Return the Entries of prediction strings, whose values are separated by white space.

    >>> found = read_entries(["14 1 0 0 1 1", "3 0.9 10 20 30 40 5 0.2 0 0 9 9"])
    >>> found.row.tolist(), found.class_id.tolist(), found.boxes[1].tolist()
    ([0, 1, 1], [14.0, 3.0, 5.0], [10.0, 20.0, 30.0, 40.0])
    """
    values, plain, counts, unread = array("d"), bytearray(), [], {}
    for row, text in enumerate(texts):
        tokens, before = text.split(), len(values)
        try:
            if len(tokens) % 6 or "".join(tokens).encode().translate(None, _IN_NUMBERS):
                raise ValueError
            values.extend(map(float, tokens))
        except ValueError:
            unread[row] = _unreadable(tokens)
            del values[before:]
            tokens = []
        plain.extend(map(str.isdigit, tokens[::6]))
        counts.append(len(tokens) // 6)
    counts, values = np.array(counts, np.int64), np.array(values).reshape(-1, 6)
    number = np.arange(1, len(values) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.repeat(np.arange(len(counts)), counts)
    # copies, so that `values` can be freed
    columns = values[:, 0].copy(), np.array(plain, bool), values[:, 1].copy(), values[:, 2:].copy()
    return Entries(list(texts), unread, rows, number, *columns)


def _unreadable(tokens):
    if not tokens or len(tokens) % 6:
        return f"{len(tokens)} values, but every row needs entries of six: class score x_min y_min x_max y_max"
    k = next(k for k, token in enumerate(tokens) if not NUMBER.fullmatch(token)) // 6
    return fault_text(k + 1, tokens[6 * k : 6 * k + 6], "not a number")


def fault_text(number, tokens, reason):
    """Return the text of an error about an entry of a row."""
    return f"entry {number} ({' '.join(tokens)[:80]}): {reason}"


def find_faults(entries, n_classes=15, no_finding=14, pixels=None, blank=False):
    """Return a dict from row to its first fault, in row order.

    Valid are classes 0 … n_classes - 1, scores in [0, 1], and boxes with positive sides between 0 and the image's size
    (pixels: float64 (rows, 2)) or FARTHEST. `no_finding` has the box 0 0 1 1. Rows need an entry unless `blank`.
    """
    low, high, finding = entries.boxes[:, :2], entries.boxes[:, 2:], entries.class_id != no_finding
    ends = np.full((len(low), 2), FARTHEST) if pixels is None else pixels[entries.row]
    inside = (low >= 0) & (low < high) & (high <= ends)
    outside = "the box must have x_min < x_max and y_min < y_max, from 0 on"
    kinds = {
        f"the class must be 0 to {n_classes - 1}": ~entries.plain | ~(entries.class_id < n_classes),
        "the score must lie in 0 to 1": ~((entries.score >= 0) & (entries.score <= 1)),
        f"class {no_finding} (no finding) has the box 0 0 1 1": ~finding & (entries.boxes != [0, 0, 1, 1]).any(axis=1),
        outside: finding & ~inside.all(axis=1),
    }
    faults = dict(entries.unread)
    if not blank:
        counts = np.bincount(entries.row, minlength=len(entries.texts))
        faults = {row: _unreadable([]) for row in np.flatnonzero(counts == 0).tolist()} | faults
    bad = np.flatnonzero(np.any([*kinds.values()], axis=0))
    for k in bad[np.unique(entries.row[bad], return_index=True)[1]].tolist():
        row, reason = int(entries.row[k]), next(reason for reason, wrong in kinds.items() if wrong[k])
        if reason == outside and (pixels is not None or (high[k] > FARTHEST).any()):
            reason += " within {:.9g} x {:.9g} pixels".format(*ends[k])
        faults[row] = entries.fault(k, reason)
    return dict(sorted(faults.items()))


def normalised_faults(entries, no_finding=14):
    """Return a dict from the first row with boxes in 0 to 1 to its fault, see `find_normalised`; mostly empty."""
    findings = np.flatnonzero(entries.class_id != no_finding)
    first = findings[find_normalised(entries.boxes[findings])[:1]]
    return {int(entries.row[k]): entries.fault(k, "the box lies in 0 to 1, but must be in pixels") for k in first}


def repair_entries(entries, no_finding=14, pixels=None):
    """Return Entries with harmless faults of other people's submissions repaired, and a note on each kind of fault.

    Class ids such as `3.0` become 3, scores and boxes slightly beyond their limits are clipped; boxes without area and
    all but a row's best `no_finding` are removed. Other faults are left to `find_faults`.
    """
    row, boxes, notes = entries.row, entries.boxes, []

    def note(done, what):
        if done.any():
            first = int(row[np.argmax(done)]) + 2
            notes.append(f"{np.count_nonzero(done):,} {what} (first in row {first})")
        return done

    finding, spelled = entries.class_id != no_finding, ~entries.plain & (entries.class_id >= 0)
    spelled = note(spelled & (np.floor(entries.class_id) == entries.class_id), "class ids not in plain digits")
    score = np.clip(entries.score, 0, 1)
    score = np.where(abs(score - entries.score) <= SCORE_SLACK, score, entries.score)
    note(score != entries.score, "scores rounded into 0 to 1")

    ends = np.inf if pixels is None else np.tile(pixels, 2)[row]
    near = finding & ((boxes >= -EDGE) & (boxes <= ends + EDGE) & (boxes < np.inf)).all(axis=1)
    near &= (boxes[:, :2] <= boxes[:, 2:]).all(axis=1)
    cut = np.where(near[:, None], np.clip(boxes, 0, ends), boxes)
    note((cut != boxes).any(axis=1), f"boxes cut at the edge of their image, which they passed by up to {EDGE:g} pixel")
    flat = note(near & (cut[:, :2] == cut[:, 2:]).any(axis=1), "boxes without area left out")

    best = np.lexsort((-score, row))
    best = best[(~finding & (boxes == [0, 0, 1, 1]).all(axis=1))[best]]
    again = np.zeros(len(row), bool)
    again[best[1:][row[best[1:]] == row[best[:-1]]]] = True
    note(again, f"further entries of class {no_finding} left out, the highest of a row stays")

    repaired = {"row": row, "number": entries.number, "class_id": entries.class_id, "score": score, "boxes": cut}
    repaired["plain"] = entries.plain | spelled
    return replace(entries, **{name: values[~flat & ~again] for name, values in repaired.items()}), notes
