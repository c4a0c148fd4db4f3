"""Phantom films: the same from the same seed, plausible as anatomy, scalable, and refused for bad arguments."""

from functools import partial

import cv2
import numpy as np
import pytest

from benchmarks.tables import real_data
from common.data.dicom import read_image
from common.phantom import draw, findings
from common.phantom.findings import nodule, pneumothorax


@pytest.fixture(scope="module")
def normals():
    return [draw(seed, 256) for seed in range(5)]


def test_a_seed_gives_the_same_bytes_and_another_seed_others():
    one, same, other = (draw(seed, 256, (pneumothorax, nodule)) for seed in (3, 3, 4))
    assert one.image.tobytes() == same.image.tobytes() != other.image.tobytes()
    assert one.findings[0].mask.tobytes() == same.findings[0].mask.tobytes()


def test_shapes_and_anatomy(normals):
    for film in normals:
        assert film.image.dtype == np.uint8 and film.image.shape == (256, 256) and film.findings == []
        assert all(mask.dtype == np.bool_ and mask.shape == (256, 256) for mask in (*film.lungs, film.heart))
        left, right = film.lungs
        assert not (left & right).any() and not (film.heart & (left | right)).any()
        # the patient's right lung lies on the viewer's left and is the larger
        assert np.nonzero(right)[1].mean() < np.nonzero(film.heart)[1].mean() < np.nonzero(left)[1].mean()
        assert 0.07 < left.mean() < right.mean() < 0.20 and film.heart.mean() < left.mean()
        assert film.image[left | right].mean() + 40 < film.image[film.heart].mean()


@pytest.mark.parametrize(
    "finding",
    [partial(pneumothorax, share=0.1), findings.emphysema, findings.edema, findings.hernia, findings.pneumonia],
)
def test_the_same_picture_at_another_size(finding):
    small, large = (draw(5, size, [finding]) for size in (256, 512))
    pairs = [*zip(small.lungs, large.lungs, strict=True), (small.heart, large.heart)]
    for a, b in [*pairs, (small.findings[0].mask, large.findings[0].mask)]:
        assert (a & b[::2, ::2]).sum() > 0.8 * (a | b[::2, ::2]).sum()
    reduced = cv2.resize(large.image, (256, 256), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(small.image.ravel(), reduced.ravel())[0, 1] > 0.98


def test_films_of_one_patient_share_the_anatomy():
    def ratio(film):
        return film.heart.sum() / film.lungs.left.sum()  # scale, shift and rotation of the film cancel

    one, two, other = draw(1, 512, patient=7), draw(2, 512, patient=7), draw(1, 512, patient=8)
    assert one.image.tobytes() != two.image.tobytes()
    assert abs(ratio(one) / ratio(two) - 1) < 0.01 < 0.03 < abs(ratio(one) / ratio(other) - 1)
    assert draw(7, 256).image.tobytes() == draw(7, 256, patient=7).image.tobytes()


def test_grey_levels_are_those_of_real_films(normals):
    folder = real_data("siim_pneumothorax")
    if folder is None:
        pytest.skip("no real radiographs: CXR_REAL_DATA is not set")
    files = sorted(folder.glob("dicom-images-train/*/*/*.dcm"))[:24]
    real = np.mean([np.percentile(read_image(file), [10, 50, 90]) for file in files], axis=0)
    ours = np.mean([np.percentile(film.image, [10, 50, 90]) for film in normals], axis=0)
    assert np.abs(real - ours).max() < 35, (real, ours)
