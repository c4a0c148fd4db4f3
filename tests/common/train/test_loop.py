"""The training loop on a toy problem: what it promises about resuming, stopping, averaging and several processes."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from common.budget import Budget, Stopped
from common.config import FitConfig
from common.data.loaders import EpochSampler, SampleDataset, make_loader
from common.errors import InputError
from common.paths import read_json
from common.train import distributed
from common.train.checkpoint import halve, load_resume, load_weights, save_resume
from common.train.loop import fit

CPU = torch.device("cpu")


class Toy(nn.Module):
    """Convolution, batch norm and dropout: one of each thing that makes a resume hard."""

    def __init__(self, dropout=0.2, norm=nn.BatchNorm2d):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), norm(4), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.body(x.float() / 255).mean((2, 3)))


def problem(batch_size=8, n=40, **model):
    """A bright square to be told from none."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 90, (n, 16, 16), dtype=np.uint8)
    truth = np.arange(n) % 2
    images[truth == 1, 4:10, 4:10] += 120
    dataset = SampleDataset(images, lambda row: np.array([truth[row]], np.float32))
    torch.manual_seed(0)
    sampler = EpochSampler(n, batch_size, 0, rank=distributed.rank(), world=distributed.world())
    return Toy(**model), make_loader(dataset, sampler), torch.from_numpy(images[:, None]), torch.from_numpy(truth)


def step(model, batch):
    images, truth = batch
    return nn.functional.binary_cross_entropy_with_logits(model(images), truth)


def train(
    folder,
    config,
    *,
    wrap_step=step,
    budget=None,
    save_minutes=10.0,
    freeze=None,
    about=None,
    trained_on=None,
    micro_batch=0,
    **options,
):
    model, loader, images, truth = problem(config.batch_size, **options)

    def validate(model):
        probs = model(images).sigmoid().squeeze(1).float()
        return {"accuracy": ((probs > 0.5) == truth).float().mean(), "loss": (probs - truth).abs().mean()}

    return fit(
        model,
        wrap_step,
        loader,
        validate,
        config,
        folder,
        device=CPU,
        budget=budget,
        freeze=freeze,
        save_minutes=save_minutes,
        about=about,
        trained_on=trained_on,
        micro_batch=micro_batch,
    )


def small(**changes):
    variants = ("last", "best", "window", "classic", "ema", "best_k")
    options = {"epochs": 4, "lr": 0.02, "metric": "accuracy", "precision": "fp32", "averaging": variants, "window": 2}
    return FitConfig(**{**options, **changes})


def test_learns_and_leaves_the_promised_files(tmp_path):
    fitted = train(tmp_path / "f0", small(epochs=12, lr=0.05))
    assert fitted.figures["accuracy"] > 0.9
    assert set(fitted.variants) == {"last", "best", "window", "classic", "ema", "best_k"}
    best = max(v["accuracy"] for v in fitted.variants.values())
    assert fitted.figures["accuracy"] == best
    left = {p.name for p in (tmp_path / "f0").iterdir()}
    assert left == {"final.safetensors", "history.csv", "variants.json"}
    assert len(pd.read_csv(tmp_path / "f0" / "history.csv")) == 12
    again = train(tmp_path / "f0", small(epochs=12, lr=0.05))  # finished: only read
    assert again.variants == fitted.variants


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 7, 13])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_and_restarted_ends_with_the_same_bits(tmp_path, at, accumulate):
    config = small(accumulate=accumulate, keep_variants=True)
    train(tmp_path / "whole" / "f", config, save_minutes=0)
    calls = 0

    def dies(model, batch):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return step(model, batch)

    with pytest.raises(Killed):
        train(tmp_path / "cut" / "f", config, wrap_step=dies, save_minutes=0)
    train(tmp_path / "cut" / "f", config, save_minutes=0)
    for name in ("final.safetensors", "variants/ema.safetensors", "variants/classic.safetensors"):
        assert (tmp_path / "whole" / "f" / name).read_bytes() == (tmp_path / "cut" / "f" / name).read_bytes()


def test_stops_on_sigterm_and_continues(tmp_path):
    config = small()
    train(tmp_path / "whole" / "f", config)
    calls = 0

    def asks(model, batch):
        nonlocal calls
        calls += 1
        if calls == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, batch)

    with pytest.raises(Stopped, match="SIGTERM"):
        train(tmp_path / "cut" / "f", config, wrap_step=asks, budget=Budget())
    assert calls == 8 and (tmp_path / "cut" / "f" / "last.ckpt").is_file()
    train(tmp_path / "cut" / "f", config, budget=Budget())
    final = [(tmp_path / d / "f" / "final.safetensors").read_bytes() for d in ("whole", "cut")]
    assert final[0] == final[1]


def test_time_budget_stops_with_everything_saved(tmp_path):
    with pytest.raises(Stopped, match="hours"):
        train(tmp_path / "f", small(), budget=Budget(0.0))
    path = tmp_path / "f" / "last.ckpt"
    save_resume(path, load_resume(path) | {"seconds": 1000.0})  # of the first epoch before it was stopped
    fitted = train(tmp_path / "f", small())
    assert 1000 <= fitted.history["seconds"][0] < 1100 and fitted.history["seconds"][1:].max() < 100
    assert all(set(figures) == {"epochs", "accuracy", "loss"} for figures in fitted.variants.values())


