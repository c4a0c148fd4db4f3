import numpy as np
import pandas as pd
import pytest

from benchmarks.tables import label_table
from common.errors import InputError
from common.post.rle import ABSOLUTE, RELATIVE, encode
from common.submit.table import read_table, write_submission
from common.submit.validate import validate_boxes, validate_masks, validate_probabilities, validate_shaped_masks


@pytest.fixture
def check(tmp_path):
    """Write rows below the sample's header and validate them against the ids a, b, c."""

    def run(validate, rows, header="ImageId,EncodedPixels", ids="abc", **options):
        sample, path = tmp_path / "sample_submission.csv", tmp_path / "submission.csv"
        blanks = "," * header.count(",")
        sample.write_text("\n".join([header, *(i + blanks for i in ids)]) + "\n")
        path.write_text("\n".join([header, *rows]) + "\n")
        return validate(path, sample, **options)

    return run


def test_masks_are_counted(check):
    # On 4 x 3 pixels: 2 + 3 pixels in a, the last column (8 … 11) in c.
    summary = check(validate_masks, ["a,0 2 3 3", "b,-1", "c,8 4"], shape=(4, 3))
    assert (summary.rows, summary.positives, summary.amount, summary.unit) == (3, 2, 9, "pixels")
    assert "3 rows, 2 positive (66.7%), 9 pixels" in str(summary)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,-1", "b,-1"], r"no row for c \(row 4 of the sample"),
        (["a,-1", "b,-1", "a,0 1", "c,-1"], r"row 4 \(a\): a second row of this image, the first is row 2"),
        (["a,-1", "b,-1", "d,-1", "c,-1"], r"row 4 \('d'\): the sample submission has no such image"),
        (["a,-1", "b,", "c,-1"], r"row 3 \(b\): .*blank"),
        (["a,-1", "b,0 x", "c,-1"], r"row 3 \(b\): "),
        (["a,-1", "b,0 1.5", "c,-1"], r"row 3 \(b\): "),
        (["a,-1", "b,0 1 2", "c,-1"], r"row 3 \(b\): .*odd"),
        (["a,-1", "b,8 5", "c,-1"], r"row 3 \(b\): .*last pixel"),
        (["a,-1", "b,-1", "c,99999999999999999999 1"], r"row 4 \(c\): "),
        (["a,-1", "b,1 0", "c,-1"], r"row 3 \(b\): .*length 0"),
        (["a,-1", "b,1 1 -1 1", "c,-1"], r"row 3 \(b\): "),
        (["a,-1", "b,1 1 0 1", "c,-1"], r"row 3 \(b\): decoding and encoding"),
        (["a,-1", "b,01 1", "c,-1"], r"row 3 \(b\): decoding and encoding"),
        (["a,-1", "b,1  1", "c,-1"], r"row 3 \(b\): decoding and encoding"),
        (["a,", "b,1", "c,"], r"row 2 \(a\): .*\(and 2 further problems\)"),
    ],
)
def test_wrong_masks_are_refused_by_row(check, rows, message):
    with pytest.raises(InputError, match=message) as error:
        check(validate_masks, rows, shape=(4, 3))
    assert str(error.value).count("\n") == 0 and "submission.csv, " in str(error.value)


SIZES = pd.DataFrame({"image_id": ["a", "b"], "width": [3, 4], "height": [4, 2]})


def shaped(folder, rows, form=ABSOLUTE, header="image_id,width,height,rle"):
    (folder / "submission.csv").write_text("\n".join([header, *rows]) + "\n")
    return validate_shaped_masks(folder / "submission.csv", SIZES, form)


