"""The paper's comparisons and the range tests on a finished tiny run, and its page in a real browser."""

import re

import numpy as np
import pandas as pd
import pytest

from tests import browser

SECTIONS = ("Data", "Decision", "Presence and calibration", "Pictures", "Training", "Submission", "This run")


@pytest.mark.long
def test_ablation_makes_the_papers_comparisons_and_reuses_trainings(run_copy, command):
    before = {path: path.read_bytes() for path in run_copy.glob("fold*/*/final.safetensors")}
    result = command("ablate", "--out", "run", "--segmenter.batch-size", "2")  # fold 0 has two positives to train on
    assert (result.status, result.errors) == (0, [])
    trained = {path.parent.name for path in run_copy.glob("fold*/*/final.safetensors")}
    assert trained == {"classifier", "segmenter-64", "enrichment-classifier", "positives-segmenter-64"}
    assert all(path.read_bytes() == content for path, content in before.items())
    table = pd.read_csv(run_copy / "ablation.csv")
    assert list(table["setting"]) == [
        "as the paper chose",
        "without",
        "classic SWA",
        "4500 px at 1024",
        "750 px at 512",
        "1750 px at 1024",
        "250 px at 512",
        "enrichment",
        "positives alone",
    ]
    assert table[["dice", "low", "high"]].to_numpy().min() >= 0 and (table["low"] <= table["high"]).all()
    np.testing.assert_allclose(table["change"][1:], table["dice"][1:] - table["dice"][0], atol=1e-9)
    assert not (run_copy / "ablation").exists()
    assert command("report", "--out", "run").status == 0
    page, base = (run_copy / "report.html").read_text(), table.iloc[0]
    assert "Ablation" in page and f"{base['dice']:.4f} [{base['low']:.4f}" in page
    assert "Beside the paper" in page and "0.7702" in page and "enrichment-classifier" in page
    assert "radiograph, truth, prediction before and after small regions" in page
    again = command("ablate", "--out", "run", "--segmenter.batch-size", "2")
    assert again.status == 0 and "epoch" not in again.out
    assert pd.read_csv(run_copy / "ablation.csv").equals(table)


def test_ablation_says_what_it_needs(run_copy, command):
    line = command("ablate", "--out", "run", "--segmenter.averaging", "best").errors[0]
    assert "window and classic" in line


@pytest.mark.long
def test_range_tests_of_both_networks(run_copy, command):
    result = command("find_lr", "--out", "run")
    assert (result.status, result.errors) == (0, [])
    for name in ("classifier", "segmenter-64"):
        table = pd.read_csv(run_copy / f"lr_{name}.csv")
        assert np.all(np.diff(table["lr"]) > 0) and table["suggestion"].iloc[0] in table["lr"].to_numpy()
    assert command("report", "--out", "run").status == 0
    assert "Learning rates" in (run_copy / "report.html").read_text()


def test_the_page_of_a_run_in_a_browser(finished, tmp_path):
    browser.chromium()
    page = finished / "run" / "report.html"
    headings = re.findall(r"<h2>([^<]*)</h2>", page.read_text())
    assert [title for title in headings if title in SECTIONS] == list(SECTIONS)
    for width in (1200, 390):
        broken, overflow, images = browser.probe(page, width, 900)
        assert (broken, overflow) == (0, 0) and images > 0
    picture = browser.screenshot(page, 1200, 900)
    assert picture.std() > 5
