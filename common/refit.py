"""The tool `refit` of every solution: it trains on the images of all folds and submits by the rule of a finished run.

Nothing is held out, so there is no score. The number of epochs and the decision rule are those that the run's folds
chose; one network per stage predicts the test images instead of one per fold.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from common.errors import check
from common.job import derive_run, open_run
from common.network import with_rate
from common.paths import copy_file, read_csv, read_json, write_json
from common.predictions import predict_test
from common.recipe import read_rule, train_all
from common.runs import start_log
from common.step import run_step
from common.teaching import read_lessons
from common.train.schedule import reductions

WHOLE = ("last", "classic", "ema")  # averages of a complete training; the others end where validation peaks


def refit_tool(recipe, config_class):
    """Return the tool `refit` of a solution."""

    def refit(
        run: Path,
        /,
        *,
        out: Path,
        hours: float | None = None,
        device: str = "auto",
        workers: int | None = None,
        micro_batch: int | Literal["auto"] = 0,
        grad_checkpointing: bool = False,
    ):
        """Train on the images of all folds of a finished run, as long as its folds chose, and submit by its rule.

        The result is a run with a submission, which can be exported; it has no score of its own and no page.

        Args:
            run: Folder of the finished run.
            out: Folder of the new run.
            hours: Save everything and stop after this time; the same command continues.
            device: auto, cpu, cuda or cuda:<n>.
            workers: Processes that read and augment images (default: one per core).
            micro_batch: Images in memory at once, as in `train`.
            grad_checkpointing: Recompute a backbone's activations instead of keeping them, as in `train`.
        """
        check(run.resolve() != out.resolve(), f"--out {out}: is the run itself; name a new folder")
        with open_run(recipe, config_class, run, device="cpu") as source:
            source.refuse_derived()
            read_rule(source)  # refused before anything is written if it is not current
            settings = {network.stage: chosen_settings(source, network) for network in source.recipe.networks(source)}
            config = replace(source.config, folds=(source.config.n_folds,))
            key = [source.run.step("tune")["key"], settings]
            about = {"run": str(run.resolve()), "settings": settings, "neutral": source.recipe.neutral(source)}
            about["lessons"] = read_lessons(source.run, folder=str(run.resolve()))
            derive_run(source, out, config, "refit", key, **about)
            copy_file(source.run.path("tuned.json"), out / "tuned.json")
            write_json(out / "score.json", {})  # the score is that of other networks
        memory = {"micro_batch": micro_batch, "grad_checkpointing": grad_checkpointing}
        with open_run(recipe, config_class, out, device=device, workers=workers, hours=hours, **memory) as job:
            start_log(job.run.path("log.txt"))
            job.lessons = read_lessons(job.run)
            with job.budget.watching():
                train_all(job, [on_all_images(job, one) for one in job.recipe.networks(job)])
                run_step(job, replace(job.steps["predict"], make=lambda job: {"images": predict_test(job)}))
                run_step(job, replace(job.steps["tune"], make=lambda job: {}))  # copied from the run
                run_step(job, job.steps["submit"])
        return 0

    return refit


def chosen_settings(job, network):
    """Return the settings for training a stage on all images: the folds' mean epoch and most frequent average.

    A plateau schedule becomes steps at the epochs in which the folds reduced the rate (their median).
    """
    config, paths = with_rate(job, network).config, sorted(job.run.folder.glob(f"fold*/{network.stage}/variants.json"))
    check(paths, f"{job.run.folder}: no fold has the variants.json of {network.stage}; train the run again")
    ends, names = [], []
    for summary in map(read_json, paths):
        names.append(summary["chosen"])
        ends.append(max(summary["variants"][names[-1]]["epochs"], default=config.epochs - 1) + 1)
    name = max(names, key=names.count)
    epochs = config.epochs if name in WHOLE else round(np.mean(ends))
    found = {"epochs": epochs, "averaging": [name if name in WHOLE else "last"], "keep": "highest"}
    found |= {"lr": config.lr, "frozen_lr": config.frozen_lr, "frozen_epochs": min(config.frozen_epochs, epochs)}
    if config.schedule == "plateau":
        metric, course = config.plateau_metric or config.metric, []
        for path in paths:
            history = read_csv(path.with_name("history.csv"), [metric.lstrip("-")])[metric.lstrip("-")]
            scores = (-history if metric.startswith("-") else history).fillna(-np.inf)[config.frozen_epochs :]
            course.append(reductions(scores.tolist(), config.patience))
        never = [config.epochs] * max(map(len, course))
        milestones = np.median([(*one, *never[len(one) :]) for one in course], axis=0) if never else never
        found |= {"schedule": "step", "milestones": [round(epoch) for epoch in milestones if epoch < config.epochs]}
    return found | {"cycles": min(config.cycles, max(1, epochs - found["frozen_epochs"]))}


def on_all_images(job, network):
    """Return the Network of a fold that holds out no image, with the chosen settings.

    After each epoch it is measured on some of the training images, which shows that it learns but decides nothing:
    neither the learning rate, nor when a class is dropped from the loss.
    """
    if network.fold != job.config.n_folds:  # trained on folds of its own
        return network
    settings = job.run.step("refit")["settings"][network.stage]
    lists = {name: tuple(values) for name, values in settings.items() if isinstance(values, list)}
    config = replace(network.config, **settings | lists)

    def rows(job, fold):
        every = network.rows(job, fold)[0]
        seen = np.random.default_rng(job.config.seed).permutation(every)
        return every, np.sort(seen[: max(1, len(every) // job.config.n_folds)])

    return replace(network, config=config, rows=rows, before_epoch=lambda history: None)
