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
from common.phantom import draw
from common.phantom_findings import (
    aortic_enlargement,
    atelectasis,
    calcification,
    cardiomegaly,
    cavity,
    consolidation,
    effusion,
    fibrosis,
    ild,
    infiltration,
    mass,
    nodule,
    opacity,
    pleural_thickening,
    pneumothorax,
)

SEEDS = range(5)
SHADOWS = (
    nodule,
    mass,
    consolidation,
    opacity,
    effusion,
    cardiomegaly,
    aortic_enlargement,
    atelectasis,
    calcification,
    cavity,
    fibrosis,
    ild,
    infiltration,
    pleural_thickening,
)


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


@pytest.mark.parametrize("finding", SHADOWS)
def test_other_findings_are_brighter_than_without_and_change_nothing_else(finding, normals):
    name = finding.keywords["name"] if isinstance(finding, partial) else finding.__name__
    for seed, normal in zip(SEEDS, normals, strict=True):
        film = draw(seed, 256, [finding])
        (found,) = film.findings
        assert found.name == name
        within = found.mask & (normal.lungs.left | normal.lungs.right)
        assert film.image[within].mean() > normal.image[within].mean() + 4
        away = cv2.dilate(found.mask.astype(np.uint8), np.ones((31, 31))) == 0
        assert not (film.image.astype(int) - normal.image)[away].any()


def test_boxes_are_tight_with_open_ends():
    findings = draw(9, 256, [pneumothorax, *SHADOWS]).findings
    assert len(findings) == 15
    for finding in findings:
        x_min, y_min, x_max, y_max = finding.box
        rows, columns = np.nonzero(finding.mask)
        assert (x_min, y_min, x_max, y_max) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_sizes_of_nodule_and_mass_tell_them_apart():
    areas = {f: np.median([draw(s, 256, [f]).findings[0].mask.mean() for s in SEEDS]) for f in (nodule, mass)}
    assert 0.0004 < areas[nodule] < 0.003 < 0.005 < areas[mass] < 0.018  # discs of radius 0.012-0.03 and 0.04-0.075


def test_cardiomegaly_takes_its_place_from_the_lungs(normals):
    for seed, normal in zip(SEEDS, normals, strict=True):
        film = draw(seed, 256, [cardiomegaly])
        assert film.heart.sum() > 1.15 * normal.heart.sum()
        assert film.lungs.left.sum() < normal.lungs.left.sum()
        assert not (film.heart & (film.lungs.left | film.lungs.right)).any()


def test_aortic_enlargement_takes_its_place_from_the_left_lung(normals):
    for seed, normal in zip(SEEDS, normals, strict=True):
        film = draw(seed, 256, [aortic_enlargement])
        arch = film.findings[0].mask
        assert (arch & normal.lungs.left).any() and np.array_equal(film.lungs.left, normal.lungs.left & ~arch)
        assert np.argwhere(arch)[:, 0].mean() < np.argwhere(film.heart)[:, 0].mean()  # above the heart


def test_what_tells_the_other_new_findings_apart(normals):
    for seed, normal in zip(SEEDS, normals, strict=True):

        def change(finding, normal=normal, seed=seed):
            film = draw(seed, 256, [finding])
            return film.image.astype(int) - normal.image, film.findings[0].mask

        change_of_cavity, mask = change(cavity)
        core = cv2.erode(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (13, 13))) > 0
        rim = mask & (cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) == 0)
        assert change_of_cavity[core].min() < 0 < change_of_cavity[rim].mean()  # air within a wall
        flecks, mask = change(calcification)
        assert flecks[mask].mean() > 30 and mask.mean() < 0.003
        lower, mask = change(ild)
        lung = normal.lungs.left if (mask & normal.lungs.left).any() else normal.lungs.right
        assert np.argwhere(mask)[:, 0].min() > np.argwhere(lung)[:, 0].min() + 20 and mask.sum() > 0.3 * lung.sum()
        assert np.ptp(lower[mask]) > 25  # lines with lung between them
        _, mask = change(pleural_thickening)
        depth = cv2.distanceTransform(np.uint8(normal.lungs.left | normal.lungs.right), cv2.DIST_L2, 5)
        assert depth[mask].min() < 1.5 and depth[mask].max() < 0.035 * 256 + 1


def test_several_findings_lie_apart():
    for seed in SEEDS:
        masks = [finding.mask for finding in draw(seed, 256, [nodule, mass, cavity, nodule]).findings]
        assert np.sum(masks, axis=0).max() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"seed": 0, "size": 64}, "size=64"),
        ({"seed": 0, "patient": "x"}, "patient='x'"),
        ({"seed": 0, "size": 128, "findings": [partial(pneumothorax, side="up")]}, "side='up'"),
        ({"seed": 0, "size": 128, "findings": [partial(ild, side="both")]}, "side='both'"),
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
