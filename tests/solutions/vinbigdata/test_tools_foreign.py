"""Other people's submissions: what is accepted and said, and what is refused."""

import logging

import pandas as pd
import pytest

from common.errors import InputError
from common.post.fusion import COLUMNS
from solutions.vinbigdata.postprocess import parse_predictions

PLAIN = "image_id,PredictionString\na,7 0.5 10 20 30 40 14 0.25 0 0 1 1\nb,14 1 0 0 1 1\n"
A = [("a", 7, 0.5, 10, 20, 30, 40), ("a", 14, 0.25, 0, 0, 1, 1)]
B = [("b", 14, 1, 0, 0, 1, 1)]
SIZES = pd.DataFrame({"image_id": ["a", "b"], "width": [30, 9], "height": [40, 9]})


def rows_of(found):
    return [tuple(row) for row in found[COLUMNS].itertuples(index=False)]


@pytest.fixture
def parse(tmp_path, caplog):
    """`parse(text)`: the detections of a file, and what was said of it."""
    caplog.set_level(logging.INFO)

    def run(text, images=None, **options):
        path = tmp_path / "s.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        caplog.clear()
        found = rows_of(parse_predictions(path, images, **options))
        return found, [record.message.removeprefix(f"{path}: accepted, ") for record in caplog.records]

    return run


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + PLAIN.encode(),
        PLAIN.replace("\n", "\r\n"),
        PLAIN + "\n\n",
        PLAIN.replace("a,", '"a","').replace("1 1\nb", '1 1"\nb'),
        PLAIN.replace(" ", "   ").replace("1 1\n", "1 1  \n"),
        PLAIN.replace(",", ", ").replace(" 20 ", "\t20 "),
        PLAIN.replace("0.5", "5e-1").replace("0 0 1 1", "0.0 0.0 1.0 1.0").replace(" 10 ", " +10.000 "),
    ],
)
def test_other_spellings_of_the_same_say_nothing(parse, text):
    assert parse(text) == (A + B, [])


@pytest.mark.parametrize(
    ("old", "new", "expected", "said"),
    [
        ("a,7 0.5 10", "a,7.0 0.5 10", A, "1 class ids not in plain digits (first in row 2)"),
        ("b,14 1", "b,14 1.0000001", A, "1 scores rounded into 0 to 1 (first in row 3)"),
        ("b,14 1 ", "b,14 1e-05 ", A, None),
        ("b,14 1 0 0 1 1", "b,", A, "1 blank rows (the first is row 3)"),
        (
            "0.25 0 0 1 1",
            "0.25 0 0 1 1 14 0.125 0 0 1 1",
            A,
            "1 further entries of class 14 left out, the highest of a row stays (first in row 2)",
        ),
        ("0.25 0 0 1 1", "0.25 0 0 1 1 3 0.9 5 6 5 9", A, "1 boxes without area left out (first in row 2)"),
    ],
)
def test_what_is_accepted_is_said_in_one_line(parse, old, new, expected, said):
    found, lines = parse(PLAIN.replace(old, new))
    assert found[:2] == expected and lines == ([] if said is None else [said])
    assert found[2:] == [("b", 14, 1e-5 if "e-05" in new else 1, 0, 0, 1, 1)] * ("blank" not in (said or ""))


def test_boxes_just_over_the_edge_are_cut(parse):
    text = PLAIN.replace("10 20 30 40", "-0.1 20 30.9 41")
    cut = "1 boxes cut at the edge of their image, which they passed by up to 1 pixel (first in row 2)"
    assert parse(text, SIZES) == ([("a", 7, 0.5, 0, 20, 30, 40), *A[1:], *B], [cut])
    assert parse(text) == ([("a", 7, 0.5, 0, 20, 30.9, 41), *A[1:], *B], [cut])  # the far edges are not known
    for far in ("-1.1 20 30 40", "10 -1.1 30 40"):
        with pytest.raises(InputError, match=rf"s.csv, row 2 \(a\): entry 1 \(7 0.5 {far}\): the box must .* 0 on$"):
            parse(PLAIN.replace("10 20 30 40", far))
    with pytest.raises(InputError, match="from 0 on within 30 x 40 pixels"):
        parse(PLAIN.replace("10 20 30 40", "10 20 31.1 40"), SIZES)


