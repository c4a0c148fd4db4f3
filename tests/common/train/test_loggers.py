"""`--log-to`: what TensorBoard, Weights & Biases and MLflow hold, read back, after a training that was interrupted."""

import json
import struct
from dataclasses import replace

import pandas as pd
import pytest
import torch

from common import extras
from common.budget import Stopped
from common.config import FitConfig
from common.errors import InputError
from common.images import prepare_images
from common.network import train
from common.options import Options
from common.paths import read_json
from common.train import loggers
from tests.toy import TOY, make_job, network, write_data

FIT = FitConfig(epochs=4, batch_size=4, precision="fp32")


@pytest.fixture
def job(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_DIR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = make_job(tmp_path / "run", data=write_data(tmp_path / "data"))
    prepare_images(job, TOY)
    yield job
    job.run.close()


def read_tensorboard(job):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job.run.path("tensorboard", "fold0-net"))).Reload()
    return [(event.step, event.value) for event in events.Scalars("train_loss")]


def read_mlflow(job):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{job.run.path('mlflow.db')}")
    (run,) = client.search_runs([client.get_experiment_by_name("cxr-toy").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["lr"] == str(FIT.lr)
    assert run.info.run_name == "run fold0-net"
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train_loss")]


def read_wandb(job):
    """Read offline files: LevelDB's log format, a header of 7 bytes, records of (checksum, size, kind, content)."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids = [], set()
    for path in sorted(job.run.folder.glob("wandb/offline-run-*/run-*.wandb")):
        content, place, record = path.read_bytes(), 7, b""
        while place + 7 <= len(content):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, size, kind = struct.unpack_from("<IHB", content, place)
            record = (b"" if kind in (1, 2) else record) + content[place + 7 : place + 7 + size]
            place += 7 + size
            if kind not in (1, 4):  # whole, or its last part
                continue
            found = Record.FromString(record)
            if found.HasField("run"):
                ids.add(found.run.run_id)
            if found.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in found.history.item}
                rows.append((items["_step"], items["train_loss"]))
    assert len(ids) == 1  # one run, although it was resumed
    return rows


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow}


SLOW = {"wandb", "mlflow"}  # to import and to open a database
KINDS = [pytest.param(kind, marks=pytest.mark.long if kind in SLOW else ()) for kind in READERS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_continues_its_run_without_repeated_steps(job, kind):
    pytest.importorskip(extras.EXTRAS[kind][0], reason=f"pip install -e '.[{kind}]'")
    job.options = replace(job.options, log_to=kind)
    steps = []

    def step(model, images, target):
        steps.append(len(images))
        if len(steps) == 3:
            raise Stopped("as by --hours")
        return torch.nn.functional.binary_cross_entropy_with_logits(model(images), target)

    with pytest.raises(Stopped):
        train(job, network(FIT, 0, step=step))
    assert read_json(job.run.path("fold0", "net", "logged.json"))["epochs"] == 2
    for _ in range(2):  # the second call only reads the finished training
        fitted = train(job, network(FIT, 0, step=step))
    found = READERS[kind](job)
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx(fitted.history["train_loss"].tolist(), rel=1e-6)


class Memory:
    """A logger that keeps its rows and refuses the first `errors` of them."""

    rows, errors, ends = (), 0, ()

    @classmethod
    def open(cls, job, name, settings, state):
        state["run"] = "one"
        return cls.log, cls.close

    @classmethod
    def log(cls, figures, step):
        if cls.errors:
            cls.errors -= 1
            raise ConnectionError("no network")
        cls.rows += ((step, *figures),)

    @classmethod
    def close(cls, finished):
        cls.ends += (finished,)


@pytest.fixture
def memory(job, monkeypatch):
    monkeypatch.setitem(loggers.WRITERS, "tensorboard", Memory.open)
    monkeypatch.setattr(extras, "is_installed", lambda extra: True)
    job.options = replace(job.options, log_to="tensorboard")
    for name, value in {"rows": (), "errors": 0, "ends": ()}.items():
        monkeypatch.setattr(Memory, name, value)
    return job


def test_a_loggers_error_does_not_stop_a_training(memory, caplog):
    caplog.set_level("INFO", "common")
    Memory.errors = 2
    train(memory, network(FIT, 0))
    assert caplog.text.count("--log-to tensorboard: no network; the training continues") == 2
    assert [step for step, *_ in Memory.rows] == [1, 2, 3, 4] and Memory.ends == (True,)
    columns = ("lr", "train_loss", "loss", "score", "accuracy", "seconds", "memory_mb")
    assert Memory.rows[0][1:] == columns


def test_epochs_from_before_the_option_are_logged_too(memory):
    options, memory.options = memory.options, replace(memory.options, log_to=None)
    fitted = train(memory, network(FIT, 0))
    assert not memory.run.path("fold0", "net", "logged.json").exists() and not Memory.rows
    memory.options = options
    assert fitted.history.equals(pd.DataFrame(train(memory, network(FIT, 0)).history))
    assert [step for step, *_ in Memory.rows] == [1, 2, 3, 4]


def test_a_logger_that_cannot_start_is_refused_in_one_line(memory, monkeypatch):
    monkeypatch.setitem(loggers.WRITERS, "tensorboard", lambda *_: 1 / 0)
    with pytest.raises(InputError, match=r"^--log-to tensorboard: division by zero$"):
        train(memory, network(FIT, 0))
    monkeypatch.setattr(extras, "is_installed", lambda extra: False)
    with pytest.raises(InputError, match=r"^--log-to wandb needs further packages: pip install -e '\.\[wandb\]'$"):
        Options(log_to="wandb")
