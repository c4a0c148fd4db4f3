"""The page of a run made by hand: 24 images, two folds, networks of a few weights."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch

from common.errors import InputError
from common.paths import read_json, write_json
from common.report import class_plots, plots
from common.report.frame import write_report
from common.train.checkpoint import save_weights
from solutions.covid19 import comparison, report
from solutions.covid19.audit import focus_networks
from solutions.covid19.config import DEMO
from solutions.covid19.data import SELECTION
from solutions.covid19.models import build_network
from solutions.covid19.report import count_reasons
from tests import browser

SIZE, N = 32, 24
NETWORK = dataclasses.replace(DEMO.network, backbone="test_resnet", weights="none", size=SIZE, precision="fp32")
CONFIG = dataclasses.replace(
    DEMO, network=NETWORK, n_folds=2, folds=(0, 1), store_size=SIZE, audit=dataclasses.replace(DEMO.audit, folds=(0, 1))
)
INTERVAL = {"estimate": 0.875, "low": 0.75, "high": 0.95}


def image_table():
    """12 COVID-19 and 4 other images of Home, 8 of Elsewhere, a patient each; the last of Elsewhere fails the gate."""
    names = [f"im{i}" for i in range(N)]
    home = np.arange(N) < 16
    role = np.where(np.arange(N) < 12, "main", np.where(home, "same_source", "main")).astype(object)
    role[-1] = ""
    return pd.DataFrame(
        {
            "image_id": names,
            "file_name": [f"{name}.png" for name in names],
            "row": range(N),
            "ok": True,
            "collection": np.where(home, "Home", "Elsewhere"),
            "home": home,
            "patient_id": [f"p{i}" for i in range(N)],
            "age": 50.0,
            "label": (np.arange(N) < 12).astype(np.int8),
            "split": "train",
            "role": role,
            "fold": np.where(role == "", -1, np.arange(N) % 2),
            "area": 0.25,
            "usable": role != "",
        }
    )


def answers(table):
    oof = table.loc[table["fold"] >= 0, ["image_id", "fold"]].reset_index(drop=True)
    return oof.assign(probability=0.93 - 0.04 * np.arange(len(oof)))


@pytest.fixture
def job(job_of):
    """The job of a run that has its scores; the steps in `current` are current."""
    table, masks = image_table(), np.zeros((N, SIZE, SIZE), np.uint8)
    masks[:, 8:24, 8:24] = 1
    job = job_of(CONFIG, table, np.random.default_rng(0).integers(30, 255, (N, SIZE, SIZE), np.uint8), masks)
    run = job.run
    run.describe(0, [])
    run.record("prepare", [], synthetic=False)
    selection = table.assign(kept=table["usable"], view_said="PA", finding=["COVID-19"] * 12 + ["SARS"] * 3 + [""] * 9)
    selection["reason"] = np.where(table["usable"], "", "lungs: too small")
    selection[SELECTION].to_csv(run.path("selection.csv"), index=False)
    oof = answers(table)
    oof.to_parquet(run.path("oof.parquet"))
    known = oof.merge(table.drop(columns="fold"), on="image_id")
    main = known[known["role"] == "main"]
    comparison.fold_table(main, np.full(len(main), 0.5)).to_csv(run.path("per_fold.csv"), index=False)
    write_json(run.path("score.json"), comparison.summarise(known, np.full(len(main), 0.6)))
    write_json(run.path("tuned.json"), {"rule": {"threshold": 0.6}})
    run.record("predict", [], images=len(oof))
    run.record("tune", ["first"], score=0.9)
    torch.manual_seed(0)
    for fold in (0, 1):
        for stage in ("covid", "audit-image"):
            run.path(f"fold{fold}", stage).mkdir(parents=True)
            save_weights(run.path(f"fold{fold}", stage, "final.safetensors"), build_network(NETWORK).state_dict())
    run.write_config("covid19", "demo", CONFIG)
    job.current = {"tune", "audit"}
    job.is_current = lambda step: step in job.current and run.step(step) is not None
    return job


def audited(job, biased):
    """Files of a finished audit."""
    run, ids = job.run, answers(job.images.table)["image_id"]
    checks = {
        "border": {"auroc": INTERVAL, "said": "by the margin", "images": 19, "positives": 12},
        "origin": {"auroc": None, "said": "skipped: too few"},
        "view": {"auroc": INTERVAL, "said": "AP against PA", "images": 19, "accuracy": 0.8, "epochs": 3},
    }
    focus = {view: {"share": INTERVAL, "area": 0.25, "images": 19, "flat": 1} for view in ("lungs", "image")}
    said = "The origin <gives> it away." if biased else "No sign of the origin."
    write_json(
        run.path("audit.json"),
        {"checks": checks, "focus": focus, "folds": [0, 1], "biased": biased, "said": said, "evidence": []},
    )
    views = pd.DataFrame({"image_id": ids, "check": "view", "label": 0, "probability": 0.042 * np.arange(len(ids))})
    views.to_parquet(run.path("audit.parquet"))
    shares = [pd.DataFrame({"view": view, "image_id": ids, "share": 0.5, "area": 0.25}) for view in focus]
    pd.concat(shares).to_parquet(run.path("focus.parquet"))
    run.record("audit", [], of=run.step("tune")["key"], biased=biased)


@pytest.fixture
def bare(monkeypatch):
    """Pages without plots, which take longest: their captions become notes."""
    for name in ("histogram", "score_with_interval", "forest", "confusion_matrix"):
        monkeypatch.setattr(plots, name, lambda *args, **options: None)
    monkeypatch.setattr(class_plots, "reliability_panels", lambda *args, **options: None)


def page_of(job):
    write_report(job, report)
    return job.run.path("report.html").read_text()


def first_line(text):
    return re.search(r"</header>\s*<aside class=\"note (\w+)\"[^>]*>([^<]*)</aside>", text).groups()


def test_the_first_line_is_whether_the_score_can_be_believed(job, bare):
    kind, said = first_line(page_of(job))
    assert kind == "info" and "has not been audited" in said
    assert said.endswith(f"cxr covid19 audit --out {job.run.folder}")
    audited(job, biased=True)
    assert first_line(page_of(job)) == ("warning", "The origin &lt;gives&gt; it away.")
    audited(job, biased=False)
    assert first_line(page_of(job)) == ("info", "No sign of the origin.")
    job.current.remove("audit")
    text = page_of(job)
    assert "has not been audited" in first_line(text)[1] and "<h2>Audit" not in text
    assert "Audit: out of date, run `audit` again." in text
    job.current.clear()
    text = page_of(job)
    assert first_line(text)[1].startswith("The score is out of date")
    assert "<h2>Folds" not in text and "<h2>Audit" not in text and "<h2>Data" in text


def cards(text):
    return dict(re.findall(r'<div class="label">([^<]*)</div><div class="value">([^<]*)</div>', text))


def test_the_headline_stands_beside_the_same_collections(job):
    text = page_of(job)
    # the ranking: COVID-19 (the twelfth at 0.49), then the others of Home, then those of Elsewhere
    assert cards(text) == {
        "AUROC out of fold": "1.0000",
        "AUROC, same collections": "1.0000",
        "Accuracy": f"{18 / 19:.4f}",
        "Sensitivity": f"{11 / 12:.4f}",
        "Specificity": "1.0000",
    }
    assert "12 against 4 images" in text and "never trained on" in text
    assert "ROC curve of the images of the same collections" in text
    path = job.run.path("score.json")
    write_json(path, read_json(path) | {"same_source": None})
    text = page_of(job)
    assert cards(text)["AUROC, same collections"] == "–" and "unknown: the collections with" in text


def rows_of(text, caption):
    """Cells of the table with this caption, its head first."""
    table = re.search(rf"<caption>{caption}[^<]*</caption>(.*?)</table>", text)[1]
    return [re.findall(r"<t[hd](?: [^>]*)?>([^<]*)<", row) for row in table.split("</tr>")[:-1]]


def test_folds_their_mean_and_the_paper_beside_it(job, bare):
    text = page_of(job)
    head, even, odd = rows_of(text, "At a probability of 0.5")
    assert head[:6] == ["fold", "images", "tp", "fn", "tn", "fp"] and even[:6] == ["0", "10", "6", "0", "4", "0"]
    assert odd == ["1", "9", "5", "1", "3", "0", "0.8889", f"{5 / 6:.4f}", "1.0000", "0.7500"]
    mean, sd, every, paper, *_ = rows_of(text, "Means over folds")[1:]
    assert mean[1:] == [f"{(1 + 8 / 9) / 2:.4f}", f"{(1 + 5 / 6) / 2:.4f}", "1.0000", f"{(1 + 3 / 4) / 2:.4f}"]
    assert sd[1] == f"{(1 - 8 / 9) / 2**0.5:.4f}" and sd[4] == f"{1 / 4 / 2**0.5:.4f}"
    assert every[1:] == [f"{18 / 19:.4f}", f"{11 / 12:.4f}", "1.0000", f"{7 / 8:.4f}"]
    assert paper == ["HRNet (paper)", "0.9926", "0.9853", "–", "0.9882"]  # its specificity is TN / (TN + FN)
    assert f">Out of fold, at a probability of 0.5: accuracy {18 / 19:.4f}" in text
    job.run.path("per_fold.csv").write_text("")
    with pytest.raises(InputError, match=r"per_fold.csv: damaged"):
        page_of(job)


def test_rejected_images_are_shown_with_the_reason(job, bare):
    text = page_of(job)
    assert "no COVID-19 · im23: too small" in text
    assert ["without", "12", "1", f"{1 / 12:.4f}"] in rows_of(text, "Images checked")
    assert ["Elsewhere", "no COVID-19", "8", "7", "1", "1 lungs"] in rows_of(text, "Rows of the tables")


def test_reasons_that_differ_in_a_number_or_a_name_are_one():
    reasons = [
        "",
        "lateral (L)",
        "lateral (Lateral)",
        "age 12",
        "same image as a (Home)",
        "same image as b (NIH)",
        "the patient of the test image t.png",
        "the same file as c (row 4)",
        "lungs: one",
        "not drawn: negatives 5",
    ]
    table = pd.DataFrame({"collection": "Home", "label": 1, "reason": reasons, "kept": [not r for r in reasons]})
    table.loc[9, "label"] = -1
    known, unknown = count_reasons(table).to_dict("records")
    assert (known["rows"], known["used"], known["left out"], known["label"]) == (9, 1, 8, "COVID-19")
    assert set(known["because of"].split(", ")) == {
        "2 lateral",
        "1 age",
        "2 same image",
        "1 the same file",
        "1 lungs",
        "1 the patient of the test image",
    }
    assert (unknown["label"], unknown["used"], unknown["because of"]) == ("unknown", 0, "1 not drawn")


def test_the_audit_stands_beside_the_headline(job):
    audited(job, biased=True)
    text = page_of(job)
    asked = rows_of(text, "What each network")
    assert ["the margin", "by the margin", "19", "–", "0.8750 [0.7500,\u00a00.9500]", "–"] in asked
    assert ["distinguishes collections", "skipped: too few", "–", "–", "–", "–"] in asked
    assert ["distinguishes AP from PA", "AP against PA", "19", "3", "0.8750 [0.7500,\u00a00.9500]", "0.8000"] in asked
    doubtful = text.split("Images whose look contradicts the view in their table")[1].split("</details>")[0]
    assert [name in doubtful for name in ("im21", "im22", "0.9240", "Elsewhere")] == [False, True, True, True]
    assert ["the lungs", "0.8750 [0.7500,\u00a00.9500]", "0.2500", "19", "1"] in rows_of(
        text, "Mean share of a heat map"
    )
    plot = re.search(r"<svg [^>]*aria-label=\"Margin, background.*?</svg>", text, re.S)[0]
    assert [name in plot for name in ("this run: the lungs", "this run, same collections", "the margin")] == [True] * 3
    assert "COVID-19, probability 0.490 · im11" in text  # the one that is missed


def test_the_page_in_a_browser(job, bare):
    audited(job, biased=True)
    page_of(job)
    for width in (1200, 400):
        broken, overflow, images = browser.probe(job.run.path("report.html"), width, 900)
        # two of each kind and the rejected one with their lungs, four views of each label, two maps of the surest five
        augmented = 4 * 5  # two of each label, plain and under four draws
        assert (broken, overflow, images) == (0, 0, 2 * (6 + 1) + 2 * 4 + 2 * 5 + 1 + augmented)


def test_pictures_are_of_the_surest_answers_and_the_surest_mistakes():
    probability = [0.9, 0.2, 0.8, 0.1, 0.7, 0.45, 0.6, 0.3]
    table = pd.DataFrame({"label": [1, 1, 1, 0, 0, 0, 1, 1], "probability": probability}, index=range(10, 18))
    assert report.pick_answers(table).index.tolist() == [10, 12, 13, 15, 11, 14]
    right = table.loc[[10, 12, 13, 15, 16]]
    assert report.pick_answers(right).index.tolist() == [10, 12, 13, 15]
    assert report.pick_answers(table.loc[[11, 14]]).index.tolist() == [11, 14]


def test_maps_are_those_of_each_image_s_own_network_and_kept(job, monkeypatch):
    made, maps = [], report.heat_maps

    def heat_maps(job, network, rows, *more):
        made.append((network.stage, rows.tolist()))
        return maps(job, network, rows, *more)

    monkeypatch.setattr(report, "heat_maps", heat_maps)
    networks = {fold: focus_networks(CONFIG, fold) for fold in (0, 1)}
    shown = job.images.table.loc[[3, 0, 1], ["image_id", "row", "fold", "label"]].assign(probability=0.5)
    first = report.compute_heat_maps(job, shown, networks)
    assert made == [(stage, rows) for rows in ([0], [3, 1]) for stage in ("covid", "audit-image")]
    expected = maps(job, networks[1]["lungs"], np.array([3]), torch.device("cpu"), "")
    assert np.allclose(first["lungs"][0], expected[0], atol=1e-6) and expected.max() > 0
    again = report.compute_heat_maps(job, shown, networks)
    assert len(made) == 4 and all((again[view] == first[view]).all() for view in ("lungs", "image"))
    save_weights(job.run.path("fold0", "covid", "final.safetensors"), build_network(NETWORK).state_dict())
    report.compute_heat_maps(job, shown, networks)
    assert len(made) == 8
