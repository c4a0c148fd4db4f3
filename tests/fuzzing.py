"""Damaged files by the thousand: a reader returns or raises InputError, within 5 s and 1 GB, and never dies.

CXR_FUZZ_SEED changes the files, CXR_FUZZ_COUNT their number.
"""

import gzip
import multiprocessing
import os
import random
import re
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

from common.errors import InputError

COUNT = int(os.environ.get("CXR_FUZZ_COUNT", 10_000))
SEED = int(os.environ.get("CXR_FUZZ_SEED", 0))
TOKEN = re.compile(rb'"[^"]*"|[^\s,:{}\[\]"]+|[\s,:{}\[\]"]')
WORDS = [bytes([code]) for code in b'\n\r\0,"[]{}0\xff'] + [b"", b"{}", b"[]", b'""', b"[[]]", b"null", b"true", b"nan"]
WORDS += [b"-1", b"1.5", b"1e999", b"9" * 20, b"9" * 5000, b"=1+1", b"../x", "\ufeff٣".encode()]
WORDS += [b"[" * 10**5, b"x" * 10**6, b"1," * 1000, b"\n" * 1000]


def damage(data, rng):
    """Return a copy of some bytes with a few of them changed, cut out, repeated, or missing at the end."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not data:
            break
        at, kind = rng.randrange(rng.choice((min(400, len(data)), len(data)))), rng.random()
        length = rng.choice((1, 2, 8, 100))
        if kind < 0.6:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        elif kind < 0.7:
            del data[at : at + length]
        elif kind < 0.8:
            data[at:at] = data[at : at + length]
        elif kind < 0.9:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            del data[max(at, 1) :]
    return bytes(data)


def damage_text(data, rng):
    """Return a copy of a text with a few tokens replaced by others or by WORDS; one time in four `damage`."""
    tokens = TOKEN.findall(data)
    if not tokens or rng.random() < 0.25:
        return damage(data, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        tokens[rng.randrange(len(tokens))] = rng.choice(rng.choice((WORDS, tokens)))
    return b"".join(tokens)


def survive(reads, paths, root=None, count=COUNT):
    """Run `_survive` in a process of its own; return how often a damaged file was read. A dead process raises.

    reads: functions of a path, all called for each damaged file. root: text of all messages, by default the path.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_survive, reads, [Path(path) for path in paths], root, count).result()


def _survive(reads, paths, root, count):
    rng, originals = random.Random(SEED), [path.read_bytes() for path in paths]
    for path in paths:
        for read in reads:
            with suppress(InputError):
                read(path)  # compiles what is compiled, which may take more than 5 s
            _measure(read, path, "whole file", root)
    memory, done = _peak(), 0
    for number in range(count):
        path, original = paths[number % len(paths)], originals[number % len(paths)]
        path.write_bytes(_damage_file(path.suffix, original, rng))
        for read in reads:
            done += _measure(read, path, number, root)
            assert _peak() - memory < 1 << 20, (number, path.name, read.__name__)
        path.write_bytes(original)
    return done


def _damage_file(suffix, data, rng):
    if suffix == ".gz" and rng.random() < 0.5:
        return gzip.compress(damage_text(gzip.decompress(data), rng), mtime=0)
    return (damage_text if suffix in (".csv", ".json", ".txt") and data[:2] != b"PK" else damage)(data, rng)


def _measure(read, path, number, root):
    """Return whether a file is read; raise AssertionError for any other error than the documented one, and for time."""
    began, done = time.process_time(), True
    try:
        read(path)
    except InputError as error:
        named = str(path) if root is None else root
        assert named in str(error) and "\n" not in str(error), (number, read.__name__, error)
        done = False
    except Exception as error:
        raise AssertionError(f"damaged file {number}, {path}, {read.__name__}: {error!r}") from error
    assert time.process_time() - began < 5, (number, path.name, read.__name__)
    return done


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
