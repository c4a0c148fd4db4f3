"""What the verbs of the solutions share: records, refusals, tables written whole."""

import logging
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from common import steps
from common.errors import InputError
from common.metrics.statistics import Interval
from common.runs import Run


@dataclass(frozen=True)
class Config:
    seed: int = 0
    datasets: tuple = ()


@pytest.fixture
def context(tmp_path):
    run = Run(tmp_path / "run")
    options = SimpleNamespace(store=None, data=None, test=None)
    yield SimpleNamespace(
        solution="lungs", preset="demo", config=Config(), options=options, run=run, submissions=tmp_path / "submissions"
    )
    run.close()


def finish(run, *names):
    for name in names:
        path = run.path(name, "network", "final.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_store_is_that_of_its_images_their_order_and_size(context, tmp_path):
    def name(*ids, size=64, folder="data"):
        return steps.store_folder(context, tmp_path / folder, ids, size)

    assert name("a", "b") == name("a", "b") and name("a", "b").parent == tmp_path / "stores"
    assert len({name("a", "b"), name("a"), name("b", "a"), name("a", "b", size=32), name("a", "b", folder="x")}) == 5
    assert steps.store_folder(context, tmp_path / "data", dict.fromkeys("ab"), 64) == name("a", "b")
    context.options.store = tmp_path / "elsewhere"
    assert name("a").parent == tmp_path / "elsewhere" and name("a").name.startswith("lungs-64px-")


def test_trainings_that_were_begun_or_finished(context):
    finish(context.run, "fold1", "simple-fold0")
    context.run.path("fold0", "network").mkdir(parents=True)
    context.run.path("fold0", "network", "last.ckpt").touch()
    context.run.path("fold2", "network").mkdir(parents=True)
    found = [path.parent.name for path in steps.trainings(context.run)]
    assert found == ["fold0", "fold1", "simple-fold0"]


def test_other_data_under_a_training_are_refused(context):
    steps.keep_trainings(context.run, "new")  # nothing is there
    context.run.record("prepare", "old")
    steps.keep_trainings(context.run, "new")  # nothing was trained
    finish(context.run, "fold0")
    steps.keep_trainings(context.run, "old")
    with pytest.raises(InputError, match=r"fold0/network: was trained on other images"):
        steps.keep_trainings(context.run, "new")


def test_what_prepare_was_made_with(context, tmp_path):
    def check():
        return steps.check_prepared(context, ("seed", "datasets"))

    with pytest.raises(InputError, match="not prepared; run the verb `prepare` first"):
        check()
    context.run.path("images.parquet").touch()
    with pytest.raises(InputError, match="not prepared"):
        check()
    context.run.record("prepare", 1, seed=0, datasets=["a"], data=str(tmp_path / "data" / "deeper"), test=None)
    context.config = Config(datasets=("a",))
    assert check()["seed"] == 0
    context.options.data = tmp_path / "data"  # the folder above is what the user may name
    assert check()
    for name, value, said in (
        ("seed", Config(seed=1, datasets=("a",)), "prepared with --seed 0; run `prepare`"),
        ("datasets", Config(), r"prepared with --datasets \['a'\]"),
    ):
        context.config = value
        with pytest.raises(InputError, match=said):
            check()
        assert name in said
    context.config = Config(datasets=("a",))
    context.options.data = tmp_path / "other"
    with pytest.raises(InputError, match=r"prepared with another --data; run `prepare` with .*other"):
        check()
    context.options.data, context.options.test = None, tmp_path / "mine"
    with pytest.raises(InputError, match="prepared with another --test"):
        check()


def test_folds_of_a_table(tmp_path):
    table = tmp_path / "folds.csv"
    table.write_text("image_id,fold\na,1\nb,0\n")
    assert steps.read_folds(table, ["b", "a"], 2).tolist() == [0, 1]
    with pytest.raises(InputError, match=r"has the folds 0, 1; n_folds 3 asks for all from 0"):
        steps.read_folds(table, ["a", "b"], 3)


def test_leaks_are_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    caplog.set_level("INFO", "common")
    steps.tell_leaks(np.array([0, 1, 1]), np.array(["p", "q", "q"]), "here")
    steps.tell_leaks(np.array([0, 1]), None, "here")
    assert caplog.text == ""
    steps.tell_leaks(np.array([0, 1, 1]), np.array(["p", "p", "q"]), "folds.csv")
    assert "2 images have a patient in another fold (folds.csv)" in caplog.text


def test_new_layers_are_those_of_the_seed(context, tmp_path):
    asked = []

    def build(weights="imagenet"):
        asked.append(weights)
        return torch.nn.Linear(2, 2)

    one, again = (steps.fresh(context, tmp_path / "none", 0, build).weight for _ in range(2))
    other = steps.fresh(context, tmp_path / "none", 1, build).weight
    assert torch.equal(one, again) and not torch.equal(one, other) and set(asked) == {"imagenet"}
    finish(context.run, "fold0")
    steps.fresh(context, context.run.path("fold0", "network"), 0, build)
    assert asked[-1] == "none"  # what is there replaces them anyway


def test_arrays_are_used_up_in_blocks(tmp_path):
    parts = [np.arange(n * 6, dtype=np.uint8).reshape(n, 2, 3) for n in (70, 1, 64)]
    paths = [tmp_path / f"{k}.npy" for k in range(3)]
    for path, part in zip(paths, parts, strict=True):
        np.save(path, part)
    blocks = [np.array(block) for block in steps.used_up(paths)]
    assert [len(block) for block in blocks] == [64, 6, 1, 64] and np.array_equal(
        np.concatenate(blocks), np.concatenate(parts)
    )
    assert not any(path.exists() for path in paths)


def test_tables_appear_whole(tmp_path):
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "-1"]})
    steps.write_table(tmp_path / "t.parquet", table)
    steps.write_csv(tmp_path / "t.csv", table)
    assert pd.read_parquet(tmp_path / "t.parquet").equals(table)
    assert (tmp_path / "t.csv").read_text() == "a,b\n1,x\n2,-1\n"

    class Broken(pd.DataFrame):
        def to_csv(self, path, **options):
            path.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError) as error:
        steps.write_csv(tmp_path / "t.csv", Broken(table))
    assert error.value.filename == str(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == "a,b\n1,x\n2,-1\n" and len(list(tmp_path.iterdir())) == 2


def test_predictions_of_a_run(context):
    with pytest.raises(InputError, match=r"oof\.parquet: no such file"):
        steps.read_predictions(context.run, "oof")
    steps.write_table(context.run.path("oof.parquet"), pd.DataFrame({"row": [3]}))
    np.save(context.run.path("oof_probs.npy"), np.full((1, 2, 2), 7, np.uint8))
    table, probs = steps.read_predictions(context.run, "oof")
    assert table["row"].tolist() == [3] and isinstance(probs, np.memmap) and probs.sum() == 28


def test_weights_of_a_fold(context):
    with pytest.raises(InputError, match="fold 1 is not trained; run `train`"):
        steps.trained_weights(context.run, 1, "network")
    finish(context.run, "fold1")
    assert steps.trained_weights(context.run, 1, "network").is_file()


def test_intervals_become_json():
    assert steps.as_interval(Interval(np.float64(0.5), 0.25, np.nan)) == {"estimate": 0.5, "low": 0.25, "high": None}


def test_submissions_are_copied_under_a_name_of_their_content(context):
    path = context.run.path("submission.csv")
    names = set()
    for text in ("a\n", "b\n", "a\n"):
        path.write_text(text)
        copy = steps.copy_submission(context, path)
        assert copy.read_text() == text and copy.name.startswith("lungs-run-") and copy.suffix == ".csv"
        names.add(copy.name)
    assert {copy.name for copy in context.submissions.iterdir()} == names and len(names) == 2
