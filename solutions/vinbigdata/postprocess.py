"""Fuse the boxes of several networks, apply the decision rule, and write and read submissions.

Detections are tables image_id, class_id, score, x_min, y_min, x_max, y_max, in original pixels. They contain only
findings until `apply_rule` adds No finding (class 14, box 0 0 1 1), so that class is never fused. Detections of
networks also have the columns member and fold. `images` are tables of image_id, width and height.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from common.data.coco import read_boxes, read_coco
from common.errors import InputError, check, log
from common.paths import strip_suffix
from common.post.boxes import BOX, clip, find_places
from common.post.fusion import COLUMNS, FusionRule
from common.submit.boxes import find_faults, normalised_faults, read_entries, repair_entries
from common.submit.table import read_table
from common.submit.validate import id_problems, refuse_rows, row_problems
from solutions.vinbigdata.config import CLASS_NUMBERS, CLASSES, NO_FINDING, NOTHING, SAMPLE
from solutions.vinbigdata.data import no_findings

FINDING_COLUMNS = [str(k) for k in range(NO_FINDING)]  # columns of the 2CC's probabilities of findings


@dataclass(frozen=True)
class DecisionRule(FusionRule):
    """How to fuse and filter the boxes of several networks: tuned out of fold, applied unchanged to test images.

    If the probability of a healthy image exceeds `alpha`, all boxes are replaced by `14 1 0 0 1 1`; if it exceeds only
    `beta`, a No finding box is added with the probability as its score (the paper gives no score). beta -1 adds it
    everywhere, beta 1 nowhere; alpha 1 keeps all boxes. Scores of findings are multiplied by (1 - the probability) to
    the power `gamma`, and by the image's probability of their class to the power `delta`.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.0
    delta: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.alpha <= 1 and -1 <= self.beta <= self.alpha and min(self.gamma, self.delta) >= 0):
            raise InputError(f"alpha must lie in [0, 1], beta in [-1, alpha], gamma and delta must be >= 0: {self}")

    @property
    def fusion(self):
        """The rule without its use of the 2CC; rules that are equal in this part produce the same fused boxes."""
        return replace(self, alpha=1.0, beta=1.0, gamma=0.0, delta=0.0)


def list_rules(fusion, decision, weights):
    """Return every DecisionRule that a FusionConfig and a DecisionConfig allow for these weights; beta <= alpha."""
    of_rule = {
        "replace": [{"alpha": a, "beta": b} for a, b in itertools.product(decision.alpha, decision.beta) if b <= a],
        "append": [{"beta": -1.0}],
        "none": [{}],
    }
    decisions = [each for rule in decision.rule for each in of_rule[rule]]
    wbf = fusion.method == "wbf"
    values = [fusion.iou[:1] if fusion.method == "none" else fusion.iou, fusion.skip, fusion.nms, fusion.limit]
    values += [fusion.conf_type if wbf else fusion.conf_type[:1], decision.gamma, decision.delta, decisions]
    found = [
        DecisionRule(tuple(weights), *boxes, **rest, gamma=gamma, delta=delta)
        for *boxes, gamma, delta, rest in itertools.product(*values)
    ]
    check(found, f"no rule to try: an empty list, or every beta above every alpha, in {fusion} and {decision}")
    return found


def scale_scores(detections, at, probs, present, rule):
    """Return the scores of findings under rule.gamma and rule.delta, float64 (n,), see `DecisionRule`.

    at: (n,), each box's image as index into probs (images,), of being healthy, and present (images, classes) or None.
    """
    score = detections["score"].to_numpy(float)
    if rule.gamma:
        score = score * (1 - probs[at]) ** rule.gamma
    return score * present[at, detections["class_id"]] ** rule.delta if rule.delta else score


def apply_rule(detections, image_ids, health, rule):
    """Return the detections to submit for `image_ids`, with rows of class 14 and at least one row per image.

    detections: only findings. health: the 2CC's probabilities by image_id: a column healthy and, for rule.delta > 0,
    one per finding, named by class number; not read if the rule needs none. An image without boxes gets
    `14 1 0 0 1 1`, like its row in the submission.
    """
    ids = pd.Index(image_ids)
    at = find_places(ids, detections["image_id"])
    probs, present = np.zeros(len(ids)), None
    if rule != rule.fusion:
        probs, present = split_health(health, ids)
    replaced, joined = probs > rule.alpha, probs > rule.beta
    kept = ~replaced[at]
    empty = np.bincount(at[kept], minlength=len(ids)) == 0
    added = np.flatnonzero(joined | empty)
    score = np.where(replaced | ~joined, 1.0, probs)[added]
    boxes = no_findings(pd.DataFrame({"image_id": ids[added], "score": score}))
    findings = detections.assign(score=scale_scores(detections, at, probs, present, rule))
    parts = [findings.loc[kept, COLUMNS], boxes[COLUMNS]]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def split_health(health, ids):
    """Return the probabilities of images being healthy, (n,), and of findings, (n, 14) or None; see `apply_rule`."""
    health = health.reindex(ids)
    known = "0" in health
    return health["healthy"].to_numpy(), health[FINDING_COLUMNS].to_numpy() if known else None


