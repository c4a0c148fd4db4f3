"""The verbs of every solution on a hand-made recipe: what they write, join, pool, and when they do it again."""

import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from common import predictions
from common import recipe as engine
from common.cli import VERBS
from common.errors import InputError
from common.infer.predict import write_masks
from common.network import first_networks
from common.paths import read_array, read_json, write_json
from common.runs import Run
from common.step import Step
from tests.running import write_times
from tests.toy import TOY, Config, make_job, write_data


@pytest.fixture
def verbs(tmp_path):
    """`verbs(*names)`: runs verbs, by default all but `report`, each on a Job of its own, and returns the last Job."""
    data = write_data(tmp_path / "data")

    def run(*names, config=None, recipe=TOY, **options):
        for name in names or [*VERBS][:-1]:
            job = make_job(tmp_path / "run", config, recipe, **{"data": data} | options)
            try:
                recipe.verbs()[name](job)
            finally:
                job.run.close()
        return job

    return run


def test_a_run_predicts_each_image_once_and_answers_every_test_image(verbs, tmp_path):
    verbs()
    run = tmp_path / "run"
    oof, test = pd.read_parquet(run / "oof.parquet"), pd.read_parquet(run / "test.parquet")
    folds = pd.read_parquet(run / "images.parquet").set_index("image_id")["fold"]
    assert list(oof.columns) == ["image_id", "row", "fold", "bright"] and sorted(oof["row"]) == list(range(8))
    assert oof["fold"].tolist() == folds[oof["image_id"]].tolist() == [0] * 4 + [1] * 4
    assert test["fold"].tolist() == [-1] * 4
    rows = pd.read_csv(run / "submission.csv")
    assert rows["id"].tolist() == ["i08", "i09", "i10", "i11"]
    np.testing.assert_allclose(rows["bright"], test["bright"], rtol=1e-6)
    assert read_json(run / "tuned.json")["cut"] in (0.4, 0.5) and (run / "cuts.csv").is_file()
    steps = [step for step in read_json(run / "manifest.json")["steps"] if " " not in step]
    assert steps == ["prepare", "predict", "tune", "submit"]
    assert not list(run.glob("fold*/oof*")) and read_json(run / "config.json")["solution"] == "toy"
    copies = list((tmp_path / "submissions").iterdir())
    assert [path.read_bytes() for path in copies] == [(run / "submission.csv").read_bytes()]
    assert copies[0].name.startswith("toy-run-")


def test_what_is_current_is_not_made_again(verbs, tmp_path):
    verbs()
    written = write_times(tmp_path / "run", "fold*/net/*", "*.parquet", "tuned.json", "score.json", "submission.csv")
    del written[tmp_path / "run" / "images.parquet"]
    verbs()
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_another_decision_is_tuned_and_other_views_are_predicted(verbs, tmp_path):
    verbs()
    predicted, tuned = tmp_path / "run" / "oof.parquet", tmp_path / "run" / "tuned.json"
    before = predicted.stat().st_mtime_ns, tuned.stat().st_mtime_ns
    cuts = Config(cuts=(0.45,))
    with pytest.raises(InputError, match=r"`tune` is out of date \(--cuts was \[0\.4, 0\.5\], now \[0\.45\]\);"):
        verbs("submit", config=cuts)
    verbs(config=cuts)
    assert predicted.stat().st_mtime_ns == before[0] and read_json(tuned) == {"cut": 0.45}
    assert read_json(tmp_path / "run" / "config.json")["cuts"] == [0.45]
    with pytest.raises(InputError, match="`predict` is out of date"):
        verbs("tune", config=Config(tta=("flip",)))
    verbs(config=Config(tta=("flip",)))
    assert predicted.stat().st_mtime_ns != before[0]


