"""The time budget: it interrupts any verb, trainings only at a save, and nothing after its block."""

import math
import signal
import time

import pytest

from common.budget import Budget, Stopped, keep_handlers

MOMENT = 0.05 / 3600  # hours


def wait(seconds=5.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.005)


def test_the_end_of_the_hours_interrupts_any_work():
    with pytest.raises(Stopped, match="hours are over"), Budget(MOMENT).watching():
        wait()


def test_hours_may_be_endless():
    budget = Budget(math.inf)
    with budget.watching():
        wait(0.01)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 1e8 and not budget.is_over()


def test_bad_files_are_not_blamed_for_it():
    with pytest.raises(Stopped), Budget(MOMENT).watching():
        try:
            wait()
        except Exception:
            pytest.fail("taken for an error of the work")


def test_a_stop_in_a_destructor_is_not_lost():
    class Slow:
        def __del__(self):
            wait(0.2)

    with pytest.raises(Stopped), Budget(MOMENT).watching():
        Slow()
        wait()


def test_a_training_is_only_told():
    budget = Budget(MOMENT)
    with budget.watching():
        budget.training = True
        wait(0.2)
        assert budget.spent() and budget.reason.endswith("hours are over")
        budget.training = False
    with Budget(None).watching():
        wait(0.01)


def test_what_follows_a_training_is_stopped():
    budget = Budget(MOMENT)
    with pytest.raises(Stopped, match="hours are over"), budget.watching():
        budget.training = True
        wait(0.2)  # the hours end, and the training does not look again
        budget.training = False
        wait()


def test_a_second_budget_gives_the_signals_back():
    first = Budget()
    first.training = True
    with keep_handlers():
        Budget()
    signal.raise_signal(signal.SIGTERM)
    assert first.reason == "SIGTERM received"


def test_nothing_happens_after_the_block():
    before = signal.getsignal(signal.SIGALRM)
    with Budget(MOMENT).watching():
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0 and signal.getsignal(signal.SIGALRM) != before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == before
    wait(0.2)
