"""Phantoms: the same from the same seed, plausible as anatomy, and honest about where their findings lie."""

from functools import partial

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tables import real_data
from common.data.dicom import read_image
from common.errors import InputError
from common.phantom import (
    cardiomegaly,
    consolidation,
    draw,
    effusion,
    mass,
    nodule,
    opacity,
    pneumothorax,
)

SEEDS = range(5)


@pytest.fixture(scope="module")
def normals():
    return [draw(seed, 256) for seed in SEEDS]


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_a_seed_gives_the_same_bytes_and_another_seed_others():
    one, same, other = (draw(seed, 256, (pneumothorax, nodule)) for seed in (3, 3, 4))
    assert one.image.tobytes() == same.image.tobytes()
    assert one.findings[0].mask.tobytes() == same.findings[0].mask.tobytes()
    assert one.image.tobytes() != other.image.tobytes()


def test_shapes_and_types(normals):
    for film in normals:
        assert film.image.dtype == np.uint8 and film.image.shape == (256, 256)
        for mask in (*film.lungs, film.heart):
            assert mask.dtype == np.bool_ and mask.shape == (256, 256)
        assert film.findings == []


def test_the_same_picture_at_another_size():
    small, large = (draw(5, size, [partial(pneumothorax, share=0.1)]) for size in (256, 512))
    pairs = [*zip(small.lungs, large.lungs, strict=True), (small.heart, large.heart)]
    for a, b in [*pairs, (small.findings[0].mask, large.findings[0].mask)]:
        assert overlap(a, b[::2, ::2]) > 0.8
    reduced = cv2.resize(large.image, (256, 256), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(small.image.ravel(), reduced.ravel())[0, 1] > 0.98


def test_anatomy_is_where_it_belongs(normals):
    for film in normals:
        left, right = film.lungs
        assert not (left & right).any() and not (film.heart & (left | right)).any()
        # the patient's right lung lies on the viewer's left and is the larger
        assert np.nonzero(right)[1].mean() < np.nonzero(film.heart)[1].mean() < np.nonzero(left)[1].mean()
        assert 0.07 < left.mean() < right.mean() < 0.20
        assert film.heart.mean() < left.mean()
        assert film.image[left | right].mean() + 40 < film.image[film.heart].mean()


def test_films_of_one_patient_share_the_anatomy():
    def ratio(film):
        return film.heart.sum() / film.lungs.left.sum()  # scale, shift and turn of the film cancel

    one, two, other = draw(1, 512, patient=7), draw(2, 512, patient=7), draw(1, 512, patient=8)
    assert one.image.tobytes() != two.image.tobytes()
    assert abs(ratio(one) / ratio(two) - 1) < 0.01 < 0.03 < abs(ratio(one) / ratio(other) - 1)
    assert draw(7, 256).image.tobytes() == draw(7, 256, patient=7).image.tobytes()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["left", "right"]), st.floats(0.01, 0.25))
def test_pneumothorax_is_dark_of_the_size_asked_and_nowhere_else(seed, side, share):
    normal, film = draw(seed, 256), draw(seed, 256, [partial(pneumothorax, side=side, share=share)])
    (finding,) = film.findings
    lung, others = getattr(film.lungs, side), ~getattr(film.lungs, side)
    assert finding.name == "pneumothorax" and not (finding.mask & others).any()
    assert abs(finding.mask.sum() - share * lung.sum()) < 0.25 * share * lung.sum() + 60  # 256 px: a thin rim is lost
    # paired with its normal counterpart, the grain cancels
    difference = film.image.astype(int) - normal.image
    assert difference[finding.mask].mean() < -3
    away = cv2.erode(others.astype(np.uint8), np.ones((7, 7))) > 0
    assert not difference[away].any()


def test_pneumothorax_leaves_a_white_line_and_no_vessels():
    seen = []

    def look(scene, rng):
        seen.append(scene.vessels.copy())

    normal, film = draw(11, 512, [look]), draw(11, 512, [partial(pneumothorax, side="left", share=0.15), look])
    mask = film.findings[0].mask
    rim = (cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) > 0) & ~mask & film.lungs.left
    difference = film.image.astype(int) - normal.image
    assert difference[rim].mean() > 3
    deep = cv2.erode(mask.astype(np.uint8), np.ones((9, 9))) > 0
    without, with_air = (vessels[deep].std() for vessels in seen)
    assert without > 0.005 and with_air < 1e-4


def test_bilateral_pneumothorax_is_two_findings():
    film = draw(2, 256, [partial(pneumothorax, side=side) for side in ("left", "right")])
    for finding, lung in zip(film.findings, film.lungs, strict=True):
        assert finding.mask.any() and not (finding.mask & ~lung).any()


@pytest.mark.parametrize("finding", [nodule, mass, consolidation, opacity, effusion, cardiomegaly])
def test_other_findings_are_brighter_than_without(finding):
    name = finding.keywords["name"] if isinstance(finding, partial) else finding.__name__
    for seed in SEEDS:
        normal, film = draw(seed, 256), draw(seed, 256, [finding])
        (found,) = film.findings
        assert found.name == name
        within = found.mask & (normal.lungs.left | normal.lungs.right)
        assert film.image[within].mean() > normal.image[within].mean() + 4


def test_boxes_are_tight_with_open_ends():
    for finding in draw(9, 256, [pneumothorax, nodule, mass, consolidation, effusion, cardiomegaly]).findings:
        x_min, y_min, x_max, y_max = finding.box
        rows, columns = np.nonzero(finding.mask)
        assert (x_min, y_min, x_max, y_max) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_sizes_of_nodule_and_mass_tell_them_apart():
    areas = {f: np.median([draw(s, 256, [f]).findings[0].mask.mean() for s in SEEDS]) for f in (nodule, mass)}
    assert 0.0004 < areas[nodule] < 0.003 < 0.005 < areas[mass] < 0.018  # discs of radius 0.012-0.03 and 0.04-0.075


def test_cardiomegaly_takes_its_place_from_the_lungs():
    for seed in SEEDS:
        normal, film = draw(seed, 256), draw(seed, 256, [cardiomegaly])
        assert film.heart.sum() > 1.15 * normal.heart.sum()
        assert film.lungs.left.sum() < normal.lungs.left.sum()
        assert not (film.heart & (film.lungs.left | film.lungs.right)).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"seed": 0, "size": 64}, "size=64"),
        ({"seed": 0, "patient": "x"}, "patient='x'"),
        ({"seed": 0, "size": 128, "findings": [partial(pneumothorax, side="up")]}, "side='up'"),
        ({"seed": 0, "size": 128, "findings": [partial(pneumothorax, share=0.9)]}, "share=0.9"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(InputError, match=words):
        draw(**arguments)


def test_grey_levels_are_those_of_real_films(normals):
    folder = real_data("siim_pneumothorax")
    if folder is None:
        pytest.skip("no real radiographs: CXR_REAL_DATA is not set")
    files = sorted(folder.glob("dicom-images-train/*/*/*.dcm"))[:24]
    levels = [10, 50, 90]
    real = np.mean([np.percentile(read_image(file), levels) for file in files], axis=0)
    ours = np.mean([np.percentile(film.image, levels) for film in normals], axis=0)
    assert np.abs(real - ours).max() < 35, (real, ours)
