"""Resume files: written in the background, whole or not at all, with the disk's own error."""

import errno
import threading
from contextlib import contextmanager

import pytest
import torch

from common.train import checkpoint, loop
from common.train.checkpoint import load_resume, save_resume
from tests.common.train.test_loop import small, step, train

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_resume_files_come_back_and_leave_nothing_else(tmp_path):
    state = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "history": [{"epoch": 0, "auc": 0.5}], "key": "k"}
    save_resume(tmp_path / "last.ckpt", state)
    found = load_resume(tmp_path / "last.ckpt")
    assert torch.equal(found["model"].pop("w"), state["model"].pop("w")) and found == state
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("size", [1, 10_000_000])
def test_a_full_disk_is_named_by_the_system(monkeypatch, size):
    """Before torch writes anything to the file, and in the middle of it."""

    @contextmanager
    def full(path):
        yield "/dev/full"

    monkeypatch.setattr(checkpoint, "atomic_path", full)
    with pytest.raises(OSError, match="No space left") as raised:
        save_resume("last.ckpt", {"w": torch.zeros(size, dtype=torch.uint8)})
    assert raised.value.errno == errno.ENOSPC


def test_training_goes_on_while_its_state_is_written(tmp_path, monkeypatch):
    """The first epoch's state is written only after the next epoch has begun, with the weights of the first."""
    going_on, saved, done = threading.Event(), [], []

    def slow(path, state):
        assert going_on.wait(60)
        saved.append(state)

    def counted(model, batch):
        done.append(model)
        if len(done) == 4:
            going_on.set()
        return step(model, batch)

    monkeypatch.setattr(loop, "save_resume", slow)
    train(tmp_path / "f", small(epochs=2, batch_size=16, averaging=("last",)), wrap_step=counted)
    assert len(done) == 4 and [each["epoch"] for each in saved] == [1, 2]
    one, two = (each["model"]["head.weight"] for each in saved)
    assert not torch.equal(one, two) and len(saved[0]["history"]) == 1


def test_a_failed_write_stops_the_training_at_the_next_save(tmp_path, monkeypatch):
    done = []

    def full(path, state):
        raise FULL

    def counted(model, batch):
        done.append(model)
        return step(model, batch)

    monkeypatch.setattr(loop, "save_resume", full)
    config = small(epochs=4, batch_size=16, averaging=("last",))
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path / "f", config, wrap_step=counted)
    assert len(done) == 4  # two epochs of two steps
    with pytest.raises(OSError, match="No space left"):  # the last one, too
        train(tmp_path / "g", small(epochs=1, batch_size=16, averaging=("last",)))
    assert not (tmp_path / "g" / "final.safetensors").exists()


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_training_whose_last_write_was_lost_ends_with_the_same_bits(tmp_path, monkeypatch, lost):
    config, write, count = small(epochs=4, batch_size=16, window=1, best_k=1), loop.save_resume, []
    train(tmp_path / "whole" / "f", config)

    def loses(path, state):
        count.append(path)
        if len(count) > lost:
            raise FULL
        write(path, state)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(loop, "save_resume", loses)
        train(tmp_path / "cut" / "f", config)
    assert load_resume(tmp_path / "cut" / "f" / "last.ckpt")["epoch"] == lost
    train(tmp_path / "cut" / "f", config)
    final = [(tmp_path / name / "f" / "final.safetensors").read_bytes() for name in ("whole", "cut")]
    assert final[0] == final[1]


def test_weights_are_deleted_only_when_the_state_without_them_is_on_the_disk(tmp_path, monkeypatch):
    """A training killed before continues from the state before, which may need them."""
    kept = []

    def note(path, state):
        kept.append(sorted(each.name for each in path.parent.glob("epoch*")))

    monkeypatch.setattr(loop, "save_resume", note)
    train(tmp_path / "f", small(epochs=3, averaging=("last",)))
    names = [f"epoch{number:03d}.safetensors" for number in range(3)]
    assert kept == [names[:1], names[:2], names[1:]]
