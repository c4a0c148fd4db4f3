"""The fusion methods against ensemble-boxes bit for bit, and by hand."""

import contextlib
import copy
import io
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from common.post import batches
from common.post.batches import Batch
from common.post.boxes import BOX
from common.post.fusion import fuse_table
from common.post.suppression import fuse_nms, fuse_nmw, fuse_soft_nms
from common.post.wbf import CONF_TYPES, fuse_wbf

peer = pytest.importorskip("ensemble_boxes", reason="the oracle ensemble-boxes is not installed")
QUICK = settings(max_examples=25, deadline=None)


def predictions(seed, models=6, boxes=100, classes=14, decimals=None):
    """Noisy copies of shared boxes, so that clusters form; rounded scores tie. Lists per model, as the peer takes."""
    rng = np.random.default_rng(seed)
    centres, sides = rng.random((60, 2)), rng.uniform(0.05, 0.3, (60, 2))
    kinds = rng.integers(0, classes, 60)
    lists = [[], [], []]
    for _ in range(models):
        chosen = rng.integers(0, 60, boxes)
        half = sides[chosen] * np.exp(rng.normal(0, 0.1, (boxes, 2))) / 2
        middle = centres[chosen] + rng.normal(0, 0.01, (boxes, 2))
        scores = rng.random(boxes) if decimals is None else rng.random(boxes).round(decimals)
        lists[0].append(np.clip(np.hstack([middle - half, middle + half]), 0, 1))
        lists[1].append(np.maximum(scores, 0.01))
        lists[2].append(kinds[chosen])
    return lists


def one_image(boxes, scores, labels):
    """The lists of one image as a Batch."""
    counts = [len(part) for part in boxes]
    boxes = np.concatenate([np.reshape(part, (-1, 4)) for part in boxes])
    scores, labels = np.concatenate(scores), np.concatenate(labels).astype(np.int64)
    models = np.repeat(np.arange(len(counts)), counts)
    return Batch(boxes, scores, labels, models, np.array([0, len(boxes)]), len(counts))


def quietly(function, lists, **options):
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return function(*copy.deepcopy(lists), **options)  # it changes its arguments


def assert_identical(fused, theirs):
    for ours, expected in zip(fused, theirs, strict=False):
        assert ours.shape == expected.shape
        assert (ours == expected).all() and (ours.dtype == expected.dtype or ours.dtype.kind == "i" or not ours.size)


# ---- weighted boxes fusion --------------------------------------------------------------------------------------


def test_wbf_by_hand():
    boxes = [[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], [[0, 0, 0.5, 0.25]]]
    batch = one_image(boxes, [[0.75, 0.5], [0.25]], [[3, 3], [3]])
    fused = fuse_wbf(batch, iou_thr=0.4)
    # IoU 0.5: y_max = (0.75 × 0.5 + 0.25 × 0.25) / 1, score (0.75 + 0.25) / 2 from both models; 0.5 from one of two
    assert fused.boxes.tolist() == [[0, 0, 0.5, 0.4375], [0.5, 0.5, 1, 1]]
    assert (fused.scores.tolist(), fused.labels.tolist()) == ([0.5, 0.25], [3, 3])
    assert fuse_wbf(batch, iou_thr=0.4, conf_type="max").scores.tolist() == [0.75, 0.5]
    # weights 3 and 1: (3 × 0.75 + 0.25) / 2 × 2 / 4, and 3 × 0.5 / 4
    assert fuse_wbf(batch, [3, 1], iou_thr=0.4).scores.tolist() == [0.625, 0.375]


def test_matching_is_strict_and_by_class():
    boxes = [[[0, 0, 0.5, 0.5]], [[0, 0, 0.5, 0.25]]]  # IoU exactly 0.5
    for iou_thr, labels, n in ((0.5, [[0], [0]], 2), (0.4999, [[0], [0]], 1), (0.4, [[0], [1]], 2)):
        batch = one_image(boxes, [[1.0], [1.0]], labels)
        assert [len(fuse(batch, iou_thr=iou_thr).boxes) for fuse in (fuse_wbf, fuse_nms, fuse_nmw)] == [n] * 3