def prediction_strings(detections, image_ids, images=None):
    """Return the submission, image_id and PredictionString: `class score x_min y_min x_max y_max` …, best first.

    Numbers have the fewest digits that represent the float64 exactly. Boxes are clipped to their image if `images`
    gives its size, else at 0; boxes without area are left out, and an image without boxes gets `14 1 0 0 1 1`.
    """
    ids = pd.Index(image_ids)
    at, class_id = find_places(ids, detections["image_id"]), detections["class_id"].to_numpy().astype(int)
    score, boxes = detections["score"].to_numpy(np.float64), detections[BOX].to_numpy(np.float64)
    boxes = np.maximum(boxes, 0) if images is None else clip(boxes, _pixels(images, ids)[at])
    kept = np.flatnonzero((boxes[:, :2] < boxes[:, 2:]).all(axis=1))
    kept = kept[np.lexsort((class_id[kept], -score[kept], at[kept]))]
    # ten times faster than repr, with the same digits
    columns = [pc.cast(pa.array(column[kept]), pa.string()) for column in (class_id, score, *boxes.T)]
    starts = np.append(0, np.cumsum(np.bincount(at[kept], minlength=len(ids))))
    entries = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pc.binary_join_element_wise(*columns, " "))
    texts = [text or NOTHING for text in pc.binary_join(entries, " ").to_pylist()]
    return pd.DataFrame({SAMPLE[0]: ids, SAMPLE[1]: texts}, dtype=str)


def parse_predictions(path, images=None, ids=None, source="the sample submission"):
    """Return the detections of anyone's submission, or COCO file, in their order, including class 14.

    ids: the images that it must have, in any order; `source` names the file that they come from. Blank rows, further
    columns and what `common.submit.boxes.repair_entries` repairs are accepted and reported in one log line. images:
    their sizes, if known; boxes must end within them. Raises InputError naming file, row and entry for whatever else
    `validate_boxes` refuses: unreadable values, inverted boxes, NaN, scores outside [0, 1], repeated ids.
    """
    if path.suffix == ".json":
        found, about = read_boxes(path, CLASS_NUMBERS)
        refuse_rows(path, id_problems(about["image_id"], about["image_id"] if ids is None else ids, source))
        return found
    table = read_table(path)
    if not set(SAMPLE) <= set(table.columns):
        raise InputError(f"{path}, row 1: the header must have {','.join(SAMPLE)}: {','.join(table.columns)[:200]}")
    check(len(table), f"{path}: no rows under its header")
    own, texts = (table[name] for name in SAMPLE)
    refuse_rows(path, id_problems(own, own if ids is None else ids, source))
    pixels = None if images is None else _pixels(images, own)
    entries, notes = repair_entries(read_entries(texts), NO_FINDING, pixels)
    faults = normalised_faults(entries, NO_FINDING)
    faults |= find_faults(entries, len(CLASSES), NO_FINDING, pixels, blank=True)
    refuse_rows(path, row_problems(own, dict(sorted(faults.items()))))
    if (texts == "").any():
        notes.append(f"{(texts == '').sum():,} blank rows (the first is row {(texts == '').argmax() + 2})")
    if table.shape[1] > len(SAMPLE):
        notes.append(f"ignored columns: {', '.join(table.columns.difference(SAMPLE, sort=False))[:200]}")
    if notes:
        log.info(f"{path}: accepted, {'; '.join(notes)}")
    columns = {"image_id": own.take(entries.row).array, "class_id": entries.class_id.astype(np.int64)}
    columns |= {"score": entries.score, **dict(zip(BOX, entries.boxes.T, strict=True))}
    return pd.DataFrame(columns)


def list_images(path):
    """Return the ids of the images of anyone's submission or COCO file, (n,) of str."""
    if path.suffix == ".json":
        return read_coco(path)[0]["name"].map(strip_suffix).to_numpy()
    return read_table(path, SAMPLE, exact=False)["image_id"].to_numpy()


def _pixels(images, ids):
    return images.set_index("image_id").loc[ids, ["width", "height"]].to_numpy(np.float64)
