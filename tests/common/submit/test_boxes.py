"""Strings of boxes read, repaired and checked, compared with a reading token by token."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.submit.boxes import EDGE, find_faults, read_entries, repair_entries


def rows_of(entries):
    columns = entries.row, entries.class_id, entries.score, *entries.boxes.T
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_entries_know_their_row_and_number():
    entries = read_entries(["14 1 0 0 1 1", "", "3 .5 1 2 3 4  7\t1e-05 0 0 5.25 6\n", " 0 1 0 0 2 2 "])
    assert rows_of(entries) == [
        (0, 14, 1, 0, 0, 1, 1),
        (2, 3, 0.5, 1, 2, 3, 4),
        (2, 7, 1e-5, 0, 0, 5.25, 6),
        (3, 0, 1, 0, 0, 2, 2),
    ]
    assert entries.number.tolist() == [1, 1, 2, 1] and entries.plain.all() and not entries.unread
    assert entries.row.dtype == entries.number.dtype == np.int64
    assert find_faults(entries) == {
        1: "0 values, but every row needs entries of six: class score x_min y_min x_max y_max"
    }
    assert find_faults(entries, blank=True) == {}


def test_no_strings_and_no_entries():
    for texts in ([], [""], ["x"]):
        entries = read_entries(texts)
        assert entries.boxes.shape == (0, 4) and len(entries.row) == len(entries.plain) == 0
        assert repair_entries(entries)[1] == []


def slow_fault(text, size=None, n_classes=15, no_finding=14):
    """What is wrong with a string, entry by entry, token by token; "" for nothing."""
    number = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
    tokens = text.split()
    if not tokens or len(tokens) % 6:
        return "values"
    entries = [tokens[k : k + 6] for k in range(0, len(tokens), 6)]
    for k, entry in enumerate(entries, start=1):
        if not all(number.fullmatch(token) for token in entry):
            return f"entry {k} not a number"
    for k, (label, *rest) in enumerate(entries, start=1):
        score, *box = map(float, rest)
        if not re.fullmatch("[0-9]+", label) or int(label) >= n_classes:
            return f"entry {k} class"
        if not 0 <= score <= 1:
            return f"entry {k} score"
        if int(label) == no_finding:
            if box != [0, 0, 1, 1]:
                return f"entry {k} no finding"
            continue
        width, height = size or (1e6, 1e6)
        x_min, y_min, x_max, y_max = box
        if not (0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height):
            return f"entry {k} box"
    return ""


TOKEN = st.sampled_from(
    ["0", "1", "2", "14", "15", "0.5", "1.0", "-1", "30", "30.5", "1e1", "+3", ".5", "5.", "1e999", "-0", "3.0", "-0.5"]
)
ODD = st.sampled_from(["nan", "inf", "1_0", "e5", "1e", "--1", "0x1", "1,5", "", "٣", "1.5.5", "1-2"])
GOOD = st.sampled_from(["14 1 0 0 1 1", "3 0.5 0 0 10 20", "13 1 1 1 30 40", "0 0 0.5 2 9 3"])
MIXED = st.lists(TOKEN, min_size=6, max_size=6) | st.lists(TOKEN | ODD)
ENTRY = st.one_of(GOOD, GOOD, MIXED.map(" ".join))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(ENTRY, max_size=4).map("  ".join), max_size=4), st.booleans())
def test_faults_are_those_of_a_reading_token_by_token(texts, sized):
    pixels = np.tile([30.0, 40.0], (len(texts), 1)) if sized else None
    found = find_faults(read_entries(texts), pixels=pixels)
    slow = {row: slow_fault(text, (30, 40) if sized else None) for row, text in enumerate(texts)}
    assert list(found) == [row for row, fault in slow.items() if fault]
    for row, said in found.items():
        words = {
            "values": "values, but",
            "number": "not a number",
            "class": "the class must",
            "score": "the score",
            "finding": "has the box 0 0 1 1",
            "box": "the box must",
        }
        assert words[slow[row].split()[-1]] in said
        assert said.startswith(" ".join(slow[row].split()[:2])) or slow[row] == "values"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(ENTRY, max_size=4).map("  ".join), max_size=4), st.booleans())
def test_repairs_are_final_and_change_nothing_right(texts, sized):
    pixels = np.tile([30.0, 40.0], (len(texts), 1)) if sized else None
    entries = read_entries(texts)
    again, notes = repair_entries(entries, pixels=pixels)
    if not find_faults(entries, pixels=pixels, blank=True) and entries.class_id.tolist().count(14) <= 1:
        assert notes == [] and rows_of(again) == rows_of(entries)
    assert repair_entries(again, pixels=pixels)[1] == []
    faults = find_faults(again, pixels=pixels, blank=True)
    assert set(faults) <= set(find_faults(entries, pixels=pixels, blank=True))


SIZE = np.array([[100.0, 50.0]])


@pytest.mark.parametrize(
    ("text", "kept", "note"),
    [
        ("3.0 1 0 0 2 2", [(3, 1, 0, 0, 2, 2)], "1 class ids not in plain digits (first in row 2)"),
        ("0.0 1 0 0 2 2", [(0, 1, 0, 0, 2, 2)], "1 class ids not in plain digits (first in row 2)"),
        ("3 1.0000001 0 0 2 2", [(3, 1, 0, 0, 2, 2)], "1 scores rounded into 0 to 1"),
        ("3 -1e-9 0 0 2 2 4 1 0 0 2 2", [(3, 0, 0, 0, 2, 2), (4, 1, 0, 0, 2, 2)], "1 scores rounded into 0 to 1"),
        ("3 1 -0.1 -1 2 2", [(3, 1, 0, 0, 2, 2)], "1 boxes cut at the edge"),
        ("3 1 9 9 101 51", [(3, 1, 9, 9, 100, 50)], "1 boxes cut at the edge"),
        ("3 1 -0.5 0 -0.1 9 4 1 0 0 2 2", [(4, 1, 0, 0, 2, 2)], "1 boxes without area left out"),
        ("3 1 5 5 5 9", [], "1 boxes without area left out"),
        ("3 1 2 5 9 5", [], "1 boxes without area left out"),
        ("14 0.2 0 0 1 1 14 0.7 0 0 1 1 14 0.7 0 0 1 1", [(14, 0.7, 0, 0, 1, 1)], "2 further entries of class 14"),
    ],
)
def test_repairs(text, kept, note):
    entries, notes = repair_entries(read_entries([text]), pixels=SIZE)
    assert [row[1:] for row in rows_of(entries)] == kept and any(said.startswith(note) for said in notes)
    assert find_faults(entries, pixels=SIZE, blank=True) == {}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("3.5 1 0 0 2 2", "the class must be 0 to 14"),
        ("-1 1 0 0 2 2", "the class must be 0 to 14"),
        ("15.0 1 0 0 2 2", "the class must be 0 to 14"),
        ("3 1.0001 0 0 2 2", "the score must lie in 0 to 1"),
        ("3 1 -1.01 0 2 2", "within 100 x 50 pixels"),
        ("3 1 0 0 2 51.01", "within 100 x 50 pixels"),
        ("3 1 101.5 0 102 5", "within 100 x 50 pixels"),
        ("3 1 2 0 1 5", "the box must"),
        ("3 1 9 5 2 5", "the box must"),  # inverted in x, without area in y
        ("3 1 9 -0.5 2 5", "the box must"),
        ("3 1 0.5 0 -0.5 5", "the box must"),
        ("14 1 0 0 1 1 14 0.5 0 0 2 2", "class 14 (no finding) has the box 0 0 1 1"),
    ],
)
def test_what_is_wrong_stays_wrong(text, fault):
    entries, _ = repair_entries(read_entries(["14 1 0 0 1 1", text]), pixels=np.repeat(SIZE, 2, axis=0))
    found = find_faults(entries, pixels=np.repeat(SIZE, 2, axis=0), blank=True)
    assert list(found) == [1] and fault in found[1]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("3 1 0 0 2 2 3 x 0 0 2 2 3 1 0 0 2 2", "entry 2 (3 x 0 0 2 2): not a number"),
        (f"3 1 0 0 2 {'x' * 99}", f"entry 1 (3 1 0 0 2 {'x' * 70}): not a number"),  # 80 characters
        ("15 1 0 0 101 1", "entry 1 (15 1 0 0 101 1): the class must be 0 to 14"),
        ("3 2 0 0 101 1", "entry 1 (3 2 0 0 101 1): the score must lie in 0 to 1"),
        ("14 1 0 0 2 2", "entry 1 (14 1 0 0 2 2): class 14 (no finding) has the box 0 0 1 1"),
        (
            "3 1 0 0 101 1 15 1 0 0 1 1",
            "entry 1 (3 1 0 0 101 1): the box must have x_min < x_max and y_min < y_max, from 0 on "
            "within 100 x 50 pixels",
        ),
    ],
)
def test_a_fault_is_the_first_of_its_row_with_the_text_of_its_entry(text, fault):
    assert find_faults(read_entries([text, "3 2 0 0 1 1"]), pixels=np.repeat(SIZE, 2, axis=0))[0] == fault


def test_without_sizes_zero_is_the_only_known_edge():
    entries, notes = repair_entries(read_entries(["3 1 -1 0 1e6 9", "3 1 -1.1 0 5 9"]))
    assert rows_of(entries)[0] == (0, 3, 1, 0, 0, 1e6, 9) and len(notes) == 1 and EDGE == 1
    assert list(find_faults(entries)) == [1]
    far = find_faults(repair_entries(read_entries(["3 1 0 0 1e300 9"]))[0])
    assert far[0].endswith("from 0 on within 1000000 x 1000000 pixels")


def test_an_error_names_the_entry_of_the_file_after_others_were_left_out():
    entries, _ = repair_entries(read_entries(["3 1 5 5 5 9 3 2 0 0 1 1"]))
    assert find_faults(entries) == {0: "entry 2 (3 2 0 0 1 1): the score must lie in 0 to 1"}
