"""Networks: trained once, from the weights and on the rows that they name, and predicted by the mean over folds."""

import logging
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from common.config import FitConfig
from common.errors import InputError
from common.images import prepare_images
from common.network import find_learning_rates, other_folds, predict, seconds_to_come, to_device, train
from common.recipe import train_all
from common.train.checkpoint import load_weights
from tests.toy import TOY, make_job, network, write_data

FIT = FitConfig(epochs=2, batch_size=4, precision="fp32", averaging=("last", "best"))


@pytest.fixture
def job(tmp_path):
    job = make_job(tmp_path / "run", data=write_data(tmp_path / "data"))
    prepare_images(job, TOY)
    yield job
    job.run.close()


def trained(job, net):
    train(job, net)
    return net.load(job.run).linear.weight.detach()


def test_the_same_training_gives_the_same_weights_and_another_fold_others(job):
    first, path = trained(job, network(FIT, 0)), job.run.path("fold0", "net", "final.safetensors")
    about, written = load_weights(path)[1], path.stat().st_mtime_ns
    assert torch.equal(trained(job, network(FIT, 0)), first) and path.stat().st_mtime_ns == written  # read again
    assert about
    path.parent.rename(job.run.path("gone"))
    assert torch.equal(trained(job, network(FIT, 0)), first)
    assert not torch.equal(trained(job, network(FIT, 1)), first)


def test_a_finished_training_of_other_settings_is_refused(job):
    train(job, network(FIT, 0))
    for other in (network(replace(FIT, lr=0.1), 0), network(FIT, 0, key="more"), network(FIT, 0, rows=swapped)):
        with pytest.raises(InputError, match="holds"):
            train(job, other)


def swapped(job, fold):
    return other_folds(job, fold)[::-1]


def test_rows_are_the_other_folds_and_the_fold_itself(job):
    rows, held_out = other_folds(job, 1)
    assert sorted([*rows, *held_out]) == list(range(8)) and (job.images.at(held_out)["fold"] == 1).all()


def test_weights_of_another_network_are_where_it_starts(job):
    first = network(replace(FIT, lr=0.5), 0)
    second = network(replace(FIT, epochs=1, lr=1e-12, weight_decay=0.0), 0, starts_from=first)
    second = replace(second, stage="second")
    with pytest.raises(InputError, match="fold 0 is not trained; run `train`"):
        train(job, second)
    weights = trained(job, first)
    torch.testing.assert_close(trained(job, second), weights)
    job.run.path("fold0", "net", "final.safetensors").unlink()
    job.run.path("fold0", "net").rename(job.run.path("old"))
    trained(job, network(FIT, 0))
    with pytest.raises(InputError, match="fold0/second"):  # it started from others
        train(job, second)


def test_watched_figures_are_measured_on_training_images_too(job):
    plain, watched = network(FIT, 0), replace(network(FIT, 0), stage="watched", watched=("score",))
    before, found = train(job, plain).history, train(job, watched).history
    assert "train_score" not in before and found["score"].tolist() == before["score"].tolist()
    rows, _ = other_folds(job, 0)  # four, as many as are held out, so all of them
    truth = job.images.at(rows)["bright"].to_numpy()
    last = replace(watched, stage="last", config=replace(FIT, averaging=("last",)))
    history = train(job, last).history
    measured = predict(job, [last], rows)[:, 0]
    assert history["train_score"].iloc[-1] == ((measured > 0.5) == truth).mean()


def test_the_time_left_is_that_of_all_trainings_to_come(job, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("common"), "propagate", True)
    fast, slow = (replace(network(FIT, 1), stage=stage) for stage in ("net", "slow"))  # two epochs each
    assert seconds_to_come(job.run, [fast, slow], "net", 3.0) == 4 * 3  # nothing else is known
    job.run.path("fold0", "slow").mkdir(parents=True)
    pd.DataFrame({"epoch": [0, 1], "seconds": [800.0, 1000.0]}).to_csv(job.run.path("fold0", "slow", "history.csv"))
    assert seconds_to_come(job.run, [fast, slow, slow], "net", 3.0) == 2 * 3 + 4 * 900
    assert seconds_to_come(job.run, [slow], "slow", 3.0) == 2 * 3
    with caplog.at_level("INFO", "common"):
        history = train(job, network(FIT, 0), [slow]).history
    assert (history["seconds"] >= 0).all() and (history["memory_mb"] > 50).all()
    said = [line for line in caplog.messages if "epoch" in line]
    assert re.search(r"epoch 2/2  .* \d+\.\d s  \d+\.\d GB  left 0:30:00$", said[-1])


def test_a_network_that_gives_no_numbers_is_refused(job):
    bad = network(FIT, 0, measure=lambda output, target: output[:, 0] / 0)
    with pytest.raises(InputError, match=r"fold0/net.*epoch 1.*NaN or infinity"):
        train(job, bad)


