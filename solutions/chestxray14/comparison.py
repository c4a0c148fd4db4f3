"""Per-class AUROCs with intervals and tests: what the tools `table` and `score_predictions` read and measure."""

import re

import numpy as np
import pandas as pd
from scipy import stats

from common.compare import Comparison, measure_aurocs
from common.data.tables import check_ids, some_rows
from common.errors import InputError, check, log
from common.metrics import statistics
from common.metrics.classification import auroc
from common.paths import read_parquet, strip_suffix
from common.report import class_plots, page
from solutions.chestxray14.config import LABELS
from solutions.chestxray14.labels import DIGESTS, GROUPS, names_digest, read_labels
from solutions.chestxray14.leaks import seen_unlabelled
from solutions.chestxray14.published import NOTE, describe_labels, published_classes, published_means

CLASSES, TRUE = list(LABELS), "true "
MEAN = "mean"  # the last row of every table: the mean over the classes with a defined AUROC
SPLITS = {"oof": "train", "test": "test"}
_PLAIN = {re.sub("[^a-z]", "", label.lower()): label for label in LABELS}


def results(job, split):
    """Return a run's predictions: one table per view and one for its answer, as in common.compare.Comparison.

    The tables hold the images with known labels. Columns: image_id, patient_id, fold, GROUPS, truth, the 14 LABELS
    (predictions) and "true <label>" (0/1).
    """
    views = {f": {view}": f"{split}_{view}" for view in ("whole", "lungs") if job.config.views == "both"}
    tables = {}
    for end, name in (views | {"": split}).items():
        table = read_parquet(job.run.path(f"{name}.parquet"))
        about = job.images.at(job.images.rows_of(table["image_id"])).reset_index(drop=True)
        # reindex: runs of earlier versions have no GROUPS
        table = table.join(about[CLASSES].add_prefix(TRUE)).join(about.reindex(columns=["patient_id", *GROUPS]))
        table["truth"] = list(map(tuple, about[CLASSES].to_numpy()))
        tables[end] = table[(about[CLASSES] >= 0).all(axis=1)]
    return tables


def describe_run(job, split, name):
    """Return lines of text that a reader of the run's scores should know."""
    said = [*seen_unlabelled(job.config, job.run), (job.run.step("prepare").get("about") or {}).get("said")]
    if split == "oof" and epoch_chosen(job.config):
        said.append(f"{name}: its epochs were chosen on these very images, which inflates its score")
    unlabelled = int((job.images.at(job.images.rows(SPLITS[split]))[CLASSES] < 0).any(axis=1).sum())
    said += [f"{unlabelled:,} predicted images have no labels and are left out"] * (unlabelled > 0)
    return [line for line in said if line]


# ---- anyone's tables -----------------------------------------------------------------------------------------------


def read_scores(path):
    """Return anyone's predictions: float64 columns named by LABELS, indexed by image_id.

    The first column, Image Index or image_id in any spelling, names the image, with or without a suffix such as .png.
    The others are named after classes (Pleural_Thickening, prob_Pleural_Thickening, pleural thickening). Classes may be
    missing, and scores need not be probabilities, since only their order counts. Raises InputError naming file, row and
    column for another first column, no class at all, a class or an image that appears twice, or a non-finite value.
    """
    raw = some_rows(path)
    first, *others = raw.columns
    if re.sub("[^a-z]", "", first.lower()) not in ("imageindex", "imageid"):
        raise InputError(f"{path}, row 1: the first column must be Image Index or image_id, not {first!r}")
    plain = {name: re.sub("[^a-z]", "", re.sub("^prob(?=[^a-z])", "", name.lower())) for name in others}
    columns = [name for name in others if plain[name] in _PLAIN]
    check(columns, f"{path}, row 1: no column bears the name of one of the 14 classes, such as {LABELS[0]}")
    if len(columns) < len(others):
        log.info(f"ignored columns that are not classes: {', '.join(sorted(set(others) - set(columns)))}")
    scores = raw[columns].apply(pd.to_numeric, errors="coerce")
    for row, column in np.argwhere(~np.isfinite(scores.to_numpy(np.float64)))[:1]:
        raise InputError(f"{path}, row {row + 2}, {columns[column]}: {raw[columns[column]][row]!r} is not a number")
    scores.columns = [_PLAIN[plain[name]] for name in columns]
    for label in scores.columns[scores.columns.duplicated()][:1]:
        raise InputError(f"{path}, row 1: two columns are {label}")
    ids = raw[first].map(strip_suffix)
    check_ids(ids, path)
    scores.index = pd.Index(ids, name="image_id")
    return scores[[label for label in LABELS if label in scores]]


def read_truth(path):
    """Return a label table as columns "true <label>" (0/1), indexed by image_id, and patient_id if it has patients.

    Only the columns Image Index and Finding Labels are required. Raises the errors of `read_labels`.
    """
    table = read_labels(path, needs_patients=False).set_index("image_id")
    log.info(f"{path.name}: {describe_labels(table)}")
    return table[CLASSES].add_prefix(TRUE).join(table.filter(["patient_id"]))


# ---- scores --------------------------------------------------------------------------------------------------------


