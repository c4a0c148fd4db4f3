"""What papers report on the official test list, class by class: facts for orientation, nothing measured here.

Rows follow LABELS. "Fang" is the paper of CXR-IRNet, whose table 2 has four decimals; "Liu" that of SDFN, whose table I
has three. Fang et al. trained DCNN, CheXNet, SENet and AGCNN again in their own set-up and took SDFN and SalNet from
those papers.
"""

import pandas as pd

from solutions.chestxray14.config import LABELS, PUBLISHED

_RERUN, _TAKEN, _THEIRS = "Fang, table 2: their re-run", "Fang, table 2: from its paper", "Fang, table 2"
_MEAN = "; the mean by us from its rows"  # the table's last line could not be read
SOURCES = {
    "DCNN (ResNet-50)": _RERUN,
    "CheXNet (DenseNet-121)": _RERUN,
    "SENet": _RERUN,
    "AGCNN": _RERUN + _MEAN,
    "SalNet": _TAKEN + _MEAN,
    "CXR-IRNet without weighting": _THEIRS + _MEAN,
    "CXR-IRNet": _THEIRS + _MEAN,
    "SDFN: whole": "Liu, table I",
    "SDFN: lungs": "Liu, table I",
    "SDFN": "Liu, table I; Fang, table 2, the same",
}
ROWS = {
    "DCNN (ResNet-50)": (
        0.7837,
        0.8937,
        0.8704,
        0.6826,
        0.7875,
        0.7125,
        0.7110,
        0.8232,
        0.7895,
        0.8673,
        0.8398,
        0.7656,
        0.7398,
        0.8406,
    ),
    "CheXNet (DenseNet-121)": (
        0.7919,
        0.9038,
        0.8744,
        0.6942,
        0.8142,
        0.7286,
        0.7477,
        0.8431,
        0.7933,
        0.8777,
        0.8726,
        0.7986,
        0.7528,
        0.8545,
    ),
    "SENet": (
        0.7963,
        0.9085,
        0.8769,
        0.6974,
        0.8144,
        0.7509,
        0.7566,
        0.8467,
        0.7996,
        0.8864,
        0.8907,
        0.8041,
        0.7547,
        0.9035,
    ),
    "AGCNN": (
        0.8076,
        0.8987,
        0.8682,
        0.6933,
        0.8314,
        0.7661,
        0.7383,
        0.8431,
        0.7945,
        0.8791,
        0.8967,
        0.7936,
        0.7642,
        0.9344,
    ),
    "SalNet": (0.775, 0.881, 0.831, 0.695, 0.826, 0.789, 0.741, 0.879, 0.747, 0.846, 0.936, 0.833, 0.793, 0.917),
    "CXR-IRNet without weighting": (
        0.8151,
        0.9100,
        0.8779,
        0.6923,
        0.8290,
        0.7553,
        0.7401,
        0.8516,
        0.8038,
        0.8858,
        0.8849,
        0.8077,
        0.7573,
        0.8995,
    ),
    "CXR-IRNet": (
        0.8073,
        0.9069,
        0.8401,
        0.7901,
        0.8131,
        0.8377,
        0.7465,
        0.8728,
        0.7831,
        0.8575,
        0.8605,
        0.8494,
        0.8123,
        0.8915,
    ),
    "SDFN: whole": (0.762, 0.878, 0.822, 0.693, 0.791, 0.744, 0.707, 0.855, 0.737, 0.837, 0.912, 0.826, 0.760, 0.902),
    "SDFN: lungs": (0.773, 0.868, 0.827, 0.670, 0.807, 0.759, 0.708, 0.851, 0.738, 0.831, 0.909, 0.825, 0.783, 0.912),
    "SDFN": (0.781, 0.885, 0.832, 0.700, 0.815, 0.765, 0.719, 0.866, 0.743, 0.842, 0.921, 0.835, 0.791, 0.911),
}
NOTE = (
    "AUROC as papers report it on the whole official test list; for orientation, not measured here. None names the "
    "version of its label table."
)


def published_means():
    """Return a row a network: published (its name), mean AUROC and source, in the order of the papers' tables."""
    rows = [(name, mean, SOURCES[name]) for name, mean in PUBLISHED.items()]
    return pd.DataFrame(rows, columns=["published", "mean AUROC", "source"])


def published_classes(mean):
    """Return a row for each label and one named `mean`: label, then `published: <network>` for each network."""
    table = pd.DataFrame({f"published: {name}": [*row, PUBLISHED[name]] for name, row in ROWS.items()})
    table.insert(0, "label", [*LABELS, mean])
    return table
