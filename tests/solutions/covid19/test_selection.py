"""Why images are left out, and which are taken for one."""

import io
import logging

import cv2
import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from solutions.covid19.config import SelectionConfig
from solutions.covid19.selection import drop_duplicates, find_duplicates, select

ROW = {"collection": "home", "home": True, "table": "t.csv", "line": 2, "file_name": "a.png", "path": "a.png"}
ROW |= {"image_id": "a", "patient_id": "home 1", "age": 50.0, "age_said": "", "view": "frontal"}
ROW |= {"view_said": "PA", "modality": "X-ray", "devices": False, "finding": "SARS", "label": 0}


def rows(*changes):
    """A table as `read_collections` gives it, one row for each dict of what differs from ROW."""
    named = [
        {"image_id": f"i{k}", "path": f"i{k}.png", "patient_id": f"home {k}", "line": k + 2}
        for k in range(len(changes))
    ]
    return pd.DataFrame([{**ROW, **name, **change} for name, change in zip(named, changes, strict=True)])


def normals(n, collection="NIH", **change):
    about = {"collection": collection, "home": False, "finding": "No Finding", **change}
    return [
        {**about, "image_id": f"{collection}{k}", "path": f"{collection}{k}.png", "patient_id": f"{collection} {k}"}
        for k in range(n)
    ]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, ""),
        ({"modality": ""}, ""),
        ({"age": np.nan}, ""),
        ({"view": "unknown", "view_said": "odd"}, ""),
        ({"modality": "CT", "view": "lateral", "path": None}, "CT"),
        ({"view": "lateral", "view_said": "L", "age": 3.0}, "lateral (L)"),
        ({"view": "other", "view_said": "Axial"}, "view Axial"),
        ({"label": -1, "finding": "todo", "age": 3.0}, "finding unknown (todo)"),
        ({"label": -1, "finding": ""}, "finding unknown"),
        ({"home": False, "finding": "Effusion"}, "not a normal (Effusion)"),
        ({"home": False, "finding": "No finding"}, ""),
        ({"devices": True}, "medical device"),
        ({"age": 12.0, "path": None}, "age 12"),
        ({"age": 0.5}, "age 0.5"),
        ({"age": 18.0}, ""),
        ({"path": None}, "no such file"),
        ({"path": None, "file_name": ""}, "no file name"),
    ],
)
def test_one_rule_each_in_a_fixed_order(change, reason):
    table = rows(change)
    chosen = select(table, SelectionConfig(), 0)
    assert chosen["reason"].tolist() == [reason]
    assert "reason" not in table and chosen[table.columns.tolist()].equals(table)


def test_unknown_may_be_left_out():
    config = SelectionConfig(unknown_age="leave", unknown_view="leave", devices="keep", least_age=0)
    table = rows(
        {"age": np.nan, "age_said": "60s"},
        {"age": np.nan},
        {"view": "unknown", "view_said": "odd"},
        {"view": "unknown", "view_said": ""},
        {"devices": True},
        {"age": 1.0},
    )
    expected = ["age unknown (60s)", "age unknown", "view unknown (odd)", "view unknown", "", ""]
    assert select(table, config, 0)["reason"].tolist() == expected


def test_odd_metadata_are_told_in_one_line_each(caplog):
    caplog.set_level(logging.INFO)
    table = rows(
        {"age": np.nan, "age_said": "60s"}, {"age": np.nan, "age_said": "old"}, {"view": "unknown", "view_said": "odd"}
    )
    select(table, SelectionConfig(), 0)
    assert caplog.messages == [
        "unreadable ages count as unknown: 2, the first is '60s' (t.csv, row 2)",
        "unreadable views count as unknown: 1, the first is 'odd' (t.csv, row 4)",
    ]


