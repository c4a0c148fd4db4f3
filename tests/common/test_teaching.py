"""Teachers: who may teach whom, what counts as confident, and what networks then learn."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from common import teaching
from common.blend import blend_tool
from common.config import FitConfig
from common.data.loaders import UNKNOWN, SampleDataset
from common.errors import InputError
from common.images import Images
from common.job import open_run
from common.options import Options
from common.paths import read_parquet
from common.predictions import Predicted
from common.refit import refit_tool
from common.runs import Run
from common.train.checkpoint import load_weights
from tests.toy import TOY, Config, make_job, networks, predict_rows, write_data

VERBS = ("prepare", "train", "predict", "tune")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data", n_train=16, n_test=8)


def run(folder, data, config=None, verbs=VERBS, **options):
    job = make_job(folder, config, data=data, **options)
    try:
        for verb in verbs:
            TOY.verbs()[verb](job)
    finally:
        job.run.close()
    return job


@pytest.fixture
def teacher(tmp_path, data):
    return run(tmp_path / "teacher", data).run.folder


def test_each_fold_learns_from_the_networks_that_have_not_seen_it(tmp_path, data, teacher):
    job = run(tmp_path / "pupil", data, pseudo=teacher, pseudo_confidence=0.1, teacher=teacher, teacher_share=0.25)
    with open_run(TOY, Config, teacher) as known:
        for fold in (0, 1):
            for kind, rows in (("pseudo", job.images.rows("test")), ("teacher", job.images.rows(folds=[1 - fold]))):
                labels = read_parquet(job.run.path(f"fold{fold}", kind, "labels.parquet"))
                own = predict_rows(known, [fold], rows, None, "")[""]
                assert labels["image_id"].tolist() == own["image_id"].tolist()
                np.testing.assert_array_equal(labels["bright"], own["bright"])
            one, rows, key = teaching.teach(job, networks(job)[fold], job.images.rows(folds=[fold]))
            assert sorted(rows) == job.images.rows("test").tolist() and [each[0] for each in key] == [
                "pseudo",
                "teacher",
            ]
            labels = labels.set_index("image_id")["bright"]
            mixed = one.images.at(job.images.table["row"]).set_index("image_id")["bright"]
            before = job.images.table.set_index("image_id")["bright"]
            np.testing.assert_allclose(mixed[labels.index], 0.75 * before[labels.index] + 0.25 * labels)
            held = job.images.ids(job.images.rows(folds=[fold]))
            assert mixed[held].tolist() == before[held].tolist()
    trained = load_weights(job.run.path("fold0", "net", "final.safetensors"))[1]["trained_on"]["taught"]
    assert trained["pseudo"]["images"] == {"0": 8, "1": 8} and trained["teacher"]["share"] == 0.25
    plain = run(tmp_path / "plain", data)
    weights = [each.run.path("fold0", "net", "final.safetensors").read_bytes() for each in (job, plain)]
    assert weights[0] != weights[1]
    assert run(tmp_path / "pupil", data, verbs=("train",)).lessons.keys() == {"pseudo", "teacher"}  # as before


def test_a_blend_teaches_by_its_weights_of_each_fold(tmp_path, data, teacher):
    table = teacher / "folds.csv"
    other = run(tmp_path / "other", data, replace(Config(), net=FitConfig(epochs=4, batch_size=4, precision="fp32")))
    blend_tool(TOY, Config, None)((teacher, other.run.folder), out=tmp_path / "both", weights=(1.0, 3.0))
    job = run(tmp_path / "pupil", data, pseudo=tmp_path / "both", pseudo_confidence=0.1, fold_table=table)
    rows = job.images.rows("test")
    for fold in (0, 1):
        mean = 0
        for folder, weight in ((teacher, 0.25), (other.run.folder, 0.75)):
            with open_run(TOY, Config, folder) as member:
                mean += weight * predict_rows(member, [fold], rows, None, "")[""]["bright"]
        found = read_parquet(job.run.path(f"fold{fold}", "pseudo", "labels.parquet"))["bright"]
        np.testing.assert_allclose(found, mean, atol=1e-6)


def test_weights_repeat_or_thin_out(tmp_path, data, teacher):
    for weight, n in ((0.5, 4), (2.0, 16)):
        job = run(tmp_path / f"x{weight}", data, pseudo=teacher, pseudo_confidence=0.1, pseudo_weight=weight)
        rows = teaching.teach(job, networks(job)[0], job.images.rows(folds=[0]))[1]
        assert len(rows) == n and len(set(rows)) == min(n, 8)


def test_copies_and_patients_of_held_out_images_are_left_out(tmp_path, data, teacher):
    job = run(tmp_path / "pupil", data, pseudo=teacher, pseudo_confidence=0.1)
    held, tests = job.images.rows(folds=[0]), job.images.rows("test")
    table, stored = job.images.table, job.images.store.table
    table.loc[table["row"] == tests[0], "patient_id"] = table.loc[table["row"] == held[0], "patient_id"].item()
    stored.loc[stored.index[tests[1]], "content"] = stored["content"].iloc[held[1]]
    for fold, left_out in ((0, set(tests[:2].tolist())), (1, set())):
        rows = teaching.teach(job, networks(job)[fold], job.images.rows(folds=[fold]))[1]
        assert set(rows.tolist()) == set(tests.tolist()) - left_out


def test_who_may_not_teach(tmp_path, data, teacher):
    with pytest.raises(InputError, match=r"teacher: its networks of fold 0 were trained on i\d\d, which this run"):
        run(tmp_path / "other", data, Config(seed=5), pseudo=teacher)
    half = run(tmp_path / "half", data, Config(folds=(0,))).run.folder
    with pytest.raises(InputError, match="half: has no networks that have not seen fold 1"):
        run(tmp_path / "more", data, teacher=half)
    with pytest.raises(InputError, match="no prediction for fold 0 is confident enough; lower --pseudo-confidence"):
        run(tmp_path / "sure", data, pseudo=teacher, pseudo_confidence=0.999)
    plain = run(tmp_path / "plain", data, verbs=("prepare", "train")).run.folder
    with pytest.raises(InputError, match=r"was trained without --pseudo .*teacher, or before that changed"):
        run(plain, data, verbs=("train",), pseudo=teacher)
    with pytest.raises(InputError, match="plain: `predict` has no result yet"):
        run(tmp_path / "early", data, pseudo=plain)
    with pytest.raises(InputError, match="is the run itself"):
        run(teacher, data, pseudo=teacher)
    with pytest.raises(InputError, match="--teacher-share needs --teacher"):
        Options(teacher_share=0.3, pseudo=teacher)


def test_further_images_of_a_teacher_were_seen_by_all_its_networks(tmp_path, data, teacher):
    job = run(tmp_path / "pupil", data, verbs=("prepare",), fold_table=teacher / "folds.csv")
    with open_run(TOY, Config, teacher) as known:
        held = job.images.ids(job.images.rows(folds=[0]))
        teaching.check_honest(known, job, 0, held)
        table = known.images.table
        table.loc[table["image_id"] == held[0], ["split", "fold"]] = "further", -1  # from elsewhere, as --boxes
        with pytest.raises(InputError, match=f"its networks of fold 0 were trained on {held[0]}"):
            teaching.check_honest(known, job, 0, held)


def test_a_taught_run_with_other_test_images_says_what_is_possible(tmp_path, data, teacher):
    run(tmp_path / "pupil", data, pseudo=teacher, pseudo_confidence=0.1)
    (tmp_path / "some.csv").write_text("id\ni17\n")
    options = {"test": tmp_path / "some.csv", "fold_table": teacher / "folds.csv"}
    job = run(tmp_path / "pupil", data, verbs=("prepare", "predict", "tune", "submit"), **options)
    assert job.images.ids(job.images.rows("test")).tolist() == ["i17"]
    with pytest.raises(InputError, match="learned from test images that it no longer has; to predict others"):
        run(tmp_path / "pupil", data, verbs=("train",), test=tmp_path / "some.csv")


def test_who_joins_a_run_before_it_has_asked_its_teacher_does_not_train_without(
    tmp_path, data, teacher, caplog, monkeypatch
):
    def join(job, *of):
        for folder in (teacher, None):
            other = replace(job, options=replace(job.options, pseudo=folder), run=Run(job.run.folder, may_join=True))
            with pytest.raises(
                InputError, match=r"--pseudo .*teacher: the process that works in .*pupil has no predic"
            ):
                TOY.verbs()["train"](other)
        raise KeyboardInterrupt

    monkeypatch.setattr(teaching, "_ask_teacher", join)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "pupil", data, pseudo=teacher)
    monkeypatch.undo()
    job = run(tmp_path / "pupil", data, verbs=("prepare",), pseudo=teacher)
    job.run.joined = True
    job.run.record("pseudo", "", run=str(teacher.resolve()))
    assert teaching.find_lessons(job)["pseudo"]["run"] == str(teacher.resolve())
    job.run.record("pseudo", "", run=str(teacher.resolve()), confidence=0.8, weight=0.5)
    with pytest.raises(InputError, match=r"--pseudo-weight 1: the process that works in .*pupil uses 0\.5; give both"):
        teaching.find_lessons(job)
    job.run.forget("pseudo")
    assert not run(tmp_path / "pupil", data, verbs=("train",)).lessons  # not named again, which the log says
    assert "named before, but it has not predicted" in caplog.text


def fake_job(recipe=TOY, **columns):
    table = pd.DataFrame({"image_id": list("abcd"), "row": range(4), "width": 10, "height": 10, **columns})
    return type("Job", (), {"recipe": recipe, "images": Images(table, None, "", "")})


def labelled(tmp_path, job, found, confidence=0.8, kind="pseudo"):
    run = Run(tmp_path / "labels")
    n = teaching._write_labels(job, kind, {"confidence": confidence}, list("abcd"), found, run)
    run.close()
    labels = read_parquet(run.path("labels.parquet"))
    assert n == len(labels)
    return "".join(labels["image_id"])


def test_only_confident_labels_count(tmp_path):
    table = pd.DataFrame({"image_id": list("abcd"), "one": [0.9, 0.1, 0.9, 0.5], "two": [0.1, 0.1, 0.7, 0.0]})
    job = fake_job(one=0.0, two=0.0)
    assert labelled(tmp_path, job, Predicted(table, {"": table})) == "ab"
    assert labelled(tmp_path, job, Predicted(table, {"": table}), 0.5) == "abcd"
    assert labelled(tmp_path, job, Predicted(table, {"": table}), kind="teacher") == "abcd"


def test_masks_count_if_their_pixels_are_confident_and_agree_with_the_presence(tmp_path):
    maps = np.zeros((4, 4, 4), np.uint8)
    maps[0, 0] = 250  # surely a mask
    maps[1, 0] = 140  # perhaps one
    maps[2, 0] = 100  # perhaps none
    table = pd.DataFrame({"image_id": list("abcd"), "presence": [0.9, 0.9, 0.1, 0.1]})
    assert labelled(tmp_path, fake_job(), Predicted(table, {"": table}, maps)) == "ad"
    recipe = replace(TOY, soft_labels=lambda found: found.table.rename(columns={"presence": "present"}))
    assert labelled(tmp_path, fake_job(recipe, present=0.0), Predicted(table, {"": table}, maps)) == "ad"
    table = table.assign(presence=[0.1, 0.9, 0.1, 0.1])
    assert labelled(tmp_path, fake_job(recipe, present=0.0), Predicted(table, {"": table}, maps)) == "d"


def test_boxes_count_from_their_score(tmp_path):
    boxes = pd.DataFrame({"image_id": list("abb"), "class_id": 0, "score": [0.9, 0.5, 0.3], "member": "net"})
    boxes = boxes.assign(x_min=1.0, y_min=[1.0, 1.0, 6.0], x_max=5.0, y_max=[5.0, 5.0, 9.0], fold=0)
    assert labelled(tmp_path, fake_job(), Predicted(boxes, {"": boxes})) == "a"
    assert labelled(tmp_path, fake_job(), Predicted(boxes, {"": boxes}), 0.4) == "ab"
    gate = pd.DataFrame({"image_id": list("abcd"), "target": [0.9, 0.1, 0.1, 0.6]})
    recipe = replace(TOY, soft_labels=lambda found: found.tables["_gate"])
    assert labelled(tmp_path, fake_job(), Predicted(boxes[:0], {"": boxes[:0]})) == ""
    found = Predicted(boxes, {"": boxes, "_gate": gate})
    assert labelled(tmp_path, fake_job(recipe, target=0), found) == "abc"  # b, c: nothing, by both
    job = fake_job()
    job.images.tables["boxes.parquet"] = pd.DataFrame({"row": [3], "class_id": [1], "x_min": [0.0]})
    teaching._add_boxes(job.images, np.array([0, 2]), read_parquet(tmp_path / "labels" / "boxes.parquet"))
    assert job.images.tables["boxes.parquet"]["row"].tolist() == [3, 0]


def test_a_teacher_adds_the_boxes_that_an_image_with_boxes_lacks(tmp_path):
    boxes = pd.DataFrame({"image_id": list("aaab"), "class_id": [0, 1, 1, 1], "score": [0.9, 0.9, 0.4, 0.9]})
    boxes = boxes.assign(
        x_min=1.0, y_min=[1.0, 1.0, 6.0, 1.0], x_max=5.0, y_max=[5.0, 5.0, 9.0, 5.0], member="net", fold=0
    )
    job = fake_job()
    true = pd.DataFrame({"row": [0], "class_id": [0], "x_min": [1.0], "y_min": [2.0], "x_max": [5.0], "y_max": [5.0]})
    job.images.tables["boxes.parquet"] = true  # overlaps the first box; image b has none
    found = Predicted(boxes, {"": boxes})
    for confidence, expected in ((0.5, [(1, 1.0)]), (0.3, [(1, 1.0), (1, 6.0)])):
        assert labelled(tmp_path, job, found, confidence, kind="teacher") == "a"
        kept = read_parquet(tmp_path / "labels" / "boxes.parquet")
        assert list(zip(kept["class_id"], kept["y_min"], strict=True)) == expected
    assert labelled(tmp_path, job, found, 0.95, kind="teacher") == ""
    gate = pd.DataFrame({"image_id": list("abcd"), "target": [0.9, 0.1, 0.1, 0.6]})
    recipe = replace(TOY, soft_labels=lambda found: found.tables["_gate"])
    known = fake_job(recipe, target=0)
    known.images.tables["boxes.parquet"] = true
    assert labelled(tmp_path, known, Predicted(boxes, {"": boxes, "_gate": gate}), kind="teacher") == "abcd"


def test_a_refit_neither_teaches_nor_blends_nor_gives_way_to_that_of_another_run(tmp_path, data, teacher):
    longer = replace(Config(), net=FitConfig(epochs=4, batch_size=4, precision="fp32"))
    other, whole, refit = run(tmp_path / "other", data, longer).run.folder, tmp_path / "whole", refit_tool(TOY, Config)
    refit(teacher, out=whole)
    before = {path: path.read_bytes() for path in whole.rglob("*.json")}
    with pytest.raises(InputError, match=r"--out .*whole: holds another refit, of .*teacher; name a new folder"):
        refit(other, out=whole)
    assert {path: path.read_bytes() for path in whole.rglob("*.json")} == before
    with pytest.raises(InputError, match="whole: trained on all images, none of them out of fold"):
        blend_tool(TOY, Config, None)((teacher, whole), out=tmp_path / "both")
    for verbs, kind in ((VERBS, "teacher"), (("plan",), "pseudo")):
        with pytest.raises(InputError, match="whole: trained on all images; use the run it comes from"):
            run(tmp_path / kind, data, verbs=verbs, **{kind: whole})
    moved = teacher.rename(tmp_path / "moved")
    assert refit(moved, out=whole) == 0


def test_a_refit_learns_for_each_image_what_one_fold_was_taught(tmp_path, data, teacher):
    job = run(tmp_path / "pupil", data, pseudo=teacher, pseudo_confidence=0.1, teacher=teacher, verbs=VERBS[:2])
    refit = replace(job, config=replace(job.config, folds=(2,)))
    refit.lessons = teaching.read_lessons(job.run, folder=str(job.run.folder))
    network = replace(networks(job)[0], fold=2)
    pupil, further, _ = teaching.teach(refit, network, job.images.rows(folds=[0]))
    assert sorted(further) == job.images.rows("test").tolist()
    taught = pupil.images.table.set_index("image_id")["bright"]
    by_fold = [
        pd.concat([read_parquet(job.run.path(f"fold{k}", kind, "labels.parquet")) for kind in teaching.KINDS])
        for k in (0, 1)
    ]
    first, second = (each.set_index("image_id")["bright"] for each in by_fold)
    tests = job.images.ids(further)
    of_first, of_second = (taught[tests] == each[tests] for each in (first, second))
    assert (of_first | of_second).all() and of_first.any() and of_second.any()
    for fold, labels in ((1, first), (0, second)):  # what fold 0 was taught lies in fold 1
        ids = job.images.ids(job.images.rows(folds=[fold]))
        before = job.images.table.set_index("image_id")["bright"]
        np.testing.assert_allclose(taught[ids], 0.5 * before[ids] + 0.5 * labels[ids])


def test_specialists_do_not_lower_the_scores_of_other_classes(tmp_path):
    boxes = pd.DataFrame({"image_id": list("aab"), "class_id": [0, 0, 3], "score": 0.9, "fold": 0})
    boxes = boxes.assign(x_min=1.0, y_min=1.0, x_max=5.0, y_max=5.0, member=["net", "zero=net", "net"])
    assert labelled(tmp_path, fake_job(), Predicted(boxes, {"": boxes})) == "ab"
    found = read_parquet(tmp_path / "labels" / "boxes.parquet")
    assert found[["class_id", "score"]].to_numpy().tolist() == pytest.approx(np.array([[0, 0.9], [3, 0.9]]))


def test_a_mask_is_mixed_with_a_map_and_drawn_at_random_levels(tmp_path):
    images = fake_job().images
    mask, probs = np.array([[1, 1], [0, 0]], np.uint8), np.array([[255, 0], [51, 0]], np.uint8)
    np.save(tmp_path / "maps.npy", probs[None])
    images.taught[2] = str(tmp_path / "maps.npy"), 0, 0.5
    images.taught[3] = str(tmp_path / "maps.npy"), 0, 1.0
    assert images.drawn(1, mask) is mask
    np.testing.assert_allclose(images.drawn(2, mask), [[1, 0.5], [0.1, 0]], atol=1e-6)
    assert images.drawn(2, np.full((2, 2), UNKNOWN)).tolist() == [[UNKNOWN, UNKNOWN]] * 2
    assert images.drawn(3, 0 * mask).tolist() == [[1, 0], [0, 0]]
    dataset = SampleDataset(np.zeros((4, 2, 2), np.uint8), lambda row: images.drawn(row, mask), rows=[2])
    drawn = np.array([dataset[0, seed][1].numpy()[0] for seed in range(400)])
    assert set(np.unique(drawn)) == {0, 1}
    np.testing.assert_allclose(drawn.mean(0), [[1, 0.5], [0.1, 0]], atol=0.06)
    assert (dataset[0, 7][1] == dataset[0, 7][1]).all()


def neighbours(features, labels, at, seen, k=5):
    """Return the mean label of the k nearest of the images `seen`."""
    distances = ((features[at][:, None] - features[seen][None]) ** 2).sum(2)
    return labels[seen][np.argsort(distances, axis=1)[:, :k]].mean(1)


def test_why_out_of_fold_predictions_of_a_teacher_leak():
    """With labels that mean nothing, whatever scores above 0.5 has seen the held-out labels."""
    from common.metrics.classification import auroc

    rng, honest, leaking = np.random.default_rng(0), [], []
    for _ in range(20):
        features, labels, folds = rng.normal(size=(200, 2)), rng.integers(0, 2, 200).astype(float), np.arange(200) % 4
        oof = np.zeros(200)
        for fold in range(4):
            oof[folds == fold] = neighbours(features, labels, folds == fold, folds != fold)
        seen, held = np.flatnonzero(folds != 0), np.flatnonzero(folds == 0)
        of_fold = np.zeros(200)
        of_fold[seen] = neighbours(features, labels, seen, seen)
        for found, target in ((leaking, oof), (honest, of_fold)):
            found.append(auroc(labels[held], neighbours(features, target, held, seen)))
    assert abs(np.mean(honest) - 0.5) < 0.05
    assert np.mean(leaking) > 0.6
