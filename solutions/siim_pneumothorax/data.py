"""Read and check the competition's tables: run-length masks and patients."""

from functools import cache

import numpy as np

from common.data.folds import quartile_strata
from common.data.tables import some_rows
from common.errors import check, log
from common.listing import Listing, check_square, image_table, list_test, match_files, neutral_answers
from common.metrics import segmentation
from common.paths import check_id
from common.post.rle import area, overlap, paint, parse, to_string, union
from solutions.siim_pneumothorax.config import KAGGLE, SIZE

COLUMNS = ["ImageId", "EncodedPixels"]
# label table and sample submission of each of the competition's two stages
STAGES = {"stage_2_train.csv": "stage_2_sample_submission.csv", "train-rle.csv": "sample_submission.csv"}


def read_competition(job):
    """Return the competition's Listing; its table adds present (0/1), area (pixels) and rle for each image."""
    options, labels_path = job.options, KAGGLE.find_file(job.options.data, list(STAGES))
    sample_path, folder = labels_path.with_name(STAGES[labels_path.name]), labels_path.parent
    if not sample_path.is_file() and (folder / "sample_submission.csv").is_file():
        sample_path = folder / "sample_submission.csv"
    log.info(f"labels from {labels_path}, test images from {sample_path.name}")
    labels = read_labels(labels_path)
    files, test_ids = match_files(labels_path, labels, sample_path, COLUMNS, options)
    train_ids, id_map = sorted(labels), options.id_map or next(iter(folder.glob("nih_id.csv")), None)
    table = _with_masks(image_table(train_ids, test_ids, id_map), [labels[image_id] for image_id in train_ids])
    train = table[table["split"] == "train"]
    return Listing(
        folder,
        table,
        files,
        neutral_answers(test_ids, COLUMNS, "-1"),
        strata=quartile_strata(train["present"].to_numpy() > 0, train["area"].to_numpy()),
        labels=train["rle"].tolist(),
        inputs=(labels_path, sample_path, *([id_map] if id_map else [])),
    )


def read_test(job):
    """Return the Listing of the test images only: those given by --test, or else listed in the sample submission."""
    folder, ids, files = list_test(job.options, KAGGLE, COLUMNS)
    return Listing(folder, _with_masks(image_table([], ids), []), files, neutral_answers(ids, COLUMNS, "-1"))


def refuse_oblong(job, listing, store):
    """Return the listing unchanged. Raises InputError for a non-square image, since all of the masks are square."""
    check_square(listing, "masks of this challenge are square")
    return listing


def read_labels(path):
    """Return {image_id: runs} from a run-length table; an image with several rows gets the union of their masks.

    Raises InputError naming file and row for an unknown header, an unusable id, a run-length string that does not fit
    1024 × 1024 pixels, and an image with an empty row (-1) and any other row.
    """
    table = some_rows(path, COLUMNS)
    rows = {}
    for number, (image_id, rle) in enumerate(table.itertuples(index=False), start=2):
        where = f"{path}, row {number}"
        runs = parse(rle, (SIZE, SIZE), where=where)
        several = rows.setdefault(check_id(image_id, where), [])
        several.append(runs)
        fits = len(several) == 1 or all(map(len, several))
        check(fits, f"{where}: {image_id} has an empty row (-1) and another one")
    return {image_id: union(several) for image_id, several in rows.items()}


@cache
def read_masks(images):
    """Return {store row: runs} for all training images."""
    train = images.table[images.table["split"] == "train"]
    return {row: parse(rle) for row, rle in zip(train["row"], train["rle"], strict=True)}


def mask(images, row):
    """Return the mask of a training image, uint8 (1024, 1024) of 0 and 1; float32 if mixed with a teacher's mask."""
    runs = read_masks(images).get(int(row), np.zeros((0, 2), np.int64))  # none for pseudo-labelled test images
    return images.drawn(row, paint(runs, (SIZE, SIZE), order="C"))


def presence(images, rows):
    """Return 1 for each row with a pneumothorax, else 0, (n,); labels from a teacher are probabilities."""
    return images.at(rows)["present"].to_numpy()


def sample_negatives(images, rows, per_positive, seed):
    """Return all positive rows and `per_positive` random negatives for each of them; 0 keeps all rows."""
    present = presence(images, rows) > 0.5
    wanted = round(per_positive * present.sum())
    if not per_positive or wanted >= (~present).sum():
        return rows
    chosen = np.random.default_rng(seed).choice(rows[~present], wanted, replace=False)
    return np.sort(np.concatenate([rows[present], chosen]))


def dice_of(pairs):
    """Return the Dice and the true area, (n,) each, for pairs of (predicted runs, true runs)."""
    areas = np.array([(overlap(found, true), area(found), area(true)) for found, true in pairs]).T
    return segmentation.dice_from_areas(*areas), areas[2]


def _with_masks(table, masks):
    tests = len(table) - len(masks)
    table["area"] = np.array([*map(area, masks), *[0] * tests], np.int64)
    table["present"] = (table["area"] > 0).astype(int)
    table["rle"] = [*map(to_string, masks), *[""] * tests]
    return table
