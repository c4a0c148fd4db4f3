"""Findings of the phantoms: where they lie, what they change, and what they leave alone."""

from functools import partial

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.phantom import draw
from common.phantom.findings import (
    aortic_enlargement,
    atelectasis,
    cardiomegaly,
    consolidation,
    edema,
    effusion,
    emphysema,
    fibrosis,
    hernia,
    infiltration,
    mass,
    nodule,
    pleural_thickening,
    pneumonia,
    pneumothorax,
)

SHADOWS = (nodule, mass, consolidation, effusion, cardiomegaly, aortic_enlargement, atelectasis)
SHADOWS += (fibrosis, infiltration, pleural_thickening, pneumonia, edema)
NORMALS = [draw(seed, 256) for seed in range(5)]


def cases(*findings):
    """Yield (film, its first finding's mask, change of the image, normal film) for every seed."""
    for seed, normal in enumerate(NORMALS):
        film = draw(seed, 256, findings)
        yield film, film.findings[0].mask, film.image.astype(int) - normal.image, normal


def both(film):
    return film.lungs.left | film.lungs.right


def shrink(mask, side):
    return cv2.erode(np.uint8(mask), np.ones((side, side))) > 0


def grow(mask, side):
    return cv2.dilate(np.uint8(mask), np.ones((side, side))) > 0


def rows(mask):
    return np.nonzero(mask.any(axis=1))[0]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["left", "right"]), st.floats(0.01, 0.25))
def test_pneumothorax_is_dark_of_the_size_asked_and_nowhere_else(seed, side, share):
    normal, film = draw(seed, 256), draw(seed, 256, [partial(pneumothorax, side=side, share=share)])
    (finding,) = film.findings
    lung = getattr(film.lungs, side)
    assert finding.name == "pneumothorax" and not (finding.mask & ~lung).any()
    assert abs(finding.mask.sum() - share * lung.sum()) < 0.25 * share * lung.sum() + 60  # 256 px: a thin rim is lost
    difference = film.image.astype(int) - normal.image  # the grain cancels
    assert difference[finding.mask].mean() < -3 and not difference[shrink(~lung, 7)].any()


def test_pneumothorax_leaves_a_white_line_and_no_vessels():
    seen = []

    def look(scene, rng):
        seen.append(scene.vessels.copy())

    normal, film = draw(11, 512, [look]), draw(11, 512, [partial(pneumothorax, side="left", share=0.15), look])
    mask = film.findings[0].mask
    rim = grow(mask, 5) & ~mask & film.lungs.left
    assert (film.image.astype(int) - normal.image)[rim].mean() > 3
    without, with_air = (vessels[shrink(mask, 9)].std() for vessels in seen)
    assert without > 0.005 and with_air < 1e-4


def test_bilateral_pneumothorax_is_two_findings():
    film = draw(2, 256, [partial(pneumothorax, side=side) for side in ("left", "right")])
    for finding, lung in zip(film.findings, film.lungs, strict=True):
        assert finding.mask.any() and not (finding.mask & ~lung).any()


@pytest.mark.parametrize("finding", SHADOWS)
def test_shadows_are_brighter_than_without_and_change_nothing_else(finding):
    name = finding.keywords["name"] if isinstance(finding, partial) else finding.__name__
    for film, mask, change, normal in cases(finding):
        assert [found.name for found in film.findings] == [name]
        assert change[mask & both(normal)].mean() > (8 if finding in (pneumonia, edema) else 4)
        assert not change[~grow(mask, 31)].any()
        if finding in (pneumonia, edema):
            assert not (mask & ~both(normal)).any()


def test_boxes_are_tight_with_open_ends():
    findings = draw(9, 256, [pneumothorax, *SHADOWS]).findings
    assert len(findings) == 13
    for finding in findings:
        y, x = np.nonzero(finding.mask)
        assert finding.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)


def test_nodule_and_mass_differ_in_size():
    areas = {f: np.median([mask.mean() for _, mask, *_ in cases(f)]) for f in (nodule, mass)}
    assert 0.0004 < areas[nodule] < 0.003 < 0.005 < areas[mass] < 0.018  # discs of radius 0.012-0.03 and 0.04-0.075


def test_enlarged_organs_displace_the_lungs():
    for film, _, _, normal in cases(cardiomegaly):
        assert film.heart.sum() > 1.15 * normal.heart.sum() and film.lungs.left.sum() < normal.lungs.left.sum()
        assert not (film.heart & both(film)).any()
    for film, arch, _, normal in cases(aortic_enlargement):
        assert (arch & normal.lungs.left).any() and np.array_equal(film.lungs.left, normal.lungs.left & ~arch)
        assert np.argwhere(arch)[:, 0].mean() < np.argwhere(film.heart)[:, 0].mean()  # above the heart


def test_pleural_thickening_lies_at_the_wall():
    for _, mask, _, normal in cases(pleural_thickening):
        depth = cv2.distanceTransform(np.uint8(both(normal)), cv2.DIST_L2, 5)
        assert depth[mask].min() < 1.5 and depth[mask].max() < 0.035 * 256 + 1


