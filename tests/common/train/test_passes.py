"""A batch that passes in parts gives the gradients of the whole batch, or is refused."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from common.config import FitConfig
from common.errors import InputError
from common.nn.losses import combo
from common.nn.models import segmenter
from common.train import passes
from common.train.checkpoint import load_weights
from common.train.loop import _Trainer, fit
from tests.common.train.test_loop import GROUPED, problem, small, step


def gradients(model, batch, loss, size):
    model.zero_grad()
    for share, (images, target), _ in passes.pieces(batch, size):
        (loss(model(images), target) * share).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_parts_give_the_gradients_of_the_whole_batch():
    """Of a segmenter without batch norms, under the loss of SIIM's podium preset; parts of five images are uneven."""
    torch.manual_seed(0)
    model = segmenter("fpn", "convnext_atto", "none").eval().double()
    batch = torch.randint(0, 256, (5, 1, 32, 32)), torch.rand(5, 1, 32, 32) > 0.6
    whole = gradients(model, batch, combo, 0)
    for size in (1, 2, 4):
        torch.testing.assert_close(gradients(model, batch, combo, size), whole, rtol=1e-5, atol=1e-7)


def test_targets_are_split_with_their_images():
    images = torch.arange(5)
    boxes = [{"boxes": torch.full((k, 4), k)} for k in range(5)]
    parts = passes.pieces((images, boxes), 2)
    assert [part[0].tolist() for _, part, _ in parts] == [[0], [1, 2], [3, 4]]
    assert [len(each["boxes"]) for _, part, _ in parts for each in part[1]] == [0, 1, 2, 3, 4]
    assert [share for share, _, _ in parts] == [0.2, 0.4, 0.4] and [last for *_, last in parts] == [False, False, True]
    ((share, (_, target), last),) = passes.pieces((images, {"labels": images, "boxes": images}), 0)
    assert share == 1 and last and target["boxes"].tolist() == images.tolist()


def run(folder, config, norm=nn.BatchNorm2d, couples=False, **more):
    model, loader, *_ = problem(config.batch_size, **GROUPED | {"norm": norm})
    options = {"device": torch.device("cpu"), "couples": couples, **more}
    return fit(model, step, loader, lambda model: {"accuracy": 0.5}, config, folder / "f", **options)


def test_a_training_in_parts_ends_with_the_weights_of_whole_batches(tmp_path):
    config, grouped = small(epochs=2, accumulate=2, clip_norm=1.0, averaging=("last",)), GROUPED["norm"]
    whole, parts, auto = (run(tmp_path / str(n), config, grouped, micro_batch=n) for n in (0, 3, "auto"))
    weights = [load_weights(each.folder / "final.safetensors")[0] for each in (whole, parts, auto)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(weights[2][name], value)  # on a CPU auto leaves batches whole
    assert parts.history["train_loss"].tolist() == pytest.approx(whole.history["train_loss"].tolist(), rel=1e-4)


def test_batch_norms_and_losses_that_need_the_whole_batch_are_refused(tmp_path):
    config = small(epochs=1, batch_size=8)
    with pytest.raises(InputError, match=r"--micro-batch 4: .*/f: its batch norms see whole batches; .*frozen_norms"):
        run(tmp_path, config, micro_batch=4)
    with pytest.raises(InputError, match=r"its loss couples the images of a batch.*accumulate"):
        run(tmp_path, config, GROUPED["norm"], couples=True, micro_batch=4)
    run(tmp_path / "whole", config, micro_batch=8)  # not split at all
    run(tmp_path / "auto", config, micro_batch="auto")

    def freeze(model, frozen):
        model.body[1].requires_grad_(False)

    run(tmp_path / "frozen", config, micro_batch=4, freeze=freeze)


def test_auto_halves_until_a_step_fits_and_says_so(caplog):
    caplog.set_level(logging.INFO)
    tried = []

    def attempt(fits, size):
        tried.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("no memory")

    find = partial(passes.part_size, "auto", 12, "", name="fold0/net")
    assert find(partial(attempt, 3)) == 3 and tried == [12, 6, 3]
    assert "fold0/net: batches of 12 images" in caplog.text and "parts of 3" in caplog.text
    caplog.clear()
    assert find(partial(attempt, 12)) == 12 and not caplog.text
    assert find(partial(attempt, 0)) == 1  # which the training itself then reports
    assert passes.part_size("auto", 12, "its batch norms", partial(attempt, 3), "x") == 0
    assert passes.part_size("auto", 12, "", None, "x") == 0
    assert [line.split(": ")[-1] for line in caplog.messages[-2:]] == [
        "its batch norms",
        "only GPUs report that they are full",
    ]


def test_the_trial_step_leaves_nothing_behind(tmp_path, monkeypatch):
    """Trials of a trainer that runs out of memory with more than two images at once, then its real training."""

    def short(model, batch):
        if len(batch[0]) > 2:
            raise torch.OutOfMemoryError("no memory")
        return step(model, batch)

    model, loader, *_ = problem(8, **GROUPED)
    config, device = FitConfig(epochs=1, precision="fp32"), torch.device("cpu")
    trainer = _Trainer(model, short, loader, None, config, tmp_path, device, 0, "key", "")
    trainer.begin_phase()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError):
        trainer.try_step(4)
    trainer.try_step(2)
    assert not trainer.optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def compiling(monkeypatch, backend):
    """Make torch.compile use a backend, and note the modules that it is called with."""
    seen, original = [], torch.compile

    def compile_module(module):
        seen.append(module)
        return original(module, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_module)
    torch._dynamo.reset()
    return seen


def test_a_compiled_network_trains_and_auto_compiles_on_gpus_only(tmp_path, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    seen = compiling(monkeypatch, backend)
    grouped, config = GROUPED["norm"], small(epochs=1, averaging=("last",))
    plain = run(tmp_path / "no", replace(config, compile="auto"), grouped)
    assert not seen
    found = run(tmp_path / "yes", replace(config, compile=True), grouped)
    assert len(seen) == 1 and len(graphs) == 1
    one, other = (load_weights(each.folder / "final.safetensors")[0] for each in (plain, found))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert passes.compiled(nn.Linear(1, 1), "auto", torch.device("cuda"))._orig_mod is seen[-1]


def test_a_network_that_cannot_be_compiled_trains_without(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)

    def broken(*args, **options):
        raise RuntimeError("no compiler\nhere")

    compiling(monkeypatch, broken)
    config = small(epochs=1, averaging=("last",))
    found, plain = (run(tmp_path / str(c), replace(config, compile=c), GROUPED["norm"]) for c in (True, False))
    (line,) = caplog.messages
    assert "torch.compile failed" in line and "no compiler here" in line and "\n" not in line
    one, other = (load_weights(each.folder / "final.safetensors")[0] for each in (plain, found))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert found.history["train_loss"].tolist() == plain.history["train_loss"].tolist()


def test_errors_of_the_network_are_no_failures_of_the_compiler():
    for error in (RuntimeError("shapes"), torch.OutOfMemoryError("no memory")):
        with pytest.raises(type(error)):
            passes.uncompiled(nn.Linear(1, 1), error)
