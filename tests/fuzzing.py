"""Damaged files by the thousand: a reader returns or raises InputError, within 5 s and 1 GB, and never dies."""

import multiprocessing
import os
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common.errors import InputError

COUNT = int(os.environ.get("CXR_FUZZ_COUNT", 10_000))
SEED = int(os.environ.get("CXR_FUZZ_SEED", 0))


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


def survive(read, paths):
    """Run `_survive` in a process of its own; return how many of the damaged files were read. A dead one raises."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_survive, read, [str(path) for path in paths]).result()


def _survive(read, paths):
    rng, originals = random.Random(SEED), [Path(path).read_bytes() for path in paths]
    for path in paths:
        read(path)
    memory, done = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for number in range(COUNT):
        path = Path(paths[number % len(paths)])
        path.write_bytes(damage(originals[number % len(paths)], rng))
        began = time.monotonic()
        try:
            read(path)
            done += 1
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error), (number, error)
        except Exception as error:
            raise AssertionError(f"damaged file {number}, {path.name}: {error!r}") from error
        spent = time.monotonic() - began
        assert spent < 5, (number, path.name, spent)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 20, (number, path.name)
    return done
