import gzip
import sys

import pandas as pd
import pytest

from common.errors import InputError
from common.submit.table import CELL, read_table, write_submission


@pytest.fixture
def csv_file(tmp_path):
    def write(text):
        path = tmp_path / "table.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_header_and_values_lose_their_blanks_and_stay_text(csv_file):
    table = read_table(csv_file("ImageId, EncodedPixels\na, -1\nb,\nc,NA\nd, 007 1\n"), ["ImageId", "EncodedPixels"])
    assert list(table["EncodedPixels"]) == ["-1", "", "NA", "007 1"]
    assert list(table.columns) == ["ImageId", "EncodedPixels"]


def test_byte_order_mark_crlf_and_trailing_blank_lines(csv_file):
    table = read_table(csv_file(b"\xef\xbb\xbfid,x\r\na,1\r\n\r\n \r\n"), ["id", "x"])
    assert table.to_dict("list") == {"id": ["a"], "x": ["1"]}


def test_gzip(tmp_path):
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write("id,x\na,1\n")
    assert read_table(tmp_path / "t.csv.gz")["x"].tolist() == ["1"]


def test_small_compressed_tables_of_many_cells_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("common.submit.table.LARGEST_TABLE", 500_000)
    for text, n in (("\n", 1000), ("," * 99 + "\n", 20), ("x" * 999 + "\n", 100), ("😀" * 249 + "\n", 100)):
        plain, packed = tmp_path / "t.csv", tmp_path / "t.csv.gz"
        plain.write_text("id\n1\n" + text * n)
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        with pytest.raises(InputError, match=r"t\.csv\.gz: too much text for a table"):
            read_table(packed)
        if text == "\n":  # a file of its full size is trusted with five times as much
            assert read_table(plain)["id"].tolist() == ["1"]


def test_field_longer_than_the_csv_default(csv_file):
    rle = " ".join(["3 1"] * 50_000)
    assert read_table(csv_file(f"id,x\na,{rle}\n"))["x"][0] == rle


def test_extra_columns_are_dropped_only_when_allowed(csv_file):
    path = csv_file("x,id,y\n1,a,2\n")
    assert read_table(path, ["id", "x"], exact=False).to_dict("list") == {"id": ["a"], "x": ["1"]}
    with pytest.raises(InputError, match="row 1: the header must be id,x"):
        read_table(path, ["id", "x"])


def test_a_header_alone_gives_no_rows(csv_file):
    assert read_table(csv_file("id,x\n"), ["id", "x"]).shape == (0, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "table.csv: empty file"),
        ("\n\n", "table.csv: empty file"),
        ("id,y\na,1\n", r"row 1: the header must be id,x: id,y"),
        ("x,id\n1,a\n", r"row 1: the header must be id,x"),
        ("id,id\na,1\n", r"row 1: a column name is repeated"),
        ("id,x\na,1\nb\n", r"row 3: 1 values where the header has 2 columns"),
        ("id,x\na,1,2\n", r"row 2: 3 values"),
        ("id,x\n\na,1\n", r"row 2: 0 values"),
        ('id,x\na,"1\n', "not a CSV file"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not a CSV file"),
        (b"PK\x03\x04\0\0\0", "not a CSV file but a ZIP archive or an Excel file"),
        (b"\x1f\x8b\x08\0", r"a gzip file; unpack it, or let its name end in \.csv\.gz"),
        ("\n <!DOCTYPE html>\n<html>", "a web page, perhaps one that asks to log in"),
        ("id,x\na,1\n".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        ("\n , \nid,x\na,1\n", "table.csv: blank lines before row 3; delete them"),
    ],
)
def test_wrong_files_are_named(csv_file, text, message):
    with pytest.raises(InputError, match=message) as error:
        read_table(csv_file(text), ["id", "x"])
    assert "table.csv" in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(InputError, match="a folder, not a CSV file"):
        read_table(tmp_path)


def test_the_text_of_a_table_is_limited(csv_file, monkeypatch):
    whole = sum(sys.getsizeof(line) + 2 * CELL for line in ("id,x\n", "a,1234\n"))
    monkeypatch.setattr("common.submit.table.LARGEST_TABLE", whole)
    monkeypatch.setattr("common.submit.table.LONGEST_LINE", 9)
    assert read_table(csv_file("id,x\na,1234\n"))["x"].tolist() == ["1234"]
    with pytest.raises(InputError, match=r"table\.csv: too much text"):
        read_table(csv_file("id,x\na,12345\n"))
    monkeypatch.setattr("common.submit.table.LARGEST_TABLE", 10 * whole)
    assert read_table(csv_file("id,x\na,12345\n"))["x"].tolist() == ["12345"]  # 8 characters in a line
    with pytest.raises(InputError, match=r"table\.csv: too much text"):
        read_table(csv_file("id,x\na,123456\n"))


def test_write_is_exact_and_reads_back(tmp_path):
    frame = pd.DataFrame({"ImageId": ["b", "a"], "EncodedPixels": ["-1", "0 3"]}, index=[7, 3])
    write_submission(tmp_path / "out" / "submission.csv", frame)
    assert (tmp_path / "out" / "submission.csv").read_bytes() == b"ImageId,EncodedPixels\nb,-1\na,0 3\n"
    pd.testing.assert_frame_equal(
        read_table(tmp_path / "out" / "submission.csv"), frame.reset_index(drop=True).astype(str)
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["submission.csv"]


def test_write_refuses_missing_values_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text("old")
    with pytest.raises(InputError, match="row 3: no value for x"):
        write_submission(path, pd.DataFrame({"id": ["a", "b"], "x": ["1", None]}))
    assert path.read_text() == "old"
