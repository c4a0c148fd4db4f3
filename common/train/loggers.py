"""`--log-to`: log each epoch's metrics to TensorBoard, Weights & Biases or MLflow, one logger run per training."""

import contextlib
import os
import time
import uuid
from dataclasses import asdict

from common.errors import InputError, log
from common.paths import read_json, write_json
from common.train import distributed


class EpochLog:
    """Log a training's epochs, called with its history after each; a resumed training continues the logger's run.

    The training's folder records the logger's run and the number of logged epochs, so each epoch is logged once. An
    error of the logger never stops a training.
    """

    def __init__(self, kind, job, network):
        self._kind, self._job, self._network, self._writer = kind, job, network, None
        self._path = network.folder(job.run) / "logged.json"
        found = read_json(self._path) if self._path.is_file() else {}
        known = isinstance(found, dict) and found.get("kind") == kind and isinstance(found.get("epochs"), int)
        self._state = found if known else {"kind": kind, "run": None, "epochs": 0}

    def open(self):
        """Open the logger's run, to detect missing credentials at once. Raises InputError with the reason."""
        if self._writer is None:
            name = f"fold{self._network.fold}-{self._network.stage}"
            settings = {key: str(value) for key, value in asdict(self._network.config).items()}
            settings |= {"solution": self._job.solution, "preset": self._job.preset, "training": name}
            try:
                self._writer = WRITERS[self._kind](self._job, name, settings, self._state)
            except Exception as error:  # loggers have their own kinds of errors
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise InputError(f"--log-to {self._kind}: {reason}") from None
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self._state)

    def __call__(self, history):
        """Log the epochs of a history (a list of dicts of `epoch` and metrics) that are not logged yet."""
        try:
            for row in history[self._state["epochs"] :]:
                self.open()
                self._writer[0]({k: float(v) for k, v in row.items() if k != "epoch"}, int(row["epoch"]) + 1)
                self._state["epochs"] += 1
                write_json(self._path, self._state)
        except Exception as error:
            log.warning(f"--log-to {self._kind}: {error}; the training continues, and the next epoch tries again")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self._writer is not None:
            self._writer[1](kind is None)


def _open_tensorboard(job, name, settings, state):
    """Return the functions `log(figures, step)` and `close(finished)`, as do the other two openers."""
    from torch.utils.tensorboard import SummaryWriter

    # purge_step: drop what was written just before a kill
    writer = SummaryWriter(job.run.path("tensorboard", name), purge_step=state["epochs"] + 1)
    writer.add_text("settings", "\n".join(f"- {k}: {v}" for k, v in settings.items()))

    def add(figures, step):
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return add, lambda finished: writer.close()


def _open_wandb(job, name, settings, state):
    import wandb

    state["run"] = state["run"] or uuid.uuid4().hex[:12]
    about = {"project": f"cxr-{job.solution}", "group": job.run.folder.resolve().name, "name": name, "config": settings}
    quiet = wandb.Settings(silent=True, console="off")
    run = wandb.init(id=state["run"], resume="allow", dir=job.run.folder, settings=quiet, **about)
    return lambda figures, step: run.log(figures, step=step), lambda finished: run.finish(exit_code=int(not finished))


def _open_mlflow(job, name, settings, state):
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    here = f"sqlite:///{job.run.path('mlflow.db').resolve()}"
    client, title = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or here), f"cxr-{job.solution}"
    if state["run"] is None:
        found = client.get_experiment_by_name(title)
        number = found.experiment_id if found else client.create_experiment(title)
        state["run"] = client.create_run(number, run_name=f"{job.run.folder.resolve().name} {name}").info.run_id
        client.log_batch(state["run"], params=[Param(k, v) for k, v in settings.items()])
    run = state["run"]
    client.update_run(run, "RUNNING")
    state["epochs"] = len(client.get_metric_history(run, "train_loss"))  # exact even after a kill

    def add(figures, step):
        now = int(1000 * time.time())
        client.log_batch(run, [Metric(key, value, now, step) for key, value in figures.items()])

    return add, lambda finished: client.set_terminated(run, "FINISHED" if finished else "KILLED")


WRITERS = {"tensorboard": _open_tensorboard, "wandb": _open_wandb, "mlflow": _open_mlflow}


def open_log(job, network, finished):
    """Return a context of the EpochLog for `--log-to`, or of None; if finished, only when epochs are not logged."""
    if job.options.log_to is None or not distributed.is_main():
        return contextlib.nullcontext()
    found = EpochLog(job.options.log_to, job, network)
    if not finished:
        found.open()
    return found
