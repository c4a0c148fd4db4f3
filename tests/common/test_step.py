"""Steps: built once, rebuilt when anything they depend on has changed, refused to readers while stale."""

from types import SimpleNamespace

import pytest

from common.errors import InputError
from common.runs import Run
from common.step import Step, cached_hash, is_current, require, run_step


@pytest.fixture
def job(tmp_path):
    """Two steps: `second` needs `first`; each writes what it reads to its file and counts its calls."""

    def make(name):
        def write(job):
            job.made.append(name)
            job.run.path(f"{name}.txt").write_text(f"{name} {job.config[name]}")
            return {"note": job.config[name]}

        return write

    first = Step("first", make("first"), reads=lambda job: job.config["first"], files=("first.txt",))
    second = Step(
        "second", make("second"), ("first",), lambda job: job.config["second"], lambda config: ("second.txt",)
    )
    job = SimpleNamespace(run=Run(tmp_path / "run"), config={"first": 1, "second": 1}, made=[])
    job.steps = {step.name: step for step in (first, second)}
    yield job
    job.run.close()


def run(job, *names):
    """Run steps and return those that were built."""
    job.made.clear()
    for name in names or job.steps:
        run_step(job, job.steps[name])
    return list(job.made)


def test_a_step_is_built_once_and_again_after_each_change(job):
    assert run(job) == ["first", "second"] and run(job) == []
    job.config["second"] = 2
    assert run(job) == ["second"]
    job.config["first"] = 2
    assert run(job) == ["first", "second"]
    job.config["first"] = 1  # the earlier result is gone
    assert run(job) == ["first", "second"]


@pytest.mark.parametrize("content", [None, "", "first 2", "first 1 and more"])
def test_a_file_that_is_missing_or_changed_is_written_again(content, job):
    run(job)
    path = job.run.path("first.txt")
    path.unlink() if content is None else path.write_text(content)
    assert not is_current(job, job.steps["second"])
    with pytest.raises(InputError, match=r"`first` left first\.txt, which is missing or damaged; run the verb `first`"):
        require(job, job.steps["second"])
    assert run(job) == ["first"] and path.read_text() == "first 1"  # the same content: `second` is still current


def test_steps_are_rebuilt_without_the_stored_configuration(job):
    run(job)
    job.run.path("config.json").write_text("{")
    job.config["second"] = 2
    assert run(job) == ["second"]


def test_an_error_names_the_first_verb_to_run(job):
    with pytest.raises(InputError, match="run: `first` has no result yet; run the verb `first`"):
        require(job, job.steps["second"])
    run(job, "first")
    with pytest.raises(InputError, match="`second` has no result yet"):
        require(job, job.steps["second"])
    run(job)
    assert require(job, job.steps["second"])["note"] == 1 and is_current(job, job.steps["second"])
    job.config["first"] = 5
    with pytest.raises(InputError, match="`first` is out of date; run the verb `first`"):
        require(job, job.steps["second"])


def test_an_interrupted_step_does_not_count_as_finished(job):
    run(job)
    job.config["first"] = 2
    failing = Step("first", lambda job: 1 / 0, reads=lambda job: job.config["first"], files=("first.txt",))
    with pytest.raises(ZeroDivisionError):
        run_step(job, failing)
    job.config["first"] = 1  # its file still has the content of these settings
    assert run(job) == ["first"]


def test_a_file_that_a_step_left_out_is_not_missed(job):
    step = Step("empty", lambda job: None, files=("none.txt",))
    run_step(job, step)
    assert is_current(job, step)
    job.run.path("none.txt").touch()
    assert not is_current(job, step)


def test_hashes_are_cached_while_a_file_is_unchanged(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    before = cached_hash(path)
    assert cached_hash(path) == before
    path.write_text("two and more")
    assert cached_hash(path) != before
