"""Per-class results that papers report on the official lists: for orientation, not measured here.

"Fang" is the paper of CXR-IRNet, whose table 2 has four decimals; "Liu" is that of SDFN, whose table I has three. Fang
et al. retrained DCNN, CheXNet, SENet and AGCNN in their own set-up and copied SDFN and SalNet from those papers.
"""

import numpy as np
import pandas as pd

from solutions.chestxray14.config import LABELS

_LIU, _OWN = "Liu, table I", "Fang, table 2"
_RERUN, _TAKEN = f"{_OWN}: their re-run", f"{_OWN}: from its paper"
# Images with each label in the train and validation list and in the test list, and boxes: Fang, table 1. The counts are
# those of NIH's label table of 2020.
TRAIN = (8_280, 1_707, 8_659, 13_782, 4_034, 4_708, 876, 2_637, 2_852, 1_378, 1_423, 1_251, 2_242, 141)
TEST = (3_279, 1_069, 4_658, 6_112, 1_748, 1_623, 555, 2_665, 1_815, 925, 1_093, 435, 1_143, 86)
BOXES = (180, 146, 153, 123, 85, 79, 120, 98, 0, 0, 0, 0, 0, 0)
IMAGES = 112_120
TOTALS = ("Multi-label totals", "Finding", "No Finding", "Totals")  # the last rows of that table


def table_1(labels, finding, images):
    """Return a column of table 1: label counts, then TOTALS; finding and images: images with a finding, and all."""
    return [*labels, sum(labels), finding, images - finding, images]


TABLE_1 = {
    "train": table_1(TRAIN, 36_024, 86_524),
    "test": table_1(TEST, 15_735, 25_596),
    "boxes": table_1(BOXES, 984, 984),  # on 880 images
}
# Source, and decimals of each label's AUROC in the order of LABELS. Means are computed from the rows and equal the
# printed ones; the last four printed means of Fang's table are illegible.
PUBLISHED = {
    "Wang et al.": (_LIU, "700 814 736 613 693 669 658 799 703 805 833 786 684 872"),
    "Yao et al.": (_LIU, "733 856 806 673 777 724 684 805 711 806 842 743 724 775"),
    "Gündel et al.": (_LIU, "767 883 828 709 821 758 731 846 745 835 895 818 761 896"),
    "SDFN: whole": (_LIU, "762 878 822 693 791 744 707 855 737 837 912 826 760 902"),
    "SDFN: lungs": (_LIU, "773 868 827 670 807 759 708 851 738 831 909 825 783 912"),
    "SDFN": (_LIU, "781 885 832 700 815 765 719 866 743 842 921 835 791 911"),
    "DCNN (ResNet-50)": (_RERUN, "7837 8937 8704 6826 7875 7125 7110 8232 7895 8673 8398 7656 7398 8406"),
    "CheXNet (DenseNet-121)": (_RERUN, "7919 9038 8744 6942 8142 7286 7477 8431 7933 8777 8726 7986 7528 8545"),
    "SENet": (_RERUN, "7963 9085 8769 6974 8144 7509 7566 8467 7996 8864 8907 8041 7547 9035"),
    "AGCNN": (_RERUN, "8076 8987 8682 6933 8314 7661 7383 8431 7945 8791 8967 7936 7642 9344"),
    "SalNet": (_TAKEN, "775 881 831 695 826 789 741 879 747 846 936 833 793 917"),
    "CXR-IRNet without weighting": (_OWN, "8151 9100 8779 6923 8290 7553 7401 8516 8038 8858 8849 8077 7573 8995"),
    "CXR-IRNet": (_OWN, "8073 9069 8401 7901 8131 8377 7465 8728 7831 8575 8605 8494 8123 8915"),
}
NOTE = (
    "AUROC as papers report it on the whole official test list; for orientation, not measured here. Fang's labels are "
    "those of NIH's table of 2020, as the totals of its table 1 show; the other papers are older than that table. The "
    "means of AGCNN, SalNet and CXR-IRNet are those of their rows."
)


def describe_labels(truth):
    """Return a text on which release of NIH's labels a table is (columns LABELS, 0/1), judging by its counts."""
    if len(truth) != IMAGES:
        return f"{len(truth):,} images, not NIH's whole table of {IMAGES:,}: its release is unknown"
    counts = truth[list(LABELS)].sum().to_numpy()
    other = [label for label, n, *known in zip(LABELS, counts, TRAIN, TEST, strict=True) if n != sum(known)]
    if other:
        return f"other counts of {', '.join(other)} than in NIH's release of 2020: an older release, or an edited table"
    return "as many images of each label as NIH's release of 2020 and CXR-IRNet's table 1"


def published_classes(mean):
    """Return one row per label and one named `mean`; columns label and `published: <network>`, rounded as printed."""
    areas = {name: [float(f".{area}") for area in row.split()] for name, (_, row) in PUBLISHED.items()}
    table = pd.DataFrame({f"published: {name}": [*each, np.mean(each)] for name, each in areas.items()})
    decimals = {f"published: {name}": 3 if source == _LIU else 4 for name, (source, _) in PUBLISHED.items()}
    table = table.round(decimals)
    table.insert(0, "label", [*LABELS, mean])
    return table


def published_means():
    """Return one row per network: published (its name), mean AUROC and source."""
    means = published_classes("mean").iloc[-1, 1:].tolist()
    rows = zip(PUBLISHED, means, (source for source, _ in PUBLISHED.values()), strict=True)
    return pd.DataFrame(rows, columns=["published", "mean AUROC", "source"])