def test_draw_is_last_and_of_each_collection_that_has_normals_alone():
    table = rows(*[{}] * 7, *normals(20), *normals(5, age=4.0), *normals(4, "CheXpert"))
    chosen = select(table, SelectionConfig(normals=5), seed=3)
    assert chosen[chosen["reason"] == ""].groupby("collection").size().to_dict() == {"CheXpert": 4, "NIH": 5, "home": 7}
    assert (chosen["reason"] == "not drawn").sum() == 15 and (chosen["reason"] == "age 4").sum() == 5
    assert chosen["reason"].equals(select(table, SelectionConfig(normals=5), seed=3)["reason"])
    assert not chosen["reason"].equals(select(table, SelectionConfig(normals=5), seed=4)["reason"])
    assert select(table, SelectionConfig(normals=0), seed=3)["reason"].eq("").sum() == 31
    alone = select(table[table["collection"] != "CheXpert"], SelectionConfig(normals=5), seed=3)
    assert alone["reason"].equals(chosen.loc[alone.index, "reason"])


@pytest.fixture(scope="module")
def films():
    rng = np.random.default_rng(0)
    blobs = [
        cv2.resize(rng.integers(0, 256, (9, 9), dtype=np.uint8), (128, 128), interpolation=cv2.INTER_CUBIC)
        for _ in range(12)
    ]
    return np.stack(blobs)


def encoded(image, quality):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def test_copies_are_found_and_others_are_not(films):
    small = cv2.resize(cv2.resize(films[3], (70, 70), interpolation=cv2.INTER_AREA), (128, 128))
    dark = (255 * (films[5] / 255) ** 1.1).astype(np.uint8)
    images = np.concatenate([films, [encoded(films[0], 40), small, dark, films[7]]])
    pairs = find_duplicates(images, SelectionConfig().duplicates)
    assert list(zip(pairs["a"], pairs["b"], strict=True)) == [(0, 12), (3, 13), (5, 14), (7, 15)]
    assert pairs["distance"].iloc[3] == 0 and pairs["distance"].max() <= SelectionConfig().duplicates
    equal = find_duplicates(images, 0)
    assert (7, 15) in set(zip(equal["a"], equal["b"], strict=True)) and (equal["distance"] == 0).all()


def test_distance_is_imagehash_s(films):
    pairs = find_duplicates(iter(films[:4]), 1.0)
    hashes = [imagehash.phash(Image.fromarray(image), 16) for image in films[:4]]
    assert len(pairs) == 6 and (pairs["a"] < pairs["b"]).all()
    for a, b, distance in pairs.itertuples(index=False):
        assert distance == (hashes[a] - hashes[b]) / 256


def test_no_image_and_one(films):
    assert len(find_duplicates(np.zeros((0, 8, 8), np.uint8), 0.1)) == 0 == len(find_duplicates(films[:1], 0.1))


def linked(*pairs):
    return pd.DataFrame(pairs, columns=["a", "b"]).assign(distance=0.0)


def test_first_of_home_stays_and_patients_are_united():
    table = select(rows(*normals(1), {"patient_id": "home z"}, {}, {"patient_id": "home z"}, {}), SelectionConfig(), 0)
    dropped = drop_duplicates(table, linked((0, 1), (0, 2)))
    assert dropped["reason"].tolist() == ["same image as i1 (home)", "", "same image as i1 (home)", "", ""]
    assert dropped["patient_id"].tolist() == ["NIH 0", "NIH 0", "NIH 0", "NIH 0", "home 4"]  # also in their other rows
    assert (table["reason"] == "").all() and drop_duplicates(table, linked()).equals(table)


def test_patients_are_united_across_groups():
    table = select(rows(*[{"patient_id": f"home {p}"} for p in "ababcd"]), SelectionConfig(), 0)
    dropped = drop_duplicates(table, linked((0, 1), (3, 4)))
    assert dropped["patient_id"].tolist() == ["home a"] * 5 + ["home d"]
    assert (dropped["reason"] == "").tolist() == [True, False, True, True, False, True]


def test_a_group_that_disagrees_goes_whole():
    table = select(rows({}, {"label": 1}, {}, {}), SelectionConfig(), 0)
    dropped = drop_duplicates(table, linked((0, 1), (2, 1)))
    assert dropped["reason"].tolist() == ["same image with another label"] * 3 + [""]
