"""VinBigData's `tune`: all rules from one matching of each fusion, against scoring every rule's detections anew.

    python -m benchmarks.tuning_vin [--images 6000] [--members 6] [--boxes 60]

Random boxes. The rules are those of the figure that `tune` draws, all alphas and betas for one fusion. CPU seconds,
those of the second way extrapolated from every tenth rule; both ways must give the same mean AP to 1e-12.
"""

import argparse
import itertools
import time
from dataclasses import replace

import numpy as np
import pandas as pd

from common.metrics.detection import evaluate
from common.post.boxes import BOX
from solutions.vinbigdata.config import NO_FINDING
from solutions.vinbigdata.postprocess import DecisionRule
from solutions.vinbigdata.tuning import SWEEP, _Trials


def random_case(n_images, members, n_boxes, seed=0):
    """Return boxes of members, true boxes, images and probabilities of health; 30 % of the images have findings."""
    rng = np.random.default_rng(seed)
    ids = np.array([f"i{k}" for k in range(n_images)])
    n = n_images * n_boxes * len(members)
    low, size = rng.uniform(0, 2000, (n, 2)), rng.uniform(50, 800, (n, 2))
    found = pd.DataFrame({"image_id": np.tile(np.repeat(ids, n_boxes), len(members))})
    found = found.assign(class_id=rng.integers(0, NO_FINDING, n), score=rng.beta(1, 6, n), fold=0)
    found[BOX] = np.hstack([low, low + size])
    found["member"] = np.repeat(members, n_images * n_boxes)
    sick = rng.random(n_images) < 0.3
    truth = found[found["image_id"].isin(ids[sick])].sample(2 * n_images, random_state=seed)
    truth = truth[["image_id", "class_id", *BOX]]
    healthy = ids[~np.isin(ids, truth["image_id"].unique())]
    nothing = pd.DataFrame({"image_id": healthy, "class_id": NO_FINDING, **dict(zip(BOX, (0, 0, 1, 1), strict=True))})
    images = pd.DataFrame({"image_id": ids, "width": 3000, "height": 3000})
    return (
        found,
        pd.concat([truth, nothing], ignore_index=True),
        images,
        pd.DataFrame({"healthy": rng.random(n_images)}, ids),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("--images", 6000), ("--members", 6), ("--boxes", 60)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    members = [f"m{k}" for k in range(options.members)]
    found, truth, images, health = random_case(options.images, members, options.boxes)
    weights, ids = (1.0,) * len(members), images["image_id"]
    rules = [DecisionRule(weights, 0.4, alpha=a, beta=b) for a, b in itertools.product(SWEEP, (-1.0, *SWEEP)) if b <= a]
    trials = _Trials(found, truth, images, health, members, "wbf", np.ones((1, len(images))))
    trials.scores(replace(rules[0], alpha=0.123, beta=0.0))  # compiles and fuses
    begun = time.process_time()
    fast = [trials.scores(rule)[0] for rule in rules]
    middle = time.process_time()
    plain = [evaluate(trials.decide(rule, ids), truth, ids).mean_ap for rule in rules[::10]]
    ended = time.process_time()
    np.testing.assert_allclose(fast[::10], plain, rtol=0, atol=1e-12)
    seconds = middle - begun, (ended - middle) * len(rules) / len(plain)
    ratio = seconds[1] / seconds[0]
    print(f"{len(rules)} rules: {seconds[0]:.1f} s, each anew {seconds[1]:.1f} s: {ratio:.1f} ×, the same mean AP")


if __name__ == "__main__":
    main()
