"""Run-length masks: the competitions' strings, and the sorted, disjoint runs on which this module computes.

Runs are an int64 array (n, 2) of [start, end) flat positions in column-major order (column * height + row).
"""

import numpy as np

from common.errors import InputError, check
from common.jit import compiled

# In a string of pairs (start, length), starts count from 0, relative to the end of the previous run (SIIM), or from 1,
# relative to the top left pixel (Kaggle's usual form).
RELATIVE, ABSOLUTE = "relative", "absolute"
_BLOCK = 256  # bytes compared at once: enough to vectorise, but cheap to repeat one by one at an edge
_REASONS = (
    "{token!r} is not a whole number of 0 or more",
    "a run of length 0",
    "the run ends past the last pixel of {shape}",
    "the start {token} lies before the end of the previous run (starts count from 1 and ascend)",
    "an odd count of numbers instead of pairs of start and length",
)


def parse(rle, shape=(1024, 1024), form=RELATIVE, where="rle"):
    """Return the runs of a run-length string, int64 (n, 2), touching runs merged.

    "-1" is the empty mask; so is a blank string in the absolute form (SIIM refuses it). Raises InputError, beginning
    with `where`, for odd counts, numbers that are not integers, lengths of 0, runs past the last pixel of `shape`
    (height, width), and starts that overlap or go back.
    """
    height, width = shape
    stripped = rle.strip()
    check(stripped or form != RELATIVE, f"{where}: blank instead of a run-length string (write -1 for an empty mask)")
    if stripped in ("", "-1"):
        return np.empty((0, 2), np.int64)
    text = np.frombuffer(stripped.encode("utf-8", "replace"), np.uint8)
    runs, reason, number = _parse(text, form == RELATIVE, height * width)
    if reason:
        message = _REASONS[reason - 1].format(token=stripped.split()[number][:20], shape=f"{height} x {width}")
        raise InputError(f"{where}: {message} (number {number + 1} of the run-length string)")
    return runs


def to_string(runs, form=RELATIVE, empty="-1"):
    """Return runs as a run-length string, `empty` if there are none."""
    runs = _checked_runs(runs)
    return _write_digits(runs, form == RELATIVE).tobytes().decode("ascii") if len(runs) else empty


def decode(rle, shape=(1024, 1024), form=RELATIVE, order="F"):
    """Return a run-length string as a uint8 mask (height, width) of 0 and 1; see `parse` and `paint`.

    >>> decode("2 3", (2, 2), ABSOLUTE).tolist()
    [[0, 1], [1, 1]]
    """
    return paint(parse(rle, shape, form), shape, order)


def encode(mask, form=RELATIVE, empty="-1"):
    """Return the run-length string of a mask (height, width), bool or uint8, non-zero being foreground.

    >>> encode(np.array([[0, 1], [1, 1]], bool), ABSOLUTE)
    '2 3'
    """
    return to_string(runs_of(mask), form, empty)


