"""Box fusion on the paper's workload against ensemble-boxes, with identical results.

Run: OMP_NUM_THREADS=1 python -m benchmarks.fusion    (under a minute; the raters need torchxrayvision's label table)

The workload: 3,000 images × 6 models × 100 boxes of 14 classes, weights 5 2 1 1 1 1, IoU 0.4. The boxes are synthetic:
each model shifts and resizes shared boxes, so that 1,800,000 become about 610,000, as in the paper. The peer fuses some
of the images; its time for all is in proportion. Seconds are CPU seconds of one thread (`time.thread_time`), so that
other programs matter little.
"""

import resource
import time

import numpy as np
import pandas as pd

from benchmarks.tables import label_table
from common.post.batches import Batch
from common.post.boxes import BOX
from common.post.fusion import NO_FINDING, fuse_raters, fuse_table
from common.post.suppression import first_boxes, fuse_nms, fuse_nmw, fuse_soft_nms
from common.post.wbf import fuse_wbf, mean_boxes

IMAGES, MODELS, PER_MODEL, CLASSES = 3000, 6, 100, 14
WEIGHTS, IOU = [5, 2, 1, 1, 1, 1], 0.4
PEERS, ROUNDS = 24, 5  # images that the peer fuses; rounds, the best of which counts


def workload(decimals=None):
    """Return boxes in [0, 1], scores and labels, (images, models, boxes, …) each, and sizes (images, 2)."""
    rng = np.random.default_rng(0)
    shape, pool = (IMAGES, MODELS, PER_MODEL), 240
    chosen = (np.arange(IMAGES)[:, None, None], rng.integers(0, pool, shape))
    middle = rng.random((IMAGES, pool, 2))[chosen] + rng.normal(0, 0.006, (*shape, 2))
    half = rng.uniform(0.025, 0.125, (IMAGES, pool, 2))[chosen] * np.exp(rng.normal(0, 0.1, (*shape, 2)))
    boxes = np.clip(np.concatenate([middle - half, middle + half], axis=-1), 0, 1)
    scores = rng.random(shape)
    if decimals is not None:
        scores = np.maximum(scores.round(decimals), 10.0**-decimals)
    return boxes, scores, rng.integers(0, CLASSES, (IMAGES, pool))[chosen], rng.integers(1500, 3500, (IMAGES, 2))


def seconds(function, items, rounds=ROUNDS, clock=time.thread_time):
    """Return seconds per item: the mean over the items of each one's best round."""
    best = np.full(len(items), np.inf)
    for _ in range(rounds):
        for k, item in enumerate(items):
            begin = clock()
            function(item)
            best[k] = min(best[k], clock() - begin)
    return best.mean()


def images_of(batch, begin, end):
    """Return the images begin … end - 1 of a batch as a Batch."""
    starts = batch.starts[begin : end + 1]
    columns = (column[starts[0] : starts[-1]] for column in batch[:4])
    return Batch(*columns, starts - starts[0], batch.n_models)


def report(name, ours, theirs):
    print(f"{name:44}{ours:12.6f}{theirs:12.4f}{theirs / ours:10.1f}")