@pytest.mark.parametrize("conf_type", CONF_TYPES)
@QUICK
@given(data=st.data())
def test_wbf_is_the_peers_bit_for_bit(conf_type, data):
    # numpy adds eight values and more in an order of its own
    models = data.draw(st.sampled_from([1, 2, 6, 7, *([9, 19] if conf_type in ("avg", "max") else [])]))
    seed, boxes = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 60))
    classes, decimals = data.draw(st.sampled_from([1, 3, 14])), data.draw(st.sampled_from([None, 1, 2]))
    lists = predictions(seed, models, boxes, classes, decimals)
    weights = data.draw(st.sampled_from([None, list(range(1, models + 1)), np.linspace(0.1, 3.3, models)]))
    iou_thr = data.draw(st.sampled_from([0, 0.33, 0.4, 0.55, 0.9]))
    options = {"weights": weights, "iou_thr": iou_thr, "conf_type": conf_type}
    theirs = quietly(peer.weighted_boxes_fusion, lists, **options)
    assert_identical(fuse_wbf(one_image(*lists), **options), theirs)


@pytest.mark.parametrize("boxes", [10, 50, 300])
def test_ties_come_in_the_peers_order(boxes):
    lists = predictions(boxes, 3, boxes, classes=1)
    lists[1] = [np.full(boxes, 0.5)] * 3
    theirs = quietly(peer.weighted_boxes_fusion, lists, iou_thr=0.5)
    assert len(np.unique(theirs[1])) < len(theirs[1])
    assert_identical(fuse_wbf(one_image(*lists), iou_thr=0.5), theirs)


def test_class_numbers_far_apart():
    lists = predictions(1, 3, 60, classes=6)
    numbers = np.array([3, 67, -61, 131, 0, 2**24 - 1])  # the first four end in the same six bits
    lists[2] = [numbers[labels] for labels in lists[2]]
    assert_identical(fuse_wbf(one_image(*lists)), quietly(peer.weighted_boxes_fusion, lists))


@pytest.mark.parametrize(
    "lists",
    [
        [[[], [[0.1, 0.1, 0.4, 0.4], [0.1, 0.1, 0.4, 0.1]]], [[], [0.5, 0.9]], [[], [2, 2]]],  # one without area
        [[[[-1e-7, 0, 1 + 1e-7, 0.5]]], [[0.5]], [[1]]],  # rounding beyond the edge is clipped
        [[[]] * 3, [[]] * 3, [[]] * 3],
    ],
)
def test_odd_lists(lists):
    fused = fuse_wbf(one_image(*lists))
    assert_identical(fused, quietly(peer.weighted_boxes_fusion, lists))
    assert (fused.boxes >= 0).all() and (fused.boxes <= 1).all()
    for fuse in (fuse_nms, fuse_soft_nms, fuse_nmw):
        assert len(fuse(one_image(*lists)).boxes) == len(fused.boxes)


@pytest.mark.parametrize("fuse", [fuse_wbf, fuse_nms, fuse_soft_nms, fuse_nmw])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 0]}, "weights must be positive"),
        ({"weights": [1, np.inf]}, "weights must be positive"),
        ({"weights": [True, True]}, "need 2 weights, one number"),
        ({"iou_thr": -0.1}, "iou_thr"),
        ({"weights": [1, -1]}, "weights must be positive"),
        ({"weights": [1, np.nan]}, "weights must be positive"),
        ({"weights": [1, 2, 3]}, "need 2 weights"),
        ({"iou_thr": 1.5}, "iou_thr"),
        ({"iou_thr": np.nan}, "iou_thr"),
    ],
)
def test_bad_options_are_refused(fuse, options, message):
    with pytest.raises(InputError, match=message):
        fuse(one_image([[[0, 0, 1, 1]]] * 2, [[0.5]] * 2, [[1]] * 2), **options)


@pytest.mark.parametrize("fuse", [fuse_wbf, fuse_nms, fuse_nmw])
def test_the_limits_of_the_threshold_themselves_are_allowed(fuse):
    batch = one_image([[[0, 0, 0.5, 0.5]], [[0.4, 0.4, 1, 1]], [[0.5, 0.5, 1, 1]]], [[0.9], [0.8], [0.7]], [[1]] * 3)
    assert [len(fuse(batch, iou_thr=iou_thr).boxes) for iou_thr in (0, 1)] == [1 if fuse is fuse_wbf else 2, 3]