def runs_of(mask):
    """Return the runs of a mask (height, width), bool or uint8, non-zero being foreground."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8):
        raise InputError(f"a mask must be bool or uint8 with 2 dimensions, not {mask.dtype} with {mask.ndim}")
    height, width = mask.shape
    rows, step = (mask.T, 1) if mask.flags.f_contiguous else (mask, width)
    flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    n = len(flat)
    # a run starts or ends where a pixel differs from the pixel above it; outside is background
    inner = _find_changes(flat[step:], flat[: n - step]) + step
    edges = np.concatenate([np.flatnonzero(flat[:step]), inner, np.flatnonzero(flat[n - step :]) + n])
    if step > 1:  # row-major: sorting these few positions is cheaper than transposing the pixels
        y, x = np.divmod(edges, width)
        edges = np.sort(x * height + y)
    return _merge(edges.reshape(-1, 2))


def paint(runs, shape=(1024, 1024), order="F"):
    """Return runs as a uint8 mask (height, width) of 0 and 1: a column-major view, or row-major with order "C"."""
    height, width = shape
    runs = _checked_runs(runs)
    if len(runs) and runs[-1, 1] > height * width:
        raise InputError(f"runs up to {runs[-1, 1]} do not fit {height} x {width} pixels")
    if order == "C":
        return _paint_rows(runs, np.zeros((height, width), np.uint8))
    return _paint_flat(runs, np.zeros(height * width, np.uint8)).reshape(width, height).T


def union(several):
    """Return the runs of all pixels that are in any of several runs."""
    joined = np.concatenate([np.empty((0, 2), np.int64), *map(_checked_runs, several)])
    return _merge(joined[np.argsort(joined[:, 0], kind="stable")])


def area(runs):
    """Return the number of pixels in runs."""
    return int(np.diff(_checked_runs(runs)).sum())


def overlap(a, b):
    """Return the number of pixels that two runs share."""
    return area(a) + area(b) - area(union([a, b]))


def _checked_runs(runs):
    if getattr(runs, "dtype", None) != np.int64 or runs.ndim != 2 or runs.shape[1] != 2:
        raise InputError(f"runs must be an int64 array (n, 2), not {type(runs).__name__}")
    ends = runs.reshape(-1)
    if len(runs) and (ends[0] < 0 or (ends[1:] < ends[:-1]).any() or (ends[::2] == ends[1::2]).any()):
        # compiled code writes to these positions without checks
        raise InputError("runs must be sorted, disjoint, not empty and start at 0 or later")
    return runs


@compiled
def _find_changes(now, before):
    found = np.empty(len(now), np.int64)  # mostly untouched, so it costs only address space
    count = 0
    for block in range(0, len(now), _BLOCK):
        a, b = now[block : block + _BLOCK], before[block : block + _BLOCK]
        differs = False
        for i in range(len(a)):
            differs |= (a[i] != 0) != (b[i] != 0)
        if differs:
            for i in range(len(a)):
                if (a[i] != 0) != (b[i] != 0):
                    found[count] = block + i
                    count += 1
    return found[:count]


@compiled
def _parse(text, relative, pixels):
    runs = np.empty((len(text) // 4 + 1, 2), np.int64)  # a pair takes 4 characters, the last 3
    n, numbers, start, end, value = 0, 0, 0, 0, -1
    for i in range(len(text) + 1):
        char = np.int64(text[i]) if i < len(text) else 32
        if 48 <= char <= 57:
            value = min(max(value, 0) * 10 + char - 48, pixels + 1)  # without overflow
        elif char != 32 and not 9 <= char <= 13:
            return runs[:0], 1, numbers
        elif value >= 0:
            if numbers % 2 == 0:
                start = end + value if relative else value - 1
                if start < end:
                    return runs[:0], 4, numbers
            elif value == 0 or value > pixels - start:
                return runs[:0], 3 if value else 2, numbers
            else:
                runs[n] = start, start + value
                if n and start == end:
                    n -= 1
                end = runs[n, 1] = start + value
                n += 1
            numbers, value = numbers + 1, -1
    return runs[:n], 5 * (numbers % 2), numbers - 1


@compiled
def _write_digits(runs, relative):
    text = np.empty(len(runs) * 40, np.uint8)  # two numbers of 19 digits and a blank
    at = len(text)
    for k in range(len(runs) - 1, -1, -1):  # backwards: the last digit comes first
        before = (runs[k - 1, 1] if k else 0) if relative else -1
        for value in (runs[k, 1] - runs[k, 0], runs[k, 0] - before):
            at -= 1
            text[at] = 32
            while text[at] == 32 or value:
                at -= 1
                text[at] = 48 + value % 10
                value //= 10
    return text[at : len(text) - 1]


@compiled
def _merge(runs):
    merged, n = np.empty_like(runs), 0
    for k in range(len(runs)):
        if n and runs[k, 0] <= merged[n - 1, 1]:
            merged[n - 1, 1] = max(merged[n - 1, 1], runs[k, 1])
        else:
            merged[n] = runs[k]
            n += 1
    return merged[:n]


@compiled
def _paint_flat(runs, flat):
    for start, end in runs:
        flat[start:end] = 1
    return flat


@compiled
def _paint_rows(runs, mask):
    """Mark where each column changes, then add up the changes row by row, in the order of the memory."""
    height = len(mask)
    top, bottom, left, right = height, 0, 0, 0
    for start, end in runs:
        for column in range(start // height, (end - 1) // height + 1):
            y, stop = max(start - column * height, 0), min(end - column * height, height)
            mask[y, column] ^= 1
            if stop < height:
                mask[stop, column] ^= 1
            top, bottom, left, right = min(top, y), max(bottom, stop), left if right else column, column + 1
    for y in range(top + 1, min(bottom + 1, height)):
        row, above = mask[y, left:right], mask[y - 1, left:right]
        for x in range(len(row)):
            row[x] ^= above[x]
    return mask