def test_not_a_number_is_refused_and_not_saved(tmp_path):
    def broken(model, batch):
        return step(model, batch) * math.nan

    with pytest.raises(InputError, match="loss became nan at epoch 1"):
        train(tmp_path / "f", small(), wrap_step=broken)
    assert not list((tmp_path / "f").glob("*.safetensors"))


def test_another_configuration_is_refused_and_loses_nothing(tmp_path):
    train(tmp_path / "f", small())
    before = (tmp_path / "f" / "final.safetensors").read_bytes()
    for config, about in ((small(lr=0.01), None), (small(), {"data": "other"})):
        with pytest.raises(InputError, match="another configuration"):
            train(tmp_path / "f", config, about=about)
    assert (tmp_path / "f" / "final.safetensors").read_bytes() == before


def test_the_weights_say_what_they_were_trained_on(tmp_path):
    """In every file that is left, and without a part in what a resume asks for."""
    config = small(averaging=("best_k", "last"), best_k=2, keep_variants=True)
    plain, told = train(tmp_path / "plain", config), train(tmp_path / "told", config, trained_on={"images": 3})
    names = [path.name for path in sorted(told.folder.rglob("*.safetensors"))]
    assert len(names) >= 3
    for path in told.folder.rglob("*.safetensors"):
        state, about = load_weights(path)
        expected, without = load_weights(plain.folder / path.relative_to(told.folder))
        assert about.pop("trained_on") == {"images": 3} and about == without
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert train(tmp_path / "plain", config, trained_on={"images": 4}).variant == plain.variant


def test_unknown_metric_is_named(tmp_path):
    with pytest.raises(InputError, match=r"'dice'.*accuracy, loss"):
        train(tmp_path / "f", small(metric="dice"))


def test_lower_is_better_with_a_minus(tmp_path):
    fitted = train(tmp_path / "f", small(metric="-loss", averaging=("last", "best", "window")))
    assert fitted.figures["loss"] == min(v["loss"] for v in fitted.variants.values())


def test_a_plateau_may_watch_another_figure_than_the_choice_of_weights(tmp_path):
    plain = {"schedule": "plateau", "patience": 1, "factor": 0.5, "epochs": 3, "averaging": ("last",)}
    rates = {}
    for watched in ("", "loss", "-loss"):  # the loss falls from epoch to epoch
        fitted = train(tmp_path / f"p{watched}", small(plateau_metric=watched, **plain))
        rates[watched] = fitted.history["lr"].tolist()
        assert fitted.history["loss"].is_monotonic_decreasing
    assert rates["loss"] == [0.02, 0.02, 0.01] and rates["-loss"] == [0.02, 0.02, 0.02]
    with pytest.raises(InputError, match="metric 'auc': validation gives accuracy, loss"):
        train(tmp_path / "x", small(plateau_metric="auc", **plain))


def test_frozen_phase_trains_the_head_alone(tmp_path):
    seen = []

    def freeze(model, frozen):
        seen.append(frozen)
        model.body.requires_grad_(not frozen)

    model, *_ = problem()
    train(tmp_path / "f", small(epochs=1, frozen_epochs=1, averaging=("last",)), freeze=freeze)
    state, _ = load_weights(tmp_path / "f" / "final.safetensors")
    assert torch.equal(state["body.0.weight"], model.body[0].weight)
    assert not torch.equal(state["head.weight"], model.head.weight)
    train(tmp_path / "g", small(epochs=2, frozen_epochs=1, averaging=("last",)), freeze=freeze)
    assert seen == [True, True, False]
    state, _ = load_weights(tmp_path / "g" / "final.safetensors")
    assert not torch.equal(state["body.0.weight"], model.body[0].weight)


def test_epoch_files_stay_few(tmp_path):
    counts = []

    def counting(model, batch):
        counts.append(len(list((tmp_path / "f").glob("epoch*.safetensors"))))
        return step(model, batch)

    train(tmp_path / "f", small(epochs=20, averaging=("window", "best_k"), window=3, best_k=2), wrap_step=counting)
    assert max(counts) <= 3 + 3 + 2


GROUPED = {"dropout": 0.0, "n": 24, "norm": lambda channels: nn.GroupNorm(1, channels)}  # independent of the batch
SHARED = {"epochs": 2, "accumulate": 2, "clip_norm": 1.0, "averaging": ("last", "window", "ema")}
TWO = """
import sys, torch
sys.path.insert(0, {root!r})
from common.train import distributed
device = distributed.start("cpu")
torch.set_num_threads(1)
import importlib.util
spec = importlib.util.spec_from_file_location("toy", {file!r}); toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
from pathlib import Path
for name, size in (("two", 0), ("parts", 3)):  # each process splits its eight images
    toy.train(Path(sys.argv[1]) / name / "f", toy.small(**toy.SHARED), micro_batch=size, **toy.GROUPED)
distributed.leave()
"""


