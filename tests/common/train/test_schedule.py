"""Learning rates by hand, the range test on a quadratic, weights files that are refused."""

import numpy as np
import pytest
import torch
from torch import nn

from common.config import FitConfig
from common.errors import InputError
from common.nn.backbone import build_backbone
from common.nn.classifier import Classifier
from common.train import schedule
from common.train.checkpoint import load_resume, load_weights, save_resume, save_weights
from common.train.lr_finder import find_learning_rate, suggest


def test_shapes_of_the_schedules():
    assert [schedule.cosine(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [schedule.one_cycle(p) for p in (0, 0.3, 1)] == pytest.approx([1 / 25, 1, 1e-4])
    assert [schedule.warm_cosine(p) for p in (0, 0.025, 0.05, 1)] == pytest.approx([0, 0.5, 1, 0])
    config = FitConfig(lr=1.0, schedule="step", milestones=(30, 60))
    rates = [schedule.learning_rate(config, epoch, 0, 1, []) for epoch in (29, 30, 59, 60)]
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01])


def test_layers_have_a_share_of_the_next_ones_rate():
    torch.manual_seed(0)
    model = Classifier(*build_backbone("test_vit", 64), (0.5,) * 3, (0.5,) * 3)
    config = FitConfig(layer_decay=0.5, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = schedule.parameter_groups(model, config)
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert set(found) == set(names.values()) and len(model.net.blocks) == 6
    scales = {name: group.get("lr_scale", 1.0) for name, group in found.items()}
    assert scales["head.weight"] == scales["net.norm.weight"] == 1
    for k in range(6):
        assert scales[f"net.blocks.{k}.mlp.fc1.weight"] == 0.5 ** (5 - k)
    assert scales["net.patch_embed.proj.weight"] == scales["net.pos_embed"] == 0.5**6
    decays = {name: group.get("weight_decay") for name, group in found.items()}
    assert decays["net.patch_embed.proj.weight"] == 0.1 and decays["head.weight"] is None  # the optimizer's
    assert decays["net.pos_embed"] == decays["net.blocks.0.mlp.fc1.bias"] == 0
    model.net.requires_grad_(False)
    (head,) = schedule.parameter_groups(model, config)
    assert head["params"] == [*model.head.parameters()]
    with pytest.raises(InputError, match="does not number the layers"):
        schedule.parameter_groups(nn.Linear(2, 2), config)


def test_plateau_counts_from_each_new_best():
    scores = [0.5, 0.6, 0.6, 0.6]
    assert schedule.reductions(scores, 3) == []
    assert schedule.reductions([*scores, 0.5], 3) == [5]
    assert schedule.reductions([*scores, 0.5, 0.5, 0.5], 3) == [5]
    assert schedule.reductions([*scores, 0.5, 0.5, 0.5, 0.5], 3) == [5, 8]
    assert schedule.reductions([0.5, 0.4, 0.4, 0.7, 0.4, 0.4], 3) == []
    config = FitConfig(epochs=9, schedule="plateau", patience=3, factor=0.2, lr=1.0)
    assert schedule.learning_rate(config, 8, 0, 10, [*scores, 0.5, 0.5, 0.5, 0.5]) == pytest.approx(0.04)


def test_frozen_epochs_have_their_own_rate_and_the_schedule_begins_after_them():
    config = FitConfig(epochs=4, frozen_epochs=2, frozen_lr=0.02, lr=0.001, schedule="cosine")
    rates = [schedule.learning_rate(config, e, s, 10, []) for e, s in ((0, 0), (1, 9), (2, 0), (3, 0))]
    assert rates == pytest.approx([0.02, 0.02, 0.001, 0.0005])


def test_every_cycle_runs_through_the_whole_schedule():
    config = FitConfig(epochs=9, frozen_epochs=2, frozen_lr=0.02, lr=0.1, schedule="cosine", cycles=2)
    assert schedule.cycle_bounds(config) == [2, 6, 9]  # 3.5 rounds to 4
    places = ((1, 1), (2, 0), (4, 0), (5, 1), (6, 0), (7, 1))  # the last is halfway through the second cycle
    rates = [schedule.learning_rate(config, epoch, step, 2, []) for epoch, step in places]
    assert rates == pytest.approx([0.02, 0.1, 0.05, 0.1 * schedule.cosine(7 / 8), 0.1, 0.05])
    with pytest.raises(InputError, match="7 epochs after the frozen ones cannot have 8 cycles"):
        FitConfig(epochs=9, frozen_epochs=2, schedule="cosine", cycles=8)
    with pytest.raises(InputError, match="the schedule plateau"):
        FitConfig(schedule="plateau", cycles=2)


def test_the_warm_up_is_a_share_of_the_steps():
    config = FitConfig(epochs=10, lr=1.0, schedule="warm_cosine", warmup=0.1)
    rates = [schedule.learning_rate(config, e, s, 10, []) for e, s in ((0, 5), (1, 0), (5, 5))]
    assert rates == pytest.approx([0.5, 1.0, 0.5])
    with pytest.raises(InputError, match="warmup must lie in"):
        FitConfig(warmup=1.0)


def test_one_cycle_runs_once_over_the_frozen_epochs_and_once_over_the_others():
    config = FitConfig(epochs=5, frozen_epochs=2, frozen_lr=0.02, lr=0.001, schedule="one_cycle")
    rates = [schedule.learning_rate(config, e, s, 10, []) for e, s in ((0, 0), (0, 6), (1, 0), (2, 0), (2, 9))]
    half = 1e-4 + (1 - 1e-4) * schedule.cosine(2 / 7)
    assert rates == pytest.approx([0.02 / 25, 0.02, 0.02 * half, 0.001 / 25, 0.001])


def test_decay_divides_the_scheduled_rate_by_one_more_part_a_step():
    config = FitConfig(epochs=3, frozen_epochs=1, frozen_lr=0.5, lr=1.0, schedule="plateau", patience=1, decay=0.1)
    rates = [
        schedule.learning_rate(config, e, s, 5, scores)
        for e, s, scores in ((0, 3, []), (1, 0, []), (1, 2, []), (2, 0, [0.7, 0.6]))
    ]
    assert rates == pytest.approx([0.5, 1.0, 1 / 1.2, 0.1 / 1.5])
    with pytest.raises(InputError, match="decay must be at least 0"):
        FitConfig(decay=-1e-5)


def test_range_test_finds_a_rate_below_the_breaking_point_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    x = torch.randn(256, 8)
    y = x @ torch.randn(8, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rates, losses, found = find_learning_rate(
        model, lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), [(x, y)], high=10.0, steps=80
    )
    assert len(rates) == len(losses) and np.all(np.diff(rates) > 0)
    assert 1e-3 < found < 3
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(("wanted", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_range_test_runs_in_the_precision_of_the_training(wanted, dtype):
    seen, x = set(), torch.randn(64, 8)

    def step(model, batch):
        output = model(x)
        seen.add(output.dtype)
        return ((output.float() - x[:, :1]) ** 2).mean()

    find_learning_rate(nn.Linear(8, 1), step, [0], steps=40, wanted=wanted)
    assert seen == {dtype}


def test_range_test_refuses_losses_that_never_fall():
    with pytest.raises(InputError, match="never fell"):
        suggest(np.logspace(-5, 0, 30), np.linspace(1, 2, 30))
    with pytest.raises(InputError, match="diverged after 3"):
        suggest([1, 2, 3], [1, 2, 3])


def test_weights_round_trip_and_refusals(tmp_path):
    model = nn.Linear(3, 2)
    save_weights(tmp_path / "a.safetensors", model.state_dict(), epoch=3, iou=0.5)
    state, about = load_weights(tmp_path / "a.safetensors", nn.Linear(3, 2))
    assert torch.equal(state["weight"], model.weight) and about == {"epoch": 3, "iou": 0.5}
    with pytest.raises(InputError, match="another network"):
        load_weights(tmp_path / "a.safetensors", nn.Linear(4, 2))
    with pytest.raises(InputError, match="no such file"):
        load_weights(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="not a safetensors file"):
        load_weights(tmp_path / "c.safetensors")


def test_resume_files_never_run_code(tmp_path):
    assert load_resume(tmp_path / "none.ckpt") is None
    save_resume(tmp_path / "a.ckpt", {"w": torch.ones(2), "n": [1, "x"]})
    assert load_resume(tmp_path / "a.ckpt")["n"] == [1, "x"]
    torch.save({"bad": suggest}, tmp_path / "bad.ckpt")  # a pickled function
    with pytest.raises(InputError, match="not a resume file"):
        load_resume(tmp_path / "bad.ckpt")
