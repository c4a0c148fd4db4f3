"""What presets cost at a challenge's full length, by `plan`'s own account.

    python -m benchmarks.plans [siim_pneumothorax vinbigdata chestxray14]

The folders are those of benchmarks.full_size and benchmarks.chestxray14_scale: real numbers of images and, but for
VinBigData, real labels, over empty files; phantoms take the place of decoded images. Networks, augmentations and plans
are the real ones, and `plan` computes the steps of cards that are not here from their data sheets. The script ends with
an error if the preset `kaggle` does not fit Kaggle's two T4 by this account.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path
from unittest import mock

import cv2
import numpy as np

from benchmarks import chestxray14_scale, full_size
from benchmarks.tables import label_table
from common import phantom
from solutions.__main__ import main as solutions_main

CARD = "--card H100 --gpus"
PLANS = {
    "siim_pneumothorax": (f"paper {CARD} 1", f"podium {CARD} 1", f"podium {CARD} 8", "kaggle --kaggle"),
    "vinbigdata": (f"paper {CARD} 1", f"podium {CARD} 1", f"podium {CARD} 8", "kaggle --kaggle"),
    "chestxray14": (
        f"cxr_irnet {CARD} 1",
        f"sdfn --label-table 2020 {CARD} 1",
        f"podium {CARD} 1",
        f"podium {CARD} 8",
        "kaggle --kaggle",
    ),
}


def write_data(name, folder):
    """Write the folder of a challenge at its full length."""
    if name != "chestxray14":
        return full_size.write_data(name, folder, 1.0)
    tables = [label_table(f"{table}.csv.gz") for table in ("Data_Entry_2017_v2020", "BBox_List_2017")]
    chestxray14_scale.write_folder(folder, *tables, np.random.default_rng(0))
    film = folder.parent / "film.png"
    cv2.imwrite(str(film), phantom.draw(0, 1024).image)
    for path in folder.glob("images_*/images/*.png"):  # of which some are read, to find their lungs
        path.unlink()
        path.symlink_to(film)


def main():
    """Print the plans."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(PLANS), metavar="NAME", help=", ".join(PLANS))
    options = parser.parse_args()
    if unknown := set(options.names) - PLANS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(PLANS)}")
    if label_table("siim-pneumothorax-train-rle.csv.gz") is None:
        print("skipped: the label tables come with the package torchxrayvision (requirements-dev.txt)")
        return
    for name in options.names:
        with tempfile.TemporaryDirectory() as root, mock.patch("common.data.store.decode_all", full_size.undecoded):
            write_data(name, Path(root) / "data")
            for words in PLANS[name]:
                begun = time.monotonic()
                status = solutions_main(
                    [name, "plan", *words.split(), "--data", f"{root}/data", "--out", f"{root}/run"]
                )
                print(f"{name} plan {words}: status {status}, {time.monotonic() - begun:.0f} s\n", flush=True)
                assert status == 0 or "--kaggle" not in words, "does not fit Kaggle's cards, disk or sessions"


if __name__ == "__main__":
    logging.getLogger("common").setLevel(logging.WARNING)
    main()
