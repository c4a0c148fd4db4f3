"""Compressed probability maps against plain ones: size, and time to write and to read them one by one.

    python -m benchmarks.maps [run ...]    also the out-of-fold maps of finished runs

Maps are those of the shipped lung network on real radiographs, if there are any under CXR_REAL_DATA, and synthetic ones
of `benchmarks.tuning_memory` at 1024², blobs as of pneumothorax. Asserts that both files hold the same maps.
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.tables import real_data
from benchmarks.tuning_memory import synthetic
from common.infer.predict import write_masks
from common.paths import find_images, read_array
from solutions.lung_segmentation.segmenter import load_segmenter, read_radiograph

COUNT, ROUNDS = 48, 3


def collect(runs):
    """Yield names and maps."""
    rng = np.random.default_rng(0)
    yield "synthetic", np.stack([synthetic(rng, 1024)[0] for _ in range(COUNT)])
    for name in ("jsrt", "covid19"):
        if (folder := real_data(name)) is not None:
            files = itertools.islice(find_images(folder / "images").values(), COUNT)
            yield f"lungs, {name}", np.concatenate(list(load_segmenter().probs(map(read_radiograph, files))))
    for run in runs:
        (path,) = Path(run).glob("oof_probs.*")
        yield path.parent.name, np.asarray(read_array(path)[:])


def measure(path, maps):
    """Return the bytes of a file of maps, and the milliseconds to write and to read one of them; the best of a few."""
    times = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        found = write_masks(path, maps.shape, maps[:, None])
        written = time.process_time()
        same = all(np.array_equal(found[k], maps[k]) for k in range(len(maps)))
        times.append((written - begun, time.process_time() - written))
        assert same
    return path.stat().st_size, *(1e3 * np.min(times, axis=0) / len(maps))


def main():
    print("maps                 shape               GB/1000   ratio   write, read: ms (plain)")
    with tempfile.TemporaryDirectory() as folder:
        for name, maps in collect(sys.argv[1:]):
            plain, small = (measure(Path(folder, f"m.{suffix}"), maps) for suffix in ("npy", "b2nd"))
            times = f"{small[1]:.2f} ({plain[1]:.2f}), {small[2]:.2f} ({plain[2]:.2f})"
            each = small[0] / len(maps) / 1e6
            print(f"{name:20} {maps.shape!s:20}{each:7.3f} {plain[0] / small[0]:7.1f}   {times}", flush=True)


if __name__ == "__main__":
    main()
