"""Scores per fold as in the paper, pooled, and on the same collections only; what the tool `table` measures."""

import numpy as np
import pandas as pd
from scipy import stats

from common.compare import Comparison, means_of, measure_aurocs
from common.data.folds import make_folds
from common.data.tables import read_list
from common.errors import InputError, check
from common.metrics.calibration import choose_thresholds, nested_counts
from common.metrics.classification import auroc, confusion_counts
from common.metrics.statistics import Interval, as_interval, bootstrap, bootstrap_auroc
from common.paths import read_parquet
from common.submit.boxes import NUMBER
from solutions.covid19.collections import make_safe, read_collections, strip_suffix
from solutions.covid19.config import PREDICTIVE, PRINTED, PUBLISHED

HALF = 0.5  # the paper's threshold: its network has a softmax over two classes
RATES = ("accuracy", "sensitivity", "specificity")
RATES_AT_HALF = means_of({name: name for name in (*RATES, PREDICTIVE)})
UNDEFINED = Interval(np.nan, np.nan, np.nan)


def with_truth(images, oof):
    """Return the out-of-fold predictions with each image's label, role, home, patient_id, collection and row."""
    known = images.at(images.rows_of(oof["image_id"])).reset_index(drop=True)
    return oof.assign(**{name: known[name] for name in ("label", "role", "home", "patient_id", "collection", "row")})


def published():
    """Return the paper's table 7 as shares, with its specificities in the column whose definition they follow."""
    rows = {name: dict(zip((*RATES[:2], of), values, strict=True)) for name, (*values, of) in PUBLISHED.items()}
    table = pd.DataFrame.from_dict(rows, "index", columns=[*RATES, PREDICTIVE]).div(100)
    return table.rename(lambda name: f"{name} (paper)").rename_axis("network").reset_index()


def nested_thresholds(table, seed=0):
    """Return Youden's threshold on all images, and for each image the one of the other folds (or patients), (N,).

    It is 0.5 where the other folds have images of one label only.
    """
    y, probs = table["label"].to_numpy()[:, None], table["probability"].to_numpy()[:, None]
    folds, chosen = table["fold"].to_numpy(), choose_thresholds(y, probs)[0]
    check(not np.isnan(chosen), "a threshold needs out-of-fold images with and without COVID-19")
    if len(set(folds)) < 2:
        folds = make_folds(y, 2, table["patient_id"].to_numpy(), seed)
    cuts = nested_counts(y, probs, folds)[1][np.unique(folds, return_inverse=True)[1], 0]
    return float(chosen), np.where(np.isnan(cuts), HALF, cuts)


def fold_table(table, thresholds):
    """Return a row per fold: images, tp, fn, tn, fp, and rates with Wilson's _low and _high, at thresholds (N,)."""
    rows = []
    called = table["probability"].to_numpy() >= np.asarray(thresholds, float)
    for fold, part in table.groupby("fold", sort=True):
        tp, fp, fn, tn = confusion_counts(part["label"], called[table["fold"] == fold].astype(float), HALF).tolist()
        row = {"fold": fold, "images": len(part), "tp": tp, "fn": fn, "tn": tn, "fp": fp}
        for name, right, of in zip(RATES, (tp + tn, tp, tn), (len(part), tp + fn, tn + fp), strict=True):
            ends = stats.binomtest(right, of).proportion_ci(method="wilson") if of else UNDEFINED
            row |= {name: right / of if of else np.nan, f"{name}_low": ends.low, f"{name}_high": ends.high}
        rows.append(row)
    return pd.DataFrame(rows)


def with_rates(table, thresholds=HALF):
    """Return the table with a column per rate: 1 for a correct call, 0 for a wrong one, NaN for images not counted."""
    label, called = table["label"].to_numpy(), table["probability"].to_numpy() >= thresholds
    counted = {"accuracy": True, "sensitivity": label == 1, "specificity": label == 0, PREDICTIVE: ~called}
    return table.assign(**{name: np.where(rows, called == label, np.nan) for name, rows in counted.items()})


def pooled_rates(table, thresholds, seed=0):
    """Return accuracy, sensitivity and specificity at one threshold, or at thresholds (N,), as Intervals by patient."""
    table, patients = with_rates(table, thresholds), table["patient_id"].to_numpy()
    return {name: bootstrap(table[name], patients, seed=seed, skip_nan=True) for name in RATES}


def auroc_interval(label, probability, patients, seed=0):
    """Return the AUROC as an Interval by patient; NaN with only one label, no limits with only one patient."""
    y, probs = (np.asarray(values, float)[:, None] for values in (label, probability))
    return bootstrap_auroc(y, probs, np.asarray(patients), seed=seed, skip_undefined=True)[0][0]


