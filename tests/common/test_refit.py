"""The settings of a refit, from what the folds left."""

from types import SimpleNamespace

import pandas as pd

from common.config import FitConfig
from common.paths import write_json
from common.refit import chosen_settings
from common.runs import Run


def test_a_plateau_becomes_steps_at_the_folds_median_epochs(tmp_path):
    run = Run(tmp_path / "run")
    losses = {
        0: [9, 8, 8, 8, 7, 7, 7, 7],  # reduced before epochs 4 and 7
        1: [9, 9, 9, 8, 8, 8, 8, 8],  # before 3, 6 and 8
        2: [9, 8, 7, 6, 6, 6, 6, 6],  # before 6 and 8
    }
    for fold, values in losses.items():
        folder = run.path(f"fold{fold}", "net")
        folder.mkdir(parents=True)
        pd.DataFrame({"epoch": range(8), "loss": values}).to_csv(folder / "history.csv", index=False)
        variants = {"best": {"epochs": [5], "loss": 1.0}}
        write_json(folder / "variants.json", {"chosen": "best", "metric": "loss", "variants": variants})
    config = FitConfig(epochs=8, schedule="plateau", patience=2, metric="-loss", averaging=("best",))
    job, network = SimpleNamespace(run=run), SimpleNamespace(stage="net", config=config)
    found = chosen_settings(job, network)
    assert (found["schedule"], found["milestones"], found["epochs"]) == ("step", [4, 7], 6)
    network.config = FitConfig(epochs=8, schedule="plateau", patience=8, metric="-loss", averaging=("best",))
    assert chosen_settings(job, network)["milestones"] == []
    network.config = FitConfig(epochs=8, metric="-loss", averaging=("best",))
    assert "milestones" not in chosen_settings(job, network)
    run.close()
