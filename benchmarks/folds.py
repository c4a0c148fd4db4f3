"""Folds of the 112,120 NIH images by patient and label, against scikit-learn's StratifiedGroupKFold."""

import time
import warnings

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from benchmarks.tables import label_table
from common.data.folds import holdout, make_folds, shared_groups
from tests.running import prevalence_deviation


def scikit_learn_folds(label_sets, n_folds, groups):
    """Return the folds of StratifiedGroupKFold on the label sets, the usual way to use it with several labels."""
    folds = np.empty(len(label_sets), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns of label sets rarer than the folds
        for k, (_, held_out) in enumerate(StratifiedGroupKFold(n_folds).split(label_sets, label_sets, groups)):
            folds[held_out] = k
    return folds


def timed(function, repeats):
    """Return the result of `function` and the seconds of the fastest of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def main():
    path = label_table("Data_Entry_2017_v2020.csv.gz")
    if path is None:
        print("skipped: the NIH table comes with the package torchxrayvision (requirements-dev.txt)")
        return
    table = pd.read_csv(path, usecols=["Finding Labels", "Patient ID"])
    label_sets, patients = table["Finding Labels"], table["Patient ID"].to_numpy()
    labels = label_sets.str.get_dummies("|").to_numpy()
    make_folds(labels, 5, patients)  # compiles
    ours, our_seconds = timed(lambda: make_folds(labels, 5, patients), 7)
    theirs, their_seconds = timed(lambda: scikit_learn_folds(label_sets, 5, patients), 1)
    print(f"{len(labels):,} images, {len(np.unique(patients)):,} patients, {labels.shape[1]} classes, 5 folds")
    print(f"{'':<14}{'seconds':>9}{'worst prevalence':>18}{'worst size':>12}{'shared':>8}")
    for name, folds, seconds in (("common.data", ours, our_seconds), ("scikit-learn", theirs, their_seconds)):
        size = np.abs(np.bincount(folds) * 5 / len(folds) - 1).max()
        worst, shared = prevalence_deviation(labels, folds), shared_groups(folds, patients)
        print(f"{name:<14}{seconds:>9.3f}{worst:>18.2%}{size:>12.2%}{shared:>8}")
        if folds is ours:
            assert shared == 0 and worst <= 0.015 and size <= 0.01, "the promise of make_folds does not hold"
    print(f"ratio of times: {their_seconds / our_seconds:.0f}x")
    for fraction in (0.1, 0.2):
        chosen, seconds = timed(lambda fraction=fraction: holdout(labels, fraction, patients), 3)
        assert shared_groups(chosen, patients) == 0
        print(
            f"holdout {fraction:.0%}: {chosen.mean():.3%} of images, worst prevalence "
            f"{prevalence_deviation(labels, chosen):.2%}, {seconds:.3f} s"
        )


if __name__ == "__main__":
    main()
