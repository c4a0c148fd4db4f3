"""The queue of trainings: order, claims, leases of dead and silent processes, teams, stops."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from common.budget import Budget, Stopped
from common.paths import LEASE
from common.train import queue
from common.train.queue import claim, release, team_size, work_through


@dataclass(frozen=True)
class Training:
    """What the queue looks at of a Network."""

    stage: str
    needs: tuple = ()
    starts_from: object = None
    batch: int = 8

    @property
    def config(self):
        return SimpleNamespace(batch_size=self.batch)

    def is_finished(self, run):
        return (self.folder(run) / "final.safetensors").is_file()

    def folder(self, run):
        return run / self.stage


def finish(run, done=None):
    """Return a stand-in for the training of a network, which notes its stage in `done`."""

    def train(network):
        lease = json.loads((network.folder(run) / LEASE).read_text())
        assert lease["process"] == os.getpid()
        (network.folder(run) / "final.safetensors").touch()
        if done is not None:
            done.append(network.stage)

    return train


COARSE = Training("coarse")
FINE = Training("fine", starts_from=COARSE)
FUSED = Training("fused", needs=(FINE, Training("other")))
CHAIN = (COARSE, FINE, Training("other"), FUSED)


def test_trainings_come_after_their_sources_and_leases_are_given_back(tmp_path):
    done = []
    work_through((FUSED, FINE, COARSE, Training("other")), tmp_path, Budget(), finish(tmp_path, done))
    assert done == ["coarse", "fine", "other", "fused"]
    assert not list(tmp_path.rglob("lease*")) and not list(tmp_path.rglob(".*"))
    work_through(CHAIN, tmp_path, Budget(), finish(tmp_path, done))
    assert len(done) == 4  # nothing is left to do


def test_the_lease_of_a_process_killed_after_its_training_is_removed(tmp_path):
    (tmp_path / "coarse").mkdir()
    (tmp_path / "coarse" / "final.safetensors").touch()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "coarse" / LEASE).write_text(json.dumps(queue._owner() | {"process": gone.pid}))
    work_through((COARSE, FINE), tmp_path, Budget(), finish(tmp_path))
    assert not list(tmp_path.rglob("lease*")) and (tmp_path / "fine" / "final.safetensors").is_file()


def test_a_failed_training_gives_its_lease_back(tmp_path):
    def fail(network):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work_through(CHAIN, tmp_path, Budget(), fail)
    assert claim(tmp_path / "coarse" / LEASE)


def test_one_of_two_claims_succeeds(tmp_path):
    other = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, path = int(other.stdout), tmp_path / LEASE
    path.write_text(json.dumps(queue._owner() | {"process": dead}))
    assert claim(path)  # of a process of this machine that has ended
    path.write_text(json.dumps(queue._owner(os.getppid())))
    assert not claim(path)
    release(path)
    assert claim(path) and json.loads(path.read_text())["process"] == os.getpid()


@pytest.mark.parametrize("content", [json.dumps({"machine": ["elsewhere"], "process": 1}), "", "[]"])
def test_a_lease_of_another_machine_expires_in_silence(tmp_path, content):
    path = tmp_path / LEASE
    path.write_text(content)
    assert not claim(path)
    before = time.time() - queue.EXPIRES_SECONDS - 5
    os.utime(path, (before, before))
    assert claim(path)


def test_a_takeover_that_was_killed_is_taken_over(tmp_path):
    path, before = tmp_path / LEASE, time.time() - queue.EXPIRES_SECONDS - 5
    for name in (path, path.with_suffix(".takeover")):
        name.write_text(json.dumps({"machine": ["elsewhere"], "process": 1}))
        os.utime(name, (before, before))
    assert not claim(path)  # clears the way
    assert claim(path) and [each.name for each in tmp_path.iterdir()] == [LEASE]


def test_the_owner_touches_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "BEAT_SECONDS", 0.01)

    def train(network):
        path, before = network.folder(tmp_path) / LEASE, time.time() - 1000
        os.utime(path, (before, before))
        until = time.monotonic() + 20
        while path.stat().st_mtime < before + 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert path.stat().st_mtime > before + 900
        (network.folder(tmp_path) / "final.safetensors").touch()

    work_through((COARSE,), tmp_path, Budget(), train)


def test_who_waits_for_others_stops_with_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)
    (tmp_path / "coarse").mkdir()
    (tmp_path / "coarse" / LEASE).write_text(json.dumps(queue._owner(os.getppid())))
    with pytest.raises(Stopped, match="hours are over"):
        work_through((COARSE, FINE), tmp_path, Budget(1e-5), finish(tmp_path))


def _work(run, trained):
    queue.POLL_SECONDS = 0.01

    def train(network):
        time.sleep(0.02)
        finish(run)(network)
        with open(trained, "a") as file:
            file.write(f"{network.stage}\n")

    trainings = [Training(f"fold{fold}-{n}") for fold in range(6) for n in range(2)]
    work_through([replace(one, needs=()) for one in trainings], run, Budget(), train)


def test_four_processes_train_everything_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(tmp_path, tmp_path / "trained")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    trained = (tmp_path / "trained").read_text().split()
    assert len(trained) == 12 and len(set(trained)) == 12


def test_a_team_divides_the_batches_of_all_trainings_to_come(tmp_path, monkeypatch):
    assert team_size(1, [16, 8], 16) == 8
    asked = []
    monkeypatch.setattr(queue, "team_size", lambda *args: asked.append(args) or 1)
    later = Training("later", starts_from=COARSE, batch=3)
    work_through((COARSE, later), tmp_path, Budget(), finish(tmp_path))
    assert asked == [(1, [COARSE.config.batch_size, 3], 1, None)]


def test_a_paused_process_keeps_its_lease_and_an_earlier_one_of_its_number_does_not(tmp_path):
    path, owner = tmp_path / LEASE, queue._owner(os.getppid())
    path.write_text(json.dumps(owner))
    os.utime(path, (0, 0))  # silent for long
    assert not claim(path)
    path.write_text(json.dumps(owner | {"began": "1"}))
    assert claim(path)


def test_who_lost_the_lease_stops_and_leaves_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "BEAT_SECONDS", 0.01)
    budget, path = Budget(), tmp_path / "coarse" / LEASE
    other = json.dumps({"machine": ["elsewhere"], "process": 1})

    def train(network):
        path.write_text(other)
        for _ in range(500):
            if budget.reason:
                break
            time.sleep(0.01)
        raise Stopped(budget.reason)

    with pytest.raises(Stopped, match="another process has taken this training over"):
        work_through((COARSE,), tmp_path, budget, train)
    assert path.read_text() == other


@pytest.mark.parametrize(
    ("n_ready", "processes", "wanted", "batch", "size"),
    [
        (10, 8, None, 8, 1),  # enough for all
        (3, 8, None, 8, 2),
        (1, 8, None, 8, 8),
        (1, 8, None, 4, 4),  # no more than the batch can be divided among
        (1, 3, None, 8, 2),
        (10, 8, 4, 8, 4),
        (10, 2, 4, 8, 2),
        (0, 8, None, 8, 1),
    ],
)
def test_how_many_processes_train_a_network_together(n_ready, processes, wanted, batch, size):
    assert team_size(n_ready, [batch], processes, wanted) == size
