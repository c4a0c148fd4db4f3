import re
from base64 import b64decode

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tables import real_data
from common.report.gallery import (
    PREDICTION,
    TRUTH,
    augmented_gallery,
    box_overlay,
    cached_arrays,
    gallery,
    heat_overlay,
    label_boxes,
    outline_overlay,
    pick_extremes,
    to_jpeg,
)


def _square(shape, top, left, bottom, right):
    mask = np.zeros(shape, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def test_outlines_lie_on_the_border_pixels_and_leave_the_rest_grey():
    image = np.full((100, 100), 50, np.uint8)
    rgb = outline_overlay(image, _square((100, 100), 20, 20, 60, 60), _square((100, 100), 30, 40, 80, 90), size=100)
    assert rgb.shape == (100, 100, 3) and rgb.dtype == np.uint8
    for row, column in ((20, 40), (59, 30), (40, 20)):
        assert tuple(rgb[row, column]) == TRUTH
    for row, column in ((30, 80), (79, 60), (60, 89), (45, 40)):
        assert tuple(rgb[row, column]) == PREDICTION
    for row, column in ((10, 10), (25, 30), (70, 70), (95, 50), (5, 95)):
        assert tuple(rgb[row, column]) == (50, 50, 50)


def test_truth_stays_visible_under_a_prediction_that_equals_it():
    mask = _square((100, 100), 20, 20, 60, 60)
    rgb = outline_overlay(np.zeros((100, 100), np.uint8), mask, mask, size=100)
    assert tuple(rgb[20, 40]) == PREDICTION
    assert np.abs(rgb[[18, 22], 40].astype(int) - TRUTH).max() <= 80


def test_holes_are_outlined_and_a_single_pixel_survives_shrinking():
    ring = _square((64, 64), 8, 8, 56, 56)
    ring[24:40, 24:40] = 0
    rgb = outline_overlay(np.zeros((64, 64), np.uint8), ring, size=256)
    inner = rgb[80:110, 128]  # the hole starts at row 24 × 4 = 96
    assert (inner == TRUTH).all(axis=1).any()
    dot = _square((1024, 1024), 700, 300, 701, 301)
    rgb = outline_overlay(np.zeros((1024, 1024), np.uint8), None, dot, size=256)
    assert tuple(rgb[175, 75]) == PREDICTION and rgb.sum() == rgb[165:186, 65:86].sum()


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(8, 80))
def test_longer_side_is_the_size_and_empty_masks_draw_nothing(height, width, size):
    image = np.full((height, width), 77, np.uint8)
    rgb = outline_overlay(image, np.zeros((height, width), bool), None, size)
    assert max(rgb.shape[:2]) == size and (rgb == 77).all()
    assert abs(rgb.shape[0] * width - rgb.shape[1] * height) <= max(height, width) or 1 in rgb.shape


