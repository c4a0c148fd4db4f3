"""Run-length masks against common decoders and encoders, on every real SIIM mask.

Run: python -m benchmarks.rle    (about half a minute; needs torchxrayvision, whose wheel carries the label table)

Peers, in their usual form:
- decoder, SIIM's helper: list of int(), a float64 array, a loop that fills with 255 from a running position, .T
- decoder, numpy: split to an integer array, cumulated sum, a loop that fills uint8 slices, reshape and .T
- encoder, np.diff: the mask transposed and flattened, padded, int8, np.diff, np.where, the numbers joined as text
- encoder, Kaggle's usual: the same without the step to int8 (padding with a list makes it int64), neighbours compared
- encoder, pixel loop: SIIM's helper, over every pixel in Python (one mask alone, it takes so long)
"Row-major" times end at (decoding) or start from (encoding) a C-contiguous array of height x width.
"""

import sys
import time
from collections import defaultdict

import numpy as np
import pandas as pd

from benchmarks.tables import label_table
from common.post import rle

SIDE = 1024
TIMED = slice(None, None, 24)  # 149 of the masks: enough for a mean, few enough for a short run


def decode_siim(text):
    mask = np.zeros(SIDE * SIDE)
    numbers = np.asarray([int(number) for number in text.split()])
    position = 0
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        position += start
        mask[position : position + length] = 255
        position += length
    return mask.reshape(SIDE, SIDE).T


def decode_numpy(text):
    numbers = np.array(text.split(), dtype=np.int64)
    ends = np.cumsum(numbers)
    mask = np.zeros(SIDE * SIDE, np.uint8)
    for start, end in zip(ends[0::2], ends[1::2], strict=True):
        mask[start:end] = 1
    return mask.reshape(SIDE, SIDE).T


def encode_diff(mask):
    pixels = np.concatenate([[0], mask.T.flatten(), [0]]).astype(np.int8)
    edges = np.where(np.diff(pixels) != 0)[0]
    starts, ends = edges[0::2], edges[1::2]
    gaps = starts - np.concatenate([[0], ends[:-1]])
    return " ".join(f"{gap} {length}" for gap, length in zip(gaps, ends - starts, strict=True))


def encode_kaggle(mask):
    pixels = np.concatenate([[0], mask.T.flatten(), [0]])
    edges = np.where(pixels[1:] != pixels[:-1])[0] + 1
    edges[1::2] -= edges[0::2]
    return " ".join(str(number) for number in edges)


def encode_loop(mask):
    runs, last, start, length, end = [], 0, 0, 0, 0
    for position, pixel in enumerate(mask.T.flatten()):
        if pixel != last:
            if pixel:
                start, length = position, 0
            else:
                runs += [str(start - end), str(length)]
                end = position
            last = pixel
        length += 1
    if last:
        runs += [str(start - end), str(length)]
    return " ".join(runs)


def timings(functions, items, rounds=5):
    """Seconds for one item with each function: each item's best of several rounds, then the mean over the items.

    The functions take turns round by round, so that whatever else the machine does meets them alike.
    """
    best = np.full((len(functions), len(items)), np.inf)
    for _ in range(rounds):
        for f, function in enumerate(functions):
            for k, item in enumerate(items):
                begin = time.perf_counter()
                function(item)
                best[f, k] = min(best[f, k], time.perf_counter() - begin)
    return best.mean(axis=1)


def row_major(decoder):
    return lambda text: np.ascontiguousarray(decoder(text))


def check(table):
    """Assert what the table must give, and return the strings of its masks."""
    masks = defaultdict(list)
    for row in table.itertuples(index=False):
        masks[row[0]].append(rle.parse(row[1], where=f"image {row[0]}"))
    strings = [text.strip() for text in table.iloc[:, 1] if text.strip() != "-1"]
    assert (len(table), len(masks), len(strings)) == (12954, 12047, 3576)
    for text in strings:
        runs = rle.parse(text)
        for order in "FC":
            mask = rle.paint(runs, order=order)
            assert mask.sum() == rle.area(runs) and rle.encode(mask) == text
    unions = {image: rle.union(runs) for image, runs in masks.items()}
    positive = sum(len(runs) > 0 for runs in unions.values())
    overlapping = sum(sum(map(rle.area, masks[i])) > rle.area(unions[i]) for i in masks)
    empty_dice = 1 - positive / len(unions)  # 1 where both are empty, else 0
    assert (positive, overlapping, round(empty_dice, 4)) == (2669, 183, 0.7785)
    print(f"{len(strings)} masks round-trip exactly in both memory orders")
    print(f"{positive} of {len(unions)} images positive, {overlapping} with overlapping masks")
    print(f"an all-empty submission scores {empty_dice:.4f}")
    return strings


def main():
    path = label_table("siim-pneumothorax-train-rle.csv.gz")
    if path is None:
        sys.exit("skipped: torchxrayvision, which carries the label table, is not installed")
    strings = check(pd.read_csv(path, dtype=str, keep_default_na=False))[TIMED]

    def decode_rows(text):
        return rle.decode(text, order="C")

    def encode_absolute(mask):
        return rle.encode(mask, rle.ABSOLUTE)

    columns = [rle.decode(text) for text in strings]
    rows = [np.ascontiguousarray(mask) for mask in columns]
    for text, mask in zip(strings, columns, strict=True):
        assert (decode_numpy(text) == mask).all() and encode_diff(mask) == text
        assert encode_kaggle(mask) == encode_absolute(mask)
    assert (decode_siim(strings[0]) == 255 * columns[0]).all() and encode_loop(rows[0]) == strings[0]

    lines = [
        ("decode, column-major view", "SIIM's helper", rle.decode, decode_siim, strings),
        ("decode, column-major view", "numpy, uint8", rle.decode, decode_numpy, strings),
        ("decode, row-major", "SIIM's helper", decode_rows, row_major(decode_siim), strings[::4]),
        ("decode, row-major", "numpy, uint8", decode_rows, row_major(decode_numpy), strings),
        ("encode, column-major view", "np.diff", rle.encode, encode_diff, columns),
        ("encode, row-major", "np.diff", rle.encode, encode_diff, rows),
        ("encode, row-major", "Kaggle's usual", encode_absolute, encode_kaggle, rows),
        ("encode, row-major", "pixel loop", rle.encode, encode_loop, rows[:1]),
    ]
    print(f"\n{'microseconds a mask':28}{'peer':16}{'ours':>8}{'peer':>10}{'ratio':>8}")
    for name, peer, ours, theirs, items in lines:
        a, b = timings([ours, theirs], items)
        print(f"{name:28}{peer:16}{a * 1e6:8.1f}{b * 1e6:10.1f}{b / a:8.1f}")
    (floor,) = timings([lambda _: np.zeros(SIDE * SIDE, np.uint8)], strings)
    print(f"\nAn empty uint8 array of {SIDE} x {SIDE} alone costs {floor * 1e6:.1f} of these microseconds.")


if __name__ == "__main__":
    main()
