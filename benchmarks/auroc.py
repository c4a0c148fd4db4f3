"""AUROC, DeLong and the bootstrap by patient at the size of NIH's official test list, against scikit-learn and numpy.

Run: python -m benchmarks.auroc (labels and patients of the NIH table inside torchxrayvision if it is installed, else
random; scores are random). Goals: equal to scikit-learn to 1e-12; 14 classes × 1,000 resamples in 10 s on two cores.
"""

import os
import time

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from benchmarks.tables import label_table
from common.metrics.calibration import expected_calibration_error, nested_counts
from common.metrics.classification import auroc
from common.metrics.statistics import (
    bootstrap_auroc,
    delong_covariance,
    delong_intervals,
    delong_test,
    interval_with_p,
    resample_aurocs,
)
from solutions.chestxray14.config import LABELS

N, RESAMPLES, PEER_RESAMPLES = 25_596, 1000, 4


def findings(rng):
    """Labels 0/1 (N, 14), patients (N,) and two scores float64 (N, 14) that share most of their mistakes."""
    path = label_table("Data_Entry_2017_v2020.csv.gz")
    if path is None:
        patients, y = rng.integers(0, 2797, N), rng.random((N, 14)) < np.geomspace(0.002, 0.2, 14)
    else:
        table = pd.read_csv(path)[-N:]
        patients = table["Patient ID"].to_numpy()
        y = table["Finding Labels"].str.get_dummies("|").reindex(columns=LABELS).to_numpy()
    a, b = (rng.normal(size=y.shape) for _ in range(2))
    return y, patients, a + y, a + 0.9 * y + 0.3 * b


def best_of(runs, function):
    """Return the seconds of the fastest of several calls, and the last result."""
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result


def peer_auroc(y, score, weights=None):
    """Return scikit-learn's AUROC of each class."""
    return np.array([roc_auc_score(y[:, c], score[:, c], sample_weight=weights) for c in range(y.shape[1])])


def peer_bootstrap(y, score, patients, n_resamples):
    """Return scikit-learn's AUROCs under our weights of patients, as a script computes them."""
    names, codes = np.unique(patients, return_inverse=True)
    order = np.argsort(np.argsort([repr(name) for name in names.tolist()]))  # ours numbers patients by their repr
    drawn = np.random.default_rng(0).exponential(size=(n_resamples, len(names)))
    return np.array([peer_auroc(y, score, weights[order[codes]]) for weights in drawn])


def all_pairs(y, scores):
    """Return DeLong's covariance by its definition, from all pairs of a positive and a negative."""
    parts = []
    for score in scores.T:
        positive, negative = score[y == 1], score[y == 0]
        won = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        parts.append((won.mean(axis=1), won.mean(axis=0)))
    of_positive, of_negative = (np.array(part) for part in zip(*parts, strict=True))
    return np.cov(of_positive) / of_positive.shape[1] + np.cov(of_negative) / of_negative.shape[1]


def main():
    """Print the table."""
    y, patients, a, b = findings(np.random.default_rng(0))
    bootstrap_auroc(y[:2000], a[:2000], patients[:2000], 2, skip_undefined=True)  # compiles
    print(
        f"{len(y):,} images of {len(set(patients)):,} patients, {y.shape[1]} classes, "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
    )

    seconds, ours = best_of(5, lambda: auroc(y, a))
    peer, theirs = best_of(3, lambda: peer_auroc(y, a))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    print(
        f"AUROC: {1e3 * seconds:.0f} ms, scikit-learn {1e3 * peer:.0f} ms, {peer / seconds:.1f}x; equal to "
        f"{np.abs(ours - theirs).max():.0e}"
    )

    whole, (_, mean) = best_of(2, lambda: bootstrap_auroc(y, a, patients, RESAMPLES))
    few = bootstrap_auroc(y, a, patients, PEER_RESAMPLES)
    peer, theirs = best_of(1, lambda: peer_bootstrap(y, a, patients, PEER_RESAMPLES))
    low, high = np.quantile(theirs.mean(axis=1), [0.025, 0.975])
    np.testing.assert_allclose([few[1].low, few[1].high], [low, high], rtol=0, atol=1e-6)  # weights are single floats
    peer *= RESAMPLES / PEER_RESAMPLES
    print(
        f"bootstrap by patient, {RESAMPLES} resamples: {whole:.2f} s (goal 10 s), scikit-learn with the same weights "
        f"{peer:.0f} s (from {PEER_RESAMPLES}), {peer / whole:.0f}x; mean {mean}"
    )

    def paired():
        (one, drawn), (other, others) = (resample_aurocs(y, each, patients, RESAMPLES, 0, False) for each in (a, b))
        return interval_with_p(one.mean() - other.mean(), (drawn - others).mean(axis=1), 0.95)

    seconds, difference = best_of(1, paired)
    print(f"paired, two runs: {seconds:.2f} s; mean difference {difference[0]:+.4f}, p = {difference[1]:.3f}")

    seconds, _ = best_of(3, lambda: delong_intervals(y, a))
    paired, _ = best_of(3, lambda: delong_test(y, a, b))
    one = LABELS.index("Pneumonia")
    both = np.stack([a[:, one], b[:, one]], axis=1)
    ours, (_, covariance) = best_of(3, lambda: delong_covariance(y[:, one], both))
    peer, theirs = best_of(1, lambda: all_pairs(y[:, one], both))
    np.testing.assert_allclose(covariance, theirs, rtol=1e-9)
    print(
        f"DeLong: intervals {1e3 * seconds:.0f} ms, paired test {1e3 * paired:.0f} ms; one class "
        f"{1e3 * ours:.0f} ms, all pairs of it {1e3 * peer:.0f} ms, {peer / ours:.0f}x"
    )

    probs = 1 / (1 + np.exp(3 - a))
    seconds, _ = best_of(2, lambda: nested_counts(y, probs, np.arange(len(y)) % 5))
    binned, _ = best_of(2, lambda: expected_calibration_error(y, probs))
    print(f"operating points nested in 5 folds {1e3 * seconds:.0f} ms, calibration error {1e3 * binned:.0f} ms")


if __name__ == "__main__":
    main()
