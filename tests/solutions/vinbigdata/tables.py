"""Tables of boxes for tests."""

import numpy as np
import pandas as pd

from common.post.boxes import BOX
from common.post.fusion import COLUMNS


def table(*rows, member=None, fold=0):
    """Detections (image_id, class_id, score, x_min, y_min, x_max, y_max)."""
    found = pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(["score", *BOX], float))
    return found if member is None else found.assign(member=member, fold=fold)


def true(*rows):
    return pd.DataFrame(rows, columns=["image_id", "class_id", *BOX])


def rows_of(found):
    return [tuple(row) for row in found[COLUMNS].itertuples(index=False)]


def some_boxes(seed=0, n=30, members=("x", "y"), width=3000, height=1000):
    rng, parts = np.random.default_rng(seed), []
    truth = rng.uniform(0, 0.6, (n, 2))
    truth = np.hstack([truth, truth + rng.uniform(0.1, 0.3, (n, 2))])
    labels, images = rng.integers(0, 4, n), rng.integers(0, n // 2, n)
    pixels = np.array([width, height] * 2)
    for member in members:
        moved = np.sort((truth + rng.normal(0, 0.02, truth.shape)).clip(0, 1).reshape(n, 2, 2), axis=1).reshape(n, 4)
        false = rng.random(n) < 0.3
        part = pd.DataFrame(
            {"image_id": [f"i{k}" for k in images], "class_id": np.where(false, (labels + 1) % 4, labels)}
        )
        parts.append(part.assign(score=rng.random(n), **dict(zip(BOX, (moved * pixels).T, strict=True)), member=member))
    boxes = pd.DataFrame(truth * pixels, columns=BOX)
    true_boxes = pd.DataFrame({"image_id": parts[0]["image_id"], "class_id": labels}).join(boxes)
    return pd.concat(parts, ignore_index=True), true_boxes
