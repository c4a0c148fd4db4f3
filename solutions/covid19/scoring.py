"""Figures of predictions: per fold as the paper gives them, pooled with intervals, and against the same collections."""

import numpy as np
import pandas as pd
from scipy import stats

from common.data.folds import make_folds
from common.errors import InputError
from common.metrics.calibration import choose_thresholds
from common.metrics.classification import auroc, confusion_counts
from common.metrics.statistics import Interval, bootstrap, bootstrap_auroc
from common.paths import read_json, read_parquet
from common.steps import as_interval
from common.submit.table import read_table

HALF = 0.5  # the paper's threshold, of a softmax over two classes
RATES = ("accuracy", "sensitivity", "specificity")
AUDITED = ("audit.json", "audit.parquet", "focus.parquet")
COUNTS = ("images", "tp", "fn", "tn", "fp")


def nested_thresholds(table, seed=0):
    """Return (threshold chosen on all images, float64 (N,) thresholds chosen on the other folds) by Youden's index.

    table: fold, label (0/1), probability, patient_id. With one fold alone the halves of its patients choose for each
    other. Where the others show one kind of label, the threshold of all stands in. Raises InputError where all labels
    are of one kind.
    """
    y, probs = table["label"].to_numpy()[:, None], table["probability"].to_numpy()[:, None]
    folds = table["fold"].to_numpy()
    chosen = choose_thresholds(y, probs)[0]
    if np.isnan(chosen):
        raise InputError("a threshold needs out-of-fold images with and without COVID-19")
    if len(set(folds)) < 2:
        folds = make_folds(y, 2, table["patient_id"].to_numpy(), seed)
    cuts = np.empty(len(folds))
    for fold in np.unique(folds):
        others = folds != fold
        cut = choose_thresholds(y[others], probs[others])[0]
        cuts[~others] = chosen if np.isnan(cut) else cut
    return float(chosen), cuts


def fold_table(table, thresholds):
    """A row a fold: fold, images, tp, fn, tn, fp, accuracy, sensitivity, specificity, each of these with _low, _high.

    table: fold, label, probability. thresholds: real (N,), one an image. Intervals are Wilson's at 95 %, which take
    images for independent; a figure without images is NaN.
    """
    rows = []
    called = table["probability"].to_numpy() >= np.asarray(thresholds, float)
    for fold, part in table.groupby("fold", sort=True):
        tp, fp, fn, tn = confusion_counts(part["label"], called[table["fold"] == fold].astype(float), HALF).tolist()
        row = {"fold": fold, "images": len(part), "tp": tp, "fn": fn, "tn": tn, "fp": fp}
        shares = {"accuracy": (tp + tn, len(part)), "sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp)}
        for name, (right, of) in shares.items():
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), _wilson(right, of), strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def _wilson(right, of):
    if not of:
        return np.nan, np.nan, np.nan
    interval = stats.binomtest(right, of).proportion_ci(method="wilson")
    return right / of, float(interval.low), float(interval.high)


def rates(table, thresholds, seed=0, n_resamples=1000):
    """accuracy, sensitivity and specificity of all images together, as Intervals whose resamples draw patients.

    table: label, probability, patient_id; thresholds: real (N,), one an image.
    """
    label = table["label"].to_numpy()
    right = ((table["probability"].to_numpy() >= np.asarray(thresholds, float)) == label).astype(float)
    parts = {
        "accuracy": right,
        "sensitivity": np.where(label == 1, right, np.nan),
        "specificity": np.where(label == 0, right, np.nan),
    }
    groups = table["patient_id"].to_numpy()
    return {name: _mean(values, groups, n_resamples, seed) for name, values in parts.items()}


def _mean(values, groups, n_resamples, seed):
    if np.isnan(values).all():
        return Interval(np.nan, np.nan, np.nan)
    return bootstrap(values, groups, n_resamples, seed, skip_nan=True)


def area(label, probability, patients, seed=0, n_resamples=1000):
    """AUROC as an Interval by patient; NaN where the labels are of one kind or all of one patient."""
    label, patients = np.asarray(label), np.asarray(patients)
    if len(set(label.tolist())) < 2 or len(set(patients.tolist())) < 2:
        return Interval(np.nan, np.nan, np.nan)
    probability = np.asarray(probability, float)[:, None]
    return bootstrap_auroc(label[:, None], probability, patients, n_resamples, seed)[0][0]


