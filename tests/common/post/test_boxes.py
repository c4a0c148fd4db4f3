import numpy as np
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


def test_x_and_y_are_scaled_apart():
    pixels = np.array([[20.0, 20, 100, 50]])
    assert b.normalise(pixels, SIZE).tolist() == [[0.1, 0.2, 0.5, 0.5]]
    assert b.denormalise([[0.1, 0.2, 0.5, 0.5]], SIZE).tolist() == pixels.tolist()
    assert b.scale(pixels, 2, 0.5).tolist() == [[40, 10, 200, 25]]
    assert b.scale(np.ones((2, 4)), [2, 3], [4, 5]).tolist() == [[2, 4, 2, 4], [3, 5, 3, 5]]
    assert b.normalise(np.ones((2, 4)), [[1, 2], [4, 8]]).tolist() == [[1, 0.5, 1, 0.5], [0.25, 0.125, 0.25, 0.125]]


def test_clip():
    assert b.clip([[-3, -4, 500, 600], [300, 10, 400, 20]], SIZE).tolist() == [[0, 0, 200, 100], [200, 10, 200, 20]]
    assert b.areas(b.clip([[300, 10, 400, 20]], SIZE)).tolist() == [0]


def test_good_boxes_pass():
    good = [[0, 0, 200, 100], [5, 5, 5, 9], [0, 0, np.float32(200) * (1 + 5e-7), 100]]
    checked = b.check_boxes(good, sizes=SIZE)
    assert checked.dtype == np.float64 and checked.tolist() == np.array(good).tolist()
    assert len(b.check_boxes(np.zeros((0, 4)), sizes=np.zeros((0, 2)))) == 0
    b.check_boxes([[-5, 0, 1e6, 1]])  # without sizes there is no limit
    b.check_boxes([[0, 0, 9, 9], [0, 0, 90, 90]], sizes=[[10, 10], [100, 100]])


@pytest.mark.parametrize(
    "boxes, sizes, message",
    [
        ([[0, 0, 1, 1], [0, 0, np.nan, 1]], None, r"box 1: \(0, 0, nan, 1\) is not four finite"),
        ([[0, -np.inf, 1, 1]], None, "finite"),
        ([[3, 0, 1, 1]], None, "box 0: .* inverted"),
        ([[0, 3, 1, 1]], None, "inverted"),
        ([[0, 0, 201, 1]], SIZE, "outside its image"),
        ([[0, 0, 1, 101]], SIZE, "outside its image"),
        ([[-1, 0, 1, 1]], SIZE, "outside its image"),
        ([[0, -1, 1, 1]], SIZE, "outside its image"),
        ([[0, 0, 9, 9], [0, 0, 9, 9]], [[10, 10], [8, 10]], "box 1: .* outside"),
        ([[0, 0, 1]], None, "shape"),
        ([["a", 0, 1, 1]], None, "numbers"),
    ],
)
def test_bad_boxes(boxes, sizes, message):
    with pytest.raises(InputError, match=message):
        b.check_boxes(boxes, sizes=sizes)


@pytest.mark.parametrize("size", [[0, 5], [5, -1], [np.nan, 5], [5, np.inf]])
def test_bad_sizes(size):
    with pytest.raises(InputError, match="positive"):
        b.normalise([[0, 0, 1, 1]], size)
