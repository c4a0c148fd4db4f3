"""Blend maps at a challenge's scale: memory and time of the search for weights and of the mixed maps.

    python -m benchmarks.blending_memory                               300 images of 512², under a minute
    python -m benchmarks.blending_memory --n 12000 --side 1024 --distinct 100
                                                                       the scale of SIIM, with 100 different maps

Members are the synthetic maps of `benchmarks.tuning_memory`, moved by some pixels each. Weights are searched on as many
images as `blend` takes, with SIIM's own figures; then all maps are mixed, in a temporary folder, which is removed. The
limit of 2 GB applies to all resident memory.
"""

import argparse
import resource
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.tuning_memory import PeakMemory, synthetic, timed
from common.blend import SEARCHED
from common.data.loaders import SampleDataset
from common.infer import mixing
from common.infer.predict import write_masks
from common.paths import read_array
from common.post.rle import paint
from solutions.siim_pneumothorax.models import mask_areas, mask_figures


def write_members(folder, n, side, members, rng, distinct):
    """Write n maps of each member, `distinct` ones again and again; return the paths and the true runs."""
    paths, runs = [folder / f"{k}.b2nd" for k in range(members)], []
    small = folder / "distinct.npy"  # on disk, so that memory is that of blending

    def blocks(k):
        for position in range(n):
            yield np.roll(np.load(small, mmap_mode="r")[position % distinct], k * side // 64, axis=1)[None]

    maps = np.lib.format.open_memmap(small, "w+", np.uint8, (distinct, side, side))
    for position in range(distinct):
        maps[position], truth = synthetic(rng, side)
        runs.append(truth)
    del maps
    for k, path in enumerate(paths):
        write_masks(path, (n, side, side), blocks(k))
    small.unlink()
    return paths, [runs[position % distinct] for position in range(n)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="images")
    parser.add_argument("--side", type=int, default=512, help="network resolution in pixels")
    parser.add_argument("--distinct", type=int, help="different images, which repeat (default: all)")
    parser.add_argument("--members", type=int, default=3, help="runs that are blended")
    parser.add_argument("--steps", type=int, default=10, help="of the search for weights")
    parser.add_argument("--folder", help="where the temporary folder goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, PeakMemory() as memory:
        folder, rng = Path(folder), np.random.default_rng(0)
        (paths, runs), _ = timed(
            "members (synthetic)",
            lambda: write_members(folder, args.n, args.side, args.members, rng, args.distinct or args.n),
        )
        maps = [read_array(path) for path in paths]
        rows = np.sort(rng.permutation(args.n)[:SEARCHED])
        places = np.stack([np.arange(args.n)] * args.members)
        images = np.broadcast_to(np.zeros((1, 1), np.uint8), (args.n, 1, 1))
        dataset = SampleDataset(images, lambda row: paint(runs[row], order="C"), size=args.side, rows=rows)
        network = SimpleNamespace(measure=mask_areas, figures=lambda job, areas, rows: mask_figures(areas, args.side))
        job = SimpleNamespace(images=SimpleNamespace(ids=lambda rows: rows), recipe=SimpleNamespace(metric="dice"))
        blocks = partial(mixing.target_blocks, dataset, maps, places[:, rows])
        mixture = mixing.Mixture(job, network, rows, partial(mixing.mixed_values, network, blocks))
        weights, _ = timed("weights", lambda: mixing.search_weights(mixture, rows % 5, args.members, args.steps))
        shares = mixing.shares_of(weights, [part % 5 for part in range(args.n)])
        timed(
            "mixed maps",
            lambda: mixing.mix_maps(folder / "mixed.b2nd", maps, places, shares),
            lambda s: f"{args.n / s:,.0f} images/s",
        )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"weights {weights[None]}; peak: {memory.peak / 2**30:.2f} GB anonymous, {resident:.2f} GB resident")
    assert resident < 2, "resident memory passed 2 GB"


if __name__ == "__main__":
    main()
