"""Detection scores against map-boxes and pycocotools on 3,000 images of 100 detections, with equal results.

Run: python -m benchmarks.detection    (about a minute; needs map-boxes, for COCO AP pycocotools)

Tables like those of the VinBigData test set: 3,000 images, 15 classes, a No finding box on two thirds of the
images, 1 to 8 true boxes on the others; 300,000 detections, half of them near a true box. Seconds are CPU seconds of
one thread; ours include reading and checking the DataFrames. Peers:
- map_boxes.mean_average_precision_for_boxes, IoU >= 0.4, detections sorted by score, as it requires. The published
  package lacks its compiled part; the last line of its block uses IoUs that we compile
- pycocotools' COCOeval on 1,000 of the images, from COCO objects: evaluate and accumulate, its four areas
- for the bootstrap, drawing images and matching everything again
"""

import contextlib
import io
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pandas as pd
from numba import njit

from common.metrics.detection import COCO, VOC2010, ap_of, bootstrap_map, coco_scores, evaluate
from common.metrics.detection_errors import error_breakdown
from common.post.boxes import BOX, iou

IMAGES, EACH, SIDE = 3000, 100, 2400
NORMAL = [0.0, 0.0, 1.0, 1.0]


def tables(rng):
    """Return (detections by falling score, truth); scores are distinct and coordinates whole, also as float32."""
    names = np.array([f"{i * 2654435761 % 2**32:08x}" for i in range(IMAGES)])
    normal = np.arange(IMAGES) % 3 > 0
    image = np.repeat(np.flatnonzero(~normal), rng.integers(1, 9, (~normal).sum()))
    corner, size = rng.integers(0, SIDE - 900, (len(image), 2)), rng.integers(60, 900, (len(image), 2))
    truth = pd.DataFrame(np.hstack([corner, corner + size]).astype(float), columns=BOX)
    truth = truth.assign(image_id=names[image], class_id=rng.integers(0, 14, len(image)))
    absent = pd.DataFrame([NORMAL] * normal.sum(), columns=BOX).assign(image_id=names[normal], class_id=14)

    n = IMAGES * (EACH - 1)
    near = truth.iloc[rng.integers(0, len(truth), n)]
    corner, size = rng.integers(0, SIDE - 900, (n, 2)), rng.integers(60, 900, (n, 2))
    placed = near[BOX].to_numpy() + np.round(rng.normal(0, 40, (n, 4)))
    placed[:, 2:] = np.maximum(placed[:, 2:], placed[:, :2] + 1)
    real = rng.random(n) < 0.5
    found = pd.DataFrame(np.where(real[:, None], placed, np.hstack([corner, corner + size])), columns=BOX)
    found["image_id"] = np.where(real, near["image_id"], names[np.repeat(np.arange(IMAGES), EACH - 1)])
    found["class_id"] = np.where(real & (rng.random(n) < 0.7), near["class_id"], rng.integers(0, 14, n))
    every = pd.DataFrame([NORMAL] * IMAGES, columns=BOX).assign(image_id=names, class_id=14)
    found = pd.concat([found, every], ignore_index=True).astype({"class_id": int})
    found["score"] = (rng.permutation(len(found)) + 0.5) / len(found)
    truth = pd.concat([truth, absent], ignore_index=True)
    return found.sort_values("score", ascending=False, ignore_index=True), truth


@njit
def overlaps(boxes, others):
    found = np.empty((len(boxes), len(others)))
    for i in range(len(boxes)):
        for j in range(len(others)):
            found[i, j] = iou(boxes[i], others[j])
    return found


def best_of(function, rounds):
    times = []
    for _ in range(rounds):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return min(times), result


def report(name, ours, theirs, note=""):
    print(f"{name:44}{ours * 1e3:10.1f}{theirs * 1e3:12.0f}{theirs / ours:9.0f}   {note}")


