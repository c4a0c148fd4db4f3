"""Read and write COCO files: JSON with images, categories and annotations."""

import numpy as np
import pandas as pd

from common.errors import InputError, check
from common.paths import read_json, strip_suffix, write_json
from common.post.boxes import BOX, clip

EDGE = 1.0  # pixels by which rounding can move a box outside its image
OF_IMAGE = ["patient_id", "split", "fold"]  # optional fields of an image, "" if missing or null


def list_part(path, content, name):
    """Return the list `name` of a file's content. Raises InputError unless it is a list of objects."""
    part = content.get(name) if isinstance(content, dict) else None
    if not isinstance(part, list) or not all(isinstance(each, dict) for each in part):
        raise InputError(f"{path}: not a COCO file (no list of {name})")
    return part


def read_coco(path):
    """Return the images, the annotations and the names of the categories of a COCO file.

    Images: DataFrame of name (file_name), where (file and id), width and height (pixels, NaN if not given) and
    OF_IMAGE. Annotations: DataFrame of name, class, where, x_min, y_min, x_max, y_max (pixels, NaN without a bbox),
    score (NaN if not given) and segmentation (as in the file, or None). Raises InputError for anything else.
    """
    content, rows = read_json(path), []
    try:
        images, found, kinds = (list_part(path, content, name) for name in ("images", "annotations", "categories"))
        about = pd.DataFrame({"name": [str(image["file_name"]) for image in images]})
        about["where"] = [f"{path}, image {image['id']}" for image in images]
        of_image = {image["id"]: str(image["file_name"]) for image in images}
        names = {kind["id"]: str(kind["name"]) for kind in kinds}
        for each, listed, what in ((of_image, images, "images"), (names, kinds, "categories")):
            check(len(each) == len(listed), f"{path}: two of the {what} have the same id")
        for each in found:
            where = f"{path}, annotation {each.get('id', len(rows))}"
            if each["image_id"] not in of_image or each["category_id"] not in names:
                raise InputError(f"{where}: unknown image_id or category_id")
            x, y, width, height = map(float, each.get("bbox") or [np.nan] * 4)
            values = (x, y, x + width, y + height, float(each.get("score", np.nan)), each.get("segmentation"))
            rows.append((of_image[each["image_id"]], names[each["category_id"]], where, *values))
        for side in ("width", "height"):
            about[side] = [float(image.get(side) or np.nan) for image in images]
    except InputError:  # a ValueError, too
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a COCO file ({type(error).__name__}: {error})") from None
    for name in OF_IMAGE:
        about[name] = ["" if image.get(name) is None else str(image[name]) for image in images]
    return about, pd.DataFrame(rows, columns=["name", "class", "where", *BOX, "score", "segmentation"]), names


def read_boxes(path, classes, scored=True):
    """Return the detections of a COCO file and its images; image_id is the file's name without its suffix.

    classes: {name: number}, ignoring case. Detections: image_id, class_id, score (if `scored`), x_min, y_min, x_max,
    y_max. Boxes that leave an image of known size by up to a pixel are clipped; the box of `No finding` is 0 0 1 1.
    Images: as from `read_coco`, with image_id. Raises InputError naming the annotation for a class that is not in
    `classes`, an invalid box, and a score that is missing or not in [0, 1].
    """
    images, marks, _ = read_coco(path)
    images["image_id"], sizes = images["name"].map(strip_suffix), images.set_index("name")[["width", "height"]]
    for row in np.flatnonzero(images["image_id"].duplicated())[:1]:
        raise InputError(f"{images['where'][row]}: a second image {images['image_id'][row]}")
    numbers, names = {name.casefold(): number for name, number in classes.items()}, marks["class"].str.casefold()
    ends = np.nan_to_num(sizes.loc[marks["name"]].to_numpy(), nan=1e9)
    boxes = np.where((names == "no finding").to_numpy()[:, None], [0.0, 0.0, 1.0, 1.0], marks[BOX].to_numpy(float))
    inside = (boxes[:, :2] >= -EDGE) & (boxes[:, :2] < boxes[:, 2:]) & (boxes[:, 2:] <= ends + EDGE)
    faults = {
        "the class {class!r} is not one of " + ", ".join(classes): ~names.isin(numbers),
        "the box is not x, y, width, height in pixels, within its image": ~inside.all(axis=1),
        "score {score:g} is not a number from 0 to 1": scored & ~marks["score"].between(0, 1),
    }
    for problem, wrong in faults.items():
        for row in np.flatnonzero(wrong)[:1]:
            raise InputError(f"{marks['where'][row]}: {problem.format(**marks.iloc[row])}")
    found = pd.DataFrame({"image_id": marks["name"].map(strip_suffix), "class_id": names.map(numbers).astype(int)})
    found[["score", *BOX]] = np.column_stack([marks["score"], clip(boxes, ends) if len(boxes) else boxes])
    return found if scored else found.drop(columns="score"), images


def box_fields(box):
    """Return the fields of an annotation for a box x_min, y_min, x_max, y_max."""
    x, y, right, bottom = map(float, box)
    return {"bbox": [x, y, right - x, bottom - y], "area": (right - x) * (bottom - y)}


def to_coco(images, classes, found):
    """Return the content of a COCO file for images (rows of a run's table) and `found`: (image, class, fields)."""
    pictures = [
        {"id": k, "file_name": getattr(row, "file", row.image_id), "width": int(row.width), "height": int(row.height)}
        for k, row in enumerate(images.itertuples(), start=1)
    ]
    annotations = [
        {"id": number, "image_id": image + 1, "category_id": k + 1, "iscrowd": 0} | fields
        for number, (image, k, fields) in enumerate(found, start=1)
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, start=1)]
    return {"images": pictures, "annotations": annotations, "categories": categories}


def write_boxes(path, detections, images, classes):
    """Write detections (image_id, class_id, score, x_min, y_min, x_max, y_max) of images as a COCO file."""
    at, numbers = pd.Index(images["image_id"]).get_indexer(detections["image_id"]), detections["class_id"].tolist()
    parts = zip(at.tolist(), numbers, detections[[*BOX, "score"]].to_numpy(float).tolist(), strict=True)
    found = ((image, k, box_fields(box) | {"score": score}) for image, k, (*box, score) in parts)
    write_json(path, to_coco(images, classes, found))
