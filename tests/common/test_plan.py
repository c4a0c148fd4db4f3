"""`plan`: numbers of steps, of hours and of bytes by hand, and the option that mends a limit."""

import gc
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.config import BoxConfig, FitConfig
from common.cost import CARDS, CUDA_CONTEXT, EFFICIENCY, Cost, Machine, machine_of, measure
from common.errors import InputError
from common.images import prepare_images
from common.listing import choose_images
from common.options import Options, check_special
from common.plan import Stage, add_disk, add_hours, announce, estimate, find_problems, makespan, plan
from tests.toy import TOY, Config, Net, make_job, network, read, write_data

CPU = Machine(0, "", 2, 0, 16.0, None)
COST = Cost(train=0.5, predict=0.125, fixed=1.0, each=0.5, weights=1000, whole="norms")
FIT = FitConfig(epochs=4, batch_size=8, averaging=("last", "window"), window=2)
STAGE = Stage("net", "net", 2, steps=40, held_out=10, load=0.25, maps=64, cost=COST, config=FIT)


@pytest.fixture
def job(tmp_path):
    data = write_data(tmp_path / "data", n_train=160, n_test=20)
    job = make_job(tmp_path / "run", data=data)
    yield job
    job.run.close()


def test_a_training_is_its_steps_its_validations_and_the_batches_of_averaged_norms():
    # 40 steps and 10 batches (an epoch's, under 100) for the window's norms, each of 8 × (0.5 + 0.25) s; 4 + 1
    # validations of 10 images, each of 0.125 + 0.25 / 2 s
    assert STAGE.seconds(CPU) == pytest.approx(50 * 6 + 50 * 0.25)
    assert STAGE.gib() == 5.0


def test_epochs_validated_on_some_images_cost_less_and_every_average_is_validated_on_all():
    stage = replace(STAGE, config=replace(FIT, validate_images=4))
    # four epochs of 4 images; last and window on 10
    assert stage.seconds(CPU) == pytest.approx(50 * 6 + (4 * 4 + 2 * 10) * 0.25)
    assert replace(STAGE, config=replace(FIT, validate_images=10)).seconds(CPU) == STAGE.seconds(CPU)


def test_rounded_weights_are_validated_once_more_and_leave_half_of_the_bytes():
    stage = replace(STAGE, config=replace(FIT, half_weights=True))
    assert stage.seconds(CPU) == STAGE.seconds(CPU) + 10 * 0.25  # `last` too, whose epoch had been validated unrounded
    assert stage.disk() == (500, STAGE.disk()[1])


def test_workers_load_while_the_network_works():
    few, many = (replace(CPU, workers=n) for n in (1, 4))
    fast = replace(STAGE, cost=replace(COST, train=0.125))
    assert fast.step_seconds(few) == (1, 2) and fast.step_seconds(many) == (1, 0.5)
    assert fast.seconds(few) == pytest.approx(50 * 2 + 50 * 0.125)
    assert fast.seconds(many) == pytest.approx(50 * 1 + 50 * 0.125)


def test_disk_counts_final_weights_and_while_training_epochs_variants_and_the_resume_file():
    # four epochs, one more and an outdated one, and in both resume files weights and two moments
    assert STAGE.disk() == (1000, (4 + 2 + 2 * 3) * 1000)
    assert replace(STAGE, config=replace(FIT, keep_variants=True)).disk()[0] == 3000


def test_final_weights_and_shrunk_maps_are_what_a_run_leaves():
    job = SimpleNamespace(config=Config(n_folds=4, folds=(0, 1, 2), store_size=1000))
    stage = replace(STAGE, maps=4 * 10**6, cost=replace(COST, weights=10**8))
    found = add_disk(job, replace(CPU, gpus=2), [stage], {"train": 1000, "test": 250})
    # two final weights; 750 held-out and 250 test images of 4 MB, a tenth of it; twelve files of weights on each card
    assert found == {"images": 1.25, "weights": 0.2, "predictions": 0.4, "training": 2.4}


def test_further_images_take_disk_and_further_sizes_take_time():
    config = SimpleNamespace(n_folds=4, folds=(0,), store_size=1000, tta_scales=(0.5, 2.0))
    detector = replace(STAGE, stage="detector", config=BoxConfig(epochs=4, batch_size=8))
    counts, hours = {"train": 1000, "test": 250, "further": 750}, []
    for scales in ((), (0.5, 2.0)):
        job = SimpleNamespace(config=SimpleNamespace(**vars(config) | {"tta_scales": scales}))
        found = add_hours(job, CPU, trainings((0, "net", None)), [STAGE, detector], counts, (7.2, 0.0))
        hours.append((found["predict"], found["prepare"]))
    assert add_disk(job, CPU, [STAGE], counts)["images"] == 2.0
    assert hours[0][1] == hours[1][1] == 2.0  # 2,000 images of 7.2 s on two cores
    # two networks of each stage take 0.125 + 0.25 / 2 s for 10 + 250 images; the detector's 1 + 1/4 + 4 times as long
    each = 2 * 260 * 0.25 / 3600
    assert hours[0][0] == pytest.approx(2 * each, abs=1e-4) and hours[1][0] == pytest.approx(6.25 * each, abs=1e-4)


