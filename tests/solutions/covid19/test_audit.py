"""The verdict in words, what is asked, and networks that do or do not find a planted marker, on 56 images by hand."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from common.errors import InputError
from common.train.checkpoint import save_weights
from solutions.covid19 import audit
from solutions.covid19.audit import (
    LEAST,
    audit_fitting,
    audited_folds,
    find_question,
    reach_verdict,
    read_audit,
    share_in_lungs,
)
from solutions.covid19.config import DEMO
from solutions.covid19.models import build_network

SIDE = 32
NETWORK = dataclasses.replace(
    DEMO.network,
    backbone="test_resnet",
    weights="none",
    size=SIDE,
    precision="fp32",
    augmentation="none",
    lr=3e-3,
    schedule="constant",
    dropout=0.0,
    batch_size=8,
)


# ---- the verdict ---------------------------------------------------------------------------------------------------


def interval(low, estimate=None, high=None):
    estimate = low + 0.05 if estimate is None else estimate
    return {"estimate": estimate, "low": low, "high": estimate + 0.05 if high is None else high}


def found(**aurocs):
    """Checks of an audit, those that are not named far from being recognised."""
    checks = dict.fromkeys(("image", "border", "background", "origin"), interval(0.4, 0.5, 0.6)) | aurocs
    return {check: {"auroc": auroc, "said": check} for check, auroc in checks.items()}


def score(fall=None, auroc=None):
    same = fall and {"auroc": interval(0.6, 0.7, 0.8), "fall": fall}
    return {"auroc": auroc or interval(0.9, 0.95, 0.98), "same_source": same}


NEVER = {"estimate": None, "low": None, "high": None}


def test_nothing_found_says_what_was_asked():
    verdict = reach_verdict(found(), score(interval(-0.02, 0.05, 0.1)), 0.6)
    assert verdict == {
        "biased": False,
        "evidence": [],
        "said": "No sign that the images' origin gives the answer away (checked: border, background, origin, the same "
        "collections).",
    }
    verdict = reach_verdict(found(origin=None, border=NEVER | {"low": None}), score(), 0.6)
    assert verdict["said"].endswith("away (checked: background).") and not verdict["biased"]
    nothing = "Whether the images' origin gives the answer away could not be determined from these images."
    assert reach_verdict({}, score(), 0.6)["said"] == nothing
    assert reach_verdict({key: {"auroc": NEVER} for key in ("border", "background")}, score(), 0.6)["said"] == nothing


@pytest.mark.parametrize("check", ["border", "background", "origin"])
def test_what_is_recognised_above_the_threshold_counts(check):
    said = {
        "border": "A network that sees only the margin of the image",
        "background": "A network that sees everything but the lungs",
        "origin": "A network that has to distinguish collections among images of one label",
    }[check]
    verdict = reach_verdict(found(**{check: interval(0.601, 0.7, 0.8)}), score(), 0.6)
    assert verdict["biased"] and verdict["said"] == (
        (
            "The score may not reflect COVID-19, but the images' origin or other diseases. "
            if check == "origin"
            else "Do not trust the score: the images' origin gives the answer away. "
        )
        + f"{said} reaches an AUROC of 0.700 [0.601, 0.800]."
    )
    assert not reach_verdict(found(**{check: interval(0.6, 0.7, 0.8)}), score(), 0.6)["biased"]  # not above it
    assert not reach_verdict(found(**{check: interval(0.601, 0.7, 0.8)}), score(), 0.7)["biased"]


def test_the_whole_image_does_not_count_since_it_holds_the_lungs():
    assert not reach_verdict(found(image=interval(0.98, 0.99, 1.0)), score(), 0.6)["biased"]


def test_a_fall_counts_where_its_interval_lies_above_0():
    verdict = reach_verdict(found(), score(interval(0.01, 0.25, 0.4)), 0.6)
    assert verdict["biased"] and verdict["evidence"] == [
        "on images from the same collections the AUROC drops from 0.950 [0.900, 0.980] to 0.700 [0.600, 0.800], by "
        "0.250 [0.010, 0.400]"
    ]
    assert not reach_verdict(found(), score(interval(0.0, 0.2, 0.4)), 0.6)["biased"]
    assert not reach_verdict(found(), score(NEVER), 0.6)["biased"]
    assert "same collections" not in reach_verdict(found(), score(NEVER), 0.6)["said"]


def test_all_that_was_found_is_said_in_sentences():
    verdict = reach_verdict(found(border=interval(0.9), origin=interval(0.8)), score(interval(0.1)), 0.6)
    assert len(verdict["evidence"]) == 3
    sentences = re.findall(r"[A-Z][^A-Z]*?(?:AUROC)?[^A-Z]*\.(?= [A-Z]|$)", verdict["said"])
    assert [line[:12] for line in sentences] == ["Do not trust", "A network th", "A network th", "On images fr"]


# ---- what is asked -------------------------------------------------------------------------------------------------


@pytest.fixture
def job_with(job_of):
    """`job_with(*groups)`: a job without pixels, of groups (collection, home, label, images, role)."""

    def make(*groups):
        rows = [
            {"collection": name, "home": home, "label": label, "role": role, "fold": k % 2 if role else -1}
            for name, home, label, n, role in groups
            for k in range(n)
        ]
        table = pd.DataFrame(rows).assign(split="train", finding="No Finding", row=np.arange(len(rows)))
        return job_of(DEMO, table.assign(image_id=table["row"].astype(str)), None, np.zeros((1, 1, 1), np.uint8))

    return make


def test_every_check_but_one_asks_for_covid_19_of_the_images_that_are_scored(job_with):
    job = job_with(("Home", True, 1, 3, "main"), ("Home", True, 0, 3, "same_source"), ("NIH", False, 0, 3, "main"))
    labels, rows, question = find_question(job, "border")
    assert rows.tolist() == [0, 1, 2, 6, 7, 8] and labels(job, rows).tolist() == [1, 1, 1, 0, 0, 0]
    assert question == "COVID-19 by a network that sees only the margin of the image"


def test_origin_asks_for_the_homes_among_images_without_covid_19(job_with):
    job = job_with(
        ("Home", True, 1, 9, "main"),
        ("Home", True, 0, LEAST, "same_source"),
        ("NIH", False, 0, LEAST, "main"),
        ("NIH", False, 0, 4, ""),
    )
    labels, rows, question = find_question(job, "origin")
    assert rows.tolist() == list(range(9, 9 + 2 * LEAST)) and labels(job, rows).tolist() == [1] * LEAST + [0] * LEAST
    assert labels(job, rows[::-1]).tolist() == [0] * LEAST + [1] * LEAST and labels(job, rows).dtype == np.float32
    assert question == "Home against the other collections, among images without COVID-19"
    job.images.table.loc[job.images.table["role"] == "same_source", "finding"] = "SARS"
    assert find_question(job, "origin")[2] == f"{question}, {LEAST} of {2 * LEAST} with another disease"


def test_origin_asks_for_the_largest_of_the_homes_among_images_with_covid_19(job_with):
    job = job_with(
        ("A", True, 1, 11, "main"),
        ("B", True, 1, 14, "main"),
        ("C", True, 1, 2, "main"),
        ("A", True, 0, LEAST - 1, "same_source"),
        ("NIH", False, 0, 40, "main"),
    )
    labels, rows, question = find_question(job, "origin")
    assert len(rows) == 27 and labels(job, rows).tolist() == [0] * 11 + [1] * 14 + [0] * 2
    assert question == "B against the other collections, among images with COVID-19"


def test_origin_is_not_asked_of_too_few(job_with):
    job = job_with(
        ("Home", True, 1, 30, "main"), ("NIH", False, 0, 30, "main"), ("Home", True, 0, LEAST - 1, "same_source")
    )
    assert find_question(job, "origin") == (None, None, "skipped: no label has 10 images each from two collections")


def test_folds_of_the_audit_are_those_of_the_run():
    config = dataclasses.replace(DEMO, n_folds=4, folds=(1, 3), audit=dataclasses.replace(DEMO.audit, folds=(0, 1, 3)))
    assert audited_folds(config) == [1, 3]
    with pytest.raises(InputError, match=r"--audit.folds \(0, 1, 3\): this run holds out none of them, but \(2,\)"):
        audited_folds(dataclasses.replace(config, folds=(2,)))


def test_a_schedule_without_a_validating_fold():
    for schedule, expected in (("plateau", "constant"), ("warm_cosine", "warm_cosine")):
        config = dataclasses.replace(DEMO, network=dataclasses.replace(DEMO.network, schedule=schedule))
        fitting = audit_fitting(config, "border")
        assert fitting.schedule == expected and fitting.epochs == DEMO.audit.epochs
        assert audit_fitting(config, "image") == config.network  # its heat maps are compared with the run's


# ---- where networks look -------------------------------------------------------------------------------------------


def test_share_by_hand():
    mask = np.array([[1, 1, 0, 0]] * 4, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0], heat[2, 3] = 3, 1
    assert share_in_lungs(heat, mask) == pytest.approx(0.75)
    assert share_in_lungs(heat, mask == 0) == pytest.approx(0.25)
    # two columns, 1 and 0, over four: 1, 0.75, 0.25, 0
    assert share_in_lungs(np.array([[1, 0], [1, 0]]), mask) == pytest.approx(1.75 / 2)
    assert np.isnan(share_in_lungs(np.zeros((2, 2)), mask))


def test_without_preference_the_share_is_the_area():
    mask = np.zeros((6, 10), np.uint8)
    mask[1:4, 2:7] = 1
    for shape in ((1, 1), (2, 2), (3, 5), (12, 20)):
        assert share_in_lungs(np.full(shape, 0.3), mask) == pytest.approx(0.25)


@settings(max_examples=40, deadline=None)
@given(
    arrays(np.float32, (3, 3), elements=st.floats(0, 1e3, width=32)),
    arrays(np.uint8, (12, 12), elements=st.integers(0, 1)),
)
def test_lungs_and_the_rest_share_all(heat, mask):
    inside, outside = share_in_lungs(heat, mask), share_in_lungs(heat, 1 - mask)
    if not heat.any():
        assert np.isnan(inside) and np.isnan(outside)
        return
    assert 0 <= inside <= 1 and inside + outside == pytest.approx(1)
    assert share_in_lungs(heat / heat.max() * 7, mask) == pytest.approx(inside, abs=1e-4)


# ---- networks that see no lung -------------------------------------------------------------------------------------


@pytest.fixture
def audited(job_of, monkeypatch):
    """`audited(marked, **audit)`: an audited job on 20 COVID-19 and 16 other images of Home, 20 of Elsewhere.

    All are noise; with `marked` those of Home have bright margins.
    """

    def make(marked, **options):
        images = np.random.default_rng(0).integers(60, 120, (56, SIDE, SIDE), np.uint8)
        if marked:
            images[:36, :3] = images[:36, -3:] = images[:36, :, :3] = images[:36, :, -3:] = 250
        names = [f"i{k}" for k in range(56)]
        table = pd.DataFrame(
            {
                "image_id": names,
                "row": range(56),
                "split": "train",
                "collection": ["Home"] * 36 + ["Elsewhere"] * 20,
                "home": [True] * 36 + [False] * 20,
                "patient_id": names,
                "finding": "No Finding",
                "label": [1] * 20 + [0] * 36,
                "role": ["main"] * 20 + ["same_source"] * 16 + ["main"] * 20,
                "fold": np.arange(56) % 2,
                "area": 0.25,
            }
        )
        masks = np.zeros((56, SIDE, SIDE), np.uint8)
        masks[:, 8:24, 8:24] = 1
        about = {"checks": ("border", "origin"), "folds": (0, 1), "epochs": 4} | options
        checks = dataclasses.replace(DEMO.audit, **about)
        config = dataclasses.replace(DEMO, network=NETWORK, n_folds=2, folds=(0, 1), store_size=SIDE, audit=checks)
        job = job_of(config, table, images, masks)
        torch.manual_seed(0)
        for fold in (0, 1):
            weights = job.run.path(f"fold{fold}", "covid", "final.safetensors")
            weights.parent.mkdir(parents=True)
            save_weights(weights, build_network(NETWORK).state_dict())
        monkeypatch.setattr(audit, "read_score", lambda job: score())
        audit.run_audit(job)
        return job

    return make


def test_a_marker_in_the_margin_is_found_by_networks_that_see_no_lung(audited):
    job = audited(True, checks=("border", "background"), epochs=8)
    found, answers, focus = read_audit(job.run)
    assert found["biased"] and found["said"].startswith("Do not trust the score")
    assert (
        "only the margin of the image reaches" in found["said"] and "everything but the lungs reaches" in found["said"]
    )
    assert found["folds"] == [0, 1]
    truth = job.images.table.set_index("image_id")
    for check in ("border", "background"):
        part = answers[answers["check"] == check]
        about = truth.loc[part["image_id"]]
        assert sorted(part["image_id"]) == sorted(truth.index[truth["role"] == "main"])
        assert (part["label"].to_numpy() == about["label"].to_numpy()).all()
        assert (part["fold"].to_numpy() == about["fold"].to_numpy()).all()
        auroc = roc_auc_score(part["label"], part["probability"])
        said = found["checks"][check]
        assert said["auroc"]["estimate"] == pytest.approx(auroc) and auroc > 0.9 and said["auroc"]["low"] > 0.6
        assert (said["images"], said["positives"], said["epochs"]) == (40, 20, 8)
        assert said["accuracy"] == ((part["probability"] >= 0.5) == part["label"]).mean()
    assert set(focus["view"]) == {"lungs"}  # without a network of the whole image
    assert (focus["label"] == 1).all() and (focus["area"] == 0.25).all() and len(focus) == 20
    assert focus["share"].dropna().between(0, 1).all()
    share = found["focus"]["lungs"]
    assert share["share"]["estimate"] == pytest.approx(focus["share"].mean()) and share["images"] == 20
    assert share["flat"] == focus["share"].isna().sum()


def test_views_are_told_from_what_the_tables_say(audited, monkeypatch):
    job = audited(True, checks=(), epochs=1)
    said = ["AP Supine", "AP", "PA", "pa", "Frontal AP", "", "AP or PA", "APPLE"] * 7
    table = pd.DataFrame({"image_id": job.images.table["image_id"], "view_said": said})
    monkeypatch.setattr(audit, "read_selection", lambda run: table)
    labels, rows, question = find_question(job, "view")
    assert rows.tolist() == [row for row in range(56) if row % 8 < 5]
    assert labels(job, rows).tolist() == [1, 1, 0, 0, 1] * 7 and "AP against PA" in question
    table["view_said"] = ["PA"] * 9 + ["AP"] * 47
    assert find_question(job, "view") == (None, None, "skipped: the tables give fewer than 10 AP or PA views")


def test_the_network_on_whole_images_is_trained_like_the_run(audited):
    job = audited(True, checks=("image",), epochs=99)
    found, answers, focus = read_audit(job.run)
    assert found["checks"]["image"]["epochs"] == NETWORK.epochs and set(focus["view"]) == {"lungs", "image"}
    assert answers.groupby("fold")["image_id"].apply(set).tolist() == [
        set(job.images.ids(job.images.rows(folds=[fold], role="main"))) for fold in (0, 1)
    ]


def test_origin_is_told_by_the_run_s_own_view_which_hides_the_margin(audited):
    job = audited(True, checks=("border", "origin"))
    found, answers, _ = read_audit(job.run)
    origin = found["checks"]["origin"]
    assert origin["said"] == "Home against the other collections, among images without COVID-19"
    assert (origin["images"], origin["positives"]) == (36, 16) and origin["auroc"]["low"] < 0.6
    assert found["evidence"][0].startswith("a network that sees only the margin") and len(found["evidence"]) == 1
    part = answers[answers["check"] == "origin"]
    assert set(part["image_id"]) == {f"i{k}" for k in range(20, 56)}


def test_images_that_differ_in_nothing_are_not_said_to(audited):
    job = audited(False, checks=("border", "origin"), epochs=2)
    found, *_ = read_audit(job.run)
    assert not found["biased"] and found["evidence"] == []
    assert found["said"] == ("No sign that the images' origin gives the answer away (checked: border, origin).")
    assert all(part["auroc"]["low"] < 0.6 for part in found["checks"].values())


def test_an_audit_that_asks_nothing(audited):
    job = audited(True, checks=(), epochs=1)
    found, answers, focus = read_audit(job.run)
    assert found["checks"] == {} and len(answers) == 0 and len(focus) == 20
    assert "could not be determined" in found["said"] and not found["biased"]


def test_networks_that_look_nowhere(audited, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(audit, "heat_maps", lambda job, network, rows, *more: np.zeros((len(rows), 2, 2), np.float32))
        job = audited(True, checks=(), epochs=1)
    found, _, focus = read_audit(job.run)
    assert found["focus"]["lungs"] == {"share": NEVER, "area": 0.25, "images": 20, "flat": 20}
    assert focus["share"].isna().all()


def test_a_fold_that_leaves_one_kind_is_named(audited):
    job = audited(True, checks=(), epochs=1)
    job.images.table["fold"] = np.where(job.images.table["label"] == 1, 0, 1)
    job = job.with_config(audit=dataclasses.replace(job.config.audit, checks=("border",)))
    job.images.__post_init__()
    with pytest.raises(InputError, match="audit, border: fold 0 leaves only images of one class to train on"):
        audit.run_audit(job)
