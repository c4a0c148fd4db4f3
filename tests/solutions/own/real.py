"""Real collections as a user could have them: `python -m tests.solutions.own.real KIND OUT` writes links and labels.

Needs CXR_REAL_DATA; prints nothing. Kinds: nih (0/1 columns), boxes and polygons (ChestX-Det on NIH's images), further
(ChestX-Det's boxes as a COCO file, on those of NIH's images that are not VinBigData's too), findings (the column
`label`, of ieee8023). JSRT's hearts need no conversion.
"""

import json
import os
import sys
from pathlib import Path

import cv2
import pandas as pd

ROOT = Path(os.environ.get("CXR_REAL_DATA", "/nonexistent"))
NIH = ROOT / "chestxray14"
SIDE = 1024  # pixels in which ChestX-Det's outlines are given


def write_folder(kind, out):
    """Write OUT/images, links to the images, and the labels; return `out`."""
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    kinds = {"nih": _nih, "boxes": _boxes, "polygons": _polygons, "further": _further, "findings": _findings}
    files, write = kinds[kind](out)
    for path in files:
        link = out / "images" / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    write()
    return out


def _nih(out):
    table = pd.read_csv(NIH / "Data_Entry_2017.csv")
    stems = table["Image Index"].str.removesuffix(".png")
    marks = table["Finding Labels"].str.get_dummies("|").drop(columns="No Finding", errors="ignore")
    labels = pd.concat([stems.rename("image_id"), table["Patient ID"].rename("patient_id"), marks], axis=1)
    files = [path for path in sorted(NIH.rglob("*.jpg")) if path.stem in set(stems)]
    return files, lambda: labels.to_csv(out / "labels.csv", index=False)


def _chestxdet():
    table = pd.read_csv(ROOT / "chestxdet" / "annotations.csv")
    table = table[table["pack"] == "chestxray14"]
    files = {path.stem: path for path in NIH.rglob("*.jpg")}
    return table.assign(image_id=table["image_id"].str.removesuffix(".png")), files


def _boxes(out):
    table, files = _chestxdet()
    corners = ["x_min", "y_min", "x_max", "y_max"]
    labels = pd.concat([table[["image_id", "class"]], table[corners] / SIDE], axis=1)
    found = [files[name] for name in table["image_id"].unique()]
    return found, lambda: labels.to_csv(out / "labels.csv", index=False)


def _polygons(out):
    table, files = _chestxdet()
    names, kinds = table["image_id"].unique().tolist(), sorted(set(table["class"]) - {"No finding"})
    sizes = {name: cv2.imread(str(files[name]), cv2.IMREAD_GRAYSCALE).shape for name in names}
    images = [{"id": k, "file_name": f"{files[name].name}"} for k, name in enumerate(names)]
    found = []
    for row in table[table["class"] != "No finding"].itertuples():
        points = [c * sizes[row.image_id][0] / SIDE for point in json.loads(row.polygon) for c in point]
        each = {"id": len(found), "image_id": names.index(row.image_id), "category_id": kinds.index(row[3])}
        found.append(each | {"segmentation": [points]})
    coco = {"images": images, "annotations": found}
    coco["categories"] = [{"id": k, "name": name} for k, name in enumerate(kinds)]
    return [files[name] for name in names], lambda: (out / "labels.json").write_text(json.dumps(coco))


def _further(out):
    table, files = _chestxdet()
    every = pd.read_csv(ROOT / "chestxdet" / "annotations.csv").dropna(subset="polygon")
    theirs = every[every["pack"] == "vinbigdata"].set_index(["class", "polygon"]).index  # the same images, other names
    table = table.dropna(subset="polygon")
    shared = pd.MultiIndex.from_frame(table[["class", "polygon"]]).isin(theirs)
    table = table[~table["image_id"].isin(table.loc[shared, "image_id"])]
    names, kinds = sorted(table["image_id"].unique()), sorted(table["class"].unique())
    sides, images, found = {"width": SIDE, "height": SIDE}, [], []
    for k, name in enumerate(names):
        images.append({"id": k, "file_name": files[name].name, "patient_id": name.split("_")[0]} | sides)
    for _, row in table.iterrows():
        box = [row["x_min"], row["y_min"], row["x_max"] - row["x_min"], row["y_max"] - row["y_min"]]
        each = {"id": len(found), "image_id": names.index(row["image_id"]), "bbox": box}
        found.append(each | {"category_id": kinds.index(row["class"])})
    coco = {"images": images, "annotations": found}
    coco["categories"] = [{"id": k, "name": name} for k, name in enumerate(kinds)]
    return [files[name] for name in names], lambda: (out / "labels.json").write_text(json.dumps(coco))


def _findings(out):
    table = pd.read_csv(ROOT / "covid19" / "metadata.csv")
    files = {path.name: path for path in (ROOT / "covid19" / "images").iterdir()}
    table = table[table["filename"].isin(files)].drop_duplicates("filename")
    table["finding"] = table["finding"].replace("No Finding", "No finding")  # one class in two spellings is refused
    labels = table[["filename", "patientid", "finding"]].set_axis(["image_id", "patient_id", "label"], axis=1)
    return [files[name] for name in labels["image_id"]], lambda: labels.to_csv(out / "labels.csv", index=False)


if __name__ == "__main__":
    write_folder(*sys.argv[1:])