def test_the_report_names_the_score_and_the_files_to_look_at(verbs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    run = tmp_path / "run"

    def said():
        caplog.clear()
        with caplog.at_level("INFO", "common"):
            verbs("report")
        return list(dict.fromkeys(caplog.messages))  # caplog may be attached to this logger and to the root

    verbs()
    score = f"score: accuracy {read_json(run / 'score.json')['accuracy']['estimate']:.4f} [0.0000, 1.0000] out of fold"
    assert said() == [score, f"submission: {run / 'submission.csv'}", f"page: {run / 'report.html'}"]
    (run / "oof.parquet").unlink()
    reason = (
        f"{run}: `predict` left oof.parquet, which is missing or damaged; run the verb `predict` (or `run` for all)"
    )
    assert said() == [f"no score: {reason}", f"page: {run / 'report.html'}"]


def test_copies_of_submissions_name_the_solution_once(verbs, tmp_path):
    job = verbs()
    for folder, start in (("siim", "toy-siim-"), ("toy-demo", "toy-demo-")):
        job.run.folder = tmp_path / folder
        assert engine.copy_submission(job, tmp_path / "run" / "submission.csv").name.startswith(start)


def test_a_refused_training_names_the_changed_settings(verbs, tmp_path):
    verbs("prepare", "train")
    config = Config(net=replace(Config().net, epochs=3, lr=0.5))
    with pytest.raises(InputError, match=r"or seed \(--net\.epochs was 2, now 3, --net\.lr was 0\.001, now 0\.5\)"):
        verbs("train", config=config)
    with pytest.raises(InputError, match=r"settings of `prepare` \(--seed was 0, now 1\); give the run another --out"):
        verbs("prepare", config=Config(seed=1))
    with pytest.raises(InputError, match=r"prepared with another --data, .*/data; run `prepare` with .*/elsewhere"):
        verbs("train", data=tmp_path / "elsewhere")


def test_folds_that_are_trained_later(verbs, tmp_path):
    verbs(config=Config(folds=(1,)))
    assert pd.read_parquet(tmp_path / "run" / "oof.parquet")["fold"].tolist() == [1] * 4
    with pytest.raises(InputError, match="fold 0 is not trained"):
        verbs("predict", config=Config())
    weights = write_times(tmp_path / "run", "fold1/net/final.safetensors")
    verbs(config=Config())
    assert len(pd.read_parquet(tmp_path / "run" / "oof.parquet")) == 8
    assert write_times(tmp_path / "run", "fold1/net/final.safetensors") == weights


def test_further_tables_and_maps_are_joined_and_test_parts_pooled(verbs, tmp_path):
    def predict_rows(job, folds, rows, path, title):
        write_masks(path, (len(rows), 2, 2), [np.full((1, 2, 2), row, np.uint8) for row in rows])
        main = TOY.predict(job, folds, rows, path, title)[""]
        return {"": main, "_more": main[["image_id"]].assign(folds=str(folds))}

    def pool(suffix, tables):
        return pd.concat(tables).groupby("image_id", sort=False).first().reset_index().assign(parts=len(tables))

    recipe = replace(TOY, predict=predict_rows, suffixes=lambda config: ("", "_more"), maps=True)
    verbs("prepare", "train", "predict", recipe=recipe)
    run = tmp_path / "run"
    oof, more = pd.read_parquet(run / "oof.parquet"), pd.read_parquet(run / "oof_more.parquet")
    assert read_array(run / "oof_probs.b2nd")[:, 0, 0].tolist() == oof["row"].tolist()
    assert more["folds"].tolist() == ["[0]"] * 4 + ["[1]"] * 4
    assert pd.read_parquet(run / "test_more.parquet")["folds"].tolist() == ["[0, 1]"] * 4
    assert read_array(run / "test_probs.b2nd")[:, 0, 0].tolist() == [8, 9, 10, 11]

    recipe = replace(TOY, pool=pool, prediction_key=lambda config: "pooled")
    verbs("predict", recipe=recipe)
    assert pd.read_parquet(run / "test.parquet")["parts"].tolist() == [2] * 4
    assert not list(run.glob("fold*/test*")) and "predict fold0/test" not in read_json(run / "manifest.json")["steps"]


def test_maps_of_earlier_versions_are_read_and_replaced_by_the_next_prediction(verbs, tmp_path):
    def predict_rows(job, folds, rows, path, title):
        if interrupted and title == "fold1, oof":
            raise KeyboardInterrupt
        write_masks(path, (len(rows), 2, 2), [np.full((1, 2, 2), row, np.uint8) for row in rows])
        return TOY.predict(job, folds, rows, path, title)

    def check(job, suffix):
        assert {path.name for path in run.glob("*_probs.*")} == {f"oof_probs{suffix}", f"test_probs{suffix}"}
        predicted = predictions.read_predictions(job, "oof")
        assert predicted.maps[:, 0, 0].tolist() == predicted.table["row"].tolist()

    run, recipe, interrupted = tmp_path / "run", replace(TOY, predict=predict_rows, maps=True), False
    changed = replace(recipe, prediction_key=lambda config: "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "maps", lambda run, name, new=False: run.path(f"{name}_probs.npy"))
        verbs("prepare", "train", "predict", recipe=recipe)
    before = write_times(run, "*_probs.npy")
    check(verbs("predict", "tune", "submit", recipe=recipe), ".npy")
    assert write_times(run, "*_probs.npy") == before
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "maps", lambda run, name, new=False: run.path(f"{name}_probs.npy"))
        interrupted = True
        verbs("predict", recipe=changed)
    interrupted = False
    assert (run / "fold0" / "oof_probs.npy").exists()
    check(verbs("predict", recipe=changed), ".b2nd")
    assert not list(run.glob("fold*/*_probs.*"))


def test_parts_that_an_interrupted_prediction_left_are_read(verbs, tmp_path):
    calls = []

    def predict_rows(job, folds, rows, path, title):
        calls.append(title)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return TOY.predict(job, folds, rows, path, title)

    recipe = replace(TOY, predict=predict_rows)
    verbs("prepare", "train", recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        verbs("predict", recipe=recipe)
    verbs("predict", recipe=recipe)
    assert calls == ["fold0, oof", "fold1, oof", "fold1, oof", "test"]


def test_a_score_or_rule_that_is_not_what_tune_writes(verbs, tmp_path):
    job = verbs()
    manifest = tmp_path / "run" / "manifest.json"
    for name, read in (("tuned.json", engine.read_rule), ("score.json", engine.read_score)):
        whole, content = manifest.read_text(), (tmp_path / "run" / name).read_text()
        before = read_json(manifest)["steps"]["tune"]["made"][name]
        (tmp_path / "run" / name).write_text("[]")
        with pytest.raises(InputError, match=f"left {name}, which is missing or damaged"):
            read(job)
        manifest.write_text(whole.replace(before, engine.file_hash(tmp_path / "run" / name)))  # written like this
        with pytest.raises(InputError, match=f"{name}: not what `tune` writes"):
            read(job)
        manifest.write_text(whole)
        (tmp_path / "run" / name).write_text(content)
        assert read(job) == json.loads(content)


def test_without_test_images_nothing_is_submitted(verbs, tmp_path):
    def read(job):
        listing = TOY.read(job)
        return replace(listing, table=listing.table[:8], sample=listing.sample[:0])

    for _ in range(2):
        job = verbs(recipe=replace(TOY, read=read))
    assert not (tmp_path / "run" / "submission.csv").exists() and job.is_current("submit")
    assert read_json(tmp_path / "run" / "manifest.json")["steps"]["submit"]["rows"] == 0


def test_unreadable_test_images_get_the_neutral_answer(verbs, tmp_path):
    (tmp_path / "data" / "i09.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"i09\.png"):
        verbs("prepare")
    verbs(on_bad_image="placeholder")
    rows = pd.read_csv(tmp_path / "run" / "submission.csv").set_index("id")["bright"]
    assert rows["i09"] == 0.5 and len(rows) == 4


def test_further_verbs_end_with_a_page(verbs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    caplog.set_level("INFO", "common")
    calls = []
    step = Step("extra", lambda job: calls.append("extra"), needs=("tune",))
    recipe = replace(TOY, further_steps=(step,), further_verbs={"say": lambda job: calls.append("say")})
    with pytest.raises(InputError, match="not prepared"):
        verbs("extra", recipe=recipe)
    verbs(recipe=recipe)
    for verb in ("extra", "extra", "say"):
        (tmp_path / "run" / "report.html").unlink(missing_ok=True)
        verbs(verb, recipe=recipe)
        assert (tmp_path / "run" / "report.html").is_file()
    assert calls == ["extra", "say"]
    assert "page: " in caplog.text and "score: " not in caplog.text


def test_networks_that_only_initialise_others_do_not_predict(verbs, tmp_path):
    def networks(job):
        found = []
        for net in TOY.networks(job):
            first = replace(net, stage="first")
            found += [first, replace(net, starts_from=first)]
        return found

    recipe = replace(TOY, networks=networks)
    job = verbs("prepare", "train", "predict", recipe=recipe)
    assert [(one.fold, one.stage) for one in predictions.predicting_networks(job)] == [(0, "net"), (1, "net")]
    assert [one.stage for one in first_networks(job)] == ["first"]
    (tmp_path / "run" / "fold0" / "first" / "final.safetensors").unlink()
    assert job.is_current("predict")


def test_hidden_labels_are_scored_on_samples_alone(verbs, tmp_path):
    recipe = replace(TOY, hidden="truth.csv")
    truth = pd.DataFrame({"id": [f"i{k:02d}" for k in range(8, 12)], "truth": [0, 0, 1, 1]})

    def hidden():
        return read_json(tmp_path / "run" / "manifest.json")["steps"]["submit"]["hidden"]

    verbs(recipe=recipe)
    assert hidden() is None
    write_json(tmp_path / "data" / "sample.json", {})
    (tmp_path / "run" / "submission.csv").unlink()
    truth[1:].to_csv(tmp_path / "data" / "truth.csv", index=False)
    verbs(recipe=recipe)
    assert hidden() is None  # an image without a label
    truth.to_csv(tmp_path / "data" / "truth.csv", index=False)
    (tmp_path / "run" / "submission.csv").unlink()
    verbs(recipe=recipe)
    called = pd.read_csv(tmp_path / "run" / "submission.csv")["bright"] > 0.5
    assert hidden() == {"metric": "accuracy", "value": (called == truth["truth"]).mean(), "nothing": 0.5}
