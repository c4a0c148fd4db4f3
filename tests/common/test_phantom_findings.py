"""The findings that ChestX-ray14 adds to the phantoms: where they lie, what they change, what they leave alone."""

from functools import partial

import cv2
import numpy as np
import pytest

from common.errors import InputError
from common.phantom import draw
from common.phantom_diffuse import edema, emphysema
from common.phantom_findings import (
    atelectasis,
    effusion,
    fibrosis,
    hernia,
    infiltration,
    mass,
    nodule,
    pleural_thickening,
    pneumonia,
    pneumothorax,
)

SEEDS = range(6)


@pytest.fixture(scope="module")
def normals():
    return [draw(seed, 256) for seed in SEEDS]


def lungs(film):
    return film.lungs.left | film.lungs.right


def changed(film, normal):
    return film.image.astype(int) - normal.image


def rows(mask):
    return np.nonzero(mask.any(axis=1))[0]


@pytest.mark.parametrize("finding", [pneumonia, edema])
def test_shadows_lie_in_the_lungs_are_brighter_and_change_nothing_else(finding, normals):
    for seed, normal in zip(SEEDS, normals, strict=True):
        film = draw(seed, 256, [finding])
        (found,) = film.findings
        assert found.name == finding.__name__ and not (found.mask & ~lungs(normal)).any()
        assert changed(film, normal)[found.mask].mean() > 8
        away = cv2.dilate(np.uint8(found.mask), np.ones((31, 31))) == 0
        assert not changed(film, normal)[away].any()


def test_edema_is_in_both_lungs_and_pneumonia_in_the_one_asked_for(normals):
    for seed, normal in zip(SEEDS, normals, strict=True):
        wings = draw(seed, 256, [edema]).findings[0].mask
        assert all((wings & lung).sum() > 0.15 * lung.sum() for lung in normal.lungs)
        for side in ("left", "right"):
            lobe, lung = draw(seed, 256, [partial(pneumonia, side=side)]).findings[0].mask, getattr(normal.lungs, side)
            assert not (lobe & ~lung).any() and 0.12 < lobe.sum() / lung.sum() < 0.65


def test_a_fissure_is_a_sharper_border_than_the_other_side_of_the_lobe(normals):
    steps = []
    for seed, normal in zip(SEEDS, normals, strict=True):
        film = draw(seed, 256, [partial(pneumonia, side="right")])
        mask, change = film.findings[0].mask, changed(film, normal)
        column = int(np.nonzero(mask)[1].mean())
        profile = change[:, column - 8 : column + 8].mean(axis=1)
        top, bottom = rows(mask)[[0, -1]]
        edges = [np.abs(np.diff(profile[edge - 9 : edge + 10])).max() for edge in (top, bottom)]
        steps.append(max(edges) / min(edges))
    assert np.median(steps) > 1.5


def test_bronchi_stay_dark_in_a_filled_lobe():
    inner = cv2.erode(np.uint8(draw(3, 512, [pneumonia]).findings[0].mask), np.ones((15, 15))) > 0
    change = changed(draw(3, 512, [pneumonia]), draw(3, 512))[inner]
    assert np.percentile(change, 2) < 0.6 * np.median(change)


def test_hernia_has_air_above_a_level_and_takes_its_place_from_the_lungs(normals):
    for seed, normal in zip(SEEDS, normals, strict=True):
        film = draw(seed, 256, [hernia])
        (found,) = film.findings
        assert found.name == "hernia" and not (found.mask & lungs(film)).any()
        assert (found.mask & (normal.heart | lungs(normal))).sum() > 0.5 * found.mask.sum()
        inner = cv2.erode(np.uint8(found.mask), np.ones((9, 9))) > 0
        top, bottom = rows(inner)[[0, -1]]
        film_rows = np.arange(256)[:, None]
        above, below = inner & (film_rows < top + 8), inner & (film_rows > bottom - 6)
        assert changed(film, normal)[above].mean() < -10 < 5 < changed(film, normal)[below].mean()
        away = cv2.dilate(np.uint8(found.mask), np.ones((15, 15))) == 0
        assert not changed(film, normal)[away].any()