def test_gallery_embeds_pictures_that_decode_with_a_legend_of_what_is_drawn():
    image, mask = np.full((60, 80), 90, np.uint8), _square((60, 80), 10, 10, 40, 40)
    made = gallery([(image, mask, None, "<a>"), (image, None, None, "b")], "Some & more", size=160)
    pictures = [b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", made)]
    decoded = [cv2.imdecode(np.frombuffer(p, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int) for p in pictures]
    assert [d.shape for d in decoded] == [(120, 160, 3)] * 2
    assert np.abs(decoded[1] - 90).max() <= 3 and np.abs(decoded[0][20:78, 20:22].mean((0, 1)) - TRUTH).max() < 60
    assert "Some &amp; more" in made and "&lt;a&gt;" in made
    assert "</i>truth</span>" in made and "prediction" not in made
    assert "nothing to show yet" in gallery([], "Some")


def test_boxes_lie_where_they_should_with_their_names_inside_the_picture():
    image = np.full((50, 100), 60, np.uint8)  # drawn at twice its size
    rgb = box_overlay(image, [((10, 20, 40, 45), "Truth")], [((60, 15, 90, 40), "Found 0.5")], size=200)
    assert rgb.shape == (100, 200, 3) and rgb.dtype == np.uint8
    for row, column in ((65, 20), (65, 80), (90, 50), (40, 50)):
        assert tuple(rgb[row, column]) == TRUTH
    for row, column in ((50, 120), (50, 180), (80, 150), (30, 150)):
        assert np.abs(rgb[row, column].astype(int) - PREDICTION).max() < 40  # of a line one pixel wide
    for row, column in ((65, 50), (50, 150), (65, 100), (5, 150)):
        assert tuple(rgb[row, column]) == (60, 60, 60)
    assert (rgb[22:39, 20:60] != 60).any() and (rgb[82:99, 120:180] != 60).any()  # above the one, below the other
    assert (box_overlay(image, size=200) == 60).all()
    at_the_edge = box_overlay(image, [((0, 0, 99, 49), "Aortic enlargement")], [((90, 40, 100, 50), "ILD")], size=200)
    assert at_the_edge.shape == (100, 200, 3)


@pytest.mark.parametrize(("corner", "place"), [((60, 60), "above"), ((1, 0), "top left"), ((280, 60), "right")])
def test_label_is_the_thin_text_on_black_whatever_lies_below(corner, place):
    """Letters drawn twice at two thicknesses, as an outline, do not coincide in OpenCV 5."""
    x, y = corner
    image = np.full((300, 384), 200, np.uint8)
    boxes = [((x, y, x + 90, y + 90), "Aortic enlargement 0.83"), ((x + 20, 0, x + 50, 290), "")]
    rgb = box_overlay(image, boxes)
    font = (cv2.FONT_HERSHEY_SIMPLEX, 384 / 900)
    (width, height), _ = cv2.getTextSize(boxes[0][1], *font, 1)
    alone = cv2.putText(
        np.zeros((height + 4, width, 3), np.uint8), boxes[0][1], (0, height), *font, TRUTH, 1, cv2.LINE_AA
    )
    found = cv2.matchTemplate(rgb, alone, cv2.TM_SQDIFF)
    left, top = np.unravel_index(found.argmin(), found.shape)[::-1]
    assert found.min() < 10 and (rgb[top : top + height + 4, left : left + width] == alone).all(), place
    assert (left, top) == {"above": (61, 56 - height), "top left": (2, 1), "right": (383 - width, 56 - height)}[place]


def test_the_best_boxes_are_scaled_and_labelled():
    found = pd.DataFrame({"class_id": [0, 1, 1, 0, 0, 1], "score": [0.1, 0.9, 0.3, 0.4, 0.5, 0.2]})
    found[["x_min", "y_min", "x_max", "y_max"]] = np.arange(24.0).reshape(6, 4)
    pairs = label_boxes(found, ("ILD", "mass"), 0.5)
    assert [text for _, text in pairs] == ["mass 0.90", "ILD 0.50", "ILD 0.40", "mass 0.30", "mass 0.20"]
    assert pairs[0][0].tolist() == [2.0, 2.5, 3.0, 3.5]


def test_gallery_of_boxes():
    made = gallery([(np.full((60, 80), 90, np.uint8), [], [((5, 5, 30, 30), "ILD")], "a")], overlay=box_overlay)
    assert "</i>truth</span>" not in made and "</i>prediction</span>" in made and made.count("data:image/jpeg") == 1
    bare = gallery([(np.full((60, 80), 90, np.uint8), [], None, "a")], overlay=box_overlay)
    assert "legend" not in bare and bare.count("data:image/jpeg") == 1


def test_heat_colours_the_radiograph_where_it_is_and_leaves_the_boxes_above_it():
    image = np.full((64, 64), 100, np.uint8)
    heat = np.zeros((16, 16))
    heat[:, 8:] = 1.0
    rgb = heat_overlay((image, heat), [((4, 4, 20, 20), "")], [((40, 40, 60, 60), "")], size=128)
    assert rgb.shape == (128, 128, 3) and rgb.dtype == np.uint8
    assert (rgb[60:100, :56] == 100).all()  # left of the middle nothing is drawn
    # Plasma ends in (240, 249, 33); six tenths of it lie on the grey.
    assert np.abs(rgb[20, 100].astype(int) - (184, 189, 60)).max() <= 1
    assert tuple(rgb[8, 20]) == TRUTH and np.abs(rgb[80, 100].astype(int) - PREDICTION).max() < 40
    plain = box_overlay(image, [((4, 4, 20, 20), "a")], size=128)
    assert (heat_overlay((image, np.zeros((7, 7))), [((4, 4, 20, 20), "a")], size=128) == plain).all()
    items = [((image, heat), [((4, 4, 20, 20), "a")], [], "b")]
    assert gallery(items, overlay=heat_overlay).count("data:image/jpeg") == 1


def test_real_radiograph_stays_small():
    folder = real_data("lung_segmentation")
    if folder is None:
        pytest.skip("no radiographs: set CXR_REAL_DATA")
    path = next(p for p in sorted(folder.rglob("*")) if p.suffix in (".png", ".jpg") and "mask" not in str(p).lower())
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    data = to_jpeg(outline_overlay(image))
    assert 3_000 < len(data) < 60_000


def test_augmentation_is_shown_beside_the_image():
    class Data:
        def __getitem__(self, key):
            index, seed = key if isinstance(key, tuple) else (key, -1)
            return torch.full((1, 8, 8), 100 * index + seed + 1, dtype=torch.uint8), 0

    made = augmented_gallery(Data(), ["first", "second"], count=2, size=8)
    pictures = [b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", made)]
    levels = [cv2.imdecode(np.frombuffer(p, np.uint8), cv2.IMREAD_GRAYSCALE).mean() for p in pictures]
    assert levels == pytest.approx([0, 1, 2, 100, 103, 104], abs=1)  # each image has draws of its own
    assert re.findall("first|second|draw [12]", re.sub('alt="[^"]*"', "", made)) == [
        *("first", "draw 1", "draw 2", "second", "draw 1", "draw 2")
    ]


def test_extremes_of_an_ordered_table():
    picked = pick_extremes(pd.DataFrame({"dice": range(10)}), 2)
    assert {name: rows["dice"].tolist() for name, rows in picked.items()} == {
        "Best": [9, 8],
        "Median": [4, 5],
        "Worst": [0, 1],
    }
    assert [len(rows) for rows in pick_extremes(pd.DataFrame({"dice": [1]})).values()] == [1, 1, 1]


def test_arrays_are_computed_once_for_a_key(tmp_path):
    calls, path = [], tmp_path / "arrays.npz"

    def read(key):
        return cached_arrays(path, key, lambda: calls.append(key) or {"heats": np.arange(3) + len(calls)})["heats"]

    assert read("a").tolist() == [1, 2, 3] == read("a").tolist()
    assert read("b").tolist() == [2, 3, 4] == read("b").tolist() and calls == ["a", "b"]
    for damage in (b"PK torn", b""):
        path.write_bytes(damage)
        read("b")
    assert calls == ["a", "b", "b", "b"]
