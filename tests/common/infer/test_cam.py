import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from common.infer.cam import fuse, guided_box, largest_box, normalise, peak, place


def test_a_map_is_stretched_as_torch_does_between_pixel_centres():
    cam = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(cam)[None, None], (224, 224), mode="bilinear", align_corners=False)
    assert np.allclose(place(cam, (0, 0, 224, 224), (224, 224)), expected[0, 0].numpy(), atol=1e-5)


def test_a_map_lies_in_its_box_and_its_lowest_value_around_it():
    cam = np.array([[-3.0, -2.0], [-1.0, -2.5]])
    placed = place(cam, (10, 20, 14, 24), (40, 30))
    assert placed.shape == (40, 30) and placed.dtype == np.float32
    inside = placed[20:24, 10:14].copy()
    # By hand: two cells over four pixels, whose centres lie at -0.25, 0.25, 0.75 and 1.25 cells; the ends are clamped.
    assert inside[0].tolist() == [-3, -2.75, -2.25, -2] and inside[:, 0].tolist() == [-3, -2.5, -1.5, -1]
    placed[20:24, 10:14] = -3
    assert (placed == -3).all()  # not 0, which would be the peak


def test_normalised_maps_span_zero_to_one():
    assert normalise(np.array([[-2, 0], [2, 6]])).tolist() == [[0, 0.25], [0.5, 1]]
    assert normalise(np.full((3, 3), 7.0)).tolist() == np.zeros((3, 3)).tolist()
    assert fuse([[[0, 4.0]], [[0, 4.0]]]).tolist() == [[0, 1]]
    # A weak map does not outweigh a strong one, as it would if each were normalised first.
    assert fuse([[[0, 10.0, 4.0]], [[1.0, 0, 0]]]).argmax() == 1
    assert np.allclose(fuse([[[0, 10.0, 4.0]], [[1.0, 0, 0]]]), [[0, 1, 1 / 3]])


def test_the_largest_region_and_its_box_by_hand():
    cam = np.zeros((8, 10), np.float32)
    cam[1:3, 1:4] = 0.5  # six pixels
    cam[4, 6], cam[5, 7], cam[6, 8] = 1, 1, 1  # three, joined by corners
    assert largest_box(cam, 0.5).tolist() == [1, 1, 4, 3]
    assert largest_box(cam, 0.6).tolist() == [6, 4, 9, 7]
    assert largest_box(np.zeros((4, 4)), 0.1) is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.sampled_from((0.2, 0.5, 0.8)))
def test_the_largest_region_is_scipys(seed, threshold):
    cam = normalise(ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(24, 17)), 1.2))
    labels, count = ndimage.label(cam >= np.float32(threshold), np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    largest = [ndimage.find_objects(labels)[k] for k in np.flatnonzero(areas == areas.max())]
    boxes = [[columns.start, rows.start, columns.stop, rows.stop] for rows, columns in largest]
    assert largest_box(cam, threshold).tolist() in boxes


def test_the_peak_is_the_centre_of_the_highest_pixels():
    cam = np.zeros((6, 8))
    cam[4, 1] = 2
    assert peak(cam) == (1.5, 4.5)
    cam[4, 1:3] = 2
    assert peak(cam) == (2.0, 4.5)
    assert peak(np.ones((3, 3))) is None


def test_guided_boxes_take_size_and_choice_from_the_truth():
    cam = np.zeros((200, 100))
    cam[50, 30], cam[150, 60] = 2, 1
    assert guided_box(cam, (50, 140, 70, 160)).tolist() == [50.5, 140.5, 70.5, 160.5]  # at the lower of both peaks
    assert guided_box(cam, (20, 40, 40, 60)).tolist() == [20.5, 40.5, 40.5, 60.5]
    assert guided_box(cam, (0, 0, 90, 120)).tolist() == [0, 0, 90, 120]  # moved into the image
    cam[152, 60] = 1.5  # one hill: its top counts alone
    assert guided_box(cam, (50, 140, 70, 160)).tolist() == [50.5, 142.5, 70.5, 162.5]
    assert guided_box(np.ones((5, 5)), (0, 0, 2, 2)) is None
