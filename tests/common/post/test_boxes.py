import numpy as np
import pandas as pd
import pytest

from common.errors import InputError
from common.post import boxes as b

SIZE = np.array([200, 100])  # width, height


def test_iou_by_hand():
    a = [[0, 0, 2, 2], [5, 5, 6, 6]]
    other = [[1, 1, 3, 3], [0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 4, 1]]
    # 1 / (4 + 4 - 1); itself; a common edge; 2 / (4 + 4 - 2)
    np.testing.assert_allclose(b.iou_matrix(a, other), [[1 / 7, 1, 0, 1 / 3], [0, 0, 0, 0]], rtol=1e-15)
    assert b.iou_matrix([[1, 1, 1, 1]], [[1, 1, 1, 1]]).tolist() == [[0]]
    assert b.iou_matrix([], other).shape == (0, 4)


def test_iou_of_two_boxes_is_that_of_the_matrix():
    boxes = np.random.default_rng(0).random((40, 4))
    boxes[:, 2:] += boxes[:, :2] * (np.arange(40) % 3 > 0)[:, None]
    boxes = np.where(boxes[:, [0, 1, 0, 1]] <= boxes[:, [2, 3, 2, 3]], boxes, boxes[:, [2, 3, 0, 1]])
    assert [[b.iou(one, other) for other in boxes] for one in boxes] == b.iou_matrix(boxes, boxes).tolist()
    assert np.isnan(b.iou(np.ones(4), np.ones(4)))


def test_scale_and_clip():
    assert b.scale([[20.0, 20, 100, 50]], 2, 0.5).tolist() == [[40, 10, 200, 25]]
    assert b.scale(np.ones((2, 4)), [2, 3], [4, 5]).tolist() == [[2, 4, 2, 4], [3, 5, 3, 5]]
    assert b.clip([[-3, -4, 500, 600], [300, 10, 400, 20]], SIZE).tolist() == [[0, 0, 200, 100], [200, 10, 200, 20]]
    assert b.clip(np.full((2, 4), 9), [[1, 2], [4, 8]]).tolist() == [[1, 2, 1, 2], [4, 8, 4, 8]]


def read(boxes, sizes=None):
    table = pd.DataFrame(boxes, columns=b.BOX, dtype=object if isinstance(boxes[0][0], str) else float)
    ids = [f"i{k}" for k in range(len(boxes))]
    table = table.assign(image_id=ids, class_id=3)
    sizes = None if sizes is None else np.broadcast_to(np.asarray(sizes, float), (len(boxes), 2))
    return b.read_boxes("table", table, pd.Index(ids), scored=False, sizes=sizes)[2]


def test_good_boxes_pass():
    good = [[0, 0, 200, 100], [5, 5, 5, 9], [0, 0, np.float32(200) * (1 + 5e-7), 100]]
    assert read(good, SIZE).tolist() == np.array(good).tolist()
    read([[-5, 0, 1e6, 1]])  # without sizes there is no limit
    read([[0, 0, 9, 9], [0, 0, 90, 90]], [[10, 10], [100, 100]])
    slack = [*(-b.SLACK * SIZE), *((1 + b.SLACK) * SIZE)]
    read([[5, 5, 9, 5], slack], SIZE)


@pytest.mark.parametrize(
    "boxes, sizes, message",
    [
        ([[0, 0, 1, 1], [0, 0, np.nan, 1]], None, r"table, row 1, image i1: \(0.0, 0.0, nan, 1.0\) is not four finite"),
        ([[0, -np.inf, 1, 1]], None, "finite"),
        ([[3, 0, 1, 1]], None, "row 0, .* inverted"),
        ([[0, 3, 1, 1]], None, "inverted"),
        ([[0, 0, 201, 1]], SIZE, "outside its image"),
        ([[0, 0, 1, 101]], SIZE, "outside its image"),
        ([[-1, 0, 1, 1]], SIZE, "outside its image"),
        ([[0, -1, 1, 1]], SIZE, "outside its image"),
        ([[0, 0, 9, 9], [0, 0, 9, 9]], [[10, 10], [8, 10]], "row 1, .* outside"),
        ([["a", 0, 1, 1]], None, "row 0, image i0: x_min is 'a', not a number"),
    ],
)
def test_bad_boxes(boxes, sizes, message):
    with pytest.raises(InputError, match=message):
        read(boxes, sizes)


@pytest.mark.parametrize("size", [[0, 5], [5, -1], [np.nan, 5], [5, np.inf]])
def test_bad_sizes(size):
    with pytest.raises(InputError, match="positive"):
        b.clip([[0, 0, 1, 1]], size)
