"""Figures of predictions by hand, and the papers' figures beside them."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.tables import label_table
from common.errors import InputError
from solutions.chestxray14 import comparison, published, report
from solutions.chestxray14.comparison import class_table, epoch_chosen
from solutions.chestxray14.config import DEMO, FUSION, LABELS, SDFN, Config, NetworkConfig
from solutions.chestxray14.published import published_classes, published_means

NAMES = list(LABELS)


def test_positive_images_are_counted():
    y = np.zeros((6, 2), int)
    y[:4, 0] = y[5, 1] = 1
    found = class_table(y, np.random.default_rng(0).random((6, 2)), np.arange(6), NAMES[:2], 20)
    assert found["positive"].tolist()[:2] == [4, 1] and found["positive"].isna().iloc[-1]
    with pytest.raises(InputError, match="needs images of two patients, there is 1"):
        class_table(y, y, np.zeros(6), NAMES[:2], 20)


def test_where_epochs_are_chosen_on_the_fold():
    assert not epoch_chosen(DEMO) and epoch_chosen(SDFN)
    for averaging, keep, chosen in (
        (("last",), "highest", False),
        (("ema",), "highest", False),
        (("last", "ema"), "highest", True),
        (("last", "best"), "last", False),
        (("window",), "highest", True),
    ):
        network = NetworkConfig(averaging=averaging, keep=keep)
        assert epoch_chosen(Config(whole=network)) == chosen
    last = NetworkConfig(averaging=("last",))
    both = {"views": "both", "whole": last, "lungs": last, "fusion": FUSION}
    assert epoch_chosen(Config(**both)) and not epoch_chosen(Config(**both, combine="mean"))


def test_published_rows_give_the_published_means():
    """The means as printed; those of table 2's second half could not be read, and are the rows' own."""
    means = published_means().set_index("published")["mean AUROC"].to_dict()
    assert means == {
        **{"Wang et al.": 0.740, "Yao et al.": 0.761, "Gündel et al.": 0.807},
        **{"SDFN: whole": 0.802, "SDFN: lungs": 0.804, "SDFN": 0.815},
        **{"DCNN (ResNet-50)": 0.7934, "CheXNet (DenseNet-121)": 0.8105, "SENet": 0.8205, "AGCNN": 0.8221},
        **{"SalNet": 0.8206, "CXR-IRNet without weighting": 0.8222, "CXR-IRNet": 0.8335},
    }
    table = published_classes("mean").set_index("label")
    assert list(table.index) == [*NAMES, "mean"] and table.loc["Infiltration", "published: CXR-IRNet"] == 0.7901
    assert table.loc["Hernia", "published: Gündel et al."] == 0.896


def test_table_1_adds_up():
    """Its totals as printed, and ours of three images by hand."""
    train, test, boxes = (published.TABLE_1[name] for name in ("train", "test", "boxes"))
    assert train[14:] == [53_970, 36_024, 50_500, 86_524] and test[14:] == [27_206, 15_735, 9_861, 25_596]
    assert boxes[14:] == [984, 984, 0, 984] and sum(published.TEST) == 27_206
    labels = pd.DataFrame(np.zeros((3, 14), int), columns=NAMES)
    labels.loc[0, ["Mass", "Nodule"]] = labels.loc[1, "Mass"] = 1
    table = report.count_labels(labels, labels[2:], pd.Series([4, 4])).set_index("label")
    assert table.loc["Mass", ["train", "test", "boxes", "paper: train"]].tolist() == [2, 0, 2, 4_034]
    assert table["train"][-4:].tolist() == [3, 2, 1, 3] and table["test"][-4:].tolist() == [0, 0, 1, 1]


def test_releases_of_the_labels_are_known_by_their_counts():
    path = label_table("Data_Entry_2017_v2020.csv.gz")
    if path is None:
        pytest.skip("needs the package torchxrayvision")
    truth = comparison.read_truth(path).rename(columns=lambda name: name.removeprefix(comparison.TRUE))
    assert published.describe_labels(truth).startswith("as many images of each label as NIH's release of 2020")
    changed = truth.copy()
    changed.iloc[0, 6] = 1 - changed.iloc[0, 6]
    assert published.describe_labels(changed).startswith("other counts of Pneumonia than")
    assert "its release is unknown" in published.describe_labels(truth[:-1])