def class_table(y, score, patients, labels, n_resamples=1000, seed=0):
    """Return one row for each of C labels and a last row for their mean.

    Columns: label, images, positive (images), auroc, low, high, delong_low, delong_high. y: 0/1 (N, C); score: real (N,
    C); patients: (N,), by which the bootstrap of low and high resamples; with None it treats images as independent, as
    DeLong's interval always does. A label without positive or without negative images gets NaN and is left out of the
    mean. Raises InputError for mismatched shapes, NaN or fewer than two patients.
    """
    people = len(y) if patients is None else len(set(patients))
    check(people >= 2, f"a score with intervals needs images of two patients, there is {people}")
    found, mean = statistics.bootstrap_auroc(y, score, patients, n_resamples, seed, skip_undefined=True)
    table = pd.DataFrame({"label": [*labels, MEAN], "images": len(y)})
    table["positive"] = pd.array([*map(int, np.sum(y, axis=0)), None], dtype="Int64")
    table[["auroc", "low", "high"]] = [(each.estimate, each.low, each.high) for each in (*found, mean)]
    table[["delong_low", "delong_high"]] = np.vstack([statistics.delong_intervals(y, score)[:, 1:], [np.nan, np.nan]])
    return table


def score_part(table, seed, n_resamples=1000):
    """Return the `class_table` of a table of `results` without its mean, and a summary; None for under two patients."""
    n = {"images": len(table), "patients": table["patient_id"].nunique()}
    if n["patients"] < 2:
        return None
    labels, y, score = values_of(table)
    classes = class_table(y, score, table["patient_id"].to_numpy(), labels, n_resamples, seed)
    mean = statistics.as_interval(statistics.Interval(*classes.iloc[-1][["auroc", "low", "high"]]))
    return classes[:-1], {"mean": mean, **n, "classes": int(classes["auroc"][:-1].notna().sum())}


def epoch_chosen(config):
    """Return whether any network of this Config stops or selects its epoch by the score on the fold it holds out."""
    if any(branch.class_patience for branch in config.branches):
        return True
    return any(training.chooses_epoch for training in [*config.branches, *[config.fusion] * config.is_fused])


# ---- figures -------------------------------------------------------------------------------------------------------


def values_of(table):
    """Return the labels that a table has, their truth 0/1 (N, C) and their scores (N, C)."""
    labels = [label for label in LABELS if label in table]
    return labels, table[[f"{TRUE}{label}" for label in labels]].to_numpy(), table[labels].to_numpy(float)


def measure(table, groups, n_resamples, seed):
    """Return the AUROC of each label that the table has, and their mean, by the Bayesian bootstrap."""
    labels, y, score = values_of(table)
    return measure_aurocs(y, score, labels, groups, n_resamples, seed)


def further(table):
    """Return each label's number of positive images and DeLong's interval, which treats images as independent."""
    labels, y, score = values_of(table)
    found = class_table(y, score, None, labels, n_resamples=1).set_index("label")
    return found[["positive", "delong_low", "delong_high"]]


def paired(table, other):
    """Return two-sided p-values of the table's AUROC minus the other's.

    Columns: p_delong, for each label; p_t_test, for the mean: a paired t-test over labels, our reading of SDFN's test.
    """
    labels, y, score = values_of(table)
    other = other[labels].to_numpy()
    differences = auroc(y, score, np.nan) - auroc(y, other, np.nan)
    known = differences[~np.isnan(differences)]
    p_value = np.nan if len(known) < 2 else stats.ttest_1samp(known, 0.0).pvalue if known.any() else 1.0
    p_delong = pd.Series([*statistics.delong_test(y, score, other)[:, 3], np.nan], [*labels, MEAN])
    return pd.DataFrame({"p_delong": p_delong, "p_t_test": pd.Series({MEAN: p_value})})


def remarks(figures, first):
    """Return lines about undefined and missing labels, and about the tests of each run against the run `first`."""
    lines, own = [], figures if first is None else figures[figures["run"] == first]
    absent = own.loc[own["pooled"].isna(), "metric"].tolist()
    lines += [f"labels with images of one kind only, left out of the mean: {', '.join(absent)}"] * bool(absent)
    missing = [label for label in LABELS if label not in set(own["metric"])]
    if missing:
        lines.append(f"no column for {', '.join(missing)}: left out of the mean, which is not the benchmark's")
    others = figures[figures["difference"].notna()].groupby("run", sort=False) if "difference" in figures else ()
    for name, part in others:
        mean, classes = part.iloc[-1], part.iloc[:-1]
        sure = classes.loc[classes["p_delong"] < 0.05, "difference"]
        lines.append(
            f"{name} against {first}: mean AUROC {mean['difference']:+.4f}, p {mean['p_t_test']:.3f} (paired t-test "
            f"over classes); higher in {(classes['difference'] > 0).sum()} of {len(classes)} classes; by DeLong's test "
            f"with p < 0.05, higher in {(sure > 0).sum()}, lower in {(sure < 0).sum()}"
        )
    return lines + [TESTS] * bool(len(others))


TESTS = (
    "DeLong's test treats images as independent, which those of one patient are not: its p-values are too small. The "
    "paired t-test over classes is our reading of SDFN's test; CXR-IRNet has none. It asks whether the classes agree, "
    "not whether other patients would."
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
    """Return the page section with the ROC curves and the published AUROCs of each class."""
    scores = {name: table[CLASSES].to_numpy() for name, table in tables.items()}
    y = values_of(next(iter(tables.values())))[1]
    curves = page.figure(class_plots.roc_panels(y, scores, LABELS), "ROC curves of each class")
    published = page.details("Published, class by class", page.table(published_classes(MEAN)))
    return [page.section("ROC curves", curves, published)]


COMPARISON = Comparison(
    results,
    measure,
    read_scores,
    read_truth,
    MEAN,
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
