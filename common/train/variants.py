"""The end of a training: build and validate weight averages and keep the best; read finished trainings."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from common.errors import check
from common.nn.precision import autocast
from common.paths import checked_read, read_json, write_json
from common.train import averaging, distributed
from common.train.checkpoint import halve, load_weights, save_weights

BN_BATCHES = 100  # batches for re-estimating batch-norm statistics
NO_FIGURES = ("epoch", "lr", "train_loss", "seconds", "memory_mb")  # columns of history.csv besides metrics


@dataclass
class Fitted:
    """A finished training: the folder with final.safetensors, the chosen variant, the metrics of all variants."""

    folder: Path
    variant: str
    figures: dict
    variants: dict
    history: pd.DataFrame


def read_finished(folder, model, key, changed):
    """Load a finished training's weights into `model` and return its Fitted.

    Raises InputError if its key differs (see `same_training`) or one of its files is damaged.
    """
    _, about = load_weights(folder / "final.safetensors", model)
    same_training(about.get("key"), key, folder, changed)
    summary = read_json(folder / "variants.json")
    remedy = f"delete {folder} to train again"
    with checked_read(folder / "history.csv", "table", remedy):
        history = pd.read_csv(folder / "history.csv")
    with checked_read(folder / "variants.json", "summary", remedy):
        return Fitted(folder, summary["chosen"], summary["variants"][summary["chosen"]], summary["variants"], history)


def same_training(found, wanted, folder, changed):
    """Raise InputError unless the keys of two trainings are equal; changed: the changed settings, for the message."""
    remedy = "give the run another --out, or delete that folder to train again"
    check(found == wanted, f"{folder}: holds a training with another configuration, data or seed{changed}; {remedy}")


def finish(trainer):
    """Build and validate every weight average, keep the best as final.safetensors; return a Fitted."""
    config, scores, variants = trainer.config, trainer.scores(), {}
    sign = -1 if config.metric.startswith("-") else 1
    kept = (lambda state: halve(state, f"half_weights: {trainer.name}")) if config.half_weights else dict
    for name in config.averaging:
        if trainer.budget.spent():
            trainer.stop()
        if name == "ema":
            epochs, state = [], trainer.ema.state
        else:
            epochs = averaging.epochs_of(name, scores, config)
            distributed.barrier()
            state = averaging.average(load_weights(trainer.epoch_file(e))[0] for e in epochs)
        trainer.model.load_state_dict(kept(state))
        if len(epochs) != 1:
            _reestimate(trainer)
        # epochs may be compared on some images, but averages on all: their metrics decide and are reported
        known = len(epochs) == 1 and trainer.validate_all is None and not config.half_weights
        figures = trainer.history[epochs[0]] if known else trainer.evaluate(trainer.validate_all)
        figures = {k: v for k, v in figures.items() if k not in NO_FIGURES}
        figures = {k: v if math.isfinite(v) else None for k, v in figures.items()}  # JSON has no NaN
        variants[name] = {"epochs": epochs, **figures}
        if distributed.is_main():
            path = trainer.folder / "variants" / f"{name}.safetensors"
            known = {"key": trainer.key, "variant": name, "epochs": epochs, **trainer.origin}
            save_weights(path, kept(trainer.model.state_dict()), **known, **figures)
    values = {name: figures[config.metric.lstrip("-")] for name, figures in variants.items()}
    values = {name: -math.inf if value is None else sign * value for name, value in values.items()}
    chosen = max(values, key=values.get) if config.keep == "highest" else config.keep  # the first if equal
    if distributed.is_main():
        write_json(trainer.folder / "variants.json", {"chosen": chosen, "metric": config.metric, "variants": variants})
        state, about = load_weights(trainer.folder / "variants" / f"{chosen}.safetensors")
        save_weights(trainer.folder / "final.safetensors", state, **about)
        (trainer.folder / "last.ckpt").unlink(missing_ok=True)
        for epoch in range(config.epochs):
            trainer.epoch_file(epoch).unlink(missing_ok=True)
        if not config.keep_variants:
            shutil.rmtree(trainer.folder / "variants")
    distributed.barrier()
    load_weights(trainer.folder / "final.safetensors", trainer.model)
    return Fitted(trainer.folder, chosen, variants[chosen], variants, pd.DataFrame(trainer.history))


def _reestimate(trainer):
    """Recompute batch-norm statistics over the first batches of the last epoch's order."""
    trainer.loader.batch_sampler.set_epoch(trainer.config.epochs - 1, trainer.config.epochs)
    torch.manual_seed(trainer.seed)
    batches = (batch for batch, _ in zip(trainer.loader, range(BN_BATCHES), strict=False))
    with autocast(trainer.device, trainer.dtype):
        averaging.reestimate_batch_norm(trainer.model, batches, trainer.step)