def summarise(oof, cuts, seed=0):
    """Return the content of score.json; oof: of `with_truth`; cuts: thresholds of its images with the role main."""
    main = oof[oof["role"] == "main"]
    check(main["patient_id"].nunique() >= 2, "intervals need out-of-fold images of at least two patients")

    half, tuned = (pooled_rates(main, thresholds, seed) for thresholds in (HALF, cuts))
    return {
        "auroc": as_interval(auroc_interval(main["label"], main["probability"], main["patient_id"], seed)),
        **{name: as_interval(rate) for name, rate in half.items()},
        "tuned": {name: as_interval(rate) for name, rate in tuned.items()},
        "images": len(main),
        "patients": main["patient_id"].nunique(),
        "folds": main["fold"].nunique(),
        "same_source": same_source(oof, seed),
    }


def same_source(oof, seed=0):
    """Return metrics (e.g. the drop in AUROC) with negatives of the same collections, None if there are none."""
    part = oof[oof["home"] & (oof["label"] >= 0)]
    negatives = part[part["label"] == 0]
    if not len(negatives) or not (part["label"] == 1).any():
        return None
    return {
        "auroc": as_interval(auroc_interval(part["label"], part["probability"], part["patient_id"], seed)),
        "fall": as_interval(_fall(oof[oof["label"] >= 0], seed)),
        "specificity": as_interval(pooled_rates(part, HALF, seed)["specificity"]),
        "negatives": len(negatives),
        "positives": int((part["label"] == 1).sum()),
        "patients": part["patient_id"].nunique(),
        "trained_on": bool((negatives["role"] == "main").any()),
    }


def _fall(oof, seed):
    """Return the AUROC of images with the role main minus that of home collections, resampling the same patients."""
    y, probs, patients = (oof[name].to_numpy() for name in ("label", "probability", "patient_id"))
    parts = [(oof["role"] == "main").to_numpy(), oof["home"].to_numpy(bool)]

    def difference(rows):  # NaN if no patient of a part is drawn
        drawn = [rows[part[rows]] for part in parts]
        main, home = (auroc(y[part], probs[part], np.nan) if len(part) else np.nan for part in drawn)
        return main - home

    return bootstrap(difference, patients, seed=seed)


def results(job, split):
    """Return the scored out-of-fold predictions with their labels."""
    table = with_truth(job.images, read_parquet(job.run.path("oof.parquet")))
    columns = ["image_id", "patient_id", "fold", "label", "probability"]
    return {"": table.loc[table["role"] == "main", columns].assign(truth=table["label"])}


def read_probabilities(path):
    """Return `probability` by image from a CSV with a header: the image, then its probability of COVID-19."""
    return _read(path, "probability", lambda text: bool(NUMBER.fullmatch(text)) and 0 <= float(text) <= 1)


def read_labels(path):
    """Return `label` 0/1 by image: of the collections in a folder, or of a CSV of image and label."""
    if not path.is_dir():
        return _read(path, "label", lambda text: text in ("0", "1"))
    table = read_collections([path])
    return table[table["label"] >= 0].set_index("image_id")[["label", "patient_id"]]


def _read(path, name, is_valid):
    table = read_list(path)
    check(table.shape[1] >= 2, f"{path}: needs two columns, the image and its {name}")
    ids = make_safe(table[table.columns[0]].map(strip_suffix))  # as the ids of a run
    texts = table[name if name in table else table.columns[1]]
    for row in texts.index[~texts.map(is_valid)][:1]:
        raise InputError(f"{path}, row {row + 2} ({ids[row]}): {texts[row]!r} is not a {name}")
    for row in ids.index[ids.duplicated()][:1]:
        raise InputError(f"{path}, row {row + 2}: {ids[row]} appears twice")
    return pd.DataFrame({name: texts.astype(float).to_numpy()}, ids.to_numpy())


def measure(table, groups, n_resamples, seed):
    """Return the paper's metrics at 0.5 and the AUROC, with the same bootstraps as score.json."""
    y, probs = (table[[name]].to_numpy() for name in ("label", "probability"))
    area = measure_aurocs(y, probs, ["AUROC"], groups, n_resamples, seed)["AUROC"]
    return RATES_AT_HALF(with_rates(table), groups, n_resamples, seed) | {"AUROC": area}


COMPARISON = Comparison(results, measure, read_probabilities, read_labels, "AUROC", published=published(), note=PRINTED)
