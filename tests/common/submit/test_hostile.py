"""Strings and tables by the thousand, damaged: what is read is consistent, the rest is refused in one line."""

import gzip
import zipfile
from pathlib import Path

import pytest

from common.data import tables
from common.data.folds import load_folds
from common.post import rle
from common.submit import boxes, validate
from common.submit.table import read_table
from tests.fuzzing import COUNT, survive

SHAPE = (40, 30)
STRINGS = {
    rle.RELATIVE: ("0 3 10 5 200 40", "1199 1", " 5 5  30 1100 ", "-1", ""),
    rle.ABSOLUTE: ("1 3 4 2 14 5 219 40", "1200 1", "5 5 35 1100", "-1", ""),
}
BOXES = ("14 1 0 0 1 1", "0 0.5 1 2 30 40 3 0.25 0 0 1e2 99.5 14 0.1 0 0 1 1", "13 1e-3 0.5 .5 5. 6 0 0 1 1 2 2")


def read_text(path):
    return Path(path).read_bytes().decode("utf-8", "replace")


def read_rle(path, form):
    runs = rle.parse(read_text(path), SHAPE, form, str(path))
    assert rle.area(runs) == rle.paint(runs, SHAPE).sum() == rle.paint(runs, SHAPE, "C").sum()
    assert (rle.parse(rle.to_string(runs, form), SHAPE, form) == runs).all()
    assert rle.encode(rle.paint(runs, SHAPE), form) == rle.to_string(runs, form)


def read_relative(path):
    read_rle(path, rle.RELATIVE)


def read_absolute(path):
    read_rle(path, rle.ABSOLUTE)


def read_boxes(path):
    entries, _ = boxes.repair_entries(boxes.read_entries([read_text(path), BOXES[1]]))
    faults = boxes.find_faults(entries)
    validate.refuse_rows(path, validate.row_problems("ab", faults))
    assert not faults and (entries.score <= 1).all() and (entries.boxes >= 0).all()
    assert boxes.repair_entries(entries)[1] == []


@pytest.mark.long
def test_run_lengths(tmp_path):
    for form, read in zip(STRINGS, (read_relative, read_absolute), strict=True):
        paths = [tmp_path / f"{form}{number}.txt" for number in range(len(STRINGS[form]))]
        for path, text in zip(paths, STRINGS[form], strict=True):
            path.write_text(text)
        assert COUNT // 20 < survive([read], paths) < COUNT * 9 // 10


@pytest.mark.long
def test_box_strings(tmp_path):
    paths = [tmp_path / f"{number}.txt" for number in range(len(BOXES))]
    for path, text in zip(paths, BOXES, strict=True):
        path.write_text(text)
    assert COUNT // 20 < survive([read_boxes], paths) < COUNT * 9 // 10


def read_patients(path):
    tables.read_patients(path, ["a1", "b2"])


def read_ids(path):
    tables.read_ids(path, ["image_id", "PredictionString"])


def read_folds(path):
    load_folds(path, ["a1", "b2"])


def validate_masks(path):
    validate.validate_masks(path, tables_of(path) / "masks.csv", SHAPE)


def validate_boxes(path):
    validate.validate_boxes(path, tables_of(path) / "boxes.csv")


def validate_probabilities(path):
    validate.validate_probabilities(path, tables_of(path) / "probs.csv")


def tables_of(path):
    return path.parent / "whole"


def write_tables(folder):
    """Yield paths of tables that each reader accepts, also compressed, and of files that only look like tables."""
    texts = {
        "masks.csv": "ImageId,EncodedPixels\na1,5 5 30 100\nb2,-1\n",
        "boxes.csv": f"image_id,PredictionString\na1,{BOXES[0]}\nb2,{BOXES[1]}\n",
        "probs.csv": "image_id,Edema,Mass\na1,0.5,1e-3\nb2,0,1\n",
        "folds.csv": "# a note\nimage_id,fold,group\na1,0,p\nb2,1,q\n",
        "patients.csv": '\ufeffimage_id,patient_id\r\n"a1",p\r\nb2,"q ""r"", s"\r\n',
        "page.csv": "<!DOCTYPE html>\n<html><body><p>404, not found</p></body></html>\n",
        "nul.csv": "image_id,PredictionString\na1,\0\nb2,\0\0\n",
        "huge.csv": f"image_id,PredictionString\na1,{'9 ' * 100_000}\n",
    }
    (folder / "whole").mkdir()
    for name, text in texts.items():
        data = text.encode()
        for path, content in ((name, data), (f"{name}.gz", gzip.compress(data, mtime=0)), (f"whole/{name}", data)):
            (folder / path).write_bytes(content)
        yield from (folder / name, folder / f"{name}.gz")
    with zipfile.ZipFile(folder / "zip.csv", "w") as file:
        file.writestr("masks.csv", texts["masks.csv"])
    yield folder / "zip.csv"


READERS = [read_table, tables.some_rows, tables.read_list, tables.named_images, read_patients, read_ids, read_folds]
READERS += [validate_masks, validate_boxes, validate_probabilities]


@pytest.mark.long
def test_tables(tmp_path):
    done = survive(READERS, list(write_tables(tmp_path)))
    assert COUNT // 2 < done < COUNT * len(READERS) * 9 // 10
