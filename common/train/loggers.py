"""`--log-to`: the figures of each epoch for TensorBoard, Weights & Biases or MLflow, one of their runs per training."""

import contextlib
import logging
import os
import time
import uuid
from dataclasses import asdict

from common.errors import InputError
from common.paths import read_json, write_json
from common.train import distributed

log = logging.getLogger(__name__)
STATE = "logged.json"


class EpochLog:
    """Log a training's epochs, called with its history after each; a resumed training continues the logger's run.

    kind: a key of WRITERS. The training's folder keeps the run and the number of epochs logged, so each is logged once.
    An error of the logger never stops a training.
    """

    def __init__(self, kind, job, network):
        self._kind, self._job, self._network, self._writer = kind, job, network, None
        self._path = network.folder(job.run) / STATE
        found = read_json(self._path) if self._path.is_file() else {}
        known = isinstance(found, dict) and found.get("kind") == kind and isinstance(found.get("epochs"), int)
        self._state = found if known else {"kind": kind, "run": None, "epochs": 0}

    def open(self):
        """Open the logger's run, so that missing credentials are noticed at once. Raises InputError with its reason."""
        if self._writer is None:
            try:
                self._writer = WRITERS[self._kind](self._job, self._network, self._state)
            except Exception as error:  # of the logger's own kinds
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise InputError(f"--log-to {self._kind}: {reason}") from None
            self._keep()

    def __call__(self, history):
        """Log the epochs of a history (a list of dicts of `epoch` and figures) that are not logged yet."""
        try:
            for row in history[self._state["epochs"] :]:
                self.open()
                self._writer.log({k: float(v) for k, v in row.items() if k != "epoch"}, int(row["epoch"]) + 1)
                self._state["epochs"] += 1
                self._keep()
        except Exception as error:
            log.warning(f"--log-to {self._kind}: {error}; the training continues, and the next epoch tries again")

    def _keep(self):
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self._state)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self._writer is not None:
            self._writer.close(kind is None)


def _name(network):
    return f"fold{network.fold}-{network.stage}"


def _settings(job, network):
    return {"solution": job.solution, "preset": job.preset, "fold": network.fold, "stage": network.stage} | {
        name: str(value) for name, value in asdict(network.config).items()
    }


class _TensorBoard:
    def __init__(self, job, network, state):
        from torch.utils.tensorboard import SummaryWriter

        folder = job.run.path("tensorboard", _name(network))
        self._writer = SummaryWriter(folder, purge_step=state["epochs"] + 1)  # of a kill before the state was kept
        self._writer.add_text("settings", "\n".join(f"- {k}: {v}" for k, v in _settings(job, network).items()))

    def log(self, figures, step):
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, finished):
        self._writer.close()


class _Wandb:
    def __init__(self, job, network, state):
        import wandb

        state["run"] = state["run"] or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=f"cxr-{job.solution}",
            group=job.run.folder.resolve().name,
            name=_name(network),
            id=state["run"],
            resume="allow",
            dir=job.run.folder,
            config=_settings(job, network),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, figures, step):
        self._run.log(figures, step=step)

    def close(self, finished):
        self._run.finish(exit_code=0 if finished else 1)


class _Mlflow:
    def __init__(self, job, network, state):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        here = f"sqlite:///{job.run.path('mlflow.db').resolve()}"
        self._client, self._metric = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or here), Metric
        name = f"cxr-{job.solution}"
        if state["run"] is None:
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            title = f"{job.run.folder.resolve().name} {_name(network)}"
            state["run"] = self._client.create_run(number, run_name=title).info.run_id
            self._client.log_batch(state["run"], params=[Param(k, str(v)) for k, v in _settings(job, network).items()])
        self._id = state["run"]
        self._client.update_run(self._id, "RUNNING")
        state["epochs"] = len(self._client.get_metric_history(self._id, "train_loss"))

    def log(self, figures, step):
        now = int(1000 * time.time())
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in figures.items()])

    def close(self, finished):
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


WRITERS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}


def open_log(job, network, finished):
    """Return a context of the EpochLog that `--log-to` asks for, else of None; finished: only if it lacks epochs."""
    if job.options.log_to is None or not distributed.is_main():
        return contextlib.nullcontext()
    found = EpochLog(job.options.log_to, job, network)
    if not finished:
        found.open()
    return found
