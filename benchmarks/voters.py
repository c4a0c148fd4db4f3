"""Does the out-of-fold score rehearse the submission, where each member has five networks instead of one?

    python -m benchmarks.voters [--images 400 --seeds 3]

Networks are simulated: each finds a true box, and places that tempt all of them, with a probability of its own, and
some boxes twice. Rules are chosen by mean AP on images that one network of each member predicts, and applied to images
that all folds' networks predict: fused to one set of boxes per member first (`fuse_members`), and all at once. Printed
are the mean AP that the chosen rule reaches there, the best of any rule, and the correlation of both scores over rules.
"""

import argparse
import itertools

import numpy as np
import pandas as pd

from common.metrics.detection import evaluate
from common.post.boxes import BOX
from common.post.fusion import fuse, fuse_members
from solutions.vinbigdata.data import no_findings
from solutions.vinbigdata.postprocess import DecisionRule, apply_rule

MEMBERS, FOLDS, COPIES = ("x", "y", "z"), 5, 2


def simulate(rng, n, every_fold):
    """Return the networks' boxes, the truth and the sizes of n images; every_fold: all folds predict all images."""
    fold_of, ids = rng.integers(0, FOLDS, n), [f"i{k}" for k in range(n)]
    places, parts = [], []
    for mean, (a, b), gain in ((1.2, (2, 2), 0.35), (1.5, (1, 3), 0.0)):  # findings, and what only looks like one
        image = np.repeat(np.arange(n), rng.poisson(mean, n))
        centre, half = rng.uniform(200, 800, (len(image), 2)), rng.uniform(40, 120, (len(image), 2))
        places.append((image, centre, half, rng.integers(0, 4, len(image)), rng.beta(a, b, len(image)), gain))
    for member, fold, copy in itertools.product(MEMBERS, range(FOLDS), range(COPIES)):
        for image, centre, half, label, ease, gain in places:
            seen = (rng.random(len(image)) < ease) & (every_fold | (fold_of[image] == fold))
            moved = centre + rng.normal(0, 0.12, centre.shape) * half
            sides = half * np.exp(rng.normal(0, 0.12, centre.shape))
            score = rng.beta(2, 4, len(image)) + gain * ease + 0.1 * rng.normal(size=len(image))
            table = pd.DataFrame({"image_id": [ids[k] for k in image], "class_id": label, "member": member})
            table = table.assign(fold=fold, score=score.clip(0.01, 0.99) * 0.6**copy)
            table[BOX] = np.hstack([moved - sides, moved + sides]).clip(0, 1000)
            parts.append(table[seen])
    image, centre, half, label, *_ = places[0]
    truth = pd.DataFrame({"image_id": [ids[k] for k in image], "class_id": label})
    truth[BOX] = np.hstack([centre - half, centre + half])
    healthy = pd.DataFrame({"image_id": sorted(set(ids) - set(truth["image_id"]))})
    images = pd.DataFrame({"image_id": ids, "width": 1000, "height": 1000})
    return pd.concat(parts, ignore_index=True), pd.concat([truth, no_findings(healthy)], ignore_index=True), images


def fuse_at_once(found, images, members, rule):
    """Fuse the boxes of all networks together, whatever their member."""
    tables = {f"{member} {fold}": each for (member, fold), each in found.groupby(["member", "fold"])}
    return fuse(tables, images, [1.0] * len(tables), rule.iou, rule.skip, conf_type=rule.conf_type)


def main():
    """Simulate, choose rules, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    grid = itertools.product((0.2, 0.35, 0.5, 0.65), (0.0, 0.1, 0.2, 0.3), (0.5, 1.0), (0,), ("avg", "max"))
    rules = [DecisionRule((1.0,) * len(MEMBERS), *values) for values in grid]

    def scores(way, case):
        found, truth, images = case
        fused = (way(found, images, MEMBERS, rule) for rule in rules)
        decided = (apply_rule(each, images["image_id"], None, rules[0].fusion) for each in fused)
        return np.array([evaluate(each, truth, images["image_id"]).mean_ap for each in decided])

    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        held_out, test = (simulate(rng, options.images, every) for every in (False, True))
        offline = scores(fuse_members, held_out)
        for name, way in (("folds first", fuse_members), ("all at once", fuse_at_once)):
            online, best = scores(way, test), offline.argmax()
            reached = f"chosen rule {online[best]:.4f} of {online.max():.4f}"
            print(f"seed {seed}, {name}: {reached}, correlation {np.corrcoef(offline, online)[0, 1]:.2f}")


if __name__ == "__main__":
    main()