def test_what_is_counted_beyond_steps_and_held_out_images():
    watched = replace(STAGE, watched=True)  # 4 epochs and the average of two variants that needs a validation
    assert watched.seconds(CPU) > STAGE.seconds(CPU)
    job = SimpleNamespace(config=SimpleNamespace(n_folds=4, folds=(0,), store_size=1000, tta_scales=()))
    fine = replace(STAGE, stage="fine")
    chain = trainings((0, STAGE.stage, None), (0, "fine", STAGE.stage))
    both = add_hours(job, CPU, chain, [STAGE, fine], {"train": 10, "test": 250}, (0.0, 0.0))
    one = add_hours(job, CPU, chain[1:], [fine], {"train": 10, "test": 250}, (0.0, 0.0))
    assert both["predict"] == one["predict"] > 0  # the coarse network predicts nothing


def trainings(*named):
    made = {}
    for fold, stage, source in named:
        made[fold, stage] = SimpleNamespace(fold=fold, stage=stage, needs=(), starts_from=made.get((fold, source)))
    return list(made.values())


def test_makespan_takes_trainings_in_order_each_after_its_source():
    chain = trainings((0, "a", None), (0, "b", "a"), (1, "a", None), (1, "b", "a"), (2, "a", None))
    seconds = {"a": 2.0, "b": 3.0}

    def ends(devices):
        return makespan(chain, lambda one: seconds[one.stage], devices)

    later = trainings((0, "a", None), (0, "b", "a"), (1, "a", None), (1, "b", "a"))
    assert makespan(later, lambda one: 1.0, 2) == 2  # the second device does not wait for the first one's source
    assert ends(1) == 12
    assert ends(2) == 7  # by hand: a0 b0 a2 on the one device; a1 b1, begun at 2, on the other
    assert ends(8) == 5


def test_steps_hours_and_disk_of_a_run_follow_from_all_its_images(job):
    found = estimate(job, read(job))
    (stage,) = found.stages
    assert (found.images["train"], found.images["test"]) == (160, 20)
    # 80 images of the other fold in batches of 4, 2 epochs; the held-out fold is the other half
    assert (stage.trainings, stage.steps, stage.held_out) == (2, 40, 80)
    assert found.disk["images"] == round(180 * 8 * 8 / 1e9, 3)
    assert found.hours["total"] == pytest.approx(
        sum(found.hours[name] for name in ("prepare", "train", "predict")), abs=2e-4
    )
    assert found.problems == []
    assert not job.run.path("images.parquet").exists()  # nothing is written to the run


