"""The training loop: epochs, steps and weights, independent of the task.

A solution provides `step(model, batch) -> loss` and `validate(model) -> {name: metric}`. All randomness of a step
derives from the seed and the step's number, so a run that was killed and resumed from `last.ckpt` ends with the same
weights as an uninterrupted one, bit for bit on a CPU.
"""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from common.budget import Budget, Stopped
from common.config import digest
from common.errors import InputError, check, log
from common.nn.norms import set_frozen_eval
from common.nn.precision import autocast, precision
from common.paths import write_csv
from common.train import averaging, distributed, passes
from common.train.checkpoint import load_resume, save_resume, save_weights
from common.train.schedule import learning_rate, parameter_groups
from common.train.variants import finish, read_finished, same_training

CHECK_EVERY = 20  # steps between reading the loss, which waits for the GPU
COUNTERS = ("epoch", "batch", "loss_sum", "loss_count", "history", "seconds")  # a trainer's fields in last.ckpt


def fit(model, step, loader, validate, config, folder, *, device, seed=0, about=None, changed="", **more):
    """Train `model` with the settings `config` (a FitConfig) and return a Fitted; finished trainings are only read.

    model: on any device; moved to `device`, channels last.
    step(model, batch) -> loss, a scalar tensor; called under mixed precision with a batch of `loader`.
    loader: a DataLoader whose batch_sampler has `set_epoch(epoch, n_epochs)` and `start_batch` (EpochSampler).
    validate(model) -> dict of floats, including `config.metric`; called in every process, with the model in eval mode.
    folder: receives last.ckpt, epoch*.safetensors, final.safetensors, variants/, history.csv.
    about: JSON values (data, architecture) that must not change on resuming, like the configuration and the seed.
    changed: the changed settings, for the error message about a training with another configuration.
    more: further fields of _Trainer.

    Raises InputError for a non-finite loss, a metric that `validate` does not return, or a folder with a training of
    another configuration; Stopped after saving when the budget is spent.
    """
    folder = Path(folder)
    key = digest(config, seed, about)
    model.to(device, memory_format=torch.channels_last)
    if (folder / "final.safetensors").is_file():
        return read_finished(folder, model, key, changed)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(model, step, loader, validate, config, folder, device, seed, key, changed, **more)
    trainer.budget.training = True
    try:
        with trainer.pool:
            trainer.resume()
            while trainer.epoch < config.epochs:
                trainer.train_epoch()
                trainer.end_epoch()
            trainer.wait()
            return finish(trainer)
    finally:
        trainer.budget.training = False