@pytest.mark.long
def test_two_processes_train_as_one(tmp_path):
    root = Path(__file__).resolve().parents[3]
    script = tmp_path / "two.py"
    script.write_text(TWO.format(root=str(root), file=__file__))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert said.returncode == 0, said.stderr[-2000:]
    train(tmp_path / "one" / "f", small(**SHARED), **GROUPED)
    one, _ = load_weights(tmp_path / "one" / "f" / "final.safetensors")
    for name in ("two", "parts"):
        two, _ = load_weights(tmp_path / name / "f" / "final.safetensors")
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def train_in_shares(folder):
    """Train with batch norms; each process validates its share of the images. Return the variants and the images."""
    model, loader, images, truth = problem(8)

    def validate(model):
        own = range(len(images))[distributed.share(len(images), 4)]
        probs = distributed.join(model(images[own]).sigmoid().squeeze(1).float().numpy())
        wrong = abs(probs - truth.numpy())
        return {"accuracy": float((wrong < 0.5).mean()), "loss": float(wrong.mean())}

    config = small(epochs=3, averaging=("last", "window", "ema"), keep_variants=True)
    return fit(model, step, loader, validate, config, folder, device=CPU).variants


@pytest.mark.long
def test_figures_of_two_processes_are_those_of_the_saved_weights(tmp_path):
    script = tmp_path / "two.py"
    body = TWO.format(root=str(Path(__file__).resolve().parents[3]), file=__file__)
    body = body[: body.index("for name, size")] + "toy.train_in_shares(Path(sys.argv[1]) / 'f')\ndistributed.leave()\n"
    script.write_text(body)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    model, _, images, truth = problem(8)
    for name, figures in read_json(tmp_path / "f" / "variants.json")["variants"].items():
        load_weights(tmp_path / "f" / "variants" / f"{name}.safetensors", model.eval())
        with torch.inference_mode():
            loss = float((model(images).sigmoid().squeeze(1) - truth).abs().mean())
        assert figures["loss"] == pytest.approx(loss, abs=1e-6)


def test_weights_of_all_variants_are_left_if_they_are_wanted(tmp_path):
    train(tmp_path / "f", small(averaging=("last", "best_k", "window"), keep_variants=True))
    left = {path.stem for path in (tmp_path / "f").rglob("*.safetensors")}
    assert left == {"final", "last", "best_k", "window"}


def test_an_undefined_figure_beside_the_metric_is_kept_as_nothing(tmp_path):
    model, loader, *_ = problem()

    def validate(model):
        return {"accuracy": 0.5, "auroc": math.nan}

    fitted = fit(model, step, loader, validate, small(epochs=1), tmp_path / "f", device=CPU)
    assert {figures["auroc"] for figures in fitted.variants.values()} == {None}


def test_a_named_variant_is_kept_whatever_its_score(tmp_path):
    fitted = train(tmp_path / "f", small(keep="classic", keep_variants=True))
    assert fitted.variant == "classic"
    final, classic = (
        load_weights(tmp_path / "f" / n)[0] for n in ("final.safetensors", "variants/classic.safetensors")
    )
    assert all(torch.equal(final[key], classic[key]) for key in final)
    with pytest.raises(InputError, match="keep 'ema' is not among"):
        small(averaging=("last",), keep="ema")


def test_half_weights_are_validated_as_they_are_kept(tmp_path):
    whole = train(tmp_path / "whole", small(keep_variants=True))
    fitted = train(tmp_path / "half", small(keep_variants=True, half_weights=True))
    probs = {}
    for name, variant in fitted.variants.items():
        model, _, images, truth = problem()
        kept, _ = load_weights(tmp_path / "half" / "variants" / f"{name}.safetensors", model.eval())
        for key, tensor in kept.items():
            wanted = torch.float16 if key in ("body.0.weight", "head.weight") else model.state_dict()[key].dtype
            assert tensor.dtype == wanted and torch.equal(model.state_dict()[key], tensor.to(model.state_dict()[key]))
        with torch.inference_mode():
            probs[name] = model(images).sigmoid().squeeze(1)
        assert variant["loss"] == float((probs[name] - truth).abs().mean())  # not that of the unrounded weights
        load_weights(tmp_path / "whole" / "variants" / f"{name}.safetensors", model)
        with torch.inference_mode():
            assert 0 < (model(images).sigmoid().squeeze(1) - probs[name]).abs().max() < 1e-3
    times = ["seconds", "memory_mb"]  # all else is the same: training itself is not rounded
    assert fitted.history.drop(columns=times).equals(whole.history.drop(columns=times))
    again = train(tmp_path / "half", small(keep_variants=True, half_weights=True))
    assert again.variants == fitted.variants


def test_a_weight_beyond_half_precision_is_refused_by_name():
    state = {"norm.running_var": torch.tensor([1e6]), "index": torch.zeros((2, 2), dtype=torch.long)}
    assert {name: each.dtype for name, each in halve(state, "net").items()} == {k: v.dtype for k, v in state.items()}
    with pytest.raises(InputError, match=r"^net: head\.weight has values outside the range of half precision"):
        halve(state | {"head.weight": torch.tensor([[7e4]])}, "net")