def test_emphysema_makes_lungs_longer_flatter_and_darker(normals):
    for seed, normal in zip(SEEDS, normals, strict=True):
        film = draw(seed, 256, [emphysema])
        (found,) = film.findings
        assert found.name == "emphysema" and np.array_equal(found.mask, lungs(film))
        assert film.image[lungs(film)].mean() < normal.image[lungs(normal)].mean() - 8
        assert not (film.heart & lungs(film)).any()
        for longer, lung in zip(film.lungs, normal.lungs, strict=True):
            assert 1.06 < longer.sum() / lung.sum() < 1.4
            assert rows(longer)[0] == rows(lung)[0]  # the apex stays
            assert dome(longer) < 0.75 * dome(lung)


def dome(lung):
    """Height of the diaphragm's dome over the costophrenic angle, in pixels."""
    lowest = np.array([np.nonzero(column)[0].max() for column in lung.T if column.any()])
    return lowest.max() - np.median(lowest)


def test_what_is_there_when_the_lungs_are_inflated_moves_along():
    film, before = draw(4, 256, [hernia, emphysema]), draw(4, 256, [hernia])
    moved, first = film.findings[0].mask, before.findings[0].mask
    assert [finding.name for finding in film.findings] == ["hernia", "emphysema"]
    assert rows(moved).mean() > rows(first).mean() + 6
    assert not (moved & lungs(film)).any()


@pytest.mark.parametrize("finding", [hernia, effusion, pneumothorax])
def test_later_findings_fit_inflated_lungs(finding):
    for seed in SEEDS:
        film, empty = draw(seed, 256, [emphysema, finding]), draw(seed, 256, [emphysema])
        mask = film.findings[1].mask
        place = lungs(empty) | empty.heart if finding is hernia else lungs(empty)
        assert (mask & place).sum() > (0.5 if finding is hernia else 0.999) * mask.sum()
        assert 0.001 < mask.sum() / lungs(empty).sum() < 0.3


def test_findings_beside_a_diffuse_one_still_avoid_each_other():
    for seed in SEEDS:
        first, second = draw(seed, 256, [emphysema, mass, nodule]).findings[1:]
        assert not (first.mask & second.mask).any()


def test_the_same_picture_at_another_size():
    for finding in (emphysema, edema, hernia, pneumonia):
        small, large = (draw(5, size, [finding]) for size in (256, 512))
        a, b = small.findings[0].mask, large.findings[0].mask[::2, ::2]
        assert (a & b).sum() > 0.8 * (a | b).sum(), finding
        reduced = cv2.resize(large.image, (256, 256), interpolation=cv2.INTER_AREA)
        assert np.corrcoef(small.image.ravel(), reduced.ravel())[0, 1] > 0.98


@pytest.mark.parametrize(
    ("finding", "options"),
    [
        (pleural_thickening, {"radius": (0.2, 0.26), "depth": (0.05, 0.06)}),
        (fibrosis, {"radius": (0.08, 0.11)}),
        (infiltration, {"radius": (0.14, 0.18)}),
    ],
)
def test_a_finding_is_as_large_as_asked(finding, options):
    sizes = [[draw(s, 256, [f]).findings[0].mask.sum() for s in SEEDS] for f in (finding, partial(finding, **options))]
    assert np.sum(sizes[1]) > 1.4 * np.sum(sizes[0])


def test_a_finding_is_as_dense_as_asked(normals):
    for finding, faint, dense in ((atelectasis, (0.1, 0.1), (0.3, 0.3)), (infiltration, 0.1, 0.3)):
        for seed, normal in zip(SEEDS, normals, strict=True):
            films = [draw(seed, 256, [partial(finding, density=density)]) for density in (faint, dense)]
            means = [changed(film, normal)[film.findings[0].mask].mean() for film in films]
            assert means[1] > 1.5 * means[0]


def test_another_side_is_refused():
    with pytest.raises(InputError, match="side='both'"):
        draw(0, 128, [partial(pneumonia, side="both")])
