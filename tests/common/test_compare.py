"""Runs side by side: means over folds, pooled intervals and paired differences, from hand-made predictions."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from common.cli import VERBS
from common.compare import compare, comparison_tools, groups_of, side_by_side
from common.errors import InputError
from common.paths import read_json, write_json
from tests.toy import COMPARISON, TOY, Config, make_job, rated, results, write_data

TOOLS = comparison_tools(TOY, Config)
table = TOOLS["table"]


def test_figures_by_hand():
    one = pd.DataFrame({"patient_id": list("aabbcc"), "fold": [0, 0, 0, 1, 1, 1], "truth": [1, 0, 1, 0, 1, 0]})
    one["probability"] = [0.9, 0.9, 0.1, 0.1, 0.9, 0.1]
    one["image_id"] = [f"i{number}" for number in range(6)]
    tables = {"one": rated(one), "two": rated(one.assign(probability=[0.9, 0.1, 0.1, 0.1, 0.9, 0.1]))}
    found = compare(tables, COMPARISON, "one").set_index(["run", "metric"])
    first, second = found.loc[("one", "accuracy")], found.loc[("two", "accuracy")]
    assert first["fold_mean"] == pytest.approx((1 / 3 + 1) / 2) and first["fold_sd"] == pytest.approx(2 / 3 / 2**0.5)
    assert first["pooled"] == pytest.approx(4 / 6) and first["folds"] == 2 and pd.isna(first["difference"])
    assert second["pooled"] == pytest.approx(5 / 6) and second["difference"] == pytest.approx(1 / 6)
    assert 0 <= second["difference_low"] <= 1 / 6 <= second["difference_high"] <= 1 / 2
    # only patient a differs; (2/3)^3 of the resamples lack it, and have no difference
    assert second["p"] == pytest.approx(2 * (2 / 3) ** 3, abs=0.08)
    assert found.loc[("one", "precision"), "pooled"] == pytest.approx(2 / 3)
    assert found.loc[("two", "precision"), "difference"] == pytest.approx(1 / 3)
    mean, pooled, paired = side_by_side(found.reset_index(), "one").values()
    assert mean["run"].tolist() == ["one", "two"] and mean["accuracy"][0] == "0.6667 ± 0.4714"
    assert pooled["accuracy"][1].startswith("0.8333 [") and paired["run"].tolist() == ["two"]
    assert paired["accuracy"][0].startswith("+0.1667 [")


def test_the_headline_score_of_each_fold_resamples_its_patients():
    found = pd.DataFrame({"image_id": list("abcde"), "patient_id": list("vwxyz"), "fold": [0, 0, 1, 1, 2]})
    found["accuracy"], found["precision"] = [0.0, 1.0, 0.5, 0.5, 0.25], np.nan
    table = replace(COMPARISON, results=lambda job, split: {"": found}).scores_by_fold(None)
    assert table["fold"].tolist() == [0, 1, 2] and table["images"].tolist() == [2, 2, 1]
    assert table["estimate"].tolist()[:2] == [0.5, 0.5] and table["low"].tolist()[:2] == [0.0, 0.5]
    assert table.loc[2, "estimate"] == 0.25 and table.loc[2, ["low", "high"]].isna().all()  # one group: no interval


def test_a_metric_that_a_fold_lacks_counts_in_the_others():
    def measure(table, groups, n_resamples, seed):
        return {"mean": (table["value"].mean(), np.zeros(n_resamples))} if len(table) > 1 else {}

    table = pd.DataFrame({"image_id": list("abc"), "patient_id": "", "fold": [0, 1, 1], "value": [9.0, 1.0, 2.0]})
    found = compare({"one": table}, replace(COMPARISON, measure=measure), "one", 5).iloc[0]
    assert (
        found["folds"] == 1 and found["fold_mean"] == 1.5 and found["pooled"] == 4 and len(set(groups_of(table))) == 3
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("compared")
    write_data(root / "data")
    for name in [*VERBS][:3]:
        job = make_job(root / "a", data=root / "data")
        TOY.verbs()[name](job)
        job.run.close()
    return root


@pytest.fixture
def runs(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [shutil.copytree(finished / "a", tmp_path / name) for name in "ab"]


def test_the_same_run_twice_does_not_differ(runs, tmp_path, caplog):
    caplog.set_level("INFO")
    assert table(tuple(runs), out=tmp_path / "table.csv", resamples=50) == 0
    found = pd.read_csv(tmp_path / "table.csv")
    assert found["run"].tolist() == ["a", "a", "b", "b"] and (found["difference"].dropna() == 0).all()
    assert found["p"].dropna().tolist() == [1.0, 1.0]
    for text in ("oof: 8 images of 4 patients", "against a, paired by patient", "theirs", "A note."):
        assert text in caplog.text


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    def refuses(message, *folders, **options):
        with pytest.raises(InputError, match=message):
            table(folders, **options)

    refuses("name the folders of the runs")
    refuses("a: named twice", *[runs[0]] * 3)
    refuses("nowhere: not the folder of a finished run", tmp_path / "nowhere")
    refuses("--against c: the rows are a, b", *runs, against="c")
    refuses("--resamples 0 must be at least 1", *runs, resamples=0)
    config = read_json(runs[1] / "config.json")
    write_json(runs[1] / "config.json", config | {"tta": ["flip"]})
    refuses("`predict` is out of date", *runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found, run: found[int(run == "b") :], "b: 1 images are predicted by it or by .*a alone, such as i02"),
        (lambda found, run: found.assign(truth=run), "b: another truth of i00 than in"),
        (lambda found, run: found.assign(patient_id=run), "b: another patient_id of i00 than in"),
    ],
)
def test_runs_on_other_images_are_refused(runs, change, message):
    def changed(job, split):
        return {"": change(results(job, split)[""], job.run.folder.name)}

    tools = comparison_tools(replace(TOY, comparison=replace(COMPARISON, results=changed)), Config)
    with pytest.raises(InputError, match=message):
        tools["table"](tuple(runs))