@dataclass
class _Trainer:
    """One training; the fields up to `changed` are as in `fit`.

    freeze(model, frozen): freezes layers for the first `config.frozen_epochs` and unfreezes them afterwards.
    micro_batch: as in Options. couples: the loss is not a mean over images, so batches cannot be split.
    validate_all(model): `validate` on all held-out images, for the averages, if `validate` uses only some; else None.
    trained_on: JSON values on the weights' origin, for the metadata of the weights files; not compared on resuming.
    before_epoch(history): called before each epoch with a list of the metrics of earlier epochs.
    on_epoch(history): called after each epoch with a list of the metrics of all epochs so far.
    seconds_to_come(seconds per epoch) -> seconds that the later trainings of the run will take.
    """

    model: torch.nn.Module
    step: Callable
    loader: object
    validate: Callable
    config: object
    folder: Path
    device: torch.device
    seed: int
    key: str
    changed: str
    freeze: Callable | None = None
    micro_batch: int | str = 0
    couples: bool = False
    validate_all: Callable | None = None
    budget: Budget | None = None
    save_minutes: float = 10.0
    trained_on: object = None
    before_epoch: Callable = lambda history: None
    on_epoch: Callable | None = None
    seconds_to_come: Callable = lambda pace: 0.0

    def __post_init__(self):
        self.budget = self.budget or Budget()
        self.name = f"{self.folder.parent.name}/{self.folder.name}"
        self.origin = {"trained_on": self.trained_on} if self.trained_on else {}
        self.dtype = precision(self.device, self.config.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.epoch, self.batch, self.loss_sum, self.loss_count = 0, 0, 0.0, 0
        self.history, self.ema, self.frozen, self.optimizer = [], None, None, None
        self.pool, self.writing = ThreadPoolExecutor(1), None  # for writing last.ckpt
        self.seconds, self.since = 0.0, time.monotonic()  # duration of this epoch up to `since`

    # ---- state -------------------------------------------------------------------------------------------------

    def resume(self):
        """Restore the state of last.ckpt, if any, and begin the phase."""
        state = load_resume(self.folder / "last.ckpt")
        if state is not None:
            same_training(state["key"], self.key, self.folder, self.changed)
            self.model.load_state_dict(state["model"])
            vars(self).update({name: state[name] for name in COUNTERS if name in state})
        self.begin_phase()
        if state is not None and self.epoch < self.config.epochs:
            if state["frozen"] == self.frozen:
                self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:  # empty if saved on a device without fp16
                self.scaler.load_state_dict(state["scaler"])
        if "ema" in self.config.averaging:
            self.ema = averaging.Ema(self.model, self.config.ema_decay)
            if state is not None:
                self.ema.updates = state["ema_updates"]
                self.ema.state = {k: v.to(self.device) for k, v in state["ema"].items()}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.saved = self.since = time.monotonic()

    def save(self, outdated=()):
        """Write last.ckpt in a thread, then delete the files `outdated`. Raises the previous write's error, if any."""
        self.saved = time.monotonic()
        self.seconds, self.since = self.seconds + self.saved - self.since, self.saved
        if not distributed.is_main():
            return
        state = {name: getattr(self, name) for name in ("key", "frozen", *COUNTERS)}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
        state |= {"ema": self.ema.state if self.ema else {}, "ema_updates": self.ema.updates if self.ema else 0}
        copy = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
        self.wait()
        self.writing = self.pool.submit(self.write, copy, outdated)

    def write(self, state, outdated):
        save_resume(self.folder / "last.ckpt", state)
        for path in outdated:  # only now: if killed before, the training resumes without this epoch
            path.unlink(missing_ok=True)

    def wait(self):
        """Wait until last.ckpt is written. Raises the error of the write."""
        if self.writing is not None:
            self.writing.result()

    def begin_phase(self):
        """Freeze or unfreeze layers and build a new optimizer for the trainable parameters."""
        self.frozen = self.epoch < self.config.frozen_epochs
        if self.freeze is not None:
            self.freeze(self.model, self.frozen)
        parameters = parameter_groups(self.model, self.config)
        decay = {"lr": self.config.lr, "weight_decay": self.config.weight_decay}
        if self.config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, momentum=self.config.momentum, **decay)
        else:
            kind = torch.optim.Adam if self.config.optimizer == "adam" else torch.optim.AdamW
            # fused takes less host time, for which a GPU waits; torch's default on CPUs
            self.optimizer = kind(parameters, **decay, fused=self.device.type == "cuda" or None)
        self.set_mode()
        size, whole = self.config.batch_size // distributed.world(), passes.why_whole(self.model, self.couples)
        attempt = self.try_step if self.device.type == "cuda" else None
        self.part = passes.part_size(self.micro_batch, size, whole, attempt, self.name)
        self.optimizer.zero_grad()
        self.module = passes.compiled(distributed.wrap(self.model, self.device), self.config.compile, self.device)

    def set_mode(self):
        self.model.train()
        set_frozen_eval(self.model)

    def try_step(self, size):
        """Take a trial step in parts of `size` images with the memory of a later step; only gradients change."""
        self.optimizer.zero_grad()
        self.part, self.module, self.recent = size, self.model, torch.zeros((), device=self.device)
        self.loader.batch_sampler.set_epoch(0, self.config.epochs)
        batch = next(iter(self.loader))
        kept = [torch.empty_like(p) for p in self.model.parameters() for _ in range(3)]  # two moments, an average
        for _ in range(2):  # the second time with gradients in memory
            self.backward(batch, 1, syncs=True)
        del kept

    # ---- one epoch ---------------------------------------------------------------------------------------------

    def train_epoch(self):
        """Run the steps of one epoch; a resumed epoch continues with its next batch."""
        config, sampler = self.config, self.loader.batch_sampler
        if (self.epoch < config.frozen_epochs) != self.frozen:
            self.begin_phase()
        self.before_epoch(self.history)
        sampler.set_epoch(self.epoch, config.epochs)
        sampler.start_batch = self.batch
        self.set_mode()
        batches = sampler.batches
        steps = math.ceil(batches / config.accumulate)
        scores = self.scores(config.plateau_metric)[config.frozen_epochs :]
        self.recent = torch.zeros((), device=self.device)
        title, quiet = f"{self.name} epoch {self.epoch + 1}/{config.epochs}", not distributed.is_main()
        bar = tqdm(total=batches, initial=self.batch, desc=title, disable=quiet, leave=False)
        for batch in self.loader:
            number, last = self.batch, self.batch + 1 == batches
            steps_now = (number + 1) % config.accumulate == 0 or last
            # for the step's random draws (dropout), the same after resuming
            draws = self.seed * 1_000_003 + self.epoch * 100_003 + number * 101 + distributed.rank()
            torch.manual_seed(draws % 2**63)
            lr = learning_rate(config, self.epoch, number // config.accumulate, steps, scores)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            group_size = min(config.accumulate, batches - number + number % config.accumulate)
            self.backward(batch, group_size, steps_now)
            self.loss_count += 1
            self.batch += 1
            bar.update()
            if steps_now:
                self.optimizer_step()
            if self.batch % CHECK_EVERY == 0 or last:
                self.add_loss()
                bar.set_postfix(loss=f"{self.loss_sum / self.loss_count:.4f}", lr=f"{lr:.2e}", refresh=False)
            # only between optimizer steps; several processes check together, one alone after each step
            together = self.batch % CHECK_EVERY < config.accumulate
            if steps_now and not last and (together or distributed.world() == 1):
                self.pause()
        bar.close()
        self.lr = lr

    def backward(self, batch, group_size, syncs):
        """Add a batch's loss, and its gradients divided by `group_size`; syncs: average them over the processes."""
        for share, part, last in passes.pieces(batch, self.part):
            alone = (syncs and last) or not hasattr(self.module, "no_sync")
            with contextlib.nullcontext() if alone else self.module.no_sync():
                self.pass_part(part, share, group_size)

    def pass_part(self, part, share, group_size):
        try:
            with autocast(self.device, self.dtype):
                loss = self.step(self.module, part) * share
            self.scaler.scale(loss / group_size).backward()
            self.recent += loss.detach()
        except RuntimeError as error:
            self.module = passes.uncompiled(self.module, error)
            self.pass_part(part, share, group_size)

    def pause(self):
        """Save if it is time; save and stop if the budget is spent."""
        stop = self.budget.spent()
        if stop or distributed.agree(time.monotonic() - self.saved > 60 * self.save_minutes):
            self.add_loss()
            self.save()
        if stop:
            self.stop()

    def stop(self):
        self.wait()
        distributed.barrier()  # torchrun ends all processes soon after the first has ended
        raise Stopped(self.budget.reason or "another process has to stop")

    def add_loss(self):
        """Add the sum of recent losses to the epoch's and reset it; raise InputError if it is not finite."""
        value = self.recent.item()
        if not math.isfinite(value):
            place = f"epoch {self.epoch + 1}, batch {self.batch}; the last save is not affected"
            remedy = "lower the learning rate, set clip_norm, or use precision fp32"
            raise InputError(f"{self.folder}: the loss became {value} at {place}: {remedy}")
        self.loss_sum += value
        self.recent.zero_()

    def optimizer_step(self):
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model)

    def end_epoch(self):
        """Validate, write the epoch's weights and history, delete weights that no average needs any more, save."""
        figures = self.evaluate()
        train_loss = self.loss_sum / self.loss_count
        spent = {"seconds": round(self.seconds + time.monotonic() - self.since, 2)}
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:  # of this process
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        spent["memory_mb"] = round(memory / 1e6)
        self.history.append({"epoch": self.epoch, "lr": self.lr, "train_loss": train_loss, **figures, **spent})
        if distributed.is_main():
            path = self.epoch_file(self.epoch)
            save_weights(path, self.model.state_dict(), epoch=self.epoch, **figures, **self.origin)
            write_csv(self.folder / "history.csv", pd.DataFrame(self.history))
            text = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
            title = f"{self.name} epoch {self.epoch + 1}/{self.config.epochs}"
            pace = sum(entry["seconds"] for entry in self.history) / len(self.history)
            left = round(pace * (self.config.epochs - self.epoch - 1) + self.seconds_to_come(pace))
            costs = f"{spent['seconds']:.1f} s  {spent['memory_mb'] / 1e3:.1f} GB"
            log.info(f"{title}  train_loss {train_loss:.4f}  {text}  {costs}  left {timedelta(seconds=left)}")
        self.epoch, self.batch, self.loss_sum, self.loss_count = self.epoch + 1, 0, 0.0, 0
        self.seconds, self.since = 0.0, time.monotonic()
        keep = averaging.epochs_to_keep(self.scores(), self.config)
        self.save([self.epoch_file(epoch) for epoch in range(self.epoch) if epoch not in keep])
        if self.on_epoch is not None:
            self.on_epoch(self.history)
        if self.epoch < self.config.epochs and self.budget.spent():
            self.stop()

    def evaluate(self, validate=None):
        distributed.share_buffers(self.model)  # those that are saved
        self.model.eval()
        with torch.inference_mode(), autocast(self.device, self.dtype):
            try:
                figures = {name: float(value) for name, value in (validate or self.validate)(self.model).items()}
            except InputError as error:
                raise InputError(f"{self.folder}: validation in epoch {self.epoch + 1}: {error}") from None
        for metric in filter(None, (self.config.metric, self.config.plateau_metric)):
            check(metric.lstrip("-") in figures, f"metric {metric!r}: validation gives {', '.join(figures)}")
        return figures

    def scores(self, metric=""):
        """Return the metric of each finished epoch, negated if lower is better; NaN counts as the worst."""
        metric = metric or self.config.metric
        sign = -1 if metric.startswith("-") else 1
        values = [sign * h[metric.lstrip("-")] for h in self.history]
        return [v if math.isfinite(v) else -math.inf for v in values]

    def epoch_file(self, epoch):
        return self.folder / f"epoch{epoch:03d}.safetensors"
