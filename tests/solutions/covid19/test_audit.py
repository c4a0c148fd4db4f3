"""The verdict in words, what is asked, and networks that do or do not find a planted marker, on 56 images by hand."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from common.budget import Budget
from common.errors import InputError
from common.paths import read_json, write_json
from common.runs import Run
from common.train.checkpoint import save_weights
from solutions.covid19 import audit
from solutions.covid19.audit import LEAST, _folds, _question, _schedule, judge, run_audit
from solutions.covid19.config import DEMO, NetworkConfig
from solutions.covid19.data import Prepared
from solutions.covid19.models import build_network
from solutions.covid19.scoring import RATES, read_audit

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
    verdict = judge(found(), score(interval(-0.02, 0.05, 0.1)), 0.6)
    assert verdict == {
        "biased": False,
        "evidence": [],
        "said": "No sign that the images' origin gives the answer away (border, background, origin, the same "
        "collections).",
    }
    verdict = judge(found(origin=None, border=NEVER | {"low": None}), score(), 0.6)
    assert verdict["said"].endswith("away (background).") and not verdict["biased"]
    nothing = "Whether the images' origin gives the answer away could not be told from these images."
    assert judge({}, score(), 0.6)["said"] == nothing
    assert judge({key: {"auroc": NEVER} for key in ("border", "background")}, score(), 0.6)["said"] == nothing


@pytest.mark.parametrize("check", ["border", "background", "origin"])
def test_what_is_recognised_above_the_threshold_counts(check):
    said = {
        "border": "A network that sees the margin of the image alone",
        "background": "A network that sees everything but the lungs",
        "origin": "A network that has to tell collections apart among images of one label",
    }[check]
    verdict = judge(found(**{check: interval(0.601, 0.7, 0.8)}), score(), 0.6)
    assert verdict["biased"] and verdict["said"] == (
        (
            "The score may not be COVID-19's: the images' origin, or other diseases, explain it as well. "
            if check == "origin"
            else "The score is not to be believed: the images' origin gives the answer away. "
        )
        + f"{said} reaches an AUROC of 0.700 [0.601, 0.800]."
    )
    assert not judge(found(**{check: interval(0.6, 0.7, 0.8)}), score(), 0.6)["biased"]  # not above it
    assert not judge(found(**{check: interval(0.601, 0.7, 0.8)}), score(), 0.7)["biased"]


def test_the_whole_image_does_not_count_since_it_holds_the_lungs():
    assert not judge(found(image=interval(0.98, 0.99, 1.0)), score(), 0.6)["biased"]


def test_a_fall_counts_where_its_interval_lies_above_0():
    verdict = judge(found(), score(interval(0.01, 0.25, 0.4)), 0.6)
    assert verdict["biased"] and verdict["evidence"] == [
        "against images of the same collections the AUROC falls from 0.950 [0.900, 0.980] to 0.700 [0.600, 0.800], by "
        "0.250 [0.010, 0.400]"
    ]
    assert not judge(found(), score(interval(0.0, 0.2, 0.4)), 0.6)["biased"]
    assert not judge(found(), score(NEVER), 0.6)["biased"]
    assert "same collections" not in judge(found(), score(NEVER), 0.6)["said"]


def test_all_that_was_found_is_said_in_sentences():
    verdict = judge(found(border=interval(0.9), origin=interval(0.8)), score(interval(0.1)), 0.6)
    assert len(verdict["evidence"]) == 3
    sentences = re.findall(r"[A-Z][^A-Z]*?(?:AUROC)?[^A-Z]*\.(?= [A-Z]|$)", verdict["said"])
    assert [line[:12] for line in sentences] == ["The score is", "A network th", "A network th", "Against imag"]


# ---- what is asked -------------------------------------------------------------------------------------------------


def prepared(*groups):
    """A Prepared without images: (collection, home, label, images, role) each."""
    rows = [
        {"collection": name, "home": home, "label": label, "role": role, "fold": k % 2 if role else -1}
        for name, home, label, n, role in groups
        for k in range(n)
    ]
    table = pd.DataFrame(rows).assign(split="train", finding="No Finding")
    table["row"] = np.arange(len(table))
    table["image_id"] = table["patient_id"] = [f"i{k}" for k in table["row"]]
    return Prepared(table, None, None, "key", "pixels")


def test_every_check_but_one_asks_for_covid_19_of_the_images_that_are_scored():
    data = prepared(("Home", True, 1, 3, "main"), ("Home", True, 0, 3, "same_source"), ("NIH", False, 0, 3, "main"))
    labels, rows, question = _question(data, "border")
    assert rows.tolist() == [0, 1, 2, 6, 7, 8] and labels(rows).tolist() == [1, 1, 1, 0, 0, 0]
    assert question == "COVID-19 by a network that sees the margin of the image alone"


def test_origin_asks_for_the_homes_among_images_without_covid_19():
    data = prepared(
        ("Home", True, 1, 9, "main"),
        ("Home", True, 0, LEAST, "same_source"),
        ("NIH", False, 0, LEAST, "main"),
        ("NIH", False, 0, 4, ""),
    )
    labels, rows, question = _question(data, "origin")
    assert rows.tolist() == list(range(9, 9 + 2 * LEAST)) and labels(rows).tolist() == [1] * LEAST + [0] * LEAST
    assert labels(rows[::-1]).tolist() == [0] * LEAST + [1] * LEAST and labels(rows).dtype == np.float32
    assert question == "Home against the other collections, among images without COVID-19"
    data.table.loc[data.table["role"] == "same_source", "finding"] = "SARS"
    assert _question(data, "origin")[2] == f"{question}, {LEAST} of {2 * LEAST} with another disease"


def test_origin_asks_for_the_largest_of_the_homes_among_images_with_covid_19():
    data = prepared(
        ("A", True, 1, 11, "main"),
        ("B", True, 1, 14, "main"),
        ("C", True, 1, 2, "main"),
        ("A", True, 0, LEAST - 1, "same_source"),
        ("NIH", False, 0, 40, "main"),
    )
    labels, rows, question = _question(data, "origin")
    assert len(rows) == 27 and labels(rows).tolist() == [0] * 11 + [1] * 14 + [0] * 2
    assert question == "B against the other collections, among images with COVID-19"


def test_origin_is_not_asked_of_too_few():
    one = prepared(
        ("Home", True, 1, 30, "main"), ("NIH", False, 0, 30, "main"), ("Home", True, 0, LEAST - 1, "same_source")
    )
    assert _question(one, "origin") == (None, None, "not asked: no label has 10 images each of two collections")


def test_folds_of_the_audit_are_those_of_the_run():
    config = dataclasses.replace(DEMO, n_folds=4, folds=(1, 3), audit=dataclasses.replace(DEMO.audit, folds=(0, 1, 3)))
    assert _folds(config) == [1, 3]
    with pytest.raises(InputError, match=r"--audit.folds \(0, 1, 3\): none of them is held out by this run \(\(2,\)\)"):
        _folds(dataclasses.replace(config, folds=(2,)))


def test_a_schedule_without_a_validating_fold():
    assert _schedule(NetworkConfig(schedule="plateau")) == "constant"
    assert _schedule(NetworkConfig(schedule="warm_cosine")) == "warm_cosine"


# ---- networks that see no lung -------------------------------------------------------------------------------------


def planted(folder, marked):
    """20 COVID-19 and 16 other images of Home, 20 of Elsewhere: noise, and with `marked` Home has bright margins."""
    rng, names = np.random.default_rng(0), [f"i{k}" for k in range(56)]
    images = rng.integers(60, 120, (56, SIDE, SIDE), np.uint8)
    if marked:
        images[:36, :3] = images[:36, -3:] = images[:36, :, :3] = images[:36, :, -3:] = 250
    table = pd.DataFrame(
        {
            "image_id": names,
            "file_name": names,
            "row": range(56),
            "ok": True,
            "usable": True,
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
    np.save(folder / "masks.npy", masks)
    return Prepared(table, SimpleNamespace(images=images), folder / "masks.npy", f"key {marked}", "pixels")


@pytest.fixture
def audited(tmp_path):
    """`audited(marked, **audit)`: the context and Prepared of a run that was scored and audited."""
    runs = []

    def make(marked, **options):
        if not runs:
            runs.append(Run(tmp_path / "run"))
            runs[0].describe(0, [])
            runs[0].record("tune", ["first"])
            write_json(runs[0].path("score.json"), dict.fromkeys((*RATES, "tuned", "folds")) | score())
            torch.manual_seed(0)
            for fold in (0, 1):
                runs[0].path(f"fold{fold}", "covid").mkdir(parents=True)
                save_weights(
                    runs[0].path(f"fold{fold}", "covid", "final.safetensors"), build_network(NETWORK).state_dict()
                )
        about = {"checks": ("border", "origin"), "folds": (0, 1), "epochs": 4} | options
        config = dataclasses.replace(
            DEMO,
            network=NETWORK,
            n_folds=2,
            folds=(0, 1),
            store_size=SIDE,
            audit=dataclasses.replace(DEMO.audit, **about),
        )
        data = planted(tmp_path, marked)
        context = SimpleNamespace(
            run=runs[0],
            config=config,
            device=torch.device("cpu"),
            workers=0,
            budget=Budget(),
            solution="covid19",
            preset="demo",
        )
        run_audit(context, data)
        return context, data

    yield make
    for run in runs:
        run.close()


def test_a_marker_in_the_margin_is_found_by_networks_that_see_no_lung(audited):
    context, data = audited(True, checks=("border", "background"), epochs=8)
    found, answers, focus = read_audit(context.run)
    assert found["biased"] and found["said"].startswith("The score is not to be believed")
    assert "margin of the image alone reaches" in found["said"] and "everything but the lungs reaches" in found["said"]
    assert (found["folds"], found["epochs"]) == ([0, 1], 8)
    truth = data.table.set_index("image_id")
    for check in ("border", "background"):
        part = answers[answers["check"] == check]
        about = truth.loc[part["image_id"]]
        assert sorted(part["image_id"]) == sorted(truth.index[truth["role"] == "main"])
        assert (part["label"].to_numpy() == about["label"].to_numpy()).all()
        assert (part["fold"].to_numpy() == about["fold"].to_numpy()).all()
        auroc = roc_auc_score(part["label"], part["probability"])
        said = found["checks"][check]
        assert said["auroc"]["estimate"] == pytest.approx(auroc) and auroc > 0.9 and said["auroc"]["low"] > 0.6
        assert (said["images"], said["positives"]) == (40, 20)
    assert set(focus["view"]) == {"lungs"}  # without a network of the whole image
    assert (focus["label"] == 1).all() and (focus["area"] == 0.25).all() and len(focus) == 20
    assert focus["share"].dropna().between(0, 1).all()
    share = found["focus"]["lungs"]
    assert share["share"]["estimate"] == pytest.approx(focus["share"].mean()) and share["images"] == 20
    assert share["flat"] == focus["share"].isna().sum()


def test_origin_is_told_by_the_run_s_own_view_which_hides_the_margin(audited):
    context, _ = audited(True, checks=("border", "origin"))
    found, answers, _ = read_audit(context.run)
    origin = found["checks"]["origin"]
    assert origin["said"] == "Home against the other collections, among images without COVID-19"
    assert (origin["images"], origin["positives"]) == (36, 16) and origin["auroc"]["low"] < 0.6
    assert found["evidence"][0].startswith("a network that sees the margin") and len(found["evidence"]) == 1
    part = answers[answers["check"] == "origin"]
    assert set(part["image_id"]) == {f"i{k}" for k in range(20, 56)}


def test_images_that_differ_in_nothing_are_not_said_to(audited):
    context, _ = audited(False, checks=("border", "origin"), epochs=2)
    found, *_ = read_audit(context.run)
    assert not found["biased"] and found["evidence"] == []
    assert found["said"] == ("No sign that the images' origin gives the answer away (border, origin).")
    assert all(part["auroc"]["low"] < 0.6 for part in found["checks"].values())


def test_an_audit_is_kept_as_long_as_scores_and_settings_are_the_same(audited, monkeypatch):
    context, _ = audited(True, checks=("border",), epochs=1)
    run, before = context.run, context.run.path("audit.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(audit, "_answers", None)
        audited(True, checks=("border",), epochs=1)
        with pytest.raises(TypeError):  # other networks are asked anew
            audited(True, checks=("border",), epochs=1, margin=0.1)
    assert run.path("audit.json").read_bytes() == before
    with pytest.raises(InputError, match=r"fold0/audit-border: holds a training with another configuration"):
        audited(True, checks=("border",), epochs=2)
    assert run.step("audit") is None  # what was found before does not hold for the new settings
    assert "border" in audited(True, checks=("border",), epochs=1)[0].config.audit.checks
    assert run.path("audit.json").read_bytes() == before


def test_an_audit_that_asks_nothing(audited):
    context, _ = audited(True, checks=(), epochs=1)
    found, answers, focus = read_audit(context.run)
    assert found["checks"] == {} and len(answers) == 0 and len(focus) == 20
    assert "could not be told" in found["said"] and not found["biased"]


def test_networks_that_look_nowhere(audited, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(audit, "heat_maps", lambda model, data, rows, *more: np.zeros((len(rows), 2, 2), np.float32))
        context, _ = audited(True, checks=(), epochs=1)
    found, _, focus = read_audit(context.run)
    assert found["focus"]["lungs"] == {"share": NEVER, "area": 0.25, "images": 20, "flat": 20}
    assert focus["share"].isna().all()
    one = audit._mean_share(np.array([0.2, np.nan, 0.6]), np.array(["p", "p", "p"]), 0)
    assert one.estimate == pytest.approx(0.4) and np.isnan(one.low)  # no interval of one patient


def test_a_fold_that_leaves_one_kind_is_named(audited, monkeypatch):
    context, data = audited(True, checks=(), epochs=1)
    data.table["fold"] = np.where(data.table["label"] == 1, 0, 1)
    config = dataclasses.replace(context.config, audit=dataclasses.replace(context.config.audit, checks=("border",)))
    context.config = config
    with pytest.raises(InputError, match="audit, border: fold 0 leaves images of one kind alone to learn from"):
        run_audit(context, data)
    assert not read_json(context.run.path("manifest.json"))["steps"].get("audit")
