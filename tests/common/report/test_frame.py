"""The frame of every run's page, from files as a training, a range test and a submission leave them."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from common.errors import InputError
from common.paths import read_json, write_json
from common.report import page
from common.report.frame import step_section, synthetic_note, write_report
from common.runs import Run

REPORT = SimpleNamespace(
    TITLE="Chests",
    EXPERIMENTS=("audit-",),
    headline=lambda job, score: [page.cards([("Dice", score["dice"], "")])],
    sections=lambda job: [None, page.section("Own"), step_section(job, "ablate", "Ablation", lambda job: ["changes"])],
    submission=lambda job, record: ["its rows"],
    hints=lambda job, score, trainings: [f"{len(trainings)} trainings: `--own 1`"],
)


@pytest.fixture
def job(tmp_path):
    """A prepared run, whose steps are current if they are in `job.current`."""
    run, current = Run(tmp_path / "run"), set()
    run.describe(3, [])
    run.record("prepare", 1, synthetic=False, store="<b>")
    write_json(run.path("config.json"), {"preset": "demo", "network": {"lr": 0.125}})
    images = SimpleNamespace(table=pd.DataFrame({"split": ["train", "test"], "patient_id": ["p", ""]}))
    scores = pd.DataFrame([(0, 7, 0.5, 0.25, 0.75)], columns=["fold", "images", "estimate", "low", "high"])
    comparison = SimpleNamespace(scores_by_fold=lambda job: scores)
    config = SimpleNamespace(folds=(0,), n_folds=5, seed=0)
    recipe = SimpleNamespace(networks=lambda job: [], comparison=comparison)
    about = {"config": config, "recipe": recipe, "current": current, "is_current": current.__contains__}
    yield SimpleNamespace(run=run, preset="demo", images=images, is_blend=False, **about)
    run.close()


def written(job):
    write_report(job, REPORT)
    return job.run.path("report.html").read_text()


def headings(text):
    return re.findall(r"<h2>([^<]*)</h2>", text)


def trained(run, name, stage="network", variants=True, metric="dice"):
    folder = run.path(name, stage)
    folder.mkdir(parents=True)
    history = {
        "epoch": [0, 1, 2],
        "lr": [0.1] * 3,
        "train_loss": [3.0, 2.0, 1.0],
        "dice": [0.5, 0.75, 0.7],
        "loss": [1.0, 0.8, 0.9],
    }
    pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
    if variants:
        values = {"best": {"epochs": [1], "dice": 0.75, "loss": 0.8}, "ema": {"epochs": [], "dice": 0.875, "loss": 0.7}}
        write_json(folder / "variants.json", {"chosen": "best", "metric": metric, "variants": values})


def test_a_page_without_results_says_which_verb_comes_next(job):
    text = written(job)
    assert headings(text) == ["Own", "This run"] and "No score yet: run `tune`." in text
    assert "<h1>Chests, preset demo</h1>" in text and "Synthetic" not in text and "No patient ids" not in text
    assert "torch" in text and "0.1250" in text and "&lt;b&gt;" in text and "<b>" not in text
    job.run.path("config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not a JSON file"):
        written(job)


def test_results_are_shown_while_they_are_current(job):
    write_json(job.run.path("score.json"), {"dice": 0.625})
    write_json(job.run.path("tuned.json"), {})
    for step in ("tune", "ablate", "submit"):
        job.run.record(step, 1, rows=1234, hidden={"value": 0.5, "nothing": 0.25})
    text = written(job)
    assert headings(text) == ["Own", "This run"] and "0.6250" not in text and "its rows" not in text
    assert "The score is out of date: run `tune` again." in text
    assert "Ablation: out of date, run `ablate` again." in text and "Submission: out of date" in text
    job.current |= {"tune", "ablate", "submit"}
    text = written(job)
    assert headings(text) == ["What to try next", "Own", "Ablation", "Submission", "This run"]
    assert (
        "<li>0 trainings: <code>--own 1</code></li><li>1 of 5 folds are trained" in text and "out of date" not in text
    )
    assert "0.6250" in text and "changes" in text and "its rows" in text
    assert "1,234 rows" in text and "hidden labels: 0.5000 (trivial submission 0.2500)" in text
    job.run.record("submit", 1, rows=0, hidden=None)
    text = written(job)
    assert "No test images." in text and "its rows" not in text
    job.run.path("score.json").write_text("[]")
    with pytest.raises(InputError, match=r"score\.json: damaged"):
        written(job)


def test_warnings_about_the_images(job):
    job.run.record("prepare", 1, synthetic=True)
    job.images.table["patient_id"] = ""
    notes = re.findall(r'<aside class="note (\w+)"[^>]*>([^<]*)<', written(job))
    assert [kind for kind, _ in notes] == ["warning", "warning", "info"]
    assert notes[0][1] in synthetic_note(job.run) and notes[1][1].startswith("No patient ids")


def test_every_training_has_its_curves_and_variants(job):
    trained(job.run, "fold0", metric="-loss")
    trained(job.run, "fold1", variants=False)  # not finished
    trained(job.run, "fold0", "audit-border", variants=False)
    trained(job.run, "fold1", "audit-border", variants=False)
    job.run.path("masks").mkdir()
    job.current.add("tune")
    write_json(job.run.path("score.json"), {"dice": 0.625})
    write_json(job.run.path("tuned.json"), {})
    text = written(job)
    own, folded = text.split("2 trainings of experiments")
    assert "<li>2 trainings:" in text  # those of experiments get no hints
    first, second = re.findall(r"<tr><td.*?</tr>", own)[:2]
    assert re.findall(">([^<]+)</td>", first) == ["0", "7", "0.5000 [0.2500,\u00a00.7500]", "network 2", "3"]
    assert re.findall(">([^<]+)</td>", second) == ["1", "–", "–", "–", "3"]
    assert own.count("<svg") == 3 and folded.count("<svg") == 2
    assert "fold0, network" in own and "fold1, network" in own
    assert "fold0, audit-border" in folded and "fold1, audit-border" in folded
    cells = [cell for cell in ("kept", "every step", "loss", "0.8000", "0.7000") if cell in own]
    assert own.count("the validation loss is lowest in epoch 2") == 4  # twice a figure: caption and label
    assert len(cells) == 5  # the epochs of the average, 2, count from 1
    assert own.count("kept</td>") == 1


def test_a_metric_that_a_fold_leaves_undefined(job):
    trained(job.run, "fold0", metric="auroc")
    path = job.run.path("fold0", "network", "variants.json")
    summary = read_json(path)
    summary["variants"]["best"]["auroc"] = summary["variants"]["ema"]["auroc"] = None  # as written for NaN
    write_json(path, summary)
    history = pd.read_csv(path.with_name("history.csv")).assign(auroc=np.nan)
    history.to_csv(path.with_name("history.csv"), index=False)
    assert "fold0, network" in written(job)


def test_range_tests(job):
    rates = pd.DataFrame({"lr": [1e-5, 1e-4, 1e-3, 1e-2], "loss": [1.0, 0.9, 0.5, 2.0], "suggestion": 1e-4})
    rates.to_csv(job.run.path("lr_network.csv"), index=False)
    rates.to_csv(job.run.path("lr_earlier.csv"), index=False)
    job.run.record("find_lr", 1, made={"lr_network.csv": 1})
    assert "Learning rates" not in headings(written(job))
    job.current.add("find_lr")
    text = written(job)
    assert "network: loss while the learning rate rises" in text and "earlier: loss" not in text


def test_a_manifest_s_text_is_escaped(job):
    job.run.path("config.json").write_text(json.dumps({"preset": "<i>"}))
    assert "&lt;i&gt;" in written(job)
