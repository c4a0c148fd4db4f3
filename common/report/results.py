"""Sections on out-of-fold predictions that all solutions share: classes, calibration and worst errors."""

import numpy as np
import pandas as pd

from common.data.folds import make_folds
from common.metrics import calibration
from common.metrics.classification import auroc, confusion_counts, recall, specificity
from common.paths import read_csv
from common.report import class_plots, page, plots

IMAGES, PIXELS = 100, 2000  # images in the calibration of pixels, and pixels of each
WEAK = 0.65  # a gate with a lower AUROC drops too many images by mistake
LISTED = 5000  # images whose ids a page lists


def classes(truth, probs, folds, names, cut=None, outcomes=("without", "with"), patients=None):
    """Return a table of the classes and plots of their probabilities: ROC curve, calibration, both outcomes.

    truth: (n, C) of 0 and 1; probs: (n, C); names: of the C classes; folds, patients: (n,), by which thresholds are
    nested. With `cut` (for a single class), also returns the confusion matrix at this probability.
    """
    nested = "folds" if len(np.unique(folds)) > 1 else "halves"
    folds = folds if nested == "folds" else make_folds(truth, 2, patients)
    counts, threshold = calibration.nested_counts(truth, probs, folds)[0], calibration.choose_thresholds(truth, probs)
    temperature, errors = calibration.fit_temperature(truth, probs), calibration.expected_calibration_error
    table = {"class": names, "positive": truth.sum(0).astype(int), "AUROC": auroc(truth, probs, np.nan)}
    table |= {"calibration error": errors(truth, probs), "threshold": threshold}
    table["error if scaled"] = errors(truth, calibration.nested_temperature(truth, probs, folds))
    table = pd.DataFrame(table | {"sensitivity": recall(counts, np.nan), "specificity": specificity(counts, np.nan)})
    drawn = []
    if cut is not None:
        tp, fp, fn, tn = confusion_counts(truth[:, 0], probs[:, 0], cut)
        caption = f"Out of fold, at a probability of {cut:g}: accuracy {(tp + tn) / len(truth):.4f}"
        drawn.append(page.figure(plots.confusion_matrix([[tn, fp], [fn, tp]], outcomes), caption))
        drawn.append(page.figure(class_plots.roc_panels(truth, {"": probs}, names), "ROC curve, out of fold"))
    drawn.append(page.figure(class_plots.reliability_panels(truth, probs, names), CALIBRATION))
    groups = {name: probs[truth == value] for value, name in enumerate(outcomes)}
    drawn.append(page.figure(plots.histogram(groups, "probability", threshold=cut), "Probabilities by true label"))
    shares = np.arange(1, 21) / 20
    risks = calibration.risk_by_coverage(truth, probs, folds)[np.ceil(shares * len(truth)).astype(int) - 1]
    drawn.append(page.figure(plots.line_with_peak(shares, risks, "coverage", "wrong calls", 1.0), COVERAGE))
    scaled = f"the calibration error with logits divided by a temperature ({temperature:.2f} on all images)"
    by = f"temperature, sensitivity and specificity are nested by {nested}"
    caption = f"Thresholds by Youden's index; error if scaled: {scaled}; {by}"
    return [page.table(table, caption), page.grid(*drawn)]


def one_class(table, truth, probs, outcomes, cut, patients):
    """Return `classes` of one class from a table with the columns fold, `truth` (0 or 1) and `probs`."""
    columns = table[[truth]].to_numpy(), table[[probs]].to_numpy(float)
    return classes(*columns, table["fold"], outcomes[1:], cut, outcomes, patients)


COVERAGE = "Share of wrong calls among the most certain images, the mean over classes; nested thresholds"
CALIBRATION = "Calibration out of fold, with the expected calibration error"


def pixel_calibration(maps, mask, names=("pixels",)):
    """Return a figure of the calibration of mask probabilities, from random pixels of some of the images.

    maps: uint8 (n, h, w) or (n, C, h, w), p × 255; mask(position) -> (H, W) or (C, H, W): 0, 1, other values: unknown.
    """
    rng, truth, probs = np.random.default_rng(0), [], []
    for k in range(0, len(maps), max(1, -(-len(maps) // IMAGES))):
        found, true = np.atleast_3d(maps[k].T).T, np.atleast_3d(mask(k).T).T
        places = rng.random((2, PIXELS))
        for values, whole in ((truth, true), (probs, found)):
            y, x = (places * np.array(whole.shape[1:])[:, None]).astype(int)
            values.append(whole[:, y, x].T.astype(float))
    truth = np.concatenate(truth)
    truth[truth > 1] = np.nan
    drawn = class_plots.reliability_panels(truth, np.concatenate(probs) / 255, names)
    return page.figure(drawn, f"Pixels: {CALIBRATION[0].lower()}{CALIBRATION[1:]}")


def fold_table(train, **columns):
    """Return the number of images of each fold in an image table, and further columns for `DataFrameGroupBy.agg`."""
    return train.groupby("fold").agg(images=("row", "size"), **columns).reset_index()


def rule_surface(surface, x, y, metric, rule, caption):
    """Return the figure of a metric by two settings of the rules tried, in a list that is empty if they never differ.

    surface: one row per rule; rule: the chosen one, which is marked.
    """
    if surface[x].nunique() == surface[y].nunique() == 1:
        return []
    return [page.figure(plots.threshold_surface(surface, x, y, metric, (rule[x], rule[y])), caption)]


def gate_hints(found, options):
    """Return a hint to drop a weak gate by these command-line options; found: its AUROC, None if there is none."""
    weak = found is not None and found < WEAK
    return [f"The gate's AUROC is {found:.2f}: drop it with `{options}`."] if weak else []


def most_confident(truth, probs):
    """Return (title, row, class) of each class's most confident right and wrong prediction; truth, probs: (n, C)."""
    chosen = []
    for k in range(probs.shape[1]):
        order = np.argsort(-probs[:, k])
        for title, value in (("right", 1), ("wrong", 0)):
            chosen += [(title, at, k) for at in order[truth[order, k] == value][:1]]
    return chosen


def submitted_probabilities(job):
    """Return a histogram of the probabilities in submission.csv, of its first four classes."""
    table = read_csv(job.run.path("submission.csv"))
    groups = {name: table[name] for name in table.columns[1:5]}
    return page.figure(plots.histogram(groups, "probability"), "Probabilities of the first classes")


def worst_errors(table, text, *pictures):
    """Return the section on the worst errors: pictures, and a table of all images, worst first."""
    listed = page.table(table.reset_index(drop=True), limit=LISTED)
    return page.section("Worst errors", text, *pictures, page.details("Every image, to search for an id", listed))