def test_teachers_take_time_and_their_labels_are_trained_on_where_a_network_takes_any(job, monkeypatch, tmp_path):
    teacher = make_job(tmp_path / "teacher", data=job.options.data)
    for verb in ("prepare", "train", "predict"):
        TOY.verbs()[verb](teacher)
    teacher.run.close()
    monkeypatch.setattr("common.plan.measure", lambda *of: replace(COST, predict=36.0))
    job.options = replace(job.options, pseudo=teacher.run.folder, teacher=teacher.run.folder)
    for taught, steps in ((lambda job, rows: rows, 2 * (80 + 20) // 4), (None, 2 * 80 // 4)):
        nets = [network(job.config.net, fold, taught=taught) for fold in (0, 1)]
        job.recipe = replace(TOY, networks=lambda job, nets=nets: nets)
        found = estimate(job, read(job))
        assert found.stages[0].steps == steps
        assert found.hours["teachers"] == pytest.approx(2 * (20 + 80) * 36 / 3600, abs=0.01)  # of two folds
        assert found.hours["total"] > found.hours["teachers"] + found.hours["train"]
    maps = replace(STAGE, maps=0), {"train": 1000, "test": 250}
    assert add_disk(job, CPU, [maps[0]], maps[1], (0.0, 2e9))["predictions"] == 0.2


def test_steps_are_counted_on_all_images_where_few_would_not_have_the_same_share(job):
    def rows(job, fold):
        table = job.images.table
        rare = table["image_id"].str.endswith("0") & (table["split"] == "train")  # one in ten; few images may have none
        return table.loc[rare & (table["fold"] != fold), "row"].to_numpy(), job.images.rows(folds=[fold])[:7]

    def networks(job):
        return [network(FitConfig(epochs=3, batch_size=1, precision="fp32"), 0, rows=rows)]

    job.recipe = replace(TOY, networks=networks)
    (stage,) = estimate(job, read(job)).stages
    prepared = prepare_images(job, TOY).table.query("split == 'train' and image_id.str.endswith('0') and fold != 0")
    assert stage.steps == 3 * len(prepared) and stage.held_out == 7


def test_a_slow_network_like_another_takes_a_forward_pass_alone(job, monkeypatch):
    job.images = prepare_images(job, TOY)
    each = network(FitConfig(batch_size=4, precision="fp32"), 0)
    items = [each.dataset(job, job.images.rows(), False, True)[k] for k in range(4)]
    like = replace(COST, forward=0.25)  # training takes twice, prediction half as long
    assert measure(job, each, items, CPU, like).how.endswith("steps")  # it is not slow
    monkeypatch.setattr("common.cost.SLOW", 0.0)
    cost = measure(job, each, items, CPU, like)
    assert cost.how == "forward pass"
    assert cost.train == pytest.approx(2 * cost.forward) and cost.predict == pytest.approx(cost.forward / 2)


def test_plan_prints_a_table_or_json(job, capsys):
    plan(job)
    text = capsys.readouterr().out
    assert "160 labelled and 20 test images on " in text and "hours: prepare" in text
    assert "measured on 20 images" in text and "10 steps" in text
    job.options = replace(job.options, json=True)
    plan(job)
    found = json.loads(capsys.readouterr().out)
    assert found["stages"][0]["steps"] == 40 and set(found["hours"]) == {"prepare", "train", "predict", "total"}


def test_a_card_that_is_not_here_is_counted_by_its_operations(job):
    job.images = prepare_images(job, TOY)
    each = network(FitConfig(batch_size=4, precision="fp32"), 0)
    items = [each.dataset(job, job.images.rows(), False, True)[k] for k in range(4)]
    cost = measure(job, each, items, machine_of(Options(card="T4")))
    forward = 2 * 64 / (EFFICIENCY * 1e12 * CARDS["T4"][0])  # one multiplication and addition per weight
    assert cost.predict == pytest.approx(forward) and cost.train == pytest.approx(3 * forward)
    assert cost.weights == 4 * 65


@pytest.mark.parametrize("card", ["T4", ""])
def test_a_measured_network_is_freed(job, card):
    def build(weights):
        net = torch.nn.Sequential(Net(), torch.nn.Sigmoid())  # a sigmoid's gradient needs its result
        built.extend(map(weakref.ref, net.parameters()))
        return net

    job.images, built = prepare_images(job, TOY), []
    each = replace(network(FitConfig(batch_size=4, precision="fp32"), 0), build=build)
    items = [each.dataset(job, job.images.rows(), False, True)[k] for k in range(4)]
    measure(job, each, items, machine_of(Options(card=card, device="cpu")))
    gc.collect()
    assert built and all(parameter() is None for parameter in built)


def test_a_step_that_does_not_fit_names_the_batch_that_does():
    stage = replace(STAGE, section="segmenter", config=replace(FIT, batch_size=12, accumulate=2))

    def problem(memory, cost=COST):
        machine = Machine(1, "T4", 4, 4, memory, None)
        job = SimpleNamespace(options=Options(kaggle=True))
        disk = dict.fromkeys(("images", "weights", "predictions", "training"), 1.0)
        return find_problems(job, machine, [replace(stage, cost=cost)], disk)

    assert problem(7.0) == []  # 1 + 12 · 0.5
    (text,) = problem(5.5)  # nine images fit; six is the largest divisor of twelve
    assert text.endswith("--segmenter.batch-size 6 --segmenter.accumulate 4 would fit, although norms")
    split = replace(COST, whole="")
    assert problem(5.5, split)[0].endswith("--micro-batch 9 would fit, with the same gradients")
    assert "not even one image" in problem(0.2, split)[0]  # less than the weights need
    assert "not even one image" in problem(1.2)[0] and "not even one image" in problem(1.2, split)[0]
    assert "not even one image" in problem(0.2, replace(COST, each=0.0))[0]
    stage = replace(stage, part=9)
    assert stage.gib() == 5.5 and problem(5.5) == []


def test_micro_batches_of_the_plan_are_those_of_the_training(job, monkeypatch):
    job.options = replace(job.options, micro_batch=3)
    (stage,) = estimate(job, read(job)).stages
    assert stage.part == 3 and stage.config.batch_size == 4
    assert stage.gib() == pytest.approx(stage.cost.fixed + 3 * stage.cost.each)
    job.options = replace(job.options, micro_batch="auto", card="T4")
    monkeypatch.setitem(CARDS, "T4", (65, CUDA_CONTEXT + 1e-6))  # 1 KiB beside CUDA: too little for its weights
    assert estimate(job, read(job)).stages[0].part == 1


def test_a_disk_that_is_too_small_is_a_problem(tmp_path):
    job = SimpleNamespace(options=Options(kaggle=True, out=tmp_path))
    disk = {"images": 100.0, "weights": 15.0, "predictions": 6.0, "training": 4.0}
    (text,) = find_problems(job, CPU, [], disk)
    assert "21.0 GB of 20.0 GB" in text  # decoded images may lie elsewhere, and trainings have ended
    assert "22.5 GB of 20.0 GB" in find_problems(job, CPU, [], {**disk, "training": 7.5})[0]
    job.options = Options(out=tmp_path)
    (text,) = find_problems(job, CPU, [], {**disk, "images": 1e9})
    assert "--out on a larger disk" in text


def test_a_plan_that_cannot_fit_is_an_error_after_the_table(job, capsys, monkeypatch):
    monkeypatch.setattr("common.plan.find_problems", lambda *args: ["disk: too small"])
    with pytest.raises(InputError, match="disk: too small"):
        plan(job)
    assert "hours: prepare" in capsys.readouterr().out


def test_the_machine_is_this_one_a_card_or_kaggles():
    assert machine_of(Options(device="cpu")).gpus == 0
    kaggle = machine_of(Options(kaggle=True))
    assert (kaggle.gpus, kaggle.card, kaggle.workers, kaggle.hours) == (2, "T4", 2, 11.5)
    assert machine_of(Options(card="H100", hours=3.0)).hours == 3
    with pytest.raises(InputError, match="--card X9: choose one of T4"):
        machine_of(Options(card="X9"))
    if not torch.cuda.is_available():
        assert machine_of(Options(gpus=8)).card == "T4"
    with pytest.raises(InputError, match="--gpus must be at least 1"):
        Options(gpus=0)


def test_other_verbs_refuse_the_options_of_plan():
    for options in (Options(kaggle=True), Options(gpus=2), Options(json=True)):
        check_special(options, "plan", (), "toy")
        with pytest.raises(InputError, match="does not apply to the verb run"):
            check_special(options, "run", (), "toy")


def test_chosen_images_hold_labelled_ones_and_keep_their_strata(job):
    listing = read(job)
    bright = listing.strata.copy()
    bright[:] = 0
    bright[[3, 99, 150]] = 1  # rare
    few = choose_images(replace(listing, strata=bright), 10, 4, 0)
    train = few.table[few.table["split"] == "train"]
    assert len(train) == 10 == len(few.strata) and few.strata.sum() == 3
    assert {"i03", "i99", "i150"} <= set(train["image_id"])
    assert (few.table["split"] == "test").sum() == 4


def test_a_rare_label_is_chosen_among_many_common_ones_and_only_used_images_are(job):
    listing = read(job)
    kinds = np.zeros((159, 2), int)
    kinds[:, 0], kinds[[70, 71], 1] = 1, 1  # without the first image, which is not used
    used = listing.table["image_id"] != "i00"
    listing = replace(listing, strata=None, kinds=kinds, table=listing.table.assign(used=used))
    for seed in range(5):
        few = choose_images(listing, 8, 4, seed)
        assert few.strata is None and {"i71", "i72"} <= set(few.table["image_id"])
        assert "i00" not in set(choose_images(listing, 159, 4, seed).table["image_id"])


def test_a_run_goes_on_where_few_images_cannot_be_planned_with(job, caplog, monkeypatch):
    monkeypatch.setattr("common.plan.LONG_RUN", 100)
    caplog.set_level("INFO")

    def refine(job, listing, store):
        raise InputError("no image of a rare class")

    job.recipe = replace(TOY, refine=refine)
    announce(job, read(job))
    assert "what the run will cost is not known: no image of a rare class" in caplog.messages
    with pytest.raises(InputError, match="no image of a rare class"):
        plan(job)


def test_long_runs_are_announced_before_their_images_are_decoded(job, caplog, monkeypatch):
    monkeypatch.setattr("common.plan.LONG_RUN", 100)
    monkeypatch.setattr("common.plan.find_problems", lambda *args: ["disk: too small"])
    caplog.set_level("INFO")
    announce(job, read(job))
    said = [record.getMessage() for record in caplog.records]
    assert any("hours: prepare" in line for line in said) and "warning: disk: too small" in said
    caplog.clear()
    monkeypatch.setattr("common.plan.LONG_RUN", 1000)
    announce(job, read(job))
    assert not caplog.records


def test_configuration_without_folds_of_its_own_is_planned(tmp_path):
    job = make_job(tmp_path / "run", Config(folds=(1,)), data=write_data(tmp_path / "data", n_train=24))
    assert [stage.trainings for stage in estimate(job, read(job)).stages] == [1]
    job.run.close()