def summary(oof, cuts, rejected, seed=0):
    """What score.json holds: figures of the images with the role main, and of those of the same collections.

    oof: image_id, fold, probability, label, role, home, patient_id. cuts: thresholds of the images with the role
    main, in their order. rejected: label →
    (share, number) of `data.rejected_shares`.
    """
    main = oof[oof["role"] == "main"]
    if main["patient_id"].nunique() < 2:
        raise InputError("a score with intervals needs out-of-fold images of at least two patients")
    half, tuned = np.full(len(main), HALF), np.asarray(cuts, float)
    folds = fold_table(main, half)
    found = {"auroc": as_interval(area(main["label"], main["probability"], main["patient_id"], seed))}
    found |= {name: as_interval(value) for name, value in rates(main, half, seed).items()}
    found["tuned"] = {name: as_interval(value) for name, value in rates(main, tuned, seed).items()}
    found["mean_of_folds"] = {
        name: {"mean": float(folds[name].mean()), "sd": _or_none(folds[name].std())} for name in RATES
    }
    found |= {"images": len(main), "patients": int(main["patient_id"].nunique()), "folds": len(folds)}
    found["rejected"] = {name: {"share": share, "images": n} for name, (share, n) in rejected.items()}
    return found | {"same_source": same_source(oof, seed)}


def same_source(oof, seed=0):
    """COVID-19 against the images without it that come from the same collections; None where there are none of them.

    auroc, and by how much it is below that of the images with the role main (fall); specificity at 0.5.
    """
    part = oof[oof["home"] & (oof["label"] >= 0)]
    negatives = part[part["label"] == 0]
    if not len(negatives) or not (part["label"] == 1).any():
        return None
    return {
        "auroc": as_interval(area(part["label"], part["probability"], part["patient_id"], seed)),
        "fall": as_interval(_fall(oof[oof["label"] >= 0], seed)),
        "specificity": as_interval(rates(part, np.full(len(part), HALF), seed)["specificity"]),
        "negatives": len(negatives),
        "positives": int((part["label"] == 1).sum()),
        "patients": int(part["patient_id"].nunique()),
        "trained_on": bool((negatives["role"] == "main").any()),
    }


def _fall(oof, seed):
    """AUROC of the images with the role main minus that of the home collections, the same patients drawn for both."""
    y, probs = oof["label"].to_numpy(), oof["probability"].to_numpy()
    parts = [np.asarray(oof["role"] == "main"), np.asarray(oof["home"], bool)]

    def difference(rows):
        of = [rows[part[rows]] for part in parts]
        if not all(map(len, of)):  # of few patients it may happen that none of a part is drawn
            return np.nan
        return auroc(y[of[0]], probs[of[0]], np.nan) - auroc(y[of[1]], probs[of[1]], np.nan)

    if oof["patient_id"].nunique() < 2:
        return Interval(np.nan, np.nan, np.nan)
    return bootstrap(difference, oof["patient_id"].to_numpy(), seed=seed)


def read_score(run):
    """What score.json holds; InputError where it is damaged."""
    path = run.path("score.json")
    found = read_json(path)
    if not isinstance(found, dict) or not {"auroc", "tuned", "same_source", "folds", *RATES} <= set(found):
        raise InputError(f"{path}: damaged; delete it and run `tune` again")
    return found


def read_per_fold(run):
    """What per_fold.csv holds: `fold_table` by rule, str ("0.5" or "tuned"); InputError where it is damaged."""
    path, figures = run.path("per_fold.csv"), [f"{name}{end}" for name in RATES for end in ("", "_low", "_high")]
    try:
        table = read_table(path, ["rule", "fold", *COUNTS, *figures], exact=False)
        table = table.astype(dict.fromkeys(["fold", *COUNTS], int))
        table[figures] = table[figures].apply(pd.to_numeric).astype(float)  # blanks are NaN
        if table["rule"].value_counts().to_dict() != dict.fromkeys((str(HALF), "tuned"), read_score(run)["folds"]):
            raise InputError("rows are missing")
    except (InputError, ValueError) as error:
        why = str(error).removeprefix(str(path)).lstrip(":, ")
        raise InputError(f"{path}: damaged ({why}); delete it and run `tune` again") from None
    return table


def read_audit(run):
    """Return audit.json and the tables audit.parquet and focus.parquet; InputError where they are damaged."""
    path = run.path("audit.json")
    found = read_json(path)
    if not isinstance(found, dict) or not {"checks", "focus", "folds", "epochs", "biased", "said"} <= set(found):
        raise InputError(f"{path}: damaged; delete it and run `audit` again")
    return found, read_parquet(run.path("audit.parquet")), read_parquet(run.path("focus.parquet"))


def scored(run, images):
    """Return the out-of-fold predictions with label, role, home, patient_id, collection and row of each image."""
    oof = read_parquet(run.path("oof.parquet"))
    known = images.table.iloc[images.rows_of(oof["image_id"])].reset_index(drop=True)
    return oof.assign(**{name: known[name] for name in ("label", "role", "home", "patient_id", "collection", "row")})


def _or_none(value):
    return None if np.isnan(value) else float(value)
