"""Write radiographs that have RSNA's boxes as VinBigData's Lung Opacity in the layout of the RSNA challenge.

python -m benchmarks.rsna_layout $CXR_REAL_DATA/vinbigdata FOLDER
"""

import sys
from pathlib import Path

import pandas as pd

from common.paths import find_images
from solutions.rsna_pneumonia.config import CLASS_INFO, CLASSES, LABELS, SAMPLE, SAMPLE_FILE

OPACITY = 7  # VinBigData's class


def write_challenge(folder, out):
    """Write the tables, and links to the images; return the boxes of opacities, without repeated ones."""
    table, files = pd.read_csv(folder / "train.csv"), find_images(folder)
    true = table[table["class_id"] == OPACITY].drop_duplicates()
    size = {"width": true["x_max"] - true["x_min"], "height": true["y_max"] - true["y_min"]}
    rows = true[["image_id", "x_min", "y_min"]].assign(**size, Target=1)
    others = pd.DataFrame({"image_id": sorted(set(table["image_id"]) - set(true["image_id"])), "Target": 0})
    columns = {"image_id": "patientId", "x_min": "x", "y_min": "y"}
    pd.concat([rows, others]).rename(columns=columns).to_csv(out / LABELS, index=False)
    names = {image_id: CLASSES[1] for image_id in others["image_id"]} | dict.fromkeys(true["image_id"], CLASSES[2])
    pd.DataFrame(names.items(), columns=["patientId", "class"]).to_csv(out / CLASS_INFO, index=False)
    tests = pd.read_csv(folder / "sample_submission.csv")["image_id"]
    pd.DataFrame({SAMPLE[0]: tests, SAMPLE[1]: ""}).to_csv(out / SAMPLE_FILE, index=False)
    for split, ids in (("train", names), ("test", tests)):
        (out / f"stage_2_{split}_images").mkdir(exist_ok=True)
        for image_id in ids:
            link = out / f"stage_2_{split}_images" / f"{image_id}.dcm"
            link.unlink(missing_ok=True)
            link.symlink_to(files[image_id].resolve())
    return true


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    write_challenge(Path(sys.argv[1]), Path(sys.argv[2]))