def test_masks_of_any_size_are_counted(tmp_path):
    summary = shaped(tmp_path, ["a,3,4,2 3 9 4", "b,4,2,-1"])  # pixels count from 1, down the columns
    assert (summary.rows, summary.positives, summary.amount, summary.unit) == (2, 1, 7, "pixels")
    assert shaped(tmp_path, ["a,3,4,0 12", "b,4,2,0 8"], RELATIVE).amount == 20
    rng = np.random.default_rng(0)
    masks = [rng.random((4, 3)) < 0.5, rng.random((2, 4)) < 0.5]
    rows = [f"{i},{m.shape[1]},{m.shape[0]},{encode(m, ABSOLUTE)}" for i, m in zip("ab", masks, strict=True)]
    assert shaped(tmp_path, rows).amount == sum(mask.sum() for mask in masks)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,3,4,-1"], "1 rows for 2 images"),
        (["a,3,4,-1", "b,4,2,-1", "b,4,2,-1"], "3 rows for 2 images"),
        (["b,4,2,-1", "a,3,4,-1"], r"row 2 \(b\): expected a here \(and 1 further"),
        (["a,4,3,-1", "b,4,2,-1"], r"row 2 \(a\): 4 × 3 pixels, but the image has 3 × 4"),
        (["a,3,4,-1", "b,4.0,2,-1"], r"row 3 \(b\): 4.0 × 2 pixels"),
        (["a,3,4,-1", "b,4,2,8 2"], r"row 3 \(b\): .*last pixel of 2 x 4"),
        (["a,3,4,0 2", "b,4,2,-1"], r"row 2 \(a\): .*starts count from 1"),
        (["a,3,4,1 2 3", "b,4,2,x"], r"row 2 \(a\): .*odd.*\(and 1 further"),
    ],
)
def test_wrong_masks_of_any_size_are_refused_by_row(rows, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        shaped(tmp_path, rows)
    assert str(error.value).count("\n") == 0 and "submission.csv" in str(error.value)


def test_the_table_of_masks_of_any_size_has_four_columns(tmp_path):
    with pytest.raises(InputError, match="row 1: the header must be image_id,width,height,rle"):
        shaped(tmp_path, ["a,-1", "b,-1"], header="image_id,rle")


def test_header_must_be_the_samples(check, tmp_path):
    check(validate_masks, ["a,-1", "b,-1", "c,-1"])
    (tmp_path / "submission.csv").write_text("id,EncodedPixels\na,-1\nb,-1\nc,-1\n")
    with pytest.raises(InputError, match="row 1: the header must be ImageId,EncodedPixels"):
        validate_masks(tmp_path / "submission.csv", tmp_path / "sample_submission.csv")
    (tmp_path / "sample_submission.csv").write_text("ImageId,EncodedPixels\n")
    with pytest.raises(InputError, match="a sample submission has ids"):
        validate_masks(tmp_path / "submission.csv", tmp_path / "sample_submission.csv")


def test_boxes_left_in_0_to_1_are_refused(tmp_path):
    texts = [f"{k % 14} 0.5 {k} 10 190.5 80 14 0.2 0 0 1 1" for k in range(120)]
    path, rows = (
        tmp_path / "a.csv",
        pd.DataFrame({"image_id": [f"i{k}" for k in range(120)], "PredictionString": texts}),
    )
    for k, small in ((7, "0 0.9 0.31 0.55 0.74 0.73"), (30, "1 0.9 0 0 0.5 1")):
        rows.loc[k, "PredictionString"] = f"{small} {texts[k]}"
        write_submission(path, rows)
        if k == 7:  # one of 121: cut at the corner of its image
            assert validate_boxes(path, rows).amount == 121
    with pytest.raises(InputError, match=r"a\.csv, row 9 \(i7\): entry 1 \(0 0\.9 0\.31 .*\): .* in pixels"):
        validate_boxes(path, rows)


def test_order_matters_only_when_asked(check):
    rows = ["b,-1", "a,-1", "c,-1"]
    assert check(validate_masks, rows).rows == 3
    with pytest.raises(InputError, match=r"row 2 \(b\): the sample submission has a here \(and 1 further"):
        check(validate_masks, rows, ordered=True)


def test_a_sample_with_repeated_ids_asks_for_one_row_each(check):
    assert check(validate_masks, ["a,-1", "b,-1"], ids="aab").rows == 2


def test_written_masks_of_every_kind_pass(tmp_path):
    rng = np.random.default_rng(0)
    masks = [np.zeros((64, 48), bool), np.ones((64, 48), bool), *(rng.random((20, 64, 48)) < 0.3)]
    ids = [f"1.2.{i}" for i in range(len(masks))]
    write_submission(tmp_path / "sample.csv", pd.DataFrame({"ImageId": ids, "EncodedPixels": "-1"}))
    frame = pd.DataFrame({"ImageId": ids, "EncodedPixels": [encode(mask.astype(np.uint8)) for mask in masks]})
    write_submission(tmp_path / "submission.csv", frame)
    summary = validate_masks(tmp_path / "submission.csv", tmp_path / "sample.csv", shape=(64, 48), ordered=True)
    assert (summary.positives, summary.amount) == (21, sum(int(mask.sum()) for mask in masks))


def test_the_competitions_own_masks_pass(tmp_path):
    path = label_table("siim-pneumothorax-train-rle.csv.gz")
    if path is None:
        pytest.skip("needs the label tables of torchxrayvision")
    table = read_table(path).iloc[:, :2]
    table = table[~table.iloc[:, 0].duplicated()].head(2000)
    write_submission(tmp_path / "submission.csv", table)
    summary = validate_masks(tmp_path / "submission.csv", tmp_path / "submission.csv")
    assert summary.rows == 2000 and summary.positives == (table.iloc[:, 1] != "-1").sum() > 0


BOXES = "image_id,PredictionString"


def test_boxes_are_counted(check):
    rows = ["a,14 1 0 0 1 1", "b,3 0.5 0 10.5 20 40 14 0.25 0 0 1 1", "c,0 1e-3 1 1 2 2 0 1 1 1 30 40"]
    summary = check(validate_boxes, rows, BOXES, sizes={i: (30, 40) for i in "abc"})
    assert (summary.rows, summary.positives, summary.amount, summary.unit) == (3, 2, 3, "boxes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 values"),
        ("14 1 0 0 1", "5 values"),
        ("15 1 0 0 1 1", "class must be 0 to 14"),
        ("-1 1 0 0 1 1", "class must be 0 to 14"),
        ("3.0 1 0 0 1 1", "class must be 0 to 14"),
        ("3 1.01 0 0 1 1", "the score"),
        ("3 1.0000005 0 0 1 1", "the score"),
        ("3 -1e-9 0 0 1 1", "the score"),
        ("3 nan 0 0 1 1", "not a number"),
        ("3 1 0 0 inf 1", "not a number"),
        ("3 1 0 0 1_0 1", "not a number"),
        ("3 1 0 0 1e999 1", "the box must"),
        ("3 1 5 0 5 1", "the box must"),
        ("3 1 5 8 9 7", "the box must"),
        ("3 1 -1 0 5 5", "the box must"),
        ("3 1 0 0 31 5", "within 30 x 40 pixels"),
        ("14 1 0 0 30 40", "no finding"),
        ("3 1 0 0 5 5 14 1 0 0 2 2", "entry 2 .*no finding"),
    ],
)
def test_wrong_boxes_are_refused_by_row(check, text, message):
    with pytest.raises(InputError, match=rf"row 3 \(b\): .*{message}"):
        check(
            validate_boxes,
            ["a,14 1 0 0 1 1", f"b,{text}", "c,14 1 0 0 1 1"],
            BOXES,
            sizes=dict.fromkeys("abc", (30, 40)),
        )


def test_boxes_need_sizes_of_all_images_where_sizes_are_given(check):
    with pytest.raises(InputError, match=r"row 4 \(c\): no width and height"):
        check(validate_boxes, [f"{i},14 1 0 0 1 1" for i in "abc"], BOXES, sizes={"a": (3, 3), "b": (3, 3)})


def test_probabilities(check):
    rows, header = ["a,0.1,0", "b,1,.9", "c,2e-3,0.5"], "id,p,q"
    summary = check(validate_probabilities, rows, header)
    assert (summary.rows, summary.positives) == (3, 2)
    for value in ("", "nan", "1.0000005", "-1e-9", "yes"):
        with pytest.raises(InputError, match=r"row 3 \(b\): q is "):
            check(validate_probabilities, ["a,0,0", f"b,0,{value}", "c,0,0"], header)