def compare(peer, untied):
    """Compare all methods, WBF with tied scores too, image by image and in one batch."""
    tied = workload(decimals=2)
    for name, ours, theirs, options, (boxes, scores, labels, _) in [
        ("WBF", fuse_wbf, peer.weighted_boxes_fusion, {}, untied),
        ("WBF, scores of 2 decimals", fuse_wbf, peer.weighted_boxes_fusion, {}, tied),
        ("NMS", fuse_nms, peer.nms, {}, untied),
        ("soft-NMS", fuse_soft_nms, peer.soft_nms, {"thresh": 0.01}, untied),
        ("NMW", fuse_nmw, peer.non_maximum_weighted, {}, untied),
    ]:
        options = {"iou_thr": IOU, "weights": WEIGHTS} | options
        rows = np.arange(IMAGES + 1) * MODELS * PER_MODEL
        models = np.tile(np.repeat(np.arange(MODELS), PER_MODEL), IMAGES)
        flat = Batch(boxes.reshape(-1, 4), scores.ravel(), labels.ravel(), models, rows, MODELS)
        fused = ours(flat, **options)
        images = range(0, IMAGES, IMAGES // PEERS)
        lists = [(list(boxes[k]), list(scores[k]), list(labels[k])) for k in images]
        batches = [images_of(flat, k, k + 1) for k in images]
        for k, given, batch in zip(images, lists, batches, strict=True):
            wanted, part = theirs(*given, **options), slice(fused.starts[k], fused.starts[k + 1])
            for a, b, c in zip(ours(batch, **options), wanted, fused, strict=False):
                assert (a == b).all() and (c[part] == b).all(), (name, k)
        slow = seconds(lambda item, f=theirs, o=options: f(*item, **o), lists, rounds=2)
        report(f"{name}, one image", seconds(lambda item, f=ours, o=options: f(item, **o), batches, 20), slow)
        report(f"{name}, {IMAGES} at once", seconds(lambda b, f=ours, o=options: f(b, **o), [flat], 3), slow * IMAGES)


def compare_tables(peer, work):
    boxes, scores, labels, sizes = work
    ids = np.array([f"{k:032x}" for k in range(IMAGES)])
    pixels = boxes * np.tile(sizes, 2)[:, None, None]
    tables = []
    for m in range(MODELS):
        table = pd.DataFrame(pixels[:, m].reshape(-1, 4), columns=BOX)
        table = table.assign(image_id=np.repeat(ids, PER_MODEL), class_id=labels[:, m].ravel())
        tables.append(table.assign(score=scores[:, m].ravel()))
    of_images = pd.DataFrame({"image_id": ids, "width": sizes[:, 0], "height": sizes[:, 1]})
    del pixels

    def fuse(tables):
        return fuse_table(tables, of_images, WEIGHTS, iou_thr=IOU)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fused = fuse(tables)
    taken = seconds(fuse, [tables], 3, time.process_time)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    by_image = dict(list(fused.groupby("image_id", sort=False)))
    inputs = [t.set_index("image_id") for t in tables]
    slow = 0.0
    images = range(0, IMAGES, IMAGES // PEERS)
    for k in images:
        parts = [t.loc[ids[k]] for t in inputs]
        size = np.tile(sizes[k], 2)
        lists = (
            [p[BOX].to_numpy() / size for p in parts],
            *([p[c].to_numpy() for p in parts] for c in ("score", "class_id")),
        )
        begin = time.thread_time()
        wanted = peer.weighted_boxes_fusion(*lists, weights=WEIGHTS, iou_thr=IOU)
        slow += (time.thread_time() - begin) * IMAGES / len(images)
        rows = by_image[ids[k]]
        assert (rows[BOX].to_numpy() == np.minimum(wanted[0] * size, size)).all()
        assert (rows["score"].to_numpy() == wanted[1]).all() and (rows["class_id"].to_numpy() == wanted[2]).all()
    report("WBF, tables in pixels to a table", taken, slow)
    print(f"    {MODELS * IMAGES * PER_MODEL:,} boxes become {len(fused):,}")
    print(
        f"    peak memory of the process {peak / 2**20:.2f} GB; {before / 2**20:.2f} GB before fusing, inputs included"
    )


def raters():
    path = label_table("vinbigdata-train.csv.gz")
    if path is None:
        print("raters skipped: torchxrayvision, which carries the label table, is not installed")
        return
    table = pd.read_csv(path)
    for join in (mean_boxes, first_boxes):
        fused = fuse_raters(table, IOU, join)
        assert fused.equals(fuse_raters(table.sample(frac=1, random_state=0), IOU, join))
        taken = seconds(lambda table, join=join: fuse_raters(table, IOU, join), [table], 3)
        votes = fused.loc[fused["class_id"] != NO_FINDING, "votes"].value_counts().sort_index().to_dict()
        print(
            f"raters, {join.__name__}: {len(table)} rows of {fused['image_id'].nunique()} images in {taken:.2f} s;",
            end=" ",
        )
        print(f"boxes by votes {votes}; shuffled rows give the same")


def main():
    import ensemble_boxes as peer

    print(f"{'seconds':44}{'ours':>12}{'peer':>12}{'ratio':>10}")
    work = workload()
    compare_tables(peer, work)
    compare(peer, work)
    raters()


if __name__ == "__main__":
    main()