def test_all_that_is_accepted_is_one_line(parse):
    text = ",image_id,PredictionString,note\n0,a,7.0 0.5 -0.5 20 30 40 7.0 1.0000002 1 1 2 2,x\n1,b,,y\n"
    found, lines = parse(text)
    assert found == [("a", 7, 0.5, 0, 20, 30, 40), ("a", 7, 1, 1, 1, 2, 2)]
    assert lines == [
        "2 class ids not in plain digits (first in row 2); 1 scores rounded into 0 to 1 (first in row 2); "
        "1 boxes cut at the edge of their image, which they passed by up to 1 pixel (first in row 2); "
        "1 blank rows (the first is row 3); ignored columns: , note"
    ]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("b,", "a,", r"row 3 \(a\): a second row of this image, the first is row 2"),
        ("image_id,", "ImageID,", "row 1: the header must have image_id,PredictionString: ImageID,PredictionString"),
        ("a,7", "a,7.5", r"row 2 \(a\): entry 1 \(7.5 0.5 10 20 30 40\): the class must be 0 to 14"),
        ("b,14 1", "b,14 1.01", r"row 3 \(b\): entry 1 .*: the score must lie in 0 to 1"),
        ("b,14 1", "b,None 1", r"row 3 \(b\): entry 1 \(None 1 0 0 1 1\): not a number"),
        ("b,14 1", "b,14 1 1", r"row 3 \(b\): 7 values, but every row needs"),
        ("b,14 1 0 0 1 1", "b,14 1 0 0 50 50", r"row 3 \(b\): entry 1 .*: class 14 \(no finding\) has the box 0 0 1 1"),
        ("0 0 1 1\nb", "0 0 1 1,8\nb", "row 2: 3 values where the header has 2 columns"),
        ("b,14 1 0 0 1 1", "b,7 0.5 30 20 10 40", r"row 3 \(b\): entry 1 .*: the box must have x_min < x_max"),
        ("b,14 1 0 0 1 1", "b,7 0.5 1 1 nan 4", r"row 3 \(b\): entry 1 .*: not a number"),
        ("b,14 1 0 0 1 1", "b,0.5 7 1 1 4 4", r"row 3 \(b\): entry 1 .*: the class must be 0 to 14"),
        ("0 0 1 1\nb", "0 0 1 1 7 0.5 -2 0 1 1\nb", r"row 2 \(a\): entry 3 .*: the box must .* from 0 on$"),
        (",", ";", "row 1: the header must have image_id,PredictionString: image_id;PredictionString"),
        (PLAIN[26:], "", "no rows under its header"),
    ],
)
def test_what_is_wrong_is_refused_by_row(parse, old, new, reason):
    with pytest.raises(InputError, match=f"s.csv(, |: ){reason}") as caught:
        parse(PLAIN.replace(old, new))
    assert "\n" not in str(caught.value)


def test_the_images_are_those_of_the_first(parse):
    turned = "image_id,PredictionString\n" + "\n".join(PLAIN.split("\n")[2:0:-1]) + "\n"
    assert parse(turned, ids=["a", "b"]) == (B + A, [])
    with pytest.raises(InputError, match=r"s.csv, no row for c \(row 4 of one.csv\)"):
        parse(PLAIN, ids=["a", "b", "c"], source="one.csv")
    with pytest.raises(InputError, match=r"s.csv, row 3 \('b'\): one.csv has no such image"):
        parse(PLAIN, ids=["a"], source="one.csv")
