import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from common.data.folds import make_folds
from common.metrics import calibration
from common.report import class_plots, page, plots, results


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of the plots that are drawn, by their names."""
    calls = {}
    for module, name in (
        (plots, "confusion_matrix"),
        (plots, "line_with_peak"),
        (class_plots, "roc_panels"),
        (class_plots, "reliability_panels"),
    ):
        monkeypatch.setattr(module, name, lambda *args, name=name: calls.setdefault(name, args) and None)
    return calls


def test_a_single_class_has_its_thresholds_and_a_confusion_matrix(drawn):
    rng = np.random.default_rng(0)
    truth = np.tile([[0], [1]], (20, 1))
    probs = np.clip(0.2 * truth + 0.7 * rng.random((40, 1)), 0, 1)
    text = page.join(*results.classes(truth, probs, np.repeat([0, 1], 20), ["ill"], 0.5, ("no", "yes")))
    counts, outcomes = drawn["confusion_matrix"]
    assert np.array_equal(counts, confusion_matrix(truth[:, 0], probs[:, 0] >= 0.5)) and outcomes == ("no", "yes")
    assert f"{roc_auc_score(truth, probs):.4f}" in text and "nested by folds" in text
    assert {"roc_panels", "reliability_panels"} <= set(drawn) and "error if scaled" in text
    coverage, risk = drawn["line_with_peak"][:2]
    _, wrong, missed, _ = calibration.nested_counts(truth, probs, np.repeat([0, 1], 20))[0][0]
    assert coverage[-1] == 1 and risk[-1] == pytest.approx((wrong + missed) / 40)


def test_halves_of_the_patients_stand_in_for_folds(drawn, monkeypatch):
    truth, patients, seen = np.arange(40)[:, None] % 2, np.arange(40) // 4, []
    counts = calibration.nested_counts
    monkeypatch.setattr(calibration, "nested_counts", lambda y, p, folds: seen.append(folds) or counts(y, p, folds))
    text = page.join(*results.classes(truth, 0.2 + 0.5 * truth, np.zeros(40), ["ill"], 0.5, patients=patients))
    assert "nested by halves" in text
    assert (seen[0] == make_folds(truth, 2, patients)).all() and len(set(zip(patients, seen[0], strict=True))) == 10


def test_several_classes_have_no_confusion_matrix(drawn):
    truth, probs = np.tile([[0, 1], [1, 0]], (20, 1)), np.tile([[0.1, 0.9], [0.8, 0.3]], (20, 1))
    results.classes(truth, probs, np.repeat([0, 1], 20), ["a", "b"])
    assert set(drawn) == {"reliability_panels", "line_with_peak"}


def test_pixels_are_calibrated_at_the_same_places_of_map_and_mask(monkeypatch):
    got = {}
    monkeypatch.setattr(class_plots, "reliability_panels", lambda *args: got.update(args=args))
    truth = np.zeros((2, 40, 40), np.uint8)
    truth[0, 20:] = 1
    truth[1, :, 20:] = 255  # unknown
    maps = np.where(truth[:, ::2, ::2] == 1, 204, 51).astype(np.uint8)[None]
    results.pixel_calibration(maps, lambda k: truth, ["a", "b"])
    true, probs, names = got["args"]
    assert names == ["a", "b"] and true.shape == probs.shape == (results.PIXELS, 2)
    assert np.array_equal(probs[:, 0], np.where(true[:, 0] == 1, 0.8, 0.2)) and 0.4 < true[:, 0].mean() < 0.6
    assert 0.4 < np.isnan(true[:, 1]).mean() < 0.6 and np.nansum(true[:, 1]) == 0


def test_every_image_is_listed_with_its_whole_id():
    ids = [f"1.2.276.0.7230010.3.1.4.8323329.2952.1517875175.{n}" for n in range(300)]
    made = results.worst_errors(pd.DataFrame({"image_id": ids, "dice": 0.5}), "The worst first.")
    assert made.title == "Worst errors" and all(f"<td>{one}</td>" in made.body for one in ids)
