"""Every solution's `paper` and `podium` take two real optimizer steps at their full size and batch."""

import importlib
import resource
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import default_collate

from common import plan, processes
from common.cost import GIB, Cost, save_memory
from common.network import training_loss
from common.train.loop import fit
from common.train.passes import why_whole
from tests.solutions.contract import ON_SAMPLE, SOLUTIONS

ROOM = 0.7  # share of the free memory that a step may take
PRESETS = [
    (name, preset)
    for name in SOLUTIONS
    for preset in ("paper", "podium")
    if preset in importlib.import_module(f"solutions.{name}.config").PRESETS
]
COPIES = 8  # of the weights: gradients, moments, an average, and what is saved meanwhile


class Batches:
    """Two equal batches, as a loader of `fit`."""

    batches, start_batch = 2, 0

    def __init__(self, batch):
        self.batch, self.batch_sampler = batch, self

    def set_epoch(self, epoch, n_epochs):
        pass

    def __iter__(self):
        return iter([self.batch] * self.batches)


def take_steps(job, network, items, machine, like, *, folder, say):
    """Train a network for two steps of its whole batch, in parts, or of the largest batch that fits."""
    config, device = network.config, torch.device("cpu")
    model = network.build("none").train()
    for name, tensor in model.state_dict().items():  # norms that begin at 0, for good if frozen, would stop gradients
        if name.endswith("weight") and tensor.dim() == 1 and not tensor.any():
            tensor.fill_(1.0)
    save_memory(job, network, model)
    whole = why_whole(model, network.couples)
    collate = network.collate or default_collate
    weights = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    saved, owned = {}, {each.untyped_storage().data_ptr() for each in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved.update({storage.data_ptr(): storage.nbytes()} if storage.data_ptr() not in owned else {})
        return tensor.detach()  # else a saved result keeps its graph for good

    few = min(2, config.batch_size)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        training_loss(network, device, model, collate([items[k % len(items)] for k in range(few)]))
    room = ROOM * processes.free_memory() - COPIES * weights
    fits = max(few, min(config.batch_size, int(room / (sum(saved.values()) / few))))
    size = fits if whole else config.batch_size
    saved.clear()
    batch = collate([items[k % len(items)] for k in range(size)])
    few_epochs = {"epochs": 1, "frozen_epochs": 0, "accumulate": 1, "cycles": 1, "schedule": "constant"}
    short = replace(config, **few_epochs, averaging=("last",), keep="highest", batch_size=size, compile=False)
    metric, begun, found = config.metric.lstrip("-"), time.monotonic(), []
    before = [each.detach().clone() for each in model.parameters()]

    def step(model, part):
        found.append(training_loss(network, device, model, part))
        return found[-1]

    fit(
        *(model, step, Batches(batch), lambda model: {metric: 0.0}, short, folder / network.stage),
        device=device, freeze=network.freeze, couples=network.couples, micro_batch=0 if whole else fits,
    )  # fmt: skip
    pairs = zip(before, model.parameters(), strict=True)
    moved = [bool((a != b).any()) for a, b in pairs if b.requires_grad]
    assert sum(moved) > 0.9 * len(moved) and all(torch.isfinite(each).all() for each in found)
    how = f"batch {size} of {config.batch_size} ({whole})" if size < config.batch_size else f"batch {size}"
    how += f" in parts of {fits}" if not whole and fits < size else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    shape = "×".join(map(str, items[0][0].shape[-2:]))
    say(
        f"{job.solution} {job.preset}, {network.stage} {shape}: {how}, {time.monotonic() - begun:.0f} s, {peak:.1f} GiB"
    )
    return Cost(1.0, 1.0, 0.0, 0.0, weights, whole)


@pytest.mark.long
@pytest.mark.parametrize(("solution", "preset"), PRESETS, indirect=["solution"])
def test_two_steps_at_full_size_and_batch(solution, preset, command, sample, tmp_path, monkeypatch, capsys):
    said = []

    def say(line):
        said.append(line)
        with capsys.disabled():
            print(f"\n{line}", file=sys.__stderr__, flush=True)  # `plan` swallows the standard output

    monkeypatch.setattr(plan, "measure", partial(take_steps, folder=tmp_path / "steps", say=say))
    result = command("plan", preset, "--data", sample, *ON_SAMPLE[solution.name])
    assert result.status in (0, 2) and "hours: prepare" in result.out and said, result