def test_bad_options_of_one_method_are_refused():
    batch = one_image([[[0, 0, 1, 1]]] * 2, [[0.0]] * 2, [[1]] * 2)
    with pytest.raises(InputError, match="conf_type"):
        fuse_wbf(batch, conf_type="mean")
    for fuse in (fuse_wbf, fuse_nmw):  # the peer: boxes of NaN
        with pytest.raises(InputError, match="leave out boxes of score 0"):
            fuse(batch)
    for options in ({"sigma": 0}, {"thresh": np.nan}):
        with pytest.raises(InputError, match="cannot use"):
            fuse_soft_nms(batch, **options)


# ---- suppression ------------------------------------------------------------------------------------------------


@QUICK
@given(data=st.data())
def test_suppression_is_the_peers_bit_for_bit(data):
    models = data.draw(st.sampled_from([1, 2, 6, 9]))
    seed, boxes = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 60))
    lists = predictions(
        seed, models, boxes, data.draw(st.sampled_from([1, 3, 14])), data.draw(st.sampled_from([None, 1]))
    )
    weights = data.draw(st.sampled_from([None, list(range(1, models + 1)), np.linspace(0.1, 3.3, models)]))
    common = {"weights": weights, "iou_thr": data.draw(st.sampled_from([0, 0.33, 0.5, 0.9]))}
    for ours, theirs, options in [
        (fuse_nms, peer.nms, {}),
        (fuse_soft_nms, peer.soft_nms, {"thresh": 0.05, "sigma": 0.3}),
        (fuse_nmw, peer.non_maximum_weighted, {}),
    ]:
        assert_identical(ours(one_image(*lists), **common, **options), quietly(theirs, lists, **common, **options))


def test_soft_nms_by_hand():
    batch = one_image([[[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.25]]], [[0.8, 0.6]], [[0, 0]])  # IoU 0.5
    assert fuse_soft_nms(batch).scores.tolist() == [0.8, 0.6]
    np.testing.assert_allclose(fuse_soft_nms(batch, decayed=True).scores, [0.8, 0.6 * np.exp(-0.5)], rtol=1e-15)
    assert len(fuse_soft_nms(batch, thresh=0.5).boxes) == 1


# ---- tables -----------------------------------------------------------------------------------------------------


def tables_of(images, size):
    """One table per model from the normalised lists of several images, the images in another order in each."""
    tables = []
    for model in range(len(next(iter(images.values()))[0])):
        parts = []
        for image_id in sorted(images, reverse=model % 2 == 1):
            boxes, scores, labels = (part[model] for part in images[image_id])
            part = pd.DataFrame(boxes * np.tile(size, 2), columns=BOX)
            parts.append(part.assign(image_id=image_id, class_id=labels, score=scores))
        tables.append(pd.concat(parts, ignore_index=True))
    return tables


@pytest.mark.parametrize(
    ("fuse", "method", "options"),
    [
        (fuse_wbf, peer.weighted_boxes_fusion, {"iou_thr": 0.5, "conf_type": "absent_model_aware_avg"}),
        (fuse_nms, peer.nms, {"iou_thr": 0.4}),
        (fuse_soft_nms, peer.soft_nms, {"thresh": 0.1}),
        (fuse_nmw, peer.non_maximum_weighted, {"iou_thr": 0.4}),
    ],
)
def test_a_table_is_its_images_fused_one_by_one(fuse, method, options, monkeypatch):
    monkeypatch.setattr(batches, "_ROWS", 100)  # several portions
    # powers of two, so that pixels divided by them are the original numbers
    sizes = pd.DataFrame({"image_id": [f"i{k}" for k in range(7)], "width": 1024, "height": 2048})
    images = {f"i{k}": predictions(k, 3, 25, 4, decimals=2) for k in range(0, 7, 2)}
    tables, weights = tables_of(images, [1024, 2048]), [3, 2, 0.5]
    ours = fuse_table(tables, sizes, weights, fuse, **options)
    assert list(ours["image_id"].unique()) == list(images)
    for image_id, lists in images.items():
        boxes, scores, labels = quietly(method, lists, weights=weights, **options)
        rows = ours[ours["image_id"] == image_id]
        assert (rows["score"].to_numpy() == scores).all() and (rows["class_id"].to_numpy() == labels).all()
        assert (rows[BOX].to_numpy() == np.minimum(boxes, 1).astype(float) * [1024, 2048, 1024, 2048]).all()
