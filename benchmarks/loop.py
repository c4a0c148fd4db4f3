"""What a training step of each solution's podium preset waits for: the host, the device, or the loader.

    python -m benchmarks.loop [--solution siim_pneumothorax … --preset podium --steps N --workers N --size PX --batch N]

The real training loop (loader, augmentation, loss, optimizer, EMA) on a few images of the solution's sample, against
the same loop on one batch that stays on the device. Prints for each stage:

    host ms         the host's time to issue a step; on a CPU the whole step
    load ms         one process's time to read and augment a batch
    of fixed batch  rate of the real loop, as a share of that on the fixed batch (1: the loader costs nothing)
    device ms       time of a step's kernels, on a GPU only
    of matrix rate  share of the measured rate of matrix products that the real loop reaches (operations counted by
                    torch), on a GPU only

On a CPU images are small and batches of four by default.
"""

import argparse
import importlib
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from common.budget import Budget
from common.config import FitConfig
from common.job import Job
from common.network import to_device, train_loader, training_loss
from common.options import Options
from common.plan import prepare_few
from common.runs import Run
from common.train import distributed
from common.train.loop import _Trainer
from solutions.__main__ import NAMES

WARM = 3  # steps before the clock starts


def shrink(config, size, batch):
    """A configuration of one fold whose networks take images of `size` pixels in batches of `batch`; 0: its own."""
    values = {"size": size, "resize": size, "sizes": (size,) * bool(size)}
    values |= {"batch_size": batch, "finer_batch_size": batch}
    sections = {name: part for name, part in vars(config).items() if isinstance(part, FitConfig)}
    for name, part in sections.items():
        sections[name] = replace(part, **{key: value for key, value in values.items() if value and hasattr(part, key)})
    return replace(config, n_folds=3, folds=(0,), **sections)


def prepared(name, options, device, folder):
    """The job of a solution's preset with a few prepared images of its sample."""
    sample, about, pipeline = (
        importlib.import_module(f"solutions.{name}.{part}") for part in ("sample", "config", "pipeline")
    )
    data = sample.make_sample(folder / "data")
    config = shrink(about.PRESETS[options.preset], options.size, options.batch)
    asked = Options(data=data, out=folder / "run", workers=options.workers)
    job = Job(name, options.preset, config, asked, Run(folder / "run"), device, Budget(None))
    job.recipe = pipeline.SOLUTION.pick(job, "prepare") or pipeline.SOLUTION
    few, *_ = prepare_few(job, job.recipe.read(job), folder / "few")
    return replace(few, options=replace(few.options, workers=options.workers))


def wait(device):
    """Wait until the device has done everything that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device, steps):
    """Seconds until `work()`, called `steps` times, returned, and until the device had done it, both per call."""
    wait(device)
    begun = time.perf_counter()
    for _ in range(steps):
        work()
    issued = time.perf_counter()
    wait(device)
    return (issued - begun) / steps, (time.perf_counter() - begun) / steps


def kernel_seconds(work):
    """Seconds that a GPU's kernels take in one call of `work()`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def measure(job, network, steps, rate, folder):
    """A row of figures of a network's training step; rate: operations per second of matrix products, None on a CPU."""
    device, config = job.device, replace(network.config, frozen_epochs=0)
    network = replace(network, config=config)
    rows, _ = network.rows(job, network.fold)
    data_rows = np.resize(rows, config.batch_size * (steps + WARM))
    loader = train_loader(job, network, data_rows)
    model = network.build("none").to(device, memory_format=torch.channels_last)
    step = partial(training_loss, network, device)
    trainer = _Trainer(model, step, loader, None, config, folder / network.stage, device, 0, "", "")
    trainer.resume()
    trainer.recent = torch.zeros((), device=device)

    def take(batch):
        trainer.backward(batch, 1, syncs=True)
        trainer.optimizer_step()

    loader.batch_sampler.set_epoch(0, 1)
    keys = next(iter(loader.batch_sampler))
    dataset = network.dataset(job, data_rows, True, True)
    load = np.inf
    for _ in range(3):
        begun = time.perf_counter()
        batch = loader.collate_fn([dataset[key] for key in keys])
        load = min(load, time.perf_counter() - begun)
    fixed = to_device(batch, device)
    for _ in range(WARM):
        take(fixed)
    host, whole = seconds(lambda: take(fixed), device, steps)
    batches = iter(loader)
    for _ in range(WARM):
        take(next(batches))
    _, real = seconds(lambda: take(next(batches)), device, steps)
    row = {"solution": job.solution, "stage": network.stage, "px": batch[0].shape[-1], "batch": config.batch_size}
    row |= {"host ms": 1e3 * host, "load ms": 1e3 * load, "of fixed batch": whole / real}
    if rate is not None:
        with FlopCounterMode(display=False) as counter:
            trainer.backward(fixed, 1, syncs=True)
        row |= {"device ms": 1e3 * kernel_seconds(lambda: take(fixed))}
        row |= {"of matrix rate": counter.get_total_flops() / real / rate}
    trainer.pool.shutdown()
    return row


def matrix_rate(device, dtype=torch.bfloat16, side=8192):
    """Operations per second of a square matrix product on random data."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device, 1)[1] for _ in range(10))


def main():
    """Measure and print."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solution", nargs="+", default=[name for name in NAMES], choices=NAMES)
    parser.add_argument("--preset", default="podium")
    for name, on_gpu, on_cpu in (("size", 0, 96), ("batch", 0, 4), ("steps", 20, 3), ("workers", None, 0)):
        parser.add_argument(f"--{name}", type=int, default=on_gpu if gpu else on_cpu)
    options, device = parser.parse_args(), distributed.start("auto")
    rate = matrix_rate(device) if gpu else None
    print(torch.cuda.get_device_name() if gpu else "CPU", f"{torch.get_num_threads()} threads", sep=", ")
    for name in options.solution:
        with tempfile.TemporaryDirectory() as folder:
            job = prepared(name, options, device, Path(folder))
            stages = {network.stage: network for network in reversed(job.recipe.networks(job)) if not network.needs}
            found = [measure(job, each, options.steps, rate, Path(folder)) for each in reversed(stages.values())]
            job.run.close()
        print(pd.DataFrame(found).to_string(index=False, float_format="{:.2f}".format), flush=True)


if __name__ == "__main__":
    main()
