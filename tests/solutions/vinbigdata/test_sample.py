"""The embedded sample: the competition's layout, radiologists who differ, and boxes where the findings are."""

import csv
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pydicom
import pytest

from common import phantom
from common.data.dicom import read_image
from common.errors import InputError
from common.paths import find_images
from solutions.vinbigdata import sample
from solutions.vinbigdata.config import CLASSES
from solutions.vinbigdata.sample import make_sample

N_TRAIN, N_TEST, SEED = 24, 8, 3
SMALL = {"n_train": 4, "n_test": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sample(tmp_path_factory.mktemp("vinbigdata") / "sample", N_TRAIN, N_TEST, SEED)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def box(row):
    return np.array([float(row[side]) for side in ("x_min", "y_min", "x_max", "y_max")])


def iou(a, b):
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = np.prod(np.clip(high - low, 0, None))
    return shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def grey(path):
    """The 8-bit levels that were spread over more bits, by the standard's meaning of the header alone."""
    header = pydicom.dcmread(path)
    levels = np.rint(header.pixel_array * (255 / (2**header.BitsStored - 1))).astype(int)
    return 255 - levels if header.PhotometricInterpretation == "MONOCHROME1" else levels


def test_layout(folder):
    names = ["hidden", "sample.json", "sample_submission.csv", "test", "train", "train.csv"]
    assert sorted(path.name for path in folder.iterdir()) == names
    train, test = (find_images(folder / split) for split in ("train", "test"))
    assert len(train) == N_TRAIN and len(test) == N_TEST and not set(train) & set(test)
    assert all(len(name) == 32 and int(name, 16) and path.suffix == ".dicom" for name, path in (train | test).items())
    columns = b"image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\r\n"
    for name, images in (("train.csv", train), ("hidden/truth.csv", test)):
        assert (folder / name).read_bytes().startswith(columns)
        assert {row["image_id"] for row in table(folder / name)} == set(images)
    submission = table(folder / "sample_submission.csv")
    assert [row["image_id"] for row in submission] == sorted(test)
    assert {row["PredictionString"] for row in submission} == {"14 1 0 0 1 1"}


def test_images_are_read_in_every_way_of_storing_them(folder):
    kinds, shapes = Counter(), set()
    for path in find_images(folder).values():
        header = pydicom.dcmread(path)
        kinds.update([header.file_meta.TransferSyntaxUID.name, header.PhotometricInterpretation, header.BitsStored])
        words = header.pixel_array
        assert words.max() > 0.7 * 2**header.BitsStored and len(np.unique(words)) > 500  # more than 8 bits are used
        image = read_image(path)
        height, width = image.shape
        assert (height, width) == (header.Rows, header.Columns) and 0.7 < height / width < 1.4 and height != width
        edge = np.concatenate([image[:20, :20].ravel(), image[:20, -20:].ravel()])
        assert np.median(edge) < image[:, width // 2].mean()  # air is dark, whichever way it is stored
        shapes.add(image.shape)
    assert kinds["JPEG 2000 Image Compression (Lossless Only)"] == 21 and kinds["Explicit VR Little Endian"] == 11
    assert kinds["MONOCHROME1"] == 5 and [kinds[bits] for bits in (10, 12, 14, 16)] == [8, 8, 8, 8]
    assert len(shapes) > 25 and min(w / h for h, w in shapes) < 0.95 and max(w / h for h, w in shapes) > 1.05


def test_rows_are_well_formed(folder):
    for row in table(folder / "train.csv") + table(folder / "hidden" / "truth.csv"):
        assert CLASSES[int(row["class_id"])] == row["class_name"]
        if row["class_id"] == "14":
            assert row["x_min"] == row["y_min"] == row["x_max"] == row["y_max"] == ""
            continue
        (path,) = folder.glob(f"t*/{row['image_id']}.dicom")
        header = pydicom.dcmread(path, stop_before_pixels=True)
        x_min, y_min, x_max, y_max = box(row)
        assert 0 <= x_min < x_max <= header.Columns and 0 <= y_min < y_max <= header.Rows


def test_three_radiologists_an_image_agree_only_on_whether_it_is_healthy(folder):
    readers, healthy, rows = defaultdict(set), defaultdict(set), table(folder / "train.csv")
    for row in rows:
        readers[row["image_id"]].add(row["rad_id"])
        healthy[row["image_id"]].add(row["class_id"] == "14")
    assert all(len(three) == 3 for three in readers.values()) and all(len(said) == 1 for said in healthy.values())
    ill = [image_id for image_id, said in healthy.items() if said == {False}]
    assert len(ill) == 12  # half of 24
    assert sum(readers[image_id] == {"R8", "R9", "R10"} for image_id in ill) >= 9
    assert len(set.union(*(readers[image_id] for image_id in healthy.keys() - set(ill)))) > 8
    assert len({(row["image_id"], row["rad_id"]) for row in rows if row["class_id"] == "14"}) == 36
    order = [row["image_id"] for row in rows]
    assert sum(a == b for a, b in pairwise(order)) < len(order) / 2  # rows are shuffled


def test_boxes_are_those_of_the_findings_drawn(folder):
    truth, images = defaultdict(list), find_images(folder)
    for row in table(folder / "hidden" / "truth.csv"):
        truth[row["image_id"]].append(row)
    for case in sample._plan("test", N_TEST, SEED, 50):
        rows, stored = truth[case.image_id], grey(images[case.image_id])
        assert [row["class_name"] for row in rows] == (list(case.classes) or ["No finding"])
        assert all(row["rad_id"] == "R0" for row in rows)
        side = int(np.random.default_rng([case.number, 1]).integers(sample.LEAST, sample.MOST))
        healthy = phantom.draw(case.number, side).image.astype(int)
        change = np.abs(stored - counterpart(healthy, stored))
        within = np.zeros(stored.shape, bool)
        for row in rows if case.classes else ():
            x_min, y_min, x_max, y_max = box(row).astype(int)
            assert np.percentile(change[y_min:y_max, x_min:x_max], 95) > 8, row  # there is something to see
            margin = 24  # the soft edge of an effusion
            within[max(y_min - margin, 0) : y_max + margin, max(x_min - margin, 0) : x_max + margin] = True
        if "Pneumothorax" not in case.classes:  # it changes a whole lung
            assert change[~within].max() <= 1, case


def counterpart(film, window):
    """The part of the film that the window shows; they agree but for findings and rounding."""
    (height, width), best = window.shape, {}
    for y in range(film.shape[0] - height + 1):
        for x in range(film.shape[1] - width + 1):
            best[y, x] = np.median(np.abs(film[y : y + height : 9, x : x + width : 9] - window[::9, ::9]))
    y, x = min(best, key=best.get)
    return film[y : y + height, x : x + width]


def test_radiologists_differ_by_as_much_as_is_said():
    drawn = [(name, np.array([100.0, 120, 200, 180])) for name in ("Nodule/Mass", "Cardiomegaly", "Pleural effusion")]
    names, overlaps, seen = Counter(), [], Counter()
    for number in range(300):
        case = sample._Case("train", number, tuple(name for name, _ in drawn))
        rows = [dict(zip(sample.HEADER, row, strict=True)) for row in sample._readings(case, (400, 300), drawn)]
        assert len({row["rad_id"] for row in rows}) == 3
        names.update(row["class_name"] for row in rows)
        overlaps += [iou(box(row), drawn[0][1]) for row in rows]
        seen[len(rows)] += 1
    total = names.total()
    assert abs(total / 2700 - 0.88) < 0.02  # 12 % overlooked
    assert names["Cardiomegaly"] > 0.31 * total  # never mistaken
    assert abs(names["Consolidation"] / (total * 2 / 3) - 0.08) < 0.02
    assert 0.75 < np.mean(overlaps) < 0.92 and np.min(overlaps) > 0.4
    assert len(seen) > 3


@pytest.mark.parametrize("healthy, ill", [(50, 24), (75, 12), (0, 48)])
def test_shares_of_images_and_classes(healthy, ill):
    cases = sample._plan("train", 48, 0, healthy)
    found = [case.classes for case in cases if case.classes]
    assert len(cases) == 48 and len(found) == ill and {len(names) for names in found} == {3, 4}
    assert all(len(set(names)) == len(names) for names in found)
    counts = Counter(name for names in found for name in names)
    assert set(counts) == set(sample.FINDINGS) <= set(CLASSES[:14]) and max(counts.values()) - min(counts.values()) <= 1
    test = Counter(name for case in sample._plan("test", 12, 0, 50) for name in case.classes)
    assert set(test) == set(sample.FINDINGS)  # by default each class can be scored


@pytest.mark.parametrize("name, value", [("n_train", 3), ("healthy", 91), ("healthy", 50.0)])
def test_bad_parameters_are_named(tmp_path, name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        make_sample(tmp_path / "sample", **SMALL | {name: value})
    assert not list(tmp_path.iterdir())
