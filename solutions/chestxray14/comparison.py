"""What `table` and `score_predictions` measure: the AUROC of each class and their mean, with DeLong's test."""

from common.compare import Comparison
from common.metrics.classification import mean_of_defined
from common.metrics.statistics import resample_aurocs
from common.report import class_plots, page
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.labels import DIGESTS, names_digest
from solutions.chestxray14.predictions import CLASSES, TRUE, describe_run, read_scores, read_truth, results
from solutions.chestxray14.published import NOTE, published_classes, published_means
from solutions.chestxray14.scoring import MEAN, class_table, paired_tests

FEW = 5  # positive patients, below which an interval is unreliable: it cannot reflect how much patients differ


def measure(table, groups, n_resamples, seed):
    """Return the AUROC of each label that the table has, and their mean, by the Bayesian bootstrap."""
    labels, y, score = _values(table)
    estimates, resamples = resample_aurocs(y, score, groups, n_resamples, seed, skip_undefined=True)
    areas = dict(zip(labels, zip(estimates, resamples.T, strict=True), strict=True))
    return areas | {MEAN: (mean_of_defined(estimates), mean_of_defined(resamples))}


def further(table):
    """Return each label's positive images and patients, and DeLong's interval, which treats images as independent."""
    labels, y, score = _values(table)
    patients = None if (table["patient_id"] == "").any() else table["patient_id"]
    found = class_table(y, score, patients, labels, n_resamples=1).set_index("label")
    return found[["positive", "positive_patients", "delong_low", "delong_high"]]


def paired(table, other):
    """Return the p-values of DeLong's test and of the paired t-test over labels."""
    labels, y, score = _values(table)
    return paired_tests(y, score, other[labels].to_numpy(), labels)


def _values(table):
    """Return the labels that a table has, their truth 0/1 (N, C) and their scores (N, C)."""
    labels = [label for label in LABELS if label in table]
    return labels, table[[f"{TRUE}{label}" for label in labels]].to_numpy(), table[labels].to_numpy(float)


def remarks(figures, first):
    """Return lines about undefined labels, labels of few patients, and the tests of each run against the `first`."""
    lines, own = [], figures if first is None else figures[figures["run"] == first]
    absent = own.loc[own["pooled"].isna(), "metric"].tolist()
    lines += [f"labels with images of one kind only, left out of the mean: {', '.join(absent)}"] * bool(absent)
    rows = own[(own["positive_patients"] < FEW).fillna(False).astype(bool) & own["pooled"].notna()]
    counts = ", ".join(f"{label} {n}" for label, n in zip(rows["metric"], rows["positive_patients"], strict=True))
    lines += [f"fewer than {FEW} positive patients ({counts}): too few for a reliable interval"] * bool(counts)
    missing = [label for label in LABELS if label not in set(own["metric"])]
    if missing:
        lines.append(f"no column for {', '.join(missing)}: left out of the mean, which is not the benchmark's")
    others = figures[figures["difference"].notna()].groupby("run", sort=False) if "difference" in figures else ()
    return lines + [_test_line(name, first, part) for name, part in others] + TESTS * bool(len(others))


TESTS = [
    "DeLong's test treats images as independent, which those of one patient are not, so its p-values are too small; "
    "p_delong_holm is corrected for the number of classes by Holm's rule, the others are not. The paired t-test over "
    "classes is our reading of SDFN's test; CXR-IRNet has none. It asks whether the classes agree, not whether other "
    "patients would."
]


def _test_line(name, first, part):
    mean, classes = part.iloc[-1], part.iloc[:-1]
    sure = classes.loc[classes["p_delong_holm"] < 0.05, "difference"]
    return (
        f"{name} against {first}: mean AUROC {mean['difference']:+.4f}, p {mean['p_t_test']:.3f} (paired t-test over "
        f"classes); higher in {(classes['difference'] > 0).sum()} of {len(classes)} classes; by DeLong with Holm's "
        f"correction, p < 0.05, higher in {(sure > 0).sum()}, lower in {(sure < 0).sum()}"
    )


def listed(names, predicted, scored):
    """Return how the scored images relate to the official test list."""
    if names is None:
        return f"not the official test list: {len(scored):,} images, not comparable with published means"
    missing = len(names.difference(predicted))
    text = f"{missing:,} of the {len(names):,} listed images are missing from the predictions"
    if names_digest(names) != DIGESTS["test"]:
        return f"{text}; it is not the official test list, not comparable with published means"
    if len(scored) < len(names):
        return f"{text}, {len(names) - missing - len(scored):,} from the labels: not comparable with published means"
    return f"all {len(names):,} images of the official test list, verified by the hash of its names"


def sections(tables):
    """Return the parts of the page: ROC curves, and the published areas class by class."""
    y = next(iter(tables.values()))[[f"{TRUE}{label}" for label in LABELS]].to_numpy()
    scores = {name: table[CLASSES].to_numpy() for name, table in tables.items()}
    curves = page.figure(class_plots.roc_panels(y, scores, LABELS), "ROC curves of each class")
    published = page.details("Published, class by class", page.table(published_classes(MEAN)))
    return [page.section("ROC curves", curves, published)]


COMPARISON = Comparison(
    results,
    measure,
    read_scores,
    read_truth,
    splits=("test", "oof"),
    further=further,
    paired=paired,
    remarks=remarks,
    notes=describe_run,
    listed=listed,
    sections=sections,
    published=published_means(),
    note=NOTE,
)