def test_a_network_without_images_to_train_on_is_refused(job):
    without = network(FIT, 1, rows=lambda job, fold: (np.zeros(0, int), job.images.rows(folds=[fold])))
    with pytest.raises(InputError, match=r"fold1/net: no image to train on"):
        train_all(job, [network(FIT, 0), without])
    without = network(FIT, 1, rows=lambda job, fold: (job.images.rows(folds=[fold]), np.zeros(0, int)))
    with pytest.raises(InputError, match=r"fold1/net: no image to validate on.*--n-folds"):
        train_all(job, [network(FIT, 0), without])
    assert not job.run.path("fold0").exists()  # refused before the first training


def test_a_step_of_its_own_takes_the_place_of_the_loss(job):
    seen = []

    def step(model, images, target):
        seen.append((tuple(images.shape), tuple(target.shape)))
        return model(images).square().mean()

    train(job, network(replace(FIT, epochs=1), 0, step=step, loss=None))
    assert seen == [((4, 1, 8, 8), (4, 1))]


def test_the_validation_loss_is_the_mean_over_images_whatever_the_batches(job):
    net = network(
        replace(FIT, epochs=1, batch_size=1, averaging=("last",)), 0
    )  # three held-out images are validated as two and one
    rows = other_folds(job, 0)[1][:3]
    net = replace(net, rows=lambda job, fold: (other_folds(job, 0)[0], rows))
    found = train(job, net).history["loss"].iloc[-1]
    images, targets = zip(*(net.dataset(job, rows, False, True)[i] for i in range(3)), strict=True)
    by_hand = net.loss(net.load(job.run)(torch.stack(images)), torch.stack(targets)).item()
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_predictions_are_the_mean_over_networks_in_the_order_of_the_rows(job):
    nets, rows = [network(replace(FIT, keep_variants=True), fold) for fold in (0, 1)], np.array([9, 2, 4])
    for net in nets:
        train(job, net)
    one, other, both = (predict(job, chosen, rows) for chosen in (nets[:1], nets[1:], nets))
    assert both.shape == (3, 1) and both.dtype == np.float32
    np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-6)
    np.testing.assert_array_equal(predict(job, nets, rows[::-1]), both[::-1])
    images = torch.from_numpy(job.images.dataset(rows, 8)[0][0].numpy())[None]
    by_hand = torch.sigmoid(nets[0].load(job.run)(images)).item()
    assert one[0, 0] == pytest.approx(by_hand, rel=1e-6)
    variant = predict(job, nets[:1], rows, variant="last")
    assert variant.shape == (3, 1)


def test_range_tests_leave_a_table_and_no_training(job):
    find_learning_rates(job, [network(FIT, 0)])
    assert job.run.path("lr_net.csv").is_file() and not list(job.run.folder.glob("fold*/*"))


def test_parts_of_a_batch_go_to_the_device():
    batch = [torch.zeros(1), {"boxes": torch.ones(2), "more": [torch.zeros(3)]}]
    moved = to_device(batch, "meta")
    assert moved[0].is_meta and moved[1]["boxes"].is_meta and moved[1]["more"][0].is_meta


def test_epochs_are_compared_on_some_held_out_images_and_averages_on_all(job):
    """On the same ones in each epoch, so that `best` is not the epoch of the easiest images."""
    asked = []

    def figures(job, probs, rows):
        asked.append(rows.tolist())
        return {"score": [0.2, 0.9, 0.1, 0.3, 0.4, 0.5][len(asked) - 1]}

    config = replace(FIT, epochs=3, validate_images=2, averaging=("last", "best", "ema"))
    fitted = train(job, network(config, 0, figures=figures))
    _, held_out = other_folds(job, 0)
    some, last = asked[:3], asked[3:]
    assert some[0] == some[1] == some[2] and len(set(some[0])) == 2 and set(some[0]) < set(held_out.tolist())
    assert last == [held_out.tolist()] * 3
    # the second epoch was the best on the two images; the figures of the variants are those on all
    assert fitted.variants["best"]["epochs"] == [1] and fitted.history["score"].tolist() == [0.2, 0.9, 0.1]
    assert [fitted.variants[name]["score"] for name in config.averaging] == [0.3, 0.4, 0.5]
    assert fitted.variant == "ema"


@pytest.mark.parametrize("most", [0, 4, 99])
def test_all_held_out_images_are_used_if_they_are_few_enough(job, most):
    asked = []

    def figures(job, probs, rows):
        asked.append(len(rows))
        return {"score": 0.5}

    train(job, network(replace(FIT, validate_images=most), 0, figures=figures))
    assert asked == [4, 4]  # and none for the last and the best epoch, whose figures are known