def against_map_boxes(found, truth):
    import map_boxes

    mean_ap = map_boxes.mean_average_precision_for_boxes
    order = ["image_id", "class_id", "x_min", "x_max", "y_min", "y_max"]
    true = truth[order].astype({"class_id": str}).to_numpy(object)
    boxes = found[[*order[:2], "score", *order[2:]]].astype({"class_id": str}).to_numpy(object)
    theirs, (expected, by_class) = best_of(lambda: mean_ap(true, boxes, 0.4, verbose=False), 2)
    rule = replace(VOC2010, inclusive=True)
    ours, result = best_of(lambda: evaluate(found, truth, rule=rule), 7)
    assert abs(result.mean_ap - expected) < 1e-12 and result.mean_ap > 0.02
    np.testing.assert_allclose(result.classes["ap"], [by_class[str(c)][0] for c in range(15)], rtol=0, atol=1e-12)
    report("mAP at IoU >= 0.4, sorted rows", ours, theirs, f"mAP {expected:.4f}, equal to 1e-12")
    mixed = found.sample(frac=1, random_state=0), truth.sample(frac=1, random_state=0)
    again, other = best_of(lambda: evaluate(*mixed, rule=rule), 7)
    assert other.mean_ap == result.mean_ap and (other.classes["ap"] == result.classes["ap"]).all()
    report("the same, shuffled rows", again, theirs, "ours the same to the last bit")
    tied = found.assign(score=found["score"].round(2))
    ties, result = best_of(lambda: evaluate(tied, truth, rule=rule), 7)
    assert evaluate(tied.sample(frac=1, random_state=0), truth, rule=rule).mean_ap == result.mean_ap
    report("scores of two decimals (peer: as above)", ties, theirs)
    map_boxes.compute_overlap = overlaps
    mean_ap(true[:100], boxes[:100], verbose=False)
    compiled, (value, _) = best_of(lambda: mean_ap(true, boxes, 0.4, verbose=False), 2)
    assert value == expected
    report("sorted rows, the peer's IoUs compiled", ours, compiled)


def against_pycocotools(found, truth):
    from pycocotools.coco import COCO as Annotations
    from pycocotools.cocoeval import COCOeval

    images = {name: i + 1 for i, name in enumerate(sorted(truth["image_id"].unique()))}

    def rows(table):
        boxes = table[BOX].to_numpy()
        boxes = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()
        ids = zip(table["image_id"].map(images), table["class_id"] + 1, boxes, strict=True)
        return [{"image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0} for i, c, b in ids]

    with contextlib.redirect_stdout(io.StringIO()):
        true = Annotations()
        true.dataset = {
            "images": [{"id": i} for i in images.values()],
            "categories": [{"id": c + 1} for c in range(15)],
            "annotations": [row | {"id": i + 1} for i, row in enumerate(rows(truth))],
        }
        true.createIndex()
        boxes = true.loadRes([row | {"score": s} for row, s in zip(rows(found), found["score"], strict=True)])
        evaluation = COCOeval(true, boxes, "bbox")
        theirs, _ = best_of(lambda: (evaluation.evaluate(), evaluation.accumulate()), 1)
        evaluation.summarize()
    ours, (figures, _) = best_of(lambda: coco_scores(found, truth, rule=COCO), 3)
    np.testing.assert_allclose(list(figures.values()), evaluation.stats[[0, 1, 2, 8]], rtol=0, atol=1e-9)
    report("COCO AP, AP50, AP75, AR100", ours, theirs, f"AP {figures['ap']:.4f}, equal to 1e-9")


def against_matching_again(found, truth):
    result, names = evaluate(found, truth), truth["image_id"].unique()
    groups = np.arange(len(names)) // 2
    ours, (_, interval) = best_of(lambda: bootstrap_map(result, groups, n_resamples=200), 1)
    rows = np.random.default_rng(0).integers(0, len(names), len(names))

    def again():
        drawn = pd.DataFrame({"image_id": result.image_ids[rows], "copy": np.arange(len(rows))})
        copies = [drawn.merge(t, on="image_id").drop(columns="image_id") for t in (found, truth)]
        return evaluate(*(t.rename(columns={"copy": "image_id"}) for t in copies), images=drawn["copy"])

    theirs, resampled = best_of(again, 3)
    weighted = ap_of(result, np.bincount(rows, minlength=len(names)))
    np.testing.assert_allclose(weighted, resampled.classes["ap"], rtol=0, atol=1e-12)
    report("one resample of the bootstrap", ours / 200, theirs, f"of 200; mAP@0.4 {interval}")


def main():
    if find_spec("map_boxes") is None:
        sys.exit("skipped: map-boxes is not installed")
    found, truth = tables(np.random.default_rng(0))
    third = truth["image_id"].unique()[::3]
    print(f"{len(found):,} detections, {len(truth):,} true boxes, {IMAGES:,} images, one thread")
    evaluate(found.iloc[:100], truth)  # compiles
    print(f"{'milliseconds':44}{'ours':>10}{'peer':>12}{'ratio':>9}")
    against_map_boxes(found, truth)
    if find_spec("pycocotools") is None:
        print("pycocotools is not installed: COCO AP is not compared")
    else:
        against_pycocotools(*(table[table["image_id"].isin(third)] for table in (found, truth)))
    against_matching_again(found, truth)
    alone, breakdown = best_of(lambda: error_breakdown(found, truth), 2)
    print(f"{'error breakdown':44}{alone * 1e3:10.1f}   {breakdown.summary['count'].to_dict()}")


if __name__ == "__main__":
    main()