@pytest.mark.parametrize("findings", [(nodule, mass, nodule), (emphysema, mass, nodule)])
def test_findings_lie_apart(findings):
    for film, *_ in cases(*findings):
        masks = [finding.mask for finding in film.findings if finding.name != "emphysema"]
        assert len(masks) >= 2 and np.sum(masks, axis=0).max() == 1


def test_edema_is_in_both_lungs_and_pneumonia_in_the_one_asked_for():
    for _, mask, _, normal in cases(edema):
        assert all((mask & lung).sum() > 0.15 * lung.sum() for lung in normal.lungs)
    for side in ("left", "right"):
        for _, mask, _, normal in cases(partial(pneumonia, side=side)):
            lung = getattr(normal.lungs, side)
            assert not (mask & ~lung).any() and 0.12 < mask.sum() / lung.sum() < 0.65


def test_a_fissure_is_sharper_than_the_other_border_and_bronchi_stay_dark():
    steps = []
    for _, mask, change, _ in cases(partial(pneumonia, side="right")):
        column = int(np.nonzero(mask)[1].mean())
        profile = change[:, column - 8 : column + 8].mean(axis=1)
        edges = [np.abs(np.diff(profile[edge - 9 : edge + 10])).max() for edge in rows(mask)[[0, -1]]]
        steps.append(max(edges) / min(edges))
    assert np.median(steps) > 1.5
    film, normal = draw(3, 512, [pneumonia]), draw(3, 512)
    change = (film.image.astype(int) - normal.image)[shrink(film.findings[0].mask, 15)]
    assert np.percentile(change, 2) < 0.6 * np.median(change)


def test_hernia_has_air_above_a_level_and_displaces_the_lungs():
    for film, mask, change, normal in cases(hernia):
        assert film.findings[0].name == "hernia" and not (mask & both(film)).any()
        assert (mask & (normal.heart | both(normal))).sum() > 0.5 * mask.sum()
        inner, row = shrink(mask, 9), np.arange(256)[:, None]
        above, below = inner & (row < rows(inner)[0] + 8), inner & (row > rows(inner)[-1] - 6)
        assert change[above].mean() < -10 < 5 < change[below].mean()
        assert not change[~grow(mask, 15)].any()


def dome(lung):
    """Height of the diaphragm's dome over the costophrenic angle, in pixels."""
    lowest = np.array([np.nonzero(column)[0].max() for column in lung.T if column.any()])
    return lowest.max() - np.median(lowest)


def test_emphysema_makes_lungs_longer_flatter_and_darker():
    for film, mask, _, normal in cases(emphysema):
        assert film.findings[0].name == "emphysema" and np.array_equal(mask, both(film))
        assert film.image[both(film)].mean() < normal.image[both(normal)].mean() - 8
        assert not (film.heart & both(film)).any()
        for longer, lung in zip(film.lungs, normal.lungs, strict=True):
            assert 1.06 < longer.sum() / lung.sum() < 1.4
            assert rows(longer)[0] == rows(lung)[0]  # the apex stays
            assert dome(longer) < 0.75 * dome(lung)


def test_earlier_findings_move_with_inflated_lungs_and_later_ones_fit_them():
    film, before = draw(4, 256, [hernia, emphysema]), draw(4, 256, [hernia])
    assert [finding.name for finding in film.findings] == ["hernia", "emphysema"]
    assert rows(film.findings[0].mask).mean() > rows(before.findings[0].mask).mean() + 6
    assert not (film.findings[0].mask & both(film)).any()
    for finding, least in ((hernia, 0.5), (effusion, 0.999), (pneumothorax, 0.999)):
        for seed in range(5):
            film, empty = draw(seed, 256, [emphysema, finding]), draw(seed, 256, [emphysema])
            mask = film.findings[1].mask
            place = both(empty) | empty.heart if finding is hernia else both(empty)
            assert (mask & place).sum() > least * mask.sum() and 0.001 < mask.sum() / both(empty).sum() < 0.3


@pytest.mark.parametrize(
    ("finding", "options"),
    [
        (pleural_thickening, {"radius": (0.2, 0.26), "depth": (0.05, 0.06)}),
        (fibrosis, {"radius": (0.08, 0.11)}),
        (infiltration, {"radius": (0.14, 0.18)}),
    ],
)
def test_a_finding_is_as_large_as_asked(finding, options):
    sizes = [sum(mask.sum() for _, mask, *_ in cases(f)) for f in (finding, partial(finding, **options))]
    assert sizes[1] > 1.4 * sizes[0]


@pytest.mark.parametrize(
    ("finding", "densities"), [(atelectasis, ((0.1, 0.1), (0.3, 0.3))), (infiltration, (0.1, 0.3))]
)
def test_a_finding_is_as_dense_as_asked(finding, densities):
    pairs = (cases(partial(finding, density=density)) for density in densities)
    for (_, mask, faint, _), (_, same, dense, _) in zip(*pairs, strict=True):
        assert dense[same].mean() > 1.5 * faint[mask].mean()
