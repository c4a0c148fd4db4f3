"""Sections of every run's page, from files as a training and a range test leave them."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from common.errors import InputError
from common.paths import write_json
from common.report import sections
from common.runs import Run


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    yield run
    run.close()


def trained(run, name, variants=True, metric="dice"):
    folder = run.path(name, "network")
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


def test_synthetic_images_are_said_to_be(run):
    for synthetic in (True, False):
        run.record("prepare", 1, synthetic=synthetic)
        note = sections.synthetic(SimpleNamespace(run=run))
        assert (note is not None) == synthetic and (not synthetic or "Synthetic radiographs" in note)


def test_every_training_has_its_curves_and_variants(run):
    context = SimpleNamespace(run=run)
    assert sections.training(context) == []
    trained(run, "fold0", metric="-loss")
    trained(run, "fold1", variants=False)  # not finished
    run.path("masks").mkdir()
    (section,) = sections.training(context)
    text = section.body
    assert text.count("<svg") == 2 and "fold0, network" in text and "fold1, network" in text
    cells = [cell for cell in ("kept", "every step", "loss", "0.8000", "0.7000") if cell in text]
    assert len(cells) == 5  # the epochs of the average, 2, count from 1
    assert text.count("kept</td>") == 1


def test_range_tests(run):
    assert sections.learning_rates(run) is None
    rates = pd.DataFrame({"lr": [1e-5, 1e-4, 1e-3, 1e-2], "loss": [1.0, 0.9, 0.5, 2.0], "suggestion": 1e-4})
    rates.to_csv(run.path("lr_network.csv"), index=False)
    assert "network: the loss while the rate rises" in sections.learning_rates(run).body


def test_what_a_run_was_made_with(run):
    run.describe(3, [])
    run.record("prepare", 1, store="<b>")
    run.path("config.json").write_text(json.dumps({"preset": "demo", "network": {"lr": 0.125}}))
    text = sections.about(run).body
    assert "torch" in text and "0.1250" in text and "&lt;b&gt;" in text and "<b>" not in text
    run.path("config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not a JSON file"):
        sections.about(run)
