"""Detection metrics: boxes are matched once, and every metric is computed from the matches.

The default is VinBigData's leaderboard metric: PASCAL VOC 2010 average precision (the whole area under the monotone
curve) at IoU > 0.4, averaged over 15 classes including No finding with its box 0 0 1 1. Areas are width × height,
without the extra pixel of the VOC kit. The order of rows does not matter: detections with equal scores form a single
point of the curve, as in the least favourable order, and are matched within an image in the order of their boxes. With
`tied_as_listed`, as in pycocotools, equal scores are ordered by image, then by row, and each forms a separate point.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from common.errors import check
from common.jit import compiled
from common.metrics.classification import mean_of_defined, ratio
from common.metrics.statistics import exponential_weights, interval, interval_with_p, number_groups
from common.post.batches import sort_by
from common.post.boxes import iou, read_boxes, refuse, refuse_repeated, require_columns


@dataclass(frozen=True, eq=False)
class Boxes:
    """A table as arrays in row order, with its rows also sorted into groups of one image and class.

    image, class_id: int64 (n,); box: float64 (n, 4); score: float64 (n,), None for the truth. rows: int64 (m,), by
    image, class and falling score; group g = image × n_classes + class holds rows[starts[g] : starts[g + 1]]. ranked:
    the same rows by class and falling score, class c from class_starts[c] on; None for the truth.
    """

    image: np.ndarray
    class_id: np.ndarray
    box: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    score: np.ndarray | None = None
    ranked: np.ndarray | None = None
    class_starts: np.ndarray | None = None


def read_tables(detections, truth, images, rule):
    """Return (image ids as an Index, Boxes of the detections, Boxes of the truth) under `rule`, a detection.Rule.

    images: unique ids of all images; None for those of the truth. InputError for incomplete or contradictory tables.
    """
    if images is None:
        require_columns("truth", truth, ["image_id"])
        images = pd.Index(truth["image_id"].unique()).dropna().sort_values()
    images = pd.Index(images)
    check(len(images) and not images.hasnans and images.is_unique, "images: need at least one, each named once")
    return images, _detections(detections, images, rule), _truth(truth, images, rule)


def _detections(table, images, rule):
    image, class_id, box, score = read_boxes("detections", table, images, rule.no_finding, rule.n_classes, highest=1.0)
    group, n_groups = image * rule.n_classes + class_id, len(images) * rule.n_classes
    if rule.tied_as_listed:
        ranked, _ = sort_by(image, np.arange(len(image)), len(images))
        ranked = ranked[np.argsort(-score[ranked], kind="stable")]
        rows, starts = sort_by(group, ranked, n_groups)
    else:
        ranked = np.argsort(-score)
        rows, starts = sort_by(group, ranked, n_groups)
        _order_ties(rows, group, score, box)
    if rule.max_per_class is not None:
        kept, ranks = np.ones(len(rows), bool), np.arange(len(rows)) - np.repeat(starts[:-1], np.diff(starts))
        kept[rows[ranks >= rule.max_per_class]] = False
        rows, ranked = rows[kept[rows]], ranked[kept[ranked]]
        starts = np.append(0, np.cumsum(np.bincount(group[rows], minlength=n_groups)))
    return Boxes(image, class_id, box, rows, starts, score, *sort_by(class_id, ranked, rule.n_classes))


def _truth(table, images, rule):
    image, class_id, box, _ = read_boxes("truth", table, images, rule.no_finding, rule.n_classes, scored=False)
    refuse("truth", table, [((box[:, 2:] == box[:, :2]).any(axis=1), "the box has no area")])
    if rule.no_finding is not None:
        refuse_repeated("truth", table, image, np.flatnonzero(class_id == rule.no_finding), rule.no_finding)
    group = image * rule.n_classes + class_id
    rows, starts = sort_by(group, np.arange(len(group)), len(images) * rule.n_classes)
    if not rule.tied_as_listed:
        _order_ties(rows, group, np.zeros(len(group)), box)
    return Boxes(image, class_id, box, rows, starts)


def _order_ties(rows, group, score, box):
    """Sort, in place, neighbouring rows of equal group and score by box, equal boxes by row."""
    groups, scores = group[rows], score[rows]
    tied = (groups[1:] == groups[:-1]) & (scores[1:] == scores[:-1])
    if tied.any():
        places = np.flatnonzero(np.append(False, tied) | np.append(tied, False))
        some = rows[places]
        rows[places] = some[np.lexsort((some, *box[some].T[::-1], -scores[places], groups[places]))]


def match(found_by, true, rule):
    """Return, for each detection of `found_by` (Boxes), the row of the box of `true` that it found, or -1: (n,)."""
    taken, truth_row = np.zeros(len(true.image), bool), np.full(len(found_by.image), -1)
    _match(
        *(found_by.rows, found_by.starts, found_by.box, true.rows, true.starts, true.box, taken, truth_row),
        *(rule.iou_threshold, rule.inclusive, rule.best_unmatched, rule.tied_as_listed),
    )
    return truth_row


@compiled
def _match(rows, starts, box, true_rows, true_starts, true_box, taken, truth_row, least, inclusive, unmatched, last):
    for group in range(len(starts) - 1):
        candidates = true_rows[true_starts[group] : true_starts[group + 1]]
        for row in rows[starts[group] : starts[group + 1]] if len(candidates) else rows[:0]:
            best, best_iou = -1, 0.0
            for candidate in candidates:
                if unmatched and taken[candidate]:
                    continue
                overlap = iou(box[row], true_box[candidate])
                if overlap > best_iou or (last and overlap == best_iou):
                    best, best_iou = candidate, overlap
            if best >= 0 and not taken[best] and (best_iou > least or (inclusive and best_iou == least)):
                taken[best], truth_row[row] = True, best


@dataclass(frozen=True)
class Rule:
    """The criterion for a match, and how precision is averaged.

    iou_threshold: in [0, 1); a match needs a higher IoU or, with `inclusive`, at least this IoU.
    best_unmatched: match the best true box that is not matched yet (COCO), not only the best one (VOC).
    recall_points: None for the whole area, 101 for COCO's and 11 for VOC 2007's mean over evenly spaced recalls.
    max_per_class: number of best detections kept per image and class (COCO's 100).
    tied_as_listed: equal scores in the order of images and rows, as in pycocotools.
    n_classes, no_finding: ids run from 0 to n_classes - 1; no_finding is the class whose only box is 0 0 1 1, or None.
    counted: ids whose AP enters the mean; None for all. A class without true boxes has AP NaN and is left out.
    """

    iou_threshold: float = 0.4
    inclusive: bool = False
    best_unmatched: bool = False
    recall_points: int | None = None
    max_per_class: int | None = None
    tied_as_listed: bool = False
    n_classes: int = 15
    no_finding: int | None = 14
    counted: tuple[int, ...] | None = None

    @property
    def counted_classes(self):
        return list(range(self.n_classes) if self.counted is None else self.counted)


VOC2010 = Rule()
COCO = Rule(0.5, inclusive=True, best_unmatched=True, recall_points=101, max_per_class=100, tied_as_listed=True)


@dataclass(frozen=True, eq=False)
class Result:
    """A score and the matches from which it was computed.

    classes: DataFrame by class_id: ap, n_truth, n_detections, n_found, recall (of all detections), best_f1 and score,
    precision and recall _at_best_f1. image_ids: (N,), the order of weights and groups. truth_row: int64, the row of the
    true box that each detection found, -1 for none. rows: int64, the scored detections by class and falling score,
    class c from starts[c] on; image (position in image_ids), score, found: of these rows. truth_image, truth_class:
    int64, one per row of the truth.
    """

    mean_ap: float
    classes: pd.DataFrame
    rule: Rule
    image_ids: np.ndarray
    truth_row: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    image: np.ndarray
    score: np.ndarray
    found: np.ndarray
    truth_image: np.ndarray
    truth_class: np.ndarray


def evaluate(detections, truth, images=None, rule=VOC2010):
    """Return the Result of a table of detections against a table of true boxes.

    detections: DataFrame with image_id, class_id, score in [0, 1], x_min, y_min, x_max, y_max in pixels; truth: the
    same without score. images: ids of all images; None for those of the truth. Raises InputError as `read_tables` does,
    and for a truth without a box of the counted classes. Source: Everingham et al. 2010.
    """
    return _evaluate(*read_tables(detections, truth, images, rule), rule)


def pr_curve(result, class_id):
    """Return a DataFrame by falling score: score, seen and found (cumulative detections), recall and precision."""
    part = slice(result.starts[class_id], result.starts[class_id + 1])
    score, found = result.score[part], np.cumsum(result.found[part])
    last = np.append(score[1:] != score[:-1], True)[: len(score)] | result.rule.tied_as_listed
    score, seen, found = score[last], np.flatnonzero(last) + 1, found[last]
    recall = ratio(found, np.full(len(found), (result.truth_class == class_id).sum()), np.nan)
    return pd.DataFrame({"score": score, "seen": seen, "found": found, "recall": recall, "precision": found / seen})


def ap_of(result, weights):
    """Return the AP of each counted class under weights of the images, float64 (C,) or (B, C), NaN without a true box.

    weights: real >= 0, (N,) or (B, N) in the order of result.image_ids; weight 2 counts as two identical images.
    """
    weights = np.asarray(weights, np.float64)
    rows, n_classes = np.atleast_2d(weights), result.rule.n_classes
    totals = [np.bincount(result.truth_class, row[result.truth_image], n_classes) for row in rows]
    aps = class_aps(result.starts, result.score, result.found, result.image, rows, np.stack(totals), result.rule)
    return aps[0] if weights.ndim == 1 else aps


def bootstrap_map(result, groups=None, n_resamples=1000, seed=0, level=0.95):
    """Return (list of C Intervals of the counted classes, Interval of the mean AP) by the Bayesian bootstrap.

    groups: (N,) patient ids in the order of result.image_ids, None if every image is a group. With exponential weights,
    every resample has all classes; a mean over the drawn classes only would be biased. Source: Rubin 1981.
    """
    resamples = resample_aps(result, groups, n_resamples, seed)
    pairs = zip(result.classes["ap"], resamples.T, strict=True)
    return [interval(*pair, level) for pair in pairs], interval(result.mean_ap, mean_of_defined(resamples), level)


def paired_map(first, second, groups=None, n_resamples=1000, seed=0, level=0.95):
    """Return (Interval of the difference of mean AP, first − second, two-sided p-value), resampling the same patients.

    The Results must have the same images and truth, else InputError; otherwise as in `bootstrap_map`.
    """
    same = (np.array_equal(getattr(first, name), getattr(second, name)) for name in ("image_ids", "truth_class"))
    check(all(same), "two results can be compared only on the same images and true boxes")
    means = [mean_of_defined(resample_aps(result, groups, n_resamples, seed)) for result in (first, second)]
    return interval_with_p(first.mean_ap - second.mean_ap, means[0] - means[1], level)


def resample_aps(result, groups, n_resamples, seed):
    """Return the AP of each counted class under exponential weights of the patients, float64 (n_resamples, C)."""
    codes, n_groups = number_groups(groups, len(result.image_ids))
    draws = exponential_weights(n_groups, n_resamples, seed)
    return np.concatenate([ap_of(result, weights[:, codes]) for weights in draws])


def coco_scores(detections, truth, images=None, rule=COCO):
    """Return (dict with ap, ap50, ap75 and ar100, DataFrame of the same by class_id), as in pycocotools.

    ap: mean over IoU 0.50, 0.55 … 0.95; ar100: of recall. Tables and errors as in `evaluate`. Source: Lin et al. 2014.
    """
    tables, thresholds = read_tables(detections, truth, images, rule), np.linspace(0.5, 0.95, 10)
    results = [_evaluate(*tables, replace(rule, iou_threshold=float(t))).classes for t in thresholds]
    aps, recalls = (np.stack([r[name] for r in results]) for name in ("ap", "recall"))
    figures = {"ap": aps.mean(0), "ap50": aps[0], "ap75": aps[5], "ar100": recalls.mean(0)}
    return {k: float(mean_of_defined(v)) for k, v in figures.items()}, pd.DataFrame(figures, results[0].index)


def class_aps(starts, score, found, image, weights, totals, rule):
    """Return float64 (B, C), the AP of each counted class, from weights of images (B, N) and boxes (B, n_classes)."""
    recalls = np.linspace(0, 1, rule.recall_points or 0)
    weights, totals = np.ascontiguousarray(weights, np.float64), np.asarray(totals, np.float64)
    aps = _average_precision(starts, score, found, image, weights, totals, recalls, rule.tied_as_listed)
    return aps[:, rule.counted_classes]


def _evaluate(images, found_by, true, rule):
    check(np.isin(true.class_id, rule.counted_classes).any(), "the truth has no box of the counted classes")
    truth_row, rows = match(found_by, true, rule), found_by.ranked
    result = Result(
        *(np.nan, None, rule, images.to_numpy(), truth_row, rows, found_by.class_starts),
        *(found_by.image[rows], found_by.score[rows], truth_row[rows] >= 0, true.image, true.class_id),
    )
    aps = ap_of(result, np.ones(len(images)))
    rows = [_class_row(result, c, ap) for c, ap in zip(rule.counted_classes, aps.tolist(), strict=True)]
    return replace(result, mean_ap=float(mean_of_defined(aps)), classes=pd.DataFrame(rows).set_index("class_id"))


def _class_row(result, class_id, ap):
    curve, n_truth = pr_curve(result, class_id), int((result.truth_class == class_id).sum())
    n_detections, n_found = (int(curve[name].max()) if len(curve) else 0 for name in ("seen", "found"))
    row = {"class_id": class_id, "ap": ap, "n_truth": n_truth, "n_detections": n_detections, "n_found": n_found}
    row["recall"] = float(ratio(n_found, n_truth, np.nan))
    names = {"best_f1": np.nan} | {f"{name}_at_best_f1": np.nan for name in ("score", "precision", "recall")}
    if not (n_truth and n_detections):
        return row | names
    f1 = 2 * curve["found"] / (curve["seen"] + n_truth)
    best = curve.loc[f1.idxmax(), ["score", "precision", "recall"]]
    return row | dict(zip(names, [f1.max(), *best], strict=True))


@compiled
def _average_precision(starts, score, found, image, weights, totals, recalls, each_alone):
    """Return the AP (B, n_classes): the mean at `recalls` or, without them, the whole area; NaN if totals are 0."""
    aps = np.full(totals.shape, np.nan)
    gained, precision = np.empty(len(score)), np.empty(len(score))
    for b, c in np.ndindex(totals.shape):
        if not totals[b, c] > 0:
            continue
        true, seen, n = 0.0, 0.0, 0  # n points of the curve, one wherever recall rises
        for i in range(starts[c], starts[c + 1]):
            weight = weights[b, image[i]]
            seen += weight
            true += weight if found[i] else 0.0
            together = not each_alone and i + 1 < starts[c + 1] and score[i + 1] == score[i]
            if not together and true > (gained[n - 1] if n else 0.0):
                gained[n], precision[n] = true, true / seen
                n += 1
        for i in range(n - 2, -1, -1):
            precision[i] = max(precision[i], precision[i + 1])
        area, i = 0.0, 0
        for recall in recalls:
            while i < n and gained[i] / totals[b, c] < recall:
                i += 1
            area += precision[i] if i < n else 0.0
        if len(recalls) == 0:
            for i in range(n):
                area += (gained[i] - (gained[i - 1] if i else 0.0)) * precision[i]
        aps[b, c] = area / (len(recalls) or totals[b, c])
    return aps
